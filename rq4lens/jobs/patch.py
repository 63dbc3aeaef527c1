"""One condition: a head set of one layer, raw and mapped, beside the whole layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rq4lens.analysis.effects.table import records
from rq4lens.config import RunConfig
from rq4lens.disk.files import refuse_no_file, write_json_atomic
from rq4lens.heads import HeadSet
from rq4lens.jobs.preparation import capture, plan_of, prepare_experiment
from rq4lens.jobs.progress import Clock, Stage, silent
from rq4lens.models.catalog import pair_from_config
from rq4lens.patching.grid import run_condition
from rq4lens.screen.tables import condition_text


@dataclass(frozen=True)
class SinglePatch:
    """What one patch did.

    Args:
        record: the condition's record, as in ``rq4_results.json``.
        text: what the console prints.
    """

    record: dict[str, Any]
    text: str


def patch_once(
    config: RunConfig, heads: str, out: Path | None = None, *, stage: Stage = silent
) -> SinglePatch:
    """Patch one head set.

    The whole layer and the two checks are measured along with it, because coverage is a share of
    the whole layer's effect and is only defined above the noise floor.

    Raises:
        UserError: if the head set or the configuration does not fit the pair.
    """
    refuse_no_file(out)
    config = config.updated(control_layer=None, k=[], random_seeds=[])
    clock = Clock(stage)
    with clock("load"):
        pair = pair_from_config(config)
        layers = plan_of(config, pair).layers
        chosen = HeadSet.parse(heads, pair.n_heads)
    activations = capture(config, pair, layers, clock)
    experiment = prepare_experiment(config, activations, layers, clock)
    with clock("patch"):
        grid = run_condition(experiment, layers[0], chosen, config.alpha)
        record = next(
            each
            for each in records(grid, n_resamples=config.resamples, seed=config.seed)
            if each["cond"] == "patch"
        )
    if out is not None:
        write_json_atomic(out, record)
    return SinglePatch(record, condition_text(grid.settings, record))
