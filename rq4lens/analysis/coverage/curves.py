"""Coverage curves, their areas, and bands that hold a whole curve at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.effects.measured import Indices, MeasuredSets, prefixes
from rq4lens.analysis.records import CoverageCurve, FullEffect
from rq4lens.analysis.statistics.bootstrap import (
    LEVEL,
    Bootstrap,
    Estimate,
    Resampled,
    exact,
    undefined,
)
from rq4lens.results import HeadRanking

CARRIED = 0.9
"""Share of the full effect that ``k90`` asks for."""

Curves = Float64[ndarray, "*rows k"]


def ranking_curve(
    ranking: HeadRanking, measured: MeasuredSets, full: FullEffect, bootstrap: Bootstrap
) -> CoverageCurve:
    """Coverage of the top k heads of a ranking, for k = 0 to H."""
    sets = prefixes(ranking.heads)
    return curve_of(ranking.method, sets, measured.delta_nats(sets), full, bootstrap)


def curve_of(
    name: str,
    sets: Sequence[Indices],
    delta_nats: Float64[ndarray, "k prompt"],
    full: FullEffect,
    bootstrap: Bootstrap,
    exhaustive: tuple[bool, ...] | None = None,
) -> CoverageCurve:
    """The curve of one head set for each k."""
    means = bootstrap.resampled(delta_nats)
    shares = means.apply(share_of_full)
    usable = full.undefined_because is None
    low, high = simultaneous_band(shares) if usable else (np.empty(0), np.empty(0))
    areas = _areas(shares, full.undefined_because)
    return CoverageCurve(
        ranking=name,
        head_sets=tuple(sets),
        delta_nats=tuple(means.estimates()),
        coverage_pct=tuple(_coverage(shares, full.undefined_because)),
        band_low_pct=tuple(100 * low),
        band_high_pct=tuple(100 * high),
        area_pct=areas[0],
        cmd=areas[1],
        k90=areas[2],
        exhaustive=exhaustive,
    )


def share_of_full(delta: Curves) -> Curves:
    """``f(k) = ΔKL(k) / ΔKL(ALL)``; never clipped."""
    return delta / delta[..., -1:]


def area(values: Curves) -> Float64[ndarray, "*rows"]:
    """Area under a curve over k/H, by trapezoids.

    Source:
        Mueller et al., MIB: A Mechanistic Interpretability Benchmark (2025), section 3: CPR is the
        area under f, CMD the area between f and 1.
    """
    return np.trapezoid(values, dx=1 / (values.shape[-1] - 1), axis=-1)


def fewest_heads(shares: Curves, share: float = CARRIED) -> ndarray:
    """Smallest k whose share reaches the given one; the full set always does."""
    # All heads have share 1 up to rounding, so the last comparison must not depend on it.
    reached = shares[..., :-1] >= share
    last = np.ones((*reached.shape[:-1], 1), dtype=bool)
    return np.argmax(np.concatenate([reached, last], axis=-1), axis=-1)


def _coverage(shares: Resampled, undefined_because: str | None) -> list[Estimate]:
    if undefined_because is not None:
        return [undefined(undefined_because)] * len(shares.point)
    estimates = shares.apply(lambda f: 100 * f).estimates()
    # No heads cover nothing and all heads cover everything: that is what coverage means.
    return [exact(0.0), *estimates[1:-1], exact(100.0)]


def _areas(shares: Resampled, undefined_because: str | None) -> list[Estimate]:
    if undefined_because is not None:
        return [undefined(undefined_because)] * 3

    def areas(f: Curves) -> ndarray:
        return np.stack([100 * area(f), area(np.abs(1 - f))], axis=-1)

    # k90 takes whole numbers only: a smooth correction of its quantiles would make no sense.
    k90 = shares.apply(lambda f: fewest_heads(f)[..., None]).estimates(method="percentile")
    return [*shares.apply(areas).estimates(), *k90]


def simultaneous_band(
    curves: Resampled, level: float = LEVEL
) -> tuple[Float64[ndarray, "k"], Float64[ndarray, "k"]]:
    """A band that holds the whole curve at once with the given confidence."""
    width = max_deviation_width(curves.draws - curves.point, curves.draws.std(0), level)
    return curves.point - width, curves.point + width


def max_deviation_width(
    deviations: Float64[ndarray, "draw k"], spread: Float64[ndarray, "k"], level: float
) -> Float64[ndarray, "k"]:
    """Half-width per k such that a share ``level`` of the draws stays within it at every k."""
    return spread * np.quantile(largest_deviation(deviations, spread), level)


def largest_deviation(
    deviations: Float64[ndarray, "draw k"], spread: Float64[ndarray, "k"]
) -> Float64[ndarray, "draw"]:
    """Largest deviation over k of each draw, in standard deviations; 0 where nothing varies."""
    varies = spread > 1e-12 * np.abs(spread).max(initial=0.0)
    if not varies.any():
        return np.zeros(len(deviations))
    return (np.abs(deviations[:, varies]) / spread[varies]).max(-1)
