"""How few heads carry the change: coverage of the best k heads against k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from rq4lens.analysis.effects.table import gap_of, grid_full_effect, records
from rq4lens.analysis.records import Analysis, CoverageCurve, RandomSets
from rq4lens.analysis.statistics.bootstrap import Estimate, exact
from rq4lens.figures import theme
from rq4lens.figures.numbers import INTERVAL_NOTE, Point, grid_setting, hover, line, shown
from rq4lens.heads import HeadSet
from rq4lens.results import GridResult

CROSS_FITTED = "cross-fitted"
BEST_SUBSET = "best subset"
# Random sets of one size stand side by side: this share of one head apart.
_SEED_STEP = 0.12
# A 2.5% quantile of fewer sets than this is one of their extremes.
_FEWEST_FOR_BAND = 40

BEST_K = theme.Look(theme.BLUE, "circle", "solid")
LOOKS = {
    CROSS_FITTED: theme.Look(theme.CROSS_FITTED, "square", "dot"),
    BEST_SUBSET: theme.Look(theme.BEST, "triangle-up", "dashdot"),
}

AXIS = "coverage (% of ΔKL of all heads)"
VIEWS = {
    "to_base": ("undoes", "undoes of the gap, at strength 1 (%)"),
    "to_tuned": ("gives base", "gives base, at strength 1 (%)"),
    "metric": ("metric", "undoes of the metric's difference, at strength 1 (%)"),
    "metric_to_tuned": ("metric, to tuned", "gives base of the metric's difference (%)"),
    "delta": ("ΔKL", AXIS),
}
CAPTION = (
    "A curve that is high at small k and leaves the grey band: few heads carry the change, more "
    "than random heads do."
)


def coverage_curve(grid: GridResult, analysis: Analysis | None = None) -> go.Figure:
    """What the best ``k`` heads carry against ``k``, with random head sets and the control layer.

    A switch shows the share of the gap between the models (``to_base``, ``to_tuned``), of their
    difference in a metric, or coverage of ``ΔKL``.

    Args:
        grid: the measured grid; its ``top{k}``, ``rand{k}_s{seed}``, ``full`` and ``ctrl_full``
            conditions are drawn.
        analysis: an analysis of the grid. It fills the curves in at every k and adds the
            cross-fitted ones, the bands of random head sets and the best subsets.

    Returns:
        The figure; what is undefined has no view, and where nothing is defined it says why.
    """
    figure = go.Figure()
    views = _views(grid, analysis)
    if views:
        named = {VIEWS[name][0]: traces for name, traces in views.items()}
        titles = [VIEWS[name][1] for name in views]
        theme.add_views(figure, named, [{"yaxis.title.text": title} for title in titles])
        axes(figure, grid.n_heads, titles[0])
    else:
        why = grid_full_effect(grid).undefined_because
        theme.message(figure, f"Coverage is undefined: {why}.")
    return theme.frame(
        figure,
        f"What the best k heads carry, layer {grid.settings.layer}",
        grid_setting(grid, *_notes(grid, analysis)),
        theme.Layout(460 + 21 * theme.legend_rows(figure)),
        caption=CAPTION,
    )


def _views(grid: GridResult, analysis: Analysis | None) -> dict[str, list[go.Scatter]]:
    """The traces of each view that is defined."""
    views = {
        each.direction: [
            *_random_band(_known(each.random), VIEWS[each.direction][0]),
            *_curves(grid, each.curves, VIEWS[each.direction][0]),
            *_control(grid, f"{each.direction}_pct"),
        ]
        for each in (analysis.directions if analysis else ())
        if each.full.undefined_because is None
    }
    if not views and gap_of(grid).undefined_because is None:
        views["to_base"] = _grid_traces(grid, "to_base_pct")
    if grid_full_effect(grid).undefined_because is not None:
        return views
    if analysis is None or not analysis.curves:
        views["delta"] = _grid_traces(grid, "coverage_pct")
    else:
        views["delta"] = [
            *_random_band(_known(analysis.random), "coverage"),
            *_random_rankings(_known(analysis.random)),
            *_curves(grid, analysis.curves, "coverage"),
            *_control(grid, "coverage_pct"),
        ]
    return views


def _notes(grid: GridResult, analysis: Analysis | None) -> list[str]:
    notes = [INTERVAL_NOTE]
    # Between the sizes that were measured the band of random sets is drawn straight.
    sizes = sorted({row.k for row in analysis.random}) if analysis is not None else ()
    if sizes:
        notes.append(f"random sets of {HeadSet.of(sizes, sizes[-1] + 1)} heads for ΔKL")
    if grid.control is not None:
        notes.append(f"control: all heads of control layer {grid.control.layer}")
    return notes


def axes(figure: go.Figure, n_heads: int, title: str = AXIS) -> None:
    """The axes of every coverage curve, with lines at 0 and 100%."""
    for level in (0, 100):
        figure.add_hline(y=level, line={"color": theme.GREY, "width": 1, "dash": "dot"})
    figure.update_xaxes(
        title_text="k, number of patched heads",
        range=[-0.03 * n_heads, 1.03 * n_heads],
        nticks=9,
        zeroline=False,
    )
    figure.update_yaxes(title_text=title, zeroline=False)


def _curves(grid: GridResult, curves: Sequence[CoverageCurve], word: str) -> list[go.Scatter]:
    """The curves of an analysis; the first is the one of the run's own ranking."""
    chosen = [
        line(name, _curve_points(grid, curve, word), look, bars=name != BEST_SUBSET)
        for name, look in LOOKS.items()
        for curve in curves
        if _kind(curve) == name
    ]
    return [*chosen, line("best k", _curve_points(grid, curves[0], word), BEST_K)]


