"""Heads as points: raw against mapped patch, fit of the map against effect, prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from rq4lens.analysis.records import Analysis, ConditionRecord
from rq4lens.analysis.statistics.bootstrap import Estimate
from rq4lens.figures import numbers, theme
from rq4lens.results import GridResult

# Two names closer than this (share of the plot's width and height) would touch at 400 px.
_NAME_WIDTH, _NAME_HEIGHT = 0.2, 0.06
_MOST_NAMES = 10
_EDGE = 0.15
_FAINT = {"color": theme.translucent(theme.GREY, 0.6), "width": 0}

Quality = Literal["r2", "cosine", "cka"]
Fit = Mapping[str, Any]

QUALITIES: dict[Quality, str] = {"r2": "R²", "cosine": "mean cosine", "cka": "linear CKA"}
PREDICTORS = {
    "fitted": "the map",
    "mean": "always the mean",
    "identity": "base z itself",
    "shuffled": "map of shuffled pairs",
}


def head_plane(grid: GridResult, analysis: Analysis | None = None) -> go.Figure:
    """Each head of the main layer at (KL_raw, KL_mapped).

    Heads near the origin do little; of heads far right and low the map repairs what base's own
    activation breaks, of heads near the diagonal it does not, and above it does harm. A constant
    can do the same, so the kinds come from the ladder.

    Args:
        grid: the measured grid.
        analysis: an analysis of the grid, for the kinds of heads.

    Returns:
        The figure: one scatter trace per kind of head, ``customdata`` names the head.
    """
    singles = numbers.single_records(grid)
    kinds = numbers.told_kinds(analysis)
    square = _Square.around(singles)
    named = _names(singles, square)
    figure = go.Figure()
    figure.add_scatter(
        name="no gain",
        x=[square.low, square.high],
        y=[square.low, square.high],
        mode="lines",
        line={"color": theme.GREY, "dash": "dot", "width": 1},
        hoverinfo="skip",
        showlegend=False,
    )
    for kind, heads in numbers.by_kind(kinds, range(grid.n_heads)):
        own = [singles[head] for head in heads]
        labels = [numbers.label_of(each) for each in own]
        texts = [f"{numbers.hover(each)}<br>{kind}" for each in own]
        both = ([each.KL_raw_mean for each in own], [each.KL_mapped_mean for each in own])
        figure.add_trace(_points(kind, labels, texts, *both))
        figure.data[-1].update(
            mode="markers+text",
            text=[label if label in named else "" for label in labels],
            textposition=[named.get(label, "top center") for label in labels],
            textfont={"size": 10},
        )
    scale = ", logarithmic" if square.is_log else ""
    figure.update_xaxes(title_text=f"KL_raw of the head alone (nats{scale})", **square.axis)
    figure.update_yaxes(title_text=f"KL_mapped (nats{scale})", **square.axis)
    return theme.frame(
        figure,
        f"Heads of layer {grid.settings.layer}: raw against mapped",
        numbers.grid_setting(
            grid, "dotted: KL_mapped = KL_raw", numbers.INTERVAL_NOTE, numbers.kinds_rule(kinds)
        ),
        theme.Layout(560),
        caption="Far right and low: base's own activation does damage, and the map repairs it. On "
        "the dotted line it repairs nothing.",
    )


@dataclass(frozen=True)
class _Square:
    """The same range on both axes: linear from 0, or logarithmic where heads span decades."""

    low: float
    high: float
    is_log: bool

    @classmethod
    def around(cls, singles: Sequence[ConditionRecord]) -> _Square:
        both = [estimate for n in singles for estimate in (n.KL_raw_mean, n.KL_mapped_mean)]
        values = [estimate.value for estimate in both if estimate.value is not None]
        high = max(values + [e.interval.high for e in both if e.interval is not None])
        if numbers.is_wide(values):
            return cls(min(values) / 2, high * 2, is_log=True)
        return cls(0.0, 1.08 * high or 1.0, is_log=False)

    @property
    def axis(self) -> dict[str, Any]:
        if not self.is_log:
            # A little room below 0, or marks at 0 would be cut in half.
            return {"range": [-0.02 * self.high, self.high], "nticks": 7}
        ends = [math.log10(self.low), math.log10(self.high)]
        return {
            "type": "log",
            "range": ends,
            "dtick": max(1, round((ends[1] - ends[0]) / 5)),
            "exponentformat": "power",
        }

    def share(self, value: float) -> float:
        """Where a value stands between the ends: 0 to 1."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return value / self.high


def _points(
    kind: str,
    labels: Sequence[str],
    texts: Sequence[str],
    x: Sequence[Estimate],
    y: Sequence[Estimate],
) -> go.Scatter:
    """The heads of one kind as points with their intervals."""
    color, symbol = theme.KINDS[kind]
    return go.Scatter(
        name=kind,
        x=[each.value for each in x],
        y=[each.value for each in y],
        error_x=numbers.error_bars(x, **_FAINT),
        error_y=numbers.error_bars(y, **_FAINT),
        mode="markers",
        customdata=labels,
        marker={"color": color, "symbol": symbol, "size": 9},
        **theme.hover(texts),
    )


def _names(singles: Sequence[ConditionRecord], square: _Square) -> dict[str, str]:
    """Which heads are named beside their point, and on which side.

    Largest KL_raw first, as long as no two names touch in a narrow window.
    """
    places: list[tuple[float, float]] = []
    named: dict[str, str] = {}
    for candidate in sorted(singles, key=lambda n: -(n.KL_raw_mean.value or 0.0)):
        x = square.share(candidate.KL_raw_mean.value or 0.0)
        y = square.share(candidate.KL_mapped_mean.value or 0.0)
        apart = (abs(x - a) > _NAME_WIDTH or abs(y - b) > _NAME_HEIGHT for a, b in places)
        if len(named) < _MOST_NAMES and all(apart):
            # The side on which the name stays inside the plot.
            across = "right" if x < _EDGE else "left" if x > 1 - _EDGE else "center"
            above = "bottom" if y > 1 - _EDGE / 2 else "top"
            named[numbers.label_of(candidate)] = f"{above} {across}"
        places.append((x, y))
    return named


