"""Rankings side by side: by method, metric, map, seed, and on other prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from rq4lens.analysis import records
from rq4lens.analysis.coverage.curves import TOO_FEW_GROUPS, half_means, half_splits, ranking_curve
from rq4lens.analysis.effects.measured import MeasuredLayer, MeasuredSets
from rq4lens.analysis.effects.table import bootstrap_of, full_effect
from rq4lens.analysis.rankings.agreement import THE_SAME, Scored, agreement, spearman, top_jaccard
from rq4lens.analysis.rankings.exact import sampled_orders, shapley_of_orders
from rq4lens.analysis.rankings.methods import DEFAULTS, RankingSettings, method_of
from rq4lens.analysis.statistics.bootstrap import (
    LEVEL,
    ONE_GROUP,
    Bootstrap,
    Estimate,
    Resampled,
    Spread,
    exact,
    undefined,
)
from rq4lens.errors import UserError
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.maps.fitting import FitData, refit
from rq4lens.patching.maps.kinds import fit_block
from rq4lens.patching.maps.map import MapKind
from rq4lens.results import ConditionResult, GridResult, HeadRanking, ranks_of, single_scores


def rank_heads(
    method: str, measured: MeasuredSets, settings: RankingSettings = DEFAULTS
) -> HeadRanking:
    """Rank the heads of a layer by a method."""
    ranking: HeadRanking = method_of(method).rank(measured, settings)
    return ranking


def timed_ranking(
    method: str, measured: MeasuredSets, settings: RankingSettings = DEFAULTS
) -> tuple[HeadRanking, float]:
    """A ranking and the seconds it took, measurements included."""
    start = time.perf_counter()
    ranking = rank_heads(method, measured, settings)
    return ranking, time.perf_counter() - start


@dataclass(frozen=True)
class Methods:
    """A row for every ranking method; rankings and curves for those that worked."""

    rows: tuple[records.MethodRow, ...]
    rankings: tuple[HeadRanking, ...]
    curves: tuple[records.CoverageCurve, ...]


def compare_methods(
    methods: Sequence[str], layer: MeasuredLayer, settings: RankingSettings = DEFAULTS
) -> Methods:
    """Rank by every method and compare."""
    rows, rankings, curves = [], [], []
    for method in methods:
        try:
            ranking, seconds = timed_ranking(method, layer.measured, settings)
        except UserError as problem:
            reason = str(problem)
            nothing = undefined(reason)
            rows.append(records.MethodRow(method, None, {}, nothing, nothing, None, reason, reason))
            continue
        row, curve = describe_ranking(ranking, layer, seconds)
        rows.append(row)
        rankings.append(ranking)
        curves.append(curve)
    return Methods(tuple(rows), tuple(rankings), tuple(curves))


def describe_ranking(
    ranking: HeadRanking, layer: MeasuredLayer, seconds: float | None = None
) -> tuple[records.MethodRow, records.CoverageCurve]:
    """One ranking beside exact single-head ``ΔKL``, with its coverage curve."""
    curve, exact = ranking_curve(ranking, layer), layer.scored()
    itself = ranking.method == exact.name and "file" not in ranking.settings
    scored = Scored.of(ranking, layer.bootstrap)
    row = records.MethodRow(
        method=ranking.method,
        agreement=None if itself else agreement("method", scored, exact, layer.ks, layer.bootstrap),
        coverage_pct={k: curve.coverage_pct[k] for k in layer.ks if k <= ranking.n_heads},
        area_pct=curve.area_pct,
        k90=curve.k90,
        seconds=seconds,
        agreement_reason=THE_SAME if itself else None,
        reasons={"seconds": "the ranking was read from a file"},
    )
    return row, curve


OTHER_KINDS: tuple[MapKind, ...] = ("procrustes", "procrustes_scaled", "ridge", "low_rank")


def metric_agreement(grid: GridResult, layer: MeasuredLayer) -> records.Agreement:
    """Compare the ranking by ``ΔKL`` with one by a metric that is linear in log-probabilities.

    That metric is what the map repairs of the log-probability of the tuned model's own answer.
    """
    repair = np.stack([answer_repair_nats(single) for single in grid.singles])
    by_answer = Scored.of_prompts("answer log-probability", repair, layer.bootstrap)
    return agreement("metric", by_answer, layer.scored(), layer.ks, layer.bootstrap)


def answer_repair_nats(condition: ConditionResult) -> Float64[ndarray, "prompt"]:
    """How much of the answer's log-probability the map wins back, on each prompt."""
    mapped, raw = condition.mapped, condition.raw
    return mapped.answer_logprob_change_nats - raw.answer_logprob_change_nats


