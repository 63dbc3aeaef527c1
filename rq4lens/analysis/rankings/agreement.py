"""How two rankings of the same heads agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from scipy.stats import rankdata

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
Measure = Callable[[Scores, Scores], ndarray]


@dataclass(frozen=True)
class Scored:
    """Scores of the same heads in head order, higher is better.

    Args:
        resampled: the scores on all resamples of the prompts; None for scores that do not come from
            prompts, which then count as fixed.
        no_interval: why scores that do come from prompts have no resamples, if they have none.
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
    scores = ranking.scores
    values = np.array([np.nan if score is None else score for score in scores], dtype=float)
    falls = not np.isnan(values).any() and bool((np.diff(values) <= 0).all())
    along = values if falls else -np.arange(len(scores), dtype=float)
    by_head = np.empty(len(scores))
    by_head[list(ranking.heads)] = along
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
    together = _together(first, second, bootstrap)
    reason = _why_uncorrelated(first, second)

    def estimate(measure: Measure) -> Estimate:
        if together is None:
            value = float(measure(first.scores[None], second.scores[None])[0])
            return Estimate(value, None, first.no_interval or second.no_interval or FIXED)
        of_both = together.apply(lambda both: measure(*np.split(both, 2, axis=-1))[..., None])
        return of_both.estimates("percentile")[0]

    def correlation(measure: Measure) -> Estimate:
        return estimate(measure) if reason is None else undefined(reason)

    return Agreement(
        kind=kind,
        first=first.name,
        second=second.name,
        kendall=correlation(kendall),
        spearman=correlation(spearman),
        rbo=estimate(rank_biased_overlap),
        jaccard={k: estimate(partial(top_jaccard, k=k)) for k in ks if k <= len(first.scores)},
        note=note,
    )


def _why_uncorrelated(first: Scored, second: Scored) -> str | None:
    if len(first.scores) < 2:
        return TOO_FEW_HEADS
    return ALL_TIED if any(np.ptp(scored.scores) == 0 for scored in (first, second)) else None


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
    i, j = np.triu_indices(first.shape[-1], 1)
    signs = [np.sign(scores[..., i] - scores[..., j]) for scores in (first, second)]
    agree = (signs[0] * signs[1]).sum(-1)
    untied = (np.abs(signs[0]).sum(-1), np.abs(signs[1]).sum(-1))
    with np.errstate(invalid="ignore"):
        return np.asarray(agree / np.sqrt(untied[0] * untied[1]))


def spearman(first: Scores, second: Scores) -> Float64[ndarray, "*rows"]:
    """Spearman's rank correlation, row by row; ties share their mean rank, NaN where all tie."""
    ranks = [rankdata(scores, axis=-1) for scores in (first, second)]
    centred = [rank - rank.mean(-1, keepdims=True) for rank in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(-1) * (centred[1] ** 2).sum(-1))
    with np.errstate(invalid="ignore"):
        return np.asarray((centred[0] * centred[1]).sum(-1) / scale)


def rank_biased_overlap(
    first: Scores, second: Scores, persistence: float = PERSISTENCE
) -> Float64[ndarray, "*rows"]:
    """Extrapolated rank-biased overlap of two full rankings, row by row, in [0, 1].

    Source:
        Webber, Moffat and Zobel, A Similarity Measure for Indefinite Rankings (2010), equation 23
        (rankings of equal length without ties; ties here break by head index).
    """
    depth = np.arange(1, first.shape[-1] + 1)
    # A head is among the first d of both rankings from the deeper of its two ranks on.
    deeper = np.maximum(ranks_of(first), ranks_of(second))
    overlap = (deeper[..., None] <= depth).sum(-2) / depth
    weights = persistence**depth
    body = (1 - persistence) / persistence * (overlap * weights).sum(-1)
    return np.asarray(overlap[..., -1] * weights[-1] + body)


def top_jaccard(first: Scores, second: Scores, k: int) -> Float64[ndarray, "*rows"]:
    """``|A ∩ B| / |A ∪ B|`` of the two top-k sets, row by row."""
    both = ((ranks_of(first) <= k) & (ranks_of(second) <= k)).sum(-1)
    return np.asarray(both / (2 * k - both))
