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
    """A row of a table.

    Args:
        cells: its texts.
        head: the head it belongs to; its first cell then chooses that head.
    """

    cells: tuple[str, ...]
    head: str | None = None


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        caption: what it shows, and its units.
        columns: the column names.
        rows: the rows.
        words: places of the columns that hold words instead of numbers.
        long: places of the columns that hold sentences.
    """

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
    """One section of the report.

    Args:
        id: its name in links.
        title: its heading.
        paragraphs: sentences.
        tables: tables.
        figures: names of its figures; those that were not drawn are left out.
        blocks: folded text.
    """

    id: str
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True)
class PageFigure:
    """A figure as the page shows it: title, setting and switch are the page's, not the drawing's.

    Args:
        name: its name.
        title: its title.
        setting: the parts of its setting line.
        height_px: its height.
        drawing: data, layout and switch, plain JSON values.
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
    title = layout.pop("title")["text"].replace("<br>", " ")
    setting = tuple(layout.pop("meta")["setting"])
    menus = layout.pop("updatemenus", [])
    layout.pop("template", None)
    saved_px = _without_frame(layout) + (_SWITCH_PX if menus else 0)
    layout["margin"]["t"] -= _TITLE_PX + (_SWITCH_PX if menus else 0)
    layout["height"] -= saved_px
    switch = menus[0]["buttons"] if menus else None
    return PageFigure(
        name,
        title,
        setting,
        layout["height"],
        {
            "data": drawing["data"],
            "layout": layout,
            "switch": switch,
            "active": menus[0]["active"] if menus else None,
        },
    )


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
