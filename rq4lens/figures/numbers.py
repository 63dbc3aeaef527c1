"""The numbers behind the figures: setting lines, axes, estimates with intervals, hover texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from rq4lens.analysis.effects.table import bootstrap_of, condition_estimates
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate
from rq4lens.analysis.structure.heads import head_kinds as tell_kinds
from rq4lens.figures.saved import HasRecord, Record, as_record
from rq4lens.figures.theme import GREY
from rq4lens.results import ConditionResult, GridResult, GridSettings


def setting_parts(
    settings: GridSettings,
    n_prompts: int,
    *,
    where: str | None = None,
    alpha: str | None = None,
    notes: Sequence[str] = (),
) -> tuple[str, ...]:
    """Everything a reader needs to know about how the numbers came about."""
    baseline = settings.patching.raw_baseline
    return (
        settings.pair,
        where or f"layer {settings.layer} of {settings.n_layers}",
        f"α = {alpha or format(settings.patching.alpha, 'g')}",
        f"{settings.patching.split}, n = {n_prompts}",
        f"map {settings.patching.map_kind} per {settings.patching.map_scope}",
        f"KL({settings.patching.kl_direction.replace('||', ' ‖ ')}) in nats",
        settings.dtype.removeprefix("torch."),
        *((f"raw baseline {baseline}",) if baseline != "identity" else ()),
        *(
            (f"last {settings.patching.k_positions} positions",)
            if settings.patching.k_positions != 1
            else ()
        ),
        *notes,
    )


def grid_setting(grid: GridResult, *notes: str, alpha: str | None = None) -> tuple[str, ...]:
    """The setting of one grid at its main layer."""
    return setting_parts(grid.settings, grid.n_prompts, alpha=alpha, notes=notes)


def any_grid(grids: Mapping[int, GridResult]) -> GridResult:
    """One of the grids of a sweep; they share everything but the layer."""
    return grids[min(grids)]


def layers_setting(grids: Mapping[int, GridResult], *notes: str) -> tuple[str, ...]:
    """The setting of several layers."""
    grid, layers = any_grid(grids), sorted(grids)
    whole = layers == list(range(layers[0], layers[-1] + 1))
    named = (
        f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))
    )
    where = f"layers {named} of {grid.settings.n_layers}"
    return setting_parts(grid.settings, grid.n_prompts, where=where, notes=notes)


# Values further apart than this are not told apart by eye on a linear axis.
_WIDE = 100.0
# A signed axis shows this many decades on each side of its linear part.
_DECADES = 4


def is_wide(values: Iterable[float | None]) -> bool:
    """Whether values, all above 0, span so much that a logarithmic axis is needed."""
    known = [value for value in values if value is not None]
    return bool(known) and min(known) > 0 and max(known) > _WIDE * min(known)


def lows(estimates: Iterable[Estimate]) -> list[float | None]:
    """The lowest that each estimate may be; on a logarithmic axis none of them may reach 0."""
    return [e.value if e.interval is None else e.interval.low for e in estimates]


@dataclass(frozen=True)
class SignedLog:
    """An axis that is linear around 0 and logarithmic further out, on both sides.

    Args:
        unit: size below which it is linear, in the unit of the values; above 0.
    """

    unit: float

    @classmethod
    def of(cls, values: Sequence[float]) -> SignedLog | None:
        """The axis for some values; None where a linear one shows them well.

        That is where a typical value can still be seen beside the largest one.
        """
        sizes = sorted(abs(value) for value in values if value)
        if not sizes or sizes[-1] <= _WIDE * sizes[len(sizes) // 2]:
            return None
        return cls(10.0 ** (math.ceil(math.log10(sizes[-1])) - _DECADES))

    def place(self, value: float) -> float:
        """Where a value stands on the axis."""
        return math.asinh(value / self.unit)

    def ticks(self, low: float, high: float) -> tuple[list[float], list[str]]:
        """Places and texts of the ticks between two values: 0 and the powers of ten."""
        # The power next to 0 is left out: its text would touch the 0.
        powers = [self.unit * 10.0**decade for decade in range(1, _DECADES + 1)]
        shown = [-power for power in reversed(powers)] + [0.0, *powers]
        inside = [value for value in shown if low <= value <= high]
        return [self.place(value) for value in inside], [f"{value:g}" for value in inside]


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
    """Estimates and intervals of conditions of a grid."""
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
    """Which kind each head of the main layer is, in head order, and the rule in words."""
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