def answer_coverage(grid: GridResult) -> dict[int, Estimate]:
    """Coverage of the grid's top k by the answer's log-probability instead of KL, by k.

    It is undefined, as coverage is, when the repair under the full patch cannot be told from 0.
    """
    ks, bootstrap = grid.settings.patching.k, bootstrap_of(grid)
    whole = answer_repair_nats(grid.full)
    full = full_effect(whole, 0.0, bootstrap)
    if full.undefined_because is not None:
        reason = full.undefined_because.replace("ΔKL(ALL)", "the answer's repair under ALL")
        return dict.fromkeys(ks, undefined(reason))
    top = [answer_repair_nats(grid[f"top{k}"]) for k in ks]
    shares = dict(zip(ks, bootstrap.percent(whole, np.array([whole, *top])[1:]), strict=True))
    return {k: exact(100.0) if k == grid.n_heads else share for k, share in shares.items()}


def map_kind_agreement(layer: MeasuredLayer, experiment: Experiment) -> list[records.Agreement]:
    """Compare the ranking by ``ΔKL`` with those of other kinds of maps."""
    measured, own = layer.measured, experiment.maps[layer.measured.layer]
    data = FitData.of(experiment.ends.activations, own.layer)
    z_base = experiment.ends.activations.z("base", experiment.split, own.layer)
    kinds = [kind for kind in OTHER_KINDS if kind != own.kind]
    found = []
    for kind in kinds:
        # Each beside a raw patch of its own: both go through the same products.
        other = replace(measured.also({kind: refit(own, data, kind)(z_base)}), mapped=kind)
        scored = Scored.of_prompts(kind, other.delta_nats(other.singles), layer.bootstrap)
        reference = layer.scored(own.kind)
        found.append(agreement("map_kind", scored, reference, layer.ks, layer.bootstrap))
    return found


def fold_agreement(layer: MeasuredLayer, first: Bool[ndarray, "prompt"]) -> records.Agreement:
    """Compare the rankings by ``ΔKL`` on two halves of the prompts."""
    halves = []
    for name, half in (("first half", first), ("second half", ~first)):
        chosen = half.astype(float)[None]
        sums = layer.bootstrap.resampled(np.concatenate([layer.single_deltas * chosen, chosen]))
        # Means over some of the prompts are undefined in a resample without any of them.
        means = sums.apply(lambda m: m[..., :-1] / m[..., -1:])
        halves.append(Scored(name, means.point, means))
    return agreement("fold", halves[0], halves[1], layer.ks, layer.bootstrap)


def seed_agreement(
    layer: MeasuredLayer, settings: RankingSettings, shapley: HeadRanking
) -> records.Agreement:
    """Compare rankings by sampled Shapley values from one half of the permutations and the other.

    So no head set is measured for it.
    """
    given = settings.orders
    orders = sampled_orders(shapley) if given is None else np.array(given)
    half = len(orders) // 2
    one, other = (
        Scored.of(shapley_of_orders(layer.measured, some), layer.bootstrap, f"shapley, {name}")
        for name, some in (
            ("one half of the orders", orders[:half]),
            ("the other half", orders[half:]),
        )
    )
    return agreement("seed", one, other, layer.ks, layer.bootstrap)


NO_DIRECTION = "the base activations do not predict the change: there is no first direction"


