"""How few heads carry the change: coverage of the best k heads against k."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from rq4lens.analysis.effects.table import bootstrap_of, grid_full_effect, records
from rq4lens.analysis.effects.transfer import gap_of
from rq4lens.analysis.records import CoverageCurve, DirectionCoverage, RandomSets
from rq4lens.analysis.result import Analysis
from rq4lens.analysis.statistics.bootstrap import Estimate, exact
from rq4lens.figures import theme
from rq4lens.figures.numbers import INTERVAL_NOTE, error_bars, grid_setting, hover, shown
from rq4lens.heads import HeadSet
from rq4lens.results import GridResult

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


AXIS = "coverage (% of ΔKL of all heads)"
VIEWS = {
    "to_base": ("undoes", "undoes of the gap, at strength 1 (%)"),
    "to_tuned": ("gives base", "gives base, at strength 1 (%)"),
    "metric": ("metric", "undoes of the metric's difference, at strength 1 (%)"),
    "metric_to_tuned": ("metric, to tuned", "gives base of the metric's difference (%)"),
    "delta": ("ΔKL", AXIS),
}
CAPTION = (
    "A curve that is high at small k and leaves the grey band: few heads carry the change, more "
    "than random heads do."
)


def coverage_curve(grid: GridResult, analysis: Analysis | None = None) -> go.Figure:
    """What the best ``k`` heads carry against ``k``, with random head sets and the control layer.

    A switch shows the share of the gap between the models (``to_base``, ``to_tuned``), of their
    difference in a metric, or coverage of ``ΔKL``.

    Args:
        grid: the measured grid; its ``top{k}``, ``rand{k}_s{seed}``, ``full`` and ``ctrl_full``
            conditions are drawn.
        analysis: an analysis of the grid. It fills the curves in at every k and adds the
            cross-fitted ones, the bands of random head sets and the best subsets.

    Returns:
        The figure; what is undefined has no view, and where nothing is defined it says why.
    """
    figure = go.Figure()
    views: dict[str, Iterable[int]] = {}
    for name, traces in _views(grid, analysis).items():
        start = len(figure.data)
        figure.add_traces([trace.update(visible=not views) for trace in traces])
        views[name] = range(start, len(figure.data))
    notes = _notes(grid, analysis)
    if views:
        axes(figure, grid.n_heads, VIEWS[next(iter(views))][1])
        theme.switch(figure, [_button(figure, name, shown) for name, shown in views.items()])
    else:
        why = grid_full_effect(grid, bootstrap_of(grid)).undefined_because
        theme.message(figure, f"Coverage is undefined: {why}.")
    return theme.frame(
        figure,
        f"What the best k heads carry, layer {grid.settings.layer}",
        grid_setting(grid, *notes),
        theme.Layout(460 + 21 * theme.legend_rows(figure)),
        caption=CAPTION,
    )


def _button(figure: go.Figure, name: str, shown: Iterable[int]) -> dict[str, Any]:
    label, title = VIEWS[name]
    return theme.view_button(figure, label, shown, {"yaxis.title.text": title})


def _views(grid: GridResult, analysis: Analysis | None) -> dict[str, list[go.Scatter]]:
    """The traces of each view that is defined."""
    views: dict[str, list[go.Scatter]] = {}
    for direction in analysis.directions if analysis else ():
        if direction.full.undefined_because is None:
            views[direction.direction] = _transfer_traces(grid, direction)
    if not views and gap_of(grid, bootstrap_of(grid)).undefined_because is None:
        views["to_base"] = _grid_traces(grid, "to_base_pct")
    if grid_full_effect(grid, bootstrap_of(grid)).undefined_because is None:
        views["delta"] = _traces(grid, analysis)
    return views


def _notes(grid: GridResult, analysis: Analysis | None) -> list[str]:
    notes = [INTERVAL_NOTE]
    # Between the sizes that were measured the band of random sets is drawn straight.
    sizes = sorted({row.k for row in analysis.random}) if analysis is not None else ()
    if sizes:
        notes.append(f"random sets of {HeadSet.of(sizes, sizes[-1] + 1)} heads for ΔKL")
    if grid.control is not None:
        notes.append(f"control: all heads of control layer {grid.control.layer}")
    return notes


def _transfer_traces(grid: GridResult, found: DirectionCoverage) -> list[go.Scatter]:
    """The share of the gap: random sets, the cross-fitted curve and the plain one, the control."""
    word = VIEWS[found.direction][0]
    plain, *others = found.curves
    traces = _random_band(found.random, word)[:3]
    for curve in filter(_is_cross_fitted, others):
        points = _curve_points(grid, curve, word)
        traces.append(_line(CROSS_FITTED, points, theme.CROSS_FITTED, "square", "dot"))
    best = _curve_points(grid, plain, word)
    traces.append(_line("best k", best, theme.BLUE, "circle", "solid"))
    return traces + _control(grid, f"{found.direction}_pct")


def _grid_traces(grid: GridResult, field: str) -> list[go.Scatter]:
    """What the grid alone says: its best k, its random sets, the control layer."""
    best = _best_of_grid(grid, field)
    traces = [_line("best k", best, theme.BLUE, "circle", "solid")]
    seeds = _measured(grid, "rand", "random {k}", field)
    return [
        *traces,
        *([_scattered("random, seeds", seeds)] if seeds else []),
        *_control(grid, field),
    ]


def axes(figure: go.Figure, n_heads: int, title: str = AXIS) -> None:
    """The axes of every coverage curve, with lines at 0 and 100%."""
    for level in (0, 100):
        figure.add_hline(y=level, line={"color": theme.GREY, "width": 1, "dash": "dot"})
    figure.update_xaxes(
        title_text="k, number of patched heads",
        range=[-0.03 * n_heads, 1.03 * n_heads],
        nticks=9,
        zeroline=False,
    )
    figure.update_yaxes(title_text=title, zeroline=False)


def _traces(grid: GridResult, analysis: Analysis | None) -> list[go.Scatter]:
    """Coverage of ``ΔKL``."""
    if analysis is None or not analysis.curves:
        return _grid_traces(grid, "coverage_pct")
    traces = _random_band(analysis.random)
    for curve in filter(_is_cross_fitted, analysis.curves):
        points = _curve_points(grid, curve)
        traces.append(_line(CROSS_FITTED, points, theme.CROSS_FITTED, "square", "dot"))
    for curve in filter(_is_best_subset, analysis.curves):
        points = _curve_points(grid, curve)
        line = _line(BEST_SUBSET, points, theme.BEST, "triangle-up", "dashdot", bars=False)
        traces.append(line)
    best = _curve_points(grid, analysis.curves[0])
    traces.append(_line("best k", best, theme.BLUE, "circle", "solid"))
    return traces + _control(grid, "coverage_pct")


def _is_cross_fitted(curve: CoverageCurve) -> bool:
    return curve.ranking.endswith(f"({CROSS_FITTED})")


def _is_best_subset(curve: CoverageCurve) -> bool:
    return curve.ranking == BEST_SUBSET


def _best_of_grid(grid: GridResult, field: str = "coverage_pct") -> list[_Point]:
    whole = (
        exact(100.0) if field == "coverage_pct" else getattr(records(grid, [grid.full])[0], field)
    )
    return [
        _Point(0, exact(0.0), "no head: 0% by definition"),
        *(p for p in _measured(grid, "top", "best {k}", field) if 0 < p.k < grid.n_heads),
        _Point(grid.n_heads, whole, f"all heads: {shown(whole, '%')}"),
    ]


def _measured(grid: GridResult, prefix: str, label: str, field: str) -> list[_Point]:
    """The points of the grid's own conditions of one kind, smallest sets first."""
    named = [c for name, c in grid.conditions.items() if name.startswith(prefix)]
    conditions = sorted(named, key=lambda condition: len(condition.heads))
    return [
        _Point(
            len(each.heads),
            getattr(each, field),
            f"{hover(each, label.format(k=len(each.heads)))}"
            f"<br>{_named(grid, each.heads)} ({each.cond})",
        )
        for each in (records(grid, conditions) if conditions else ())
    ]


