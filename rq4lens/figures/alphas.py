"""Does the blend strength matter: all heads and the best ones at every alpha."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from rq4lens.analysis.records import SHUFFLED, AlphaPoint
from rq4lens.analysis.statistics.bootstrap import Estimate, undefined
from rq4lens.figures import theme
from rq4lens.figures.numbers import Point, effect_axis, grid_setting, line, shown
from rq4lens.results import GridResult

# The field of each quantity, and its line.
_NATS = {
    "KL_raw": ("KL_raw", theme.Look(theme.RAW, "square", "dash")),
    "KL_mapped": ("KL_mapped", theme.Look(theme.MAPPED, "circle", "solid")),
    "ΔKL": ("delta", theme.Look(theme.DELTA, "triangle-up", "dot")),
}
ALL_HEADS = "all heads"
_TOP_HEADS = 3
_AXES = {
    "undoes": "undoes of the gap (%)",
    "coverage": "coverage (% of ΔKL of all heads)",
}


def alpha_sweep(grid: GridResult, points: Sequence[AlphaPoint]) -> go.Figure:
    """What all heads and the best ones do against the blend strength.

    A switch shows the share of the gap that is undone (``to_base``), coverage of ``ΔKL``, or
    KL_raw, KL_mapped and ΔKL of all heads.

    Args:
        grid: the grid the sweep belongs to.
        points: the ``alphas`` of an analysis.

    Returns:
        The figure: a line per head or quantity.
    """
    figure = go.Figure()
    views = _views(grid, points)
    nats = [getattr(point, field) for point in points for field, _ in _NATS.values()]
    axes = [
        effect_axis(ALL_HEADS, nats)
        if name == "nats"
        else {"title_text": _AXES[name], "type": "linear", "rangemode": "tozero"}
        for name in views
    ]
    buttons = [theme.parts("yaxis", {**theme.PLAIN_AXIS, **axis}) for axis in axes]
    theme.add_views(figure, views, buttons)
    figure.add_vline(
        x=grid.settings.patching.alpha, line={"color": theme.GREY, "dash": "dot", "width": 1}
    )
    figure.update_xaxes(title_text="blend strength α", nticks=8)
    figure.update_yaxes(axes[0])
    return theme.frame(
        figure,
        f"Layer {grid.settings.layer} against the strength α",
        grid_setting(
            grid,
            f"dotted: the run's own α = {grid.settings.patching.alpha:g}",
            "bars: 95% bootstrap intervals over prompts",
            alpha=f"{points[0].alpha:g} to {points[-1].alpha:g}",
        ),
        caption=_caption(grid, points),
    )


def _caption(grid: GridResult, points: Sequence[AlphaPoint]) -> str:
    """What depends on the strength, in the numbers of this run."""
    (head, *_) = _top_heads(grid, points)
    parts = {
        f"the coverage of {grid.label(head)} runs from": _of_head(points, "coverage_pct", head),
        "the repair by a map of shuffled pairs from": [each.shuffled_pct for each in points],
        "and what all heads undo from": [each.to_base_pct for each in points],
    }
    said = [f"{words} {run}" for words, values in parts.items() if (run := _run_of(values))]
    start = f"Shares depend on the strength: {', '.join(said)}. " if said else ""
    return f"{start}So a share at one strength says little: what heads undo at 1 is the answer."


def _run_of(values: Sequence[Estimate]) -> str:
    """The smallest and the largest value; nothing where there are none."""
    known = [each.value for each in values if each.value is not None]
    return f"{min(known):z.0f} to {max(known):z.0f}%" if len(known) > 1 else ""


def _views(grid: GridResult, points: Sequence[AlphaPoint]) -> dict[str, list[go.Scatter]]:
    """The traces of each view that is defined."""
    alone = {grid.label(head): head for head in _top_heads(grid, points)}
    shares = {
        "undoes": {ALL_HEADS: [point.to_base_pct for point in points]}
        | {name: _of_head(points, "head_to_base_pct", head) for name, head in alone.items()},
        "coverage": {name: _of_head(points, "coverage_pct", head) for name, head in alone.items()}
        | {SHUFFLED: [point.shuffled_pct for point in points]},
    }
    views = {
        view: [
            _line(name, theme.look(place), values, points)
            for place, (name, values) in enumerate(lines.items(), view == "coverage")
            if any(value.value is not None for value in values)
        ]
        for view, lines in shares.items()
    }
    nats = [
        line(name, [Point(p.alpha, getattr(p, field), _hover(p)) for p in points], look)
        for name, (field, look) in _NATS.items()
    ]
    return {view: traces for view, traces in {**views, "nats": nats}.items() if traces}


def _of_head(points: Sequence[AlphaPoint], field: str, head: int) -> list[Estimate]:
    """One head at every strength; undefined where nothing is a share."""
    shares = (getattr(point, field) for point in points)
    return [each[head] if each else undefined(NO_SHARES) for each in shares]


NO_SHARES = "nothing is a share of it at this strength"


def _top_heads(grid: GridResult, points: Sequence[AlphaPoint]) -> list[int]:
    """The heads with the largest share at any strength."""

    def reach(head: int) -> float:
        every = (each for p in points for each in (p.head_to_base_pct, p.coverage_pct) if each)
        return max((each[head].value or 0.0 for each in every), default=0.0)

    return sorted(range(grid.n_heads), key=lambda head: -reach(head))[:_TOP_HEADS]


def _line(
    name: str, look: theme.Look, values: Sequence[Estimate], points: Sequence[AlphaPoint]
) -> go.Scatter:
    head = None if name in (ALL_HEADS, SHUFFLED) else name
    texts = [
        f"<b>{name}, α = {point.alpha:g}</b><br>{shown(value, '%')}"
        for point, value in zip(points, values, strict=True)
    ]
    marks = zip((point.alpha for point in points), values, texts, strict=True)
    return line(name, [Point(*each, head) for each in marks], look)


def _hover(point: AlphaPoint) -> str:
    lines = [f"{name} {shown(getattr(point, each), 'nats')}" for name, (each, _) in _NATS.items()]
    drop = f"drop {shown(point.drop_pct, '%')}"
    best = "best heads " + ", ".join(f"H{head}" for head in point.heads[:5])
    return "<br>".join([f"<b>α = {point.alpha:g}</b>", *lines, drop, best])
