"""Transfer: how far each model's activations take the other one, as a share of what differs.

What differs is the divergence between the two models, the gap, or a metric of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from einops import rearrange
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.records import FullEffect, Gap, LayerTransfer, MetricEffect, MetricSummary
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, exact, undefined
from rq4lens.config import RankBy
from rq4lens.results import (
    METRIC_UNITS,
    OTHERS,
    OWN,
    TRANSFERS,
    ConditionResult,
    GridResult,
    PatchRow,
    Transfer,
    gaps_of,
)

QUANTITIES = ("to_base_pct", "to_tuned_pct", "flipped_pct", "as_base_pct")
"""What is said of a head set; the gap of the clean models stands beside it."""

MOST_LEFT_OUT_PCT = 5.0
"""Where more probability than this lies on tokens of one model alone, nothing is compared."""

BETWEEN = " between base and tuned"
NOT_SWAPPED = "the two models were not swapped: it is a check of the patch alone"
NO_GAP = "transfer was not measured"
SAME_ANSWERS = "base and tuned have the same most likely token on every prompt"


def gap_of(grid: GridResult, bootstrap: Bootstrap) -> Gap:
    """How far apart the models of a grid are."""
    nothing, compared = grid["none"].transfer, grid.compared
    base = tuned = differ = undefined(NO_GAP)
    why: str | None = NO_GAP
    if nothing is not None:
        base, tuned, differ = bootstrap.estimate(_clean(nothing), lambda m: m * [1, 1, 100])
        why = _why_undefined((base, tuned), compared.noise_nats + grid.noise_floor_nats, grid)
    row = transfer_estimates(grid, [grid.every_layer], bootstrap, why)[0]
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
    grid: GridResult,
    transfers: Sequence[Transfer | None],
    bootstrap: Bootstrap,
    undefined_because: str | None,
) -> list[dict[str, Estimate]]:
    """What head sets carry in both directions, and what they do to the most likely tokens."""
    nothing = grid["none"].transfer
    swapped = [each for each in transfers if each is not None]
    if nothing is None or not swapped:
        return [dict.fromkeys(QUANTITIES, undefined(NO_GAP)) for _ in transfers]
    differ = _clean(nothing)[2]

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
        row = dict(zip(QUANTITIES, absent if each is None else next(found), strict=True))
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


def layer_transfer(grid: GridResult, gap: Gap, bootstrap: Bootstrap) -> LayerTransfer:
    """What the heads of a grid's main layer carry, together and one by one."""
    every = [each.transfer for each in (grid.full, *grid.singles)]
    full, *heads = transfer_estimates(grid, every, bootstrap, gap.undefined_because)
    nothing, n_eff = grid["none"].transfer, None
    if nothing is not None and grid.full.transfer is not None:
        left = grid.full.transfer.left_nats("to_base")
        n_eff = effective_number(nothing.left_nats("to_base") - left)
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


def gap_effect(gap: Gap, direction: str, noise_floor_nats: float) -> FullEffect:
    """The gap as what shares are taken of."""
    nats = gap.base_nats if direction == "to_base" else gap.tuned_nats
    return FullEffect(nats, noise_floor_nats, gap.undefined_because)


# The metric of the answer

AT_ONCE = "all layers are patched at once, with base's own activations alone"

Patched = tuple[PatchRow | None, PatchRow | None, Transfer | None]
"""The raw and the mapped patch of a condition, and both models swapped."""


def metric_effects(
    grid: GridResult, conditions: Sequence[ConditionResult], bootstrap: Bootstrap
) -> list[MetricEffect | None]:
    """What each condition does to the metric; None where none was measured."""
    return _effects(grid, [(c.raw, c.mapped, c.transfer) for c in conditions], bootstrap)


def every_layer_effect(grid: GridResult, bootstrap: Bootstrap) -> MetricEffect | None:
    """What all heads of all layers do to the metric."""
    if grid.every_layer is None:
        return None
    return _effects(grid, [(None, None, grid.every_layer)], bootstrap)[0]


