"""Every figure that a run has the data for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import plotly.graph_objects as go

from rq4lens import figures
from rq4lens.analysis.effects.table import bootstrap_of
from rq4lens.analysis.positions import PositionMap
from rq4lens.analysis.rankings.agreement import Scored, agreement, strengths
from rq4lens.analysis.records import Agreement, Analysis, LayerComparison
from rq4lens.figures.heatmaps import strongest_prompt
from rq4lens.results import GridResult

AGREEMENT_KINDS = {"map_kind": "map kinds", "metric": "metrics", "fold": "folds", "seed": "seeds"}


def run_figures(
    grid: GridResult,
    analysis: Analysis | None = None,
    *,
    layers: Mapping[int, GridResult] | None = None,
    comparison: LayerComparison | None = None,
    provenance: Mapping[str, Any] | None = None,
    positions: PositionMap | None = None,
) -> dict[str, go.Figure]:
    """Draw everything that a run has the data for; what is missing is left out.

    Args:
        grid: the measured grid.
        analysis: an analysis of it.
        layers: the grid of each layer, from a sweep.
        comparison: the comparison of these layers by the analysis.
        provenance: the content of ``run.json``, for the map diagnostics; the grid's own when left
            out.
        positions: the position map of the run.

    Returns:
        Figures by name, in reading order.
    """
    drawn = {
        "ranking": figures.ranking_bars(grid, analysis=analysis),
        "coverage": figures.coverage_curve(grid, analysis),
    }
    if analysis is not None and analysis.ladders:
        drawn["ladder"] = figures.ladder(analysis)
    drawn["plane"] = figures.head_plane(grid, analysis)
    drawn["prompts"] = figures.per_prompt(grid)
    if analysis is not None:
        drawn |= dict(_of_analysis(grid, analysis))
    if layers is not None and len(layers) > 1:
        drawn["layers"] = figures.layer_heatmap(layers)
        drawn["layers_ranking"] = figures.global_ranking(layers, comparison)
        drawn["layers_coverage"] = figures.layer_curves(
            layers, comparison, main=grid.settings.layer
        )
    if positions is not None:
        drawn["positions"] = figures.position_map(positions)
        drawn["positions_prompt"] = figures.position_map(
            positions, prompt=strongest_prompt(positions)
        )
    diagnostics = map_diagnostics(grid, grid.provenance if provenance is None else provenance)
    if diagnostics:
        drawn["maps"] = figures.map_quality(grid, diagnostics, analysis=analysis)
    return drawn


def map_diagnostics(grid: GridResult, provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The held-out fit of each head of the main layer, as ``run.json`` keeps it."""
    fitted = provenance.get("maps", {}).get(str(grid.settings.layer), {})
    return list(fitted.get("diagnostics") or ())


def _of_analysis(grid: GridResult, analysis: Analysis) -> Iterator[tuple[str, go.Figure]]:
    if len(analysis.rankings) > 1:
        what = "ranking methods"
        orders = {ranking.method: ranking.heads for ranking in analysis.rankings}
        ranges = {name: rank_ranges(analysis, name) for name in orders}
        yield "methods", figures.method_curves(grid, analysis)
        yield "methods_flow", figures.rank_flow(grid, orders, what=what, rank_ranges=ranges)
        agreements = method_agreements(grid, analysis)
        yield "methods_agreement", figures.agreement_matrix(grid, agreements, what=what)
    for kind, what in AGREEMENT_KINDS.items():
        rows = [row for row in analysis.agreement if row.kind == kind]
        if len({name for row in rows for name in (row.first, row.second)}) > 2:
            yield f"{kind}_agreement", figures.agreement_matrix(grid, rows, what=what)
    if analysis.interactions is not None:
        yield "interactions", figures.interaction_matrix(grid, analysis.interactions)
    if len(analysis.alphas) > 1:
        yield "alpha", figures.alpha_sweep(grid, analysis.alphas)
        orders = {f"α = {point.alpha:g}": point.heads for point in analysis.alphas}
        span = f"{analysis.alphas[0].alpha:g} to {analysis.alphas[-1].alpha:g}"
        # At every strength heads are ranked by ΔKL; the run's own ranking may be another.
        ranges = {f"α = {grid.settings.patching.alpha:g}": rank_ranges(analysis, "delta")}
        what = "blend strengths"
        flow = figures.rank_flow(grid, orders, what=what, alpha=span, rank_ranges=ranges)
        yield "alpha_flow", flow


def rank_ranges(analysis: Analysis, ranking: str) -> dict[int, tuple[int, int]]:
    """Where 95% of the resampled ranks of each head lie; empty for a ranking not resampled."""
    rows = analysis.stability.heads if analysis.stability.ranking == ranking else ()
    return {
        row.head: (row.rank_low, row.rank_high)
        for row in rows
        if row.rank_low is not None and row.rank_high is not None
    }


NOT_COMPARED = "the analysis did not compare these two: only their scores were compared here"


def method_agreements(grid: GridResult, analysis: Analysis) -> list[Agreement]:
    """How every two ranking methods agree.

    Pairs that the analysis compared keep their intervals; the others are compared here, by their
    scores, and have none.
    """
    compared = [row.agreement for row in analysis.methods if row.agreement is not None]
    known = {frozenset((row.first, row.second)): row for row in compared}
    scored = [
        Scored(ranking.method, strengths(ranking), no_interval=NOT_COMPARED)
        for ranking in analysis.rankings
    ]
    return [
        known.get(frozenset((one.name, other.name)))
        or agreement("method", one, other, (), bootstrap_of(grid))
        for one, other in combinations(scored, 2)
    ]
