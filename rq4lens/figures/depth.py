"""Layers side by side: one ranking of all their heads, and each layer's own coverage curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from rq4lens.analysis.metrics import bootstrap_of
from rq4lens.analysis.statistics import Bootstrap, Estimate
from rq4lens.figures import theme
from rq4lens.figures.coverage import axes, curve_points
from rq4lens.figures.numbers import ConditionNumbers, error_bars, numbers_of, shown
from rq4lens.figures.saved import HasRecord, Record, as_record, estimates
from rq4lens.figures.scales import is_wide, lows
from rq4lens.figures.setting import any_grid, layers_setting
from rq4lens.results import GridResult

_ROW_PX = 17
Points = list[tuple[int, Estimate]]


def global_ranking(
    grids: Mapping[int, GridResult],
    comparison: HasRecord | Record | None = None,
    *,
    top: int = 30,
    bootstrap: Bootstrap | None = None,
    dark: bool = False,
) -> go.Figure:
    """The best heads of all layers in one ranking by single-head ``ΔKL``.

    Args:
        grids: the grid of each layer.
        comparison: the comparison of these layers by the analysis, live or saved; its ranges of
            ranks go into the hover.
        top: how many heads to show.
        bootstrap: the resamples; made from the prompts when left out.
        dark: the dark template.

    Returns:
        The figure: a mark per head, coloured by its layer; ``customdata`` names the head.
    """
    bootstrap = bootstrap or bootstrap_of(any_grid(grids))
    best = _best(grids, top, bootstrap)
    span = (min(grids), max(grids))
    figure = go.Figure([_marks(best, span, _rank_ranges(comparison)), _depth_scale(*span)])
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=[numbers.label for _, numbers in best],
        range=[len(best) - 0.5, -0.5],
        type="category",
        dtick=1,
        showgrid=False,
    )
    figure.update_xaxes(**_effect_axis(best))
    return theme.frame(
        figure,
        title=f"The best {len(best)} heads of all layers",
        setting=layers_setting(
            grids, "bars: 95% bootstrap intervals over prompts, one head at a time"
        ),
        height_px=210 + _ROW_PX * max(6, len(best)),
        rows=2,
        dark=dark,
    )


def _effect_axis(best: Sequence[tuple[int, ConditionNumbers]]) -> dict[str, Any]:
    if not is_wide(lows(numbers.delta for _, numbers in best)):
        title = "ΔKL of the head alone (nats)"
        return {"title_text": title, "nticks": 7, "rangemode": "tozero"}
    title = "ΔKL of the head alone (nats, logarithmic)"
    return {"title_text": title, "type": "log", "dtick": 1, "exponentformat": "power"}


def _best(
    grids: Mapping[int, GridResult], top: int, bootstrap: Bootstrap
) -> list[tuple[int, ConditionNumbers]]:
    """Layer and numbers of the best heads of all layers; ties break by layer, then by head."""
    everyone = [(layer, head) for layer in sorted(grids) for head in range(grids[layer].n_heads)]
    order = sorted(everyone, key=lambda pair: -grids[pair[0]].single(pair[1]).delta)[:top]
    numbers: dict[tuple[int, int], ConditionNumbers] = {}
    for layer in {layer for layer, _ in order}:
        grid, heads = grids[layer], [head for own, head in order if own == layer]
        singles, labels = (
            [grid.single(head) for head in heads],
            [grid.label(head) for head in heads],
        )
        rows = numbers_of(grid, singles, labels, bootstrap)
        numbers |= {(layer, head): row for head, row in zip(heads, rows, strict=True)}
    return [(layer, numbers[layer, head]) for layer, head in order]


def _rank_ranges(comparison: HasRecord | Record | None) -> dict[str, str]:
    """The 95% range of each head's rank, in words."""
    return {
        row["head"]: f" (95% in {row['rank_low']} to {row['rank_high']})"
        for row in as_record(comparison).get("ranking", ())
        if row.get("rank_low") is not None
    }


