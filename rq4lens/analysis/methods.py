"""Every ranking method on the same heads: agreement with exact ΔKL, and the coverage it reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rq4lens.analysis.agreement import THE_SAME, Scored, agreement
from rq4lens.analysis.curves import ranking_curve
from rq4lens.analysis.measured import MeasuredSets
from rq4lens.analysis.metrics import FullEffect
from rq4lens.analysis.ranking import timed_ranking
from rq4lens.analysis.records import CoverageCurve, MethodRow
from rq4lens.analysis.shapley import Orders
from rq4lens.analysis.statistics import Bootstrap, undefined
from rq4lens.errors import UserError
from rq4lens.results import HeadRanking


@dataclass(frozen=True)
class Methods:
    """What the ranking methods gave.

    Args:
        rows: one row per method.
        rankings: the rankings of those that worked.
        curves: their coverage curves.
    """

    rows: tuple[MethodRow, ...]
    rankings: tuple[HeadRanking, ...]
    curves: tuple[CoverageCurve, ...]


def compare_methods(
    methods: Sequence[str],
    measured: MeasuredSets,
    full: FullEffect,
    ks: Sequence[int],
    bootstrap: Bootstrap,
    seed: int = 0,
    orders: Orders | None = None,
) -> Methods:
    """Rank by every method and compare.

    Args:
        methods: names of methods.
        measured: the head sets measured so far; what is missing is measured.
        full: the full effect.
        ks: sizes at which coverage and overlap are reported.
        bootstrap: the resamples.
        seed: seed of methods that draw at random.
        orders: random permutations of the heads for Shapley values; drawn when left out.
    """
    exact = Scored.of_prompts("delta", measured.delta_nats(measured.singles), bootstrap)
    rows, rankings, curves = [], [], []
    for method in methods:
        settings = {"seed": seed, "orders": orders} if method == "shapley" else {}
        try:
            ranking, seconds = timed_ranking(method, measured, **settings)
        except UserError as problem:
            rows.append(_missing(method, str(problem)))
            continue
        row, curve = describe_ranking(ranking, exact, measured, full, ks, bootstrap, seconds)
        rows.append(row)
        rankings.append(ranking)
        curves.append(curve)
    return Methods(tuple(rows), tuple(rankings), tuple(curves))


def describe_ranking(
    ranking: HeadRanking,
    exact: Scored,
    measured: MeasuredSets,
    full: FullEffect,
    ks: Sequence[int],
    bootstrap: Bootstrap,
    seconds: float | None = None,
) -> tuple[MethodRow, CoverageCurve]:
    """One ranking beside exact single-head ``ΔKL``, with its coverage curve.

    Args:
        ranking: the ranking, for instance one that was read from a file.
        exact: the scores by exact single-head ``ΔKL``.
        measured: the head sets measured so far; what is missing is measured.
        full: the full effect.
        ks: sizes at which coverage and overlap are reported.
        bootstrap: the resamples.
        seconds: how long the ranking took.
    """
    curve = ranking_curve(ranking, measured, full, bootstrap)
    itself = ranking.method == exact.name and "file" not in ranking.settings
    scored = Scored.of(ranking, bootstrap)
    row = MethodRow(
        method=ranking.method,
        agreement=None if itself else agreement("method", scored, exact, ks, bootstrap),
        coverage_pct={k: curve.coverage_pct[k] for k in ks if k <= ranking.n_heads},
        area_pct=curve.area_pct,
        k90=curve.k90,
        seconds=seconds,
        agreement_reason=THE_SAME if itself else None,
    )
    return row, curve


def _missing(method: str, reason: str) -> MethodRow:
    nothing = undefined(reason)
    return MethodRow(method, None, {}, nothing, nothing, None, reason, reason)
