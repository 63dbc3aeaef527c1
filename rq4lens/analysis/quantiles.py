"""Which quantiles of a bootstrap distribution are the ends of an interval."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray
from scipy.special import ndtr, ndtri


def bca_levels(
    point: Float64[ndarray, "quantity"],
    draws: Float64[ndarray, "resample quantity"],
    jackknife: Float64[ndarray, "group quantity"],
    tails: Float64[ndarray, "tail"],
) -> Float64[ndarray, "tail quantity"]:
    """Quantile levels of the bias-corrected and accelerated interval.

    Args:
        point: the quantities on all prompts.
        draws: the quantities in each resample, none of them constant.
        jackknife: the quantities with each group left out.
        tails: nominal tail levels, for instance 0.025 and 0.975.

    Returns:
        The levels at which the draws are to be read.

    Source:
        Efron, Better Bootstrap Confidence Intervals (JASA 1987), equations 2.3 and 6.6.
    """
    # Ties with the point count half, as in scipy: discrete scores would bias the correction.
    below = ((draws < point).mean(0) + (draws <= point).mean(0)) / 2
    bias = ndtri(below)
    deviations = jackknife.mean(0) - jackknife
    scale = (deviations**2).sum(0)
    cubes = (deviations**3).sum(0)
    acceleration = np.divide(cubes, 6 * scale**1.5, out=np.zeros_like(scale), where=scale > 0)
    shifted = bias + ndtri(tails)[:, None]
    with np.errstate(invalid="ignore"):
        levels = ndtr(bias + shifted / (1 - acceleration * shifted))
    # A point beyond every draw has no finite bias correction: read the draws at their end.
    return np.where(np.isfinite(bias), levels, below)


def quantiles(
    draws: Float64[ndarray, "resample quantity"], levels: Float64[ndarray, "tail quantity"]
) -> Float64[ndarray, "tail quantity"]:
    """Quantiles of each column at levels of its own, interpolated linearly."""
    ordered = np.sort(draws, axis=0)
    place = levels * (len(ordered) - 1)
    below: Int64[ndarray, "tail quantity"] = np.floor(place).astype(int)
    above = np.minimum(below + 1, len(ordered) - 1)
    low = np.take_along_axis(ordered, below, axis=0)
    high = np.take_along_axis(ordered, above, axis=0)
    return low + (place - below) * (high - low)


def is_constant(draws: Float64[ndarray, "resample quantity"]) -> Bool[ndarray, "quantity"]:
    """Whether a quantity is the same in every resample, up to rounding of the weighted sums."""
    spread = draws.max(0) - draws.min(0)
    size = np.abs(draws).max(0)
    rounding = 64 * np.finfo(float).eps * size
    return ~(spread > rounding)
