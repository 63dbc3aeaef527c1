"""How every figure looks: one palette, two templates, one frame.

Colours come from the palette of Okabe and Ito, which stays apart under the common forms of colour
blindness; where colour carries a meaning, the marker's shape or the line's dash repeats it.
Nothing here touches plotly's global templates: a template is an object that a figure carries.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import compress
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import get_colorscale

BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREY = "#8A8A8A"

RAW = VERMILLION
MAPPED = BLUE
DELTA = GREEN
RANDOM = GREY
CONTROL = PURPLE
INK = "#7A7A7A"
CROSS_FITTED = ORANGE
BEST = SKY

SEQUENCE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "cross", "star")

# The kinds of heads in drawing order, with colour and shape.
KINDS = {
    "replaced": (VERMILLION, "diamond"),
    "reassigned": (ORANGE, "triangle-up"),
    "recoded": (BLUE, "circle"),
    "shifted": (PURPLE, "cross"),
    "unchanged": (GREEN, "square"),
    "undecided": (SKY, "x"),
    "idle": (GREY, "circle-open"),
}

# Cividis is made for colour-blind readers; the diverging scale runs orange - paper - blue.
SEQUENTIAL = tuple(tuple(step) for step in get_colorscale("Cividis"))
# Colours of depth lie on white and on dark grounds alike, so neither end may be pale or dark.
DEPTH = [[0.0, BLUE], [0.5, GREY], [1.0, "#C97700"]]
DIVERGING = (
    (0.0, "#8C3C00"),
    (0.25, "#E58A3C"),
    (0.5, "#F5F5F5"),
    (0.75, "#5AA5D6"),
    (1.0, "#004F7C"),
)
# On dark paper what is near 0 is dark, or a heatmap would be a white rectangle.
DIVERGING_DARK = (
    (0.0, "#F0A35E"),
    (0.25, "#9C521C"),
    (0.5, "#23262C"),
    (0.75, "#2B769F"),
    (1.0, "#8CCBF0"),
)

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

# A window of 400 px holds about this many letters of the setting line.
_SETTING_CHARACTERS = 66
_SETTING_LINE_PX, _TITLE_PX = 14, 42
_LEGEND_MARK_PX, _LEGEND_LETTER_PX = 46, 5.6


class Look(NamedTuple):
    """How a line looks; its dash and the shape of its marks repeat what its colour says."""

    color: str
    symbol: str = "circle"
    dash: str = "solid"
    width: float = 2
    size: float = 6
    opacity: float = 1

    @property
    def trace(self) -> dict[str, Any]:
        """The look as the parts of a trace."""
        return {
            "mode": "lines+markers",
            "line": {"color": self.color, "dash": self.dash, "width": self.width},
            "marker": {"symbol": self.symbol, "size": self.size},
            "opacity": self.opacity,
        }


def look(place: int | None) -> Look:
    """The line at a place of a family, thin and grey without one; 42 places look different."""
    if place is None:
        return Look(GREY, width=1, size=4, opacity=0.35)
    symbol = SYMBOLS[place % len(SYMBOLS)]
    dash = DASHES[place // len(SEQUENCE) % len(DASHES)]
    return Look(SEQUENCE[place % len(SEQUENCE)], symbol, dash, width=2.5, size=7)


@dataclass(frozen=True)
class Layout:
    """The sizes of a figure; ``axis_px`` is the room below the plot for its axis.

    ``rows`` are rows of room above it, for a colour bar or nothing; without them it has a legend.
    """

    height_px: int = 460
    rows: int | None = None
    left_px: int = 66
    right_px: int = 18
    axis_px: int = 46


_LEGEND_PX = 400 - Layout.left_px - Layout.right_px + 2


def template(*, dark: bool = False) -> go.layout.Template:
    """The look of a figure, as an object that the figure carries."""
    ink, paper, grid = (
        ("#E8E8E8", "#15171B", "#34383F") if dark else ("#222222", "#FFFFFF", "#E4E4E4")
    )
    axis = {
        "gridcolor": grid,
        "zerolinecolor": "#7A7A7A",
        "linecolor": "#7A7A7A",
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "#7A7A7A",
        "automargin": False,
        "title": {"font": {"size": 12}, "standoff": 8},
        "tickfont": {"size": 11},
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 12, "color": ink},
            "paper_bgcolor": paper,
            "plot_bgcolor": paper,
            "colorway": SEQUENCE,
            "colorscale": {
                "diverging": DIVERGING_DARK if dark else DIVERGING,
                "sequential": SEQUENTIAL,
            },
            "xaxis": axis,
            "yaxis": axis,
            "title": {
                "font": {"size": 15},
                "x": 0,
                "xref": "container",
                "xanchor": "left",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"l": 12, "t": 12},
            },
            "legend": {
                "orientation": "h",
                "traceorder": "normal",
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yanchor": "bottom",
                "font": {"size": 11},
                "bgcolor": "rgba(0,0,0,0)",
            },
            "hoverlabel": {"font": {"size": 12}, "align": "left"},
            "hovermode": "closest",
        }
    )


def plain(text: object) -> str:
    """Text that plotly draws letter by letter: its own small markup is escaped."""
    return escape(str(text), quote=False)


def wrap(parts: Sequence[str]) -> list[str]:
    """Lines that fit into a narrow window, broken between parts where possible."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= _SETTING_CHARACTERS:
            lines[-1] += f" · {part}"
        else:
            lines.extend(textwrap.wrap(part, _SETTING_CHARACTERS, break_on_hyphens=False) or [""])
    return lines


