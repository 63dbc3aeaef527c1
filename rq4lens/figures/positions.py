"""The position map as a picture: every head of a layer by the token that is patched alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from rq4lens.analysis.card.fragment import token_text
from rq4lens.analysis.positions import OF_A_CELL, MappedPosition, PositionMap
from rq4lens.errors import UserError
from rq4lens.figures import numbers, theme
from rq4lens.figures.layers import QUANTITIES, Cells, buttons_of, scales_of

ROLES = "-1 is the decision token, whose next token is compared; -2 stands before it"
INTERVALS = "[..]: 95% bootstrap intervals over prompts"
USUAL = 0.5
"""A token text that so many prompts share stands beside its position."""


def position_map(
    positions: PositionMap, *, prompt: str | None = None, quantity: str | None = None
) -> go.Figure:
    """Heads by position, with a switch between both directions of transfer and ``ΔKL``.

    Args:
        positions: the map, as :func:`rq4lens.position_map` measured it.
        prompt: the id of one prompt, whose tokens then stand below; the mean of all when left out.
        quantity: what is shown first: ``"to_base"``, ``"to_tuned"`` or ``"delta"``; when left out,
            the first that is defined.

    Returns:
        The figure: a heatmap, the whole layer in its first row; ``customdata`` names the head.

    Raises:
        UserError: if there is no such prompt or quantity.
    """
    row = None if prompt is None else positions.row_of(prompt)
    scales = scales_of(_of_all(positions) if row is None else _of_prompt(positions, row))
    shown = quantity or next(iter(scales))
    if shown not in scales:
        raise UserError(f"the map has no quantity {quantity!r}: choose {', '.join(scales)}.")
    labels, places = list(positions.labels), list(range(len(positions.positions)))
    hovers = [_hovers(positions, place, row) for place in range(len(positions.positions))]
    figure = go.Figure(
        go.Heatmap(
            x=places,
            y=labels,
            colorbar={**theme.color_bar(QUANTITIES[shown].title), **scales[shown].ticks},
            customdata=[["" if not at else label] * len(places) for at, label in enumerate(labels)],
            **scales[shown].trace,
            **theme.hover([list(each) for each in zip(*hovers, strict=True)]),
        )
    )
    theme.switch(figure, buttons_of(scales), list(scales).index(shown))
    texts = [_tick(each, row) for each in positions.positions]
    figure.update_xaxes(
        title_text="the patched token",
        tickvals=places,
        ticktext=texts,
        tickangle=-60,
        tickfont_size=10,
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        type="category", autorange="reversed", showgrid=False, tickfont_size=10,
        dtick=max(1, len(labels) // 40),
    )  # fmt: skip
    what = "on all prompts" if prompt is None else f"on prompt {theme.plain(prompt)}"
    return theme.frame(
        figure,
        f"What heads carry at which token, {what}",
        _setting(positions, one=row is not None),
        theme.Layout(
            220 + max(220, 14 * len(labels)), rows=2, left_px=84, axis_px=46 + _longest_px(texts)
        ),
        caption="Each column is one token of each prompt, patched alone: a cell that stands out is "
        "a head that carries something there. Colours of nats are logarithmic where one cell would "
        "hide all others.",
    )


def strongest_prompt(positions: PositionMap) -> str:
    """The prompt whose gap is widest: what heads carry of it can be seen best."""
    nothing = positions.grid["none"].transfer
    assert nothing is not None
    return positions.grid.prompt_ids[int(np.argmax(nothing.left_nats("to_base")))]


def _setting(positions: PositionMap, *, one: bool) -> tuple[str, ...]:
    notes = (ROLES, "shares of the prompt's own gap") if one else (ROLES, INTERVALS)
    return numbers.grid_setting(positions.grid, *notes)


def _of_all(positions: PositionMap) -> dict[str, Cells]:
    """The cells of each quantity, a row for the whole layer and for each head."""
    columns = [each.layer_and_heads for each in positions.positions]
    return {
        name: [[getattr(each, field).value for each in row] for row in zip(*columns, strict=True)]
        for name, field in OF_A_CELL.items()
    }


def _of_prompt(positions: PositionMap, row: int) -> dict[str, Cells]:
    found = {name: positions.per_prompt(name)[..., row].T for name in ("to_base", "to_tuned")}
    found["delta"] = positions.per_prompt("delta")[..., row].T
    return {
        name: [[float(each) if np.isfinite(each) else None for each in cells] for cells in values]
        for name, values in found.items()
    }


def _hovers(positions: PositionMap, place: int, row: int | None) -> Sequence[str]:
    """What the mouse says of the cells of a position."""
    position = positions.positions[place]
    at = f"{position.role}, {_said(position, row)}"
    if row is None:
        both = zip(positions.labels, position.layer_and_heads, strict=True)
        return [numbers.hover(record, f"{label} at {at}") for label, record in both]
    cells = {name: position.per_prompt(name)[:, row] for name in ("to_base", "to_tuned", "delta")}
    units = {"to_base": "%", "to_tuned": "%", "delta": "nats"}
    return [
        "<br>".join(
            [f"<b>{label} at {at}</b>"]
            + [
                f"{QUANTITIES[name].name} {_number(values[number], units[name])}"
                for name, values in cells.items()
            ]
        )
        for number, label in enumerate(positions.labels)
    ]


def _number(value: Any, unit: str) -> str:
    if not np.isfinite(value):
        return "undefined: the models answer alike on this prompt"
    return numbers.number(float(value), unit)


def _said(position: MappedPosition, row: int | None) -> str:
    """The text of a position, as the mouse says it."""
    if row is not None:
        return theme.plain(repr(position.texts[row]))
    text, share = position.usual_text
    return f"{theme.plain(repr(text))} in {100 * share:.0f}% of prompts"


def _tick(position: MappedPosition, row: int | None) -> str:
    """What stands below a column: its role, and its text where it has one."""
    text, share = position.usual_text if row is None else (position.texts[row], 1.0)
    if share < USUAL:
        return position.role
    return f"{position.role}  {theme.plain(_short(token_text(text)))}"


def _short(text: str, most: int = 18) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _longest_px(texts: Sequence[str]) -> int:
    return 6 * max(map(len, texts))
