"""Coverage curves, their areas, and bands that hold a whole curve at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.effects.measured import Indices, MeasuredLayer, prefixes
from rq4lens.analysis.records import CoverageCurve
from rq4lens.analysis.statistics.bootstrap import LEVEL, Estimate, Resampled, exact, undefined
from rq4lens.results import HeadRanking

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
    if reason is None:
        (low, high), coverage_pct = simultaneous_band(shares), _coverage(shares, delta_nats, layer)
        area_pct, cmd, k90 = _areas(shares)
    else:
        low = high = np.empty(0)
        coverage_pct = [undefined(reason)] * len(sets)
        area_pct = cmd = k90 = undefined(reason)
    return CoverageCurve(
        ranking=name,
        head_sets=tuple(sets),
        delta_nats=tuple(means.estimates()[:-1]),
        coverage_pct=tuple(coverage_pct),
        band_low_pct=tuple(100 * low),
        band_high_pct=tuple(100 * high),
        area_pct=area_pct,
        cmd=cmd,
        k90=k90,
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


def simultaneous_band(
    curves: Resampled,
) -> tuple[Float64[ndarray, "k"], Float64[ndarray, "k"]]:
    """A band that holds the whole curve at once with 95% confidence.

    Its half-width is a number of standard deviations, the same at every k.
    """
    spread = curves.draws.std(0)
    varies = spread > 1e-12 * spread.max(initial=0.0)
    deviations = np.abs(curves.draws - curves.point)[:, varies] / spread[varies]
    width = spread * np.quantile(deviations.max(-1, initial=0.0), LEVEL)
    return curves.point - width, curves.point + width
