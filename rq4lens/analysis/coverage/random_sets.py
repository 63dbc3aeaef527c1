"""Random head sets: where they are measured, how they spread, and whether top heads beat them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import ceil, comb
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from scipy.sparse import csr_array
from scipy.special import stdtr, stdtrit

from rq4lens.analysis.coverage.curves import CrossFit
from rq4lens.analysis.effects.measured import Indices, MeasuredSets
from rq4lens.analysis.records import RandomSets
from rq4lens.analysis.statistics.bootstrap import LEVEL, group_membership
from rq4lens.errors import UserError

EXHAUSTIVE_LIMIT = 200
"""Sizes with at most this many sets are enumerated."""

FEW_SETS = 20
"""Sizes with at most this many sets cost next to nothing, and are always measured."""

MAX_ROWS = 400_000
"""Rows (prompt x head set, raw and mapped) that random sets take unless sizes are named.

About ten seconds of two CPU cores for the built-in pair.
"""


def random_sizes(
    n_heads: int,
    own: Sequence[int],
    n_prompts: int,
    n_random_sets: int,
    asked: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The sizes of random sets.

    Those of the run are always among them, and so are 1 and all sizes with few sets. As long as
    ``MAX_ROWS`` allows, the middle of the widest gap between two sizes is added, until there is no
    gap.

    Args:
        n_heads: heads of the layer.
        own: the run's own sizes.
        n_prompts: measured prompts.
        n_random_sets: sets drawn of a size that is not enumerated.
        asked: sizes that are named instead of chosen.

    Returns:
        The sizes, ascending.

    Raises:
        UserError: if a named size does not fit the layer.
    """
    for k in asked or ():
        if not 1 <= k <= n_heads:
            raise UserError(
                f"random sets of {k} heads do not exist: the layer has {n_heads}; give sizes from "
                f"1 to {n_heads}."
            )
    if asked is not None:
        return tuple(sorted({*own, *asked}))
    sizes = range(1, n_heads + 1)
    chosen = {1, *own, *(k for k in sizes if comb(n_heads, k) <= FEW_SETS)}
    left = MAX_ROWS // (2 * n_prompts) - sum(_n_sets(n_heads, k, n_random_sets) for k in chosen)
    while len(chosen) < n_heads:
        low, high = max(pairwise(sorted(chosen)), key=lambda gap: (gap[1] - gap[0], -gap[0]))
        k = (low + high) // 2
        left -= _n_sets(n_heads, k, n_random_sets)
        if left < 0:
            break
        chosen.add(k)
    return tuple(sorted(chosen))


def _n_sets(n_heads: int, k: int, n_random_sets: int) -> int:
    return every if (every := comb(n_heads, k)) <= EXHAUSTIVE_LIMIT else n_random_sets


QUANTILES = (0.025, 0.25, 0.5, 0.75, 0.975)


class PValue(NamedTuple):
    """A p-value, and the smallest it could have been."""

    value: float
    smallest: float


FEWEST_SQUARES = 4
"""Squares of rankings that show how much squares differ."""

PRECISION_PCT = 2.0
"""Drawing stops when the mean of every size has a standard error of at most this much coverage,"""

BAND_HOLDS_PCT = 90.0
"""and the band of some rankings holds this share of the others."""

FOLDS = 8
"""Parts of the rankings, each held against the band of the others."""


