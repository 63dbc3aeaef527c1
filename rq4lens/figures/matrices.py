"""Pairs: how rankings agree, and whether heads add up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import plotly.graph_objects as go

from rq4lens.errors import UserError
from rq4lens.figures import theme
from rq4lens.figures.numbers import grid_setting, shown
from rq4lens.figures.saved import Record, estimate
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
    agreements: Iterable[Record],
    *,
    measure: Measure = "kendall",
    what: str = "rankings",
    dark: bool = False,
) -> go.Figure:
    """How much rankings of the same heads agree, pair by pair.

    Args:
        grid: the grid the rankings belong to.
        agreements: agreement records of an analysis (``first``, ``second`` and the measures with
            their intervals); a pair that was not compared stays empty.
        measure: which measure fills the cells.
        what: what differs between the rankings, for the title.
        dark: the dark template.

    Returns:
        The figure: a symmetric heatmap, 1 on the diagonal.

    Raises:
        UserError: if nothing was compared.
    """
    pairs = {(row["first"], row["second"]): row for row in agreements}
    if not pairs:
        raise UserError("there is no agreement to draw: compare at least two rankings.")
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    cells = [[_agreement(pairs, row, column, measure) for column in names] for row in names]
    labels = [theme.plain(name) for name in names]
    longest = max(len(name) for name in names)
    figure = go.Figure(
        go.Heatmap(
            x=labels,
            y=labels,
            z=[[value for value, _ in row] for row in cells],
            hovertext=[[hover for _, hover in row] for row in cells],
            hovertemplate="%{hovertext}<extra></extra>",
            colorscale=theme.DIVERGING,
            zmin=-1,
            zmax=1,
            xgap=1,
            ygap=1,
            colorbar=theme.color_bar(MEASURES[measure]),
            texttemplate="%{z:.2f}" if len(names) <= _MOST_NUMBERS else None,
            textfont={"size": 10},
        )
    )
    figure.update_xaxes(type="category", tickangle=-60, showgrid=False, tickfont_size=10, dtick=1)
    figure.update_yaxes(
        type="category", autorange="reversed", showgrid=False, tickfont_size=10, dtick=1
    )
    notes = dict.fromkeys(row["note"] for row in pairs.values() if row.get("note"))
    if any(value is None for row in cells for value, _ in row):
        notes["empty: not compared"] = None
    return theme.frame(
        figure,
        title=f"Agreement of {theme.plain(what)}",
        setting=grid_setting(grid, "[..]: 95% bootstrap intervals over prompts", *notes),
        height_px=200 + 6 * longest + max(200, 34 * len(names)),
        rows=2,
        left_px=24 + 6 * longest,
        axis_px=20 + 6 * longest,
        dark=dark,
    )


def _agreement(
    pairs: dict[tuple[str, str], Record], row: str, column: str, measure: Measure
) -> tuple[float | None, str]:
    title = f"<b>{theme.plain(row)}</b> and <b>{theme.plain(column)}</b>"
    if row == column:
        return 1.0, f"{title}<br>the same ranking"
    record = pairs.get((row, column)) or pairs.get((column, row))
    if record is None:
        return None, f"{title}<br>not compared"
    lines = [f"{MEASURES[name]} {shown(estimate(record, name), '')}" for name in MEASURES]
    return estimate(record, measure).value, "<br>".join([title, *lines])


def interaction_matrix(grid: GridResult, interactions: Record, *, dark: bool = False) -> go.Figure:
    """``Δ({i,j}) - Δ(i) - Δ(j)`` of every pair of heads.

    Args:
        grid: the measured grid.
        interactions: the ``interactions`` record of an analysis.
        dark: the dark template.

    Returns:
        The figure: a heatmap; above 0 two heads repair more together than apart.
    """
    labels = [grid.label(head) for head in range(grid.n_heads)]
    matrix = interactions["matrix_nats"]
    strongest = {
        frozenset((row["first"], row["second"])): shown(estimate(row, "interaction"), "nats")
        for row in interactions.get("strongest", ())
    }
    figure = go.Figure(
        go.Heatmap(
            z=[_without_diagonal(row, i) for i, row in enumerate(matrix)],
            customdata=[[label] * len(labels) for label in labels],
            hovertext=[
                [_pair_hover(labels, i, j, value, strongest) for j, value in enumerate(row)]
                for i, row in enumerate(matrix)
            ],
            hovertemplate="%{hovertext}<extra></extra>",
            colorscale=theme.DIVERGING,
            zmid=0,
            colorbar=theme.color_bar("Δ({i,j}) - Δ(i) - Δ(j), in nats"),
        )
    )
    head_axes(figure, f"head of layer {grid.settings.layer}", "head", grid.n_heads)
    total, joint = (estimate(interactions, name) for name in ("sum_of_singles", "joint"))
    return theme.frame(
        figure,
        title="Do heads add up, pair by pair",
        setting=grid_setting(
            grid,
            f"sum of singles {shown(total, 'nats')}",
            f"all together {shown(joint, 'nats')}",
        ),
        height_px=620,
        rows=2,
        dark=dark,
    )


def _without_diagonal(row: Sequence[float], place: int) -> list[float | None]:
    return [None if column == place else value for column, value in enumerate(row)]


def _pair_hover(
    labels: Sequence[str], i: int, j: int, value: float, strongest: dict[frozenset[int], str]
) -> str:
    if i == j:
        return labels[i]
    number = strongest.get(frozenset((i, j)), f"{value:.3g} nats")
    return f"<b>{labels[i]}</b> with <b>{labels[j]}</b><br>interaction {number}"


def head_axes(figure: go.Figure, x_title: str, y_title: str, n_heads: int) -> None:
    """Axes of head indices, both whole numbers, the first at the top left."""
    whole: dict[str, Any] = {"tick0": 0, "dtick": max(1, n_heads // 8), "showgrid": False}
    figure.update_xaxes(title_text=x_title, zeroline=False, **whole)
    figure.update_yaxes(title_text=y_title, zeroline=False, autorange="reversed", **whole)
