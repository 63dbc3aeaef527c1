"""The cross-fitted coverage curve, with intervals that hold however the halves depend.

Rankings are frozen: the interval is for the mean true coverage of the heads that the halves chose.
Each half ranks the heads that the other is scored with, so where rankings are unstable the two
halves' scores depend on each other, and resampling prompts under frozen rankings shows too little
spread. The standard deviation of a mean of dependent numbers is at most the mean of theirs: for two
halves sqrt(2) times what is seen, and over splits the mean of what each split shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, floor, sqrt

import numpy as np

from rq4lens.analysis.crossfit import CrossFit
from rq4lens.analysis.curves import curve_of
from rq4lens.analysis.measured import Indices
from rq4lens.analysis.metrics import FullEffect
from rq4lens.analysis.records import CoverageCurve
from rq4lens.analysis.statistics import CONSTANT, Bootstrap, Estimate, Interval

WIDENED = "{}, mean over splits, times sqrt(2): valid however the halves depend"


def cross_fitted_curve(
    name: str, cross_fit: CrossFit, full: FullEffect, bootstrap: Bootstrap
) -> CoverageCurve:
    """Coverage of the top k of one half of the prompts on the other half, for k = 0 to H.

    Args:
        name: what the curve is called.
        cross_fit: rankings on halves that can be made, and where they are scored.
        full: the full effect.
        bootstrap: the resamples.
    """
    # The sets differ between halves and splits, so the curve names none.
    sets: list[Indices] = [()] * (cross_fit.measured.n_heads + 1)
    mean, *splits = (
        curve_of(name, sets, delta_nats, full, bootstrap)
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
        cpr=across_splits(mean.cpr, [split.cpr for split in splits]),
        cmd=across_splits(mean.cmd, [split.cmd for split in splits]),
        k90=_whole_heads(k90, cross_fit.measured.n_heads),
    )


def across_splits(mean: Estimate, splits: Sequence[Estimate]) -> Estimate:
    """A cross-fitted number with an interval that is valid however halves and splits depend.

    Args:
        mean: the number from all splits; its own interval is not used.
        splits: the number of each split, with an interval under frozen rankings.
    """
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