def _marks(
    best: Sequence[tuple[int, ConditionNumbers]], span: tuple[int, int], ranges: Mapping[str, str]
) -> go.Scatter:
    return go.Scatter(
        x=[numbers.delta.value for _, numbers in best],
        y=[numbers.label for _, numbers in best],
        error_x=error_bars([numbers.delta for _, numbers in best]),
        mode="markers",
        cliponaxis=False,
        customdata=[numbers.label for _, numbers in best],
        hovertext=[
            f"{numbers.hover}<br>rank {rank} of all layers{ranges.get(numbers.label, '')}"
            for rank, (_, numbers) in enumerate(best, 1)
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        marker={"size": 10, "color": [_depth_color(layer, *span) for layer, _ in best]},
    )


def layer_curves(
    grids: Mapping[int, GridResult],
    comparison: HasRecord | Record | None = None,
    *,
    main: int | None = None,
    bootstrap: Bootstrap | None = None,
    dark: bool = False,
) -> go.Figure:
    """Coverage curves of the layers side by side, each relative to its own full effect.

    Args:
        grids: the grid of each layer.
        comparison: the comparison of these layers by the analysis, live or saved; its curves have
            every k, the grids' only the measured ones.
        main: a layer to draw bold.
        bootstrap: the resamples; made from the prompts when left out.
        dark: the dark template.

    Returns:
        The figure: a line per layer whose coverage is defined, with 95% intervals in the hover; the
        setting line names the other layers.
    """
    bootstrap = bootstrap or bootstrap_of(any_grid(grids))
    saved = _saved_curves(comparison)
    curves = {
        layer: saved.get(layer) or curve_points(grids[layer], bootstrap) for layer in sorted(grids)
    }
    undefined = [str(layer) for layer, points in curves.items() if not points]
    span = (min(grids), max(grids))
    figure = go.Figure(
        [
            _curve(layer, curves[layer], span, bold=layer == main)
            for layer in curves
            if curves[layer]
        ]
    )
    figure.add_trace(_depth_scale(*span))
    axes(figure, any_grid(grids).n_heads)
    notes = ["each layer relative to its own ΔKL of all heads"]
    if undefined:
        notes.append(f"coverage undefined in layers {', '.join(undefined)}")
    return theme.frame(
        figure,
        title="Coverage curves of the layers",
        setting=layers_setting(grids, *notes),
        height_px=520,
        rows=2,
        dark=dark,
    )


def _saved_curves(comparison: HasRecord | Record | None) -> dict[int, Points]:
    """Coverage at every k of each layer whose curve was measured and is defined."""
    rows = as_record(comparison).get("rows", ())
    curves = {row["layer"]: row["curve"]["coverage_pct"] for row in rows if row.get("curve")}
    return {
        layer: [(k, each) for k, each in enumerate(estimates(curve)) if each.value is not None]
        for layer, curve in curves.items()
    }


def _curve(layer: int, points: Points, span: tuple[int, int], *, bold: bool) -> go.Scatter:
    return go.Scatter(
        name=f"layer {layer}",
        meta=f"L{layer}",
        x=[k for k, _ in points],
        y=[coverage.value for _, coverage in points],
        mode="lines+markers",
        line={
            "color": _depth_color(layer, *span),
            "width": 4 if bold else 1.5,
        },
        marker={"size": 8 if bold else 5},
        hovertext=[
            f"<b>layer {layer}</b><br>k = {k}: coverage {shown(coverage, '%')}"
            for k, coverage in points
        ],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _depth_color(layer: int, first: int, last: int) -> str:
    place = (layer - first) / max(1, last - first)
    return str(sample_colorscale(theme.DEPTH, [place])[0])


def _depth_scale(first: int, last: int) -> go.Scatter:
    """An invisible point that carries the colour bar of the layers."""
    return go.Scatter(
        x=[None],
        y=[None],
        mode="markers",
        hoverinfo="skip",
        marker={
            "color": [first],
            "cmin": first,
            "cmax": last,
            "colorscale": theme.DEPTH,
            "colorbar": theme.color_bar("layer"),
            "showscale": True,
        },
    )
