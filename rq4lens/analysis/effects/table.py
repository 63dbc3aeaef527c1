"""What conditions do, with intervals: the records of ``rq4_results.json``, the gap, and transfer.

Transfer says how far each model's activations take the other one, as a share of what differs:
the divergence between the two models, the gap, or a metric of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from einops import rearrange
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.records import (
    ConditionRecord,
    FullEffect,
    Gap,
    LayerTransfer,
    MetricEffect,
    MetricSummary,
)
from rq4lens.analysis.statistics.bootstrap import ONE_GROUP, Bootstrap, Estimate, exact, undefined
from rq4lens.config import RankBy
from rq4lens.heads import HeadSet
from rq4lens.results import (
    EVERY,
    HOOK,
    METRIC_TRANSFERS,
    METRIC_UNITS,
    NO_RAW_EFFECT,
    OTHERS,
    OWN,
    TRANSFERS,
    ConditionResult,
    GridResult,
    HeadRanking,
    PatchRow,
    Transfer,
    gaps_of,
    kl_nats_of,
)

T = TypeVar("T")

QUANTITIES = (
    *("KL_raw_mean", "KL_mapped_mean", "delta", "drop_pct"),
    *("coverage_pct", "raw_coverage_pct"),
)
CARRIED = ("to_base_pct", "to_tuned_pct", "flipped_pct", "as_base_pct")
"""What is said of a head set; the gap of the clean models stands beside it."""

RANKED = ("delta", "drop_pct", "KL_raw", "KL_mapped")

MOST_LEFT_OUT_PCT = 5.0
"""Where more probability than this lies on tokens of one model alone, nothing is compared."""

BETWEEN = " between base and tuned"
AT_ONCE = "all layers are patched at once, at strength 1 and with base's own activations alone"
NO_PATCH = "all layers are patched at once, with base's own activations alone"
NOT_SWAPPED = "the two models were not swapped: it is a check of the patch alone"
NO_GAP = "transfer was not measured"
SAME_ANSWERS = "base and tuned have the same most likely token on every prompt"


def bootstrap_of(grid: GridResult) -> Bootstrap:
    """The resamples of a grid: its prompts, by group, as often as its settings say."""
    return _bootstrap(grid.groups, grid.settings.effort.resamples, grid.settings.effort.seed)


# Everything that is said of a grid asks for the same resamples.
_bootstrap = lru_cache(maxsize=1)(Bootstrap)


def _said_once(grid: GridResult, name: str, say: Callable[[GridResult], T]) -> T:
    """What is said of a grid, which keeps it: figures and pages ask for it often."""
    if name not in grid.memo:
        grid.memo[name] = say(grid)
    kept: T = grid.memo[name]
    return kept


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
        low, high = delta.interval
    if abs(value) <= noise_floor_nats:
        why = _within_noise("ΔKL(ALL)", value, noise_floor_nats)
    elif bootstrap.n_groups == 1:
        why = f"ΔKL(ALL) has no confidence interval: {ONE_GROUP}"
    elif low <= 0 <= high:
        why = f"the 95% interval of ΔKL(ALL), [{low:.3g}, {high:.3g}] nats, reaches 0"
    return FullEffect(delta, noise_floor_nats, why)


def _within_noise(what: str, nats: float, floor_nats: float) -> str:
    return f"{what} is {nats:.3g} nats, within the noise floor of {floor_nats:.3g} nats"


def grid_full_effect(grid: GridResult) -> FullEffect:
    """Judge the full effect of a grid's main layer."""
    return full_effect(grid.full.delta_nats, grid.noise_floor_nats, bootstrap_of(grid))


def records(
    grid: GridResult, conditions: Sequence[ConditionResult] | None = None
) -> tuple[ConditionRecord, ...]:
    """The records of ``rq4_results.json``: of some conditions, or of all in the grid's order.

    The denominator of every ``coverage_pct`` is ``ΔKL(ALL)`` of the main layer. That holds for
    ``ctrl_full`` too: its coverage says how much the control layer's map repairs, as a share of
    what the main layer's map repairs. Undefined values are null, with the reason beside them.
    """
    every = _said_once(grid, "records", _every_record)
    if conditions is None:
        return every
    by_cond = {each.cond: each for each in every}
    return tuple(by_cond[each.cond] for each in conditions)


