"""Transfer: how far each model's activations take the other one, as a share of the gap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.records import FullEffect, Gap, LayerTransfer
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, exact, undefined
from rq4lens.config import RankBy
from rq4lens.results import OTHERS, OWN, TRANSFERS, GridResult, Transfer

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
    compared = grid.compared
    left_out = max(compared.left_out_base_pct, compared.left_out_tuned_pct)
    if left_out > MOST_LEFT_OUT_PCT:
        return (
            f"the models give {left_out:.1f}% of their probability to tokens that only one of "
            f"their vocabularies has (at most {MOST_LEFT_OUT_PCT:g}% may be left out)"
        )
    return next((why for gap in gaps if (why := why_no_gap(gap, noise_nats))), None)


def why_no_gap(gap: Estimate, noise_nats: float) -> str | None:
    """Why nothing is a share of the gap; None if something is."""
    return gap_undefined_because(gap, noise_nats, f"the gap{BETWEEN}", " nats")


def gap_undefined_because(gap: Estimate, noise: float, what: str, unit: str) -> str | None:
    """Why nothing is a share of a gap; None where it can be told from 0."""
    value, what_alone = gap.value or 0.0, what.removesuffix(BETWEEN)
    if abs(value) <= noise or value == 0:
        return (
            f"{what} is {value:.2g}{unit}, within the noise of {noise:.2g}{unit}: the models "
            "answer alike here"
        )
    if gap.interval is None:
        return f"{what} has no confidence interval: {gap.reason}"
    if gap.interval.low <= 0 <= gap.interval.high:
        return f"the 95% interval of {what_alone}, {gap:.2g}{unit}, reaches 0"
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
    found = zip(
        *(_carried(nothing, swapped, each, bootstrap, undefined_because) for each in TRANSFERS),
        *_answers(swapped, differ, bootstrap),
        strict=True,
    )
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


def _carried(
    nothing: Transfer,
    swapped: Sequence[Transfer],
    direction: RankBy,
    bootstrap: Bootstrap,
    undefined_because: str | None,
) -> list[Estimate]:
    """The share of the gap that each closes in one direction."""
    if undefined_because is not None:
        return [undefined(undefined_because)] * len(swapped)
    left = np.array([each.left_nats(direction) for each in swapped])
    return bootstrap.shares(nothing.left_nats(direction)[None], left)


def _answers(
    swapped: Sequence[Transfer], differ: Float64[ndarray, "prompt"], bootstrap: Bootstrap
) -> tuple[list[Estimate], list[Estimate]]:
    """How many answers change, and how many of those that differ become base's."""
    answers = np.array([each.answer_is for each in swapped])
    flipped, as_base = answers % OTHERS < OWN, (answers >= OTHERS) & (differ > 0)
    rows = np.concatenate([differ[None], flipped, as_base])
    flat = bootstrap.estimate(rows, _answers_pct)
    return flat[: len(swapped)], flat[len(swapped) :]


def _answers_pct(means: Float64[ndarray, "*rows quantity"]) -> ndarray:
    flipped, as_base = np.split(means[..., 1:], 2, axis=-1)
    return 100 * np.concatenate([flipped, as_base / means[..., :1]], axis=-1)


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
    return FullEffect(gap.side(direction), noise_floor_nats, gap.undefined_because)
