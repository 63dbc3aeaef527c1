"""The sweep: every layer's grid side by side, and which layers they propose as main and control."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rq4lens.analysis.records import LayerChoice, LayerComparison, LayerRow
from rq4lens.analysis.saved import SavedLayers, write_layers
from rq4lens.analysis.structure.layers import compare_layers
from rq4lens.config import RunConfig
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Stage, silent
from rq4lens.models.pair import ModelPair
from rq4lens.patching.activations import check_layers
from rq4lens.patching.grid import GridPlan, run_sweep
from rq4lens.screen.tables import sweep_text

_LAYERS = re.compile(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", re.ASCII)

WORTH_PCT = 1.0
"""The heads of a main layer should undo at least this much of the gap."""


@dataclass(frozen=True, repr=False)
class Sweep(SavedLayers):
    """A finished sweep, and the ``summary`` that the console prints."""

    summary: str


def sweep_layers(
    config: RunConfig,
    directory: Path | str | None = None,
    layers: int | Sequence[int] | None = None,
    *,
    fresh: bool = False,
    stage: Stage = silent,
    pair: ModelPair | None = None,
) -> Sweep:
    """Measure the grid of every layer from one clean pass of each model, and compare the layers.

    >>> sorted(rq.sweep_layers(config, layers=1, pair=pair).grids)
    [1]

    Args:
        config: the pair and how to patch; its main and control layer do not matter.
        directory: where the conditions, maps and results are kept, if anywhere; a run directory
            of the same pair shares what it measured already.
        layers: the layers; all of them when left out.
        fresh: measure everything again, whatever the directory holds.
        stage: opens a stage of the work, for progress bars.
        pair: a pair in memory, in place of the one that the configuration names.

    Returns:
        The sweep.

    Raises:
        UserError: if a layer does not exist, the directory holds other files, or something cannot
            be read or written.
    """
    return sweep_on(Bench(config, directory, fresh=fresh, stage=stage, pair=pair), layers)


def sweep_on(bench: Bench, layers: int | Sequence[int] | None = None) -> Sweep:
    """Sweep at a bench; see :func:`sweep_layers`."""
    config, clock = bench.config, bench.clock
    with clock("load"):
        n_layers = bench.pair.n_layers
        asked = range(n_layers) if layers is None else layers
        chosen = sorted(set(check_layers(asked, n_layers)))
    patching = config.patching.but(layer=chosen[0], control_layer=None)
    measurer = bench.measurer(chosen)
    experiment = measurer.experiment
    n_patches = GridPlan(experiment.n_heads, patching).n_patches
    with clock("sweep", len(chosen) * n_patches * len(experiment.prompts)) as progress:
        grids = run_sweep(measurer, patching, config.effort, progress)
    with clock("compare"):
        comparison = compare_layers(grids, measurer)
    choice = choose_layers(comparison)
    lowest = grids[chosen[0]]
    text = sweep_text(lowest.settings, lowest.n_prompts, comparison, choice)
    sweep = Sweep(grids, comparison, choice, text)
    if bench.directory is not None:
        write_layers(bench.directory, sweep)
    return sweep


def choose_layers(comparison: LayerComparison) -> LayerChoice:
    """Propose a main and a control layer by what their heads carry of the gap.

    The main layer's heads undo most of it, and at least ``WORTH_PCT``. The control is, among the
    layers that undo clearly less (the intervals do not touch), the one whose raw patch does most:
    where nothing is changed, nothing could show.
    """
    if comparison.gap.undefined_because is not None:
        reason = f"no layer is proposed: {comparison.gap.undefined_because}"
        return LayerChoice(None, None, (reason,))
    unrepaired = tuple(_unrepaired(comparison.rows))
    worth = [
        row
        for row in comparison.rows
        if row.to_base_pct.interval is not None and row.to_base_pct.interval.low >= WORTH_PCT
    ]
    main = max(worth, key=lambda row: row.to_base_pct.value or 0.0, default=None)
    if main is None:
        reason = (
            f"no layer is proposed: the heads of none undo {WORTH_PCT:g}% of the gap, with their "
            "whole interval; what the fine-tune changed is not in what one layer's heads say here"
        )
        return LayerChoice(None, None, (reason, *unrepaired))
    reasons = [
        f"main layer {main.layer}: its heads undo more than those of any other, "
        f"{main.to_base_pct:.1f%}"
    ]
    clear = [row for row in comparison.rows if _clearly_below(row, main)]
    control = max(clear, key=lambda row: row.KL_raw.value or 0.0, default=None)
    if control is None:
        reasons.append("no control layer: no other layer undoes clearly less")
    else:
        reasons.append(
            f"control layer {control.layer}: its heads undo clearly less, "
            f"{control.to_base_pct:.1f%}, and of such layers its raw patch does most, "
            f"{control.KL_raw.value or 0.0:.2g} nats"
        )
    chosen = None if control is None else control.layer
    return LayerChoice(main.layer, chosen, (*reasons, *unrepaired))


def _clearly_below(row: LayerRow, main: LayerRow) -> bool:
    high, low = row.to_base_pct.interval, main.to_base_pct.interval
    return row is not main and high is not None and low is not None and high.high < low.low


def _unrepaired(rows: Sequence[LayerRow]) -> Iterator[str]:
    """Layers whose raw patch does as much as a tenth of the largest, most of it for good."""
    largest = max(row.KL_raw.value or 0.0 for row in rows)
    for row in rows:
        drop, raw = row.drop_pct, row.KL_raw.value or 0.0
        if raw >= largest / 10 and drop.interval is not None and drop.interval.high < 50:
            yield (
                f"layer {row.layer}: its raw patch does {raw:.2g} nats, of which its map takes "
                f"back only {drop:.0f%}"
            )


def parse_layers(text: str | None) -> list[int] | None:
    """Layers as a user writes them, ``"24-27,30"``; None or ``"ALL"`` are all of them."""
    if text is None or text.strip().upper() == "ALL":
        return None
    layers: list[int] = []
    for part in text.split(","):
        match = _LAYERS.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if last < first:
            raise UserError(
                f"cannot read layers {text[:60]!r}: write them as '24,26' or '20-31', the lower "
                "one first."
            )
        layers += range(first, last + 1)
    return layers
