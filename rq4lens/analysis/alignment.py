"""How the first direction of a joint low-rank map lies on the heads.

A low-rank fine-tune changes a layer's ``z`` along few directions. The joint map's first one, a unit
vector over all heads, says where: its share on a head is the squared length of the head's part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.agreement import Scored, agreement
from rq4lens.analysis.control_sources import FitData
from rq4lens.analysis.statistics import Bootstrap, Estimate, undefined
from rq4lens.patching.map_kinds import fit_block

NO_DIRECTION = "the base activations do not predict the change: there is no first direction"


@dataclass(frozen=True)
class Alignment:
    """How the first direction of a joint low-rank map lies on the heads.

    Args:
        share: share of the direction's squared length that lies on each head, in head order; sums
            to 1.
        spearman: rank correlation with single-head ``ΔKL``.
        kendall: the same by Kendall's tau-b.
        reason: why it is missing, if it is.
    """

    share: tuple[float, ...]
    spearman: Estimate
    kendall: Estimate
    reason: str | None = None


def alignment(data: FitData, delta: Scored, bootstrap: Bootstrap) -> Alignment:
    """Shares of the first direction, and their rank correlation with causal scores.

    Args:
        data: the train rows of the layer.
        delta: single-head ``ΔKL``.
        bootstrap: the resamples; the shares do not depend on the measured prompts and stay fixed.
    """
    n_heads = data.x.shape[1]
    x, y = (z.flatten(1).numpy() for z in (data.x, data.y))
    details = fit_block("low_rank", x, y, data.groups).details
    if not details["spread"] or details["spread"][0] == 0:
        nothing = undefined(NO_DIRECTION)
        return Alignment((), nothing, nothing, NO_DIRECTION)
    share = head_shares(np.array(details["first_direction"]), n_heads)
    compared = agreement("method", Scored("first direction", share), delta, (), bootstrap)
    return Alignment(tuple(share.tolist()), compared.spearman, compared.kendall)


def head_shares(direction: Float64[ndarray, "d"], n_heads: int) -> Float64[ndarray, "head"]:
    """Share of a vector's squared length that lies on each head; sums to 1."""
    squares = (direction**2).reshape(n_heads, -1).sum(-1)
    return squares / squares.sum()
