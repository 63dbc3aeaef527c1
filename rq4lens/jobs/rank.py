"""Rankings by any method, beside exact single-head ΔKL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rq4lens.analysis.effects.measured import MeasuredLayer
from rq4lens.analysis.rankings.compared import describe_ranking, timed_ranking
from rq4lens.analysis.rankings.file import ranking_file_rows, read_ranking
from rq4lens.analysis.rankings.methods import RankingSettings, method_of, methods_of, refuse_unread
from rq4lens.analysis.records import MethodRow
from rq4lens.analysis.statistics.plain import Listed, to_json
from rq4lens.config import RunConfig
from rq4lens.disk.files import make_directory, refuse_no_directory, write_json_atomic
from rq4lens.disk.run import ranking_file
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Stage, silent
from rq4lens.patching.grid import measure_grid
from rq4lens.results import HOOK, GridResult, HeadRanking
from rq4lens.screen.tables import ranking_text


def write_ranking(directory: Path, ranking: HeadRanking) -> Path:
    """Write a ranking: a list of ``head, rank, score, se``, best first."""
    path = directory / ranking_file(ranking.layer, ranking.alpha or 0.0, ranking.method)
    write_json_atomic(path, ranking_file_rows(ranking))
    return path


def _write_table(
    directory: Path, grid: GridResult, table: Sequence[tuple[HeadRanking, MethodRow]]
) -> Path:
    """Write the table that the console prints, with intervals."""
    settings = grid.settings
    record = {
        "settings": settings.to_dict(),
        "n_prompts": grid.n_prompts,
        "table": [
            {**to_json(row), "heads": list(ranking.heads), "settings": to_json(ranking.settings)}
            for ranking, row in table
        ],
    }
    path = directory / f"rank_table_L{settings.layer}_{HOOK}_alpha{settings.patching.alpha:g}.json"
    write_json_atomic(path, record)
    return path


@dataclass(frozen=True, repr=False)
class RankingJob(Listed):
    """Rankings of the heads of one layer, each in ``rows`` beside exact single-head ``ΔKL``."""

    ROWS: ClassVar[str] = "rows"

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
    """Rank the heads of the main layer by several methods, and by the rankings of some files."""
    refuse_no_directory(out, "--out")
    names = _methods(methods, files)
    asked = {"target": target, "ig_steps": ig_steps}
    given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    settings = RankingSettings(seed=config.effort.seed, **given)
    refuse_unread(given.items(), names)
    config = config.updated(control_layer=None, random_seeds=[])
    bench = Bench(config, stage=stage)
    with bench.clock("load"):
        plan = bench.plan
    read = [
        read_ranking(path, n_heads=plan.n_heads, layer=plan.layer, alpha=config.patching.alpha)
        for path in files
    ]
    measurer = bench.measurer(plan.layers)
    with bench.clock("grid"):
        grid = measure_grid(measurer, config.patching, config.effort)
    layer = MeasuredLayer.of_grid(grid, measurer)
    timed: list[tuple[HeadRanking, float | None]] = [(ranking, None) for ranking in read]
    for name in names:
        with bench.clock(name):
            timed.append(timed_ranking(name, layer.measured, settings))
    rows = tuple(describe_ranking(ranking, layer, seconds)[0] for ranking, seconds in timed)
    rankings = tuple(ranking for ranking, _ in timed)
    written: list[Path] = []
    if out is not None:
        make_directory(out)
        written = [write_ranking(out, ranking) for ranking in rankings]
        written.append(_write_table(out, grid, list(zip(rankings, rows, strict=True))))
    text = ranking_text(grid.settings, grid.n_prompts, rankings, rows, layer.ks)
    return RankingJob(rankings, rows, text, tuple(written))


def _methods(methods: Sequence[str], files: Sequence[Path]) -> list[str]:
    """The methods asked for, each once; no file may have the name of another ranking."""
    names = list(dict.fromkeys(methods_of(",".join(methods)) if methods else ()))
    for name in names:
        method_of(name)
    taken = set(names)
    for path in files:
        if path.stem in taken:
            raise UserError(
                f"two rankings would be called {path.stem!r}: rename the file {str(path)!r}."
            )
        taken.add(path.stem)
    return names
