"""How few heads carry the change: coverage of the best k heads against k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from rq4lens.analysis.effects.table import bootstrap_of, grid_full_effect
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, exact
from rq4lens.figures import theme
from rq4lens.figures.numbers import (
    INTERVAL_NOTE,
    ConditionNumbers,
    error_bars,
    grid_setting,
    numbers_of,
    shown,
)
from rq4lens.figures.saved import HasRecord, Record, as_record, estimate, estimates
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


def coverage_curve(
    grid: GridResult,
    analysis: HasRecord | Record | None = None,
    *,
    bootstrap: Bootstrap | None = None,
    dark: bool = False,
) -> go.Figure:
    """Coverage of the best ``k`` heads against ``k``, with random head sets and the control.

    Args:
        grid: the measured grid; its ``top{k}``, ``rand{k}_s{seed}``, ``full`` and ``ctrl_full``
            conditions are drawn.
        analysis: an analysis of the grid, live or saved. It fills the curve in at every k and adds
            the cross-fitted curve, the band of random head sets and the best subsets.
        bootstrap: the resamples; made from the grid's prompts when left out.
        dark: the dark template.

    Returns:
        The figure; where coverage is undefined, an empty one that says why.
    """
    bootstrap = bootstrap or bootstrap_of(grid)
    undefined_because = grid_full_effect(grid, bootstrap).undefined_because
    figure = go.Figure()
    notes = [INTERVAL_NOTE]
    if undefined_because is not None:
        theme.message(figure, f"Coverage is undefined: {undefined_because}.")
    else:
        traces = _traces(grid, as_record(analysis), bootstrap)
        control, control_note = _control(grid, bootstrap)
        figure.add_traces([*traces, *control])
        notes += [*_random_note(as_record(analysis).get("random", ())), *control_note]
        axes(figure, grid.n_heads)
    return theme.frame(
        figure,
        title=f"Coverage of the best k heads, layer {grid.settings.layer}",
        setting=grid_setting(grid, *notes),
        height_px=460 + 21 * theme.legend_rows(figure),
        dark=dark,
    )


def _random_note(random: Sequence[Record]) -> list[str]:
    """Where random sets were measured: between these sizes their band is drawn straight."""
    sizes = ", ".join(str(row["k"]) for row in random)
    return [f"random sets of {sizes} heads"] if sizes else []


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


def _traces(grid: GridResult, analysis: Record, bootstrap: Bootstrap) -> list[go.Scatter]:
    curves = {curve["ranking"]: curve for curve in analysis.get("curves", ())}
    own = next(iter(curves.values()), None)
    seeds = _grid_points(grid, _conditions(grid, "rand"), "random {k}", bootstrap)
    best = _saved_points(grid, own) if own else _best_of_grid(grid, bootstrap)
    traces = _random_band(analysis.get("random", ()))
    for name, curve in curves.items():
        if name.endswith(f"({CROSS_FITTED})"):
            traces.append(
                _line(CROSS_FITTED, _saved_points(grid, curve), theme.CROSS_FITTED, "square", "dot")
            )
    if BEST_SUBSET in curves:
        points = _saved_points(grid, curves[BEST_SUBSET])
        traces.append(_line(BEST_SUBSET, points, theme.BEST, "triangle-up", "dashdot", bars=False))
    traces.append(_line("best k", best, theme.BLUE, "circle", "solid"))
    return traces + ([_scattered("random, seeds", seeds)] if seeds else [])


def _conditions(grid: GridResult, prefix: str) -> list[ConditionResult]:
    named = [c for name, c in grid.conditions.items() if name.startswith(prefix)]
    return sorted(named, key=lambda condition: len(condition.heads))


def _best_of_grid(grid: GridResult, bootstrap: Bootstrap) -> list[_Point]:
    top = _grid_points(grid, _conditions(grid, "top"), "best {k}", bootstrap)
    return [
        _Point(0, exact(0.0), "no head: 0% by definition"),
        *(point for point in top if 0 < point.k < grid.n_heads),
        _Point(grid.n_heads, exact(100.0), "all heads: 100% by definition"),
    ]


def _grid_points(
    grid: GridResult, conditions: Sequence[ConditionResult], label: str, bootstrap: Bootstrap
) -> list[_Point]:
    if not conditions:
        return []
    labels = [label.format(k=len(condition.heads)) for condition in conditions]
    return [_measured(grid, n) for n in numbers_of(grid, conditions, labels, bootstrap)]


def _measured(grid: GridResult, numbers: ConditionNumbers) -> _Point:
    heads = numbers.condition.heads
    hover = f"{numbers.hover}<br>{_named(grid, tuple(heads))} ({numbers.condition.cond})"
    return _Point(len(heads), numbers.coverage_pct, hover)


def _saved_points(grid: GridResult, curve: Record) -> list[_Point]:
    values = estimates(curve["coverage_pct"])
    sets = curve.get("head_sets") or [()] * len(values)
    return [
        _Point(
            k,
            value,
            f"<b>{theme.plain(curve['ranking'])}, k = {k}</b><br>coverage {shown(value, '%')}"
            + (f"<br>{_named(grid, heads)}" if heads else ""),
            added=_added(grid, sets[k - 1], heads) if k else None,
        )
        for k, (value, heads) in enumerate(zip(values, sets, strict=False))
    ]


def _added(grid: GridResult, before: Sequence[int], after: Sequence[int]) -> str | None:
    """The head by which one set exceeds another; None when that is not one head."""
    extra = set(after) - set(before)
    return grid.label(extra.pop()) if len(extra) == 1 and len(after) == len(before) + 1 else None


def _named(grid: GridResult, heads: Sequence[int], most: int = 6) -> str:
    names = ", ".join(grid.label(head) for head in heads[:most])
    return names if len(heads) <= most else f"{names} and {len(heads) - most} more"


def _line(
    name: str,
    points: Sequence[_Point],
    color: str,
    symbol: str,
    dash: str,
    *,
    bars: bool = True,
) -> go.Scatter:
    bar_color = theme.translucent(color, 0.7)
    return go.Scatter(
        name=name,
        x=[point.k for point in points],
        y=[point.coverage.value for point in points],
        error_y=error_bars([point.coverage for point in points], bar_color) if bars else None,
        mode="lines+markers",
        line={"color": color, "dash": dash, "width": 2},
        marker={"symbol": symbol, "size": 6},
        customdata=[point.added for point in points],
        hovertext=[point.hover for point in points],
        hovertemplate="%{hovertext}<extra></extra>",
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
        hovertext=[point.hover for point in points],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _many(row: Record) -> bool:
    """Whether a record of random sets holds enough of them to show where 95% lie."""
    return bool(row["exhaustive"]) or row["n_subsets"] >= _FEWEST_FOR_BAND


def _random_band(random: Sequence[Record]) -> list[go.Scatter]:
    """Random head sets at every measured size: their mean, and where most of them lie.

    That is twice: where 95% of the sets of each size lie, and where 95% of random rankings lie at
    all sizes at once.
    """
    sets = [row for row in random if row.get("mean_pct") is not None and _many(row)]
    if not sets:
        return []
    k = [row["k"] for row in sets]
    low, high = ([row["quantiles_pct"][q] for row in sets] for q in ("0.025", "0.975"))
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    fill = {"fill": "tonexty", "fillcolor": theme.translucent(theme.RANDOM, 0.25)}
    mean = go.Scatter(
        name="random sets, 95%",
        x=k,
        y=[row["mean_pct"] for row in sets],
        mode="lines",
        line={"color": theme.RANDOM, "width": 1.5, "dash": "dash"},
        hovertext=[_random_hover(row) for row in sets],
        hovertemplate="%{hovertext}<extra></extra>",
    )
    pointwise = [go.Scatter(x=k, y=low, **edge), go.Scatter(x=k, y=high, **edge, **fill), mean]
    return [*pointwise, *_simultaneous_band(sets)]


def _simultaneous_band(sets: Sequence[Record]) -> list[go.Scatter]:
    banded = [row for row in sets if row.get("band_low_pct") is not None]
    style = {"mode": "lines", "line": {"color": theme.RANDOM, "width": 1, "dash": "dot"}}
    group = {"legendgroup": "random band", "hoverinfo": "skip"}
    return [
        go.Scatter(
            name="random rankings, 95%",
            x=[row["k"] for row in banded],
            y=[row[end] for row in banded],
            showlegend=end == "band_high_pct",
            **style,
            **group,
        )
        for end in ("band_low_pct", "band_high_pct")
        if banded
    ]


def _random_hover(row: Record) -> str:
    low, high = (row["quantiles_pct"][q] for q in ("0.025", "0.975"))
    lines = [
        f"<b>random sets of {row['k']}</b>",
        f"mean coverage {row['mean_pct']:.3g}%",
        f"95% of {row['n_subsets']} sets in [{low:.3g}, {high:.3g}]%",
    ]
    if row.get("band_low_pct") is not None:
        band = f"[{row['band_low_pct']:.3g}, {row['band_high_pct']:.3g}]%"
        lines.append(f"95% of rankings, at all k at once, in {band}")
    if row.get("p_value") is not None:
        lines.append(f"ranked on other prompts: p = {row['p_value']:.3g}")
    return "<br>".join(lines)


def _control(grid: GridResult, bootstrap: Bootstrap) -> tuple[list[go.Scatter], list[str]]:
    """A level line for the control layer, and the note that explains it."""
    if grid.control is None:
        return [], []
    label = f"all heads of control layer {grid.control.layer}"
    control = numbers_of(grid, [grid.control], [label], bootstrap)[0]
    line = go.Scatter(
        name=f"control, layer {grid.control.layer}",
        x=[0, grid.n_heads],
        y=[control.coverage_pct.value] * 2,
        mode="lines",
        line={"color": theme.CONTROL, "dash": "longdash", "width": 2},
        hovertext=[control.hover] * 2,
        hovertemplate="%{hovertext}<extra></extra>",
    )
    return [line], [f"control: {label}, {shown(control.coverage_pct, '%')}"]


def curve_points(grid: GridResult, bootstrap: Bootstrap) -> list[tuple[int, Estimate]]:
    """Coverage of the best k heads of a grid at each measured k; empty where it is undefined."""
    if grid_full_effect(grid, bootstrap).undefined_because is not None:
        return []
    points = _best_of_grid(grid, bootstrap)
    return [(p.k, p.coverage) for p in points if p.coverage.value is not None]


def method_curves(
    grid: GridResult, analysis: HasRecord | Record, *, dark: bool = False
) -> go.Figure:
    """Coverage of the best k heads against k, for every ranking method that was tried.

    Args:
        grid: the measured grid.
        analysis: an analysis of it; its curves are drawn, without cross-fitting and envelope.
        dark: the dark template.

    Returns:
        The figure: a line per method.
    """
    figure = go.Figure()
    for place, (name, points) in enumerate(_method_points(grid, as_record(analysis))):
        style = theme.line_style(place)
        symbol = theme.SYMBOLS[place % len(theme.SYMBOLS)]
        figure.add_trace(
            _line(theme.plain(name), points, style["color"], symbol, style["dash"], bars=False)
        )
    axes(figure, grid.n_heads)
    return theme.frame(
        figure,
        title=f"Coverage by ranking method, layer {grid.settings.layer}",
        setting=grid_setting(grid, "ranked and scored on the same prompts"),
        height_px=460 + 21 * theme.legend_rows(figure),
        dark=dark,
    )


def _method_points(grid: GridResult, analysis: Record) -> list[tuple[str, list[_Point]]]:
    return [
        (curve["ranking"], _saved_points(grid, curve))
        for curve in analysis.get("curves", ())
        if curve["ranking"] != BEST_SUBSET and not curve["ranking"].endswith(f"({CROSS_FITTED})")
        if any(estimate(point).value is not None for point in curve["coverage_pct"])
    ]
