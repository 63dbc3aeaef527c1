"""How few heads carry the change: coverage of the best k heads against k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from rq4lens.analysis.effects.table import bootstrap_of, grid_full_effect, records
from rq4lens.analysis.records import CoverageCurve, RandomSets
from rq4lens.analysis.result import Analysis
from rq4lens.analysis.statistics.bootstrap import Estimate, exact
from rq4lens.figures import theme
from rq4lens.figures.numbers import INTERVAL_NOTE, error_bars, grid_setting, hover, shown
from rq4lens.results import ConditionResult, GridResult

CROSS_FITTED = "cross-fitted"
BEST_SUBSET = "best subset"
# Random sets of one size stand side by side: this share of one head apart.
_SEED_STEP = 0.12
# A 2.5% quantile of fewer sets than this is one of their extremes.
_FEWEST_FOR_BAND = 40


class _Point(NamedTuple):
    k: int
    coverage: Estimate
    hover: str
    added: str | None = None


def coverage_curve(grid: GridResult, analysis: Analysis | None = None) -> go.Figure:
    """Coverage of the best ``k`` heads against ``k``, with random head sets and the control.

    Args:
        grid: the measured grid; its ``top{k}``, ``rand{k}_s{seed}``, ``full`` and ``ctrl_full``
            conditions are drawn.
        analysis: an analysis of the grid. It fills the curve in at every k and adds the
            cross-fitted curve, the band of random head sets and the best subsets.

    Returns:
        The figure; where coverage is undefined, an empty one that says why.
    """
    figure = go.Figure()
    notes = [INTERVAL_NOTE]
    undefined_because = grid_full_effect(grid, bootstrap_of(grid)).undefined_because
    if undefined_because is not None:
        theme.message(figure, f"Coverage is undefined: {undefined_because}.")
    else:
        figure.add_traces(_traces(grid, analysis))
        if analysis is not None and analysis.random:
            # Between the sizes that were measured the band of random sets is drawn straight.
            sizes = ", ".join(str(row.k) for row in analysis.random)
            notes.append(f"random sets of {sizes} heads")
        if grid.control is not None:
            notes.append(_add_control(figure, grid, grid.control))
        axes(figure, grid.n_heads)
    return theme.frame(
        figure,
        f"Coverage of the best k heads, layer {grid.settings.layer}",
        grid_setting(grid, *notes),
        theme.Layout(460 + 21 * theme.legend_rows(figure)),
    )


def axes(figure: go.Figure, n_heads: int) -> None:
    """The axes of every coverage curve, with lines at 0 and 100%."""
    for level in (0, 100):
        figure.add_hline(y=level, line={"color": theme.GREY, "width": 1, "dash": "dot"})
    figure.update_xaxes(
        title_text="k, number of patched heads",
        range=[-0.03 * n_heads, 1.03 * n_heads],
        nticks=9,
        zeroline=False,
    )
    figure.update_yaxes(title_text="coverage (% of ΔKL of all heads)", zeroline=False)


def _traces(grid: GridResult, analysis: Analysis | None) -> list[go.Scatter]:
    curves = analysis.curves if analysis else ()
    best = _curve_points(grid, curves[0]) if curves else _best_of_grid(grid)
    traces = _random_band(analysis.random if analysis else ())
    for curve in filter(_is_cross_fitted, curves):
        points = _curve_points(grid, curve)
        traces.append(_line(CROSS_FITTED, points, theme.CROSS_FITTED, "square", "dot"))
    for curve in filter(_is_best_subset, curves):
        points = _curve_points(grid, curve)
        line = _line(BEST_SUBSET, points, theme.BEST, "triangle-up", "dashdot", bars=False)
        traces.append(line)
    traces.append(_line("best k", best, theme.BLUE, "circle", "solid"))
    seeds = _measured(grid, "rand", "random {k}")
    return traces + ([_scattered("random, seeds", seeds)] if seeds else [])


def _is_cross_fitted(curve: CoverageCurve) -> bool:
    return curve.ranking.endswith(f"({CROSS_FITTED})")


def _is_best_subset(curve: CoverageCurve) -> bool:
    return curve.ranking == BEST_SUBSET


def _best_of_grid(grid: GridResult) -> list[_Point]:
    return [
        _Point(0, exact(0.0), "no head: 0% by definition"),
        *(point for point in _measured(grid, "top", "best {k}") if 0 < point.k < grid.n_heads),
        _Point(grid.n_heads, exact(100.0), "all heads: 100% by definition"),
    ]


def _measured(grid: GridResult, prefix: str, label: str) -> list[_Point]:
    """The points of the grid's own conditions of one kind, smallest sets first."""
    named = [c for name, c in grid.conditions.items() if name.startswith(prefix)]
    conditions = sorted(named, key=lambda condition: len(condition.heads))
    return [
        _Point(
            len(each.heads),
            each.coverage_pct,
            f"{hover(each, label.format(k=len(each.heads)))}"
            f"<br>{_named(grid, each.heads)} ({each.cond})",
        )
        for each in (records(grid, conditions) if conditions else ())
    ]