def _kind(curve: CoverageCurve) -> str | None:
    """Whether a curve is cross-fitted or that of best subsets; None of a ranking's own."""
    if curve.ranking == BEST_SUBSET:
        return BEST_SUBSET
    return CROSS_FITTED if curve.ranking.endswith(f"({CROSS_FITTED})") else None


def _curve_points(grid: GridResult, curve: CoverageCurve, word: str = "coverage") -> list[Point]:
    sets = curve.head_sets or ((),) * len(curve.coverage_pct)
    return [
        Point(
            k,
            value,
            f"<b>{theme.plain(curve.ranking)}, k = {k}</b><br>{word} {shown(value, '%')}"
            + (f"<br>{_named(grid, heads)}" if heads else ""),
            _added(grid, sets[k - 1], heads) if k else None,
        )
        for k, (value, heads) in enumerate(zip(curve.coverage_pct, sets, strict=True))
    ]


def _added(grid: GridResult, before: Sequence[int], after: Sequence[int]) -> str | None:
    """The head by which one set exceeds another; None when that is not one head."""
    extra = set(after) - set(before)
    return grid.label(extra.pop()) if len(extra) == 1 and len(after) == len(before) + 1 else None


def _named(grid: GridResult, heads: Sequence[int], most: int = 6) -> str:
    names = ", ".join(grid.label(head) for head in heads[:most])
    return names if len(heads) <= most else f"{names} and {len(heads) - most} more"


def _grid_traces(grid: GridResult, field: str) -> list[go.Scatter]:
    """What the grid alone says: its best k, its random sets, the control layer."""
    best = line("best k", _best_of_grid(grid, field), BEST_K)
    return [best, *_seeds(_measured(grid, "rand", "random {k}", field)), *_control(grid, field)]


def _best_of_grid(grid: GridResult, field: str) -> list[Point]:
    whole = exact(100.0)
    if field != "coverage_pct":
        whole = getattr(records(grid, [grid.full])[0], field)
    best = _measured(grid, "top", "best {k}", field)
    return [
        Point(0, exact(0.0), "no head: 0% by definition"),
        *(point for point in best if 0 < point.x < grid.n_heads),
        Point(grid.n_heads, whole, f"all heads: {shown(whole, '%')}"),
    ]


