"""Which heads come first, and does the ranking hold under others of the same heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from rq4lens.analysis.records import Analysis, ConditionRecord, HeadKinds
from rq4lens.analysis.statistics.bootstrap import Estimate, Interval
from rq4lens.config import RankBy
from rq4lens.errors import UserError
from rq4lens.figures import numbers, theme
from rq4lens.figures.numbers import Quantity
from rq4lens.results import METRIC_TRANSFERS, TRANSFERS, GridResult, HeadRanking

SCORES = {
    "to_base": Quantity("undoes", "to_base_pct", "undoes of the gap, alone at strength 1 (%)"),
    "to_tuned": Quantity("gives base", "to_tuned_pct", "gives base, alone at strength 1 (%)"),
    "metric": Quantity("metric", "metric_pct", "undoes of the metric, alone at strength 1 (%)"),
    "metric_to_tuned": Quantity(
        "metric, to tuned", "metric_to_tuned_pct", "gives base of the metric, at strength 1 (%)"
    ),
    "delta": Quantity("ΔKL", "delta", "ΔKL of the head alone (nats)"),
    "kl_raw": Quantity("KL_raw", "KL_raw_mean", "KL_raw of the head alone (nats)"),
    "drop_pct": Quantity("drop", "drop_pct", "drop of the head alone (%)"),
}
FIRST_VIEWS: tuple[RankBy, ...] = ("to_base", "delta", "kl_raw")
CAPTION = (
    "The longest bar is the head that alone takes the tuned model furthest back to base; a mark "
    "far right says that it also takes base far towards the tuned model."
)
OWN_CAPTION = "The longest bar is the head with the largest score."
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
        ranking: an order and its scores; when left out, a switch between ``to_base`` (with
            ``to_tuned`` beside it), ``ΔKL``, ``KL_raw`` and the grid's own ranking.
        intervals: interval of the score of head 0, 1, 2, ...; when left out, bootstrap intervals
            for the grid's own scores, or the ranking's standard errors.
        top: show only the best ``top`` heads.
        analysis: an analysis of the grid, for the kinds of heads.

    Returns:
        The figure: bars, and marks of ``to_tuned``; ``customdata`` names the head.
    """
    singles = numbers.single_records(grid)
    kinds = numbers.told_kinds(analysis)
    given = _rankings(grid, singles) if ranking is None else [ranking]
    scores = [_score_estimates(each, singles, intervals) for each in given]
    views = [
        _view(each, estimates, singles, kinds, top)
        for each, (estimates, _) in zip(given, scores, strict=True)
    ]
    (bars, marks, axes), carries = views[0], given[0].method == "to_base" and ranking is None
    figure = go.Figure([go.Bar(**bars), go.Scatter(**marks)])
    figure.update_layout(barmode="overlay", bargap=0.25, **axes)
    theme.switch(figure, [_button(*view) for view in views])
    return theme.frame(
        figure,
        f"Heads of layer {grid.settings.layer}, best first",
        numbers.grid_setting(grid, scores[0][1], numbers.kinds_rule(kinds)),
        theme.Layout(190 + 17 * max(6, len(bars["y"])), left_px=126 if kinds else 66),
        caption=CAPTION if carries else OWN_CAPTION,
    )


def _rankings(grid: GridResult, singles: Sequence[ConditionRecord]) -> list[HeadRanking]:
    """The rankings of the switch: what heads carry first, as far as that is defined."""
    names = dict.fromkeys((*FIRST_VIEWS, grid.settings.patching.rank_by))
    swapped = TRANSFERS | METRIC_TRANSFERS
    known = [
        name
        for name in names
        if name not in swapped or getattr(singles[0], SCORES[name].field).value is not None
    ]
    return [grid.ranking_by(name) for name in known]


def _button(bars: dict[str, Any], marks: dict[str, Any], axes: dict[str, Any]) -> dict[str, Any]:
    """The button that shows this order of the heads."""
    keys = ("name", "y", "x", "customdata", "error_x", "hovertext", "marker", "visible")
    both = {**bars, "visible": True}, marks
    change = {key: [each.get(key) for each in both] for key in keys}
    return theme.button(bars["name"], change, axes)


