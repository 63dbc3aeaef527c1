"""Are the heads ranked first on one half of the prompts better than others on the other half?

Null: on the other half they do no better than the average random set of their size. Heads need not
be exchangeable: they may vary over prompts as differently as idle and noisy heads do.

The gain of a split is, prompt by prompt, the cross-fitted effect minus the average over random
sets. Given the ranking, a half's mean gain has expectation 0 under the null. The two halves' means
depend on each other, since each half ranks the other's heads, and so do the splits; but the
standard deviation of a mean of dependent numbers is at most the mean of theirs, which for two
halves is sqrt(2) times what independent halves would have. A gain divided by that bound is a t
statistic that varies no more than Student's, and neither does its mean over splits.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from scipy.stats import t as student

from rq4lens.analysis.crossfit import CrossFit
from rq4lens.analysis.random_sets import PValue
from rq4lens.analysis.statistics import group_membership

FEWEST_GROUPS = 4
"""Each half needs two groups of prompts to show how much groups differ."""

TOO_FEW_TO_TEST = (
    "there are fewer than four groups of prompts, so halves do not show how much they vary"
)

ROUNDING = 1e-12
"""Differences below this share of the numbers they come from are rounding."""


def untestable_because(cross_fit: CrossFit) -> str | None:
    """Why the test cannot be made; None when it can."""
    if cross_fit.undefined_because is not None:
        return cross_fit.undefined_because
    if len(set(cross_fit.measured.groups)) < FEWEST_GROUPS:
        return TOO_FEW_TO_TEST
    return None


def cross_fitted_p_value(
    cross_fit: CrossFit, k: int, average_nats: Float64[ndarray, "prompt"]
) -> PValue:
    """P-value of the top k heads of one half on the other half, from all splits.

    It never falls below ``2^-g`` with g groups in a half: that is all that so many groups can show
    without the assumption that they are normal (every sign alike).

    Args:
        cross_fit: the rankings on halves, of at least four groups of prompts.
        k: number of heads.
        average_nats: ``ΔKL`` of each prompt, averaged over random sets of k heads.
    """
    membership = group_membership(cross_fit.measured.groups)
    n_half = len(membership) // 2
    smallest = 2.0**-n_half
    largest_t = float(student.isf(smallest, n_half - 1))
    t = np.mean(
        [
            min(_skew_corrected_t(_gain(scores[k], average_nats), membership), largest_t)
            for scores in cross_fit.split_delta_nats
        ]
    )
    return PValue(float(student.sf(t, n_half - 1)), smallest)


def _gain(
    scores: Float64[ndarray, "prompt"], average_nats: Float64[ndarray, "prompt"]
) -> Float64[ndarray, "prompt"]:
    gain = scores - average_nats
    return np.where(np.abs(gain) <= ROUNDING * np.abs(scores).max(), 0.0, gain)


def _skew_corrected_t(
    gain: Float64[ndarray, "prompt"], membership: Float64[ndarray, "group prompt"]
) -> float:
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