def _curve_points(grid: GridResult, curve: CoverageCurve) -> list[_Point]:
    sets = curve.head_sets or ((),) * len(curve.coverage_pct)
    return [
        _Point(
            k,
            value,
            f"<b>{theme.plain(curve.ranking)}, k = {k}</b><br>coverage {shown(value, '%')}"
            + (f"<br>{_named(grid, heads)}" if heads else ""),
            added=_added(grid, sets[k - 1], heads) if k else None,
        )
        for k, (value, heads) in enumerate(zip(curve.coverage_pct, sets, strict=True))
    ]


def _added(grid: GridResult, before: Sequence[int], after: Sequence[int]) -> str | None:
    """The head by which one set exceeds another; None when that is not one head."""
    extra = set(after) - set(before)
    return grid.label(extra.pop()) if len(extra) == 1 and len(after) == len(before) + 1 else None


def _named(grid: GridResult, heads: Sequence[int], most: int = 6) -> str:
    names = ", ".join(grid.label(head) for head in heads[:most])
    return names if len(heads) <= most else f"{names} and {len(heads) - most} more"


def _line(
    name: str, points: Sequence[_Point], color: str, symbol: str, dash: str, *, bars: bool = True
) -> go.Scatter:
    coverage = [point.coverage for point in points]
    return go.Scatter(
        name=name,
        x=[point.k for point in points],
        y=[each.value for each in coverage],
        error_y=error_bars(coverage, color=theme.translucent(color, 0.7)) if bars else None,
        mode="lines+markers",
        line={"color": color, "dash": dash, "width": 2},
        marker={"symbol": symbol, "size": 6},
        customdata=[point.added for point in points],
        **theme.hover([point.hover for point in points]),
    )


def _scattered(name: str, points: Sequence[_Point]) -> go.Scatter:
    shifts = [
        sum(other.k == point.k for other in points[:i]) * _SEED_STEP
        for i, point in enumerate(points)
    ]
    return go.Scatter(
        name=name,
        x=[point.k + shift for point, shift in zip(points, shifts, strict=True)],
        y=[point.coverage.value for point in points],
        mode="markers",
        marker={"symbol": "x-thin", "size": 7, "line": {"width": 1.5, "color": theme.RANDOM}},
        **theme.hover([point.hover for point in points]),
    )


def _random_band(random: Sequence[RandomSets]) -> list[go.Scatter]:
    """Random head sets at every measured size: their mean, and where most of them lie.

    That is twice: where 95% of the sets of each size lie, and where 95% of random rankings lie at
    all sizes at once.
    """
    enough = [row for row in random if row.exhaustive or row.n_subsets >= _FEWEST_FOR_BAND]
    sets = [row for row in enough if row.mean_pct is not None]
    if not sets:
        return []
    k = [row.k for row in sets]
    low, high = ([row.quantiles_pct[q] for row in sets] for q in ("0.025", "0.975"))
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    fill = {"fill": "tonexty", "fillcolor": theme.translucent(theme.RANDOM, 0.25)}
    mean = go.Scatter(
        name="random sets, 95%",
        x=k,
        y=[row.mean_pct for row in sets],
        mode="lines",
        line={"color": theme.RANDOM, "width": 1.5, "dash": "dash"},
        **theme.hover([_random_hover(row) for row in sets]),
    )
    pointwise = [go.Scatter(x=k, y=low, **edge), go.Scatter(x=k, y=high, **edge, **fill), mean]
    return [*pointwise, *_simultaneous_band(sets)]


