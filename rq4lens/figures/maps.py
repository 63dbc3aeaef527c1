"""Does a good map mean a causal head: held-out fit against the head's own effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import plotly.graph_objects as go

from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.figures import theme
from rq4lens.figures.numbers import (
    KINDS,
    ConditionNumbers,
    error_bars,
    grid_setting,
    head_kinds,
    number,
    single_head_numbers,
)
from rq4lens.figures.saved import HasRecord, Record
from rq4lens.results import GridResult

Quality = Literal["r2", "cosine", "cka"]

QUALITIES: dict[Quality, str] = {"r2": "R²", "cosine": "mean cosine", "cka": "linear CKA"}
PREDICTORS = {
    "fitted": "the map",
    "mean": "always the mean",
    "identity": "base z itself",
    "shuffled": "map of shuffled pairs",
}


def map_quality(
    grid: GridResult,
    diagnostics: Sequence[Record],
    *,
    quality: Quality = "r2",
    analysis: HasRecord | Record | None = None,
    bootstrap: Bootstrap | None = None,
    dark: bool = False,
) -> go.Figure:
    """How well the map predicts each head's held-out z, against the head's ``ΔKL``.

    Args:
        grid: the measured grid.
        diagnostics: held-out fit of each head of the main layer, as ``run.json`` keeps it:
            ``head`` and, for ``fitted``, ``mean``, ``identity`` and ``shuffled``, the ``r2``,
            ``cosine`` and ``cka``.
        quality: which of them stands on the x axis.
        analysis: an analysis of the grid, for the kinds of heads.
        bootstrap: the resamples; made from the grid's prompts when left out.
        dark: the dark template.

    Returns:
        The figure: a point per head, coloured by its kind.
    """
    numbers = single_head_numbers(grid, bootstrap)
    kinds, rule = head_kinds(grid, analysis, bootstrap)
    figure = go.Figure(
        [
            _points(
                [row for row in diagnostics if kinds[row["head"]] == kind], kind, numbers, quality
            )
            for kind in KINDS
            if kind in kinds
        ]
    )
    figure.update_xaxes(title_text=f"held-out {QUALITIES[quality]} of the map", nticks=8)
    figure.update_yaxes(title_text="ΔKL of the head alone (nats)")
    return theme.frame(
        figure,
        title=f"Map quality and causal effect, layer {grid.settings.layer}",
        setting=grid_setting(grid, "fit measured on prompts held out of train", rule),
        height_px=520,
        dark=dark,
    )


def _points(
    rows: Sequence[Record], kind: str, numbers: Sequence[ConditionNumbers], quality: Quality
) -> go.Scatter:
    heads = [numbers[row["head"]] for row in rows]
    return go.Scatter(
        name=kind,
        x=[row["fitted"][quality] for row in rows],
        y=[head.delta.value for head in heads],
        error_y=error_bars([head.delta for head in heads]),
        mode="markers",
        customdata=[head.label for head in heads],
        hovertext=[_hover(head, row) for head, row in zip(heads, rows, strict=True)],
        hovertemplate="%{hovertext}<extra></extra>",
        marker={
            "color": theme.KIND_COLORS[kind],
            "symbol": theme.KIND_SYMBOLS[kind],
            "size": 9,
        },
    )


def _hover(head: ConditionNumbers, row: Record) -> str:
    fits = [
        f"{name}: " + ", ".join(f"{QUALITIES[q]} {number(_value(row, key, q))}" for q in QUALITIES)
        for key, name in PREDICTORS.items()
        if key in row
    ]
    return "<br>".join([head.hover, *fits])


def _value(row: Record, predictor: str, quality: str) -> Any:
    return row[predictor][quality]
