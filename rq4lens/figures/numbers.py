"""The numbers behind the figures: estimates with intervals, kinds of heads, hover texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from rq4lens.analysis.head_kinds import head_kinds as tell_kinds
from rq4lens.analysis.metrics import bootstrap_of, condition_estimates
from rq4lens.analysis.statistics import Bootstrap, Estimate
from rq4lens.figures.saved import HasRecord, Record, as_record
from rq4lens.figures.theme import GREY
from rq4lens.results import ConditionResult, GridResult

Kind = Literal["re-coordinated", "rewired", "undecided", "idle"]

KINDS: tuple[Kind, ...] = get_args(Kind)
INTERVAL_NOTE = "bars and [..]: 95% bootstrap intervals over prompts"


@dataclass(frozen=True)
class ConditionNumbers:
    """One condition with the intervals of its numbers.

    Args:
        condition: the measured condition.
        label: its name in figures: ``L26H3`` for a single head.
        KL_raw: mean KL of the raw patch, nats.
        KL_mapped: mean KL of the mapped patch, nats.
        delta: ``ΔKL``, nats.
        drop_pct: share of the raw damage that the map repairs.
        coverage_pct: share of ``ΔKL(ALL)``.
    """

    condition: ConditionResult
    label: str
    KL_raw: Estimate
    KL_mapped: Estimate
    delta: Estimate
    drop_pct: Estimate
    coverage_pct: Estimate

    @property
    def hover(self) -> str:
        """Name, numbers and intervals, a line each."""
        return "<br>".join(
            (
                f"<b>{self.label}</b>",
                f"ΔKL {shown(self.delta, 'nats')}",
                f"KL_raw {shown(self.KL_raw, 'nats')}",
                f"KL_mapped {shown(self.KL_mapped, 'nats')}",
                f"drop {shown(self.drop_pct, '%')}",
                f"coverage {shown(self.coverage_pct, '%')}",
            )
        )


def numbers_of(
    grid: GridResult,
    conditions: Sequence[ConditionResult],
    labels: Sequence[str],
    bootstrap: Bootstrap | None = None,
) -> list[ConditionNumbers]:
    """Estimates and intervals of conditions of a grid.

    Args:
        grid: the grid whose full condition is the denominator of coverage.
        conditions: the conditions.
        labels: their names in the figure.
        bootstrap: the resamples; made from the grid's prompts when left out.
    """
    rows = condition_estimates(grid, conditions, bootstrap or bootstrap_of(grid))
    return [
        ConditionNumbers(
            condition,
            label,
            row["KL_raw_mean"],
            row["KL_mapped_mean"],
            row["delta"],
            row["drop_pct"],
            row["coverage_pct"],
        )
        for condition, label, row in zip(conditions, labels, rows, strict=True)
    ]


def single_head_numbers(
    grid: GridResult, bootstrap: Bootstrap | None = None
) -> list[ConditionNumbers]:
    """Estimates and intervals of every single head of the main layer, in head order."""
    labels = [grid.label(head) for head in range(grid.n_heads)]
    return numbers_of(grid, grid.singles, labels, bootstrap)


def head_kinds(
    grid: GridResult,
    analysis: HasRecord | Record | None = None,
    bootstrap: Bootstrap | None = None,
) -> tuple[tuple[Kind, ...], str]:
    """Which kind each head of the main layer is, in head order, and the rule in words.

    Args:
        grid: the measured grid.
        analysis: an analysis that already told them apart.
        bootstrap: the resamples that tell them apart otherwise.
    """
    saved = as_record(analysis).get("kinds")
    if saved:
        return tuple(row["kind"] for row in saved["heads"]), saved["rule"]
    kinds = tell_kinds(
        np.stack([single.kl_raw_nats for single in grid.singles]),
        np.stack([single.kl_mapped_nats for single in grid.singles]),
        grid.full.KL_raw,
        grid.noise_floor_nats,
        bootstrap or bootstrap_of(grid),
    )
    return tuple(cast("Kind", row.kind) for row in kinds.heads), kinds.rule


def shown(estimate: Estimate, unit: str) -> str:
    """An estimate as text: ``0.012 nats [0.010, 0.014]``, or why there is none."""
    if estimate.value is None:
        return f"undefined: {estimate.reason}"
    value = number(estimate.value, unit)
    if estimate.interval is None:
        return value
    return f"{value} [{estimate.interval.low:.3g}, {estimate.interval.high:.3g}]"


def number(value: float | None, unit: str = "") -> str:
    """A number with three significant digits and its unit."""
    if value is None:
        return "undefined"
    return f"{value:.3g}%" if unit == "%" else f"{value:.3g} {unit}".rstrip()


def error_bars(estimates: Sequence[Estimate], color: str = GREY) -> dict[str, object] | None:
    """Plotly error bars of estimates; None when no estimate has an interval."""
    if all(estimate.interval is None for estimate in estimates):
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": [_arm(estimate, up=True) for estimate in estimates],
        "arrayminus": [_arm(estimate, up=False) for estimate in estimates],
        "thickness": 1.2,
        "color": color,
        "width": 3,
    }


def _arm(estimate: Estimate, *, up: bool) -> float | None:
    if estimate.value is None or estimate.interval is None:
        return None
    high, low = estimate.interval.high, estimate.interval.low
    return high - estimate.value if up else estimate.value - low
