"""Study files: one TOML names the pairs, layers, strengths, map kinds and metrics of a study."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rq4lens.analysis.structure.layers import COMPARED, METRICS, GridNumber, rank_by_of
from rq4lens.cluster.pieces import Request
from rq4lens.config import SETTINGS, config_from, preset, preset_names, refuse_unknown
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


class StudyFile(BaseModel):
    """What a study file may hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("study", min_length=1, description="what the report calls the study")
    layers: str = Field("ALL", description="layers of every pair: '24,26', '20-31' or ALL")
    alphas: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (0.3,), min_length=1, description="blend strengths, from 0 to 1"
    )
    map_kinds: tuple[str, ...] = Field(
        ("procrustes_scaled",), min_length=1, description="kinds of map"
    )
    metrics: tuple[str, ...] = Field(
        COMPARED, min_length=1, description="what layers and pairs are compared by, first one first"
    )
    settings: dict[str, Any] = Field({}, description="settings of every pair, as of a run")
    pairs: tuple[dict[str, Any], ...] = Field(
        ..., min_length=1, description="tables [[pairs]], each with a name and the pair's settings"
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
    """A study, checked.

    Args:
        metrics: what its sweeps are compared by; the first one is drawn.
        text: the file as it was written.
    """

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
    file = _checked(values, str(path))
    metrics = _metrics(file.metrics, str(path))
    shared = [name for name in SETTINGS if name not in NOT_SHARED]
    refuse_unknown(file.settings, shared, f"[settings] of {str(path)!r}")
    cells = tuple(cell for pair in file.pairs for cell in _cells_of(pair, file, str(path)))
    names = [cell.name for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"{str(path)!r} measures {twice!r} twice: give each pair a name of its own, and list "
            "each strength and map kind once."
        )
    return StudyPlan(file.name, cells, metrics, text)


def _checked(values: Mapping[str, Any], where: str) -> StudyFile:
    refuse_unknown(values, StudyFile.model_fields, where)
    try:
        return StudyFile(**values)
    except ValidationError as problem:
        first = problem.errors()[0]
        if first["type"] == "missing" and len(first["loc"]) == 1:
            raise UserError(f"{where}: {first['loc'][0]} is missing; give it.") from None
        key = ".".join(str(part) for part in first["loc"][:1])
        meaning = StudyFile.model_fields[key].description if key in StudyFile.model_fields else ""
        value = str(first.get("input"))[:80]
        raise UserError(
            f"{where}: {key} = {value!r} is not allowed ({first['msg']}); it means: {meaning}."
        ) from None


def _metrics(names: Sequence[str], where: str) -> tuple[GridNumber, ...]:
    for name in names:
        if name not in METRICS:
            raise UserError(f"metrics of {where!r} name {name!r}: {_advice(name, METRICS)}")
        if names.count(name) > 1:
            raise UserError(f"metrics of {where!r} name {name!r} twice: list each once.")
    return tuple(METRICS[name] for name in names)


def _advice(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(known)}."


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