@dataclass(frozen=True)
class RandomRankings:
    """Random rankings of the heads of one layer; their first k heads are random sets of size k.

    They come in squares: the rotations of one random ranking, in which every head stands at every
    place once. Each is as random as any other, and what single heads do cancels in their mean.
    """

    measured: MeasuredSets
    rankings: Int64[ndarray, "ranking head"]

    @classmethod
    def draw(cls, measured: MeasuredSets, n_sets: int, seed: int) -> RandomRankings:
        """Draw random rankings."""
        n_heads = measured.n_heads
        first = np.tile(np.arange(n_heads), (ceil(n_sets / n_heads), 1))
        first = np.random.default_rng(seed).permuted(first, axis=1)
        # Half a turn between neighbours: the top of one is the bottom of the other.
        turns = np.arange(n_heads) // 2 + np.arange(n_heads) % 2 * ((n_heads + 1) // 2)
        places = (turns[:, None] + np.arange(n_heads)) % n_heads
        return cls(measured, first[:, places].reshape(-1, n_heads)[:n_sets])

    def until_precise(self, ks: Sequence[int], full_delta: float) -> RandomRankings:
        """As many of the rankings as it takes to know means and band, in whole squares."""
        drawn = [k for k in ks if not self.is_exhaustive(k)]
        n_heads, enough = self.measured.n_heads, PRECISION_PCT / 100 * abs(full_delta)
        for n_sets in range(FEWEST_SQUARES * n_heads, len(self.rankings), n_heads):
            some = replace(self, rankings=self.rankings[:n_sets])
            self.measured.require(heads for k in ks for heads in some.top_sets(k))
            if not all(error_of_mean(some.delta(k), n_heads) <= enough for k in drawn):
                continue
            if band_holds(np.stack([some.delta(k) for k in ks], axis=1)) >= BAND_HOLDS_PCT:
                return some
        return self

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
    rankings: RandomRankings, k: int, full_delta: float | None, seeds: Mapping[int, Indices]
) -> RandomSets:
    """Random head sets of one size: all of them when they are few, draws otherwise."""
    delta, of_seeds = rankings.measured.delta(rankings.sets(k)), deltas_of(rankings.measured, seeds)
    drawn = described(k, delta, full_delta, of_seeds)
    exhaustive = rankings.is_exhaustive(k)
    error = 0.0 if exhaustive else error_of_mean(delta, rankings.measured.n_heads)
    if full_delta is not None and np.isfinite(error):
        drawn = replace(drawn, mean_error_pct=100 * error / abs(full_delta))
    return replace(drawn, exhaustive=exhaustive)


def error_of_mean(delta: Float64[ndarray, "ranking"], n_heads: int) -> float:
    """Standard error of the mean of drawn sets, from how much squares differ; infinite of one."""
    whole = len(delta) // n_heads
    draws = delta[: whole * n_heads].reshape(whole, n_heads).mean(1) if whole > 1 else delta
    return float(draws.std(ddof=1) / np.sqrt(len(draws))) if len(draws) > 1 else np.inf


def deltas_of(measured: MeasuredSets, seeds: Mapping[int, Indices]) -> dict[int, float]:
    """Mean ``ΔKL`` of the run's own random sets, by seed."""
    return dict(zip(seeds, measured.delta(seeds.values()).tolist(), strict=True))


def described(
    k: int, delta: Float64[ndarray, "draw"], full_delta: float | None, of_seeds: Mapping[int, float]
) -> RandomSets:
    """The record of drawn sets whose mean ``ΔKL`` is known."""
    coverage = np.empty(0) if full_delta is None else 100 * delta / full_delta
    levels = np.quantile(coverage, QUANTILES).tolist() if len(coverage) else []
    return RandomSets(
        k=k,
        n_subsets=len(delta),
        exhaustive=False,
        delta_nats=tuple(delta.tolist()),
        coverage_pct=tuple(coverage.tolist()),
        mean_pct=float(coverage.mean()) if len(coverage) else None,
        quantiles_pct={f"{q:g}": value for q, value in zip(QUANTILES, levels, strict=False)},
        seeds_pct={}
        if full_delta is None
        else {seed: float(100 * value / full_delta) for seed, value in of_seeds.items()},
    )


def random_band(
    random_pct: Float64[ndarray, "ranking k"],
) -> tuple[Float64[ndarray, "k"], Float64[ndarray, "k"]]:
    """Lower and upper end of a band that holds a random ranking's coverage at every k at once.

    It is the envelope of the least extreme rankings. How extreme a ranking is depends on its most
    extreme place among all at any k, then on its next one, and so on; the band therefore follows
    skewed distributions and never leaves the range of the draws.

    Source:
        Myllymäki et al., Global Envelope Tests for Spatial Processes (JRSS B 2017), section 3.3:
        extreme rank length.
    """
    places = _by_extremeness(random_pct)
    held = random_pct[places >= np.sort(places)[-ceil(LEVEL * len(places))]]
    return held.min(0), held.max(0)


