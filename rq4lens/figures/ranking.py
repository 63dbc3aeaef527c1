"""Which heads matter: the heads of one layer as bars, best first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from rq4lens.analysis.statistics import Bootstrap, Estimate, Interval
from rq4lens.figures import theme
from rq4lens.figures.numbers import (
    INTERVAL_NOTE,
    KINDS,
    ConditionNumbers,
    Kind,
    error_bars,
    head_kinds,
    single_head_numbers,
)
from rq4lens.figures.saved import HasRecord, Record
from rq4lens.figures.setting import grid_setting
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
