"""Sign-flip tests of single heads, corrected for everything that was tried.

Under the null hypothesis a head's ``ΔKL`` is as likely to be negative as positive in every group of
prompts, so flipping the signs of whole groups changes nothing. All heads (and layers and alphas)
are flipped together: the largest statistic of each flip corrects for having looked at all of them.

Source:
    Westfall and Young, Resampling-Based Multiple Testing (1993), algorithm 2.5 (single-step max-T);
    Nichols and Holmes, Nonparametric Permutation Tests for Functional Neuroimaging (2002).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.records import HeadTest, HeadTests
from rq4lens.analysis.statistics.bootstrap import ONE_GROUP, group_membership
from rq4lens.heads import Head

SIGNIFICANT = 0.05
N_FLIPS = 10_000
HOLM_REACH = 0.005
"""Holm multiplies the smallest p-value by the number of tests; it can still become this small."""

CHUNK_VALUES = 2**22
"""Numbers held at once while signs are flipped."""

NO_EFFECT = "the effect is 0 on every prompt"

PerPrompt = Float64[ndarray, "hypothesis prompt"]
PerHypothesis = Float64[ndarray, "hypothesis"]


@dataclass(frozen=True)
class SignFlips:
    """P-values of sign-flip tests; NaN where the effect is 0 everywhere."""

    p_value: Float64[ndarray, "hypothesis"]
    p_max_t: Float64[ndarray, "hypothesis"]
    n_flips: int
    exhaustive: bool

    @property
    def p_value_min(self) -> float:
        """Smallest p-value that can occur."""
        return 2 / self.n_flips if self.exhaustive else 1 / (1 + self.n_flips)


def sign_flips(
    values: PerPrompt, groups: Sequence[str], n_flips: int = N_FLIPS, seed: int = 0
) -> SignFlips:
    """Two-sided sign-flip tests of means against 0."""
    sums = values @ group_membership(groups).T
    scale = np.sqrt((sums**2).sum(-1))
    # The sum of squares does not change when signs flip, so this orders flips as a t statistic.
    studentised = np.divide(sums, scale[:, None], out=np.zeros_like(sums), where=scale[:, None] > 0)
    observed = np.abs(studentised.sum(-1))
    reached = observed * (1 - 1e-12)
    n_groups = sums.shape[1]
    exhaustive = 2**n_groups <= n_flips
    n_patterns = 2**n_groups if exhaustive else n_flips
    n_alone = np.zeros(len(sums))
    largest = []
    for signs in _sign_chunks(n_patterns, max(sums.shape), n_groups, exhaustive, seed):
        null = np.abs(signs @ studentised.T)
        n_alone += (null >= reached).sum(0)
        largest.append(null.max(-1))
    n_together = n_patterns - np.searchsorted(np.sort(np.concatenate(largest)), reached)
    extra = 0 if exhaustive else 1  # the signs as they are count as one of the drawn patterns
    alone, together = ((n + extra) / (n_patterns + extra) for n in (n_alone, n_together))
    untested = scale == 0
    alone[untested] = together[untested] = np.nan
    return SignFlips(alone, together, n_patterns, exhaustive)


def _sign_chunks(
    n_patterns: int, n_values: int, n_groups: int, exhaustive: bool, seed: int
) -> Iterator[Float64[ndarray, "flip group"]]:
    """All sign patterns or random ones, few enough at a time for ``n_values`` numbers of each."""
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK_VALUES // n_values)
    for start in range(0, n_patterns, size):
        numbers = np.arange(start, min(start + size, n_patterns))
        if exhaustive:
            bits = (numbers[:, None] >> np.arange(n_groups)) & 1
        else:
            bits = rng.integers(0, 2, (len(numbers), n_groups))
        yield 2.0 * bits - 1.0


def flips_for(n_tests: int, at_least: int = N_FLIPS) -> int:
    """How many sign patterns a family of tests needs.

    With n random patterns no p-value lies below ``1 / (n + 1)``, and none corrected by Holm below
    ``n_tests`` times that. The patterns grow with the family, so that Holm can reject in it.
    """
    return max(at_least, ceil(n_tests / HOLM_REACH))


def head_tests(
    heads: Sequence[tuple[Head, float]],
    delta_nats: Float64[ndarray, "hypothesis prompt"],
    groups: Sequence[str],
    *,
    n_flips: int = N_FLIPS,
    seed: int = 0,
) -> HeadTests:
    """Test the ``ΔKL`` of every head that was tried against 0."""
    flips = sign_flips(delta_nats, groups, flips_for(len(heads), n_flips), seed)
    n_groups = len(set(groups))
    usable = np.isfinite(flips.p_value) & (n_groups > 1)
    columns = {
        "p_value": flips.p_value,
        "p_max_t": flips.p_max_t,
        "p_holm": _corrected(flips.p_value, usable, _holm),
        "p_bh": _corrected(flips.p_value, usable, _benjamini_hochberg),
    }
    reason = NO_EFFECT if n_groups > 1 else ONE_GROUP
    tests = tuple(
        HeadTest(
            head=head,
            alpha=alpha,
            delta=float(delta_nats[row].mean()),
            reason=None if usable[row] else reason,
            **{name: float(p[row]) if usable[row] else None for name, p in columns.items()},
        )
        for row, (head, alpha) in enumerate(heads)
    )
    n_tests, smallest = int(usable.sum()), flips.p_value_min
    return HeadTests(
        tests=tests,
        family=_family(heads),
        n_tests=n_tests,
        n_flips=flips.n_flips,
        p_value_min=smallest,
        p_max_t_min=smallest,
        p_holm_min=min(1.0, max(1, n_tests) * smallest),
        p_bh_min=smallest,
        exhaustive=flips.exhaustive,
        n_groups=n_groups,
    )


def _family(tried: Sequence[tuple[Head, float]]) -> str:
    """What was tried, for instance ``"16 heads x 1 layer x 5 alphas"``."""
    sizes = {
        "head": len({head.index for head, _ in tried}),
        "layer": len({head.layer for head, _ in tried}),
        "alpha": len({alpha for _, alpha in tried}),
    }
    return " x ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in sizes.items())


def _corrected(
    p_values: PerHypothesis, usable: ndarray, of_sorted: Callable[[PerHypothesis], PerHypothesis]
) -> PerHypothesis:
    """P-values corrected for their number; hypotheses without one are not counted."""
    result, places = np.full(p_values.shape, np.nan), np.flatnonzero(usable)
    order = places[np.argsort(p_values[places])]
    result[order] = np.minimum(of_sorted(p_values[order]), 1.0)
    return result


def _holm(ascending: PerHypothesis) -> PerHypothesis:
    """Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979)."""
    return np.maximum.accumulate(ascending * np.arange(len(ascending), 0, -1))


def _benjamini_hochberg(ascending: PerHypothesis) -> PerHypothesis:
    """Source: Benjamini and Hochberg, Controlling the False Discovery Rate (1995)."""
    scaled = ascending * (len(ascending) / np.arange(1, len(ascending) + 1))
    return np.minimum.accumulate(scaled[::-1])[::-1]
