"""What replaces a head: how much of what it tells is there, from a constant up to itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import plotly.graph_objects as go

from rq4lens.analysis.records import Analysis, Ladder, LadderRow
from rq4lens.analysis.saved import Run
from rq4lens.errors import UserError
from rq4lens.figures import theme
from rq4lens.figures.numbers import settings_line, shown
from rq4lens.heads import Head

# Color, shape and meaning of each source; the constant and the head itself are the ends of the bar.
SOURCES = {
    "raw": (theme.RAW, "diamond", "base's activation"),
    "shifted": (theme.CONTROL, "cross", "base's activation, moved by the difference of means"),
    "mapped": (theme.MAPPED, "circle", "the map of base's activation"),
    "held_out": (theme.BEST, "circle-open", "a map fitted without the prompt's own content"),
    "output": (theme.GREEN, "square", "base's own head output"),
}
ENDS = {"constant": (0.0, "the tuned mean"), "clean": (100.0, "the head itself")}
LEFT_PCT, RIGHT_PCT = -100.0, 100.0
DECADE_PCT = 50.0
"""Left of -100 ten times as much takes this room."""
STEP = 0.13
"""Marks of one row stand this share of it apart, or those of one value would hide each other."""
CAPTION = (
    "Each bar runs from a constant (0) to the head itself (100); a mark near 100 has what the head "
    "tells about the prompt, one left of 0 is worse than a constant."
)


def ladder(run: Run | Analysis, *, alpha: float = 1.0) -> go.Figure:
    """What stands in for each head, from a constant to the head itself: a bar a head.

    Args:
        run: a finished run, or its analysis.
        alpha: blend strength; the analysis has 1 and the run's own.

    Returns:
        The figure: a trace per source, heads with the largest ``D(constant)`` at the top, then the
        chosen sets; ``customdata`` names the head. Idle heads are counted in the caption.

    Raises:
        UserError: if the analysis has no ladder at this strength.
    """
    analysis = run.analysis if isinstance(run, Run) else run
    found = _ladder_at(analysis, alpha)
    rows = [row for row in found.rows if row.recovered_pct["constant"].value is not None]
    heads = [row for row in rows if len(row.heads) == 1]
    heads.sort(key=lambda row: -(row.damage_nats["constant"].value or 0.0))
    drawn = heads + [row for row in rows if len(row.heads) > 1]
    layer = analysis.settings.grid.layer
    figure = go.Figure()
    if drawn:
        figure.add_traces([_bars(drawn), *_ends(drawn, layer), *_marks(drawn, layer)])
        _axes(figure, analysis, drawn)
    else:
        theme.message(figure, "No head tells more than the idle line: there is no ladder to draw.")
    idle = sum(len(row.heads) == 1 for row in found.rows) - len(heads)
    return theme.frame(
        figure,
        f"What replaces a head, layer {layer}",
        settings_line(
            analysis.settings.grid, analysis.settings.n_prompts, found.rule, alpha=f"{alpha:g}"
        ),
        theme.Layout(160 + 36 * max(3, len(drawn)), left_px=126),
        caption=CAPTION + (f" {idle} heads tell too little and are left out." if idle else ""),
    )


def _ladder_at(analysis: Analysis, alpha: float) -> Ladder:
    found = {each.rows[0].alpha: each for each in analysis.ladders}
    if not found:
        raise UserError("the analysis has no ladder: run it with '--analysis full'.")
    if alpha not in found:
        has = ", ".join(f"{each:g}" for each in found)
        raise UserError(f"the analysis has no ladder at alpha {alpha:g}: it has {has}.")
    return found[alpha]


def _name(row: LadderRow, layer: int) -> str:
    """How a row is called: a head by its label, a set by its size."""
    if len(row.heads) == 1:
        return Head(layer, row.heads[0]).label
    return "all heads" if row.name == "full" else f"top {len(row.heads)}"


def _place(value: float) -> float:
    """Where a value is drawn: left of -100 the axis is logarithmic."""
    return value if value >= LEFT_PCT else LEFT_PCT - DECADE_PCT * math.log10(value / LEFT_PCT)


def _bars(rows: Sequence[LadderRow]) -> go.Scatter:
    """A line for each row, from its leftmost mark to the head itself."""
    starts = [_place(_low(row)) for row in rows]
    return go.Scatter(
        x=list(chain.from_iterable((start, RIGHT_PCT, None) for start in starts)),
        y=list(chain.from_iterable((at, at, None) for at in range(len(rows)))),
        mode="lines",
        line={"color": theme.translucent(theme.GREY, 0.25), "width": 12},
        hoverinfo="skip",
        showlegend=False,
    )


def _values(row: LadderRow) -> dict[str, float]:
    """What is recovered by each source that was measured and is defined."""
    found = {source: row.recovered_pct.get(source) for source in SOURCES}
    return {name: x.value for name, x in found.items() if x is not None and x.value is not None}


def _low(row: LadderRow) -> float:
    return min(0.0, *_values(row).values())


def _ends(rows: Sequence[LadderRow], layer: int) -> list[go.Scatter]:
    return [
        go.Scatter(
            name=source,
            x=[at] * len(rows),
            y=list(range(len(rows))),
            customdata=_labels(rows, layer),
            mode="markers",
            marker={"symbol": "line-ns", "size": 14, "line": {"width": 2, "color": theme.GREY}},
            showlegend=False,
            **theme.hover([_hover(row, layer, source, means) for row in rows]),
        )
        for source, (at, means) in ENDS.items()
    ]


def _marks(rows: Sequence[LadderRow], layer: int) -> list[go.Scatter]:
    found = []
    for place, (source, (color, symbol, means)) in enumerate(SOURCES.items()):
        own = [at for at, row in enumerate(rows) if source in _values(row)]
        held = [rows[at] for at in own]
        trace = go.Scatter(
            name=source.replace("_", " "),
            x=[_place(_values(row)[source]) for row in held],
            y=[at + STEP * (place - len(SOURCES) // 2) for at in own],
            customdata=_labels(held, layer),
            mode="markers",
            cliponaxis=False,
            marker={"symbol": symbol, "size": 9, "color": color, "line": {"width": 1.5}},
            **theme.hover([_hover(row, layer, source, means) for row in held]),
        )
        found += [trace] if own else []
    return found


def _labels(rows: Sequence[LadderRow], layer: int) -> list[str | None]:
    return [Head(layer, row.heads[0]).label if len(row.heads) == 1 else None for row in rows]


def _hover(row: LadderRow, layer: int, source: str, means: str) -> str:
    lines = [f"<b>{_name(row, layer)}, {source.replace('_', ' ')}</b>: {means}"]
    if source in row.recovered_pct:
        lines.append(f"recovered {shown(row.recovered_pct[source], '%')}")
        lines.append(f"damage {shown(row.damage_nats[source], 'nats')}")
    lines.append(f"damage of a constant {shown(row.damage_nats['constant'], 'nats')}")
    return "<br>".join(lines)


def _axes(figure: go.Figure, analysis: Analysis, rows: Sequence[LadderRow]) -> None:
    layer = analysis.settings.grid.layer
    kinds = {each.head: each.kind for each in analysis.kinds.heads}
    names = [_name(row, layer) for row in rows]
    figure.update_yaxes(
        range=[len(rows) - 0.4, -0.6],
        tickvals=list(range(len(rows))),
        ticktext=[
            f"{name} {kinds.get(row.heads[0], '')}" if len(row.heads) == 1 else name
            for name, row in zip(names, rows, strict=True)
        ],
        showgrid=False,
        zeroline=False,
    )
    low = min(map(_low, rows))
    ticks = [-(10.0**power) for power in (5, 4, 3)] + [-100.0, -50.0, 0.0, 50.0, 100.0]
    shown_ticks = [tick for tick in ticks if tick >= min(low, -50.0)]
    words = {0.0: "0 constant", 100.0: "100 clean"}
    figure.update_xaxes(
        title_text="recovered (%" + (", logarithmic left of -100)" if low < LEFT_PCT else ")"),
        range=[_place(low) - 8, RIGHT_PCT + 8],
        tickvals=[_place(tick) for tick in shown_ticks],
        ticktext=[words.get(tick, f"{tick:g}") for tick in shown_ticks],
        zeroline=False,
    )
