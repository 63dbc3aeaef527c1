"""Where in depth the change lies: every head of every layer, and the layers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from rq4lens.analysis.metrics import bootstrap_of
from rq4lens.analysis.statistics import Bootstrap
from rq4lens.figures import theme
from rq4lens.figures.coverage import axes, curve_points
from rq4lens.figures.numbers import ConditionNumbers, error_bars, numbers_of
from rq4lens.figures.setting import setting_parts
from rq4lens.results import ConditionResult, GridResult

_ROW_PX = 17


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
    grids: Mapping[int, GridResult], *, quantity: str = "delta", dark: bool = False
) -> go.Figure:
    """Every head of every layer, with a switch between ΔKL, KL_raw, KL_mapped and drop.

    Args:
        grids: the grid of each layer.
        quantity: what is shown first: ``"delta"``, ``"KL_raw"``, ``"KL_mapped"`` or ``"drop_pct"``.
        dark: the dark template.

    Returns:
        The figure: a heatmap, layers downwards; ``customdata`` names the head.
    """
    layers = sorted(grids)
    states = [_state(grids, q) for q in QUANTITIES]
    shown = next(i for i, q in enumerate(QUANTITIES) if q.attribute == quantity)
    heads = range(_any(grids).n_heads)
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
            customdata=[[grids[layer].label(head) for head in heads] for layer in layers],
            hovertext=[[_hover(grids[layer], head) for head in heads] for layer in layers],
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
    framed = theme.frame(
        figure,
        title="Every head of every layer",
        setting=_setting(grids, "each head patched alone"),
        height_px=250 + max(220, 14 * len(layers)),
        legend_rows=4,
        dark=dark,
    )
    return framed.update_layout(showlegend=False)


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


def _hover(grid: GridResult, head: int) -> str:
    single = grid.single(head)
    drop = "undefined" if single.drop_pct is None else f"{single.drop_pct:.3g}%"
    return (
        f"<b>{grid.label(head)}</b><br>ΔKL {single.delta:.3g} nats"
        f"<br>KL_raw {single.KL_raw:.3g} nats<br>KL_mapped {single.KL_mapped:.3g} nats"
        f"<br>drop {drop}"
    )


def global_ranking(
    grids: Mapping[int, GridResult],
    *,
    top: int = 30,
    bootstrap: Bootstrap | None = None,
    dark: bool = False,
) -> go.Figure:
    """The best heads of all layers in one ranking by single-head ``ΔKL``.

    Args:
        grids: the grid of each layer.
        top: how many heads to show.
        bootstrap: the resamples; made from the prompts when left out.
        dark: the dark template.

    Returns:
        The figure: a bar per head, coloured by its layer; ``customdata`` names the head.
    """
    bootstrap = bootstrap or bootstrap_of(_any(grids))
    best = _best(grids, top, bootstrap)
    span = (min(grids), max(grids))
    figure = go.Figure([_bars(best, *span), _depth_scale(*span)])
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=[numbers.label for _, numbers in best],
        range=[len(best) - 0.5, -0.5],
        type="category",
        dtick=1,
        showgrid=False,
    )
    figure.update_xaxes(title_text="ΔKL of the head alone (nats)", nticks=7)
    framed = theme.frame(
        figure,
        title=f"The best {len(best)} heads of all layers",
        setting=_setting(grids, "bars: 95% bootstrap intervals over prompts, one head at a time"),
        height_px=210 + _ROW_PX * max(6, len(best)),
        legend_rows=2,
        dark=dark,
    )
    return framed.update_layout(showlegend=False, bargap=0.25)


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


def _bars(best: Sequence[tuple[int, ConditionNumbers]], first: int, last: int) -> go.Bar:
    return go.Bar(
        orientation="h",
        y=[numbers.label for _, numbers in best],
        x=[numbers.delta.value for _, numbers in best],
        # Grey would vanish on the middle of the colour scale.
        error_x=error_bars([numbers.delta for _, numbers in best], theme.VERMILLION),
        customdata=[numbers.label for _, numbers in best],
        hovertext=[
            f"{numbers.hover}<br>rank {rank} of all layers"
            for rank, (_, numbers) in enumerate(best, 1)
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        marker={"color": [_depth_color(layer, first, last) for layer, _ in best]},
    )


def layer_curves(
    grids: Mapping[int, GridResult],
    *,
    main: int | None = None,
    bootstrap: Bootstrap | None = None,
    dark: bool = False,
) -> go.Figure:
    """Coverage curves of the layers side by side, each relative to its own full effect.

    Args:
        grids: the grid of each layer.
        main: a layer to draw bold.
        bootstrap: the resamples; made from the prompts when left out.
        dark: the dark template.

    Returns:
        The figure: a line per layer whose coverage is defined; the setting line names the others.
    """
    bootstrap = bootstrap or bootstrap_of(_any(grids))
    curves = {layer: curve_points(grids[layer], bootstrap) for layer in sorted(grids)}
    undefined = [str(layer) for layer, points in curves.items() if not points]
    span = (min(grids), max(grids))
    figure = go.Figure(
        [
            _curve(layer, points, span, bold=layer == main)
            for layer, points in curves.items()
            if points
        ]
    )
    figure.add_trace(_depth_scale(*span))
    axes(figure, _any(grids).n_heads)
    notes = ["each layer relative to its own ΔKL of all heads"]
    if undefined:
        notes.append(f"coverage undefined in layers {', '.join(undefined)}")
    framed = theme.frame(
        figure,
        title="Coverage curves of the layers",
        setting=_setting(grids, *notes),
        height_px=520,
        legend_rows=2,
        dark=dark,
    )
    return framed.update_layout(showlegend=False)


def _curve(
    layer: int, points: Sequence[tuple[int, float]], span: tuple[int, int], *, bold: bool
) -> go.Scatter:
    return go.Scatter(
        name=f"layer {layer}",
        meta=f"L{layer}",
        x=[k for k, _ in points],
        y=[value for _, value in points],
        mode="lines+markers",
        line={
            "color": _depth_color(layer, *span),
            "width": 4 if bold else 1.5,
        },
        marker={"size": 8 if bold else 5},
        hovertemplate=f"<b>layer {layer}</b><br>k = %{{x}}: %{{y:.3g}}%<extra></extra>",
    )


def _depth_color(layer: int, first: int, last: int) -> str:
    place = (layer - first) / max(1, last - first)
    return str(sample_colorscale(theme.SEQUENTIAL, [place])[0])


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
            "colorscale": theme.SEQUENTIAL_STEPS,
            "colorbar": theme.color_bar("layer"),
            "showscale": True,
        },
    )


def _any(grids: Mapping[int, GridResult]) -> GridResult:
    return grids[min(grids)]


def _setting(grids: Mapping[int, GridResult], *notes: str) -> tuple[str, ...]:
    grid, layers = _any(grids), sorted(grids)
    whole = layers == list(range(layers[0], layers[-1] + 1))
    named = (
        f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))
    )
    where = f"layers {named} of {grid.settings.n_layers}"
    return setting_parts(grid.settings, grid.n_prompts, where=where, notes=notes)
