"""What kind of head each is: idle, re-coordinated, rewired or undecided."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.records import HeadKind, HeadKinds
from rq4lens.analysis.statistics.bootstrap import CONSTANT, Bootstrap, Estimate, undefined
from rq4lens.results import NO_RAW_EFFECT

IDLE_SHARE = 0.1
"""Of an even share of ``KL_raw(ALL)``: what a head at most does if it is idle."""

NOISE_MULTIPLE = 10.0
"""A head below this many noise floors is idle, too."""

EXPLAINED_PCT = 50.0
"""A map that repairs more than this share of a head's damage explains the head."""


def head_kinds(
    kl_raw_nats: Float64[ndarray, "head prompt"],
    kl_mapped_nats: Float64[ndarray, "head prompt"],
    full_kl_raw: float,
    noise_floor_nats: float,
    bootstrap: Bootstrap,
) -> HeadKinds:
    """Tell the kinds of all heads apart."""
    n_heads = len(kl_raw_nats)
    idle_below = idle_line(full_kl_raw, n_heads, noise_floor_nats)
    resampled = bootstrap.resampled(np.concatenate([kl_raw_nats, kl_mapped_nats]))
    means = resampled.estimates()
    drops = resampled.apply(_drop_pct).estimates()
    heads = []
    for head, (raw, mapped) in enumerate(zip(means[:n_heads], means[n_heads:], strict=True)):
        drop = undefined(NO_RAW_EFFECT) if (raw.value or 0.0) <= 0 else drops[head]
        heads.append(HeadKind(head, kind_of(raw, drop, idle_below), raw, mapped, drop))
    return HeadKinds(tuple(heads), rule(idle_below), idle_below, EXPLAINED_PCT)


def idle_line(full_kl_raw: float, n_heads: int, noise_floor_nats: float = 0.0) -> float:
    """The ``KL_raw`` up to which a head is idle, in nats."""
    return max(IDLE_SHARE * full_kl_raw / n_heads, NOISE_MULTIPLE * noise_floor_nats)


def _drop_pct(means: Float64[ndarray, "*rows both"]) -> ndarray:
    raw, mapped = np.split(means, 2, axis=-1)
    return 100 * (raw - mapped) / raw


def kind_of(raw: Estimate, drop: Estimate, idle_below: float) -> str:
    """The kind of one head."""
    if raw.value is None or raw.value <= idle_below:
        return "idle"
    low, high = _reach(drop)
    if low > EXPLAINED_PCT:
        return "re-coordinated"
    return "rewired" if high < EXPLAINED_PCT else "undecided"


def _reach(drop: Estimate) -> tuple[float, float]:
    """Where the drop may lie: its interval, the value all prompts agree on, or anywhere."""
    if drop.interval is not None:
        return drop.interval.low, drop.interval.high
    if drop.value is not None and drop.reason == CONSTANT:
        return drop.value, drop.value
    return -np.inf, np.inf


def rule(idle_below: float) -> str:
    """The rule in words, with its numbers."""
    return (
        f"idle: KL_raw at most {idle_below:.3g} nats ({100 * IDLE_SHARE:g}% of an even share of "
        f"KL_raw(ALL), or {NOISE_MULTIPLE:g} noise floors if that is more); re-coordinated: the "
        f"95% interval of drop lies above {EXPLAINED_PCT:g}%; rewired: it lies below; undecided: "
        f"it holds {EXPLAINED_PCT:g}%"
    )
