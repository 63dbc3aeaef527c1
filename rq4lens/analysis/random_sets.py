"""Random head sets as a distribution, and what top-ranked heads are worth beside them.

Random rankings are made so that one set of measurements serves two tests. With ``ρ₁`` and ``ρ₂``
the heads ranked on the two halves of the prompts and ``π`` a random relabelling of heads, ``π ρ₂``
and ``π⁻¹ ρ₁`` are random rankings; and scoring the first on the first half and the second on the
second half is the cross-fitted score as it would be if head names meant nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import ceil, comb, factorial, prod
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray
from scipy.stats import rankdata

from rq4lens.analysis.crossfit import CrossFit
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
    """Random rankings of the heads of one layer.

    Args:
        cross_fit: the rankings on halves that are relabelled.
        of_second: ``π ρ₂`` of each relabelling, to be scored on the first half.
        of_first: ``π⁻¹ ρ₁`` of each relabelling, to be scored on the second half.
    """

    cross_fit: CrossFit
    of_second: Int64[ndarray, "draw head"]
    of_first: Int64[ndarray, "draw head"]

    @classmethod
    def draw(cls, cross_fit: CrossFit, n_sets: int, seed: int) -> RandomRankings:
        """Relabel heads at random.

        Args:
            cross_fit: the rankings on halves.
            n_sets: number of random rankings; every relabelling gives two.
            seed: seed of the draws.
        """
        n_heads, n_draws = cross_fit.measured.n_heads, -(-n_sets // 2)
        rng = np.random.default_rng(seed)
        relabel = rng.permuted(np.tile(np.arange(n_heads), (n_draws, 1)), axis=1)
        back = np.argsort(relabel, axis=1)
        identity = np.arange(n_heads)
        usable = cross_fit.undefined_because is None
        first, second = cross_fit.orders[0] if usable else (identity, identity)
        return cls(cross_fit, relabel[:, second], back[:, first])

    @property
    def measured(self) -> MeasuredSets:
        """The head sets measured so far."""
        return self.cross_fit.measured

    @property
    def n_draws(self) -> int:
        """Number of relabellings."""
        return len(self.of_first)

    @property
    def pairs(self) -> Int64[ndarray, "draw 2 head"]:
        """The two random rankings of each relabelling; pairs are independent of each other."""
        return np.stack([self.of_second, self.of_first], axis=1)

    @cached_property
    def rankings(self) -> Int64[ndarray, "ranking head"]:
        """All random rankings."""
        return np.concatenate([self.of_second, self.of_first])

    def top_sets(self, k: int) -> list[Indices]:
        """The first k heads of each random ranking."""
        return [tuple(heads) for heads in np.sort(self.rankings[:, :k], axis=1).tolist()]

    def delta(self, k: int) -> Float64[ndarray, "ranking"]:
        """Mean ``ΔKL`` of the first k heads of each random ranking."""
        return self.measured.delta(self.top_sets(k))

    def cross_fitted_p_value(self, k: int) -> PValue:
        """How often relabelled halves reach the cross-fitted effect of the top k heads.

        When no head is reliably better than another, the ranking of one half says nothing about the
        other, and the p-value is uniform. A relabelling that maps the top k of both halves onto
        themselves always reaches the effect; how many do is known, so only the others are sampled.
        """
        first = self.cross_fit.first[0]
        delta_nats = self.measured.delta_nats(self.top_sets(k))
        on_first, on_second = np.split(delta_nats, 2)
        n_prompts = delta_nats.shape[1]
        null = (on_first @ first + on_second @ ~first) / n_prompts
        observed = self.cross_fit.split_delta_nats(0)[k].mean()
        others = null[~self._unchanged(k)]
        share = self._share_unchanged(k)
        return PValue(
            share + (1 - share) * monte_carlo_p_value(others, observed),
            share + (1 - share) / (1 + len(others)),
        )

    def _top(self, k: int) -> list[Int64[ndarray, "k"]]:
        """Sorted top k heads of the first and of the second half."""
        return [np.sort(order[:k]) for order in self.cross_fit.orders[0]]

    def _unchanged(self, k: int) -> Bool[ndarray, "draw"]:
        """Which relabellings map the top k of both halves onto themselves."""
        first, second = self._top(k)
        same_first = (np.sort(self.of_first[:, :k], axis=1) == first).all(1)
        return same_first & (np.sort(self.of_second[:, :k], axis=1) == second).all(1)

    def _share_unchanged(self, k: int) -> float:
        """The share of all relabellings that do: heads move only within four parts."""
        first, second = (set(top.tolist()) for top in self._top(k))
        both, n_heads = len(first & second), self.measured.n_heads
        parts = (both, k - both, k - both, n_heads - 2 * k + both)
        return prod(factorial(part) for part in parts) / factorial(n_heads)


def random_sets(
    rankings: RandomRankings,
    k: int,
    *,
    full_delta: float | None,
    seeds: dict[int, Indices],
) -> RandomSets:
    """Random head sets of one size: all of them when they are few, draws otherwise.

    The draws of all sizes are the first k heads of the same random rankings.

    Args:
        rankings: the random rankings that give the draws.
        k: the size.
        full_delta: mean ``ΔKL(ALL)``; None when it cannot be a denominator.
        seeds: the run's own random sets of that size, by seed.
    """
    measured = rankings.measured
    exhaustive = comb(measured.n_heads, k) <= EXHAUSTIVE_LIMIT
    everything = list(combinations(range(measured.n_heads), k)) if exhaustive else []
    delta = measured.delta(everything) if exhaustive else rankings.delta(k)
    of_seeds = dict(zip(seeds, measured.delta(seeds.values()) if seeds else [], strict=True))
    return describe(k, delta, exhaustive, full_delta=full_delta, of_seeds=of_seeds)


def plain_p_value(random: RandomSets, observed: float) -> PValue:
    """How often random sets reach the effect of a set of their size.

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
        p_value: probability that a random ranking is as extreme as the given one.
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
