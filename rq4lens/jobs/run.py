"""The main job: from a configuration to a run directory that says how it was made."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rq4lens.analysis.analyse import PARTS, analyse
from rq4lens.analysis.effects.table import bootstrap_of, ranking_rows, records
from rq4lens.analysis.result import Analysis
from rq4lens.config import RunConfig
from rq4lens.disk.files import remove_leftovers, write_json_atomic
from rq4lens.disk.run import (
    AUDIT,
    CONDITIONS,
    FORMAT,
    MAPS,
    PROMPTS,
    ranking_file,
    refuse_foreign,
    remove_other_rankings,
    write_grid,
    write_run,
)
from rq4lens.disk.store import Store
from rq4lens.jobs.memory import plan_memory, say_and_require
from rq4lens.jobs.pages import write_pages
from rq4lens.jobs.preparation import cache_of, capture, keep_base, plan_of, prepare_experiment
from rq4lens.jobs.progress import Advance, Clock, Stage, silent
from rq4lens.models.catalog import pair_from_config, resolve_device
from rq4lens.models.load.loading import HookedModel
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.models.prompts.prompt_set import SIDE_EFFECT_SPLIT
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.engines.row_engine import RowEngine
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.grid import GridPlan, run_grid
from rq4lens.results import GridResult
from rq4lens.screen.tables import summary_text

LIBRARIES = ("torch", "transformer-lens", "transformers", "numpy", "scipy", "scikit-learn")


def provenance(
    config: RunConfig,
    experiment: Experiment,
    grid: GridResult,
    store: Store,
    timings_seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything that says how a run was made; the content of ``run.json``."""
    pair = experiment.pair
    return {
        "format": FORMAT,
        "rq4lens": _version("rq4lens"),
        "config": config.model_dump(mode="json", exclude_unset=True),
        "settings": grid.settings.to_dict(),
        "noise_floor_nats": grid.noise_floor_nats,
        "models": {side: pair.member(side).card.to_dict() for side in SIDES},
        "prompts": {
            "fingerprint": pair.prompts.fingerprint,
            "splits": {name: len(pair.prompts.split(name)) for name in pair.prompts.splits},
            "tokens": {side: pair.token_fingerprint(side, grid.settings.split) for side in SIDES},
        },
        "maps": {
            str(layer): {**each.to_dict(), "fingerprint": each.fingerprint}
            for layer, each in experiment.maps.items()
        },
        "engine": _engine(experiment),
        "device": resolve_device(config.device),
        "blocks_on": _blocks_on(pair),
        "peak_device_bytes": _peak_device_bytes(),
        "store": {
            "reused": store.counters.reused,
            "computed": store.counters.computed,
            "set_aside": [list(entry) for entry in store.counters.set_aside],
        },
        "libraries": {name: _version(name) for name in LIBRARIES},
        "machine": {
            "python": platform.python_version(),
            "system": platform.system(),
            "processor": platform.machine(),
            "torch_threads": torch.get_num_threads(),
        },
        "timings_seconds": dict(timings_seconds),
    }


def _blocks_on(pair: ModelPair) -> dict[str, list[str] | None]:
    """The device of each block; None for a model that is not in memory any more."""

    def blocks(model: HookedModel) -> list[str]:
        return [str(next(block.parameters()).device) for block in model.blocks]

    members = {side: pair.member(side) for side in SIDES}
    return {
        side: blocks(member.model) if member.is_loaded else None for side, member in members.items()
    }


def _engine(experiment: Experiment) -> dict[str, Any]:
    engine = experiment.engine
    memory = engine.memory_report if isinstance(engine, RowEngine) else None
    return {
        "name": engine.name,
        "fallback_reason": engine.fallback_reason,
        "memory": memory,
    }