def map_quality(
    grid: GridResult,
    diagnostics: Sequence[Fit],
    *,
    quality: Quality = "r2",
    analysis: Analysis | None = None,
) -> go.Figure:
    """How well the map predicts each head's held-out z, against the head's ``ΔKL``.

    Args:
        grid: the measured grid.
        diagnostics: held-out fit of each head of the main layer, as ``run.json`` keeps it:
            ``head`` and, for ``fitted``, ``mean``, ``identity`` and ``shuffled``, the ``r2``,
            ``cosine`` and ``cka``.
        quality: which of them stands on the x axis.
        analysis: an analysis of the grid, for the kinds of heads.

    Returns:
        The figure: a point per head, coloured by its kind.
    """
    singles = numbers.single_records(grid)
    kinds = numbers.told_kinds(analysis)
    fits = {row["head"]: row for row in diagnostics}
    figure = go.Figure()
    for kind, heads in numbers.by_kind(kinds, fits):
        labels = [grid.label(head) for head in heads]
        texts = [_fit_hover(singles[head], fits[head]) for head in heads]
        x = [Estimate(fits[head]["fitted"][quality]) for head in heads]
        y = [singles[head].delta for head in heads]
        figure.add_trace(_points(kind, labels, texts, x, y))
    figure.update_xaxes(title_text=f"held-out {QUALITIES[quality]} of the map", nticks=8)
    figure.update_yaxes(title_text="ΔKL of the head alone (nats)")
    return theme.frame(
        figure,
        f"Map quality and causal effect, layer {grid.settings.layer}",
        numbers.grid_setting(
            grid, "fit measured on prompts held out of train", numbers.kinds_rule(kinds)
        ),
        theme.Layout(520),
        caption="High and far left would be a head that does much though the map predicts it "
        "badly: prediction and effect are two things.",
    )


def _fit_hover(single: ConditionRecord, fit: Fit) -> str:
    fits = [
        f"{name}: " + ", ".join(f"{QUALITIES[q]} {numbers.number(fit[key][q])}" for q in QUALITIES)
        for key, name in PREDICTORS.items()
        if key in fit
    ]
    return "<br>".join([numbers.hover(single), *fits])


MOST_POINTS = 2_000
"""Prompts that are drawn of a head: more could not be told apart, and would fill the page."""


def per_prompt(
    grid: GridResult, heads: tuple[int, ...] | None = None, *, top: int = 8
) -> go.Figure:
    """Single-head ``ΔKL`` of every prompt, for the top heads.

    Args:
        grid: the measured grid.
        heads: the heads to show, first at the top; the best ``top`` of the grid's ranking when
            left out.
        top: how many heads to show then.

    Returns:
        The figure: a box and its points per head; hover names head and prompt, and gives the head's
        mean with its 95% interval.
    """
    heads = grid.ranking.top(top) if heads is None else heads
    values = np.concatenate([grid.single(head).delta_nats for head in heads])
    scale = numbers.SignedLog.of(values.tolist())
    figure = go.Figure([_box(grid, each, scale) for each in numbers.single_records(grid, heads)])
    figure.add_vline(x=0, line={"color": theme.GREY, "width": 1})
    figure.update_xaxes(title_text="ΔKL of the head alone, per prompt (nats)", nticks=7)
    many = grid.n_prompts > MOST_POINTS
    points = f"{MOST_POINTS:,} points, evenly through all prompts" if many else "a point a prompt"
    notes = [f"box: quartiles and median; {points}"]
    if scale is not None:
        figure.update_xaxes(numbers.SignedLog.axis(scale, float(values.min()), float(values.max())))
        notes.append(f"axis linear below {scale.unit:g} nats, logarithmic above")
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return theme.frame(
        figure,
        f"The best heads of layer {grid.settings.layer}, prompt by prompt",
        numbers.grid_setting(grid, *notes),
        theme.Layout(190 + 40 * max(3, len(heads)), rows=0),
        caption="A few points far from their box: few prompts carry the head's effect.",
    )


def _box(grid: GridResult, single: ConditionRecord, scale: numbers.SignedLog | None) -> go.Box:
    label, every = numbers.label_of(single), grid[single.cond].delta_nats
    # Evenly through their order: the box and the ends stay where they are.
    rows = np.argsort(every)[
        np.linspace(0, len(every) - 1, min(len(every), MOST_POINTS)).astype(int)
    ]
    values, ids = every[rows], [grid.prompt_ids[row] for row in rows]
    mean = f"mean of {grid.n_prompts} prompts {numbers.shown(single.delta, 'nats')}"
    return go.Box(
        name=label,
        orientation="h",
        x=[float(value) if scale is None else scale.place(value) for value in values],
        y=[label] * len(values),
        customdata=[label] * len(values),
        boxpoints="all",
        jitter=0.6,
        pointpos=0,
        hoveron="points",
        line={"color": theme.GREY, "width": 1.2},
        fillcolor="rgba(0,0,0,0)",
        marker={"size": 3.5, "opacity": 0.5, "color": theme.DELTA},
        **theme.hover(
            [
                f"<b>{label}</b><br>prompt {theme.plain(prompt)}<br>ΔKL {value:.3g} nats<br>{mean}"
                for prompt, value in zip(ids, values, strict=True)
            ]
        ),
    )
