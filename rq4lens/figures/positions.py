"""The position map as a picture: every head of a layer by the token that is patched alone."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from rq4lens.analysis.card.fragment import token_text
from rq4lens.analysis.positions import OF_A_CELL, MappedPosition, PositionMap, Quantity
from rq4lens.figures import numbers, theme
from rq4lens.figures.layers import QUANTITIES, heatmap

ROLES = "-1 is the decision token, whose next token is compared; -2 stands before it"
INTERVALS = "[..]: 95% bootstrap intervals over prompts"
MOST_LETTERS = 18
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
    labels, places = list(positions.labels), list(range(len(positions.positions)))
    hovers = [_hovers(positions, place, row) for place in places]
    figure = heatmap(
        _of_all(positions) if row is None else _of_prompt(positions, row),
        quantity,
        x=places,
        y=labels,
        customdata=[["" if not at else label] * len(places) for at, label in enumerate(labels)],
        **theme.hover([list(each) for each in zip(*hovers, strict=True)]),
    )
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
    note = INTERVALS if prompt is None else "shares of the prompt's own gap"
    return theme.frame(
        figure,
        f"What heads carry at which token, {what}",
        numbers.grid_setting(positions.grid, ROLES, note),
        theme.Layout(
            220 + max(220, 14 * len(labels)),
            rows=2,
            left_px=84,
            axis_px=46 + 6 * max(map(len, texts)),
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


def _of_all(positions: PositionMap) -> dict[str, numbers.Cells]:
    """The cells of each quantity, a row for the whole layer and for each head."""
    columns = [each.layer_and_heads for each in positions.positions]
    return {
        name: [[getattr(each, field).value for each in row] for row in zip(*columns, strict=True)]
        for name, field in OF_A_CELL.items()
    }


def _of_prompt(positions: PositionMap, row: int) -> dict[str, numbers.Cells]:
    found = {name: positions.per_prompt(name)[..., row].T for name in UNITS}
    return {
        name: [[float(each) if np.isfinite(each) else None for each in cells] for cells in values]
        for name, values in found.items()
    }


def _hovers(positions: PositionMap, place: int, row: int | None) -> list[str]:
    """What the mouse says of the cells of a position."""
    position = positions.positions[place]
    if row is None:
        text, share = position.usual_text
        at = f"{position.role}, {theme.plain(repr(text))} in {100 * share:.0f}% of prompts"
        both = zip(positions.labels, position.layer_and_heads, strict=True)
        return [numbers.hover(record, f"{label} at {at}") for label, record in both]
    at = f"{position.role}, {theme.plain(repr(position.texts[row]))}"
    cells = {name: position.per_prompt(name)[:, row] for name in UNITS}
    return [
        "<br>".join(
            [f"<b>{label} at {at}</b>"]
            + [
                f"{QUANTITIES[name].name} {_number(values[number], UNITS[name])}"
                for name, values in cells.items()
            ]
        )
        for number, label in enumerate(positions.labels)
    ]


UNITS: dict[Quantity, str] = {"to_base": "%", "to_tuned": "%", "delta": "nats"}


def _number(value: float, unit: str) -> str:
    if not np.isfinite(value):
        return "undefined: the models answer alike on this prompt"
    return numbers.number(float(value), unit)


def _tick(position: MappedPosition, row: int | None) -> str:
    """What stands below a column: its role, and its text where it has one."""
    text, share = position.usual_text if row is None else (position.texts[row], 1.0)
    if share < USUAL:
        return position.role
    shown = token_text(text)
    shown = shown if len(shown) <= MOST_LETTERS else f"{shown[: MOST_LETTERS - 1]}…"
    return f"{position.role}  {theme.plain(shown)}"