def _every_record(grid: GridResult) -> tuple[ConditionRecord, ...]:
    gap, chosen = gap_of(grid), list(grid.conditions.values())
    why = gap.undefined_because
    places: list[tuple[Any, ...]] = [(c.layer, c.cond, c.alpha, c.heads) for c in chosen]
    patched: list[Patched] = [((c.raw, c.mapped), c.transfer) for c in chosen]
    estimates = condition_estimates(grid, chosen)
    transfers = transfer_estimates(grid, [c.transfer for c in chosen], why)
    if grid.every_layer is not None:
        places.append((None, EVERY, 1.0, HeadSet.all(grid.n_heads)))
        patched.append((None, grid.every_layer))
        estimates.append(dict.fromkeys(QUANTITIES, undefined(AT_ONCE)))
        transfers += transfer_estimates(grid, [grid.every_layer], why)
    metrics, patching = metric_effects(grid, patched), grid.settings.patching
    rows: Iterable[Any] = zip(places, estimates, transfers, metrics, strict=True)
    return tuple(
        ConditionRecord(
            layer=layer,
            hook=HOOK,
            cond=cond,
            alpha=alpha,
            heads=heads.indices,
            head_mask=heads.mask,
            split=patching.split,
            k_positions=patching.k_positions,
            n=grid.n_prompts,
            gap_base_nats=gap.base_nats,
            gap_tuned_nats=gap.tuned_nats,
            metric=metric,
            **own,
            **carried,
        )
        for (layer, cond, alpha, heads), own, carried, metric in rows
    )


def condition_estimates(
    grid: GridResult, conditions: Sequence[ConditionResult]
) -> list[dict[str, Estimate]]:
    """The six numbers of each condition with their intervals, all on the same resamples."""
    both = np.concatenate(kl_nats_of((grid.full, *conditions)))
    flat = bootstrap_of(grid).estimate(both, _six_numbers)
    undefined_because = grid_full_effect(grid).undefined_because
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
    whys = dict.fromkeys(TRANSFERS, gap_of(grid).undefined_because)
    if grid.settings.patching.metric != "kl":
        whys |= dict.fromkeys(METRIC_TRANSFERS, metric_full_effect(grid).undefined_because)
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


# Transfer


def gap_of(grid: GridResult) -> Gap:
    """How far apart the models of a grid are."""
    return _said_once(grid, "gap", _gap)


def _gap(grid: GridResult) -> Gap:
    nothing, compared = grid["none"].transfer, grid.compared
    base = tuned = differ = undefined(NO_GAP)
    why: str | None = NO_GAP
    if nothing is not None:
        both = bootstrap_of(grid).estimate(_clean(nothing), lambda m: m * [1, 1, 100])
        base, tuned, differ = both
        why = _why_undefined((base, tuned), compared.noise_nats + grid.noise_floor_nats, grid)
    row = transfer_estimates(grid, [grid.every_layer], why)[0]
    return Gap(
        base_nats=base,
        tuned_nats=tuned,
        answers_differ_pct=differ,
        every_layer_to_base_pct=row["to_base_pct"],
        every_layer_to_tuned_pct=row["to_tuned_pct"],
        noise_nats=compared.noise_nats,
        left_out_base_pct=compared.left_out_base_pct,
        left_out_tuned_pct=compared.left_out_tuned_pct,
        undefined_because=why,
    )


def _clean(nothing: Transfer) -> Float64[ndarray, "quantity prompt"]:
    """The gap both ways, and where the most likely tokens differ."""
    differ = nothing.answer_is < OWN + OTHERS
    return np.array([nothing.left_nats("to_base"), nothing.left_nats("to_tuned"), differ])


def _why_undefined(gaps: Sequence[Estimate], noise_nats: float, grid: GridResult) -> str | None:
    left_out = max(grid.compared.left_out_base_pct, grid.compared.left_out_tuned_pct)
    if left_out > MOST_LEFT_OUT_PCT:
        return (
            f"the models give {left_out:.1f}% of their probability to tokens that only one of "
            f"their vocabularies has (at most {MOST_LEFT_OUT_PCT:g}% may be left out)"
        )
    return next((why for gap in gaps if (why := why_no_gap(gap, noise_nats))), None)


