"""How few heads carry the change: coverage of the best k heads against k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from rq4lens.analysis.metrics import bootstrap_of, grid_full_effect
from rq4lens.analysis.statistics import Bootstrap, Estimate, exact
from rq4lens.figures import theme
from rq4lens.figures.numbers import INTERVAL_NOTE, ConditionNumbers, error_bars, numbers_of, shown
from rq4lens.figures.setting import grid_setting
from rq4lens.results import ConditionResult, GridResult


class _Point(NamedTuple):
    k: int
    coverage: Estimate
    hover: str


def coverage_curve(
    grid: GridResult,
    analysis: Mapping[str, Any] | None = None,
    *,
    bootstrap: Bootstrap | None = None,
    dark: bool = False,
) -> go.Figure:
    """Coverage of the best ``k`` heads against ``k``, with random head sets and the control.

    Args:
        grid: the measured grid; its ``top{k}``, ``rand{k}_s{seed}``, ``full`` and ``ctrl_full``
            conditions are drawn.
        analysis: what the analysis adds (the content of ``analysis.json``): the cross-fitted
            curve, the band of random head sets and the best subsets, as far as present.
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
        figure.add_traces(_traces(grid, analysis or {}, bootstrap))
        notes += _control(figure, grid, bootstrap)
        _axes(figure, grid.n_heads)
    return theme.frame(
        figure,
        title=f"Coverage of the best k heads, layer {grid.settings.layer}",
        setting=grid_setting(grid, *notes),
        height_px=500,
        legend_rows=0 if undefined_because else 2,
        dark=dark,
    )


def _axes(figure: go.Figure, n_heads: int) -> None:
    for level in (0, 100):
        figure.add_hline(y=level, line={"color": theme.GREY, "width": 1, "dash": "dot"})
    figure.update_xaxes(
        title_text="k, number of patched heads",
        range=[-0.03 * n_heads, 1.03 * n_heads],
        nticks=9,
        zeroline=False,
    )
    figure.update_yaxes(title_text="coverage (% of ΔKL of all heads)", zeroline=False)


def _traces(
    grid: GridResult, analysis: Mapping[str, Any], bootstrap: Bootstrap
) -> list[go.Scatter]:
    del analysis
    top = _grid_points(grid, _ks(grid, "top"), "best {k}", bootstrap)
    best = [
        _Point(0, exact(0.0), "no head: 0% by definition"),
        *(point for point in top if 0 < point.k < grid.n_heads),
        _Point(grid.n_heads, exact(100.0), "all heads: 100% by definition"),
    ]
    drawn = _grid_points(grid, _ks(grid, "rand"), "random {k}", bootstrap)
    return [
        _line("best k", best, theme.BLUE, "circle", "solid"),
        *([_scattered("random k, by seed", drawn)] if drawn else []),
    ]


def _ks(grid: GridResult, prefix: str) -> list[ConditionResult]:
    conditions = [c for name, c in grid.conditions.items() if name.startswith(prefix)]
    return sorted(conditions, key=lambda condition: len(condition.heads))


def _grid_points(
    grid: GridResult, conditions: Sequence[ConditionResult], label: str, bootstrap: Bootstrap
) -> list[_Point]:
    if not conditions:
        return []
    labels = [label.format(k=len(condition.heads)) for condition in conditions]
    return [_point(grid, n) for n in numbers_of(grid, conditions, labels, bootstrap)]


def _point(grid: GridResult, numbers: ConditionNumbers) -> _Point:
    heads = numbers.condition.heads
    named = ", ".join(grid.label(head) for head in list(heads)[:8])
    more = f" and {len(heads) - 8} more" if len(heads) > 8 else ""
    hover = f"{numbers.hover}<br>{named}{more} ({numbers.condition.cond})"
    return _Point(len(heads), numbers.coverage_pct, hover)


def _line(name: str, points: Sequence[_Point], color: str, symbol: str, dash: str) -> go.Scatter:
    return go.Scatter(
        name=name,
        x=[point.k for point in points],
        y=[point.coverage.value for point in points],
        error_y=error_bars([point.coverage for point in points]),
        mode="lines+markers",
        line={"color": color, "dash": dash, "width": 2},
        marker={"symbol": symbol, "size": 8},
        hovertext=[point.hover for point in points],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _scattered(name: str, points: Sequence[_Point]) -> go.Scatter:
    return go.Scatter(
        name=name,
        x=[point.k for point in points],
        y=[point.coverage.value for point in points],
        mode="markers",
        marker={"symbol": "x-thin", "size": 8, "line": {"width": 1.6, "color": theme.RANDOM}},
        hovertext=[point.hover for point in points],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _control(figure: go.Figure, grid: GridResult, bootstrap: Bootstrap) -> list[str]:
    """A level line for the control layer, and the note that explains it."""
    if grid.control is None:
        return []
    label = f"all heads of control layer {grid.control.layer}"
    control = numbers_of(grid, [grid.control], [label], bootstrap)[0]
    figure.add_trace(
        go.Scatter(
            name=f"control, layer {grid.control.layer}",
            x=[0, grid.n_heads],
            y=[control.coverage_pct.value] * 2,
            mode="lines",
            line={"color": theme.CONTROL, "dash": "dash", "width": 2},
            hovertext=[control.hover] * 2,
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    return [f"control: {label}, {shown(control.coverage_pct, '%')}"]
