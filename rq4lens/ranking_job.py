"""Rankings by any method, beside exact single-head ΔKL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rq4lens.analysis.agreement import Scored
from rq4lens.analysis.measured import MeasuredSets
from rq4lens.analysis.methods import describe_ranking
from rq4lens.analysis.metrics import bootstrap_of, grid_full_effect
from rq4lens.analysis.ranking import METHODS, timed_ranking
from rq4lens.analysis.ranking_file import read_ranking
from rq4lens.analysis.records import MethodRow
from rq4lens.config import RunConfig
from rq4lens.errors import UserError
from rq4lens.files import make_directory
from rq4lens.models.catalog import pair_from_config
from rq4lens.patching.grid import run_grid
from rq4lens.preparation import capture, plan_of, prepare_experiment
from rq4lens.results import HeadRanking
from rq4lens.run_directory import write_ranking
from rq4lens.stages import Clock, Stage, silent
from rq4lens.tables import ranking_text


@dataclass(frozen=True)
class RankingJob:
    """Rankings of the heads of one layer.

    Args:
        rankings: the rankings.
        rows: each of them beside exact single-head ``ΔKL``.
        summary: what the console prints.
        files: the files that were written.
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
    out: Path | None = None,
    stage: Stage = silent,
) -> RankingJob:
    """Rank the heads of the main layer by several methods.

    Args:
        config: the pair, the layer and how to patch.
        methods: names of ranking methods, or ``["ALL"]``.
        files: rankings to read and compare, lists of head and score.
        out: the directory to write a file per ranking into, if any.
        stage: opens a stage of the work, for progress bars.

    Returns:
        The rankings.

    Raises:
        UserError: if a method does not exist, a file is not such a ranking, or the configuration
            does not fit the pair.
    """
    names = list(METHODS) if [name.upper() for name in methods] == ["ALL"] else list(methods)
    for name in names:
        if name not in METHODS:
            raise UserError(
                f"ranking method {name!r} does not exist: choose from {', '.join(METHODS)}, or ALL."
            )
    config = config.updated(control_layer=None, k=list(config.k), random_seeds=[])
    clock = Clock(stage)
    with clock("load"):
        pair = pair_from_config(config)
        plan = plan_of(config, pair)
    read = [
        read_ranking(path, n_heads=pair.n_heads, layer=plan.layer, alpha=config.alpha)
        for path in files
    ]
    activations = capture(config, pair, plan.layers, clock)
    experiment = prepare_experiment(config, activations, plan.layers, clock)
    with clock("grid"):
        grid = run_grid(
            pair,
            experiment.maps,
            plan.layer,
            alpha=config.alpha,
            ks=plan.ks,
            random_seeds=(),
            experiment=experiment,
        )
    bootstrap = bootstrap_of(grid, n_resamples=config.resamples, seed=config.seed)
    measured, full = MeasuredSets.of_grid(grid, experiment), grid_full_effect(grid, bootstrap)
    exact = Scored.of_prompts("delta", measured.delta_nats(measured.singles), bootstrap)
    timed: list[tuple[HeadRanking, float | None]] = [(ranking, None) for ranking in read]
    for name in names:
        with clock(name):
            settings = {"seed": config.seed} if name == "shapley" else {}
            timed.append(timed_ranking(name, measured, **settings))
    rows = tuple(
        describe_ranking(ranking, exact, measured, full, plan.ks, bootstrap, seconds)[0]
        for ranking, seconds in timed
    )
    rankings = tuple(ranking for ranking, _ in timed)
    if out is not None:
        make_directory(out)
    written = () if out is None else tuple(write_ranking(out, ranking) for ranking in rankings)
    text = ranking_text(grid.settings, grid.n_prompts, rankings, rows, plan.ks)
    return RankingJob(rankings, rows, text, written)
