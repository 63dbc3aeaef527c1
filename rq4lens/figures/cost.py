"""What the engines cost, and several sweeps in one drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from rq4lens.analysis.structure.layers import Metric
from rq4lens.errors import UserError
from rq4lens.figures import theme

_ROW_PX = 34


def engine_cost(
    seconds: Mapping[str, float],
    *,
    reference: str,
    setting: Sequence[str],
    dark: bool = False,
) -> go.Figure:
    """Times of several ways to do the same work, on a logarithmic axis.

    Args:
        seconds: time by name, in drawing order; above 0.
        reference: the entry that the others are compared with.
        setting: the parts of the setting line: the work, the hardware, the versions, the date.
        dark: the dark template.

    Returns:
        The figure: a bar per entry, each with its ratio to the reference.

    Raises:
        UserError: if the reference is not among the times.
    """
    if reference not in seconds:
        raise UserError(
            f"the reference {reference!r} is not among the times: name one of {', '.join(seconds)}."
        )
    ratios = {name: value / seconds[reference] for name, value in seconds.items()}
    longest = max(len(name) for name in seconds)
    figure = go.Figure(
        go.Bar(
            orientation="h",
            y=[theme.plain(name) for name in seconds],
            x=list(seconds.values()),
            text=[_times(ratio) for ratio in ratios.values()],
            textposition="outside",
            cliponaxis=False,
            marker_color=[theme.GREY if name == reference else theme.BLUE for name in seconds],
            hovertext=[
                f"<b>{theme.plain(name)}</b><br>{value:.3g} s"
                f"<br>{_times(ratios[name])} {theme.plain(reference)}"
                for name, value in seconds.items()
            ],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    figure.update_xaxes(type="log", title_text="seconds, logarithmic", dtick=1)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, dtick=1)
    return theme.frame(
        figure,
        title="Time of the same work",
        setting=(*setting, f"×: times {reference}"),
        height_px=170 + _ROW_PX * max(3, len(seconds)),
        rows=0,
        left_px=24 + 6 * longest,
        right_px=54,
        dark=dark,
    )


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 1000 else f"{ratio:.3g}×"


Row = Mapping[str, Any]


def study_layers(
    rows: Sequence[Row], setting: Sequence[str], metrics: Sequence[Metric], *, dark: bool = False
) -> go.Figure:
    """A metric of all heads against the layer, a line per cell of the study."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    same_depth = len({row["n_layers"] for row in rows}) == 1
    figure = go.Figure()
    for place, cell in enumerate(cells):
        own = sorted((row for row in rows if row["cell"] == cell), key=lambda row: row["layer"])
        figure.add_trace(_line(own, theme.plain(cell), place, metrics, same_depth=same_depth))
    if same_depth:
        step = max(1, len({row["layer"] for row in rows}) // 12)
        figure.update_xaxes(title_text="layer", tick0=0, dtick=step)
    else:
        figure.update_xaxes(title_text="relative depth (0 first layer, 1 last)")
    figure.update_yaxes(title_text=metrics[0].title, rangemode="tozero")
    return theme.frame(
        figure,
        title=f"{metrics[0].label} of each layer",
        setting=[*setting, "bars: 95% bootstrap intervals over prompts"],
        height_px=480 + 21 * max(0, len(cells) - 4),
        dark=dark,
    )


def _line(
    rows: Sequence[Row], name: str, place: int, metrics: Sequence[Metric], *, same_depth: bool
) -> go.Scatter:
    lead = metrics[0].name
    told = [
        "<br>".join([f"layer {row['layer']}", *(_told(row, metric) for metric in metrics)])
        for row in rows
    ]
    return go.Scatter(
        x=[row["layer"] if same_depth else _relative(row) for row in rows],
        y=[row[lead] for row in rows],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [_reach(row, lead, 1) for row in rows],
            "arrayminus": [_reach(row, lead, 0) for row in rows],
            "thickness": 1,
            "width": 2,
        },
        name=name,
        mode="lines+markers",
        line=theme.line_style(place),
        customdata=told,
        hovertemplate=f"{name}<br>%{{customdata}}<extra></extra>",
    )


def _told(row: Row, metric: Metric) -> str:
    value = row[metric.name]
    unit = "" if metric.unit == "%" or value is None else f" {metric.unit}"
    return f"{metric.label} {'undefined' if value is None else metric.text(value)}{unit}"


def _relative(row: Row) -> float:
    return float(row["layer"] / max(1, row["n_layers"] - 1))


def _reach(row: Row, name: str, side: int) -> float:
    """Distance from the estimate to an end of its interval; 0 where there is none."""
    value, interval = row[name], row[f"{name}_ci95"]
    return 0.0 if interval is None or value is None else abs(interval[side] - value)
