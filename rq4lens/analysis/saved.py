"""A finished run, and the sweep beside it, written and read back as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from rq4lens.analysis.positions import MappedPosition, PositionMap
from rq4lens.analysis.records import Analysis, ConditionRecord, LayerChoice, LayerComparison
from rq4lens.analysis.statistics.plain import Listed, from_json, to_json
from rq4lens.disk.files import (
    read_json,
    read_regular_file,
    refuse_damage,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from rq4lens.disk.run import (
    ANALYSIS,
    FORMAT,
    LAYERS,
    LAYERS_PER_PROMPT,
    PER_PROMPT,
    POSITIONS,
    POSITIONS_PER_PROMPT,
    RESULTS,
    RUN,
    SUMMARY,
    file_sha256,
    grid_of_table,
    holds_run,
    per_prompt_table,
    written_files,
)
from rq4lens.errors import UserError
from rq4lens.results import (
    EVERY,
    EVERY_LAYER,
    Compared,
    GridResult,
    GridSettings,
    Shown,
    table_html,
)

SHOWN = (
    *("cond", "layer", "heads", "KL_raw_mean", "KL_mapped_mean", "delta", "coverage_pct"),
    *("raw_coverage_pct", "to_base_pct", "to_tuned_pct"),
)
"""What a notebook shows of each record of a run."""


@dataclass(frozen=True)
class Run(Listed):
    """A finished run of the main job, measured just now or read from its directory.

    Args:
        directory: the run directory.
        grid: every prompt's own numbers.
        records: the records of ``rq4_results.json``.
        analysis: what the analysis adds.
        run: how it was made, the content of ``run.json``.
    """

    ROWS: ClassVar[str] = "records"

    directory: Path
    grid: GridResult
    records: tuple[ConditionRecord, ...]
    analysis: Analysis
    run: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<Run {str(self.directory)!r}: {self.grid!r}>"

    def _repr_html_(self) -> str:
        table = self.to_dataframe()[list(SHOWN)]
        return f"<p>{escape(str(self.analysis))}</p>{table_html(table)}"

    @classmethod
    def open(cls, directory: Path | str) -> Run:
        """Read a finished run; see :func:`read_run`."""
        return read_run(directory)

    @property
    def summary(self) -> str:
        """What the console printed."""
        return read_regular_file(self.directory / SUMMARY)

    @property
    def positions(self) -> PositionMap | None:
        """Its position map, if `rq4lens positions` measured one."""
        return read_positions(self.directory)

    def push(self, repo: str, *, private: bool = False) -> str:
        """Share it on the Hugging Face hub; see :func:`rq4lens.disk.hub.push_run`."""
        from rq4lens.disk.hub import push_run  # noqa: PLC0415 - looking at a run needs no hub

        return push_run(self.directory, repo, private=private)


@dataclass(frozen=True, repr=False)
class SavedLayers(Shown):
    """A sweep, measured just now or read back: its layers, what is said of them, and proposed."""

    grids: Mapping[int, GridResult]
    comparison: LayerComparison
    choice: LayerChoice

    def __repr__(self) -> str:
        choice = self.choice
        return (
            f"<{type(self).__name__} of {len(self.grids)} layers: main {choice.main}, "
            f"control {choice.control}>"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """A row a layer."""
        return self.comparison.to_dataframe()


def write_grid(directory: Path, grid: GridResult, records: Sequence[ConditionRecord]) -> None:
    """Write the results file and every prompt's own numbers."""
    write_bytes_atomic(directory / PER_PROMPT, per_prompt_table(grid).to_parquet(index=False))
    write_json_atomic(directory / RESULTS, to_json(tuple(records)))


def write_run(directory: Path, analysis: Analysis, run: Mapping[str, Any], summary: str) -> None:
    """Write what the analysis adds, the summary, and last of all the provenance.

    The provenance also holds the checksums of the files that were written before it.
    """
    write_json_atomic(directory / ANALYSIS, to_json(analysis))
    write_text_atomic(directory / SUMMARY, summary)
    files = {name: file_sha256(directory / name) for name in written_files(run["settings"])}
    write_json_atomic(directory / RUN, {**run, "files_sha256": files})


def read_run(directory: Path | str) -> Run:
    """Read a finished run.

    >>> rq.read_run(folder).grid.settings.layer
    1

    Args:
        directory: the run directory, or where the run is on the Hugging Face hub, as in
            ``hf://datasets/USER/NAME`` or ``hf://USER/NAME@REVISION``.

    Returns:
        The run.

    Raises:
        UserError: if it is not a finished run, was written by another version, a file is damaged,
            or it cannot be fetched from the hub.
    """
    named, directory = str(directory), Path(directory)
    if named.startswith("hf:/"):
        from rq4lens.disk.hub import fetch_run  # noqa: PLC0415 - a folder needs no hub

        directory = fetch_run(named)
    if not holds_run(directory):
        raise UserError(
            f"{named!r} holds no finished run (no {RUN} beside results): name the folder that "
            "`rq4lens run --out` wrote, or run it again to finish it."
        )
    run, saved, analysis = (read_json(directory / name) for name in (RUN, RESULTS, ANALYSIS))
    _refuse_other_versions(directory, run)
    with refuse_damage(f"run {str(directory)!r}", "run it again"):
        grid = _grid(run, pd.read_parquet(directory / PER_PROMPT))
        records = tuple(from_json(ConditionRecord, each) for each in saved)
        _check_completeness(grid, records)
        return Run(directory, grid, records, from_json(Analysis, analysis), run)


