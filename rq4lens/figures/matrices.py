"""Pairs: how rankings agree, and whether heads add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import plotly.graph_objects as go

from rq4lens.analysis.records import Agreement, Interactions
from rq4lens.errors import UserError
from rq4lens.figures import theme
from rq4lens.figures.numbers import Heat, grid_setting, shown
from rq4lens.results import GridResult

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
        grid_setting(grid, "[..]: 95% bootstrap intervals over prompts", *notes),
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
    lines = [f"{text} {shown(getattr(pair, name))}" for name, text in MEASURES.items()]
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
        frozenset((pair.first, pair.second)): shown(pair.interaction, "nats")
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
        grid_setting(
            grid,
            f"sum of singles {shown(interactions.sum_of_singles, 'nats')}",
            f"all together {shown(interactions.joint, 'nats')}",
        ),
        theme.Layout(620, rows=2),
        caption="Above 0 two heads repair more together than apart; an empty figure means that "
        "heads add up. Colours are logarithmic where one pair would hide all others.",
    )