def _measured(grid: GridResult, prefix: str, label: str, field: str) -> list[Point]:
    """The points of the grid's own conditions of one kind, smallest sets first."""
    named = [c for name, c in grid.conditions.items() if name.startswith(prefix)]
    conditions = sorted(named, key=lambda condition: len(condition.heads))
    return [
        Point(
            len(each.heads),
            getattr(each, field),
            f"{hover(each, label.format(k=len(each.heads)))}"
            f"<br>{_named(grid, each.heads)} ({each.cond})",
        )
        for each in (records(grid, conditions) if conditions else ())
    ]


def _seeds(points: Sequence[Point]) -> list[go.Scatter]:
    """The grid's random sets, those of one size side by side."""
    if not points:
        return []
    shifts = [
        sum(other.x == point.x for other in points[:i]) * _SEED_STEP
        for i, point in enumerate(points)
    ]
    return [
        go.Scatter(
            name="random, seeds",
            x=[point.x + shift for point, shift in zip(points, shifts, strict=True)],
            y=[point.estimate.value for point in points],
            mode="markers",
            marker={"symbol": "x-thin", "size": 7, "line": {"width": 1.5, "color": theme.RANDOM}},
            **theme.hover([point.hover for point in points]),
        )
    ]


def _random_band(sets: Sequence[RandomSets], word: str) -> list[go.Scatter]:
    """Random head sets at every measured size: their mean, and where 95% of each size lie."""
    if not sets:
        return []
    k = [row.k for row in sets]
    low, high = ([row.quantiles_pct[q] for row in sets] for q in ("0.025", "0.975"))
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    fill = {"fill": "tonexty", "fillcolor": theme.translucent(theme.RANDOM, 0.25)}
    mean = go.Scatter(
        name="random sets, 95%",
        x=k,
        y=[row.mean_pct for row in sets],
        mode="lines",
        line={"color": theme.RANDOM, "width": 1.5, "dash": "dash"},
        **theme.hover([_random_hover(row, word) for row in sets]),
    )
    return [go.Scatter(x=k, y=low, **edge), go.Scatter(x=k, y=high, **edge, **fill), mean]


def _known(random: Sequence[RandomSets]) -> list[RandomSets]:
    enough = [row for row in random if row.exhaustive or row.n_subsets >= _FEWEST_FOR_BAND]
    return [row for row in enough if row.mean_pct is not None]


def _random_rankings(sets: Sequence[RandomSets]) -> list[go.Scatter]:
    """Where 95% of random rankings lie at all sizes at once."""
    banded = [row for row in sets if row.band_low_pct is not None]
    if not banded:
        return []
    k = [row.k for row in banded]
    ends = [row.band_low_pct for row in banded], [row.band_high_pct for row in banded]
    return [
        go.Scatter(
            name="random rankings, 95%",
            x=[*k, None, *k],
            y=[*ends[0], None, *ends[1]],
            mode="lines",
            line={"color": theme.RANDOM, "width": 1, "dash": "dot"},
            hoverinfo="skip",
        )
    ]


def _random_hover(row: RandomSets, word: str) -> str:
    low, high = (row.quantiles_pct[q] for q in ("0.025", "0.975"))
    lines = [
        f"<b>random sets of {row.k}</b>",
        f"mean {word} {row.mean_pct:.3g}%",
        f"95% of {row.n_subsets} sets in [{low:.3g}, {high:.3g}]%",
    ]
    if row.band_low_pct is not None:
        band = f"[{row.band_low_pct:.3g}, {row.band_high_pct:.3g}]%"
        lines.append(f"95% of rankings, at all k at once, in {band}")
    if row.p_value is not None:
        small = "p < 0.001" if row.p_value < 0.001 else f"p = {row.p_value:.2g}"
        lines.append(f"ranked on other prompts: {small}")
    return "<br>".join(lines)