def band_holds(curves: Float64[ndarray, "ranking k"]) -> float:
    """How many of the rankings lie within the band of the others, in percent."""
    n_held = 0
    for part in np.array_split(np.arange(len(curves)), min(FOLDS, len(curves))):
        low, high = random_band(np.delete(curves, part, axis=0))
        n_held += int(((curves[part] >= low) & (curves[part] <= high)).all(1).sum())
    return 100 * n_held / len(curves)


def _by_extremeness(curves: Float64[ndarray, "ranking k"]) -> Int64[ndarray, "ranking"]:
    """Place of each curve from the most extreme, 0, up; equal ones share a place."""
    from_below, from_above = (_n_at_most(each) for each in (curves, -curves))
    places = np.sort(np.minimum(from_below, from_above), axis=1)
    return np.unique(places, axis=0, return_inverse=True)[1].reshape(-1)


def _n_at_most(values: Float64[ndarray, "ranking k"]) -> Int64[ndarray, "ranking k"]:
    """How many of its column are not above each value."""
    columns = [np.searchsorted(np.sort(each), each, side="right") for each in values.T]
    return np.stack(columns, axis=1)


FEWEST_GROUPS = 4
"""Each half needs two groups of prompts to show how much groups differ."""

TOO_FEW_TO_TEST = (
    "there are fewer than four groups of prompts, so halves do not show how much they vary"
)

ROUNDING = 1e-12
"""Differences below this share of the numbers they come from are rounding."""


def untestable_because(cross_fit: CrossFit) -> str | None:
    """Why the test cannot be made; None when it can."""
    too_few = len(set(cross_fit.measured.groups)) < FEWEST_GROUPS
    return cross_fit.undefined_because or (TOO_FEW_TO_TEST if too_few else None)


def cross_fitted_p_value(
    cross_fit: CrossFit, k: int, average_nats: Float64[ndarray, "prompt"]
) -> PValue:
    """P-value of the top k heads of one half on the other half, from all splits.

    It never falls below ``2^-g`` with g groups in a half: that is all that so many groups can show
    without the assumption that they are normal (every sign alike).
    """
    membership = group_membership(cross_fit.measured.groups)
    n_half = membership.shape[0] // 2
    smallest = 2.0**-n_half
    scores = cross_fit.split_delta_nats[:, k]
    gains = scores - average_nats
    gains[np.abs(gains) <= ROUNDING * np.abs(scores).max(-1, keepdims=True)] = 0.0
    t = [_skew_corrected_t(gain, membership) for gain in gains]
    # Student's t: its upper tail is its distribution function at minus t.
    mean_t = np.minimum(t, -stdtrit(n_half - 1, smallest)).mean()
    return PValue(float(stdtr(n_half - 1, -mean_t)), smallest)


def _skew_corrected_t(gain: Float64[ndarray, "prompt"], membership: csr_array) -> float:
    """Mean gain in units of its largest possible standard deviation, less what skewness adds.

    Without any gain, on no prompt, it is minus infinity: the null holds to the letter.

    Source:
        Hall, On the Removal of Skewness by Transformation (JRSS B 1992), equation 2.2. Where it
        would raise t, t is kept: estimated from few groups, it is no reason to claim more.
    """
    mean = gain.mean()
    deviations = membership @ (gain - mean)
    variance = (deviations**2).mean()
    n_groups, n_prompts = membership.shape
    if np.abs(deviations).max() <= ROUNDING * np.abs(gain).max():
        return np.inf if mean > 0 else -np.inf
    independent = np.sqrt(variance * n_groups**2 / (n_groups - 1)) / n_prompts
    t = mean / (np.sqrt(2) * independent)
    skewness = (deviations**3).mean() / variance**1.5 / np.sqrt(n_groups // 2)
    corrected = t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6
    return float(min(t, corrected))