def _peak_device_bytes() -> int | None:
    """The most memory held at once on the GPU that held most; None without one."""
    used = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
    return max(used, default=None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """A finished main job.

    Args:
        directory: the run directory.
        grid: the grid's results.
        experiment: the prepared pair, for further measurements.
        records: the records of ``rq4_results.json``.
        analysis: what the analysis adds.
        summary: what the console prints.
        timings_seconds: seconds of each stage.
    """

    directory: Path
    grid: GridResult
    experiment: Experiment
    records: list[dict[str, Any]]
    analysis: Analysis
    summary: str
    timings_seconds: Mapping[str, float]


def run_study(
    config: RunConfig, directory: Path, *, fresh: bool = False, stage: Stage = silent
) -> Study:
    """Run the main job and write its run directory.

    A run that was interrupted goes on where it stopped: finished conditions are taken from the
    run directory.

    Args:
        config: what to run.
        directory: the run directory; made if missing.
        fresh: measure everything again, whatever the directory holds.
        stage: opens a stage of the work, for progress bars.

    Returns:
        The finished study.

    Raises:
        UserError: if the configuration does not fit the pair, the directory holds other files, or
            something cannot be read or written.
    """
    refuse_foreign(directory)
    remove_leftovers(directory)
    clock = Clock(stage)
    with clock("load"):
        cache = cache_of(config, directory)
        memory = plan_memory(config)
        say_and_require(memory)
        pair = pair_from_config(config, kept_in=None if fresh else cache)
        plan = plan_of(config, pair)
        audit = pair.audit()
    # Prompts that do not fit the models are said before anything is written.
    activations = capture(config, pair, plan.layers, clock, cache=cache, fresh=fresh)
    store = Store(directory / CONDITIONS, fresh=fresh)
    keep_base(config, pair, activations, cache)
    experiment = prepare_experiment(
        config, activations, plan.layers, clock, store=Store(directory / MAPS, fresh=fresh)
    )
    rows = 2 * (len(plan.fixed()) + len(plan.ks)) * len(experiment.prompts)
    with clock("grid", rows) as advance:
        grid = _grid(config, plan, experiment, store, advance)
        bootstrap = bootstrap_of(grid, n_resamples=config.resamples, seed=config.seed)
        table = records(grid, bootstrap)
        write_grid(directory, grid, table)
        ranking = directory / ranking_file(plan.layer, config.alpha)
        write_json_atomic(ranking, ranking_rows(grid))
        remove_other_rankings(ranking)
    with clock("analysis", len(PARTS)) as advance:
        analysis = _analyse(config, grid, experiment, activations, advance)
    activations.keep()  # those of prompts that only the analysis asked for
    texts = dict(zip(*_texts(experiment), strict=True))
    write_json_atomic(directory / PROMPTS, texts)
    write_json_atomic(directory / AUDIT, audit.to_dict())
    if audit.warning is not None:
        log.warning(audit.warning)
    summary = summary_text(grid.settings, table, analysis.claims)
    run = provenance(config, experiment, grid, store, clock.seconds)
    run["audit"] = audit.summary
    run["base_loaded"] = pair.base.was_loaded
    run["memory_estimate"] = memory.to_dict()
    with clock("pages"):
        write_pages(directory, grid, analysis.to_dict(), texts, run)
    run["timings_seconds"] = dict(clock.seconds)
    write_run(directory, analysis=analysis.to_dict(), run=run, summary=summary)
    return Study(directory, grid, experiment, table, analysis, summary, clock.seconds)


def _texts(experiment: Experiment) -> tuple[tuple[str, ...], tuple[str, ...]]:
    prompts = experiment.pair.prompts.split(experiment.split)
    return prompts.ids, prompts.texts


def _analyse(
    config: RunConfig,
    grid: GridResult,
    experiment: Experiment,
    activations: PairActivations,
    advance: Advance | None,
) -> Analysis:
    if config.analysis == "grid":
        return analyse(grid, n_resamples=config.resamples, seed=config.seed, advance=advance)
    if not isinstance(experiment.engine, RowEngine):
        log.warning(
            "the full analysis measures thousands of head sets, and engine %s runs the whole model "
            "for each: --analysis grid keeps to the conditions that are measured already",
            experiment.engine.name,
        )
    neutral = None
    if SIDE_EFFECT_SPLIT in experiment.pair.prompts.splits and experiment.pair.keep_both:
        neutral = prepare(
            experiment.pair,
            experiment.maps,
            split=SIDE_EFFECT_SPLIT,
            raw_baseline=config.raw_baseline,
            kl_direction=config.kl_direction,
            engine=config.engine,
            batch_size=config.batch_size,
            activations=activations,
        )
    return analyse(
        grid,
        experiment,
        n_resamples=config.resamples,
        random_ks=_random_ks(config, grid),
        seed=config.seed,
        activations=activations,
        neutral=neutral,
        advance=advance,
    )


def _random_ks(config: RunConfig, grid: GridResult) -> Sequence[int] | None:
    """Named sizes of random sets; None leaves the choice to the analysis."""
    every = range(1, grid.n_heads + 1)
    return {"affordable": None, "every": every, "k": ()}[config.random_sizes]


def _grid(
    config: RunConfig,
    plan: GridPlan,
    experiment: Experiment,
    store: Store,
    advance: Advance | None,
) -> GridResult:
    return run_grid(
        experiment.pair,
        experiment.maps,
        plan.layer,
        plan.control_layer,
        config.alpha,
        ks=plan.ks,
        random_seeds=plan.random_seeds,
        rank_by=config.rank_by,
        seed=config.seed,
        store=store,
        experiment=experiment,
        advance=advance,
    )