def metric_summary(grid: GridResult, bootstrap: Bootstrap) -> MetricSummary | None:
    """The metric of both models, and what the heads of the main layer carry of its difference."""
    clean = _metric_of_models(grid)
    if clean is None:
        return None
    base, tuned, difference = bootstrap.estimate(
        clean, lambda m: np.concatenate([m, m[..., 1:] - m[..., :1]], axis=-1)
    )
    full, *heads = metric_effects(grid, [grid.full, *grid.singles], bootstrap)
    every = every_layer_effect(grid, bootstrap)
    whole, left = gaps_of(grid["none"], [grid.full], "metric")
    absent, name = undefined("it was not measured"), grid.settings.patching.metric
    assert full is not None
    return MetricSummary(
        name=name,
        unit=METRIC_UNITS.get(name, ""),
        base=base,
        tuned=tuned,
        difference=difference,
        noise=_metric_noise(grid),
        undefined_because=_why_no_difference(grid, difference),
        every_layer_to_base_pct=every.to_base_pct if every else absent,
        every_layer_to_tuned_pct=every.to_tuned_pct if every else absent,
        to_base_pct=full.to_base_pct,
        to_tuned_pct=full.to_tuned_pct,
        heads_to_base_pct=tuple(head.to_base_pct for head in heads if head),
        heads_to_tuned_pct=tuple(head.to_tuned_pct for head in heads if head),
        n_eff=effective_number((whole - left)[0]),
    )


def metric_full_effect(grid: GridResult, bootstrap: Bootstrap) -> FullEffect:
    """The difference of the metric as what shares are taken of."""
    (whole,) = bootstrap.estimate(gaps_of(grid["none"], [grid["none"]], "metric")[0])
    return FullEffect(whole, _metric_noise(grid), _why_no_difference(grid, whole))


def _metric_of_models(grid: GridResult) -> Float64[ndarray, "model prompt"] | None:
    """The metric of base and of tuned with nothing patched; None if none was measured."""
    nothing = grid["none"].transfer
    if nothing is None or nothing.into_tuned.metric is None:
        return None
    return np.array([nothing.into_base.metric, nothing.into_tuned.metric])


def _value(row: PatchRow) -> Float64[ndarray, "prompt"]:
    return np.asarray(row.metric)


def _metric_noise(grid: GridResult) -> float:
    """What patching nothing leaves of the metric, as its noise floor."""
    return float(abs(_value(grid["self"].raw).mean() - _value(grid["none"].raw).mean()))


def _why_no_difference(grid: GridResult, difference: Estimate) -> str | None:
    name = grid.settings.patching.metric
    what = f"the difference of {name}{BETWEEN}"
    return why_no_gap(difference, _metric_noise(grid), what, METRIC_UNITS.get(name, ""))


def _effects(
    grid: GridResult, rows: Sequence[Patched], bootstrap: Bootstrap
) -> list[MetricEffect | None]:
    clean, nothing = _metric_of_models(grid), grid["none"]
    if clean is None:
        return [None] * len(rows)
    (difference,) = bootstrap.estimate(clean[1:] - clean[:1])
    why = _why_no_difference(grid, difference)
    stacked, absent = [clean], np.zeros((2, grid.n_prompts))
    for raw, mapped, swapped in rows:
        of_patches, of_swaps = absent, absent
        if raw is not None and mapped is not None:
            raw_change = _value(raw) - _value(nothing.raw)
            of_patches = np.array([raw_change, _value(mapped) - _value(nothing.mapped)])
        if swapped is not None:
            of_swaps = np.array([swapped.into_tuned.metric, swapped.into_base.metric])
        stacked += [of_patches, of_swaps]
    flat = bootstrap.estimate(np.concatenate(stacked), _metric_shares)
    found: list[MetricEffect | None] = []
    for at, (raw, _, swapped) in enumerate(rows):
        changes, shares = flat[4 * at : 4 * at + 2], flat[4 * at + 2 : 4 * at + 4]
        if raw is None:
            changes = [undefined(AT_ONCE)] * 2
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