def frame(
    figure: go.Figure,
    title: str,
    setting: Sequence[str],
    layout: Layout | None = None,
    *,
    caption: str,
) -> go.Figure:
    """Give a figure its title, its margins, its template, a caption and its setting line.

    The caption says what to see; below a figure that stands alone it comes before the setting.
    """
    layout = layout or Layout()
    lines = [plain(line) for line in (*wrap([caption]), *wrap(setting))]
    above = legend_rows(figure) if layout.rows is None else layout.rows
    for menu in figure.layout.updatemenus:
        menu.pad = {"b": 6 + 21 * above, "l": 0}
        above += 2
    # The plot itself keeps its height, however long the text below it and the rows above it are.
    extra_px = _SETTING_LINE_PX * max(0, len(lines) - 4) + (42 if figure.layout.updatemenus else 0)
    figure.update_layout(
        template=template(),
        title={"text": title},
        meta={"setting": list(setting), "caption": caption},
        height=layout.height_px + extra_px,
        autosize=True,
        showlegend=layout.rows is None,
        margin={
            "l": layout.left_px,
            "r": layout.right_px,
            "t": _TITLE_PX + 21 * above,
            "b": layout.axis_px + _SETTING_LINE_PX * len(lines) + 10,
            "autoexpand": False,
        },
    )
    figure.add_annotation(
        name="setting",
        text="<br>".join(lines),
        x=0,
        xref="paper",
        xanchor="left",
        xshift=12 - layout.left_px,
        y=0,
        yref="paper",
        yanchor="top",
        yshift=-layout.axis_px,
        align="left",
        showarrow=False,
        font={"size": 10, "color": GREY},
    )
    return figure


def switch(figure: go.Figure, buttons: Sequence[dict[str, Any]], active: int = 0) -> None:
    """Give a figure a row of buttons above its legend; one button is no choice, and not drawn."""
    if len(buttons) < 2:
        return
    menu = {
        "type": "buttons",
        "direction": "right",
        "active": active,
        "showactive": True,
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "font": {"size": 11, "color": "#222222"},
        "bgcolor": "#F2F2F2",
        "bordercolor": "#8A8A8A",
        "buttons": list(buttons),
    }
    figure.update_layout(updatemenus=[menu])


