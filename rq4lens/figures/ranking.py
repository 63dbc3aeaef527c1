"""Which heads come first, and does the ranking hold under others of the same heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from rq4lens.analysis.records import ConditionRecord
from rq4lens.analysis.result import Analysis
from rq4lens.analysis.statistics.bootstrap import LEVEL, Estimate, Interval
from rq4lens.errors import UserError
from rq4lens.figures import numbers, theme
from rq4lens.results import GridResult, HeadRanking

AXIS_TITLES = {"delta": "ΔKL of the head alone (nats)", "drop_pct": "drop of the head alone (%)"}
Ends = tuple[float, float]


def ranking_bars(
    grid: GridResult,
    ranking: HeadRanking | None = None,
    *,
    intervals: Sequence[Ends | None] | None = None,
    top: int | None = None,
    analysis: Analysis | None = None,
) -> go.Figure:
    """Heads of the main layer as bars, best first, coloured by their kind.

    Args:
        grid: the measured grid.
        ranking: an order and its scores; the grid's own ranking when left out.
        intervals: interval of the score of head 0, 1, 2, ...; when left out, bootstrap intervals
            for the grid's own scores, or the ranking's standard errors.
        top: show only the best ``top`` heads.
        analysis: an analysis of the grid, for the kinds of heads.

    Returns:
        The figure: one bar trace per kind of head, ``customdata`` names the head.
    """
    ranking = ranking or grid.ranking
    singles = numbers.single_records(grid)
    scores, note = _score_estimates(ranking, singles, intervals)
    kinds = numbers.head_kinds(grid, analysis)
    figure = go.Figure()
    for kind, heads in numbers.by_kind(kinds, ranking.heads[:top]):
        shape = {"shape": "/" if kind == "rewired" else "", "fillmode": "overlay", "size": 6}
        figure.add_bar(
            name=kind,
            orientation="h",
            y=[grid.label(head) for head in heads],
            x=[scores[head].value for head in heads],
            error_x=numbers.error_bars([scores[head] for head in heads]),
            customdata=[grid.label(head) for head in heads],
            marker={"color": theme.KINDS[kind][0], "pattern": shape},
            **theme.hover([_hover(singles[head], kind, ranking) for head in heads]),
        )
    labels = [grid.label(head) for head in ranking.heads[:top]]
    figure.update_layout(barmode="overlay", bargap=0.25)
    theme.rows_of(figure, labels)
    title = AXIS_TITLES.get(ranking.method, f"score by {theme.plain(ranking.method)}")
    figure.update_xaxes(title_text=title, nticks=7)
    return theme.frame(
        figure,
        f"Heads of layer {grid.settings.layer}, best first",
        numbers.grid_setting(grid, note, kinds.rule),
        theme.Layout(190 + 17 * max(6, len(labels))),
    )


def _hover(single: ConditionRecord, kind: str, ranking: HeadRanking) -> str:
    rank = ranking.rank_of(single.heads[0])
    return f"{numbers.hover(single)}<br>{kind} · rank {rank} by {ranking.method}"


def _score_estimates(
    ranking: HeadRanking,
    singles: Sequence[ConditionRecord],
    intervals: Sequence[Ends | None] | None,
) -> tuple[list[Estimate], str]:
    """The score of each head in head order, and a note on its intervals."""
    values = ranking.by_head
    if intervals is not None:
        return list(map(_between, values, intervals)), "bars: 95% intervals"
    if ranking.method in AXIS_TITLES:
        own = [getattr(each, ranking.method) for each in singles]
        # The same method at another alpha, or on other prompts, is another set of numbers.
        measured, given = np.array([[each.value for each in own], values], dtype=float)
        if np.allclose(measured, given, rtol=1e-9, atol=1e-15, equal_nan=True):
            return own, numbers.INTERVAL_NOTE
    if ranking.standard_errors is None:
        return [Estimate(value) for value in values], "no intervals"
    errors = dict(zip(ranking.heads, ranking.standard_errors, strict=True))
    ends = [_normal_ends(value, errors[head]) for head, value in enumerate(values)]
    return list(map(_between, values, ends)), "bars: ± 1.96 standard errors"


def _between(value: float | None, ends: Ends | None) -> Estimate:
    return Estimate(value, None if ends is None else Interval(*ends, LEVEL, "given"))


def _normal_ends(value: float | None, error: float | None) -> Ends | None:
    if value is None or error is None:
        return None
    return value - 1.96 * error, value + 1.96 * error


RankRanges = Mapping[int, tuple[int, int]]
BY_INDEX = "head 3 of one layer is not head 3 of another: lines join equal indices only"


def rank_flow(
    grid: GridResult,
    rankings: Mapping[str, Sequence[int]],
    *,
    what: str = "rankings",
    alpha: str | None = None,
    top: int = 8,
    rank_ranges: Mapping[str, RankRanges] | None = None,
) -> go.Figure:
    """Rank of every head under several rankings, joined by a line per head.

    Args:
        grid: the grid the rankings belong to.
        rankings: head indices, best first, by the name of the ranking, in drawing order.
        what: what differs between the rankings, for the title: ``"blend strengths"``. Between
            ``"layers"``, heads are named by index, and the figure says that equal indices mean
            nothing.
        alpha: the blend strengths of the rankings, when they are not the grid's own.
        top: heads in colour: the best ``top`` of the first ranking; the others stay grey.
        rank_ranges: where 95% of a head's resampled ranks lie, by the name of the ranking and head,
            for rankings that were resampled.

    Returns:
        The figure: a line per head; ``meta`` names the head, and hover gives its single-head
        ``ΔKL`` at the grid's own alpha with its 95% interval.

    Raises:
        UserError: if there is no ranking.
    """
    if not rankings:
        raise UserError("there is no ranking to draw: give at least one.")
    orders = {theme.plain(name): list(heads) for name, heads in rankings.items()}
    ranges = [(rank_ranges or {}).get(name, {}) for name in rankings]
    names, first = list(orders), next(iter(orders.values()))
    by_index = what == "layers"
    labels = {head: f"H{head}" if by_index else grid.label(head) for head in first}
    effects = {} if by_index else _effects(grid)
    figure = go.Figure()
    places = [*enumerate(first)]
    # Grey lines first, so that the coloured ones lie on top.
    for place, head in places[top:] + places[:top]:
        ranks = [order.index(head) + 1 if head in order else None for order in orders.values()]
        spans = [_range(each.get(head)) for each in ranges]
        texts = [
            f"<b>{labels[head]}</b><br>rank {rank}{span} · {name}{effects.get(head, '')}"
            if rank
            else ""
            for name, rank, span in zip(names, ranks, spans, strict=True)
        ]
        figure.add_scatter(
            name=labels[head],
            meta=labels[head],
            x=names,
            y=ranks,
            cliponaxis=False,
            **_look(place if place < top else None),
            **theme.hover(texts),
        )
    steep_px = _flow_axes(figure, names, [f"{i} · {labels[h]}" for i, h in enumerate(first, 1)])
    return theme.frame(
        figure,
        f"Ranks of heads across {theme.plain(what)}",
        numbers.grid_setting(grid, *([BY_INDEX] if by_index else []), alpha=alpha),
        theme.Layout(
            170 + 16 * max(8, len(first)) + steep_px,
            rows=0,
            left_px=96,
            right_px=26,
            axis_px=24 + steep_px if steep_px else 34,
        ),
    )


def _flow_axes(figure: go.Figure, names: Sequence[str], ranks: Sequence[str]) -> int:
    """Names of rankings below and of ranks on the left; the height that steep names take, in px."""
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
        range=[len(ranks) + 0.7, 0.3],
        showgrid=False,
        zeroline=False,
        tickvals=list(range(1, len(ranks) + 1)),
        ticktext=list(ranks),
        tickfont_size=10,
    )
    return 7 * longest if steep else 0


def _effects(grid: GridResult) -> dict[int, str]:
    """A line of the hover for each head: its effect at the grid's own alpha."""
    alpha = f"at α = {grid.settings.patching.alpha:g}"
    return {
        head: f"<br>ΔKL alone {alpha}: {numbers.shown(single.delta, 'nats')}"
        for head, single in enumerate(numbers.single_records(grid))
    }


def _range(ends: tuple[int, int] | None) -> str:
    return "" if ends is None else f" (95% in {ends[0]} to {ends[1]})"


def _look(place: int | None) -> dict[str, object]:
    """How the line of the head at a place looks; grey without one."""
    if place is None:
        marker = {"size": 4, "symbol": "circle"}
        line = {"color": theme.GREY, "width": 1}
        return {"mode": "lines+markers", "line": line, "marker": marker, "opacity": 0.35}
    marker = {"size": 7, "symbol": theme.SYMBOLS[place % len(theme.SYMBOLS)]}
    line = {**theme.line_style(place), "width": 2.5}
    return {"mode": "lines+markers", "line": line, "marker": marker, "opacity": 1}
