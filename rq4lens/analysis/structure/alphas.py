"""The full effect and the head ranking at other blend strengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from rq4lens.analysis.effects.measured import MeasuredLayer, MeasuredSets
from rq4lens.analysis.effects.transfer import NO_GAP
from rq4lens.analysis.rankings.agreement import THE_SAME, Scored, agreement
from rq4lens.analysis.records import SHUFFLED, AlphaPoint
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, undefined
from rq4lens.patching.patch import RAW
from rq4lens.results import order_of


def alpha_sweep(
    layer: MeasuredLayer, alphas: Sequence[float]
) -> tuple[list[AlphaPoint], list[MeasuredSets]]:
    """Measure all heads together and one by one at several blend strengths."""
    measured = layer.measured
    at_alpha = [
        measured if alpha == measured.alpha else measured.at(alpha)
        for alpha in sorted({*alphas, measured.alpha})
    ]
    return [_point(each, layer) for each in at_alpha], at_alpha


def _point(measured: MeasuredSets, layer: MeasuredLayer) -> AlphaPoint:
    bootstrap, is_own = layer.bootstrap, measured is layer.measured
    raw, mapped = measured.kl_nats([measured.everything, *measured.singles])
    full = bootstrap.estimate(np.stack([raw[0], mapped[0]]), _four_numbers)
    delta_nats = raw - mapped
    coverage = bootstrap.percent(delta_nats[0], delta_nats[1:])
    shares = _to_base(measured, layer)
    scored = Scored.of_prompts(f"alpha {measured.alpha:g}", delta_nats[1:], bootstrap)
    own = layer.scored(f"alpha {layer.measured.alpha:g}")
    return AlphaPoint(
        alpha=measured.alpha,
        KL_raw=full[0],
        KL_mapped=full[1],
        delta=full[2],
        drop_pct=full[3],
        to_base_pct=shares[0],
        coverage_pct=tuple(coverage) if full_is_clear(full[2]) else (),
        head_to_base_pct=tuple(shares[1:]),
        head_delta_nats=tuple(scored.scores.tolist()),
        heads=tuple(order_of(scored.scores).tolist()),
        agreement=None if is_own else agreement("alpha", scored, own, layer.ks, bootstrap),
        agreement_reason=THE_SAME if is_own else None,
    )


def with_shuffled(
    points: Sequence[AlphaPoint],
    at_alpha: Sequence[MeasuredSets],
    shuffled: Float[Tensor, "prompt position head d_head"],
    bootstrap: Bootstrap,
) -> list[AlphaPoint]:
    """The points with what a map of shuffled pairs repairs, in all heads, as a share of ``ΔKL``."""
    found = []
    for point, measured in zip(points, at_alpha, strict=True):
        share = undefined(UNCLEAR)
        if full_is_clear(point.delta):
            everything = [measured.everything]
            raw, mapped = measured.kl_nats(everything)
            left = measured.also({SHUFFLED: shuffled}).of_source(SHUFFLED, everything)
            (share,) = bootstrap.percent((raw - mapped)[0], raw - left)
        found.append(replace(point, shuffled_pct=share))
    return found


UNCLEAR = "the interval of ΔKL of all heads reaches 0 at this strength"


def full_is_clear(delta: Estimate) -> bool:
    """Whether a full effect can be a denominator."""
    return delta.interval is not None and not delta.interval.contains(0.0)


def _to_base(measured: MeasuredSets, layer: MeasuredLayer) -> list[Estimate]:
    """``to_base`` of all heads and of each head alone, with the raw patch of this strength."""
    sets = [measured.everything, *measured.singles]
    left = measured.effects_of(RAW, sets).gap_left_nats
    if left is None or layer.gap_nats is None:
        return [undefined(NO_GAP)] * len(sets)
    return layer.bootstrap.shares(layer.gap_nats[None], np.asarray(left))


def _four_numbers(means: Float64[ndarray, "*rows both"]) -> ndarray:
    """``KL_raw``, ``KL_mapped``, ``ΔKL`` and the share of the damage that is repaired."""
    raw, mapped = means[..., 0], means[..., 1]
    return np.stack([raw, mapped, raw - mapped, 100 * (raw - mapped) / raw], axis=-1)
