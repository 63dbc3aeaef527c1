"""A run directory: its files by name, and the tables of every prompt's own numbers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.disk.files import read_regular_bytes
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.results import (
    EVERY,
    EVERY_LAYER,
    HOOK,
    Compared,
    ConditionResult,
    GridResult,
    GridSettings,
    PatchRow,
    Transfer,
)

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
NEXT_TOKENS = "next_tokens.json"
"""The likeliest next tokens of each measured prompt, clean and patched."""

HEADS = "heads"
"""Folder of head cards, a JSON file a head."""

LAYERS = "layers.json"
LAYERS_PER_PROMPT = "layers_per_prompt.parquet"
POSITIONS = "positions.json"
POSITIONS_PER_PROMPT = "positions_per_prompt.parquet"
JOB = "job.json"
CELL = "cell.json"
"""The settings of a study's cell, for ``rq4lens run`` to add a main job to it."""

MARKS = frozenset(
    (RESULTS, PER_PROMPT, ANALYSIS, RUN, CONDITIONS, MEASURED, MAPS, ACTIVATIONS, LAYERS, JOB, CELL)
)
"""By one of these a run directory is known, however early the run was stopped."""

SHARED = (
    *(RUN, RESULTS, PER_PROMPT, ANALYSIS, PROMPTS, AUDIT, SUMMARY, REPORT, LAYERS),
    *(LAYERS_PER_PROMPT, "single_head_*.json", f"{HEADS}/*.json", f"{MAPS}/*"),
)
"""What is shared of a run; figures can be drawn from it, and caches stay where they are."""

KINDS = ("raw", "mapped")
SWAPS = ("into_tuned", "into_base")
"""Kinds of rows of a condition: its two patches, and both models with the other's activations."""

MEASURES = {
    "kl": "kl_nats",
    "answer_logprob_change": "answer_logprob_change_nats",
    "gap_left": "gap_left_nats",
    "answer_is": "answer_is",
    "metric": "metric",
    "kl_by_token": "kl_by_token_nats",
}
"""Columns of the table of every prompt's own numbers, and the fields that they hold."""

FORMAT = 4
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
            "whose report or summary could replace yours: name an empty folder (--out)."
        )


def holds_run(directory: Path) -> bool:
    """Whether a finished run lies there, damaged or not; a ``run.json`` alone may be anybody's."""
    here = [name for name in MARKS if os.path.exists(directory / name)]  # noqa: PTH110
    return RUN in here and len(here) > 1


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
    return (RESULTS, PER_PROMPT, ranking, ANALYSIS, PROMPTS, AUDIT, NEXT_TOKENS, SUMMARY)


def file_sha256(path: Path) -> str | None:
    """SHA-256 of a file's content, or None where there is no such file."""
    try:
        return hashlib.sha256(read_regular_bytes(path)).hexdigest()
    except (OSError, ValueError):
        return None


def per_prompt_table(grid: GridResult) -> pd.DataFrame:
    """Every prompt's own numbers: a row per prompt, condition and kind."""
    about: list[tuple[Any, ...]] = []
    rows: list[PatchRow] = []
    for each in grid.conditions.values():
        patched = (each.layer, each.cond, str(each.heads))
        about += [(*patched, each.alpha, kind) for kind in ("raw", "mapped")]
        rows += [each.raw, each.mapped]
        about += [(*patched, 1.0, kind) for kind in SWAPS if each.transfer]
        rows += each.transfer or ()
    patched = (EVERY_LAYER, EVERY, str(HeadSet.all(grid.n_heads)))
    about += [(*patched, 1.0, kind) for kind in SWAPS if grid.every_layer]
    rows += grid.every_layer or ()
    table = pd.DataFrame(about, columns=["layer", "cond", "heads", "alpha", "kind"])
    table = table.loc[table.index.repeat(len(grid.prompt_ids))].reset_index(drop=True)
    table.insert(0, "prompt_id", grid.prompt_ids * len(rows))
    table.insert(1, "group", grid.groups * len(rows))
    nothing = np.full(len(grid.prompt_ids), np.nan)
    for column, name in MEASURES.items():
        found = [getattr(row, name) for row in rows]
        if any(each is not None for each in found):
            whole = np.concatenate([nothing if each is None else each for each in found])
            table[column] = whole if whole.ndim == 1 else list(whole)
    return table


