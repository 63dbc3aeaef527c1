"""Ranked on one half of the prompts, scored on the other: the cross-fitted coverage curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, floor, sqrt

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from rq4lens.analysis.coverage.curves import curve_of
from rq4lens.analysis.effects.measured import Indices, MeasuredLayer, MeasuredSets, prefixes
from rq4lens.analysis.records import CoverageCurve
from rq4lens.analysis.statistics.bootstrap import CONSTANT, Estimate, Interval, group_membership
from rq4lens.results import order_of, single_scores

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
        ranked_on = layer.ranked_on
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


WIDENED = "{}, mean over splits, times sqrt(2): valid however the halves depend"


def cross_fitted_curve(name: str, cross_fit: CrossFit, layer: MeasuredLayer) -> CoverageCurve:
    """Coverage of the top k of one half of the prompts on the other half, for k = 0 to H."""
    # The sets differ between halves and splits, so the curve names none.
    sets: list[Indices] = [()] * (cross_fit.measured.n_heads + 1)
    mean, *splits = (
        curve_of(name, sets, delta_nats, layer)
        for delta_nats in (cross_fit.delta_nats, *cross_fit.split_delta_nats)
    )
    low, high = _band(mean, splits)
    k90 = across_splits(mean.k90, [split.k90 for split in splits])
    return replace(
        mean,
        delta_nats=_each(mean.delta_nats, [split.delta_nats for split in splits]),
        coverage_pct=_each(mean.coverage_pct, [split.coverage_pct for split in splits]),
        band_low_pct=low,
        band_high_pct=high,
        area_pct=across_splits(mean.area_pct, [split.area_pct for split in splits]),
        cmd=across_splits(mean.cmd, [split.cmd for split in splits]),
        k90=_whole_heads(k90, cross_fit.measured.n_heads),
    )


def across_splits(mean: Estimate, splits: Sequence[Estimate]) -> Estimate:
    """A cross-fitted number with an interval that is valid however halves and splits depend."""
    if mean.value is None:
        return mean
    missing = [each.reason for each in splits if each.interval is None]
    if any(reason != CONSTANT for reason in missing) or len(missing) == len(splits):
        return Estimate(mean.value, None, missing[0])
    # A split that is the same in every resample adds no width.
    seen = [(each.value, each.interval) for each in splits if each.interval is not None]
    below = sum(value - interval.low for value, interval in seen if value is not None)
    above = sum(interval.high - value for value, interval in seen if value is not None)
    if below == above == 0:
        return mean
    level, method = seen[0][1].level, seen[0][1].method
    low, high = (sqrt(2) * max(width, 0.0) / len(splits) for width in (below, above))
    interval = Interval(mean.value - low, mean.value + high, level, WIDENED.format(method))
    return Estimate(mean.value, interval)


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


def _whole_heads(k90: Estimate, n_heads: int) -> Estimate:
    """A count of heads has whole ends between 1 and all heads."""
    if k90.interval is None:
        return k90
    low, high = max(floor(k90.interval.low), 1), min(ceil(k90.interval.high), n_heads)
    return replace(k90, interval=replace(k90.interval, low=float(low), high=float(high)))
