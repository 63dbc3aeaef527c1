"""Coverage curves, cross-fitted ones among them: their areas, and bands that hold a whole curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, floor, sqrt

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from rq4lens.analysis.effects.measured import Indices, MeasuredLayer, MeasuredSets, prefixes
from rq4lens.analysis.records import CoverageCurve
from rq4lens.analysis.statistics.bootstrap import (
    LEVEL,
    NO_SPREAD,
    Estimate,
    Interval,
    Resampled,
    exact,
    group_membership,
    undefined,
)
from rq4lens.results import HeadRanking, order_of, single_scores

CARRIED = 0.9
"""Share of the full effect that ``k90`` asks for."""

Curves = Float64[ndarray, "*rows k"]


def ranking_curve(ranking: HeadRanking, layer: MeasuredLayer) -> CoverageCurve:
    """Coverage of the top k heads of a ranking, for k = 0 to H."""
    sets = prefixes(ranking.heads)
    return curve_of(ranking.method, sets, layer.measured.delta_nats(sets), layer)


def curve_of(
    name: str,
    sets: Sequence[Indices],
    delta_nats: Float64[ndarray, "k prompt"],
    layer: MeasuredLayer,
    exhaustive: tuple[bool, ...] | None = None,
) -> CoverageCurve:
    """The curve of one head set for each k."""
    means = layer.bootstrap.resampled(np.concatenate([delta_nats, layer.whole_nats[None]]))
    shares = means.apply(share_of_whole)
    reason = layer.full.undefined_because
    low = high = np.empty(0)
    coverage_pct, areas = [undefined(reason or "")] * len(sets), [undefined(reason or "")] * 3
    if reason is None:
        low, high = simultaneous_band(shares)
        coverage_pct, areas = _coverage(shares, delta_nats, layer), _areas(shares)
    return CoverageCurve(
        ranking=name,
        head_sets=tuple(sets),
        delta_nats=tuple(means.estimates()[:-1]),
        coverage_pct=tuple(coverage_pct),
        band_low_pct=tuple(100 * low),
        band_high_pct=tuple(100 * high),
        area_pct=areas[0],
        cmd=areas[1],
        k90=areas[2],
        exhaustive=exhaustive,
    )


def share_of_whole(delta: Float64[ndarray, "*rows and_whole"]) -> Curves:
    """``f(k) = ΔKL(k) / ΔKL(ALL)``, or the share of the gap; the whole stands last. Not clipped."""
    return delta[..., :-1] / delta[..., -1:]


def area(values: Curves) -> Float64[ndarray, "*rows"]:
    """Area under a curve over k/H, by trapezoids.

    Source:
        Mueller et al., MIB: A Mechanistic Interpretability Benchmark (2025), section 3: CPR is the
        area under f, CMD the area between f and 1.
    """
    return np.trapezoid(values, dx=1 / (values.shape[-1] - 1), axis=-1)


def fewest_heads(shares: Curves, share: float = CARRIED) -> ndarray:
    """Smallest k that reaches the given share of what all heads do; the full set always does."""
    # All heads have their own share up to rounding: the last comparison must not depend on it.
    reached = shares[..., :-1] >= share * shares[..., -1:]
    last = np.ones((*reached.shape[:-1], 1), dtype=bool)
    return np.argmax(np.concatenate([reached, last], axis=-1), axis=-1)


def _coverage(
    shares: Resampled, delta_nats: Float64[ndarray, "k prompt"], layer: MeasuredLayer
) -> list[Estimate]:
    # No heads cover nothing and all heads cover everything: that is what coverage means.
    if layer.all_is_whole:
        return [exact(0.0), *shares.apply(lambda f: 100 * f).estimates()[1:-1], exact(100.0)]
    # A share of the gap has one interval, wherever it stands.
    whole = layer.whole_nats[None]
    return [exact(0.0), *layer.bootstrap.shares(whole, whole - delta_nats)[1:]]


def _areas(shares: Resampled) -> list[Estimate]:
    def areas(f: Curves) -> ndarray:
        return np.stack([100 * area(f), area(np.abs(1 - f))], axis=-1)

    # k90 takes whole numbers only: a smooth correction of its quantiles would make no sense.
    k90 = shares.apply(lambda f: fewest_heads(f)[..., None]).estimates("percentile")
    return [*shares.apply(areas).estimates(), *k90]


def simultaneous_band(curves: Resampled) -> tuple[Float64[ndarray, "k"], Float64[ndarray, "k"]]:
    """A band that holds the whole curve at once with 95% confidence.

    Its half-width is a number of standard deviations, the same at every k.
    """
    spread = curves.draws.std(0)
    varies = spread > 1e-12 * spread.max(initial=0.0)
    deviations = np.abs(curves.draws - curves.point)[:, varies] / spread[varies]
    width = spread * np.quantile(deviations.max(-1, initial=0.0), LEVEL)
    return curves.point - width, curves.point + width


# Ranked on one half of the prompts, scored on the other

TOO_FEW_GROUPS = "there are fewer than two groups of prompts, so they cannot be split"


def half_splits(groups: Sequence[str], n_splits: int, seed: int) -> Bool[ndarray, "split prompt"]:
    """Random halves of the prompts, whole groups at a time."""
    membership = group_membership(groups)
    n_groups = membership.shape[0]
    if n_groups < 2:
        return np.empty((0, len(groups)), dtype=bool)
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(n_groups), (n_splits, 1)), axis=1)
    return np.asarray((order < n_groups // 2) @ membership > 0)


def half_means(
    values: Float64[ndarray, "quantity prompt"], first: Bool[ndarray, "split prompt"]
) -> Float64[ndarray, "split half quantity"]:
    """Means of quantities over the first and the second half of each split."""
    halves = np.stack([first, ~first], axis=1).astype(float)
    return (halves / halves.sum(-1, keepdims=True)) @ values.T


@dataclass(frozen=True)
class CrossFit:
    """Heads ranked on both halves of each split; ``first`` are the prompts of the first half."""

    measured: MeasuredSets
    first: Bool[ndarray, "split prompt"]
    orders: Int64[ndarray, "split half head"]

    @classmethod
    def of(cls, layer: MeasuredLayer, n_splits: int) -> CrossFit:
        """Rank single heads on each half."""
        ranked_on = layer.measured.ranked_by(layer.rank_by)
        first = half_splits(ranked_on.groups, n_splits, layer.bootstrap.seed)
        whole_nats, part_nats = ranked_on.kl_nats(ranked_on.singles)
        whole, delta = (half_means(each, first) for each in (whole_nats, whole_nats - part_nats))
        return cls(layer.measured, first, order_of(single_scores(whole, delta, layer.rank_by)))

    @property
    def undefined_because(self) -> str | None:
        """Why nothing can be cross-fitted; None when it can."""
        return None if len(self.first) else TOO_FEW_GROUPS

    @cached_property
    def split_delta_nats(self) -> Float64[ndarray, "split k prompt"]:
        """Out-of-half ``ΔKL`` for k = 0 to H in each split.

        Each prompt is scored with the top k heads of the half it does not belong to.
        """
        scored = []
        for first, orders in zip(self.first, self.orders.tolist(), strict=True):
            of_first, of_second = (self.measured.delta_nats(prefixes(order)) for order in orders)
            scored.append(np.where(first, of_second, of_first))
        return np.stack(scored)

    @property
    def delta_nats(self) -> Float64[ndarray, "k prompt"]:
        """Out-of-half ``ΔKL`` for k = 0 to H, averaged over the splits."""
        return self.split_delta_nats.mean(0)


def cross_fitted_curve(name: str, cross_fit: CrossFit, layer: MeasuredLayer) -> CoverageCurve:
    """Coverage of the top k of one half of the prompts on the other half, for k = 0 to H."""
    n_heads = cross_fit.measured.n_heads
    # The sets differ between halves and splits, so the curve names none.
    sets: list[Indices] = [()] * (n_heads + 1)
    mean, *splits = (
        curve_of(name, sets, delta_nats, layer)
        for delta_nats in (cross_fit.delta_nats, *cross_fit.split_delta_nats)
    )
    low, high = _band(mean, splits)
    k90 = across_splits(mean.k90, [split.k90 for split in splits])
    if k90.interval is not None:  # a count of heads has whole ends between 1 and all heads
        ends = max(floor(k90.interval.low), 1), min(ceil(k90.interval.high), n_heads)
        k90 = replace(k90, interval=Interval(*map(float, ends)))
    return replace(
        mean,
        delta_nats=_each(mean.delta_nats, [split.delta_nats for split in splits]),
        coverage_pct=_each(mean.coverage_pct, [split.coverage_pct for split in splits]),
        band_low_pct=low,
        band_high_pct=high,
        area_pct=across_splits(mean.area_pct, [split.area_pct for split in splits]),
        cmd=across_splits(mean.cmd, [split.cmd for split in splits]),
        k90=k90,
    )


def across_splits(mean: Estimate, splits: Sequence[Estimate]) -> Estimate:
    """A cross-fitted number with an interval that is valid however halves and splits depend.

    It reaches as far as those of the splits do on average, times ``sqrt(2)``.
    """
    if mean.value is None:
        return mean
    missing = [each.reason for each in splits if each.interval is None]
    if any(reason != NO_SPREAD for reason in missing) or len(missing) == len(splits):
        return Estimate(mean.value, None, missing[0])
    # A split that is the same in every resample adds no width.
    seen = [(each.value, each.interval) for each in splits if each.interval is not None]
    below = sum(value - interval.low for value, interval in seen if value is not None)
    above = sum(interval.high - value for value, interval in seen if value is not None)
    if below == above == 0:
        return mean
    low, high = (sqrt(2) * max(width, 0.0) / len(splits) for width in (below, above))
    return Estimate(mean.value, Interval(mean.value - low, mean.value + high))


def _each(mean: Sequence[Estimate], splits: Sequence[Sequence[Estimate]]) -> tuple[Estimate, ...]:
    by_k = zip(*splits, strict=True)
    return tuple(across_splits(all_, each) for all_, each in zip(mean, by_k, strict=True))


def _band(
    mean: CoverageCurve, splits: Sequence[CoverageCurve]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not mean.band_low_pct:
        return (), ()
    widths = [np.subtract(split.band_high_pct, split.band_low_pct) / 2 for split in splits]
    width = sqrt(2) * np.mean(widths, axis=0)
    middle = np.add(mean.band_low_pct, mean.band_high_pct) / 2
    return tuple((middle - width).tolist()), tuple((middle + width).tolist())
