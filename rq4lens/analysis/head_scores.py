"""The scores by which single heads are ordered."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.results import RankBy


def single_scores(
    raw: Float64[ndarray, "*rows head"], mapped: Float64[ndarray, "*rows head"], rank_by: RankBy
) -> Float64[ndarray, "*rows head"]:
    """The score that orders single heads, from their mean KLs.

    Args:
        raw: mean ``KL_raw`` of each head, in nats.
        mapped: mean ``KL_mapped`` of each head, in nats.
        rank_by: ``"delta"`` or ``"drop_pct"``.

    Returns:
        The scores; minus infinity where ``drop_pct`` is undefined, so that such heads come last.
    """
    delta = raw - mapped
    if rank_by == "delta":
        return delta
    return np.divide(100 * delta, raw, out=np.full(raw.shape, -np.inf), where=raw > 0)


def order_of(scores: Float64[ndarray, "*rows head"]) -> ndarray:
    """Heads by descending score; ties break by head index."""
    return np.argsort(-scores, axis=-1, kind="stable")
