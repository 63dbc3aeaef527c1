"""Rankings by any method, beside exact single-head ΔKL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.effects.table import bootstrap_of, grid_full_effect
from rq4lens.analysis.rankings.agreement import Scored
from rq4lens.analysis.rankings.compared import describe_ranking
from rq4lens.analysis.rankings.file import read_ranking
from rq4lens.analysis.rankings.gradients import TARGETS
from rq4lens.analysis.rankings.methods import METHODS, ranking_file_rows, timed_ranking
from rq4lens.analysis.records import MethodRow
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.config import RunConfig
from rq4lens.disk.files import make_directory, write_json_atomic
from rq4lens.disk.run import ranking_file
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Stage, silent
from rq4lens.patching.grid import measure_grid
from rq4lens.results import HOOK, GridSettings, HeadRanking
from rq4lens.screen.tables import ranking_text


def write_ranking(directory: Path, ranking: HeadRanking) -> Path:
    """Write a ranking: a list of ``head, rank, score, se``, best first."""
    path = directory / ranking_file(ranking.layer, ranking.alpha or 0.0, ranking.method)
    write_json_atomic(path, ranking_file_rows(ranking))
    return path


def write_table(
    directory: Path,
    settings: GridSettings,
    n_prompts: int,
    rankings: Sequence[HeadRanking],
    rows: Sequence[MethodRow],
) -> Path:
    """Write the table that the console prints, with intervals, as ``rank_table_*.json``."""
    table = [
        {**to_json(row), "heads": list(ranking.heads), "settings": to_json(ranking.settings)}
        for ranking, row in zip(rankings, rows, strict=True)
    ]
    path = directory / f"rank_table_L{settings.layer}_{HOOK}_alpha{settings.patching.alpha:g}.json"
    write_json_atomic(
        path, {"settings": settings.to_dict(), "n_prompts": n_prompts, "table": table}
    )
    return path


@dataclass(frozen=True)
class RankingJob:
    """Rankings of the heads of one layer.

    Args:
        rankings: the rankings.
        rows: each of them beside exact single-head ``ΔKL``.
        summary: what the console prints.
        files: the files that were written; the table is the last of them.
    """

    rankings: tuple[HeadRanking, ...]
    rows: tuple[MethodRow, ...]
    summary: str
    files: tuple[Path, ...]


def rank_layer(
    config: RunConfig,
    methods: Sequence[str],
    *,
    files: Sequence[Path] = (),
    target: str | None = None,
    ig_steps: int | None = None,
    out: Path | None = None,
    stage: Stage = silent,
) -> RankingJob:
    """Rank the heads of the main layer by several methods.

    Raises:
        UserError: if a method does not exist, a file is not such a ranking or has a method's name,
            a setting has no method to go to, or the configuration does not fit the pair.
    """
    names = _methods(methods, files)
    settings = _settings(names, config.effort.seed, target, ig_steps)
    config = config.updated(control_layer=None, random_seeds=[])
    bench = Bench(config, stage=stage)
    with bench.clock("load"):
        plan = bench.plan
    read = [
        read_ranking(path, n_heads=plan.n_heads, layer=plan.layer, alpha=config.patching.alpha)
        for path in files
    ]
    experiment = bench.experiment(plan.layers)
    with bench.clock("grid"):
        grid = measure_grid(bench.recorder(experiment), config.patching, config.effort)
    bootstrap, ks = bootstrap_of(grid), config.patching.k
    measured, full = MeasuredSets.of_grid(grid, experiment), grid_full_effect(grid, bootstrap)
    exact = Scored.of_prompts("delta", measured.delta_nats(measured.singles), bootstrap)
    timed: list[tuple[HeadRanking, float | None]] = [(ranking, None) for ranking in read]
    for name in names:
        with bench.clock(name):
            timed.append(timed_ranking(name, measured, **settings[name]))
    rows = tuple(
        describe_ranking(ranking, exact, measured, full, ks, bootstrap, seconds)[0]
        for ranking, seconds in timed
    )
    rankings = tuple(ranking for ranking, _ in timed)
    written: list[Path] = []
    if out is not None:
        make_directory(out)
        written = [write_ranking(out, ranking) for ranking in rankings]
        written.append(write_table(out, grid.settings, grid.n_prompts, rankings, rows))
    text = ranking_text(grid.settings, grid.n_prompts, rankings, rows, ks)
    return RankingJob(rankings, rows, text, tuple(written))


def _methods(methods: Sequence[str], files: Sequence[Path]) -> list[str]:
    """The methods asked for, each once; no file may have the name of another ranking."""
    everything = [name.upper() for name in methods] == ["ALL"]
    names = list(METHODS) if everything else list(dict.fromkeys(methods))
    for name in names:
        if name not in METHODS:
            raise UserError(
                f"ranking method {name!r} does not exist: choose from {', '.join(METHODS)}, or ALL."
            )
    taken = set(names)
    for path in files:
        if path.stem in taken:
            raise UserError(
                f"two rankings would be called {path.stem!r}: rename the file {str(path)!r}."
            )
        taken.add(path.stem)
    return names


def _settings(
    names: Sequence[str], seed: int, target: str | None, ig_steps: int | None
) -> Mapping[str, dict[str, Any]]:
    """The settings of each method; what was asked for must have a method to go to."""
    if target is not None and target not in TARGETS:
        raise UserError(f"target {target!r} does not exist: choose {' or '.join(TARGETS)}.")
    follows = [name for name in METHODS if "target" in signature(METHODS[name]).parameters]
    if target is not None and not set(names) & set(follows):
        raise UserError(
            f"target {target!r} has no method that follows it: add one of {', '.join(follows)}."
        )
    if ig_steps is not None and ig_steps < 1:
        raise UserError(f"ig_steps {ig_steps} is too few: take at least 1 point on the path.")
    if ig_steps is not None and "integrated_gradients" not in names:
        raise UserError(
            f"ig_steps {ig_steps} has no method to go to: add the method integrated_gradients."
        )
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in given.keys() & set(follows):
        given[name] |= {} if target is None else {"target": target}
    if ig_steps is not None:
        given["integrated_gradients"]["steps"] = ig_steps
    if "shapley" in given:
        given["shapley"]["seed"] = seed
    return given
