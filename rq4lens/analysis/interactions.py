"""Do heads add up? Pairwise interactions, and the sum of singles against the joint effect."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.best_sets import interaction_matrix
from rq4lens.analysis.measured import MeasuredSets
from rq4lens.analysis.records import Interactions, PairInteraction
from rq4lens.analysis.significance import NO_EFFECT, sign_flips
from rq4lens.analysis.statistics import ONE_GROUP, Bootstrap, Estimate, undefined

N_STRONGEST = 10
NO_JOINT_EFFECT = "ΔKL(ALL) cannot be told from zero"


def interactions(
    measured: MeasuredSets, bootstrap: Bootstrap, *, defined: bool = True
) -> Interactions:
    """Pairwise interactions of all heads.

    Args:
        measured: the head sets measured so far; what is missing is measured.
        bootstrap: the resamples.
        defined: whether ``ΔKL(ALL)`` can be told from zero, so that ratios to it make sense.
    """
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
        sum_over_joint=ratio if defined else undefined(NO_JOINT_EFFECT),
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
    return tuple(
        _pair(int(first[pair]), int(second[pair]), estimate, flips.p_max_t[pair], testable)
        for pair, estimate in zip(chosen, estimates, strict=True)
    )


def _pair(
    first: int, second: int, estimate: Estimate, p_max_t: float, testable: bool
) -> PairInteraction:
    if not testable:
        return PairInteraction(first, second, estimate, None, ONE_GROUP)
    if not np.isfinite(p_max_t):
        return PairInteraction(first, second, estimate, None, NO_EFFECT)
    return PairInteraction(first, second, estimate, float(p_max_t))