def _control(grid: GridResult, field: str) -> list[go.Scatter]:
    """A level line for the control layer, if there is one."""
    if grid.control is None:
        return []
    (control,) = records(grid, [grid.control])
    text = hover(control, f"all heads of control layer {grid.control.layer}")
    return [
        go.Scatter(
            name=f"control, layer {grid.control.layer}",
            x=[0, grid.n_heads],
            y=[getattr(control, field).value] * 2,
            mode="lines",
            line={"color": theme.CONTROL, "dash": "longdash", "width": 2},
            **theme.hover([text] * 2),
        )
    ]


def curve_points(grid: GridResult) -> list[tuple[int, Estimate]]:
    """Coverage of the best k heads of a grid at each measured k; empty where it is undefined."""
    if grid_full_effect(grid).undefined_because is not None:
        return []
    points = _best_of_grid(grid, "coverage_pct")
    return [(int(p.x), p.estimate) for p in points if p.estimate.value is not None]


MOST_COLOURED = 6
NEAR_PCT = 5.0
"""Curves that are nowhere further apart than this look alike."""


def method_curves(grid: GridResult, analysis: Analysis) -> go.Figure:
    """Coverage of the best k heads against k, for every ranking method that was tried.

    At most six methods have a colour and stand in the legend: the first, which is the run's own,
    and those whose curves are furthest from it and from each other. The others are grey; hover
    names every method, and those that choose the same k heads.

    Args:
        grid: the measured grid.
        analysis: an analysis of it; its curves are drawn, without cross-fitting and envelope.

    Returns:
        The figure: a line per method.
    """
    curves = {
        curve.ranking: curve
        for curve in analysis.curves
        if _kind(curve) is None and any(point.value is not None for point in curve.coverage_pct)
    }
    coloured = _far_apart(curves)
    figure = go.Figure()
    for name, curve in curves.items():
        place = coloured.index(name) if name in coloured else None
        points = [
            each._replace(hover=each.hover + _same_heads(k, name, curves))
            for k, each in enumerate(_curve_points(grid, curve))
        ]
        trace = line(theme.plain(name), points, theme.look(place), bars=False)
        # The run's own lies on top, grey lines below, wherever their methods stand.
        above = 0 if place is None else MOST_COLOURED - place
        figure.add_trace(trace.update(zorder=above, showlegend=place is not None))
    axes(figure, grid.n_heads)
    grey = " Grey: methods near a coloured one; hover names them."
    return theme.frame(
        figure,
        f"Coverage by ranking method, layer {grid.settings.layer}",
        grid_setting(grid, "ranked and scored on the same prompts"),
        theme.Layout(460 + 21 * theme.legend_rows(figure)),
        caption="The higher a curve at small k, the better its method finds the heads that matter."
        + (grey if len(coloured) < len(curves) else ""),
    )


def _far_apart(curves: Mapping[str, CoverageCurve]) -> list[str]:
    """The first curve, and one after the other those furthest from all that were chosen."""
    values = {
        name: np.array([point.value for point in curve.coverage_pct], dtype=float)
        for name, curve in curves.items()
    }
    chosen = list(curves)[:1]
    while 0 < len(chosen) < MOST_COLOURED:
        distance = {
            name: min(np.nanmax(np.abs(own - values[other])) for other in chosen)
            for name, own in values.items()
        }
        furthest = max(distance, key=distance.__getitem__)
        if distance[furthest] <= NEAR_PCT:
            break
        chosen.append(furthest)
    return chosen


def _same_heads(k: int, name: str, curves: Mapping[str, CoverageCurve]) -> str:
    """Lines of the hover with the other methods that choose the same k heads."""
    chosen = {each: set(curve.head_sets[k]) for each, curve in curves.items() if curve.head_sets}
    others = [each for each in chosen if each != name and chosen[each] == chosen.get(name)]
    if not others or not 0 < k < len(curves[name].coverage_pct) - 1:
        return ""
    return "<br>".join(
        ["", "the same heads by", *theme.wrap([theme.plain(each) for each in others])]
    )
