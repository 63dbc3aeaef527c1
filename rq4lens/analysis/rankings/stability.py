"""How firmly heads stand at their ranks when prompts are resampled or split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.coverage.cross_fitted import TOO_FEW_GROUPS, half_means, half_splits
from rq4lens.analysis.effects.layer import MeasuredLayer
from rq4lens.analysis.rankings.agreement import spearman, top_jaccard
from rq4lens.analysis.records import HeadStability, RankStability
from rq4lens.analysis.statistics.bootstrap import (
    LEVEL,
    ONE_GROUP,
    Bootstrap,
    Resampled,
    Spread,
)
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

    both = np.concatenate([layer.singles[0], layer.single_deltas])
    scores = bootstrap.resampled(both).apply(scores_of)
    everyone = np.broadcast_to(scores.point, scores.draws.shape)
    halves = half_splits(bootstrap.groups, N_HALVES, bootstrap.seed)
    half_scores = scores_of(half_means(both, halves))
    return RankStability(
        ranking=ranking.method,
        heads=_heads(ranking, scores, ks, bootstrap),
        bootstrap_spearman=_of_resamples(spearman(scores.draws, everyone), bootstrap),
        split_half_spearman=_of_halves(spearman, half_scores),
        split_half_jaccard={k: _of_halves(partial(top_jaccard, k=k), half_scores) for k in ks},
        n_splits=len(halves),
    )


def _heads(
    ranking: HeadRanking, scores: Resampled, ks: Sequence[int], bootstrap: Bootstrap
) -> tuple[HeadStability, ...]:
    ranks = ranks_of(scores.draws)
    seen = bootstrap.n_groups > 1
    tails = np.quantile(ranks, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0, method="nearest")
    estimates = scores.estimates()
    return tuple(
        HeadStability(
            head=head,
            rank=rank,
            score=estimates[head],
            rank_low=int(tails[0, head]) if seen else None,
            rank_high=int(tails[1, head]) if seen else None,
            top_probability={k: float((ranks[:, head] <= k).mean()) for k in ks} if seen else {},
            reason=None if seen else ONE_GROUP,
        )
        for rank, head in enumerate(ranking.heads, 1)
    )


def _of_halves(
    measure: Callable[[ndarray, ndarray], ndarray],
    scores: Float64[ndarray, "split half head"],
) -> Spread:
    if len(scores) == 0:
        return Spread(None, reason=TOO_FEW_GROUPS)
    return _spread(measure(scores[:, 0], scores[:, 1]))


def _of_resamples(values: Float64[ndarray, "draw"], bootstrap: Bootstrap) -> Spread:
    return Spread(None, reason=ONE_GROUP) if bootstrap.n_groups < 2 else _spread(values)


def _spread(values: Float64[ndarray, "draw"]) -> Spread:
    tied = not np.isfinite(values).all()
    return Spread(None, reason=SOME_TIED) if tied else Spread.of(values)
