"""The main job: from a configuration to a run directory that says how it was made."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rq4lens.analysis.analyse import PARTS, Beside, analyse
from rq4lens.analysis.card.sides import NO_CARD, CardInputs
from rq4lens.analysis.card.swaps import next_tokens
from rq4lens.analysis.effects.table import ranking_rows, records
from rq4lens.analysis.records import Analysis
from rq4lens.analysis.saved import Run, read_run, write_grid, write_run
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.config import AnalysisEffort, RunConfig
from rq4lens.disk.files import read_json, write_json_atomic
from rq4lens.disk.run import (
    AUDIT,
    FORMAT,
    NEXT_TOKENS,
    PROMPTS,
    RUN,
    ranking_file,
    remove_other_rankings,
)
from rq4lens.disk.store import NamedIngredients
from rq4lens.jobs.audit import facts_of
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.finished import LIBRARIES, Finished, refuse_other_run
from rq4lens.jobs.memory import plan_memory, say_and_require
from rq4lens.jobs.pages import heads_that_matter, write_cards, write_pages
from rq4lens.jobs.progress import Progress, Stage, silent
from rq4lens.models.load.devices import resolve_device
from rq4lens.models.load.lens import HookedModel
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.models.prompts.prompt_set import SIDE_EFFECT_SPLIT
from rq4lens.models.weights import WeightChange
from rq4lens.patching.engines.row_engine import RowEngine
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.grid import measure_grid
from rq4lens.patching.measured import Measurer
from rq4lens.patching.noise import NoiseEffects, noise_effects
from rq4lens.results import GridResult
from rq4lens.screen.tables import summary_text


def provenance(bench: Bench, experiment: Experiment, grid: GridResult) -> dict[str, Any]:
    """Everything that says how a run was made; the content of ``run.json``."""
    config, pair, counters = bench.config, bench.pair, bench.store and bench.store.counters
    return {
        "format": FORMAT,
        "rq4lens": _version("rq4lens"),
        "config": config.flat(),
        "settings": grid.settings.to_dict(),
        "noise_floor_nats": grid.noise_floor_nats,
        "compared": grid.compared._asdict(),
        "models": {side: pair.member(side).card.to_dict() for side in SIDES},
        "prompts": {
            "fingerprint": pair.prompts.fingerprint,
            "splits": {name: len(pair.prompts.split(name)) for name in pair.prompts.splits},
            "tokens": {
                side: pair.tokens(side, grid.settings.patching.split).fingerprint for side in SIDES
            },
        },
        "maps": {
            str(layer): {**each.to_dict(), "fingerprint": each.fingerprint}
            for layer, each in bench.maps(bench.plan.layers).items()
        },
        "engine": _engine(experiment),
        "device": resolve_device(config.place.device),
        "base_loaded": pair.base.was_loaded,
        "blocks_on": _blocks_on(pair),
        "peak_device_bytes": _peak_device_bytes(),
        "store": counters
        and {
            "reused": counters.reused,
            "computed": counters.computed,
            "set_aside": [list(entry) for entry in counters.set_aside],
        },
        "libraries": {name: _version(name) for name in LIBRARIES},
        "machine": {
            "python": platform.python_version(),
            "system": platform.system(),
            "processor": platform.machine(),
            "torch_threads": torch.get_num_threads(),
        },
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


def run(
    config: RunConfig,
    directory: Path | str,
    *,
    fresh: bool = False,
    replace: bool = False,
    stage: Stage = silent,
    pair: ModelPair | None = None,
) -> Run:
    """Run the main job and write its run directory.

    A run that was interrupted goes on where it stopped: finished conditions are taken from the
    run directory. ``rq.run(rq.RunConfig(patching=rq.Patching(layer=1)), "runs/mine", pair=pair)``
    runs it on a pair in memory.

    >>> rq.run(config, folder, pair=pair).grid
    <GridResult etiquette, layer 1 of 6, alpha 0.3: ... conditions, 320 val prompts>

    Args:
        config: what to run.
        directory: the run directory; made if missing.
        fresh: measure everything again, whatever the directory holds; it may be a finished run of
            other settings.
        replace: let this run take the place of a finished run of other settings.
        stage: opens a stage of the work, for progress bars.
        pair: a pair in memory, in place of the one that the configuration names; it is read as it
            was made to be.

    Returns:
        The finished run.

    Raises:
        UserError: if the configuration does not fit the pair, the directory holds other files or
            a finished run of other settings, or something cannot be read or written.
    """
    bench = Bench(config, directory, fresh=fresh, stage=stage, pair=pair)
    if not (replace or fresh):
        refuse_other_run(bench.config, bench.run_directory, pair)
    cache = bench.config.place.cache
    if cache is None or fresh or pair is not None:
        return run_on(bench)
    finished, here = Finished(bench.config, Path(cache)), bench.run_directory
    if finished.same is None or (here / RUN).exists():
        made = run_on(bench)
        finished.remember(here)
        return made
    with bench.clock(f"copy of the same run in {finished.same.directory}"):
        finished.same.copy_to(here)
        finished.remember(here)
    return read_run(here)


def run_on(bench: Bench) -> Run:
    """Run the main job at a bench with a run directory; see :func:`run`."""
    config, clock, directory = bench.config, bench.clock, bench.run_directory
    with clock("load"):
        memory = None
        if bench.given_pair is None:
            memory = plan_memory(config)
            say_and_require(memory)
            bench.keep_both = memory.keep_both
        plan = bench.plan
        audit = bench.pair.audit()
    measurer = bench.measurer(plan.layers)
    experiment = measurer.experiment
    with clock("grid", plan.n_patches * len(experiment.prompts)) as progress:
        grid = measure_grid(measurer, config.patching, config.effort, progress)
        table = records(grid)
        write_grid(directory, grid, table)
        ranking = directory / ranking_file(plan.layer, config.patching.alpha)
        write_json_atomic(ranking, ranking_rows(grid))
        remove_other_rankings(ranking)
    with clock("analysis", len(PARTS)) as progress:
        analysis = _analyse(bench, grid, measurer, progress)
    bench.activations.keep()  # those of prompts that only the analysis asked for
    texts = dict(zip(*_texts(experiment), strict=True))
    write_json_atomic(directory / PROMPTS, texts)
    write_json_atomic(directory / AUDIT, audit.to_dict())
    of_base = bench.activations.log_probs("base", experiment.split)
    said = next_tokens(experiment, plan.layer, of_base)
    write_json_atomic(directory / NEXT_TOKENS, said)
    if audit.warning is not None:
        log.warning(audit.warning)
    gap = analysis.gap
    apart = (gap.base_nats, gap.tuned_nats, gap.answers_differ_pct)
    facts = facts_of(bench.pair, apart, audit, _weight_changes(measurer))
    summary = summary_text(grid.settings, table, analysis, facts)
    run = provenance(bench, experiment, grid)
    run |= {"audit": audit.summary, "pair": to_json(facts)}
    if memory is not None:
        run["memory_estimate"] = memory.to_dict()
    run["cards_reason"] = _why_no_cards(bench)
    if run["cards_reason"] is None:
        with clock("cards"):
            _write_cards(bench, experiment, grid, analysis)
    with clock("pages"):
        write_pages(directory, grid, analysis, (texts, said), run)
    run["timings_seconds"] = dict(clock.seconds)
    write_run(directory, analysis, run, summary)
    return Run(directory, grid, table, analysis, read_json(directory / RUN))


def _weight_changes(measurer: Measurer) -> Sequence[WeightChange]:
    """How each matrix changed; a repeated run need not load base for it."""
    pair, kept = measurer.experiment.pair, measurer.records
    models = {side: member.card.weights_fingerprint for side, member in pair.members.items()}
    backends = {f"{side}_backend": member.card.backend for side, member in pair.members.items()}
    numerics = {"numerics_version": measurer.on["numerics_version"]}
    ingredients = NamedIngredients("weight_changes", models | backends | numerics)
    found = None if kept is None else kept.get(ingredients)
    if found is not None:
        return [WeightChange(layer, name, tuple(sums)) for layer, name, sums in found["changes"]]
    if kept is not None and pair.weight_changes:
        kept.put(ingredients, {"changes": [list(each) for each in pair.weight_changes]})
    return pair.weight_changes


def _why_no_cards(bench: Bench) -> str | None:
    """Why no head cards are made; None where they are."""
    pair = bench.pair
    if bench.config.effort.analysis != "full":
        return "head cards belong to the full analysis; rq4lens head RUN L1H0 makes one now"
    if not (pair.keep_both and pair.base.is_loaded):
        return "the models were not in memory together; rq4lens head RUN L1H0 loads them again"
    bridged = any(member.card.backend == "bridge" for member in pair.members.values())
    return NO_CARD if bridged else None


def _write_cards(
    bench: Bench, experiment: Experiment, grid: GridResult, analysis: Analysis
) -> None:
    """The cards of the heads that matter; a repeated run finds those of the first one."""
    # A card patches the decision token alone: engines of more positions are of no use to it.
    prompts = experiment.prompts
    shared = SIDES if prompts == prompts.decided().placed() else ()
    engines = {side: experiment.ends.engine(side) for side in shared}
    inputs = CardInputs(bench.pair, grid, analysis, experiment.maps, bench.config.place, engines)
    write_cards(bench.run_directory, inputs, heads_that_matter(grid, analysis))


def _texts(experiment: Experiment) -> tuple[tuple[str, ...], tuple[str, ...]]:
    prompts = experiment.pair.prompts.split(experiment.split)
    return prompts.ids, prompts.texts


def _analyse(
    bench: Bench, grid: GridResult, measurer: Measurer, progress: Progress | None
) -> Analysis:
    config, experiment = bench.config, measurer.experiment
    if config.effort.analysis == "grid":
        return analyse(grid, progress=progress)
    if not isinstance(experiment.engine, RowEngine):
        log.warning(
            "the full analysis measures thousands of head sets, and engine %s runs the whole model "
            "for each: --analysis grid keeps to the conditions that are measured already",
            experiment.engine.name,
        )
    beside = Beside(
        neutral=_neutral(bench),
        noise=_noise(bench, measurer),
    )
    every = tuple(range(1, grid.n_heads + 1))
    sizes = {"affordable": None, "every": every, "k": ()}
    return analyse(
        grid,
        measurer,
        AnalysisEffort(random_ks=sizes[config.effort.random_sizes]),
        beside=beside,
        progress=progress,
    )


def _neutral(bench: Bench) -> Measurer | None:
    """The pair on neutral prompts, where there are some."""
    if SIDE_EFFECT_SPLIT not in bench.pair.prompts.splits:
        return None
    patching = bench.config.patching.of_divergence.but(split=SIDE_EFFECT_SPLIT)
    return bench.measuring(
        prepare(
            bench.pair,
            bench.maps(bench.plan.layers),
            patching,
            bench.config.place,
            activations=bench.activations,
        )
    )


def _noise(bench: Bench, measurer: Measurer) -> NoiseEffects | None:
    """The effects of the noise pair, unless it was not asked for or has no room."""
    config = bench.config
    if not config.effort.noise_pair or not bench.pair.keep_both:
        return None
    return noise_effects(
        measurer, bench.activations, config.patching, config.place, config.effort.seed
    )
