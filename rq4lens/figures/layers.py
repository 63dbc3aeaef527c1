"""Layers side by side: effects of all heads, one ranking of them, each layer's coverage curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from rq4lens.analysis.effects.table import bootstrap_of
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate
from rq4lens.errors import UserError
from rq4lens.figures import theme
from rq4lens.figures.coverage import axes, curve_points
from rq4lens.figures.numbers import (
    ConditionNumbers,
    any_grid,
    error_bars,
    is_wide,
    layers_setting,
    lows,
    numbers_of,
    shown,
    single_head_numbers,
)
from rq4lens.figures.saved import HasRecord, Record, as_record, estimates
from rq4lens.results import ConditionResult, GridResult

HOVER_NOTE = "coverage in the hover: of the layer's own ΔKL of all heads"


@dataclass(frozen=True)
class Quantity:
    """One of the four quantities of the heatmap.

    Args:
        name: its name on the switch.
        attribute: its name in a condition's result.
        title: its name with its unit.
        signed: whether it has a sign, and so a scale with a middle.
    """

    name: str
    attribute: str
    title: str
    signed: bool

    def of(self, single: ConditionResult) -> float | None:
        """The quantity of one head."""
        value: float | None = getattr(single, self.attribute)
        return value


QUANTITIES = (
    Quantity("ΔKL", "delta", "ΔKL of the head alone (nats)", signed=True),
    Quantity("KL raw", "KL_raw", "KL_raw of the head alone (nats)", signed=False),
    Quantity("KL mapped", "KL_mapped", "KL_mapped of the head alone (nats)", signed=False),
    Quantity("drop", "drop_pct", "drop of the head alone (%), colours end at ±100", signed=True),
)


def layer_heatmap(
    grids: Mapping[int, GridResult],
    *,
    quantity: str = "delta",
    bootstrap: Bootstrap | None = None,
    dark: bool = False,
) -> go.Figure:
    """Every head of every layer, with a switch between ΔKL, KL_raw, KL_mapped and drop.

    Args:
        grids: the grid of each layer.
        quantity: what is shown first: ``"delta"``, ``"KL_raw"``, ``"KL_mapped"`` or ``"drop_pct"``.
        bootstrap: the resamples behind the intervals in the hover; made from the prompts when left
            out.
        dark: the dark template.

    Returns:
        The figure: a heatmap, layers downwards; ``customdata`` names the head.

    Raises:
        UserError: if there is no such quantity.
    """
    layers = sorted(grids)
    bootstrap = bootstrap or bootstrap_of(any_grid(grids))
    numbers = [single_head_numbers(grids[layer], bootstrap) for layer in layers]
    states = [_state(grids, q) for q in QUANTITIES]
    shown = _place_of(quantity)
    heads = range(any_grid(grids).n_heads)
    start = states[shown]
    figure = go.Figure(
        go.Heatmap(
            x=list(heads),
            y=[str(layer) for layer in layers],
            z=start["z"],
            zmin=start["zmin"],
            zmax=start["zmax"],
            colorscale=start["colorscale"],
            colorbar=theme.color_bar(start["title"]),
            customdata=[[each.label for each in row] for row in numbers],
            hovertext=[[each.hover for each in row] for row in numbers],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    figure.update_layout(updatemenus=[_switch(states, shown, dark=dark)])
    figure.update_xaxes(
        title_text="head (indices mean nothing across layers)",
        dtick=max(1, len(heads) // 8),
        tick0=0,
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        title_text="layer", type="category", autorange="reversed", showgrid=False, nticks=17
    )
    return theme.frame(
        figure,
        title="Every head of every layer",
        setting=layers_setting(grids, "each head patched alone", HOVER_NOTE),
        height_px=250 + max(220, 14 * len(layers)),
        rows=4,
        dark=dark,
    )


def _place_of(quantity: str) -> int:
    names = [each.attribute for each in QUANTITIES]
    if quantity not in names:
        raise UserError(f"the heatmap has no quantity {quantity!r}: choose {', '.join(names)}.")
    return names.index(quantity)


def _state(grids: Mapping[int, GridResult], quantity: Quantity) -> dict[str, Any]:
    """What the heatmap takes to show one quantity."""
    z = [[quantity.of(single) for single in grids[layer].singles] for layer in sorted(grids)]
    values = [value for row in z for value in row if value is not None]
    reach = max((abs(value) for value in values), default=1.0) or 1.0
    # A single head can make things a hundred times worse in percent; colours end at 100%.
    reach = min(reach, 100.0) if quantity.attribute == "drop_pct" else reach
    return {
        "name": quantity.name,
        "title": quantity.title,
        "z": z,
        "zmin": -reach if quantity.signed else 0.0,
        "zmax": reach,
        "colorscale": theme.DIVERGING if quantity.signed else theme.SEQUENTIAL_STEPS,
    }


def _switch(states: Sequence[dict[str, Any]], active: int, *, dark: bool) -> dict[str, Any]:
    return {
        "type": "buttons",
        "direction": "right",
        "active": active,
        "showactive": True,
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": 48, "l": 0},
        "font": {"size": 11, "color": "#222222"},
        "bgcolor": "#B8BDC6" if dark else "#F2F2F2",
        "bordercolor": "#8A8A8A",
        "buttons": [_button(state) for state in states],
    }


def _button(state: dict[str, Any]) -> dict[str, Any]:
    change = {name: [state[name]] for name in ("z", "zmin", "zmax", "colorscale")}
    return {
        "label": state["name"],
        "method": "restyle",
        "args": [{**change, "colorbar.title.text": [state["title"]]}, [0]],
    }


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
