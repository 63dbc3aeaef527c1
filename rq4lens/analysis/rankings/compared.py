"""Rankings side by side: by method, metric, kind of map, prompts and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from rq4lens.analysis.coverage.curves import ranking_curve
from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.effects.table import full_effect
from rq4lens.analysis.rankings.agreement import THE_SAME, Scored, agreement
from rq4lens.analysis.rankings.methods import timed_ranking
from rq4lens.analysis.rankings.shapley import Orders, rank_by_shapley, shapley_of_orders
from rq4lens.analysis.records import Agreement, CoverageCurve, FullEffect, MethodRow
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, exact, undefined
from rq4lens.analysis.structure.controls import FitData, refit
from rq4lens.errors import UserError
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.maps.map import MapKind
from rq4lens.results import ConditionResult, GridResult, HeadRanking


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
    """Rank by every method and compare."""
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
    """One ranking beside exact single-head ``ΔKL``, with its coverage curve."""
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
        reasons={"seconds": "the ranking was read from a file"},
    )
    return row, curve


def _missing(method: str, reason: str) -> MethodRow:
    nothing = undefined(reason)
    return MethodRow(method, None, {}, nothing, nothing, None, reason, reason)


OTHER_KINDS: tuple[MapKind, ...] = ("procrustes", "procrustes_scaled", "ridge", "low_rank")


def metric_agreement(
    grid: GridResult, delta: Scored, ks: Sequence[int], bootstrap: Bootstrap
) -> Agreement:
    """Compare the ranking by ``ΔKL`` with one by a metric that is linear in log-probabilities.

    That metric is what the map repairs of the log-probability of the tuned model's own answer.
    """
    repair = np.stack([answer_repair_nats(single) for single in grid.singles])
    by_answer = Scored.of_prompts("answer log-probability", repair, bootstrap)
    return agreement("metric", by_answer, delta, ks, bootstrap)


def answer_repair_nats(condition: ConditionResult) -> Float64[ndarray, "prompt"]:
    """How much of the answer's log-probability the map wins back, on each prompt."""
    return condition.answer_logprob_change_mapped_nats - condition.answer_logprob_change_raw_nats


def answer_coverage(grid: GridResult, bootstrap: Bootstrap) -> dict[int, Estimate]:
    """Coverage of the grid's top k by the answer's log-probability instead of KL, by k.

    It is undefined, as coverage is, when the repair under the full patch cannot be told from 0.
    """
    ks = grid.settings.patching.k
    repair = np.stack(
        [answer_repair_nats(grid[f"top{k}"]) for k in ks] + [answer_repair_nats(grid.full)]
    )
    full = full_effect(repair[-1], 0.0, bootstrap)
    if full.undefined_because is not None:
        reason = full.undefined_because.replace("ΔKL(ALL)", "the answer's repair under ALL")
        return dict.fromkeys(ks, undefined(reason))
    shares = bootstrap.estimate(repair, lambda m: 100 * m[:, :-1] / m[:, -1:])
    return {
        k: exact(100.0) if k == grid.n_heads else share for k, share in zip(ks, shares, strict=True)
    }


def map_kind_agreement(
    experiment: Experiment,
    measured: MeasuredSets,
    activations: PairActivations,
    ks: Sequence[int],
    bootstrap: Bootstrap,
) -> list[Agreement]:
    """Compare the ranking by ``ΔKL`` with those under other kinds of maps."""
    layer, own = measured.layer, experiment.maps[measured.layer]
    reference = Scored.of_prompts(own.kind, measured.delta_nats(measured.singles), bootstrap)
    data = FitData.of(activations, layer)
    z_base = activations.z("base", experiment.split, layer)
    kinds = [kind for kind in OTHER_KINDS if kind != own.kind]
    varied = experiment.with_sources(
        {(layer, kind): refit(own, data, kind)(z_base) for kind in kinds}
    )
    found = []
    for kind in kinds:
        other = MeasuredSets.of(varied, layer, measured.alpha, mapped=kind)
        scored = Scored.of_prompts(kind, other.delta_nats(other.singles), bootstrap)
        found.append(agreement("map_kind", scored, reference, ks, bootstrap))
    return found


def fold_agreement(
    measured: MeasuredSets,
    first: Bool[ndarray, "prompt"],
    ks: Sequence[int],
    bootstrap: Bootstrap,
) -> Agreement:
    """Compare the rankings by ``ΔKL`` on two halves of the prompts."""
    per_prompt = measured.delta_nats(measured.singles)
    one = _on_some("first half", per_prompt, first, bootstrap)
    other = _on_some("second half", per_prompt, ~first, bootstrap)
    return agreement("fold", one, other, ks, bootstrap)


def _on_some(
    name: str,
    per_prompt: Float64[ndarray, "head prompt"],
    prompts: Bool[ndarray, "prompt"],
    bootstrap: Bootstrap,
) -> Scored:
    """Scores that are means over some of the prompts; undefined in a resample without any."""
    chosen = prompts.astype(float)[None]
    sums = bootstrap.resampled(np.concatenate([per_prompt * chosen, chosen]))
    means = sums.apply(lambda m: m[..., :-1] / m[..., -1:])
    return Scored(name, means.point, means)


def seed_agreement(
    measured: MeasuredSets,
    seed: int,
    orders: Orders | None,
    ks: Sequence[int],
    bootstrap: Bootstrap,
) -> Agreement:
    """Compare rankings by sampled Shapley values from different random permutations."""
    if orders is None:
        names = [f"shapley, seed {each}" for each in (seed, seed + 1)]
        found = [rank_by_shapley(measured, seed=each) for each in (seed, seed + 1)]
    else:
        half = len(orders) // 2
        names = ["shapley, one half of the orders", "shapley, the other half"]
        found = [shapley_of_orders(measured, part) for part in (orders[:half], orders[half:])]
    one, other = (Scored.of(each, bootstrap, name) for each, name in zip(found, names, strict=True))
    return agreement("seed", one, other, ks, bootstrap)
