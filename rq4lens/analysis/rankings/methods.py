"""Every ranking method behind one protocol, and how they compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.curvature import rank_by_kl_curvature
from rq4lens.analysis.rankings.exact import (
    rank_by_delta,
    rank_by_drop_pct,
    rank_by_kl_raw,
    rank_by_leave_one_out,
    rank_greedy_backward,
    rank_greedy_forward,
)
from rq4lens.analysis.rankings.gradients import (
    rank_by_attribution,
    rank_by_grad_act,
    rank_by_integrated_gradients,
)
from rq4lens.analysis.rankings.shapley import rank_by_shapley
from rq4lens.errors import UserError
from rq4lens.results import HeadRanking

RankingMethod = Callable[..., HeadRanking]
"""Ranks the heads of one layer.

A method takes the :class:`MeasuredSets` of the layer and alpha, measures what it lacks, and names
its own settings as keyword arguments.
"""

METHODS: Mapping[str, RankingMethod] = {
    "delta": rank_by_delta,
    "drop_pct": rank_by_drop_pct,
    "kl_raw": rank_by_kl_raw,
    "leave_one_out": rank_by_leave_one_out,
    "greedy_forward": rank_greedy_forward,
    "greedy_backward": rank_greedy_backward,
    "shapley": rank_by_shapley,
    "grad_act": rank_by_grad_act,
    "attribution": rank_by_attribution,
    "integrated_gradients": rank_by_integrated_gradients,
    "kl_curvature": rank_by_kl_curvature,
}
"""The ranking methods by name; the first ones are exact, the last four approximate."""

GRADIENT_METHODS = ("grad_act", "attribution", "integrated_gradients", "kl_curvature")
"""Methods that need the tuned model itself and no patched measurement."""


def rank_heads(method: str, measured: MeasuredSets, **settings: Any) -> HeadRanking:
    """Rank the heads of a layer by a method.

    Raises:
        UserError: if there is no such method or setting, or the method needs an experiment and none
            was given.
    """
    if method not in METHODS:
        raise UserError(
            f"ranking method {method!r} does not exist: choose one of {', '.join(METHODS)}."
        )
    allowed = [name for name in signature(METHODS[method]).parameters if name != "measured"]
    for name in settings:
        if name not in allowed:
            raise UserError(
                f"ranking method {method!r} has no setting {name!r}: "
                f"its settings are {', '.join(allowed) or 'none'}."
            )
    return METHODS[method](measured, **settings)


def ranking_file_rows(ranking: HeadRanking) -> list[dict[str, Any]]:
    """The rows of a method's ranking file, best first: ``head, rank, score, se``."""
    errors = ranking.standard_errors or (None,) * ranking.n_heads
    return [
        _row(head, rank, score, error, ranking.reasons)
        for rank, (head, score, error) in enumerate(
            zip(ranking.heads, ranking.scores, errors, strict=True), 1
        )
    ]


def _row(
    head: int, rank: int, score: float | None, error: float | None, why: Mapping[str, str]
) -> dict[str, Any]:
    row: dict[str, Any] = {"head": head, "rank": rank, "score": score, "se": error}
    if score is None:
        row["score_reason"] = why["scores"]
    if error is None:
        row["se_reason"] = why["standard_errors"]
    return row


def timed_ranking(
    method: str, measured: MeasuredSets, **settings: Any
) -> tuple[HeadRanking, float]:
    """A ranking and the seconds it took, measurements included."""
    start = time.perf_counter()
    ranking = rank_heads(method, measured, **settings)
    return ranking, time.perf_counter() - start
