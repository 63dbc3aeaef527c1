"""How two rankings of the same heads agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int8, Int64
from numpy import ndarray

from rq4lens.analysis.records import Agreement
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, Resampled, undefined
from rq4lens.results import HeadRanking, ranks_of, single_scores

PERSISTENCE = 0.9
"""Weight of depth d in rank-biased overlap falls as this to the d."""

NOT_RESAMPLED = (
    "{} ranks from the prompts, but resampling them would take new measurements, so its agreement "
    "has no interval"
)
ALL_TIED = "all heads have the same score in one of the rankings"
THE_SAME = "it is the ranking that the others are compared with"
FIXED = "neither ranking comes from the measured prompts"
TOO_FEW_HEADS = "there are fewer than two heads"
INDEX_NOTE = (
    "head indices name no common thing across layers: head 3 of one layer is not head 3 of "
    "another, so this number says nothing about shared heads"
)

Scores = Float64[ndarray, "*rows head"]
Ranks = Int64[ndarray, "*rows head"]


@dataclass(frozen=True)
class Scored:
    """Scores of the same heads in head order, higher is better, and on all resamples of prompts.

    Those that do not come from prompts are fixed; those that do may say why there is no interval.
    """

    name: str
    scores: Float64[ndarray, "head"]
    resampled: Resampled | None = None
    no_interval: str | None = None

    @classmethod
    def of(cls, ranking: HeadRanking, bootstrap: Bootstrap, name: str | None = None) -> Scored:
        """The scores of a ranking, resampled if it has per-prompt scores.

        A ranking that was read from a file or made on other prompts counts as fixed.
        """
        name, per_prompt = name or ranking.method, ranking.per_prompt
        if per_prompt is None:
            unknown = None if "file" in ranking.settings else NOT_RESAMPLED.format(name)
            return cls(name, strengths(ranking), None, unknown)
        if per_prompt.shape[1] != len(bootstrap.groups):
            return cls(name, strengths(ranking))
        if ranking.share_of is None:
            return cls(name, strengths(ranking), bootstrap.resampled(per_prompt))
        means = bootstrap.resampled(np.concatenate([per_prompt, ranking.share_of]))
        return cls(name, strengths(ranking), means.apply(_shares))

    @classmethod
    def of_prompts(
        cls, name: str, per_prompt: Float64[ndarray, "head prompt"], bootstrap: Bootstrap
    ) -> Scored:
        """Scores that are means over prompts."""
        return cls(name, per_prompt.mean(-1), bootstrap.resampled(per_prompt))


def _shares(means: Float64[ndarray, "*rows both"]) -> Float64[ndarray, "*rows head"]:
    """Shares of means, in percent; minus their ranks where some are undefined."""
    parts, wholes = np.split(means, 2, axis=-1)
    scores = single_scores(wholes, parts, "drop_pct")
    return scores if np.isfinite(scores).all() else -ranks_of(scores).astype(float)


def strengths(ranking: HeadRanking) -> Float64[ndarray, "head"]:
    """One number per head, in head order, that falls along the ranking.

    That is the score where scores fall along the ranking, and minus the rank where they do not (a
    greedy ranking's scores are gains at their turn) or where some are undefined.
    """
    scores = np.array(ranking.scores, dtype=float)  # NaN where there is none
    falls = not np.isnan(scores).any() and bool((np.diff(scores) <= 0).all())
    by_head = np.empty(len(scores))
    by_head[list(ranking.heads)] = scores if falls else -np.arange(len(scores))
    return by_head


def agreement(
    kind: str,
    first: Scored,
    second: Scored,
    ks: Sequence[int],
    bootstrap: Bootstrap,
    note: str | None = None,
) -> Agreement:
    """Compare two rankings of the same heads.

    Intervals are percentile intervals over the shared resamples of the prompts.
    """
    together, shown = _together(first, second, bootstrap), [k for k in ks if k <= len(first.scores)]

    def measures(both: Float64[ndarray, "*rows both"]) -> Float64[ndarray, "*rows measure"]:
        scores = np.split(both, 2, axis=-1)
        one, other = (ranks_of(each) for each in scores)
        jaccard = [top_jaccard(one, other, k) for k in shown]
        correlations = kendall(*scores), spearman(*scores)
        return np.stack([*correlations, rank_biased_overlap(one, other), *jaccard], axis=-1)

    if together is None:
        values = measures(np.concatenate([first.scores, second.scores])[None])[0]
        why = first.no_interval or second.no_interval or FIXED
        found = [Estimate(value, None, why) for value in values.tolist()]
    else:
        found = together.apply(measures).estimates("percentile")
    if len(first.scores) < 2:
        found[:2] = [undefined(TOO_FEW_HEADS)] * 2
    elif any(np.ptp(scored.scores) == 0 for scored in (first, second)):
        found[:2] = [undefined(ALL_TIED)] * 2
    tau, rho, rbo, *jaccard = found
    return Agreement(
        kind=kind,
        first=first.name,
        second=second.name,
        kendall=tau,
        spearman=rho,
        rbo=rbo,
        jaccard=dict(zip(shown, jaccard, strict=True)),
        note=note,
    )


def _together(first: Scored, second: Scored, bootstrap: Bootstrap) -> Resampled | None:
    """Both rankings' scores side by side; those that do not come from prompts stay fixed."""
    no_interval = first.no_interval or second.no_interval
    if no_interval or (first.resampled is None and second.resampled is None):
        return None
    both = [scored.resampled or fixed(scored.scores, bootstrap) for scored in (first, second)]
    return Resampled(
        np.concatenate([first.scores, second.scores]),
        np.concatenate([each.draws for each in both], axis=1),
        np.concatenate([each.jackknife for each in both], axis=1),
    )


def fixed(scores: Float64[ndarray, "head"], bootstrap: Bootstrap) -> Resampled:
    """Scores that are the same in every resample."""
    shape = (bootstrap.n_resamples, len(scores))
    groups = (bootstrap.n_groups if bootstrap.n_groups > 1 else 0, len(scores))
    return Resampled(scores, np.broadcast_to(scores, shape), np.broadcast_to(scores, groups))


def kendall(first: Scores, second: Scores) -> Float64[ndarray, "*rows"]:
    """Kendall's tau-b, row by row; NaN where a row is all ties.

    Source:
        Kendall, The Treatment of Ties in Ranking Problems (1945).
    """
    # Head by head and in whole numbers: pairs of all rows at once are hundreds of megabytes.
    one, other = (np.ascontiguousarray(np.moveaxis(each, -1, 0)) for each in (first, second))
    agree, untied, its = np.zeros((3, *one.shape[1:]))
    for head in range(len(one) - 1):
        signs, others = _signs(one, head), _signs(other, head)
        agree += (signs * others).sum(0, dtype=np.int32)
        untied += np.count_nonzero(signs, axis=0)
        its += np.count_nonzero(others, axis=0)
    agree[~np.isfinite(one).all(0) | ~np.isfinite(other).all(0)] = np.nan
    with np.errstate(invalid="ignore"):
        return np.asarray(agree / np.sqrt(untied * its))


def _signs(scores: Float64[ndarray, "head *rows"], head: int) -> Int8[ndarray, "other *rows"]:
    """Whether a head is above each later one, 1, or below it, -1."""
    own, later = scores[head], scores[head + 1 :]
    return (own > later).view(np.int8) - (own < later).view(np.int8)


def spearman(first: Scores, second: Scores) -> Float64[ndarray, "*rows"]:
    """Spearman's rank correlation, row by row; ties share their mean rank, NaN where all tie."""
    ranks = [mean_ranks(scores) for scores in (first, second)]
    centred = [rank - rank.mean(-1, keepdims=True) for rank in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(-1) * (centred[1] ** 2).sum(-1))
    with np.errstate(invalid="ignore"):
        return np.asarray((centred[0] * centred[1]).sum(-1) / scale)


def mean_ranks(values: Float64[ndarray, "*rows each"]) -> Float64[ndarray, "*rows each"]:
    """Ranks from 1 for the smallest of each row; ties share their mean rank."""
    n_values, order = values.shape[-1], np.argsort(values, axis=-1)
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, np.arange(1.0, n_values + 1), axis=-1)
    ordered = np.take_along_axis(values, order, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        from scipy.stats import rankdata  # noqa: PLC0415 - more than a second, and ties are rare

        return np.asarray(rankdata(values, axis=-1))
    return ranks


def rank_biased_overlap(first: Ranks, second: Ranks) -> Float64[ndarray, "*rows"]:
    """Extrapolated rank-biased overlap of two full rankings, row by row, in [0, 1].

    Source:
        Webber, Moffat and Zobel, A Similarity Measure for Indefinite Rankings (2010), equation 23
        (rankings of equal length without ties).
    """
    depth = np.arange(1, first.shape[-1] + 1)
    # A head is among the first d of both rankings from the deeper of its two ranks on, and weighs
    # at each of these depths what its share of the overlap weighs there.
    weights = PERSISTENCE**depth / depth
    from_depth = np.cumsum(weights[::-1])[::-1]
    body = (1 - PERSISTENCE) / PERSISTENCE * from_depth[np.maximum(first, second) - 1].sum(-1)
    return np.asarray(PERSISTENCE ** depth[-1] + body)


def top_jaccard(first: Ranks, second: Ranks, k: int) -> Float64[ndarray, "*rows"]:
    """``|A ∩ B| / |A ∪ B|`` of the two top-k sets, row by row."""
    both = ((first <= k) & (second <= k)).sum(-1)
    return np.asarray(both / (2 * k - both))
