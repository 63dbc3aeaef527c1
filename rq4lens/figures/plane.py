"""What happened to each head: the raw patch's damage against what is left of it after the map."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from rq4lens.analysis.statistics import Bootstrap
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
from rq4lens.results import GridResult

# Two names closer than this (share of the plot's width and height) would touch at 400 px.
_NAME_WIDTH, _NAME_HEIGHT = 0.17, 0.06
_MOST_NAMES = 10


def head_plane(
    grid: GridResult,
    analysis: HasRecord | Record | None = None,
    *,
    bootstrap: Bootstrap | None = None,
    dark: bool = False,
) -> go.Figure:
    """Each head of the main layer at (KL_raw, KL_mapped).

    Heads near the origin are idle; heads far right and low are re-coordinated, the map explains
    their change; heads near the diagonal are rewired, no linear map explains it. Above the
    diagonal the map makes things worse.

    Args:
        grid: the measured grid.
        analysis: an analysis of the grid, for the kinds of heads.
        bootstrap: the resamples; made from the grid's prompts when left out.
        dark: the dark template.

    Returns:
        The figure: one scatter trace per kind of head, ``customdata`` names the head.
    """
    numbers = single_head_numbers(grid, bootstrap)
    kinds, rule = head_kinds(grid, analysis, bootstrap)
    reach = 1.08 * max(_reach(n) for n in numbers) or 1.0
    named = _names(numbers, [grid.ranking.rank_of(head) for head in range(grid.n_heads)], reach)
    figure = go.Figure(
        [_diagonal(reach)]
        + [
            _points([n for n, own in zip(numbers, kinds, strict=True) if own == kind], kind, named)
            for kind in KINDS
            if kind in kinds
        ]
    )
    figure.update_xaxes(title_text="KL_raw of the head alone (nats)", range=[0, reach], nticks=7)
    figure.update_yaxes(title_text="KL_mapped (nats)", range=[0, reach], nticks=7)
    return theme.frame(
        figure,
        title=f"Heads of layer {grid.settings.layer}: raw against mapped",
        setting=grid_setting(grid, "dotted: KL_mapped = KL_raw", INTERVAL_NOTE, rule),
        height_px=560,
        legend_rows=theme.legend_rows(len(figure.data) - 1),
        dark=dark,
    )


def _reach(numbers: ConditionNumbers) -> float:
    ends = [numbers.condition.KL_raw, numbers.condition.KL_mapped]
    intervals = (numbers.KL_raw.interval, numbers.KL_mapped.interval)
    return max(ends + [interval.high for interval in intervals if interval is not None])


def _diagonal(reach: float) -> go.Scatter:
    return go.Scatter(
        name="no gain",
        x=[0, reach],
        y=[0, reach],
        mode="lines",
        line={"color": theme.GREY, "dash": "dot", "width": 1},
        hoverinfo="skip",
        showlegend=False,
    )


def _points(numbers: Sequence[ConditionNumbers], kind: Kind, named: frozenset[str]) -> go.Scatter:
    return go.Scatter(
        name=kind,
        x=[n.KL_raw.value for n in numbers],
        y=[n.KL_mapped.value for n in numbers],
        error_x=_faint(error_bars([n.KL_raw for n in numbers])),
        error_y=_faint(error_bars([n.KL_mapped for n in numbers])),
        mode="markers+text",
        text=[n.label if n.label in named else "" for n in numbers],
        textposition="top center",
        textfont={"size": 10},
        customdata=[n.label for n in numbers],
        hovertext=[f"{n.hover}<br>{kind}" for n in numbers],
        hovertemplate="%{hovertext}<extra></extra>",
        marker={"color": theme.KIND_COLORS[kind], "symbol": theme.KIND_SYMBOLS[kind], "size": 9},
    )


def _faint(bars: dict[str, object] | None) -> dict[str, object] | None:
    return (
        None if bars is None else {**bars, "width": 0, "color": theme.translucent(theme.GREY, 0.6)}
    )


def _names(
    numbers: Sequence[ConditionNumbers], ranks: Sequence[int], reach: float
) -> frozenset[str]:
    """The heads to name beside their point: largest KL_raw first, as long as no names touch."""
    order = sorted(
        zip(numbers, ranks, strict=True), key=lambda pair: (-pair[0].condition.KL_raw, pair[1])
    )
    places: list[tuple[float, float]] = []
    named: list[str] = []
    for candidate, _ in order:
        x, y = (candidate.condition.KL_raw / reach, candidate.condition.KL_mapped / reach)
        if len(named) < _MOST_NAMES and all(_apart(x, y, other) for other in places):
            named.append(candidate.label)
        places.append((x, y))
    return frozenset(named)


def _apart(x: float, y: float, other: tuple[float, float]) -> bool:
    return abs(x - other[0]) > _NAME_WIDTH or abs(y - other[1]) > _NAME_HEIGHT