def grid_of_table(
    settings: GridSettings,
    table: pd.DataFrame,
    *,
    noise_floor_nats: float,
    compared: Compared | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> GridResult:
    """A grid from the table that :func:`per_prompt_table` made; a damaged one is a ValueError."""
    if not 1 <= settings.n_heads <= MAX_HEADS:
        raise ValueError(f"{settings.n_heads} heads")
    ids = dict(zip(map(str, table["prompt_id"]), map(str, table["group"]), strict=True))
    rows = _Rows(table, list(ids))
    firsts = table[table["cond"] != EVERY].groupby("cond", sort=False).head(1)
    return GridResult(
        settings=settings,
        prompt_ids=tuple(ids),
        groups=tuple(ids.values()),
        conditions={
            str(first.cond): _condition(first, rows, settings.n_heads)
            for first in firsts.itertuples()
        },
        noise_floor_nats=noise_floor_nats,
        every_layer=rows.transfer(EVERY),
        compared=compared or Compared(),
        provenance=provenance or {},
    )


def _condition(first: Any, rows: _Rows, n_heads: int) -> ConditionResult:
    return ConditionResult(
        cond=str(first.cond),
        layer=int(first.layer),
        heads=HeadSet.parse(str(first.heads), n_heads),
        alpha=float(first.alpha),
        raw=rows.of(first.cond, "raw"),
        mapped=rows.of(first.cond, "mapped"),
        transfer=rows.transfer(first.cond),
    )


class _Rows:
    """The numbers of a table by condition and kind, in the order of the prompts."""

    def __init__(self, table: pd.DataFrame, ids: Collection[str]) -> None:
        self.n_prompts = len(ids)
        self.places = pd.Index(list(ids)).get_indexer(pd.Index(table["prompt_id"].astype(str)))
        self.numbers = {
            name: _numbers(table[column]) for column, name in MEASURES.items() if column in table
        }
        self.at = table.groupby(["cond", "kind"], sort=False).indices

    def of(self, cond: Any, kind: str) -> PatchRow:
        """One patch; repeated prompts and damaged numbers are a ValueError."""
        own = np.asarray(self.at.get((cond, kind), ()), dtype=int)
        own = own[np.argsort(self.places[own])]
        whole = np.array_equal(self.places[own], np.arange(self.n_prompts))
        # What was not measured of any prompt is a column of nulls beside what was.
        numbers = {name: each[own] for name, each in self.numbers.items()}
        numbers = {name: each for name, each in numbers.items() if not np.isnan(each).all()}
        of_prompts = (each for each in numbers.values() if each.ndim == 1)
        if not whole or not all(np.isfinite(each).all() for each in of_prompts):
            raise ValueError(
                f"{kind} of {cond!r} has repeated prompts or numbers that are not finite"
            )
        return PatchRow(**numbers)

    def transfer(self, cond: Any) -> Transfer | None:
        """What a condition carries in both directions, if that was measured."""
        if not any((cond, kind) in self.at for kind in SWAPS):
            return None
        transfer = Transfer(*(self.of(cond, kind) for kind in SWAPS))
        if any(row.gap_left_nats is None or row.answer_is is None for row in transfer):
            raise ValueError(f"{cond!r} lacks what is left of the gap")
        return transfer


def _numbers(column: pd.Series) -> Float64[ndarray, "row *token"]:
    """A column as numbers; one of lists, a number for each token of an answer, as a table."""
    if column.dtype != object or not column.map(np.ndim).any():
        return column.to_numpy(dtype=np.float64)
    width = max(map(len, column.dropna()))
    nothing = [np.nan] * width
    return np.array([nothing if np.ndim(each) == 0 else list(each) for each in column], dtype=float)
