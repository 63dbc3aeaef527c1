"""One condition: a head set of one layer, raw and mapped, beside the whole layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rq4lens.analysis.effects.table import records
from rq4lens.analysis.records import ConditionRecord
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.config import RunConfig
from rq4lens.disk.files import refuse_no_file, write_json_atomic
from rq4lens.heads import HeadSet
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Stage, silent
from rq4lens.jobs.say import Said, continuations, said_text
from rq4lens.patching.grid import measure_condition
from rq4lens.patching.patch import RAW, Patch
from rq4lens.screen.tables import condition_text


@dataclass(frozen=True)
class SinglePatch:
    """What one patch did.

    Args:
        record: the condition's record, as in ``rq4_results.json``.
        text: what the console prints.
        said: how each voice continues some prompts, if that was asked for.
    """

    record: ConditionRecord
    text: str
    said: tuple[Said, ...] = ()


N_PROMPTS = 3
"""Prompts that are continued where none are named: those that the raw patch moves most."""


def patch_once(
    config: RunConfig,
    heads: str,
    out: Path | None = None,
    *,
    say: int = 0,
    prompts: Sequence[str] = (),
    stage: Stage = silent,
) -> SinglePatch:
    """Patch one head set, and let the models go on for ``say`` tokens behind some prompts.

    The whole layer and the two checks are measured along with it, because coverage is a share of
    the whole layer's effect and is only defined above the noise floor.

    Raises:
        UserError: if the head set or the configuration does not fit the pair.
    """
    refuse_no_file(out)
    bench = Bench(config.updated(control_layer=None, k=[], random_seeds=[]), stage=stage)
    with bench.clock("load"):
        plan = bench.plan
        chosen = HeadSet.parse(heads, plan.n_heads, plan.layer)
    measurer = bench.measurer(plan.layers)
    with bench.clock("patch"):
        grid = measure_condition(measurer, bench.config.patching, chosen, config.effort)
        record = next(each for each in records(grid) if each.cond == "patch")
    text = condition_text(grid.settings, record)
    said: tuple[Said, ...] = ()
    if say:
        moved = np.argsort(-grid["patch"].kl_raw_nats, kind="stable")[:N_PROMPTS]
        wanted = prompts or [grid.prompt_ids[row] for row in moved]
        patch = Patch(plan.layer, chosen, grid.settings.patching.alpha, RAW)
        with bench.clock("say"):
            said = continuations(measurer.experiment, patch, wanted, say)
        text += said_text(said)
    if out is not None:
        write_json_atomic(out, to_json(record) | ({"said": to_json(said)} if say else {}))
    return SinglePatch(record, text, said)
