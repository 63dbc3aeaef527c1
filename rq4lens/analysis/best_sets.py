"""The best head set of each size that can be found: the upper envelope of all coverage curves.

Sizes 1 and 2 are searched completely. Above that, singles and pairs predict which head each of the
best sets should take next; the most promising sets are then measured, so every number is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.curves import curve_of
from rq4lens.analysis.measured import Indices, MeasuredSets
from rq4lens.analysis.metrics import FullEffect
from rq4lens.analysis.records import CoverageCurve
from rq4lens.analysis.statistics import Bootstrap

BEAM = 4
"""Sets that are carried from one size to the next."""

PROPOSALS = 12
"""Sets of each size that are measured."""


def interaction_matrix(measured: MeasuredSets) -> Float64[ndarray, "head head prompt"]:
    """``Δ({i,j}) - Δ(i) - Δ(j)`` on each prompt; the diagonal is 0."""
    singles = measured.delta_nats(measured.singles)
    n_heads, n_prompts = singles.shape
    matrix = np.zeros((n_heads, n_heads, n_prompts))
    if n_heads > 1:
        first, second = np.triu_indices(n_heads, 1)
        together = measured.delta_nats(measured.pairs)
        matrix[first, second] = together - singles[first] - singles[second]
        matrix[second, first] = matrix[first, second]
    return matrix


def best_subsets(measured: MeasuredSets, full: FullEffect, bootstrap: Bootstrap) -> CoverageCurve:
    """The set of each size with the largest coverage found so far and by a beam search.

    It looks at every head set that was measured: let it be the last to measure, so that no curve
    lies above it. The sets were chosen on the prompts they are scored on: this is an upper envelope
    of what any ranking reaches on these prompts, not an estimate of what new prompts would show.

    Args:
        measured: the head sets measured so far; what is missing is measured.
        full: the full effect.
        bootstrap: the resamples.
    """
    sign = _sign(full)
    search(measured, sign)
    sets = [best_known(measured, k, 1, sign)[0] for k in range(measured.n_heads + 1)]
    exhaustive = tuple(measured.is_exhausted(k) for k in range(measured.n_heads + 1))
    delta_nats = measured.delta_nats(sets)
    return curve_of("best subset", sets, delta_nats, full, bootstrap, exhaustive)


def _sign(full: FullEffect) -> int:
    """-1 where coverage is a share of harm, so that the best sets have the lowest ``ΔKL``."""
    return -1 if full.is_harm else 1


def search(measured: MeasuredSets, sign: int) -> None:
    """Measure the sets that could be the best of their size.

    Args:
        measured: takes the new measurements up.
        sign: 1 to look for the largest ``ΔKL``, -1 for the smallest.
    """
    singles = sign * measured.delta(measured.singles)
    interactions = sign * interaction_matrix(measured).mean(-1)
    measured.require([measured.everything])
    for k in range(3, measured.n_heads):
        parents = best_known(measured, k - 1, BEAM, sign)
        effects = sign * measured.delta(parents)
        measured.require(_proposals(parents, effects, singles, interactions))


def best_known(measured: MeasuredSets, k: int, n: int, sign: int) -> list[Indices]:
    """The n best of the measured sets of k heads; ties break by head index."""
    known = sorted(measured.known(k))
    order = np.argsort(-sign * measured.delta(known), kind="stable")
    return [known[index] for index in order[:n]]


def _proposals(
    parents: Sequence[Indices],
    effects: Float64[ndarray, "condition"],
    singles: Float64[ndarray, "head"],
    interactions: Float64[ndarray, "head head"],
) -> list[Indices]:
    predicted: dict[Indices, float] = {}
    for parent, effect in zip(parents, effects, strict=True):
        gain = singles + interactions[list(parent)].sum(0)
        for head in set(range(len(singles))) - set(parent):
            child = tuple(sorted((*parent, head)))
            predicted[child] = max(predicted.get(child, -np.inf), float(effect + gain[head]))
    return sorted(predicted, key=lambda child: (-predicted[child], child))[:PROPOSALS]
