"""Heatmaps: heads by layer and by token, how rankings agree, whether heads add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import plotly.graph_objects as go

from rq4lens.analysis.card.fragment import token_text
from rq4lens.analysis.positions import MappedPosition, PositionMap
from rq4lens.analysis.positions import Quantity as OfACell
from rq4lens.analysis.records import Agreement, ConditionRecord, Interactions
from rq4lens.errors import UserError
from rq4lens.figures import numbers, theme
from rq4lens.figures.numbers import Quantity
from rq4lens.results import GridResult

Cells = Sequence[Sequence[float | None]]
Records = Sequence[ConditionRecord]


class Heat(NamedTuple):
    """What a heatmap takes to show some cells, and the ticks of its colour bar."""

    trace: dict[str, Any]
    ticks: dict[str, Any]

    @classmethod
    def of(cls, z: Cells, *, most: float | None = None, signed: bool = True) -> Heat:
        """The scale of some cells: that of nats is logarithmic if one would hide all others.

        With ``most``, cells are in percent and colours end there.
        """
        values = [value for row in z for value in row if value is not None]
        reach = max(map(abs, values)) or 1.0
        scale = numbers.SignedLog.of(values) if most is None else None
        reach = reach if most is None else min(reach, most)
        low = -reach if signed else 0.0
        ticks = numbers.SignedLog.axis(scale, low, reach)
        if scale is not None:
            z = [[None if value is None else scale.place(value) for value in row] for row in z]
            low, reach = scale.place(low), scale.place(reach)
        return cls({"z": z, "zmin": low, "zmax": reach, "autocolorscale": True}, ticks)


# A single head can make things a hundred times worse in percent; colours end at 100%.
QUANTITIES = {
    "to_base": Quantity("undoes", "to_base_pct", "undoes, alone (% of the gap)", 100.0),
    "to_tuned": Quantity("gives base", "to_tuned_pct", "gives base, alone (%)", 100.0),
    "delta": Quantity("ΔKL", "delta", "ΔKL of the head alone (nats)"),
    "KL_raw": Quantity("KL raw", "KL_raw_mean", "KL_raw of the head alone (nats)", signed=False),
    "KL_mapped": Quantity("mapped", "KL_mapped_mean", "KL_mapped, alone (nats)", signed=False),
    "drop_pct": Quantity("drop", "drop_pct", "drop, alone (%), colours end at ±100", 100.0),
}
CAPTION = (
    "A cell that stands out is a head that carries something alone; a row of them is a layer that "
    "does. Colours of nats are logarithmic where one cell would hide all others."
)


def layer_heatmap(grids: Mapping[int, GridResult], *, quantity: str | None = None) -> go.Figure:
    """Every head of every layer, with a switch between what it carries and what the map repairs.

    Args:
        grids: the grid of each layer.
        quantity: what is shown first: ``"to_base"``, ``"to_tuned"``, ``"delta"``, ``"KL_raw"``,
            ``"KL_mapped"`` or ``"drop_pct"``; when left out, the first that is defined.

    Returns:
        The figure: a heatmap, layers downwards; ``customdata`` names the head.

    Raises:
        UserError: if there is no such quantity.
    """
    layers = sorted(grids)
    singles = [numbers.single_records(grids[layer]) for layer in layers]
    heads = range(len(singles[0]))
    figure = heatmap(
        _cells(singles, QUANTITIES),
        quantity,
        x=list(heads),
        y=[str(layer) for layer in layers],
        customdata=[[numbers.label_of(each) for each in row] for row in singles],
        **theme.hover([[numbers.hover(each) for each in row] for row in singles]),
    )
    figure.update_xaxes(
        title_text="head (indices mean nothing across layers)",
        dtick=max(1, len(heads) // 8),
        tick0=0,
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        title_text="layer", type="category", autorange="reversed", showgrid=False, nticks=17
    )
    note = "coverage in the hover: of the layer's own ΔKL of all heads"
    return theme.frame(
        figure,
        "Every head of every layer",
        numbers.layers_setting(grids, "each head patched alone", note),
        theme.Layout(250 + max(220, 14 * len(layers)), rows=2),
        caption=CAPTION,
    )


def _cells(rows: Sequence[Records], quantities: Iterable[str]) -> dict[str, Cells]:
    """The cells of some quantities, by rows of records."""
    return {
        name: [[getattr(each, QUANTITIES[name].field).value for each in row] for row in rows]
        for name in quantities
    }


def heatmap(cells: Mapping[str, Cells], quantity: str | None, **trace: Any) -> go.Figure:
    """One of some quantities of the same cells, with a switch between those that are defined."""
    heats = {
        name: Heat.of(z, most=QUANTITIES[name].most, signed=QUANTITIES[name].signed)
        for name, z in cells.items()
        if any(value is not None for row in z for value in row)
    }
    first = quantity or next(iter(heats))
    if first not in heats:
        raise UserError(f"the heatmap has no quantity {quantity!r}: choose {', '.join(heats)}.")
    bar = {**theme.color_bar(QUANTITIES[first].title), **heats[first].ticks}
    figure = go.Figure(go.Heatmap(colorbar=bar, **heats[first].trace, **trace))
    buttons = [_button(QUANTITIES[name], heat) for name, heat in heats.items()]
    theme.switch(figure, buttons, list(heats).index(first))
    return figure


def _button(quantity: Quantity, heat: Heat) -> dict[str, Any]:
    change = {name: [value] for name, value in heat.trace.items()}
    change |= {f"colorbar.{name}": [value] for name, value in heat.ticks.items()}
    change["colorbar.title.text"] = [quantity.title]
    return {"label": quantity.name, "method": "restyle", "args": [change, [0]]}


# Heads by token

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
    columns = [each.layer_and_heads for each in positions.positions]
    figure = heatmap(
        _cells([*zip(*columns, strict=True)], UNITS) if row is None else _of_prompt(positions, row),
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


def _of_prompt(positions: PositionMap, row: int) -> dict[str, Cells]:
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


UNITS: dict[OfACell, str] = {"to_base": "%", "to_tuned": "%", "delta": "nats"}


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


# Pairs

Measure = Literal["kendall", "spearman", "rbo"]

MEASURES: dict[Measure, str] = {
    "kendall": "Kendall's τ",
    "spearman": "Spearman's ρ",
    "rbo": "rank-biased overlap (p = 0.9)",
}
# Beyond this many rankings the numbers no longer fit into the cells of a 400 px window.
_MOST_NUMBERS = 7


def agreement_matrix(
    grid: GridResult,
    agreements: Iterable[Agreement],
    *,
    measure: Measure = "kendall",
    what: str = "rankings",
) -> go.Figure:
    """How much rankings of the same heads agree, pair by pair.

    Args:
        grid: the grid the rankings belong to.
        agreements: agreements of an analysis; a pair that was not compared stays empty.
        measure: which measure fills the cells.
        what: what differs between the rankings, for the title.

    Returns:
        The figure: a symmetric heatmap, 1 on the diagonal.

    Raises:
        UserError: if nothing was compared.
    """
    pairs = {frozenset((each.first, each.second)): each for each in agreements}
    if not pairs:
        raise UserError("there is no agreement to draw: compare at least two rankings.")
    names = list(
        dict.fromkeys(name for each in pairs.values() for name in (each.first, each.second))
    )
    cells = [[_cell(pairs, row, column, measure) for column in names] for row in names]
    labels = [theme.plain(name) for name in names]
    label_px = 6 * max(len(name) for name in names)
    figure = go.Figure(
        go.Heatmap(
            x=labels,
            y=labels,
            z=[[value for value, _ in row] for row in cells],
            autocolorscale=True,
            zmin=-1,
            zmax=1,
            xgap=1,
            ygap=1,
            colorbar=theme.color_bar(MEASURES[measure]),
            texttemplate="%{z:.2f}" if len(names) <= _MOST_NUMBERS else None,
            textfont={"size": 10},
            **theme.hover([[hover for _, hover in row] for row in cells]),
        )
    )
    axis = {"type": "category", "showgrid": False, "tickfont_size": 10, "dtick": 1}
    figure.update_xaxes(tickangle=-60, **axis)
    figure.update_yaxes(autorange="reversed", **axis)
    notes = dict.fromkeys(each.note for each in pairs.values() if each.note)
    if any(value is None for row in cells for value, _ in row):
        notes["empty: not compared"] = None
    return theme.frame(
        figure,
        f"Agreement of {theme.plain(what)}",
        numbers.grid_setting(grid, "[..]: 95% bootstrap intervals over prompts", *notes),
        theme.Layout(
            200 + label_px + max(200, 34 * len(names)),
            rows=2,
            left_px=24 + label_px,
            axis_px=20 + label_px,
        ),
        caption="Near 1: the two rankings order the heads alike; near 0: they have nothing in "
        "common.",
    )


def _cell(
    pairs: Mapping[frozenset[str], Agreement], row: str, column: str, measure: Measure
) -> tuple[float | None, str]:
    title = f"<b>{theme.plain(row)}</b> and <b>{theme.plain(column)}</b>"
    if row == column:
        return 1.0, f"{title}<br>the same ranking"
    pair = pairs.get(frozenset((row, column)))
    if pair is None:
        return None, f"{title}<br>not compared"
    lines = [f"{text} {numbers.shown(getattr(pair, name))}" for name, text in MEASURES.items()]
    return getattr(pair, measure).value, "<br>".join([title, *lines])


def interaction_matrix(grid: GridResult, interactions: Interactions) -> go.Figure:
    """``Δ({i,j}) - Δ(i) - Δ(j)`` of every pair of heads.

    Args:
        grid: the measured grid.
        interactions: the ``interactions`` of an analysis.

    Returns:
        The figure: a heatmap; above 0 two heads repair more together than apart.
    """
    labels = [grid.label(head) for head in range(grid.n_heads)]
    matrix = interactions.matrix_nats.tolist()
    strongest = {
        frozenset((pair.first, pair.second)): numbers.shown(pair.interaction, "nats")
        for pair in interactions.strongest
    }

    def hover(i: int, j: int) -> str:
        if i == j:
            return labels[i]
        amount = strongest.get(frozenset((i, j)), f"{matrix[i][j]:.3g} nats")
        return f"<b>{labels[i]}</b> with <b>{labels[j]}</b><br>interaction {amount}"

    heads = range(grid.n_heads)
    heat = Heat.of([[None if i == j else matrix[i][j] for j in heads] for i in heads])
    figure = go.Figure(
        go.Heatmap(
            customdata=[[label] * len(labels) for label in labels],
            colorbar={**theme.color_bar("Δ({i,j}) - Δ(i) - Δ(j), in nats"), **heat.ticks},
            **heat.trace,
            **theme.hover([[hover(i, j) for j in heads] for i in heads]),
        )
    )
    axis = {"tick0": 0, "dtick": max(1, grid.n_heads // 8), "showgrid": False, "zeroline": False}
    figure.update_xaxes(title_text=f"head of layer {grid.settings.layer}", **axis)
    figure.update_yaxes(title_text="head", autorange="reversed", **axis)
    return theme.frame(
        figure,
        "Do heads add up, pair by pair",
        numbers.grid_setting(
            grid,
            f"sum of singles {numbers.shown(interactions.sum_of_singles, 'nats')}",
            f"all together {numbers.shown(interactions.joint, 'nats')}",
        ),
        theme.Layout(620, rows=2),
        caption="Above 0 two heads repair more together than apart; an empty figure means that "
        "heads add up. Colours are logarithmic where one pair would hide all others.",
    )
