"""Does the blend strength matter: the full effect at every alpha."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from rq4lens.analysis.records import AlphaPoint
from rq4lens.analysis.statistics.bootstrap import Estimate
from rq4lens.figures import theme
from rq4lens.figures.numbers import effect_axis, error_bars, grid_setting, shown
from rq4lens.results import GridResult

_LINES = (
    ("KL_raw", theme.RAW, "square", "dash"),
    ("KL_mapped", theme.MAPPED, "circle", "solid"),
    ("ΔKL", theme.DELTA, "triangle-up", "dot"),
)


def alpha_sweep(grid: GridResult, points: Sequence[AlphaPoint]) -> go.Figure:
    """KL_raw, KL_mapped and ΔKL of all heads against the blend strength.

    Args:
        grid: the grid the sweep belongs to.
        points: the ``alphas`` of an analysis.

    Returns:
        The figure: a line per quantity.
    """
    figure = go.Figure()
    for name, color, symbol, dash in _LINES:
        values = [_quantities(point)[name] for point in points]
        figure.add_scatter(
            name=name,
            x=[point.alpha for point in points],
            y=[value.value for value in values],
            error_y=error_bars(values, color=color),
            mode="lines+markers",
            line={"color": color, "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 7},
            **theme.hover([_hover(point) for point in points]),
        )
    figure.add_vline(
        x=grid.settings.patching.alpha, line={"color": theme.GREY, "dash": "dot", "width": 1}
    )
    figure.update_xaxes(title_text="blend strength α", nticks=8)
    estimates = (value for point in points for value in _quantities(point).values())
    figure.update_yaxes(**effect_axis("all heads", estimates))
    return theme.frame(
        figure,
        f"All heads of layer {grid.settings.layer} against α",
        grid_setting(
            grid,
            f"dotted: the run's own α = {grid.settings.patching.alpha:g}",
            "bars: 95% bootstrap intervals over prompts",
            alpha=f"{points[0].alpha:g} to {points[-1].alpha:g}",
        ),
    )


def _quantities(point: AlphaPoint) -> dict[str, Estimate]:
    return {"KL_raw": point.KL_raw, "KL_mapped": point.KL_mapped, "ΔKL": point.delta}


def _hover(point: AlphaPoint) -> str:
    lines = [f"{name} {shown(value, 'nats')}" for name, value in _quantities(point).items()]
    drop = f"drop {shown(point.drop_pct, '%')}"
    best = "best heads " + ", ".join(f"H{head}" for head in point.heads[:5])
    return "<br>".join([f"<b>α = {point.alpha:g}</b>", *lines, drop, best])
