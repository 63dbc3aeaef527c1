"""Study files: one TOML names the pairs, layers, strengths, map kinds and metrics of a study."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rq4lens.analysis.structure.layers import COMPARED, METRICS, GridNumber, rank_by_of
from rq4lens.cluster.pieces import Request
from rq4lens.config import (
    SETTINGS,
    Settings,
    config_from,
    preset,
    preset_names,
    refuse_unknown,
    setting,
)
from rq4lens.disk.files import read_regular_file, short_reason
from rq4lens.errors import UserError
from rq4lens.jobs.sweep import parse_layers

STUDY = "study.toml"
CELLS = "cells"
NOT_SHARED = {
    *("pair", "base", "tuned", "base_revision", "tuned_revision"),
    *("layer", "control_layer", "alpha", "map_kind"),
}
"""Settings that belong to one pair, that a sweep over layers does not have, or that a study has by
another name."""


class StudyFile(Settings):
    """What a study file may hold."""

    name: str = setting("study", "what the report calls the study", min_length=1)
    layers: str = setting("ALL", "layers of every pair: '24,26', '20-31' or ALL")
    alphas: tuple[Annotated[float, Field(ge=0, le=1)], ...] = setting(
        (0.3,), "blend strengths, from 0 to 1", min_length=1
    )
    map_kinds: tuple[str, ...] = setting(("procrustes_scaled",), "kinds of map", min_length=1)
    metrics: tuple[str, ...] = setting(
        COMPARED, "what layers and pairs are compared by, first one first", min_length=1
    )
    settings: dict[str, Any] = setting({}, "settings of every pair, as of a run")
    pairs: tuple[dict[str, Any], ...] = setting(
        (), "tables [[pairs]], each with a name and the pair's settings", min_length=1
    )


@dataclass(frozen=True)
class Cell:
    """One sweep of a study: a pair, by its name there, at one strength through one kind of map."""

    pair: str
    request: Request

    @property
    def name(self) -> str:
        """Name of its folder."""
        config = self.request.config
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in self.pair)
        return f"{safe}_a{config.patching.alpha:g}_{config.patching.map_kind}"

    def directory(self, study: Path) -> Path:
        """Its run directory in the study's."""
        return study / CELLS / self.name


@dataclass(frozen=True)
class StudyPlan:
    """A study, checked: its sweeps, what they are compared by, and its file as it was written."""

    name: str
    cells: tuple[Cell, ...]
    metrics: tuple[GridNumber, ...]
    text: str


def read_study(path: Path) -> StudyPlan:
    """Read and check a study file.

    Args:
        path: the TOML file.

    Returns:
        The study.

    Raises:
        UserError: if the file is missing or damaged, has an unknown key (the nearest known one is
            named), or a value that is not allowed.
    """
    try:
        text = read_regular_file(path)
        values = tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"study file {str(path)!r} does not exist: name a TOML file.") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(
            f"study file {str(path)!r} cannot be read as TOML: {short_reason(problem)}."
        ) from None
    refuse_unknown(values, StudyFile.model_fields, str(path))
    if "pairs" not in values:
        raise UserError(f"{path!s}: pairs is missing; give it.")
    file = StudyFile.checked(values, str(path))
    refuse_unknown(file.metrics, METRICS, str(path), "metric")
    shared = [name for name in SETTINGS if name not in NOT_SHARED]
    refuse_unknown(file.settings, shared, f"[settings] of {str(path)!r}")
    cells = tuple(cell for pair in file.pairs for cell in _cells_of(pair, file, str(path)))
    for name, n in Counter(file.metrics).items():
        if n > 1:
            raise UserError(f"metrics of {str(path)!r} name {name!r} twice: list each once.")
    for name, n in Counter(cell.name for cell in cells).items():
        if n > 1:
            raise UserError(
                f"{str(path)!r} measures {name!r} twice: give each pair a name of its own, and "
                "list each strength and map kind once."
            )
    return StudyPlan(file.name, cells, tuple(METRICS[name] for name in file.metrics), text)


def _cells_of(pair: Mapping[str, Any], file: StudyFile, where: str) -> list[Cell]:
    values = dict(pair)
    layers = parse_layers(str(values.pop("layers", file.layers)))
    name = str(values.pop("name", None) or values.get("pair") or "")
    if not name:
        raise UserError(f"{where}: a table of [[pairs]] has no name: give it one.")
    where = f"pair {name!r} of {where}"
    refuse_unknown(values, [*SETTINGS, "name", "layers"], where)
    start = {}
    if "base" not in values and values.get("pair") in preset_names():
        start = preset(values["pair"]).flat()
    ranking = rank_by_of(file.metrics) if "metrics" in file.model_fields_set else None
    ranked = {} if ranking is None else {"rank_by": ranking}
    settings = {**start, **ranked, **file.settings, **values}
    settings.setdefault("pair", name)
    asked = None if layers is None else tuple(layers)
    configs = [
        config_from({**settings, "alpha": alpha, "map_kind": kind}, where)
        for alpha in file.alphas
        for kind in file.map_kinds
    ]
    return [Cell(name, Request("sweep", config, asked)) for config in configs]