def why_no_gap(
    gap: Estimate, noise: float, what: str = f"the gap{BETWEEN}", unit: str = " nats"
) -> str | None:
    """Why nothing is a share of a gap; None where it can be told from 0."""
    value = gap.value or 0.0
    if abs(value) <= noise or value == 0:
        return (
            f"{what} is {value:.2g}{unit}, within the noise of {noise:.2g}{unit}: the models "
            "answer alike here"
        )
    if gap.interval is None:
        return f"{what} has no confidence interval: {gap.reason}"
    if gap.interval.contains(0.0):
        return f"the 95% interval of {what.removesuffix(BETWEEN)}, {gap:.2g}{unit}, reaches 0"
    return None


def transfer_estimates(
    grid: GridResult, transfers: Sequence[Transfer | None], undefined_because: str | None
) -> list[dict[str, Estimate]]:
    """What head sets carry in both directions, and what they do to the most likely tokens."""
    nothing = grid["none"].transfer
    swapped = [each for each in transfers if each is not None]
    if nothing is None or not swapped:
        return [dict.fromkeys(CARRIED, undefined(NO_GAP)) for _ in transfers]
    differ, bootstrap = _clean(nothing)[2], bootstrap_of(grid)

    def carried(direction: RankBy) -> list[Estimate]:
        if undefined_because is not None:
            return [undefined(undefined_because)] * len(swapped)
        left = np.array([each.left_nats(direction) for each in swapped])
        return bootstrap.shares(nothing.left_nats(direction)[None], left)

    columns = [*map(carried, TRANSFERS), *_answers(swapped, differ, bootstrap)]
    found = zip(*columns, strict=True)
    absent = [undefined(NOT_SWAPPED)] * 4
    estimates = []
    for each in transfers:
        row = dict(zip(CARRIED, absent if each is None else next(found), strict=True))
        if undefined_because is None and each is nothing:
            row |= dict.fromkeys(("to_base_pct", "to_tuned_pct"), exact(0.0))
        if not differ.any():
            row["as_base_pct"] = undefined(SAME_ANSWERS)
        estimates.append(row)
    return estimates


def _answers(
    swapped: Sequence[Transfer], differ: Float64[ndarray, "prompt"], bootstrap: Bootstrap
) -> tuple[list[Estimate], list[Estimate]]:
    """How many answers change, and how many of those that differ become base's."""
    answers = np.array([each.answer_is for each in swapped])
    flipped, as_base = answers % OTHERS < OWN, (answers >= OTHERS) & (differ > 0)

    def percent(means: Float64[ndarray, "*rows quantity"]) -> ndarray:
        flipped, as_base = np.split(means[..., 1:], 2, axis=-1)
        return 100 * np.concatenate([flipped, as_base / means[..., :1]], axis=-1)

    flat = bootstrap.estimate(np.concatenate([differ[None], flipped, as_base]), percent)
    return flat[: len(swapped)], flat[len(swapped) :]


def layer_transfer(grid: GridResult) -> LayerTransfer:
    """What the heads of a grid's main layer carry, together and one by one."""
    every = [each.transfer for each in (grid.full, *grid.singles)]
    full, *heads = transfer_estimates(grid, every, gap_of(grid).undefined_because)
    n_eff = None
    if grid["none"].transfer is not None and grid.full.transfer is not None:
        whole, left = gaps_of(grid["none"], [grid.full], "to_base")
        n_eff = effective_number((whole - left)[0])
    return LayerTransfer(
        full["to_base_pct"],
        full["to_tuned_pct"],
        tuple(head["to_base_pct"] for head in heads),
        tuple(head["to_tuned_pct"] for head in heads),
        n_eff,
    )


def effective_number(effects: Float64[ndarray, "prompt"]) -> float | None:
    """``(Σ d)² / Σ d²``: how many prompts of the same effect would vary as much."""
    squares = float((effects**2).sum())
    return float(effects.sum()) ** 2 / squares if squares > 0 else None


def gap_effect(grid: GridResult, direction: str) -> FullEffect:
    """The gap as what shares are taken of."""
    gap = gap_of(grid)
    nats = gap.base_nats if direction == "to_base" else gap.tuned_nats
    return FullEffect(nats, grid.noise_floor_nats, gap.undefined_because)


# The metric of the answer


Patched = tuple[tuple[PatchRow, PatchRow] | None, Transfer | None]
"""The raw and the mapped patch of a head set, and both models swapped there."""


