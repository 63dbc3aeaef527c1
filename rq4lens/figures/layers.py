"""Layers side by side: one ranking of all heads, each layer's coverage curve, studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from rq4lens.analysis.records import CellRow, ConditionRecord, LayerComparison
from rq4lens.config import RankBy
from rq4lens.figures import numbers, theme
from rq4lens.figures.coverage import axes, curve_points
from rq4lens.figures.heatmaps import QUANTITIES
from rq4lens.heads import Head
from rq4lens.results import GridResult

if TYPE_CHECKING:
    from rq4lens.analysis.structure.layers import GridNumber


def global_ranking(
    grids: Mapping[int, GridResult], comparison: LayerComparison | None = None, *, top: int = 30
) -> go.Figure:
    """The best heads of all layers in one ranking, with a switch from ``to_base`` to ``ΔKL``.

    Args:
        grids: the grid of each layer.
        comparison: the comparison of these layers by the analysis; its ranges of ranks by ``ΔKL``
            go into the hover.
        top: how many heads to show.

    Returns:
        The figure: a mark per head, coloured by its layer; ``customdata`` names the head.
    """
    span = (min(grids), max(grids))
    # All layers have the same gap.
    (any_head,) = numbers.single_records(grids[min(grids)], [0])
    scores: list[RankBy] = ["delta"] if any_head.to_base_pct.value is None else ["to_base", "delta"]
    views = {name: _ranked(_best(grids, name, top), name, comparison, span) for name in scores}
    marks, axis = views[scores[0]]
    look = {"mode": "markers", "cliponaxis": False, **theme.hover(None)}
    figure = go.Figure([go.Scatter({**look, **marks}), _depth_scale(span)])
    figure.update_layout(xaxis=axis, yaxis=theme.rows(marks["y"]))
    theme.switch(figure, [_button(QUANTITIES[name].name, *view) for name, view in views.items()])
    n = len(marks["y"])
    return theme.frame(
        figure,
        f"The best {n} heads of all layers",
        numbers.layers_setting(
            grids, "bars: 95% bootstrap intervals over prompts, one head at a time"
        ),
        theme.Layout(210 + 17 * max(6, n), rows=2),
        caption="Marks of one colour at the top are one layer that holds the largest effects.",
    )


def _best(grids: Mapping[int, GridResult], score: RankBy, top: int) -> list[ConditionRecord]:
    """The best heads of all layers; ties break by layer, then by head."""
    scored = [
        (value or 0.0, grid, head)
        for _, grid in sorted(grids.items())
        for head, value in enumerate(grid.ranking_by(score).by_head)
    ]
    scored.sort(key=lambda each: -each[0])
    return [numbers.single_records(grid, [head])[0] for _, grid, head in scored[:top]]


def _button(label: str, marks: dict[str, Any], axis: dict[str, Any]) -> dict[str, Any]:
    """The button that shows these marks."""
    axes = {"xaxis": {**theme.PLAIN_AXIS, **axis}, "yaxis": theme.rows(marks["y"])}
    return theme.button(label, {name: [value] for name, value in marks.items()}, axes, [0])


def _ranked(
    best: Sequence[ConditionRecord],
    score: RankBy,
    comparison: LayerComparison | None,
    span: tuple[int, int],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One order of the heads of all layers: a mark for each, and the axis."""
    quantity, labels = QUANTITIES[score], [numbers.label_of(each) for each in best]
    values = [getattr(each, quantity.field) for each in best]
    ranges = {
        row.head.label: f" (95% in {row.rank_low} to {row.rank_high})"
        for row in (comparison.ranking if comparison and score == "delta" else ())
        if row.rank_low is not None
    }
    marks = {
        "x": [value.value for value in values],
        "y": labels,
        "error_x": numbers.error_bars(values),
        "customdata": labels,
        "marker": {
            "size": 10,
            "color": [_color(Head.parse(label).layer, span) for label in labels],
        },
        "hovertext": [
            f"{numbers.hover(each)}<br>rank {rank} of all layers{ranges.get(label, '')}"
            for rank, (each, label) in enumerate(zip(best, labels, strict=True), 1)
        ],
    }
    if score == "delta":
        return marks, numbers.effect_axis("ΔKL of the head alone", values)
    return marks, {"title_text": quantity.title, "rangemode": "tozero"}


