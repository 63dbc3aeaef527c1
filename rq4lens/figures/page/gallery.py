"""Every figure that a run has the data for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import plotly.graph_objects as go

from rq4lens.analysis.effects.table import bootstrap_of
from rq4lens.analysis.rankings.agreement import Scored, agreement, strengths
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.figures.alphas import alpha_sweep
from rq4lens.figures.coverage import coverage_curve, method_curves
from rq4lens.figures.layers import global_ranking, layer_curves, layer_heatmap
from rq4lens.figures.maps import map_quality
from rq4lens.figures.matrices import agreement_matrix, interaction_matrix
from rq4lens.figures.plane import head_plane, per_prompt
from rq4lens.figures.ranking import rank_flow, ranking_bars
from rq4lens.figures.saved import HasRecord, Record, as_record
from rq4lens.results import GridResult, HeadRanking

Drawings = Iterator[tuple[str, go.Figure]]

AGREEMENT_KINDS = {"map_kind": "map kinds", "metric": "metrics", "fold": "folds", "seed": "seeds"}


def run_figures(
    grid: GridResult,
    analysis: HasRecord | Record | None = None,
    *,
    layers: Mapping[int, GridResult] | None = None,
    comparison: HasRecord | Record | None = None,
    provenance: Mapping[str, Any] | None = None,
    dark: bool = False,
) -> dict[str, go.Figure]:
    """Draw everything that a run has the data for; what is missing is left out.

    Args:
        grid: the measured grid.
        analysis: an analysis of it, live or saved.
        layers: the grid of each layer, from a sweep.
        comparison: the comparison of these layers by the analysis, live or saved.
        provenance: the content of ``run.json``, for the map diagnostics; the grid's own when left
            out.
        dark: the dark template.

    Returns:
        Figures by name, in reading order.
    """
    bootstrap = bootstrap_of(grid)
    record = as_record(analysis)
    provenance = grid.provenance if provenance is None else provenance
    return {
        **dict(_of_grid(grid, record, bootstrap, dark=dark)),
        **dict(_of_analysis(grid, record, bootstrap, dark=dark)),
        **dict(_of_layers(grid, layers or {}, as_record(comparison), dark=dark)),
        **dict(_of_maps(grid, record, provenance, bootstrap, dark=dark)),
    }


def _of_grid(grid: GridResult, record: Record, bootstrap: Bootstrap, *, dark: bool) -> Drawings:
    yield "ranking", ranking_bars(grid, analysis=record, bootstrap=bootstrap, dark=dark)
    yield "coverage", coverage_curve(grid, record, bootstrap=bootstrap, dark=dark)
    yield "plane", head_plane(grid, record, bootstrap=bootstrap, dark=dark)
    yield "prompts", per_prompt(grid, bootstrap=bootstrap, dark=dark)


def _of_analysis(grid: GridResult, record: Record, bootstrap: Bootstrap, *, dark: bool) -> Drawings:
    rankings = saved_rankings(record)
    if len(rankings) > 1:
        orders = {name: ranking.heads for name, ranking in rankings.items()}
        yield "methods", method_curves(grid, record, dark=dark)
        ranges = {name: rank_ranges(record, name) for name in orders}
        yield (
            "methods_flow",
            rank_flow(
                grid,
                orders,
                what="ranking methods",
                rank_ranges=ranges,
                bootstrap=bootstrap,
                dark=dark,
            ),
        )
        pairs = method_agreements(record, bootstrap)
        yield (
            "methods_agreement",
            agreement_matrix(grid, pairs, what="ranking methods", dark=dark),
        )
    for kind, what in AGREEMENT_KINDS.items():
        rows = [row for row in record.get("agreement", ()) if row["kind"] == kind]
        if len({name for row in rows for name in (row["first"], row["second"])}) > 2:
            yield f"{kind}_agreement", agreement_matrix(grid, rows, what=what, dark=dark)
    if record.get("interactions"):
        yield "interactions", interaction_matrix(grid, record["interactions"], dark=dark)
    if len(record.get("alphas", ())) > 1:
        yield from _of_alphas(grid, record, bootstrap, dark=dark)


def _of_alphas(grid: GridResult, record: Record, bootstrap: Bootstrap, *, dark: bool) -> Drawings:
    alphas = record["alphas"]
    yield "alpha", alpha_sweep(grid, alphas, dark=dark)
    orders = {_at(point["alpha"]): point["heads"] for point in alphas}
    yield (
        "alpha_flow",
        rank_flow(
            grid,
            orders,
            what="blend strengths",
            alpha=f"{alphas[0]['alpha']:g} to {alphas[-1]['alpha']:g}",
            # At every strength heads are ranked by ΔKL; the run's own ranking may be another.
            rank_ranges={_at(grid.settings.patching.alpha): rank_ranges(record, "delta")},
            bootstrap=bootstrap,
            dark=dark,
        ),
    )


def _at(alpha: float) -> str:
    return f"α = {alpha:g}"


def rank_ranges(record: Record, ranking: str) -> dict[int, tuple[int, int]]:
    """Where 95% of the resampled ranks of each head lie; empty for a ranking not resampled."""
    stability = record.get("stability") or {"ranking": None}
    rows = stability["heads"] if stability["ranking"] == ranking else ()
    return {
        row["head"]: (row["rank_low"], row["rank_high"])
        for row in rows
        if row["rank_low"] is not None
    }


def _of_layers(
    grid: GridResult, layers: Mapping[int, GridResult], comparison: Record, *, dark: bool
) -> Drawings:
    if len(layers) > 1:
        yield "layers", layer_heatmap(layers, dark=dark)
        yield "layers_ranking", global_ranking(layers, comparison, dark=dark)
        yield (
            "layers_coverage",
            layer_curves(layers, comparison, main=grid.settings.layer, dark=dark),
        )


def _of_maps(
    grid: GridResult,
    record: Record,
    provenance: Mapping[str, Any],
    bootstrap: Bootstrap,
    *,
    dark: bool,
) -> Drawings:
    fitted = provenance.get("maps", {}).get(str(grid.settings.layer), {})
    if fitted.get("diagnostics"):
        yield (
            "maps",
            map_quality(
                grid, fitted["diagnostics"], analysis=record, bootstrap=bootstrap, dark=dark
            ),
        )


def saved_rankings(record: Record) -> dict[str, HeadRanking]:
    """The rankings of an analysis by method, without their per-prompt scores."""
    return {
        row["method"]: HeadRanking(
            method=row["method"],
            layer=row["layer"],
            alpha=row["alpha"],
            heads=tuple(row["heads"]),
            scores=tuple(None if score is None else float(score) for score in row["scores"]),
        )
        for row in record.get("rankings", ())
    }


ONLY_SCORES = "the file holds the rankings' scores, not what they are on each prompt"


def method_agreements(record: Record, bootstrap: Bootstrap) -> list[Record]:
    """How every two ranking methods agree.

    Pairs that the analysis compared keep their intervals; the others are compared here, from the
    saved scores, and have none.
    """
    rows = [row["agreement"] for row in record.get("methods", ()) if row.get("agreement")]
    known = {frozenset((row["first"], row["second"])): row for row in rows}
    scored = [
        Scored(name, np.asarray(strengths(ranking)), no_interval=ONLY_SCORES)
        for name, ranking in saved_rankings(record).items()
    ]
    return [
        known.get(frozenset((one.name, other.name)))
        or to_json(agreement("method", one, other, (), bootstrap))
        for one, other in combinations(scored, 2)
    ]