def _simultaneous_band(sets: Sequence[RandomSets]) -> list[go.Scatter]:
    banded = [row for row in sets if row.band_low_pct is not None]
    ends = ([row.band_low_pct for row in banded], [row.band_high_pct for row in banded])
    return [
        go.Scatter(
            name="random rankings, 95%",
            x=[row.k for row in banded],
            y=end,
            mode="lines",
            line={"color": theme.RANDOM, "width": 1, "dash": "dot"},
            legendgroup="random band",
            showlegend=end is ends[1],
            hoverinfo="skip",
        )
        for end in ends
        if banded
    ]


def _random_hover(row: RandomSets) -> str:
    low, high = (row.quantiles_pct[q] for q in ("0.025", "0.975"))
    lines = [
        f"<b>random sets of {row.k}</b>",
        f"mean coverage {row.mean_pct:.3g}%",
        f"95% of {row.n_subsets} sets in [{low:.3g}, {high:.3g}]%",
    ]
    if row.band_low_pct is not None:
        band = f"[{row.band_low_pct:.3g}, {row.band_high_pct:.3g}]%"
        lines.append(f"95% of rankings, at all k at once, in {band}")
    if row.p_value is not None:
        lines.append(f"ranked on other prompts: p = {row.p_value:.3g}")
    return "<br>".join(lines)


def _add_control(figure: go.Figure, grid: GridResult, condition: ConditionResult) -> str:
    """Draw a level line for the control layer; the note that explains it."""
    label = f"all heads of control layer {condition.layer}"
    (control,) = records(grid, [condition])
    figure.add_scatter(
        name=f"control, layer {condition.layer}",
        x=[0, grid.n_heads],
        y=[control.coverage_pct.value] * 2,
        mode="lines",
        line={"color": theme.CONTROL, "dash": "longdash", "width": 2},
        **theme.hover([hover(control, label)] * 2),
    )
    return f"control: {label}, {shown(control.coverage_pct, '%')}"


def curve_points(grid: GridResult) -> list[tuple[int, Estimate]]:
    """Coverage of the best k heads of a grid at each measured k; empty where it is undefined."""
    if grid_full_effect(grid, bootstrap_of(grid)).undefined_because is not None:
        return []
    points = _best_of_grid(grid)
    return [(p.k, p.coverage) for p in points if p.coverage.value is not None]


def method_curves(grid: GridResult, analysis: Analysis) -> go.Figure:
    """Coverage of the best k heads against k, for every ranking method that was tried.

    Args:
        grid: the measured grid.
        analysis: an analysis of it; its curves are drawn, without cross-fitting and envelope.

    Returns:
        The figure: a line per method.
    """
    figure = go.Figure()
    curves = [
        curve
        for curve in analysis.curves
        if not _is_best_subset(curve) and not _is_cross_fitted(curve)
        if any(point.value is not None for point in curve.coverage_pct)
    ]
    for place, curve in enumerate(curves):
        name, symbol = theme.plain(curve.ranking), theme.SYMBOLS[place % len(theme.SYMBOLS)]
        points, style = _curve_points(grid, curve), theme.line_style(place)
        figure.add_trace(_line(name, points, symbol=symbol, bars=False, **style))
    axes(figure, grid.n_heads)
    return theme.frame(
        figure,
        f"Coverage by ranking method, layer {grid.settings.layer}",
        grid_setting(grid, "ranked and scored on the same prompts"),
        theme.Layout(460 + 21 * theme.legend_rows(figure)),
    )
