"""The records of ``rq4_results.json``, the ranking file, and when coverage is defined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.effects.transfer import (
    every_layer_effect,
    gap_of,
    metric_effects,
    metric_full_effect,
    transfer_estimates,
)
from rq4lens.analysis.records import ConditionRecord, FullEffect, Gap
from rq4lens.analysis.statistics.bootstrap import ONE_GROUP, Bootstrap, Estimate, exact, undefined
from rq4lens.config import RankBy
from rq4lens.heads import HeadSet
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
    value, why = float(resampled.point[0]), None
    # Where all prompts agree to the last digit there is no interval: the draws' own range.
    low, high = float(resampled.draws.min()), float(resampled.draws.max())
    if delta.interval is not None:
        low, high = delta.interval.pair
    if abs(value) <= noise_floor_nats:
        why = _within_noise("ΔKL(ALL)", value, noise_floor_nats)
    elif bootstrap.n_groups == 1:
        why = f"ΔKL(ALL) has no confidence interval: {ONE_GROUP}"
    elif low <= 0 <= high:
        why = f"the 95% interval of ΔKL(ALL), [{low:.3g}, {high:.3g}] nats, reaches 0"
    return FullEffect(delta, noise_floor_nats, why)


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
    if "records" not in grid.memo:
        grid.memo["records"] = _every_record(grid)
    every: tuple[ConditionRecord, ...] = grid.memo["records"]
    if conditions is None:
        return every
    by_cond = {each.cond: each for each in every}
    return tuple(by_cond[each.cond] for each in conditions)


def _every_record(grid: GridResult) -> tuple[ConditionRecord, ...]:
    chosen = list(grid.conditions.values())
    bootstrap, patching = bootstrap_of(grid), grid.settings.patching
    gap = gap_of(grid, bootstrap)
    transfers = [each.transfer for each in chosen]
    numbers: list[dict[str, Any]] = [
        {**own, **swapped, "metric": metric}
        for own, swapped, metric in zip(
            condition_estimates(grid, chosen, bootstrap),
            transfer_estimates(grid, transfers, bootstrap, gap.undefined_because),
            metric_effects(grid, chosen, bootstrap),
            strict=True,
        )
    ]
    found = [
        ConditionRecord(
            layer=condition.layer,
            hook=HOOK,
            cond=condition.cond,
            alpha=condition.alpha,
            heads=condition.heads.indices,
            head_mask=condition.heads.mask,
            split=patching.split,
            k_positions=patching.k_positions,
            n=grid.n_prompts,
            gap_base_nats=gap.base_nats,
            gap_tuned_nats=gap.tuned_nats,
            **each,
        )
        for condition, each in zip(chosen, numbers, strict=True)
    ]
    if grid.every_layer is not None:
        found.append(_every_layer(grid, found[0], gap, bootstrap))
    return tuple(found)


def _every_layer(
    grid: GridResult, first: ConditionRecord, gap: Gap, bootstrap: Bootstrap
) -> ConditionRecord:
    """The record of all layers at once, which shares with the others what is said of the grid."""
    (swapped,) = transfer_estimates(grid, [grid.every_layer], bootstrap, gap.undefined_because)
    heads = HeadSet.all(grid.n_heads)
    same: dict[str, Any] = {**dict.fromkeys(QUANTITIES, undefined(AT_ONCE)), **swapped}
    return replace(
        first,
        layer=None,
        cond=EVERY,
        alpha=1.0,
        heads=heads.indices,
        head_mask=heads.mask,
        metric=every_layer_effect(grid, bootstrap),
        **same,
    )


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
        row: dict[str, Any] = {"head": head, "rank": rank}
        row |= {name: getattr(single, name) for name in RANKED}
        if single.drop_pct is None:
            row["drop_pct_reason"] = NO_RAW_EFFECT
        for direction, why in whys.items():
            name = f"{direction}_pct"
            row[name] = float(carried_pct(grid, [single], direction)[0]) if why is None else None
            if why is not None:
                row[f"{name}_reason"] = why
        rows.append(row)
    return rows


def carried_pct(
    grid: GridResult, conditions: Sequence[ConditionResult], direction: RankBy
) -> Float64[ndarray, "condition"]:
    """How far each condition goes in one direction, as a share of the mean gap."""
    whole, left = gaps_of(grid["none"], conditions, direction).mean(-1)
    return np.asarray(100 * (1 - left / whole))
