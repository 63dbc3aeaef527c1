"""Do heads add up, and which sets of them were best?"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.coverage.curves import curve_of
from rq4lens.analysis.effects.measured import Indices, MeasuredLayer, MeasuredSets
from rq4lens.analysis.records import CoverageCurve, Interactions, PairInteraction
from rq4lens.analysis.statistics.bootstrap import ONE_GROUP, Bootstrap, undefined
from rq4lens.analysis.statistics.sign_flips import NO_EFFECT, sign_flips

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


def best_subsets(layer: MeasuredLayer) -> CoverageCurve:
    """The set of each size with the largest coverage found so far and by a beam search.

    It looks at every head set that was measured: let it be the last to measure, so that no curve
    lies above it. The sets were chosen on the prompts they are scored on: this is an upper envelope
    of what any ranking reaches on these prompts, not an estimate of what new prompts would show.
    """
    measured = layer.measured
    # Where coverage is a share of harm, the best sets have the lowest effect.
    sign = -1 if layer.full.is_harm else 1
    search(measured, sign)
    n_heads = measured.n_heads
    sets = [best_known(measured, k, 1, sign)[0] for k in range(n_heads + 1)]
    exhaustive = tuple(len(measured.known(k)) == comb(n_heads, k) for k in range(n_heads + 1))
    delta_nats = measured.delta_nats(sets)
    return curve_of("best subset", sets, delta_nats, layer, exhaustive)


def search(measured: MeasuredSets, sign: int) -> None:
    """Measure the sets that could be the best of their size."""
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


N_STRONGEST = 10
NO_JOINT_EFFECT = "ΔKL(ALL) cannot be told from zero"


def interactions(layer: MeasuredLayer) -> Interactions:
    """Pairwise interactions of all heads."""
    measured, bootstrap = layer.measured, layer.bootstrap
    matrix = interaction_matrix(measured)
    singles = measured.delta_nats(measured.singles).sum(0)
    joint = measured.delta_nats([measured.everything])[0]
    pairwise = singles + matrix.sum((0, 1)) / 2
    sums = bootstrap.estimate(np.stack([singles, joint, pairwise]))
    ratio = bootstrap.estimate(np.stack([singles, joint]), lambda m: m[..., :1] / m[..., 1:])[0]
    return Interactions(
        matrix_nats=matrix.mean(-1),
        strongest=_strongest(matrix, measured, bootstrap),
        sum_of_singles=sums[0],
        joint=sums[1],
        sum_over_joint=ratio if layer.full_delta is not None else undefined(NO_JOINT_EFFECT),
        pairwise_prediction=sums[2],
    )


def _strongest(
    matrix: Float64[ndarray, "head head prompt"], measured: MeasuredSets, bootstrap: Bootstrap
) -> tuple[PairInteraction, ...]:
    first, second = np.triu_indices(measured.n_heads, 1)
    if len(first) == 0:
        return ()
    of_pairs = matrix[first, second]
    flips = sign_flips(of_pairs, measured.groups, bootstrap.n_resamples, bootstrap.seed)
    chosen = np.argsort(-np.abs(of_pairs.mean(-1)), kind="stable")[:N_STRONGEST]
    estimates = bootstrap.estimate(of_pairs[chosen])
    testable = len(set(measured.groups)) > 1
    pairs = []
    for pair, estimate in zip(chosen, estimates, strict=True):
        p_max_t = float(flips.p_max_t[pair])
        reason = ONE_GROUP if not testable else NO_EFFECT if np.isnan(p_max_t) else None
        shown = p_max_t if reason is None else None
        pairs.append(PairInteraction(int(first[pair]), int(second[pair]), estimate, shown, reason))
    return tuple(pairs)
