"""The records of ``rq4_results.json``, the ranking file, and when coverage is defined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.effects.metric import (
    every_layer_effect,
    metric_effects,
    metric_full_effect,
)
from rq4lens.analysis.effects.transfer import gap_of, transfer_estimates
from rq4lens.analysis.records import ConditionRecord, FullEffect, Gap
from rq4lens.analysis.statistics.bootstrap import (
    ONE_GROUP,
    Bootstrap,
    Estimate,
    Resampled,
    exact,
    undefined,
)
from rq4lens.config import RankBy
from rq4lens.results import (
    EVERY,
    HOOK,
    METRIC_TRANSFERS,
    NO_RAW_EFFECT,
    TRANSFERS,
    ConditionResult,
    GridResult,
    HeadRanking,
    gaps_of,
    kl_nats_of,
)

QUANTITIES = (
    *("KL_raw_mean", "KL_mapped_mean", "delta", "drop_pct"),
    *("coverage_pct", "raw_coverage_pct"),
)
RANKED = ("delta", "drop_pct", "KL_raw", "KL_mapped")
AT_ONCE = "all layers are patched at once, at strength 1 and with base's own activations alone"


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
    (delta,) = resampled.estimates()
    return FullEffect(delta, noise_floor_nats, _why_undefined(resampled, delta, noise_floor_nats))


def _why_undefined(resampled: Resampled, delta: Estimate, noise_floor_nats: float) -> str | None:
    value = float(resampled.point[0])
    if abs(value) <= noise_floor_nats:
        return _within_noise("ΔKL(ALL)", value, noise_floor_nats)
    if len(resampled.jackknife) == 0:
        return f"ΔKL(ALL) has no confidence interval: {ONE_GROUP}"
    # Where all prompts agree to the last digit there is no interval: the draws' own range.
    low, high = float(resampled.draws.min()), float(resampled.draws.max())
    if delta.interval is not None:
        low, high = delta.interval.pair
    if low <= 0 <= high:
        return f"the 95% interval of ΔKL(ALL), [{low:.3g}, {high:.3g}] nats, reaches 0"
    return None


def _within_noise(what: str, nats: float, floor_nats: float) -> str:
    return f"{what} is {nats:.3g} nats, within the noise floor of {floor_nats:.3g} nats"


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
    every, bootstrap = conditions is None, bootstrap_of(grid)
    conditions = list(grid.conditions.values()) if conditions is None else list(conditions)
    gap = gap_of(grid, bootstrap)
    transfers = [each.transfer for each in conditions]
    swapped = transfer_estimates(grid, transfers, bootstrap, gap.undefined_because)
    estimates = condition_estimates(grid, conditions, bootstrap)
    metric = metric_effects(grid, conditions, bootstrap)
    found = [
        _record(grid, gap, each, {**own, **both, "metric": its})
        for each, own, both, its in zip(conditions, estimates, swapped, metric, strict=True)
    ]
    if every and grid.every_layer is not None:
        swapped = transfer_estimates(grid, [grid.every_layer], bootstrap, gap.undefined_because)
        its = every_layer_effect(grid, bootstrap)
        found.append(_every_layer(found[0], {**swapped[0], "metric": its}))
    return tuple(found)


def _record(
    grid: GridResult, gap: Gap, condition: ConditionResult, numbers: Mapping[str, Any]
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
        gap_base_nats=gap.base_nats,
        gap_tuned_nats=gap.tuned_nats,
        **numbers,
    )


def _every_layer(full: ConditionRecord, swapped: Mapping[str, Any]) -> ConditionRecord:
    absent = dict.fromkeys(QUANTITIES, undefined(AT_ONCE))
    same: dict[str, Any] = {**absent, **swapped, "layer": None, "cond": EVERY, "alpha": 1.0}
    heads = tuple(range(len(full.head_mask)))
    return replace(full, heads=heads, head_mask=(1,) * len(heads), **same)


def condition_estimates(
    grid: GridResult, conditions: Sequence[ConditionResult], bootstrap: Bootstrap
) -> list[dict[str, Estimate]]:
    """The six numbers of each condition with their intervals, all on the same resamples."""
    both = np.concatenate(kl_nats_of((grid.full, *conditions)))
    flat = bootstrap.estimate(both, _six_numbers)
    undefined_because = grid_full_effect(grid, bootstrap).undefined_because
    rows = []
    for at, condition in enumerate(conditions):
        row = dict(zip(QUANTITIES, flat[at :: len(conditions)], strict=True))
        # What follows from the definitions does not come from the resamples.
        if (row["KL_raw_mean"].value or 0.0) <= 0:
            row["drop_pct"] = undefined(NO_RAW_EFFECT)
        if grid.full.KL_raw <= grid.noise_floor_nats:
            reason = _within_noise("KL_raw(ALL)", grid.full.KL_raw, grid.noise_floor_nats)
            row["raw_coverage_pct"] = undefined(reason)
        elif condition is grid.full:
            row["raw_coverage_pct"] = exact(100.0)
        if undefined_because is not None:
            row["coverage_pct"] = undefined(undefined_because)
        elif condition is grid.full:
            row["coverage_pct"] = exact(100.0)
        rows.append(row)
    return rows


def _six_numbers(means: Float64[ndarray, "*rows quantity"]) -> ndarray:
    raw, mapped = np.split(means, 2, axis=-1)
    delta = raw - mapped
    drop = 100 * delta / raw
    coverage, raw_coverage = (100 * x / x[..., :1] for x in (delta, raw))
    every = (raw, mapped, delta, drop, coverage, raw_coverage)
    return np.concatenate([x[..., 1:] for x in every], axis=-1)


def ranking_rows(grid: GridResult, ranking: HeadRanking | None = None) -> list[dict[str, Any]]:
    """The rows of the single-head ranking file, best first."""
    gap = gap_of(grid, bootstrap_of(grid))
    whys = dict.fromkeys(TRANSFERS, gap.undefined_because)
    if grid.settings.patching.metric != "kl":
        metric = metric_full_effect(grid, bootstrap_of(grid))
        whys |= dict.fromkeys(METRIC_TRANSFERS, metric.undefined_because)
    rows = []
    for rank, head in enumerate((ranking or grid.ranking).heads, 1):
        single = grid.single(head)
        numbers = {name: getattr(single, name) for name in RANKED}
        row: dict[str, Any] = {"head": head, "rank": rank, **numbers}
        if single.drop_pct is None:
            row["drop_pct_reason"] = NO_RAW_EFFECT
        for direction, why in whys.items():
            row |= _carried(grid, single, direction, why)
        rows.append(row)
    return rows


def _carried(
    grid: GridResult, single: ConditionResult, direction: RankBy, undefined_because: str | None
) -> dict[str, Any]:
    name = f"{direction}_pct"
    if undefined_because is not None:
        return {name: None, f"{name}_reason": undefined_because}
    gap, left = gaps_of(grid["none"], [single], direction).mean(-1)
    return {name: float(100 * (1 - left / gap)[0])}
