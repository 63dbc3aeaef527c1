"""Shapley values of heads: what a head adds to ``ΔKL``, averaged over all orders of adding heads.

Source:
    Shapley, A Value for n-Person Games (1953); sampling of permutations in antithetic pairs after
    Mitchell et al., Sampling Permutations for Shapley Value Estimation (2022), section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, combinations
from math import comb

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from rq4lens.analysis.effects.measured import MeasuredSets, prefixes
from rq4lens.analysis.rankings.exact import per_prompt_ranking
from rq4lens.analysis.rankings.methods import DEFAULTS, RankingSettings
from rq4lens.results import HeadRanking

TOLERANCE = 0.05
"""Sampling stops when every standard error is below this share of ``|ΔKL(ALL)|``."""

MAX_PAIRS = 32
"""Sampling stops after this many pairs of permutations."""

PAIRS_PER_ROUND = 4

Pairs = Int64[ndarray, "pair 2 head"]


def rank_by_shapley(measured: MeasuredSets, settings: RankingSettings = DEFAULTS) -> HeadRanking:
    """Rank heads by their Shapley value; small layers are enumerated, others sampled."""
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
    mean, stopped = MeanGains(measured), "the largest number of permutations was reached"
    for orders in _rounds(measured.n_heads, max_pairs, seed):
        mean.add(orders)
        if mean.standard_errors.max() <= enough:
            stopped = "standard errors are small enough"
            break
    return mean.ranking({"tolerance": tolerance, "seed": seed, "stopped": stopped})


def shapley_of_orders(measured: MeasuredSets, orders: Pairs) -> HeadRanking:
    """Shapley values from given permutations, whose head sets may have been measured already."""
    mean = MeanGains(measured)
    mean.add(orders)
    return mean.ranking({"stopped": "every given permutation was used"})


class MeanGains:
    """What heads add when they are added in random orders, on average."""

    def __init__(self, measured: MeasuredSets) -> None:
        self._measured = measured
        self._total = np.zeros((measured.n_heads, len(measured.groups)))
        self._of_pairs: list[Float64[ndarray, "head"]] = []

    def add(self, orders: Pairs) -> None:
        """Add heads in more orders."""
        every = orders.reshape(-1, self._measured.n_heads).tolist()
        self._measured.require(heads for order in every for heads in prefixes(order))
        for first, second in orders:
            gains = (_gains(self._measured, first) + _gains(self._measured, second)) / 2
            self._total += gains
            self._of_pairs.append(gains.mean(-1))

    @property
    def standard_errors(self) -> Float64[ndarray, "head"]:
        """Standard error of each head's mean gain; infinite with one pair."""
        if len(self._of_pairs) < 2:
            return np.full(self._measured.n_heads, np.inf)
        return np.std(self._of_pairs, axis=0, ddof=1) / np.sqrt(len(self._of_pairs))

    def ranking(self, settings: Mapping[str, object]) -> HeadRanking:
        """Heads ranked by their mean gain."""
        n_pairs, errors = len(self._of_pairs), self.standard_errors.tolist()
        settings = {"n_permutations": 2 * n_pairs, "exact": False, **settings}
        per_prompt = self._total / n_pairs
        return per_prompt_ranking("shapley", self._measured, per_prompt, settings, errors)


def _rounds(n_heads: int, max_pairs: int, seed: int) -> Iterator[Pairs]:
    """Permutations and their reverses, a few pairs at a time; at least two pairs in all."""
    rng = np.random.default_rng(seed)
    left = max(2, max_pairs)
    while left > 0:
        n_pairs = min(max(2, min(PAIRS_PER_ROUND, left)), left)
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
