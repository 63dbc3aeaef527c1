"""Where the change lies: every head of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from rq4lens.analysis.metrics import bootstrap_of
from rq4lens.analysis.statistics import Bootstrap
from rq4lens.errors import UserError
from rq4lens.figures import theme
from rq4lens.figures.numbers import single_head_numbers
from rq4lens.figures.setting import any_grid, layers_setting
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