def _view(
    ranking: HeadRanking,
    estimates: Sequence[Estimate],
    singles: Sequence[ConditionRecord],
    kinds: HeadKinds | None,
    top: int | None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """One order of the heads, by the scores of all: a bar and a mark for each, and the axes."""
    heads, method = ranking.heads[:top], ranking.method
    named = theme.plain(method)
    score = SCORES.get(method) or Quantity(named, method, f"score by {named}")
    kind = {head: kinds.heads[head].kind for head in heads} if kinds else {}
    labels = [numbers.label_of(singles[head]) for head in heads]
    scores = [estimates[head] for head in heads]
    # Shares of the gap stand on a plain axis; effects that span decades do not.
    values = [each.value or 0.0 for each in scores]
    scale = None if score.title.endswith("(%)") else numbers.SignedLog.of(values)
    placed = [scale.estimate(each) for each in scores] if scale else scores
    texts = [
        f"{numbers.hover(singles[head])}<br>{f'{kind[head]} · ' if kind else ''}"
        f"rank {rank} by {method}"
        for rank, head in enumerate(heads, 1)
    ]
    rows = {"y": labels, "customdata": labels, **theme.hover(texts)}
    bars = {
        "name": score.name,
        "orientation": "h",
        "marker": {"color": [theme.KINDS[kind.get(head, "recoded")][0] for head in heads]},
        "x": [each.value for each in placed],
        "error_x": numbers.error_bars(placed),
        **rows,
    }
    # The other direction, which stands beside ``to_base`` alone.
    marks = {
        "name": SCORES["to_tuned"].name,
        "mode": "markers",
        "marker": {"symbol": "diamond-open", "size": 9, "color": theme.INK, "line": {"width": 1.5}},
        "visible": method == "to_base",
        "cliponaxis": False,
        "x": [singles[head].to_tuned_pct.value for head in heads],
        **rows,
    }
    names = [
        f"{label} {kind.get(head, '')}".strip() for label, head in zip(labels, heads, strict=True)
    ]
    # Said outright, or plotly's script takes the step of the rows instead.
    ticks = {"tickmode": "array", "tickvals": labels, "ticktext": names}
    axes = {
        "xaxis": _score_axis(score.title, scores, scale),
        "yaxis": {**theme.rows(labels), **ticks},
    }
    return bars, marks, axes


def _score_axis(
    title: str, scores: Sequence[Estimate], scale: numbers.SignedLog | None
) -> dict[str, Any]:
    values = [each.value or 0.0 for each in scores]
    highs = [each.interval.high for each in scores if each.interval is not None]
    ticks = numbers.SignedLog.axis(scale, min(0.0, *values), max([*values, *highs]))
    if scale is None:
        return {"title": {"text": title}, "nticks": 7, **ticks}
    title = title.replace("(nats)", f"(nats, logarithmic above {scale.unit:g})")
    return {"title": {"text": title}, **ticks}


def _score_estimates(
    ranking: HeadRanking,
    singles: Sequence[ConditionRecord],
    intervals: Sequence[Ends | None] | None,
) -> tuple[list[Estimate], str]:
    """The score of each head in head order, and a note on its intervals."""
    values, note = ranking.by_head, "bars: 95% intervals"
    if intervals is None and ranking.method in SCORES:
        own = [getattr(each, SCORES[ranking.method].field) for each in singles]
        # The same method at another alpha, or on other prompts, is another set of numbers.
        measured, given = np.array([[each.value for each in own], values], dtype=float)
        if np.allclose(measured, given, rtol=1e-9, atol=1e-12, equal_nan=True):
            return own, numbers.INTERVAL_NOTE
    if intervals is None and ranking.standard_errors is None:
        return [Estimate(value) for value in values], "no intervals"
    if intervals is None:
        intervals, note = _normal_ends(ranking), "bars: ± 1.96 standard errors"
    return [
        Estimate(value, None if ends is None else Interval(*ends))
        for value, ends in zip(values, intervals, strict=True)
    ], note


def _normal_ends(ranking: HeadRanking) -> list[Ends | None]:
    """The ends of each head's interval, in head order."""
    ends: list[Ends | None] = [None] * ranking.n_heads
    scored = zip(ranking.heads, ranking.scores, ranking.standard_errors or (), strict=True)
    for head, score, error in scored:
        if score is not None and error is not None:
            ends[head] = (score - 1.96 * error, score + 1.96 * error)
    return ends


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
        spans = [
            " (95% in {} to {})".format(*each[head]) if head in each else "" for each in ranges
        ]
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
            **theme.look(place if place < top else None).trace,
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
        caption="A line that stays level is a head whose rank does not depend on the choice; "
        "lines that cross are ranks that no one of these settles.",
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