def _refuse_other_versions(directory: Path, run: Any) -> None:
    found = run.get("format") if isinstance(run, dict) else None
    if found != FORMAT:
        raise UserError(
            f"run {str(directory)!r} was written by another version (format {str(found)[:20]!r}, "
            f"this one reads {FORMAT}): run it again into a new folder."
        )


def _check_completeness(grid: GridResult, records: Sequence[ConditionRecord]) -> None:
    singles = [f"head{head}" for head in range(grid.n_heads)]
    missing = {"full", "none", "self", *singles} - set(grid.conditions)
    if missing:
        raise ValueError(f"conditions {sorted(missing)[:5]} are missing")
    every = [] if grid.every_layer is None else [EVERY]
    if [record.cond for record in records] != [*grid.conditions, *every]:
        raise ValueError(f"{RESULTS} and {PER_PROMPT} hold other conditions")


def write_layers(directory: Path, sweep: SavedLayers) -> None:
    """Write a sweep."""
    tables = [per_prompt_table(grid) for grid in sweep.grids.values()]
    # All layers at once are measured once, and stand in every grid.
    alone = [table[table["cond"] != EVERY] for table in tables[1:]]
    table = pd.concat([*tables[:1], *alone], ignore_index=True)
    write_bytes_atomic(directory / LAYERS_PER_PROMPT, table.to_parquet(index=False))
    record = {
        **_measured_how({str(layer): grid for layer, grid in sweep.grids.items()}),
        "comparison": to_json(sweep.comparison),
        "choice": to_json(sweep.choice),
    }
    write_json_atomic(directory / LAYERS, record)


def read_layers(directory: Path) -> SavedLayers | None:
    """Read a sweep back; None where there is none, a sentence where its files are damaged."""
    if not (directory / LAYERS).is_file():
        return None
    record = read_json(directory / LAYERS)
    with refuse_damage(f"the sweep in {str(directory)!r}", f"delete {LAYERS}, or sweep again"):
        table = pd.read_parquet(directory / LAYERS_PER_PROMPT)
        grids = {
            int(layer): _grid(record, table[table["layer"].isin([int(layer), EVERY_LAYER])], layer)
            for layer in record["settings"]
        }
        comparison = from_json(LayerComparison, record["comparison"])
        return SavedLayers(grids, comparison, from_json(LayerChoice, record["choice"]))


def _measured_how(grids: Mapping[str, GridResult]) -> dict[str, Any]:
    """What a table of every prompt's own numbers does not say of its grids, by their names."""
    return {
        "settings": {name: grid.settings.to_dict() for name, grid in grids.items()},
        "noise_floor_nats": {name: grid.noise_floor_nats for name, grid in grids.items()},
        "compared": {name: grid.compared._asdict() for name, grid in grids.items()},
    }


def _grid(record: Mapping[str, Any], table: pd.DataFrame, name: str | None = None) -> GridResult:
    """The grid of a run, or the one of a name, from its rows of the table."""
    keys = ("settings", "noise_floor_nats", "compared")
    settings, noise, compared = (record[k] if name is None else record[k][name] for k in keys)
    return grid_of_table(
        GridSettings.from_dict(settings),
        table,
        noise_floor_nats=float(noise),
        compared=Compared(**compared),
        provenance=record if name is None else None,
    )


def write_positions(directory: Path, found: PositionMap) -> None:
    """Write a position map beside the run that it is of."""
    tables = [per_prompt_table(each.grid).assign(position=each.role) for each in found.positions]
    table = pd.concat(tables, ignore_index=True)
    write_bytes_atomic(directory / POSITIONS_PER_PROMPT, table.to_parquet(index=False))
    record = {
        "of": file_sha256(directory / PER_PROMPT),
        **_measured_how({each.role: each.grid for each in found.positions}),
        "positions": [
            to_json({name: getattr(each, name) for name in OF_A_POSITION})
            for each in found.positions
        ],
    }
    write_json_atomic(directory / POSITIONS, record)


OF_A_POSITION = ("role", "texts", "n_train", "records")
"""What the file says of a position beside the numbers of each prompt."""


def read_positions(directory: Path) -> PositionMap | None:
    """Read the position map of a run back; None where there is none, or it is of another run."""
    if not (directory / POSITIONS).is_file():
        return None
    record = read_json(directory / POSITIONS)
    fix = f"delete {POSITIONS}, or measure it again with `rq4lens positions`"
    with refuse_damage(f"the position map in {str(directory)!r}", fix):
        if record["of"] != file_sha256(directory / PER_PROMPT):
            return None
        table = pd.read_parquet(directory / POSITIONS_PER_PROMPT)
        positions = (
            MappedPosition(
                role=each["role"],
                texts=tuple(each["texts"]),
                n_train=int(each["n_train"]),
                grid=_grid(record, table[table["position"] == each["role"]], each["role"]),
                records=tuple(from_json(ConditionRecord, one) for one in each["records"]),
            )
            for each in record["positions"]
        )
        return PositionMap(tuple(positions))
