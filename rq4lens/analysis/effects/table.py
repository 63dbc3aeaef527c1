"""The records of ``rq4_results.json``, the ranking file, and when coverage is defined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.records import ConditionRecord, FullEffect
from rq4lens.analysis.statistics.bootstrap import (
    ONE_GROUP,
    Bootstrap,
    Estimate,
    Resampled,
    exact,
    undefined,
)
from rq4lens.results import HOOK, NO_RAW_EFFECT, ConditionResult, GridResult, HeadRanking

QUANTITIES = ("KL_raw_mean", "KL_mapped_mean", "delta", "drop_pct", "coverage_pct")


def bootstrap_of(grid: GridResult) -> Bootstrap:
    """The resamples of a grid: its prompts, by group, as often as its settings say."""
    return _bootstrap(grid.groups, grid.settings.effort.resamples, grid.settings.effort.seed)


# Everything that is said of a grid asks for the same resamples.
_bootstrap = lru_cache(maxsize=1)(Bootstrap)


def full_effect(
    delta_nats: Float64[ndarray, "prompt"], noise_floor_nats: float, bootstrap: Bootstrap
) -> FullEffect:
    """Judge whether the full effect can be told from zero.

    Coverage is undefined when the 95% interval of ``ΔKL(ALL)`` reaches 0, when ``|ΔKL(ALL)|`` is
    within the noise floor, and when one group of prompts leaves no interval to look at. A full
    effect that is clearly negative is a valid denominator: coverage then is a share of the harm
    that the map does.
    """
    resampled = bootstrap.resampled(delta_nats[None])
    delta = resampled.estimates()[0]
    reason = _why_undefined(resampled, delta, noise_floor_nats)
    return FullEffect(delta, noise_floor_nats, reason)


def _why_undefined(resampled: Resampled, delta: Estimate, noise_floor_nats: float) -> str | None:
    value = float(resampled.point[0])
    if abs(value) <= noise_floor_nats or value == 0:
        return (
            f"ΔKL(ALL) is {value:.3g} nats, within the noise floor of {noise_floor_nats:.3g} nats"
        )
    if len(resampled.jackknife) == 0:
        return f"ΔKL(ALL) has no confidence interval: {ONE_GROUP}"
    low, high = _reach(resampled, delta)
    if low <= 0 <= high:
        return f"the 95% interval of ΔKL(ALL), [{low:.3g}, {high:.3g}] nats, reaches 0"
    return None


def _reach(resampled: Resampled, delta: Estimate) -> tuple[float, float]:
    """The interval, or the draws' own range where all prompts agree to the last digit."""
    if delta.interval is not None:
        return delta.interval.low, delta.interval.high
    return float(resampled.draws.min()), float(resampled.draws.max())


def grid_full_effect(grid: GridResult, bootstrap: Bootstrap) -> FullEffect:
    """Judge the full effect of a grid's main layer."""
    return full_effect(grid.full.delta_nats, grid.noise_floor_nats, bootstrap)


def records(
    grid: GridResult, conditions: Sequence[ConditionResult] | None = None
) -> tuple[ConditionRecord, ...]:
    """The records of ``rq4_results.json``: of some conditions, or of all in the grid's order.

    The denominator of every ``coverage_pct`` is ``ΔKL(ALL)`` of the main layer. That holds for
    ``ctrl_full`` too: its coverage says how much the control layer's map repairs, as a share of
    what the main layer's map repairs. Undefined values are null, with the reason beside them.
    """
    conditions = list(grid.conditions.values()) if conditions is None else conditions
    estimates = condition_estimates(grid, conditions, bootstrap_of(grid))
    return tuple(
        _record(grid, condition, row) for condition, row in zip(conditions, estimates, strict=True)
    )


def condition_estimates(
    grid: GridResult, conditions: Sequence[ConditionResult], bootstrap: Bootstrap
) -> list[dict[str, Estimate]]:
    """The five numbers of each condition with their intervals, all on the same resamples."""
    raw = np.stack([condition.kl_raw_nats for condition in (grid.full, *conditions)])
    mapped = np.stack([condition.kl_mapped_nats for condition in (grid.full, *conditions)])
    resampled = bootstrap.resampled(np.concatenate([raw, mapped])).apply(_five_numbers)
    flat = resampled.estimates()
    undefined_because = grid_full_effect(grid, bootstrap).undefined_because
    rows = [
        dict(zip(QUANTITIES, flat[i :: len(conditions)], strict=True))
        for i in range(len(conditions))
    ]
    for condition, row in zip(conditions, rows, strict=True):
        _settle(row, condition is grid.full, undefined_because)
    return rows


def _five_numbers(means: Float64[ndarray, "*rows quantity"]) -> ndarray:
    raw, mapped = np.split(means, 2, axis=-1)
    delta = raw - mapped
    drop = 100 * delta / raw
    coverage = 100 * delta / delta[..., :1]
    return np.concatenate([x[..., 1:] for x in (raw, mapped, delta, drop, coverage)], axis=-1)


def _settle(row: dict[str, Estimate], is_full: bool, undefined_because: str | None) -> None:
    """Put in what follows from the definitions rather than from the resamples."""
    raw = row["KL_raw_mean"].value
    if raw is None or raw <= 0:
        row["drop_pct"] = undefined(NO_RAW_EFFECT)
    if undefined_because is not None:
        row["coverage_pct"] = undefined(undefined_because)
    elif is_full:
        row["coverage_pct"] = exact(100.0)


def _record(
    grid: GridResult, condition: ConditionResult, estimates: Mapping[str, Estimate]
) -> ConditionRecord:
    return ConditionRecord(
        layer=condition.layer,
        hook=HOOK,
        cond=condition.cond,
        alpha=condition.alpha,
        heads=condition.heads.indices,
        head_mask=tuple(condition.heads.mask),
        split=grid.settings.patching.split,
        k_positions=grid.settings.patching.k_positions,
        n=grid.n_prompts,
        **estimates,
    )


def ranking_rows(grid: GridResult, ranking: HeadRanking | None = None) -> list[dict[str, Any]]:
    """The rows of the single-head ranking file, best first."""
    ranking = ranking or grid.ranking
    return [
        _ranking_row(grid.single(head), head, rank) for rank, head in enumerate(ranking.heads, 1)
    ]


def _ranking_row(single: ConditionResult, head: int, rank: int) -> dict[str, Any]:
    row = {
        "head": head,
        "rank": rank,
        "delta": single.delta,
        "drop_pct": single.drop_pct,
        "KL_raw": single.KL_raw,
        "KL_mapped": single.KL_mapped,
    }
    return row if single.drop_pct is not None else {**row, "drop_pct_reason": NO_RAW_EFFECT}
