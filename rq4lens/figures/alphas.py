"""Does the blend strength matter: the full effect at every alpha."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from rq4lens.figures import theme
from rq4lens.figures.numbers import error_bars, grid_setting, is_wide, lows, shown
from rq4lens.figures.saved import Record, estimate
from rq4lens.results import GridResult

_LINES = (
    ("KL_raw", theme.RAW, "square", "dash"),
    ("KL_mapped", theme.MAPPED, "circle", "solid"),
    ("delta", theme.DELTA, "triangle-up", "dot"),
)
_NAMES = {"KL_raw": "KL_raw", "KL_mapped": "KL_mapped", "delta": "ΔKL"}


def alpha_sweep(grid: GridResult, points: Sequence[Record], *, dark: bool = False) -> go.Figure:
    """KL_raw, KL_mapped and ΔKL of all heads against the blend strength.

    Args:
        grid: the grid the sweep belongs to.
        points: the ``alphas`` records of an analysis.
        dark: the dark template.

    Returns:
        The figure: a line per quantity.
    """
    figure = go.Figure([_line(points, *style) for style in _LINES])
    figure.add_vline(
        x=grid.settings.patching.alpha, line={"color": theme.GREY, "dash": "dot", "width": 1}
    )
    figure.update_xaxes(title_text="blend strength α", nticks=8)
    if is_wide(lows(estimate(point, name) for point in points for name in _NAMES)):
        figure.update_yaxes(
            title_text="all heads (nats, logarithmic)", type="log", exponentformat="power", dtick=1
        )
    else:
        figure.update_yaxes(title_text="all heads (nats)", rangemode="tozero")
    span = f"{points[0]['alpha']:g} to {points[-1]['alpha']:g}"
    return theme.frame(
        figure,
        title=f"All heads of layer {grid.settings.layer} against α",
        setting=grid_setting(
            grid,
            f"dotted: the run's own α = {grid.settings.patching.alpha:g}",
            "bars: 95% bootstrap intervals over prompts",
            alpha=span,
        ),
        height_px=460,
        dark=dark,
    )


def _line(
    points: Sequence[Record], quantity: str, color: str, symbol: str, dash: str
) -> go.Scatter:
    values = [estimate(point, quantity) for point in points]
    return go.Scatter(
        name=_NAMES[quantity],
        x=[point["alpha"] for point in points],
        y=[value.value for value in values],
        error_y=error_bars(values, color),
        mode="lines+markers",
        line={"color": color, "dash": dash, "width": 2},
        marker={"symbol": symbol, "size": 7},
        hovertext=[_hover(point) for point in points],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _hover(point: Record) -> str:
    lines = [f"{_NAMES[name]} {shown(estimate(point, name), 'nats')}" for name in _NAMES]
    drop = f"drop {shown(estimate(point, 'drop_pct'), '%')}"
    best = "best heads " + ", ".join(f"H{head}" for head in list(point["heads"])[:5])
    return "<br>".join([f"<b>α = {point['alpha']:g}</b>", *lines, drop, best])
