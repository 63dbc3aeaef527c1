"""Random head sets as a distribution, and where a random ranking stays at all sizes at once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import ceil, comb
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from scipy.stats import rankdata

from rq4lens.analysis.measured import Indices, MeasuredSets
from rq4lens.analysis.random_sizes import EXHAUSTIVE_LIMIT
from rq4lens.analysis.records import RandomSets
from rq4lens.analysis.statistics import LEVEL

QUANTILES = (0.025, 0.25, 0.5, 0.75, 0.975)


def at_least(draws: Float64[ndarray, "draw"], value: float) -> int:
    """How many draws reach a value; equal up to rounding counts as reaching it."""
    tolerance = 1e-12 * max(abs(value), float(np.abs(draws).max(initial=0.0)))
    return int((draws >= value - tolerance).sum())


def monte_carlo_p_value(draws: Float64[ndarray, "draw"], value: float) -> float:
    """P-value of a value among random draws; at least ``1 / (draws + 1)``.

    Source:
        Phipson and Smyth, Permutation P-values Should Never Be Zero (2010), equation 2.
    """
    return (1 + at_least(draws, value)) / (1 + len(draws))


class PValue(NamedTuple):
    """A p-value, and the smallest it could have been."""

    value: float
    smallest: float


@dataclass(frozen=True)
class RandomRankings:
    """Random rankings of the heads of one layer; their first k heads are random sets of size k.

    Args:
        measured: the head sets measured so far.
        rankings: independent random orders of the heads.
    """

    measured: MeasuredSets
    rankings: Int64[ndarray, "ranking head"]

    @classmethod
    def draw(cls, measured: MeasuredSets, n_sets: int, seed: int) -> RandomRankings:
        """Draw random rankings.

        Args:
            measured: the head sets measured so far; what is missing is measured.
            n_sets: number of random rankings.
            seed: seed of the draws.
        """
        orders = np.tile(np.arange(measured.n_heads), (n_sets, 1))
        return cls(measured, np.random.default_rng(seed).permuted(orders, axis=1))

    @property
    def pairs(self) -> Int64[ndarray, "pair 2 head"]:
        """The random rankings two by two."""
        n_pairs, n_heads = len(self.rankings) // 2, self.measured.n_heads
        return self.rankings[: 2 * n_pairs].reshape(n_pairs, 2, n_heads)

    def top_sets(self, k: int) -> list[Indices]:
        """The first k heads of each random ranking."""
        return [tuple(heads) for heads in np.sort(self.rankings[:, :k], axis=1).tolist()]

    def delta(self, k: int) -> Float64[ndarray, "ranking"]:
        """Mean ``ΔKL`` of the first k heads of each random ranking."""
        return self.measured.delta(self.top_sets(k))

    def is_exhaustive(self, k: int) -> bool:
        """Whether the random sets of size k are all there are."""
        return comb(self.measured.n_heads, k) <= EXHAUSTIVE_LIMIT

    def sets(self, k: int) -> list[Indices]:
        """Random sets of size k: all of them when they are few, draws otherwise."""
        if self.is_exhaustive(k):
            return list(combinations(range(self.measured.n_heads), k))
        return self.top_sets(k)

    def average_nats(self, k: int) -> Float64[ndarray, "prompt"]:
        """``ΔKL`` of each prompt, averaged over the random sets of size k."""
        return self.measured.delta_nats(self.sets(k)).mean(0)


def random_sets(
    rankings: RandomRankings,
    k: int,
    *,
    full_delta: float | None,
    seeds: dict[int, Indices],
) -> RandomSets:
    """Random head sets of one size: all of them when they are few, draws otherwise.

    Args:
        rankings: the random rankings that give the draws.
        k: the size.
        full_delta: mean ``ΔKL(ALL)``; None when it cannot be a denominator.
        seeds: the run's own random sets of that size, by seed.
    """
    delta = rankings.measured.delta(rankings.sets(k))
    own = rankings.measured.delta(seeds.values()).tolist() if seeds else []
    of_seeds: dict[int, float] = dict(zip(seeds, own, strict=True))
    exhaustive = rankings.is_exhaustive(k)
    return describe(k, delta, exhaustive, full_delta=full_delta, of_seeds=of_seeds)


def plain_p_value(random: RandomSets, observed: float) -> PValue:
    """How often random sets reach the effect of a set of their size.

    A set that was chosen on the same prompts has a small one even where no head is better than
    another: it describes, and is no test.

    Among all sets of a size the judged one is counted already; drawn sets are joined by it.

    Args:
        random: the random sets.
        observed: mean ``ΔKL`` of the set that is judged.
    """
    draws = np.array(random.delta_nats)
    if random.exhaustive:
        return PValue(at_least(draws, observed) / len(draws), 1 / len(draws))
    return PValue(monte_carlo_p_value(draws, observed), 1 / (1 + len(draws)))


def describe(
    k: int,
    delta: Float64[ndarray, "draw"],
    exhaustive: bool,
    *,
    full_delta: float | None,
    of_seeds: dict[int, float],
) -> RandomSets:
    """The record of random sets whose mean ``ΔKL`` is known.

    Args:
        k: their size.
        delta: their mean ``ΔKL``.
        exhaustive: whether these are all sets of that size.
        full_delta: mean ``ΔKL(ALL)``; None when it cannot be a denominator.
        of_seeds: mean ``ΔKL`` of the run's own random sets, by seed.
    """
    coverage = np.empty(0) if full_delta is None else 100 * delta / full_delta
    levels = np.quantile(coverage, QUANTILES).tolist() if len(coverage) else []
    return RandomSets(
        k=k,
        n_subsets=len(delta),
        exhaustive=exhaustive,
        delta_nats=tuple(delta.tolist()),
        coverage_pct=tuple(coverage.tolist()),
        mean_pct=float(coverage.mean()) if len(coverage) else None,
        quantiles_pct={f"{q:g}": value for q, value in zip(QUANTILES, levels, strict=False)},
        seeds_pct=_seeds_pct(of_seeds, full_delta),
    )


def _seeds_pct(of_seeds: dict[int, float], full_delta: float | None) -> dict[int, float]:
    if full_delta is None:
        return {}
    return {seed: float(100 * value / full_delta) for seed, value in of_seeds.items()}


@dataclass(frozen=True)
class RandomBand:
    """Where a random ranking stays at all measured k at once.

    Args:
        low_pct: lower end, by k.
        high_pct: upper end, by k.
        p_value: probability that a random ranking is as extreme as the given one, if that was not
            chosen by looking at the same prompts.
    """

    low_pct: tuple[float, ...]
    high_pct: tuple[float, ...]
    p_value: float


def random_band(
    random_pct: Float64[ndarray, "ranking k"],
    observed_pct: Float64[ndarray, "k"],
    level: float = LEVEL,
) -> RandomBand:
    """A band that holds a random ranking's coverage at every k with the given probability.

    It is the envelope of the least extreme rankings. How extreme a ranking is, is told by its most
    extreme place among all at any k, then by its next one, and so on; the band therefore follows
    skewed distributions and never leaves the range of the draws.

    Args:
        random_pct: coverage of the first k heads of random rankings, for several k.
        observed_pct: coverage of the ranking that is judged.
        level: probability.

    Source:
        Myllymäki et al., Global Envelope Tests for Spatial Processes (JRSS B 2017), section 3.3:
        extreme rank length.
    """
    places = _by_extremeness(random_pct)
    held = random_pct[places >= np.sort(places)[-ceil(level * len(places))]]
    extremeness = _by_extremeness(np.concatenate([random_pct, observed_pct[None]]))
    as_extreme = int((extremeness[:-1] <= extremeness[-1]).sum())
    return RandomBand(
        tuple(held.min(0).tolist()),
        tuple(held.max(0).tolist()),
        (1 + as_extreme) / (1 + len(random_pct)),
    )


def _by_extremeness(curves: Float64[ndarray, "ranking k"]) -> Int64[ndarray, "ranking"]:
    """Place of each curve from the most extreme, 0, up; equal ones share a place."""
    from_below = rankdata(curves, method="max", axis=0)
    from_above = rankdata(-curves, method="max", axis=0)
    places = np.sort(np.minimum(from_below, from_above), axis=1)
    return np.unique(places, axis=0, return_inverse=True)[1].reshape(-1)
