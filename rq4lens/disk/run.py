"""A run directory: its files by name, and the tables of every prompt's own numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rq4lens.disk.files import read_regular_bytes
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.results import HOOK, ConditionResult, GridResult, GridSettings

RESULTS = "rq4_results.json"
PER_PROMPT = "per_prompt.parquet"
ANALYSIS = "analysis.json"
SUMMARY = "summary.txt"
RUN = "run.json"
CONDITIONS = "conditions"
MEASURED = "measured"
MAPS = "maps"
ACTIVATIONS = "activations"
FIGURES = "figures"
REPORT = "report.html"
PROMPTS = "prompts.json"
AUDIT = "audit.json"
HEADS = "heads"
"""Folder of head cards, a JSON file a head."""

LAYERS = "layers.json"
LAYERS_PER_PROMPT = "layers_per_prompt.parquet"
JOB = "job.json"
CELL = "cell.json"
"""The settings of a study's cell, for ``rq4lens run`` to add a main job to it."""

MARKS = frozenset(
    (RESULTS, PER_PROMPT, ANALYSIS, RUN, CONDITIONS, MEASURED, MAPS, ACTIVATIONS, LAYERS, JOB, CELL)
)
"""By one of these a run directory is known, however early the run was stopped."""

KINDS = ("raw", "mapped")

FORMAT = 2
"""Version of the files; stands in ``run.json``."""

MAX_HEADS = 10_000
"""No layer has more; a damaged number must not fill the memory."""


def refuse_foreign(directory: Path) -> None:
    """Refuse to write a run among somebody's own files."""
    try:
        there = {entry.name for entry in directory.iterdir() if not entry.name.startswith(".")}
    except OSError:
        return  # it is missing, or cannot be read: whoever writes there says so
    if there and there.isdisjoint(MARKS):
        raise UserError(
            f"{str(directory)!r} holds other files ({', '.join(sorted(there)[:3])}) and no run, "
            "whose report or summary could replace yours: name an empty folder with --out."
        )


def ranking_file(layer: int, alpha: float, method: str | None = None) -> str:
    """Name of a ranking file."""
    start = "single_head" if method is None else f"ranking_{method}"
    return f"{start}_L{layer}_{HOOK}_alpha{alpha:g}.json"


def remove_other_rankings(ranking: Path) -> None:
    """Remove what an earlier run with another layer or strength left: it is not this run's."""
    for path in ranking.parent.glob(f"single_head_L*_{HOOK}_alpha*.json"):
        if path != ranking and path.is_file():
            path.unlink()


def written_files(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The files of a finished run that its provenance holds checksums of."""
    ranking = ranking_file(settings["layer"], settings["alpha"])
    return (RESULTS, PER_PROMPT, ranking, ANALYSIS, PROMPTS, AUDIT, SUMMARY)


def file_sha256(path: Path) -> str | None:
    """SHA-256 of a file's content, or None where there is no such file."""
    try:
        return hashlib.sha256(read_regular_bytes(path)).hexdigest()
    except (OSError, ValueError):
        return None


def per_prompt_table(grid: GridResult) -> pd.DataFrame:
    """Every prompt's own numbers: a row per prompt, condition and kind."""
    return pd.concat(
        [_rows(grid, condition, kind) for condition in grid.conditions.values() for kind in KINDS],
        ignore_index=True,
    )


def _rows(grid: GridResult, condition: ConditionResult, kind: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt_id": grid.prompt_ids,
            "group": grid.groups,
            "layer": condition.layer,
            "cond": condition.cond,
            "heads": str(condition.heads),
            "alpha": condition.alpha,
            "kind": kind,
            "kl": getattr(condition, f"kl_{kind}_nats"),
            "answer_logprob_change": getattr(condition, f"answer_logprob_change_{kind}_nats"),
        }
    )


def grid_of_table(
    settings: GridSettings,
    table: pd.DataFrame,
    *,
    noise_floor_nats: float,
    provenance: Mapping[str, Any] | None = None,
) -> GridResult:
    """A grid from the table that :func:`per_prompt_table` made; a damaged one is a ValueError."""
    if not 1 <= settings.n_heads <= MAX_HEADS:
        raise ValueError(f"{settings.n_heads} heads")
    ids = dict(zip(map(str, table["prompt_id"]), map(str, table["group"]), strict=True))
    conditions = {
        str(cond): _condition(rows, settings.n_heads, list(ids))
        for cond, rows in table.groupby("cond", sort=False)
    }
    return GridResult(
        settings=settings,
        prompt_ids=tuple(ids),
        groups=tuple(ids.values()),
        conditions=conditions,
        noise_floor_nats=noise_floor_nats,
        provenance=provenance or {},
    )


def _condition(rows: pd.DataFrame, n_heads: int, ids: Collection[str]) -> ConditionResult:
    first = rows.iloc[0]

    def column(kind: str, name: str) -> np.ndarray:
        values = rows[rows["kind"] == kind].set_index("prompt_id")[name].loc[list(ids)]
        numbers = values.to_numpy(dtype=np.float64)
        if len(numbers) != len(ids) or not np.isfinite(numbers).all():
            raise ValueError(f"{name} of {first['cond']!r} has repeated prompts or is not finite")
        return numbers

    return ConditionResult(
        cond=str(first["cond"]),
        layer=int(first["layer"]),
        heads=HeadSet.parse(str(first["heads"]), n_heads),
        alpha=float(first["alpha"]),
        kl_raw_nats=column("raw", "kl"),
        kl_mapped_nats=column("mapped", "kl"),
        answer_logprob_change_raw_nats=column("raw", "answer_logprob_change"),
        answer_logprob_change_mapped_nats=column("mapped", "answer_logprob_change"),
    )
