"""Rankings from measured head sets alone: single heads, leave one out, greedy, Shapley values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations
from math import comb
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from rq4lens.analysis.effects.measured import Indices, MeasuredSets, prefixes
from rq4lens.analysis.rankings.methods import DEFAULTS, RankingSettings
from rq4lens.analysis.statistics.bootstrap import ONE_GROUP, group_membership
from rq4lens.results import NO_RAW_EFFECT, HeadRanking, RankBy, rank_single_heads


def single_ranking(measured: MeasuredSets, rank_by: RankBy) -> HeadRanking:
    """Rank heads by their effects alone, with standard errors; see :func:`rank_single_heads`."""
    measured = measured.ranked_by(rank_by)
    raw, mapped = measured.kl_nats(measured.singles)
    ranking = rank_single_heads(raw, mapped, rank_by, layer=measured.layer, alpha=measured.alpha)
    parts = raw if rank_by == "kl_raw" else raw - mapped
    if ranking.share_of is None:
        errors = standard_errors(parts, measured.groups)
    else:
        scores = np.array(ranking.by_head, dtype=float)  # NaN where there is none
        errors = _errors_of_shares(scores, parts, raw, measured.groups)
    missing = ONE_GROUP if len(set(measured.groups)) == 1 else NO_RAW_EFFECT
    return replace(
        ranking,
        standard_errors=tuple(errors[head] for head in ranking.heads),
        reasons={"standard_errors": missing},
    )


def _errors_of_shares(
    scores: Float64[ndarray, "head"],
    parts: Float64[ndarray, "head prompt"],
    wholes: Float64[ndarray, "head prompt"],
    groups: tuple[str, ...],
) -> list[float | None]:
    """Standard errors of ratios of means, to first order; None where there is no ratio."""
    defined = np.isfinite(scores)
    safe = np.where(defined, scores, 0.0)[:, None]
    scale = np.where(defined, wholes.mean(-1), 1.0)[:, None]
    errors = standard_errors((100 * parts - safe * wholes) / scale, groups)
    return [error if known else None for error, known in zip(errors, defined, strict=True)]


def rank_by_leave_one_out(measured: MeasuredSets) -> HeadRanking:
    """Rank heads by ``ΔKL(ALL) - ΔKL(ALL without the head)``."""
    everything = measured.everything
    without = [tuple(h for h in everything if h != head) for head in everything]
    delta_nats = measured.delta_nats([everything, *without])
    return per_prompt_ranking("leave_one_out", measured, delta_nats[0] - delta_nats[1:])


def per_prompt_ranking(
    method: str,
    measured: MeasuredSets,
    per_prompt: Float64[ndarray, "head prompt"],
    settings: Mapping[str, Any] | None = None,
    errors: Sequence[float] | None = None,
) -> HeadRanking:
    """Rank heads by their mean score over prompts; its standard errors unless others are given."""
    ranking = HeadRanking.from_scores(
        per_prompt.mean(-1).tolist(),
        method=method,
        layer=measured.layer,
        alpha=measured.alpha,
        standard_errors=standard_errors(per_prompt, measured.groups) if errors is None else errors,
        settings=settings,
    )
    return replace(ranking, per_prompt=per_prompt, reasons={"standard_errors": ONE_GROUP})


def standard_errors(
    per_prompt: Float64[ndarray, "quantity prompt"], groups: tuple[str, ...]
) -> list[float | None]:
    """Standard error of each mean over prompts, by group; None with a single group.

    Source:
        The ratio estimator of a cluster sample, Cochran, Sampling Techniques (1977), section 9A.2;
        with groups of one prompt it is the ordinary standard error of a mean.
    """
    membership = group_membership(groups)
    n_groups, n_prompts = membership.shape
    if n_groups < 2:
        return [None] * len(per_prompt)
    residuals = (per_prompt - per_prompt.mean(-1, keepdims=True)) @ membership.T
    variance = (residuals**2).sum(-1) * n_groups / (n_groups - 1) / n_prompts**2
    return np.sqrt(variance).tolist()


def rank_greedy_forward(measured: MeasuredSets) -> HeadRanking:
    """Start with no head and add, each time, the head that raises ``ΔKL`` most.

    A head's score is what it added when it was taken, in nats.
    """
    chosen: Indices = ()
    scores: list[float] = []
    reached = 0.0
    for _ in range(measured.n_heads):
        left = [head for head in measured.everything if head not in chosen]
        delta = measured.delta([(*chosen, head) for head in left])
        best = int(np.argmax(delta))
        scores.append(float(delta[best]) - reached)
        reached = float(delta[best])
        chosen = (*chosen, left[best])
    return _ranking("greedy_forward", measured, chosen, scores)


def rank_greedy_backward(measured: MeasuredSets) -> HeadRanking:
    """Start with all heads and drop, each time, the head whose loss leaves most ``ΔKL``.

    The head that is dropped last ranks first. Its score is what was lost with it, in nats.
    """
    kept = measured.everything
    dropped: list[int] = []
    scores: list[float] = []
    for _ in range(measured.n_heads):
        # Of equal heads the later one goes first, so that ties break by head index in the ranking.
        candidates = kept[::-1]
        without = [tuple(h for h in kept if h != head) for head in candidates]
        delta = measured.delta(without)
        least_needed = int(np.argmax(delta))
        scores.append(float(measured.delta([kept])[0] - delta[least_needed]))
        dropped.append(candidates[least_needed])
        kept = without[least_needed]
    return _ranking("greedy_backward", measured, tuple(dropped[::-1]), scores[::-1])


def _ranking(
    method: str, measured: MeasuredSets, heads: Indices, scores: list[float]
) -> HeadRanking:
    return HeadRanking(
        method=method,
        layer=measured.layer,
        alpha=measured.alpha,
        heads=heads,
        scores=tuple(scores),
        settings={"score": "change of ΔKL at its turn, in nats"},
    )


# Shapley values: what a head adds to ``ΔKL``, averaged over all orders of adding heads

TOLERANCE = 0.05
"""Sampling stops when every standard error is below this share of ``|ΔKL(ALL)|``."""

MAX_PAIRS = 32
"""Sampling stops after this many pairs of permutations."""

PAIRS_PER_ROUND = 4

Pairs = Int64[ndarray, "pair 2 head"]


def rank_by_shapley(measured: MeasuredSets, settings: RankingSettings = DEFAULTS) -> HeadRanking:
    """Rank heads by their Shapley value; small layers are enumerated, others sampled.

    Source:
        Shapley, A Value for n-Person Games (1953); sampling of permutations in antithetic pairs
        after Mitchell et al., Sampling Permutations for Shapley Value Estimation (2022), section 4.
    """
    n_sampled = 2 * MAX_PAIRS * (measured.n_heads - 1)
    if 2**measured.n_heads <= max(n_sampled, measured.n_measured + 1):
        return exact_shapley(measured)
    if settings.orders is not None:
        return shapley_of_orders(measured, np.array(settings.orders))
    return sampled_shapley(measured, tolerance=TOLERANCE, max_pairs=MAX_PAIRS, seed=settings.seed)


def exact_shapley(measured: MeasuredSets) -> HeadRanking:
    """Shapley values from all ``2^H`` head sets."""
    per_prompt = np.zeros((measured.n_heads, len(measured.groups)))
    n_heads = measured.n_heads
    for head in measured.everything:
        others = [other for other in measured.everything if other != head]
        sets = list(chain.from_iterable(combinations(others, k) for k in range(n_heads)))
        weights = np.array([1 / (n_heads * comb(n_heads - 1, len(heads))) for heads in sets])
        gains = measured.delta_nats([(*heads, head) for heads in sets]) - measured.delta_nats(sets)
        per_prompt[head] = weights @ gains
    settings = {"exact": True, "stopped": "every head set was measured"}
    return per_prompt_ranking("shapley", measured, per_prompt, settings, [0.0] * n_heads)


def sampled_shapley(
    measured: MeasuredSets, *, tolerance: float, max_pairs: int, seed: int
) -> HeadRanking:
    """Shapley values from sampled permutations, each followed by its reverse.

    In every permutation the heads' gains add up to ``ΔKL(ALL)``, so the values do too. The standard
    errors are those of the sampling of permutations.
    """
    enough = tolerance * abs(float(measured.delta([measured.everything])[0]))
    settings = {
        "tolerance": tolerance,
        "seed": seed,
        "stopped": "the largest number of permutations was reached",
    }
    return _by_mean_gain(measured, _rounds(measured.n_heads, max_pairs, seed), settings, enough)


def shapley_of_orders(measured: MeasuredSets, orders: Pairs) -> HeadRanking:
    """Shapley values from given permutations, whose head sets may have been measured already."""
    return _by_mean_gain(measured, [orders], {"stopped": "every given permutation was used"})


def _by_mean_gain(
    measured: MeasuredSets,
    rounds: Iterable[Pairs],
    settings: Mapping[str, object],
    enough: float = -np.inf,
) -> HeadRanking:
    """Heads ranked by what they add in random orders, until standard errors are small enough."""
    total = np.zeros((measured.n_heads, len(measured.groups)))
    of_pairs: list[Float64[ndarray, "head"]] = []
    errors = np.full(measured.n_heads, np.inf)
    for orders in rounds:
        every = orders.reshape(-1, measured.n_heads).tolist()
        measured.require(heads for order in every for heads in prefixes(order))
        for first, second in orders:
            gains = (_gains(measured, first) + _gains(measured, second)) / 2
            total += gains
            of_pairs.append(gains.mean(-1))
        if len(of_pairs) > 1:
            errors = np.std(of_pairs, axis=0, ddof=1) / np.sqrt(len(of_pairs))
        if errors.max() <= enough:
            settings = {**settings, "stopped": "standard errors are small enough"}
            break
    n_pairs = len(of_pairs)
    settings = {"n_permutations": 2 * n_pairs, "exact": False, **settings}
    return per_prompt_ranking("shapley", measured, total / n_pairs, settings, errors.tolist())


def _rounds(n_heads: int, max_pairs: int, seed: int) -> Iterator[Pairs]:
    """Permutations and their reverses, a few pairs at a time; at least two pairs in all."""
    rng = np.random.default_rng(seed)
    left = max(2, max_pairs)
    while left > 0:
        n_pairs = min(PAIRS_PER_ROUND, left)
        orders = rng.permuted(np.tile(np.arange(n_heads), (n_pairs, 1)), axis=1)
        yield np.stack([orders, orders[:, ::-1]], axis=1)
        left -= n_pairs


def sampled_orders(ranking: HeadRanking) -> Pairs:
    """The permutations that a ranking by sampled Shapley values used."""
    n_pairs = ranking.settings["n_permutations"] // 2
    rounds = _rounds(ranking.n_heads, MAX_PAIRS, ranking.settings["seed"])
    return np.concatenate(list(rounds))[:n_pairs]


def _gains(
    measured: MeasuredSets, order: Int64[ndarray, "head"]
) -> Float64[ndarray, "head prompt"]:
    """What each head, in head order, adds when heads are added in the given order."""
    gains = np.diff(measured.delta_nats(prefixes(order.tolist())), axis=0)
    return gains[np.argsort(order)]