def metric_summary(grid: GridResult) -> MetricSummary | None:
    """The metric of both models, and what the heads of the main layer carry of its difference."""
    clean = _metric_of_models(grid)
    if clean is None:
        return None
    base, tuned, difference = bootstrap_of(grid).estimate(
        clean, lambda m: np.concatenate([m, m[..., 1:] - m[..., :1]], axis=-1)
    )
    full, *heads = records(grid, [grid.full, *grid.singles])
    every = next((each for each in records(grid) if each.cond == EVERY), None)
    whole, left = gaps_of(grid["none"], [grid.full], "metric")
    absent, name = undefined("it was not measured"), grid.settings.patching.metric
    return MetricSummary(
        name=name,
        unit=METRIC_UNITS.get(name, ""),
        base=base,
        tuned=tuned,
        difference=difference,
        noise=_metric_noise(grid),
        undefined_because=_why_no_difference(grid, difference),
        every_layer_to_base_pct=every.metric_pct if every else absent,
        every_layer_to_tuned_pct=every.metric_to_tuned_pct if every else absent,
        to_base_pct=full.metric_pct,
        to_tuned_pct=full.metric_to_tuned_pct,
        heads_to_base_pct=tuple(head.metric_pct for head in heads),
        heads_to_tuned_pct=tuple(head.metric_to_tuned_pct for head in heads),
        n_eff=effective_number((whole - left)[0]),
    )


def metric_full_effect(grid: GridResult) -> FullEffect:
    """The difference of the metric as what shares are taken of."""
    (whole,) = bootstrap_of(grid).estimate(gaps_of(grid["none"], [grid["none"]], "metric")[0])
    return FullEffect(whole, _metric_noise(grid), _why_no_difference(grid, whole))


def _metric_of_models(grid: GridResult) -> Float64[ndarray, "model prompt"] | None:
    """The metric of base and of tuned with nothing patched; None if none was measured."""
    nothing = grid["none"].transfer
    if nothing is None or nothing.into_tuned.metric is None:
        return None
    return _metric((nothing.into_base, nothing.into_tuned))


def _metric(rows: Sequence[PatchRow]) -> Float64[ndarray, "row prompt"]:
    return np.array([row.metric for row in rows])


def _metric_noise(grid: GridResult) -> float:
    """What patching nothing leaves of the metric, as its noise floor."""
    patched, nothing = _metric((grid["self"].raw, grid["none"].raw)).mean(-1)
    return float(abs(patched - nothing))


def _why_no_difference(grid: GridResult, difference: Estimate) -> str | None:
    name = grid.settings.patching.metric
    what = f"the difference of {name}{BETWEEN}"
    return why_no_gap(difference, _metric_noise(grid), what, METRIC_UNITS.get(name, ""))


def metric_effects(grid: GridResult, patched: Sequence[Patched]) -> list[MetricEffect | None]:
    """What head sets do to the metric; None where none was measured."""
    clean, nothing, bootstrap = _metric_of_models(grid), grid["none"], bootstrap_of(grid)
    if clean is None:
        return [None] * len(patched)
    (difference,) = bootstrap.estimate(clean[1:] - clean[:1])
    why = _why_no_difference(grid, difference)
    unpatched, absent = _metric((nothing.raw, nothing.mapped)), np.zeros((2, grid.n_prompts))
    stacked = [clean]
    for patches, swapped in patched:
        stacked.append(absent if patches is None else _metric(patches) - unpatched)
        stacked.append(absent if swapped is None else _metric(swapped))
    flat = bootstrap.estimate(np.concatenate(stacked), _metric_shares)
    found: list[MetricEffect | None] = []
    for at, (patches, swapped) in enumerate(patched):
        changes, shares = flat[4 * at : 4 * at + 2], flat[4 * at + 2 : 4 * at + 4]
        if patches is None:
            changes = [undefined(NO_PATCH)] * 2
        if swapped is None or why is not None:
            shares = [undefined(why or NOT_SWAPPED)] * 2
        elif swapped is nothing.transfer:
            shares = [exact(0.0)] * 2
        found.append(MetricEffect(*changes, *shares))
    return found


def _metric_shares(means: Float64[ndarray, "*rows quantity"]) -> ndarray:
    """Of each condition; the metric of the clean base and tuned models comes first."""
    base, tuned = (means[..., at, None] for at in range(2))
    rows = rearrange(means[..., 2:], "... (conditions four) -> ... conditions four", four=4)
    shares = [
        *(rows[..., 0], rows[..., 1]),
        100 * (tuned - rows[..., 2]) / (tuned - base),
        100 * (rows[..., 3] - base) / (tuned - base),
    ]
    return rearrange(np.stack(shares, axis=-1), "... conditions share -> ... (conditions share)")