def _curve_points(grid: GridResult, curve: CoverageCurve, word: str = "coverage") -> list[_Point]:
    sets = curve.head_sets or ((),) * len(curve.coverage_pct)
    return [
        _Point(
            k,
            value,
            f"<b>{theme.plain(curve.ranking)}, k = {k}</b><br>{word} {shown(value, '%')}"
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


def _random_band(random: Sequence[RandomSets], word: str = "coverage") -> list[go.Scatter]:
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
        **theme.hover([_random_hover(row, word) for row in sets]),
    )
    pointwise = [go.Scatter(x=k, y=low, **edge), go.Scatter(x=k, y=high, **edge, **fill), mean]
    return [*pointwise, *_simultaneous_band(sets)]


def _simultaneous_band(sets: Sequence[RandomSets]) -> list[go.Scatter]:
    banded = [row for row in sets if row.band_low_pct is not None]
    if not banded:
        return []
    ends = ([row.band_low_pct for row in banded], [row.band_high_pct for row in banded])
    k = [row.k for row in banded]
    return [
        go.Scatter(
            name="random rankings, 95%",
            x=[*k, None, *k],
            y=[*ends[0], None, *ends[1]],
            mode="lines",
            line={"color": theme.RANDOM, "width": 1, "dash": "dot"},
            hoverinfo="skip",
        )
    ]


def _random_hover(row: RandomSets, word: str) -> str:
    low, high = (row.quantiles_pct[q] for q in ("0.025", "0.975"))
    lines = [
        f"<b>random sets of {row.k}</b>",
        f"mean {word} {row.mean_pct:.3g}%",
        f"95% of {row.n_subsets} sets in [{low:.3g}, {high:.3g}]%",
    ]
    if row.band_low_pct is not None:
        band = f"[{row.band_low_pct:.3g}, {row.band_high_pct:.3g}]%"
        lines.append(f"95% of rankings, at all k at once, in {band}")
    if row.p_value is not None:
        small = "p < 0.001" if row.p_value < 0.001 else f"p = {row.p_value:.2g}"
        lines.append(f"ranked on other prompts: {small}")
    return "<br>".join(lines)


def _control(grid: GridResult, field: str) -> list[go.Scatter]:
    """A level line for the control layer, if there is one."""
    if grid.control is None:
        return []
    (control,) = records(grid, [grid.control])
    text = hover(control, f"all heads of control layer {grid.control.layer}")
    return [
        go.Scatter(
            name=f"control, layer {grid.control.layer}",
            x=[0, grid.n_heads],
            y=[getattr(control, field).value] * 2,
            mode="lines",
            line={"color": theme.CONTROL, "dash": "longdash", "width": 2},
            **theme.hover([text] * 2),
        )
    ]


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
        caption="The higher a curve at small k, the better its method finds the heads that matter.",
    )
