"""Does a good map mean a causal head: held-out fit against the head's own effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import plotly.graph_objects as go

from rq4lens.analysis.records import ConditionRecord
from rq4lens.analysis.result import Analysis
from rq4lens.figures import theme
from rq4lens.figures.numbers import (
    by_kind,
    error_bars,
    grid_setting,
    head_kinds,
    hover,
    number,
    single_records,
)
from rq4lens.results import GridResult

Quality = Literal["r2", "cosine", "cka"]
Fit = Mapping[str, Any]

QUALITIES: dict[Quality, str] = {"r2": "R²", "cosine": "mean cosine", "cka": "linear CKA"}
PREDICTORS = {
    "fitted": "the map",
    "mean": "always the mean",
    "identity": "base z itself",
    "shuffled": "map of shuffled pairs",
}


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
    singles = single_records(grid)
    kinds = head_kinds(grid, analysis)
    fits = {row["head"]: row for row in diagnostics}
    figure = go.Figure()
    for kind, heads in by_kind(kinds, fits):
        own = [singles[head] for head in heads]
        figure.add_scatter(
            name=kind,
            x=[fits[head]["fitted"][quality] for head in heads],
            y=[each.delta.value for each in own],
            error_y=error_bars([each.delta for each in own]),
            mode="markers",
            customdata=[grid.label(head) for head in heads],
            marker=theme.kind_marker(kind),
            **theme.hover([_hover(singles[head], fits[head]) for head in heads]),
        )
    figure.update_xaxes(title_text=f"held-out {QUALITIES[quality]} of the map", nticks=8)
    figure.update_yaxes(title_text="ΔKL of the head alone (nats)")
    return theme.frame(
        figure,
        f"Map quality and causal effect, layer {grid.settings.layer}",
        grid_setting(grid, "fit measured on prompts held out of train", kinds.rule),
        theme.Layout(520),
    )


def _hover(single: ConditionRecord, fit: Fit) -> str:
    fits = [
        f"{name}: " + ", ".join(f"{QUALITIES[q]} {number(fit[key][q])}" for q in QUALITIES)
        for key, name in PREDICTORS.items()
        if key in fit
    ]
    return "<br>".join([hover(single), *fits])
