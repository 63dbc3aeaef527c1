"""The parts that a report is made of, before they become HTML."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

_TITLE_PX = 34
_SWITCH_PX = 42

WIDE = frozenset({"layers", "interactions"})
TALL = frozenset({"ranking"})


@dataclass(frozen=True)
class Row:
    """A row of a table; where it belongs to a head, its first cell chooses that head."""

    cells: tuple[str, ...]
    head: str | None = None


@dataclass(frozen=True)
class Table:
    """A table; ``words`` and ``long`` are the places of columns with words and with sentences."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    words: frozenset[int] = frozenset()
    long: frozenset[int] = frozenset()

    def kind(self, place: int) -> str:
        """What a column holds; decides its alignment and whether it wraps."""
        return "long" if place in self.long else "words" if place in self.words else "number"


@dataclass(frozen=True)
class Block:
    """Long text that stays folded until it is asked for."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """One section of the report; ``id`` is its name in links."""

    id: str
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True)
class PageFigure:
    """A figure as the page shows it: title, setting and switch are the page's, not the drawing's.

    The drawing is data, layout and switch, plain JSON values.
    """

    name: str
    title: str
    setting: tuple[str, ...]
    height_px: int
    drawing: dict[str, Any] = field(repr=False)

    @property
    def shape(self) -> str:
        """Its class in the page's grid of figures."""
        return "wide" if self.name in WIDE else "tall" if self.name in TALL else ""


def page_figure(name: str, figure: go.Figure) -> PageFigure:
    """Take a figure apart: the page itself shows title, setting and switch, for every width."""
    drawing = json.loads(figure.to_json())
    layout = drawing["layout"]
    title = layout.pop("title")["text"]
    setting = tuple(layout.pop("meta")["setting"])
    menu = layout.pop("updatemenus", [{}])[0]
    switch_px = _SWITCH_PX if menu else 0
    layout.pop("template", None)
    layout["height"] -= _without_frame(layout) + switch_px
    layout["margin"]["t"] -= _TITLE_PX + switch_px
    shown = {
        "data": drawing["data"],
        "layout": layout,
        "switch": menu.get("buttons"),
        "active": menu.get("active"),
    }
    return PageFigure(name, title, setting, layout["height"], shown)


def _without_frame(layout: dict[str, Any]) -> int:
    """Remove the drawn setting line; the height that this and the title give back."""
    notes = layout["annotations"]
    line = next(note for note in notes if note.get("name") == "setting")
    notes.remove(line)
    axis_px = -line["yshift"]
    saved_px = layout["margin"]["b"] - axis_px
    layout["margin"]["b"] = axis_px
    return int(saved_px + _TITLE_PX)


def script_json(value: Any) -> str:
    """JSON that can stand inside a ``script`` element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
