"""The numbers behind the figures: setting lines, axes, estimates with intervals, hover texts."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import plotly.graph_objects as go

from rq4lens.analysis.effects.table import records
from rq4lens.analysis.records import Analysis, ConditionRecord, HeadKinds
from rq4lens.analysis.statistics.bootstrap import Estimate, Interval, number_text
from rq4lens.figures import theme
from rq4lens.heads import Head
from rq4lens.results import GridResult, GridSettings

INTERVAL_NOTE = "bars and [..]: 95% bootstrap intervals over prompts"


def grid_setting(
    grid: GridResult, *notes: str, where: str | None = None, alpha: str | None = None
) -> tuple[str, ...]:
    """Everything a reader needs to know about how the numbers of a grid came about."""
    return settings_line(grid.settings, grid.n_prompts, *notes, where=where, alpha=alpha)


def settings_line(
    settings: GridSettings,
    n_prompts: int,
    *notes: str,
    where: str | None = None,
    alpha: str | None = None,
) -> tuple[str, ...]:
    """How numbers came about, from the settings alone."""
    patching = settings.patching
    baseline, k = patching.raw_baseline, patching.k_positions
    return (
        settings.pair,
        where or f"layer {settings.layer} of {settings.n_layers}",
        f"α = {alpha or format(patching.alpha, 'g')}",
        f"{patching.split}, n = {n_prompts}",
        f"map {patching.map_kind} per {patching.map_scope}",
        f"KL({patching.kl_direction.replace('||', ' ‖ ')}) in nats",
        settings.dtype.removeprefix("torch."),
        *((f"raw baseline {baseline}",) if baseline != "identity" else ()),
        *((f"last {k} positions",) if k != 1 else ()),
        *((f"metric {patching.metric}",) if patching.metric != "kl" else ()),
        *notes,
    )


def layers_setting(grids: Mapping[int, GridResult], *notes: str) -> tuple[str, ...]:
    """The setting of several layers, whose grids share everything but the layer."""
    grid, layers = grids[min(grids)], sorted(grids)
    whole = layers == list(range(layers[0], layers[-1] + 1))
    named = (
        f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))
    )
    return grid_setting(grid, *notes, where=f"layers {named} of {grid.settings.n_layers}")


# Values further apart than this cannot be told apart by eye on a linear axis.
_WIDE = 100.0
# A signed axis shows this many decades on each side of its linear part.
_DECADES = 4


def is_wide(values: Iterable[float | None]) -> bool:
    """Whether values, all above 0, span so much that a logarithmic axis is needed."""
    known = [value for value in values if value is not None]
    return bool(known) and min(known) > 0 and max(known) > _WIDE * min(known)


def effect_axis(title: str, estimates: Iterable[Estimate], **linear: Any) -> dict[str, Any]:
    """An axis for effects in nats: logarithmic where they span decades, else from 0.

    On a logarithmic axis not even the lower end of an interval may reach 0.
    """
    lows = [e.value if e.interval is None else e.interval.low for e in estimates]
    if not is_wide(lows):
        return {"title_text": f"{title} (nats)", "rangemode": "tozero", **linear}
    return {
        "title_text": f"{title} (nats, logarithmic)",
        "type": "log",
        "exponentformat": "power",
        "dtick": 1,
    }


@dataclass(frozen=True)
class SignedLog:
    """An axis that is linear below ``unit`` and logarithmic further out, on both sides of 0."""

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

    @staticmethod
    def axis(scale: SignedLog | None, low: float, high: float) -> dict[str, Any]:
        """The ticks of an axis that may be linear; they undo those of another view."""
        if scale is None:
            return {"tickmode": "auto", "tickvals": None, "ticktext": None}
        places, texts = scale.ticks(low, high)
        return {"tickmode": "array", "tickvals": places, "ticktext": texts}

    def estimate(self, estimate: Estimate) -> Estimate:
        """An estimate by the places of its value and its ends."""
        if estimate.value is None:
            return estimate
        ends = estimate.interval
        if ends is not None:
            ends = Interval(self.place(ends.low), self.place(ends.high))
        return replace(estimate, value=self.place(estimate.value), interval=ends)


def single_records(
    grid: GridResult, heads: Sequence[int] | None = None
) -> tuple[ConditionRecord, ...]:
    """The records of single heads of the main layer: of all, in head order, or of some."""
    heads = range(grid.n_heads) if heads is None else heads
    return records(grid, [grid.single(head) for head in heads])


def label_of(single: ConditionRecord) -> str:
    """The name of the head of a single-head record: ``L26H3``."""
    assert single.layer is not None
    return Head(single.layer, single.heads[0]).label


def hover(record: ConditionRecord, name: str | None = None) -> str:
    """Name, numbers and intervals of a condition, a line each; a single head names itself."""
    return "<br>".join(
        (
            f"<b>{name or label_of(record)}</b>",
            f"undoes {shown(record.to_base_pct, '%')}",
            f"gives base {shown(record.to_tuned_pct, '%')}",
            f"ΔKL {shown(record.delta, 'nats')}",
            f"KL_raw {shown(record.KL_raw_mean, 'nats')}",
            f"KL_mapped {shown(record.KL_mapped_mean, 'nats')}",
            f"drop {shown(record.drop_pct, '%')}",
            f"coverage {shown(record.coverage_pct, '%')}",
            f"raw coverage {shown(record.raw_coverage_pct, '%')}",
        )
    )


class Quantity(NamedTuple):
    """A number that a figure can switch to: its name, the field of its records, its scale."""

    name: str
    field: str
    title: str
    most: float | None = None
    signed: bool = True


NO_KINDS = "kinds of heads: not told apart, since the ladder was not measured"


def told_kinds(analysis: Analysis | None) -> HeadKinds | None:
    """The kinds of heads, if an analysis told them apart."""
    return analysis.kinds if analysis is not None and analysis.ladders else None


def kinds_rule(kinds: HeadKinds | None) -> str:
    """How kinds were told apart, in words."""
    return NO_KINDS if kinds is None else kinds.rule


def by_kind(kinds: HeadKinds | None, heads: Collection[int]) -> Iterator[tuple[str, list[int]]]:
    """Some heads by their kind, for every kind that any head of the layer is."""
    unknown = dict.fromkeys(heads, "undecided")
    of = {each.head: each.kind for each in kinds.heads} if kinds else unknown
    for kind in theme.KINDS:
        if kind in of.values():
            yield kind, [head for head in heads if of[head] == kind]


def shown(estimate: Estimate, unit: str = "") -> str:
    """An estimate as text: ``0.012 nats [0.010, 0.014]``, or why there is none."""
    if estimate.value is None:
        return f"undefined: {estimate.reason}"
    return format(estimate, _form(unit))


def rounded(estimate: Estimate, unit: str = "") -> str:
    """An estimate as text that is no more precise than its interval; a dash where it is none."""
    value, ends = estimate.value, estimate.interval
    if value is None:
        return "–"
    half = 0.0 if ends is None else (ends.high - ends.low) / 2
    if half <= 0:
        return number(value, unit)
    step = math.floor(math.log10(half))
    if unit == "%":
        return format(estimate, f".{min(1, max(0, -step))}f%")
    form = f".{max(0, -step)}f"
    if 0 < abs(value) < _SMALL:
        form = f".{max(0, math.floor(math.log10(abs(value))) - step)}e"
    return format(estimate, f"{form} {unit}" if unit else form)


_SMALL = 1e-3
"""Below this a table shows powers of ten."""


def number(value: float | None, unit: str = "") -> str:
    """A number with three significant digits and its unit."""
    return number_text(value, _form(unit))


def _form(unit: str) -> str:
    return f".3g{unit}" if unit in ("", "%") else f".3g {unit}"


def error_bars(estimates: Sequence[Estimate], **look: Any) -> dict[str, Any] | None:
    """Plotly error bars of estimates; None when no estimate has an interval."""
    if all(each.interval is None for each in estimates):
        return None
    arms = [
        (None, None)
        if each.value is None or each.interval is None
        else (each.interval.high - each.value, each.value - each.interval.low)
        for each in estimates
    ]
    up, down = map(list, zip(*arms, strict=True))
    ends = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
    return {**ends, "thickness": 1.2, "width": 3, "color": theme.GREY, **look}


class Point(NamedTuple):
    """A point of a line: its place, its number, what the mouse says, the head it stands for."""

    x: float
    estimate: Estimate
    hover: str
    head: str | None = None


def line(name: str, points: Sequence[Point], look: theme.Look, *, bars: bool = True) -> go.Scatter:
    """A line through some points, with their intervals as bars."""
    estimates = [point.estimate for point in points]
    return go.Scatter(
        name=name,
        x=[point.x for point in points],
        y=[each.value for each in estimates],
        error_y=error_bars(estimates, color=theme.translucent(look.color, 0.7)) if bars else None,
        customdata=[point.head for point in points],
        **look.trace,
        **theme.hover([point.hover for point in points]),
    )
