"""Transfer: how far each model's activations take the other one, as a share of the gap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from einops import rearrange
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.records import FullEffect, Gap, LayerTransfer
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, exact, undefined
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
    what = f"the gap{BETWEEN}"
    whys = (gap_undefined_because(gap, noise_nats, what, " nats") for gap in gaps)
    return next((why for why in whys if why is not None), None)


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
    clean = _clean(nothing)
    rows = [_row(each, clean[2]) for each in swapped]
    flat = bootstrap.estimate(np.concatenate([clean, *rows]), _percentages)
    found = iter([flat[at : at + 4] for at in range(0, len(flat), 4)])
    absent = [undefined(NOT_SWAPPED)] * 4
    estimates = []
    for each in transfers:
        row = dict(zip(QUANTITIES, absent if each is None else next(found), strict=True))
        if undefined_because is not None:
            row |= dict.fromkeys(("to_base_pct", "to_tuned_pct"), undefined(undefined_because))
        elif each is nothing:
            row |= dict.fromkeys(("to_base_pct", "to_tuned_pct"), exact(0.0))
        if not clean[2].any():
            row["as_base_pct"] = undefined(SAME_ANSWERS)
        estimates.append(row)
    return estimates


def _row(transfer: Transfer, differ: Float64[ndarray, "prompt"]) -> ndarray:
    """What is left of the gap both ways, which answers changed, and which became base's."""
    left = (transfer.left_nats(direction) for direction in TRANSFERS)
    flipped = transfer.answer_is % OTHERS < OWN
    as_base = (transfer.answer_is >= OTHERS) & (differ > 0)
    return np.array([*left, flipped, as_base])


def _percentages(means: Float64[ndarray, "*rows quantity"]) -> ndarray:
    """Of each head set; the three numbers of the clean models come first."""
    to_base, to_tuned, differ = (means[..., at, None] for at in range(3))
    rows = rearrange(means[..., 3:], "... (sets quantity) -> ... sets quantity", quantity=4)
    shares = [
        100 * (1 - rows[..., 0] / to_base),
        100 * (1 - rows[..., 1] / to_tuned),
        100 * rows[..., 2],
        100 * rows[..., 3] / differ,
    ]
    return rearrange(np.stack(shares, axis=-1), "... sets share -> ... (sets share)")


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
