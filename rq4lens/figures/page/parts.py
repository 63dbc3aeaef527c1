"""What a report is made from, and what its sections are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import plotly.graph_objects as go

from rq4lens.analysis.card.records import HeadCard
from rq4lens.analysis.effects.table import records
from rq4lens.analysis.positions import PositionMap
from rq4lens.analysis.records import Analysis, ConditionRecord, HeadKind, LayerComparison
from rq4lens.analysis.statistics.bootstrap import Estimate
from rq4lens.figures.numbers import rounded, told_kinds
from rq4lens.results import GridResult


class TableEntry(NamedTuple):
    """A cell of a table: its text, what the mouse says, its colour, and where it leads.

    The colour is ``good`` or ``bad``, or none.
    """

    text: str
    why: str = ""
    look: str = ""
    link: str = ""


Row = tuple[TableEntry | str, ...]


def cell(estimate: Estimate | None, unit: str = "", look: str = "") -> TableEntry:
    """An estimate no more precise than its interval; a dash says why there is none."""
    if estimate is None:
        return TableEntry("–", "not measured")
    return TableEntry(rounded(estimate, unit), estimate.reason or "", look)


def cells(record: Any, fields: Mapping[str, str]) -> tuple[TableEntry, ...]:
    """Estimates of a record: fields, each with its unit."""
    return tuple(cell(getattr(record, field), unit) for field, unit in fields.items())


@dataclass(frozen=True)
class Table:
    """A table; ``words`` and ``long`` are the places of columns with words and with sentences.

    In a table ``of_heads`` the first cell of a row chooses its head.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    words: tuple[int, ...] = ()
    long: tuple[int, ...] = ()
    of_heads: bool = False

    def kind(self, place: int) -> str:
        """What a column holds; decides its alignment and whether it wraps."""
        return "long" if place in self.long else "words" if place in self.words else "number"


class Tile(NamedTuple):
    """One of the few heads or sweeps that matter most: words with their numbers, and its kind."""

    name: str
    numbers: Mapping[str, TableEntry]
    kind: str


@dataclass(frozen=True)
class Section:
    """One section of the report.

    ``id`` is its name in links and ``short`` its title there, if the title is long; ``figures``
    are names; ``sentences`` stand one below the other, ``notes`` after the tables; ``blocks`` are
    titles and long texts that stay folded. A section that is ``folded`` opens when it is asked for.
    """

    id: str
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[str, ...] = ()
    blocks: tuple[tuple[str, str], ...] = ()
    sentences: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = ()
    notes: tuple[str, ...] = ()
    folded: bool = False
    short: str = ""


@dataclass(frozen=True)
class Page:
    """What a page shows: its sections in reading order, and figures by the names they use.

    ``labels`` are heads that can be chosen, ``cards`` is HTML, and ``data`` is what the page's
    script needs beyond the figures.
    """

    title: str
    setting: Sequence[str]
    sections: Sequence[Section]
    figures: Mapping[str, go.Figure]
    labels: Sequence[str] = ()
    cards: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a report is made from.

    Args:
        grid: the measured grid.
        analysis: an analysis of it; without one its sections are left out.
        prompts: the prompts' texts by id, as far as given.
        provenance: the content of ``run.json``; the grid's own when left out.
        layers: the grid of each layer, from a sweep.
        comparison: the comparison of these layers by the analysis.
        cards: cards of heads that matter, the most important ones first.
        positions: the position map of the run.
        next_tokens: by prompt, the likeliest ones of base, tuned and tuned with base's heads.
    """

    grid: GridResult
    analysis: Analysis | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] | None = None
    layers: Mapping[int, GridResult] = field(default_factory=dict)
    comparison: LayerComparison | None = None
    cards: tuple[HeadCard, ...] = ()
    positions: PositionMap | None = None
    next_tokens: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def run(self) -> Mapping[str, Any]:
        """How the run was made."""
        return self.grid.provenance if self.provenance is None else self.provenance

    @cached_property
    def records(self) -> dict[str, ConditionRecord]:
        """The record of each condition by its name."""
        return {record.cond: record for record in records(self.grid)}

    @property
    def singles(self) -> tuple[ConditionRecord, ...]:
        """The record of each single head of the main layer, in head order."""
        return tuple(self.records[f"head{head}"] for head in range(self.grid.n_heads))

    @property
    def kinds(self) -> tuple[HeadKind, ...]:
        """The kind of each head of the main layer; empty if no analysis told them apart."""
        kinds = told_kinds(self.analysis)
        return kinds.heads if kinds else ()
