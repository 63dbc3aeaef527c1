"""The real pair beside its noise pair: how much of a number any change of this size would give."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.effects.transfer import NO_GAP
from rq4lens.analysis.records import NoisePair
from rq4lens.analysis.statistics.bootstrap import Bootstrap, undefined
from rq4lens.patching.noise import NoiseEffects
from rq4lens.results import GridResult

NAMES = ("gap_base_nats", "KL_raw", "delta")


def beside_noise(grid: GridResult, noise: NoiseEffects, bootstrap: Bootstrap) -> NoisePair:
    """The noise pair's numbers, and the real ones as multiples of them."""
    nothing, full = grid["none"].transfer, grid.full
    delta = noise.kl_raw_nats - noise.kl_mapped_nats
    of_noise = np.stack([noise.gap_base_nats, noise.kl_raw_nats, delta])
    gap = np.zeros(grid.n_prompts) if nothing is None else nothing.left_nats("to_base")
    real = np.stack([gap, full.kl_raw_nats, full.delta_nats])
    values = bootstrap.estimate(of_noise)
    over = bootstrap.estimate(np.concatenate([real, of_noise]), _ratios)
    beyond = bootstrap.estimate(real - of_noise)
    (share,) = bootstrap.estimate(np.stack([noise.gap_base_nats, noise.gap_left_nats]), _share)
    multiples = dict(zip(NAMES, over, strict=True))
    if nothing is None:
        multiples["gap_base_nats"] = beyond[0] = undefined(NO_GAP)
    return NoisePair(
        gap_base_nats=values[0],
        to_base_pct=share,
        KL_raw=values[1],
        delta=values[2],
        real_over_noise=multiples,
        delta_beyond_nats=beyond[2],
        gap_beyond_nats=beyond[0],
    )


def _ratios(means: Float64[ndarray, "*rows quantity"]) -> ndarray:
    real, noise = np.split(means, 2, axis=-1)
    return np.where(noise > 0, real / noise, np.inf)


def _share(means: Float64[ndarray, "*rows both"]) -> ndarray:
    return 100 * (1 - means[..., 1:] / means[..., :1])
