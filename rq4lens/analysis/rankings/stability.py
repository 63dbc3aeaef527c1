"""How firmly heads stand at their ranks when prompts are resampled or split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from rq4lens.analysis.coverage.curves import TOO_FEW_GROUPS, half_means, half_splits
from rq4lens.analysis.effects.measured import MeasuredLayer
from rq4lens.analysis.rankings.agreement import spearman, top_jaccard
from rq4lens.analysis.records import HeadStability, RankStability
from rq4lens.analysis.statistics.bootstrap import LEVEL, ONE_GROUP, Bootstrap, Resampled, Spread
from rq4lens.results import HeadRanking, ranks_of, single_scores

N_HALVES = 500
"""Random half splits behind the split-half numbers."""

SOME_TIED = "in some draws all heads have the same score"


def rank_stability(ranking: HeadRanking, layer: MeasuredLayer) -> RankStability:
    """Stability of the ranking by single-head scores."""
    bootstrap, ks = layer.bootstrap, [k for k in layer.ks if k <= ranking.n_heads]

    def scores_of(means: Float64[ndarray, "*rows both"]) -> Float64[ndarray, "*rows head"]:
        raw, delta = np.split(means, 2, axis=-1)
        return single_scores(raw, delta, layer.rank_by)

    whole, part = layer.ranked_on.kl_nats(layer.measured.singles)
    both = np.concatenate([whole, whole - part])
    scores = bootstrap.resampled(both).apply(scores_of)
    everyone = np.broadcast_to(scores.point, scores.draws.shape)
    halves = half_splits(bootstrap.groups, N_HALVES, bootstrap.seed)
    half_scores = scores_of(half_means(both, halves))
    resamples = spearman(scores.draws, everyone) if bootstrap.n_groups > 1 else None
    return RankStability(
        ranking=ranking.method,
        heads=_heads(ranking, scores, ks, bootstrap),
        bootstrap_spearman=_spread(resamples, ONE_GROUP),
        split_half_spearman=_of_halves(spearman, half_scores),
        split_half_jaccard={k: _of_halves(partial(top_jaccard, k=k), half_scores) for k in ks},
        n_splits=len(halves),
    )


def _heads(
    ranking: HeadRanking, scores: Resampled, ks: Sequence[int], bootstrap: Bootstrap
) -> tuple[HeadStability, ...]:
    ranks, estimates = ranks_of(scores.draws), scores.estimates()
    ranges, shown = rank_ranges(ranks, bootstrap), ks if bootstrap.n_groups > 1 else ()
    return tuple(
        HeadStability(
            head=head,
            rank=rank,
            score=estimates[head],
            rank_low=ranges[head].low,
            rank_high=ranges[head].high,
            top_probability={k: float((ranks[:, head] <= k).mean()) for k in shown},
            reason=ranges[head].reason,
        )
        for rank, head in enumerate(ranking.heads, 1)
    )


class RankRange(NamedTuple):
    """Where a head's rank lies in 95% of the resamples, or why nothing shows that."""

    low: int | None
    high: int | None
    reason: str | None


def rank_ranges(ranks: Int64[ndarray, "resample head"], bootstrap: Bootstrap) -> list[RankRange]:
    """The range of each head's rank over resamples."""
    if bootstrap.n_groups < 2:
        return [RankRange(None, None, ONE_GROUP)] * ranks.shape[1]
    tails = np.quantile(ranks, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0, method="nearest")
    return [RankRange(int(low), int(high), None) for low, high in tails.T]


def _of_halves(
    measure: Callable[[ndarray, ndarray], ndarray],
    scores: Float64[ndarray, "split half head"],
) -> Spread:
    values = measure(scores[:, 0], scores[:, 1]) if len(scores) else None
    return _spread(values, TOO_FEW_GROUPS)


def _spread(values: Float64[ndarray, "draw"] | None, otherwise: str) -> Spread:
    if values is None:
        return Spread(None, reason=otherwise)
    return Spread.of(values) if np.isfinite(values).all() else Spread(None, reason=SOME_TIED)
