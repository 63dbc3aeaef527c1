"""The sweep: every layer's grid side by side, and which layers they propose as main and control."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rq4lens.analysis.records import LayerChoice, LayerComparison, LayerRow
from rq4lens.analysis.saved import write_layers
from rq4lens.analysis.structure.layers import compare_layers
from rq4lens.config import RunConfig
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Stage, silent
from rq4lens.patching.activations import check_layers
from rq4lens.patching.grid import GridPlan, run_sweep
from rq4lens.results import GridResult
from rq4lens.screen.tables import sweep_text

_LAYERS = re.compile(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", re.ASCII)

WORTH_NATS = 0.01
"""A main layer's raw patch should move the next-token distribution by at least this much."""


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Args:
        grids: the grid of each layer.
        comparison: what the analysis says of them.
        choice: the proposed layers.
        summary: what the console prints.
    """

    grids: Mapping[int, GridResult]
    comparison: LayerComparison
    choice: LayerChoice
    summary: str


def sweep_layers(
    config: RunConfig,
    directory: Path | None = None,
    layers: Sequence[int] | None = None,
    *,
    fresh: bool = False,
    stage: Stage = silent,
) -> Sweep:
    """Measure the grid of every layer from one clean pass of each model, and compare the layers.

    Args:
        config: the pair and how to patch; its main and control layer do not matter.
        directory: where the conditions, maps and results are kept, if anywhere; a run directory
            of the same pair shares what it measured already.
        layers: the layers; all of them when left out.
        fresh: measure everything again, whatever the directory holds.
        stage: opens a stage of the work, for progress bars.

    Returns:
        The sweep.

    Raises:
        UserError: if a layer does not exist, the directory holds other files, or something cannot
            be read or written.
    """
    return sweep_on(Bench(config, directory, fresh=fresh, stage=stage), layers)


def sweep_on(bench: Bench, layers: Sequence[int] | None = None) -> Sweep:
    """Sweep at a bench; see :func:`sweep_layers`."""
    config, clock = bench.config, bench.clock
    with clock("load"):
        chosen = list(range(bench.pair.n_layers)) if layers is None else sorted(set(layers))
        check_layers(chosen, bench.pair.n_layers)
    patching = config.patching.but(layer=chosen[0], control_layer=None)
    measurer = bench.measurer(chosen)
    experiment = measurer.experiment
    n_patches = GridPlan(experiment.n_heads, patching).n_patches
    with clock("sweep", len(chosen) * n_patches * len(experiment.prompts)) as progress:
        grids = run_sweep(measurer, patching, config.effort, progress)
    with clock("compare"):
        comparison = compare_layers(grids, measurer)
    choice = choose_layers(comparison.rows)
    if bench.directory is not None:
        write_layers(bench.directory, grids, comparison, choice)
    lowest = grids[chosen[0]]
    text = sweep_text(lowest.settings, lowest.n_prompts, comparison, choice)
    return Sweep(grids, comparison, choice, text)


def choose_layers(rows: Sequence[LayerRow]) -> LayerChoice:
    """Propose a main and a control layer.

    The main layer is the one whose map repairs most, among layers after the first whose raw patch
    does at least ``WORTH_NATS`` and whose ``ΔKL(ALL)`` can be told from zero. The control is, among
    the layers whose ``ΔKL(ALL)`` lies clearly below (the intervals do not touch), the one whose raw
    patch does most: where nothing is damaged, nothing could be repaired.
    """
    worth = [row for row in rows if row.layer > 0 and _is_worth(row)]
    main = max(worth, key=_delta, default=None)
    if main is None:
        reason = (
            f"no layer after the first has KL_raw(ALL) of at least {WORTH_NATS} nats and a "
            "ΔKL(ALL) that can be told from zero: raise alpha or take more prompts"
        )
        return LayerChoice(None, None, (reason,))
    reasons = [
        f"main layer {main.layer}: its map repairs most, ΔKL(ALL) {_delta(main):.5f} nats, and its "
        f"raw patch does {main.KL_raw.value or 0.0:.5f} nats (at least {WORTH_NATS} asked)"
    ]
    clear = [row for row in rows if row.layer > 0 and _clearly_below(row, main)]
    control = max(clear, key=lambda row: row.KL_raw.value or 0.0, default=None)
    if control is None:
        reasons.append("no control layer: no other layer's ΔKL(ALL) lies clearly below")
        return LayerChoice(main.layer, None, tuple(reasons))
    reasons.append(
        f"control layer {control.layer}: its map repairs clearly less, {_delta(control):.7f} nats "
        f"({100 * _delta(control) / _delta(main):.2f}% of the main layer), and of such layers its "
        f"raw patch does most, {control.KL_raw.value or 0.0:.7f} nats"
    )
    return LayerChoice(main.layer, control.layer, tuple(reasons))


def _is_worth(row: LayerRow) -> bool:
    enough = (row.KL_raw.value or 0.0) >= WORTH_NATS
    return enough and row.full.undefined_because is None and _delta(row) > 0


def _clearly_below(row: LayerRow, main: LayerRow) -> bool:
    high, low = row.delta.interval, main.delta.interval
    return row is not main and high is not None and low is not None and high.high < low.low


def _delta(row: LayerRow) -> float:
    return row.delta.value or 0.0


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
