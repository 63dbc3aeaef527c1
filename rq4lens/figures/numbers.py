"""The numbers behind the figures: estimates with intervals, kinds of heads, hover texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rq4lens.analysis.metrics import bootstrap_of, condition_estimates
from rq4lens.analysis.statistics import Bootstrap, Estimate
from rq4lens.figures.theme import GREY
from rq4lens.results import ConditionResult, GridResult

Kind = Literal["re-coordinated", "rewired", "idle"]

KINDS: tuple[Kind, ...] = ("re-coordinated", "rewired", "idle")
IDLE_SHARE = 0.05
REPAIRED_PCT = 50.0
KIND_RULE = (
    f"idle: KL_raw within the noise floor or below {IDLE_SHARE:.0%} of the layer's largest; "
    f"re-coordinated: the map repairs at least {REPAIRED_PCT:g}%; rewired: less"
)
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


def head_kinds(grid: GridResult) -> tuple[Kind, ...]:
    """Which of the three kinds each head of the main layer is, in head order.

    The bounds are a reading aid, printed with the figure; the numbers are the result.
    """
    largest = max(single.KL_raw for single in grid.singles)
    idle_below = max(grid.noise_floor_nats, IDLE_SHARE * largest)
    return tuple(_kind(single, idle_below) for single in grid.singles)


def _kind(single: ConditionResult, idle_below: float) -> Kind:
    if single.drop_pct is None or single.KL_raw <= idle_below:
        return "idle"
    return "re-coordinated" if single.drop_pct >= REPAIRED_PCT else "rewired"


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
