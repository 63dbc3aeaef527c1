"""What else could explain it: stand-ins for the map, the control layer, the noise pair."""

from __future__ import annotations

from dataclasses import dataclass

import einops
import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from rq4lens.analysis.effects.measured import Indices, MeasuredSets
from rq4lens.analysis.effects.transfer import NO_GAP
from rq4lens.analysis.records import SHUFFLED, ControlLayer, Gap, NoisePair, StandIn
from rq4lens.analysis.statistics.bootstrap import Bootstrap, undefined
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.maps.fitting import FitData, refit
from rq4lens.patching.noise import NoiseEffects
from rq4lens.patching.patch import CONSTANT, MAPPED
from rq4lens.results import NO_CONTROL_LAYER, GridResult, gaps_of

Site = Float[Tensor, "prompt position head d_head"]

WRONG_LAYER = "wrong layer"
ROTATED = "random rotation"

QUESTIONS = {
    SHUFFLED: "Does a map fitted on prompts that do not belong together do as well?",
    WRONG_LAYER: "Does the control layer's map, used at the main layer, do as well?",
    ROTATED: "Do predictions of the same length in random directions do as well?",
}
"""What stands in for the map; a constant and a shift of the mean are rungs of the ladder."""

NOTHING_CHANGED = "no head of the layer changed, so there is nothing to stand in for"


def rotated(
    predicted: Site, centre: Float[Tensor, "head d_head"], rotations: Float64[ndarray, "head d d"]
) -> Site:
    """Predictions turned around a centre; their distance from it stays the same."""
    turned = einops.einsum(
        (predicted - centre).double(),
        torch.from_numpy(rotations),
        "prompt position head i, head i j -> prompt position head j",
    )
    return (centre + turned).to(predicted.dtype)


def random_rotations(n_heads: int, width: int, seed: int) -> Float64[ndarray, "head d d"]:
    """One random orthogonal matrix per head, each as likely as any other.

    Source: Mezzadri, How to Generate Random Matrices from the Classical Compact Groups (2007).
    """
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(n_heads, width, width)))
    return q * np.sign(r.diagonal(axis1=1, axis2=2))[:, None]


def stand_in_sources(
    experiment: Experiment,
    layer: int,
    control_layer: int | None,
    activations: PairActivations,
    seed: int,
) -> dict[str, Site]:
    """What each stand-in puts in at the main layer."""
    own, data = experiment.maps[layer], FitData.of(activations, layer)
    z_base = activations.z("base", experiment.split, layer)
    predicted = own(z_base)
    mean = data.y.mean(0).to(predicted)
    turns = random_rotations(experiment.n_heads, z_base.shape[-1], seed)
    sources = {
        SHUFFLED: refit(own, data.unpaired(seed))(z_base),
        ROTATED: rotated(predicted, mean, turns),
    }
    if control_layer is not None and control_layer in experiment.maps:
        sources[WRONG_LAYER] = experiment.maps[control_layer](z_base)
    return sources


@dataclass(frozen=True)
class StandInInputs:
    """What stand-ins are measured with: the layer at strength 1, and the heads that changed."""

    measured: MeasuredSets
    experiment: Experiment
    activations: PairActivations
    control_layer: int | None
    heads: Indices


def stand_ins(inputs: StandInInputs, bootstrap: Bootstrap) -> tuple[StandIn, ...]:
    """Each stand-in on the heads that changed, judged by what is left of what they tell."""
    if not inputs.heads:
        return tuple(_missing(name, NOTHING_CHANGED) for name in QUESTIONS)
    measured, heads = inputs.measured, [inputs.heads]
    sources = stand_in_sources(
        inputs.experiment,
        measured.layer,
        inputs.control_layer,
        inputs.activations,
        bootstrap.seed,
    )
    constant, mapped = (measured.of_source(each, heads)[0] for each in (CONSTANT, MAPPED))
    varied = measured.with_mapped(sources)
    found = []
    for name, question in QUESTIONS.items():
        if name not in varied:
            found.append(_missing(name, NO_CONTROL_LAYER))
            continue
        damage = varied[name].of_source(name, heads)[0]
        means = bootstrap.resampled(np.stack([constant, mapped, damage]))
        (share,) = bootstrap.shares(constant[None], damage[None], method="bca")
        behind = means.apply(lambda m: m[..., [2]] - m[..., [1]]).estimates()[0]
        value = means.estimates()[2]
        found.append(StandIn(name, question, inputs.heads, value, share, behind))
    return tuple(found)


def _missing(name: str, reason: str) -> StandIn:
    nothing = undefined(reason)
    return StandIn(name, QUESTIONS[name], (), nothing, nothing, nothing, reason)


def control_layer(grid: GridResult, gap: Gap, bootstrap: Bootstrap) -> ControlLayer | None:
    """The control layer beside the main one, on the same prompts; None if there is none."""
    control = grid.control
    if control is None:
        return None
    deltas = np.stack([control.delta_nats, grid.full.delta_nats - control.delta_nats])
    delta, less = bootstrap.estimate(deltas)
    if gap.undefined_because is not None or control.transfer is None:
        transfer = undefined(gap.undefined_because or "transfer was not measured")
    else:
        whole, left = gaps_of(grid["none"], [grid.full, control], "to_base")
        values = np.stack([whole[0], left[1] - left[0]])
        (transfer,) = bootstrap.estimate(values, lambda m: 100 * m[..., 1:] / m[..., :1])
    return ControlLayer(control.layer, delta, less, transfer)


BESIDE_NOISE = ("gap_base_nats", "KL_raw", "delta")


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
    (share,) = bootstrap.shares(noise.gap_base_nats[None], noise.gap_left_nats[None])
    multiples = dict(zip(BESIDE_NOISE, over, strict=True))
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
