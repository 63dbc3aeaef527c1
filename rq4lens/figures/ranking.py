"""Which heads come first, and does the ranking hold under others of the same heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, Interval
from rq4lens.errors import UserError
from rq4lens.figures import theme
from rq4lens.figures.numbers import (
    INTERVAL_NOTE,
    KINDS,
    ConditionNumbers,
    Kind,
    error_bars,
    grid_setting,
    head_kinds,
    shown,
    single_head_numbers,
)
from rq4lens.figures.saved import HasRecord, Record
from rq4lens.results import GridResult, HeadRanking

_ROW_PX = 17
AXIS_TITLES = {"delta": "ΔKL of the head alone (nats)", "drop_pct": "drop of the head alone (%)"}
SE_NOTE = "bars: ± 1.96 standard errors"


def ranking_bars(
    grid: GridResult,
    ranking: HeadRanking | None = None,
    *,
    intervals: Sequence[tuple[float, float] | None] | None = None,
    top: int | None = None,
    analysis: HasRecord | Record | None = None,
    bootstrap: Bootstrap | None = None,
    dark: bool = False,
) -> go.Figure:
    """Heads of the main layer as bars, best first, coloured by their kind.

    Args:
        grid: the measured grid.
        ranking: an order and its scores; the grid's own ranking when left out.
        intervals: interval of the score of head 0, 1, 2, ...; when left out, bootstrap intervals
            for the grid's own scores, or the ranking's standard errors.
        top: show only the best ``top`` heads.
        analysis: an analysis of the grid, for the kinds of heads.
        bootstrap: the resamples; made from the grid's prompts when left out.
        dark: the dark template.

    Returns:
        The figure: one bar trace per kind of head, ``customdata`` names the head.
    """
    ranking = ranking or grid.ranking
    numbers = single_head_numbers(grid, bootstrap)
    scores, note = _score_estimates(ranking, numbers, intervals)
    shown_heads = ranking.heads[:top]
    kinds, rule = head_kinds(grid, analysis, bootstrap)
    figure = go.Figure(
        [
            _bars(
                [head for head in shown_heads if kinds[head] == kind],
                kind,
                ranking,
                numbers,
                scores,
            )
            for kind in KINDS
            if kind in kinds
        ]
    )
    _axes(figure, ranking, [grid.label(head) for head in shown_heads])
    return theme.frame(
        figure,
        title=f"Heads of layer {grid.settings.layer}, best first",
        setting=grid_setting(grid, note, rule),
        height_px=190 + _ROW_PX * max(6, len(shown_heads)),
        dark=dark,
    )


def _score_estimates(
    ranking: HeadRanking,
    numbers: Sequence[ConditionNumbers],
    intervals: Sequence[tuple[float, float] | None] | None,
) -> tuple[list[Estimate], str]:
    """The score of each head in head order, and a note on its intervals."""
    values = ranking.by_head
    if intervals is not None:
        return [_given(value, pair) for value, pair in zip(values, intervals, strict=True)], (
            "bars: 95% intervals"
        )
    if ranking.method in AXIS_TITLES:
        own = [n.delta if ranking.method == "delta" else n.drop_pct for n in numbers]
        # The same method at another alpha, or on other prompts, is another set of numbers.
        if all(_same(estimate.value, value) for estimate, value in zip(own, values, strict=True)):
            return own, INTERVAL_NOTE
    if ranking.standard_errors is None:
        return [Estimate(value) for value in values], "no intervals"
    errors = dict(zip(ranking.heads, ranking.standard_errors, strict=True))
    return [_from_error(value, errors[head]) for head, value in enumerate(values)], SE_NOTE


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-15)


def _given(value: float | None, pair: tuple[float, float] | None) -> Estimate:
    return Estimate(value, None if pair is None else Interval(*pair, 0.95, "given"))


def _from_error(value: float | None, error: float | None) -> Estimate:
    if value is None or error is None:
        return Estimate(value)
    return Estimate(value, Interval(value - 1.96 * error, value + 1.96 * error, 0.95, "normal"))


def _bars(
    heads: Sequence[int],
    kind: Kind,
    ranking: HeadRanking,
    numbers: Sequence[ConditionNumbers],
    scores: Sequence[Estimate],
) -> go.Bar:
    return go.Bar(
        name=kind,
        orientation="h",
        y=[numbers[head].label for head in heads],
        x=[scores[head].value for head in heads],
        error_x=error_bars([scores[head] for head in heads]),
        customdata=[numbers[head].label for head in heads],
        hovertext=[
            f"{numbers[head].hover}<br>{kind} · rank {ranking.rank_of(head)} by {ranking.method}"
            for head in heads
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        marker={
            "color": theme.KIND_COLORS[kind],
            "pattern": {
                "shape": "/" if kind == "rewired" else "",
                "fillmode": "overlay",
                "size": 6,
            },
        },
    )


def _axes(figure: go.Figure, ranking: HeadRanking, labels: Sequence[str]) -> None:
    figure.update_layout(barmode="overlay", bargap=0.25)
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=list(labels),
        range=[len(labels) - 0.5, -0.5],
        type="category",
        dtick=1,
        showgrid=False,
    )
    figure.update_xaxes(
        title_text=AXIS_TITLES.get(ranking.method, f"score by {theme.plain(ranking.method)}"),
        nticks=7,
    )


_FLOW_ROW_PX = 16
RankRanges = Mapping[int, tuple[int, int]]
BY_INDEX = "head 3 of one layer is not head 3 of another: lines join equal indices only"


def rank_flow(
    grid: GridResult,
    rankings: Mapping[str, Sequence[int]],
    *,
    what: str = "rankings",
    alpha: str | None = None,
    top: int = 8,
    across_layers: bool = False,
    rank_ranges: Mapping[str, RankRanges] | None = None,
    bootstrap: Bootstrap | None = None,
    dark: bool = False,
) -> go.Figure:
    """Rank of every head under several rankings, joined by a line per head.

    Args:
        grid: the grid the rankings belong to.
        rankings: head indices, best first, by the name of the ranking, in drawing order.
        what: what differs between the rankings, for the title: ``"blend strengths"``.
        alpha: the blend strengths of the rankings, when they are not the grid's own.
        top: heads in colour: the best ``top`` of the first ranking; the others stay grey.
        across_layers: the rankings belong to different layers; heads are then named by index, and
            the figure says that equal indices mean nothing.
        rank_ranges: where 95% of a head's resampled ranks lie, by the name of the ranking and head,
            for rankings that were resampled.
        bootstrap: the resamples behind the intervals in the hover; made from the grid's prompts
            when left out.
        dark: the dark template.

    Returns:
        The figure: a line per head; ``meta`` names the head, and hover gives its single-head
        ``ΔKL`` at the grid's own alpha with its 95% interval.

    Raises:
        UserError: if there is no ranking.
    """
    if not rankings:
        raise UserError("there is no ranking to draw: give at least one.")
    names = [theme.plain(name) for name in rankings]
    orders = [list(heads) for heads in rankings.values()]
    ranges = [(rank_ranges or {}).get(name, {}) for name in rankings]
    effects = [] if across_layers else _effects(grid, bootstrap)
    first = orders[0]
    lines = [
        _line(
            _label(grid, head, across_layers),
            names,
            [order.index(head) + 1 if head in order else None for order in orders],
            [_range(each.get(head)) for each in ranges],
            effects[head] if effects else "",
            place if place < top else None,
        )
        for place, head in enumerate(first)
    ]
    # Grey lines first, so that the coloured ones lie on top.
    figure = go.Figure(lines[top:] + lines[:top])
    longest = max(len(name) for name in names)
    steep = longest * len(names) > 36
    figure.update_xaxes(
        type="category",
        tickangle=-60 if steep else 0,
        range=[-0.1, len(names) - 0.9],
        showgrid=True,
    )
    figure.update_yaxes(
        title_text=f"rank and head by {names[0]}",
        range=[len(first) + 0.7, 0.3],
        showgrid=False,
        zeroline=False,
        tickvals=list(range(1, len(first) + 1)),
        ticktext=[
            f"{rank} · {_label(grid, head, across_layers)}" for rank, head in enumerate(first, 1)
        ],
        tickfont_size=10,
    )
    return theme.frame(
        figure,
        title=f"Ranks of heads across {theme.plain(what)}",
        setting=grid_setting(grid, *([BY_INDEX] if across_layers else []), alpha=alpha),
        height_px=170 + _FLOW_ROW_PX * max(8, len(first)) + (7 * longest if steep else 0),
        rows=0,
        left_px=96,
        right_px=26,
        axis_px=24 + 7 * longest if steep else 34,
        dark=dark,
    )


def _label(grid: GridResult, head: int, across_layers: bool) -> str:
    return f"H{head}" if across_layers else grid.label(head)


def _effects(grid: GridResult, bootstrap: Bootstrap | None) -> list[str]:
    """A line of the hover for each head: its effect at the grid's own alpha."""
    alpha = f"at α = {grid.settings.patching.alpha:g}"
    numbers = single_head_numbers(grid, bootstrap)
    return [f"<br>ΔKL alone {alpha}: {shown(each.delta, 'nats')}" for each in numbers]


def _range(ends: tuple[int, int] | None) -> str:
    return "" if ends is None else f" (95% in {ends[0]} to {ends[1]})"


def _line(
    label: str,
    names: Sequence[str],
    ranks: Sequence[int | None],
    ranges: Sequence[str],
    effect: str,
    place: int | None,
) -> go.Scatter:
    style = {"color": theme.GREY, "width": 1} if place is None else theme.line_style(place)
    return go.Scatter(
        name=label,
        meta=label,
        x=list(names),
        y=ranks,
        mode="lines+markers",
        cliponaxis=False,
        line=style if place is None else {**style, "width": 2.5},
        opacity=0.35 if place is None else 1,
        marker={"size": 4 if place is None else 7, "symbol": _symbol(place)},
        hovertext=[
            f"<b>{label}</b><br>rank {rank}{span} · {name}{effect}" if rank else ""
            for name, rank, span in zip(names, ranks, ranges, strict=True)
        ],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _symbol(place: int | None) -> str:
    return "circle" if place is None else theme.SYMBOLS[place % len(theme.SYMBOLS)]
