"""Greedy rankings: grow the head set by the best head, or shrink it by the least needed one."""

from __future__ import annotations

import numpy as np

from rq4lens.analysis.measured import Indices, MeasuredSets
from rq4lens.results import HeadRanking


def rank_greedy_forward(measured: MeasuredSets) -> HeadRanking:
    """Start with no head and add, each time, the head that raises ``ΔKL`` most.

    A head's score is what it added when it was taken, in nats.
    """
    chosen: Indices = ()
    scores: list[float] = []
    reached = 0.0
    for _ in range(measured.n_heads):
        left = [head for head in measured.everything if head not in chosen]
        delta = measured.delta([(*chosen, head) for head in left])
        best = int(np.argmax(delta))
        scores.append(float(delta[best]) - reached)
        reached = float(delta[best])
        chosen = (*chosen, left[best])
    return _ranking("greedy_forward", measured, chosen, scores)


def rank_greedy_backward(measured: MeasuredSets) -> HeadRanking:
    """Start with all heads and drop, each time, the head whose loss leaves most ``ΔKL``.

    The head that is dropped last ranks first. Its score is what was lost with it, in nats.
    """
    kept = measured.everything
    dropped: list[int] = []
    scores: list[float] = []
    for _ in range(measured.n_heads):
        # Of equal heads the later one goes first, so that ties break by head index in the ranking.
        candidates = kept[::-1]
        without = [tuple(h for h in kept if h != head) for head in candidates]
        delta = measured.delta(without)
        least_needed = int(np.argmax(delta))
        scores.append(float(measured.delta([kept])[0] - delta[least_needed]))
        dropped.append(candidates[least_needed])
        kept = without[least_needed]
    return _ranking("greedy_backward", measured, tuple(dropped[::-1]), scores[::-1])


def _ranking(
    method: str, measured: MeasuredSets, heads: Indices, scores: list[float]
) -> HeadRanking:
    return HeadRanking(
        method=method,
        layer=measured.layer,
        alpha=measured.alpha,
        heads=heads,
        scores=tuple(scores),
        settings={"score": "change of ΔKL at its turn, in nats"},
    )