def add_views(
    figure: go.Figure, views: Mapping[str, Sequence[Any]], layouts: Sequence[Mapping[str, Any]]
) -> None:
    """Show the first of some sets of traces, with a button for each of them and its layout."""
    views_of = [name for name, traces in views.items() for _ in traces]
    visible = {name: [each == name for each in views_of] for name in views}
    figure.add_traces([trace for traces in views.values() for trace in traces])
    for trace, shown in zip(figure.data, next(iter(visible.values())), strict=True):
        trace.visible = shown
    buttons = [
        {"label": name, "method": "update", "args": [{"visible": visible[name]}, dict(layout)]}
        for name, layout in zip(views, layouts, strict=True)
    ]
    switch(figure, buttons)


def button(
    label: str, change: Mapping[str, Any], axes: Mapping[str, Mapping[str, Any]], *traces: Any
) -> dict[str, Any]:
    """A button that changes parts of the axes and of some traces, of all if none is named."""
    layout: dict[str, Any] = {}
    for axis in axes.items():
        layout |= parts(*axis)
    return {"label": label, "method": "update", "args": [dict(change), layout, *traces]}


PLAIN_AXIS = {"type": "linear", "dtick": None, "autorange": True}
"""Undoes what another view of the same axis set."""


def parts(name: str, axis: Mapping[str, Any]) -> dict[str, Any]:
    """An axis as plotly's own script names its parts, for a button."""
    return {f"{name}.{key.replace('_', '.')}": value for key, value in axis.items()}


def hover(texts: object) -> dict[str, Any]:
    """What a trace says under the mouse: its texts and nothing else."""
    return {"hovertext": texts, "hovertemplate": "%{hovertext}<extra></extra>"}


def rows(labels: Sequence[str]) -> dict[str, Any]:
    """An axis with a row for each label, the first at the top."""
    return {
        "categoryorder": "array",
        "categoryarray": list(labels),
        "range": [len(labels) - 0.5, -0.5],
        "type": "category",
        "dtick": 1,
        "showgrid": False,
    }


def color_bar(title: str) -> dict[str, Any]:
    """A colour bar that lies above the plot, where it costs no width; two legend rows high."""
    return {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "xpad": 0,
        # At y = 1 plotly makes room by moving every title of the figure, into other text.
        "y": 0.9999,
        "yanchor": "bottom",
        "ypad": 4,
        "len": 1,
        "thickness": 10,
        "outlinewidth": 0,
        "nticks": 6,
        "tickfont": {"size": 10},
        "title": {"text": title, "side": "top", "font": {"size": 11}},
    }


def legend_rows(figure: go.Figure) -> int:
    """Rows that the figure's legend fills in a window of 400 px, in the view that needs most."""
    everything = [True] * len(figure.data)
    buttons = [button for menu in figure.layout.updatemenus for button in menu.buttons]
    views = [button.args[0].get("visible", everything) for button in buttons] or [everything]
    named = ["" if trace.showlegend is False else trace.name for trace in figure.data]
    return max(_rows_of([name for name in compress(named, view) if name]) for view in views)


def _rows_of(shown: Sequence[str]) -> int:
    """Rows of so many entries: one if they fit, else columns as wide as the widest one."""
    if not shown:
        return 0
    widths = [_LEGEND_MARK_PX + _LEGEND_LETTER_PX * len(name) for name in shown]
    if sum(widths) <= _LEGEND_PX:
        return 1
    columns = max(1, int(_LEGEND_PX // max(widths)))
    return -(-len(shown) // columns)


def message(figure: go.Figure, text: str) -> go.Figure:
    """Write a sentence into the middle of a figure that has nothing to draw."""
    figure.add_annotation(
        text="<br>".join(plain(line) for line in textwrap.wrap(text, 42)),
        x=0.5,
        y=0.5,
        xref="paper",
        yref="paper",
        showarrow=False,
        font={"size": 13},
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def translucent(color: str, opacity: float) -> str:
    """A palette colour with an opacity, for bands under lines."""
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"
