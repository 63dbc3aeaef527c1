"""A run directory, and the sweep beside it: what a finished job leaves behind."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rq4lens.disk.files import (
    read_json,
    read_regular_bytes,
    short_reason,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
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

LAYERS = "layers.json"
JOB = "job.json"
CELL = "cell.json"
"""The settings of a study's cell, for ``rq4lens run`` to add a main job to it."""

MARKS = frozenset(
    (RESULTS, PER_PROMPT, ANALYSIS, RUN, CONDITIONS, MEASURED, MAPS, ACTIVATIONS, LAYERS, JOB, CELL)
)
"""By one of these a run directory is known, however early the run was stopped."""

KINDS = ("raw", "mapped")

FORMAT = 1
"""Version of the files; stands in ``run.json``."""

MAX_HEADS = 10_000
"""No layer has more; a damaged number must not fill the memory."""


@dataclass(frozen=True)
class SavedRun:
    """A run read back from its directory.

    Args:
        directory: where it was read from.
        grid: every prompt's own numbers.
        records: the records of ``rq4_results.json``.
        analysis: the content of ``analysis.json``.
        run: the provenance of ``run.json``.
    """

    directory: Path
    grid: GridResult
    records: list[dict[str, Any]]
    analysis: Mapping[str, Any]
    run: Mapping[str, Any]


def refuse_foreign(directory: Path) -> None:
    """Refuse to write a run among somebody's own files.

    Raises:
        UserError: if it holds files, and none by which a run directory is known.
    """
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


def write_grid(directory: Path, grid: GridResult, records: list[dict[str, Any]]) -> None:
    """Write the results file and every prompt's own numbers."""
    write_bytes_atomic(directory / PER_PROMPT, per_prompt_table(grid).to_parquet(index=False))
    write_json_atomic(directory / RESULTS, records)


def write_run(
    directory: Path, *, analysis: Mapping[str, Any], run: Mapping[str, Any], summary: str
) -> None:
    """Write what the analysis adds, the summary, and last of all the provenance.

    The provenance also holds the checksums of the files that were written before it.
    """
    write_json_atomic(directory / ANALYSIS, dict(analysis))
    write_text_atomic(directory / SUMMARY, summary)
    files = {name: file_sha256(directory / name) for name in written_files(run["settings"])}
    write_json_atomic(directory / RUN, {**run, "files_sha256": files})


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


def read_run(directory: Path) -> SavedRun:
    """Read a finished run.

    Args:
        directory: the run directory.

    Returns:
        The run.

    Raises:
        UserError: if it is not a finished run, was written by another version, or a file is
            damaged.
    """
    if not _exists(directory / RUN):
        raise UserError(
            f"{str(directory)!r} holds no finished run ({RUN} is missing): name the folder that "
            "`rq4lens run --out` wrote, or run it again to finish it."
        )
    run, records, analysis = (read_json(directory / name) for name in (RUN, RESULTS, ANALYSIS))
    _refuse_other_versions(directory, run)
    try:
        grid = grid_of_table(
            GridSettings.from_dict(run["settings"]),
            pd.read_parquet(directory / PER_PROMPT),
            noise_floor_nats=float(run["noise_floor_nats"]),
            provenance=run,
        )
        _check_completeness(grid, records, analysis)
    except Exception as problem:  # every way in which a file can be damaged ends in one sentence
        raise UserError(
            f"run {str(directory)!r} is damaged ({type(problem).__name__}: "
            f"{short_reason(problem)}): run it again."
        ) from problem
    return SavedRun(directory, grid, records, analysis, run)


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that no file system takes
        return False


def _refuse_other_versions(directory: Path, run: Any) -> None:
    found = run.get("format") if isinstance(run, dict) else None
    if found != FORMAT:
        raise UserError(
            f"run {str(directory)!r} was written by another version (format {str(found)[:20]!r}, "
            f"this one reads {FORMAT}): run it again into a new folder."
        )


def _check_completeness(grid: GridResult, records: Any, analysis: Any) -> None:
    singles = [f"head{head}" for head in range(grid.n_heads)]
    missing = {"full", "none", "self", *singles} - set(grid.conditions)
    if missing:
        raise ValueError(f"conditions {sorted(missing)[:5]} are missing")
    if [record["cond"] for record in records] != list(grid.conditions):
        raise ValueError(f"{RESULTS} and {PER_PROMPT} hold other conditions")
    if not isinstance(analysis, dict):
        raise ValueError(f"{ANALYSIS} holds no object")


def grid_of_table(
    settings: GridSettings,
    table: pd.DataFrame,
    *,
    noise_floor_nats: float,
    provenance: Mapping[str, Any] | None = None,
) -> GridResult:
    """A grid from the table that :func:`per_prompt_table` made of it.

    Raises:
        ValueError: if a condition lacks a prompt, repeats one or has a number that is not finite.
    """
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


LAYERS_PER_PROMPT = "layers_per_prompt.parquet"


@dataclass(frozen=True)
class SavedLayers:
    """A sweep read back.

    Args:
        grids: the grid of each layer.
        comparison: what the analysis says of them.
        choice: which layers are proposed as main and control, and why.
    """

    grids: Mapping[int, GridResult]
    comparison: Mapping[str, Any]
    choice: Mapping[str, Any]


def write_layers(
    directory: Path,
    grids: Mapping[int, GridResult],
    comparison: Mapping[str, Any],
    choice: Mapping[str, Any],
) -> None:
    """Write a sweep."""
    table = pd.concat([per_prompt_table(grid) for grid in grids.values()], ignore_index=True)
    write_bytes_atomic(directory / LAYERS_PER_PROMPT, table.to_parquet(index=False))
    record = {
        "settings": {str(layer): grid.settings.to_dict() for layer, grid in grids.items()},
        "noise_floor_nats": {str(layer): grid.noise_floor_nats for layer, grid in grids.items()},
        "comparison": dict(comparison),
        "choice": dict(choice),
    }
    write_json_atomic(directory / LAYERS, record)


def read_layers(directory: Path) -> SavedLayers | None:
    """Read a sweep back.

    Raises:
        UserError: if its files are damaged.
    """
    if not (directory / LAYERS).is_file():
        return None
    record = read_json(directory / LAYERS)
    try:
        table = pd.read_parquet(directory / LAYERS_PER_PROMPT)
        grids = {
            int(layer): grid_of_table(
                GridSettings.from_dict(settings),
                table[table["layer"] == int(layer)],
                noise_floor_nats=float(record["noise_floor_nats"][layer]),
            )
            for layer, settings in record["settings"].items()
        }
        return SavedLayers(grids, record["comparison"], record["choice"])
    except Exception as problem:  # every way in which a file can be damaged ends in one sentence
        raise UserError(
            f"the sweep in {str(directory)!r} is damaged ({type(problem).__name__}: "
            f"{short_reason(problem)}): delete {LAYERS}, or sweep again."
        ) from problem