def alignment(data: FitData, delta: Scored, bootstrap: Bootstrap) -> records.Alignment:
    """Shares of the first direction, and their rank correlation with causal scores."""
    n_heads = data.x.shape[1]
    x, y = (z.flatten(1).numpy() for z in (data.x, data.y))
    details = fit_block("low_rank", x, y, data.groups).details
    if not details["spread"] or details["spread"][0] == 0:
        nothing = undefined(NO_DIRECTION)
        return records.Alignment((), nothing, nothing, NO_DIRECTION)
    share = head_shares(np.array(details["first_direction"]), n_heads)
    compared = agreement("method", Scored("first direction", share), delta, (), bootstrap)
    return records.Alignment(tuple(share.tolist()), compared.spearman, compared.kendall)


def head_shares(direction: Float64[ndarray, "d"], n_heads: int) -> Float64[ndarray, "head"]:
    """Share of a vector's squared length that lies on each head; sums to 1."""
    squares = (direction**2).reshape(n_heads, -1).sum(-1)
    return squares / squares.sum()


# How firmly heads stand at their ranks when prompts are resampled or split

N_HALVES = 500
"""Random half splits behind the split-half numbers."""

SOME_TIED = "in some draws all heads have the same score"


def rank_stability(ranking: HeadRanking, layer: MeasuredLayer) -> records.RankStability:
    """Stability of the ranking by single-head scores."""
    bootstrap, ks = layer.bootstrap, [k for k in layer.ks if k <= ranking.n_heads]

    def scores_of(means: Float64[ndarray, "*rows both"]) -> Float64[ndarray, "*rows head"]:
        raw, delta = np.split(means, 2, axis=-1)
        return single_scores(raw, delta, layer.rank_by)

    whole, part = layer.measured.ranked_by(layer.rank_by).kl_nats(layer.measured.singles)
    both = np.concatenate([whole, whole - part])
    scores = bootstrap.resampled(both).apply(scores_of)
    everyone = np.broadcast_to(scores.point, scores.draws.shape)
    halves = half_splits(bootstrap.groups, N_HALVES, bootstrap.seed)
    one, other = scores_of(half_means(both, halves)).swapaxes(0, 1)
    ranks = ranks_of(one), ranks_of(other)
    resamples = spearman(scores.draws, everyone) if bootstrap.n_groups > 1 else np.empty(0)
    return records.RankStability(
        ranking=ranking.method,
        heads=_heads(ranking, scores, ks, bootstrap),
        bootstrap_spearman=_spread(resamples, ONE_GROUP),
        split_half_spearman=_spread(spearman(one, other), TOO_FEW_GROUPS),
        split_half_jaccard={k: _spread(top_jaccard(*ranks, k), TOO_FEW_GROUPS) for k in ks},
        n_splits=len(halves),
    )


def _heads(
    ranking: HeadRanking, scores: Resampled, ks: Sequence[int], bootstrap: Bootstrap
) -> tuple[records.HeadStability, ...]:
    ranks, estimates = ranks_of(scores.draws), scores.estimates()
    ranges, shown = rank_ranges(ranks, bootstrap), ks if bootstrap.n_groups > 1 else ()
    return tuple(
        records.HeadStability(
            head=head,
            rank=rank,
            score=estimates[head],
            top_probability={k: float((ranks[:, head] <= k).mean()) for k in shown},
            **ranges[head]._asdict(),
        )
        for rank, head in enumerate(ranking.heads, 1)
    )


class RankRange(NamedTuple):
    """Where a head's rank lies in 95% of the resamples, or why nothing shows that."""

    rank_low: int | None
    rank_high: int | None
    reason: str | None


def rank_ranges(ranks: Int64[ndarray, "resample head"], bootstrap: Bootstrap) -> list[RankRange]:
    """The range of each head's rank over resamples."""
    if bootstrap.n_groups < 2:
        return [RankRange(None, None, ONE_GROUP)] * ranks.shape[1]
    tails = np.quantile(ranks, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0, method="nearest")
    return [RankRange(int(low), int(high), None) for low, high in tails.T]


def _spread(values: Float64[ndarray, "draw"], if_none: str) -> Spread:
    if not len(values):
        return Spread(None, reason=if_none)
    return Spread.of(values) if np.isfinite(values).all() else Spread(None, reason=SOME_TIED)
