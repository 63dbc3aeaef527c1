"""Several sweeps in one drawing: how much each layer's map repairs, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from rq4lens.figures import theme

Row = Mapping[str, Any]


def study_layers(rows: Sequence[Row], setting: Sequence[str], *, dark: bool = False) -> go.Figure:
    """``ΔKL`` of all heads against the layer, a line per cell of the study.

    Args:
        rows: a row per cell and layer, with ``cell, layer, n_layers, delta, delta_ci95, KL_raw,
            drop_pct``.
        setting: the parts of the setting line.
        dark: the dark template.

    Returns:
        The figure; layers of models of different depth are shown by relative depth.
    """
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    same_depth = len({row["n_layers"] for row in rows}) == 1
    figure = go.Figure()
    for place, cell in enumerate(cells):
        own = sorted((row for row in rows if row["cell"] == cell), key=lambda row: row["layer"])
        figure.add_trace(_line(own, theme.plain(cell), place, same_depth=same_depth))
    if same_depth:
        step = max(1, len({row["layer"] for row in rows}) // 12)
        figure.update_xaxes(title_text="layer", tick0=0, dtick=step)
    else:
        figure.update_xaxes(title_text="relative depth (0 first layer, 1 last)")
    figure.update_yaxes(title_text="ΔKL of all heads (nats)", rangemode="tozero")
    return theme.frame(
        figure,
        title="What each layer's map repairs",
        setting=[*setting, "bars: 95% bootstrap intervals over prompts"],
        height_px=480 + 21 * max(0, len(cells) - 4),
        dark=dark,
    )


def _line(rows: Sequence[Row], name: str, place: int, *, same_depth: bool) -> go.Scatter:
    depth = [row["layer"] if same_depth else _relative(row) for row in rows]
    return go.Scatter(
        x=depth,
        y=[row["delta"] for row in rows],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [_reach(row, 1) for row in rows],
            "arrayminus": [_reach(row, 0) for row in rows],
            "thickness": 1,
            "width": 2,
        },
        name=name,
        mode="lines+markers",
        line=theme.line_style(place),
        customdata=[[row["layer"], row["KL_raw"], _percent(row["drop_pct"])] for row in rows],
        hovertemplate=(
            f"{name}<br>layer %{{customdata[0]}}<br>ΔKL %{{y:.5f}} nats<br>"
            "KL_raw %{customdata[1]:.5f} nats<br>drop %{customdata[2]}<extra></extra>"
        ),
    )


def _relative(row: Row) -> float:
    return float(row["layer"] / max(1, row["n_layers"] - 1))


def _reach(row: Row, side: int) -> float:
    """Distance from the estimate to an end of its interval; 0 where there is none."""
    interval = row["delta_ci95"]
    return 0.0 if interval is None or row["delta"] is None else abs(interval[side] - row["delta"])


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.0f}%"