def layer_curves(
    grids: Mapping[int, GridResult],
    comparison: LayerComparison | None = None,
    *,
    main: int | None = None,
) -> go.Figure:
    """Coverage curves of the layers side by side, each relative to its own full effect.

    Args:
        grids: the grid of each layer.
        comparison: the comparison of these layers by the analysis; its curves have every k, the
            grids' only the measured ones.
        main: a layer to draw bold.

    Returns:
        The figure: a line per layer whose coverage is defined, with 95% intervals in the hover; the
        setting line names the other layers.
    """
    compared = {
        row.layer: row.curve for row in (comparison.rows if comparison else ()) if row.curve
    }
    undefined: list[str] = []
    span = (min(grids), max(grids))
    figure = go.Figure()
    for layer, grid in sorted(grids.items()):
        points = curve_points(grid)
        if curve := compared.get(layer):
            points = [(k, e) for k, e in enumerate(curve.coverage_pct) if e.value is not None]
        if not points:
            undefined.append(str(layer))
            continue
        named = f"<b>layer {layer}</b><br>k ="
        marks = [
            numbers.Point(k, share, f"{named} {k}: coverage {numbers.shown(share, '%')}")
            for k, share in points
        ]
        width, size = (4, 8) if layer == main else (1.5, 5)
        look = theme.Look(_color(layer, span), width=width, size=size)
        trace = numbers.line(f"layer {layer}", marks, look, bars=False)
        figure.add_trace(trace.update(meta=f"L{layer}"))
    figure.add_trace(_depth_scale(span))
    axes(figure, grids[min(grids)].n_heads)
    notes = ["each layer relative to its own ΔKL of all heads"]
    if undefined:
        notes.append(f"coverage undefined in layers {', '.join(undefined)}")
    return theme.frame(
        figure,
        "Coverage curves of the layers",
        numbers.layers_setting(grids, *notes),
        theme.Layout(520, rows=2),
        caption="A steep start is a layer whose repair lies on few heads.",
    )


def _color(layer: int, span: tuple[int, int]) -> str:
    place = (layer - span[0]) / max(1, span[1] - span[0])
    return str(sample_colorscale(theme.DEPTH, [place])[0])


def _depth_scale(span: tuple[int, int]) -> go.Scatter:
    """An invisible point that carries the colour bar of the layers."""
    return go.Scatter(
        x=[None],
        y=[None],
        mode="markers",
        hoverinfo="skip",
        marker={
            "color": [span[0]],
            "cmin": span[0],
            "cmax": span[1],
            "colorscale": theme.DEPTH,
            "colorbar": theme.color_bar("layer"),
            "showscale": True,
        },
    )


def study_layers(
    rows: Sequence[CellRow], setting: Sequence[str], metrics: Sequence[GridNumber]
) -> go.Figure:
    """A metric of all heads against the layer, a line per cell of the study."""
    cells, lead = list(dict.fromkeys(row.cell for row in rows)), metrics[0]
    same_depth = len({row.n_layers for row in rows}) == 1
    figure = go.Figure()
    for place, cell in enumerate(cells):
        own = sorted((row for row in rows if row.cell == cell), key=lambda row: row.layer)
        name = theme.plain(cell)
        points = [
            numbers.Point(
                row.layer if same_depth else row.layer / max(1, row.n_layers - 1),
                row.values[lead.name],
                f"{name}<br>{_study_text(row, metrics)}",
            )
            for row in own
        ]
        figure.add_trace(numbers.line(name, points, theme.look(place)))
    if same_depth:
        step = max(1, len({row.layer for row in rows}) // 12)
        figure.update_xaxes(title_text="layer", tick0=0, dtick=step)
    else:
        figure.update_xaxes(title_text="relative depth (0 first layer, 1 last)")
    # Logarithmic where one layer would hide the others.
    effects = [row.values[lead.name] for row in rows]
    title = f"{lead.label} of all heads"
    in_percent = {"title_text": lead.title, "rangemode": "tozero"}
    figure.update_yaxes(in_percent if lead.unit == "%" else numbers.effect_axis(title, effects))
    return theme.frame(
        figure,
        f"{lead.label} of each layer",
        [*setting, "bars: 95% bootstrap intervals over prompts"],
        theme.Layout(480 + 21 * max(0, len(cells) - 4)),
        caption="A peak is a layer whose heads carry the change.",
    )


def _study_text(row: CellRow, metrics: Sequence[GridNumber]) -> str:
    lines = [f"layer {row.layer}"]
    for metric in metrics:
        value = row.values[metric.name].value
        unit = "" if metric.unit == "%" or value is None else f" {metric.unit}"
        lines.append(f"{metric.label} {metric.text(value)}{unit}")
    return "<br>".join(lines)
