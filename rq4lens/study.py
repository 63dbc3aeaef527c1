"""The main job: from a configuration to a run directory."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rq4lens.analysis.metrics import bootstrap_of, ranking_rows, records
from rq4lens.config import RunConfig
from rq4lens.errors import UserError
from rq4lens.files import write_json_atomic
from rq4lens.models.catalog import pair_from_config, resolve_device
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.models.prompts import FIT_SPLIT
from rq4lens.patching.activations import PairActivations, check_layers
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.fitting import fit_maps
from rq4lens.patching.grid import GridPlan, run_grid
from rq4lens.patching.patch import Advance
from rq4lens.results import GridResult
from rq4lens.run_directory import (
    CONDITIONS,
    FORMAT,
    MAPS,
    ranking_file,
    write_grid,
    write_run,
)
from rq4lens.store import Store
from rq4lens.summary import summary_text

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformer-lens", "transformers", "numpy", "scipy", "scikit-learn")

Stage = Callable[[str, int | None], AbstractContextManager[Advance | None]]
"""Opens a stage of the work: its name and its number of rows; gives what reports progress."""


@dataclass(frozen=True)
class Study:
    """A finished main job.

    Args:
        directory: the run directory.
        grid: the grid's results.
        experiment: the prepared pair, for further measurements.
        records: the records of ``rq4_results.json``.
        summary: what the console prints.
        timings_seconds: seconds of each stage.
    """

    directory: Path
    grid: GridResult
    experiment: Experiment
    records: list[dict[str, Any]]
    summary: str
    timings_seconds: Mapping[str, float]


@dataclass
class Clock:
    """Seconds of each stage of a run.

    Args:
        stage: opens a stage for whoever watches.
    """

    stage: Stage
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, rows: int | None = None) -> Iterator[Advance | None]:
        """Time a stage."""
        started = time.perf_counter()
        with self.stage(name, rows) as advance:
            yield advance
        self.seconds[name] = round(time.perf_counter() - started, 4)


def silent(_name: str, _rows: int | None) -> AbstractContextManager[Advance | None]:
    """A stage that nobody watches."""
    return nullcontext()


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
        UserError: if the configuration does not fit the pair, or something cannot be read or
            written.
    """
    clock = Clock(stage)
    with clock("load"):
        pair = pair_from_config(config)
        plan = plan_of(config, pair)
    # Prompts that do not fit the models are said before anything is written.
    activations = capture(config, pair, plan.layers, clock)
    store = Store(directory / CONDITIONS, fresh=fresh)
    experiment = prepare_experiment(
        config, activations, plan.layers, clock, maps_directory=directory / MAPS, fresh=fresh
    )
    rows = 2 * (len(plan.fixed()) + len(plan.ks)) * len(experiment.prompts)
    with clock("grid", rows) as advance:
        grid = _grid(config, plan, experiment, store, advance)
    with clock("analysis"):
        bootstrap = bootstrap_of(grid, n_resamples=config.resamples, seed=config.seed)
        table = records(grid, bootstrap)
    summary = summary_text(grid.settings, table)
    with clock("write"):
        write_grid(directory, grid, table)
        write_json_atomic(directory / ranking_file(plan.layer, config.alpha), ranking_rows(grid))
    run = provenance(config, experiment, grid, store, clock.seconds)
    write_run(directory, analysis={}, run=run, summary=summary)
    return Study(directory, grid, experiment, table, summary, clock.seconds)


def plan_of(config: RunConfig, pair: ModelPair) -> GridPlan:
    """The grid's plan, checked against the pair.

    Raises:
        UserError: if no layer is named, or a layer or k does not fit the models.
    """
    if config.layer is None:
        raise UserError(
            f"no layer is named for pair {config.pair!r}: give one from 0 to {pair.n_layers - 1} "
            "with --layer."
        )
    plan = GridPlan(pair.n_heads, config.layer, config.control_layer, config.k, config.random_seeds)
    check_layers(plan.layers, pair.n_layers)
    return plan


def capture(
    config: RunConfig, pair: ModelPair, layers: Sequence[int], clock: Clock
) -> PairActivations:
    """Read both models' activations.

    Args:
        config: which split is measured, at how many positions.
        pair: the pair.
        layers: the layers to read.
        clock: times the stage.

    Returns:
        The activations.
    """
    activations = PairActivations(
        pair, k_positions=config.k_positions, batch_size=config.batch_size
    )
    with clock("capture"):
        # All of base before any of tuned: the models may not fit into memory together.
        activations.capture("base", FIT_SPLIT, layers)
        activations.capture("base", config.split, layers)
        activations.capture("tuned", FIT_SPLIT, layers)
    return activations


def prepare_experiment(
    config: RunConfig,
    activations: PairActivations,
    layers: Sequence[int],
    clock: Clock,
    *,
    maps_directory: Path | None = None,
    fresh: bool = False,
) -> Experiment:
    """Fit or reuse the maps, and set the tuned model behind an engine.

    Args:
        config: how to fit and patch.
        activations: what :func:`capture` read.
        layers: the layers to prepare.
        clock: times the stages.
        maps_directory: where fitted maps are looked up and kept, if anywhere.
        fresh: fit every map again.

    Returns:
        The experiment.
    """
    pair = activations.pair
    with clock("maps"):
        maps = fit_maps(
            pair,
            layers,
            config.map_kind,
            scope=config.map_scope,
            seed=config.seed,
            activations=activations,
            directory=maps_directory,
            fresh=fresh,
        )
    with clock("prepare"):
        return prepare(
            pair,
            maps,
            split=config.split,
            raw_baseline=config.raw_baseline,
            kl_direction=config.kl_direction,
            engine=config.engine,
            batch_size=config.batch_size,
            activations=activations,
        )


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
        "rq4lens": version("rq4lens"),
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
        "engine": experiment.engine.name,
        "device": resolve_device(config.device),
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


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
