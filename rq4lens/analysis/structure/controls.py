"""What else could explain it: other maps in the map's place, the control layer, the noise pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import einops
import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from rq4lens.analysis.effects.measured import Indices, MeasuredSets, Site
from rq4lens.analysis.effects.table import NO_GAP, bootstrap_of, gap_of
from rq4lens.analysis.records import SHUFFLED, ControlLayer, NoisePair, StandIn
from rq4lens.analysis.statistics.bootstrap import Bootstrap, undefined
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import FIT_SPLIT
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.maps.fitting import FitData, fit_subsets, refit
from rq4lens.patching.maps.kinds import Fit
from rq4lens.patching.maps.map import MapScope, from_blocks, to_blocks
from rq4lens.patching.noise import NoiseEffects
from rq4lens.patching.patch import CONSTANT, MAPPED
from rq4lens.results import NO_CONTROL_LAYER, GridResult, gaps_of

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
    experiment: Experiment, layer: int, control_layer: int | None, seed: int
) -> dict[str, Site]:
    """What each stand-in puts in at the main layer."""
    activations, own = experiment.ends.activations, experiment.maps[layer]
    data = FitData.of(activations, layer)
    z_base = activations.z("base", experiment.split, layer)
    predicted = own(z_base)
    turns = random_rotations(experiment.n_heads, z_base.shape[-1], seed)
    sources = {
        SHUFFLED: refit(own, data.unpaired(seed))(z_base),
        ROTATED: rotated(predicted, data.y.mean(0).to(predicted), turns),
    }
    if control_layer is not None and control_layer in experiment.maps:
        sources[WRONG_LAYER] = experiment.maps[control_layer](z_base)
    return sources


def stand_ins(
    measured: MeasuredSets, control_layer: int | None, heads: Indices, bootstrap: Bootstrap
) -> tuple[StandIn, ...]:
    """Each stand-in on the heads that changed, judged by what is left of what they tell."""
    if not heads:
        return tuple(_missing(name, NOTHING_CHANGED) for name in QUESTIONS)
    experiment = measured.measurer.experiment
    sources = stand_in_sources(experiment, measured.layer, control_layer, bootstrap.seed)
    constant, mapped = (measured.of_source(each, [heads])[0] for each in (CONSTANT, MAPPED))
    varied = measured.also(sources)
    found = []
    for name, question in QUESTIONS.items():
        if name not in sources:
            found.append(_missing(name, NO_CONTROL_LAYER))
            continue
        damage = varied.of_source(name, [heads])[0]
        value, behind = bootstrap.estimate(np.stack([damage, damage - mapped]))
        (share,) = bootstrap.shares(constant[None], damage[None], method="bca")
        found.append(StandIn(name, question, heads, value, share, behind))
    return tuple(found)


def _missing(name: str, reason: str) -> StandIn:
    nothing = undefined(reason)
    return StandIn(name, QUESTIONS[name], (), nothing, nothing, nothing, reason)


# Does the map hold elsewhere: on contents it was not fitted on, and from other heads?

NO_CONTENT = (
    "the prompts do not name their content: give each one a `content`, or name another field with "
    "--hold-out"
)
ONE_CONTENT = "all train prompts have the same content: none can be held out"


def contents_of(pair: ModelPair, split: str) -> list[str] | None:
    """The content of each prompt of a split; None unless all of them name one."""
    found = pair.prompts.split(split).contents
    named = [each for each in found if each is not None]
    return named if len(named) == len(found) else None


def held_out(experiment: Experiment, layer: int) -> Site | str:
    """Each prompt mapped by a map that was fitted without its content; or why there is none."""
    activations, split = experiment.ends.activations, experiment.split
    train, measured = (contents_of(experiment.pair, each) for each in (FIT_SPLIT, split))
    if train is None or measured is None:
        return NO_CONTENT
    if len(set(train)) < 2:
        return ONE_CONTENT
    layer_map, z_base = experiment.maps[layer], activations.z("base", split, layer)
    of_rows = np.array(train, dtype=object)[activations.prompt_of_rows(FIT_SPLIT)]
    shared = sorted(set(measured) & set(train))
    kept = [np.flatnonzero(of_rows != content) for content in shared]
    data = FitData.of(activations, layer)
    fits = fit_subsets(layer_map.kind, data, kept, layer_map.scope)
    predicted = layer_map(z_base).to(z_base)
    for content, fit in zip(shared, fits, strict=True):
        asked = torch.tensor([each == content for each in measured])
        predicted[asked] = _applied(fit, z_base[asked], layer_map.scope)
    return predicted


def _applied(fit: Fit, z: Site, scope: MapScope) -> Site:
    """A fit applied to activations, back in their own format."""
    n_prompts, _, n_heads, _ = z.shape
    rows = to_blocks(z.flatten(0, 1).to(fit.weight), scope)
    found = from_blocks(fit(rows), n_heads).unflatten(0, (n_prompts, -1))
    return found.to(z.device, z.dtype)


def from_other_heads(
    experiment: Experiment, layer: int, heads: Sequence[int]
) -> Iterator[tuple[str, Site]]:
    """Predictions of some heads from another base head, by how far its index lies above.

    The predictions of the heads that are not asked for are those of the map itself.
    """
    layer_map, activations = experiment.maps[layer], experiment.ends.activations
    if layer_map.scope != "head":
        return
    data, z_base = FitData.of(activations, layer), activations.z("base", experiment.split, layer)
    every, own = np.arange(len(data.x)), layer_map(z_base).to(z_base)
    for offset in range(1, layer_map.n_heads):
        others = [(head + offset) % layer_map.n_heads for head in heads]
        problem = replace(data, x=data.x[:, others], y=data.y[:, list(heads)])
        (fit,) = fit_subsets(layer_map.kind, problem, [every])
        predicted = own.clone()
        predicted[:, :, list(heads)] = _applied(fit, z_base[:, :, others], "head")
        yield f"from_head+{offset}", predicted


# The control layer and the noise pair


def control_layer(grid: GridResult) -> ControlLayer | None:
    """The control layer beside the main one, on the same prompts; None if there is none."""
    control, bootstrap = grid.control, bootstrap_of(grid)
    if control is None:
        return None
    deltas = np.stack([control.delta_nats, grid.full.delta_nats - control.delta_nats])
    delta, less = bootstrap.estimate(deltas)
    why = gap_of(grid).undefined_because
    if why is not None or control.transfer is None:
        transfer = undefined(why or NO_GAP)
    else:
        whole, left = gaps_of(grid["none"], [grid.full, control], "to_base")
        (transfer,) = bootstrap.percent(whole[0], left[1:] - left[:1])
    return ControlLayer(control.layer, delta, less, transfer)


def beside_noise(grid: GridResult, noise: NoiseEffects) -> NoisePair:
    """The noise pair's numbers, and the real ones as multiples of them."""
    nothing, full, bootstrap = grid["none"].transfer, grid.full, bootstrap_of(grid)
    delta = noise.kl_raw_nats - noise.kl_mapped_nats
    of_noise = np.stack([noise.gap_base_nats, noise.kl_raw_nats, delta])
    gap = np.zeros(grid.n_prompts) if nothing is None else nothing.left_nats("to_base")
    real = np.stack([gap, full.kl_raw_nats, full.delta_nats])
    values = bootstrap.estimate(of_noise)
    over = bootstrap.estimate(np.concatenate([real, of_noise]), _ratios)
    beyond = bootstrap.estimate(real - of_noise)
    (share,) = bootstrap.shares(noise.gap_base_nats[None], noise.gap_left_nats[None])
    if nothing is None:
        over[0] = beyond[0] = undefined(NO_GAP)
    return NoisePair(
        gap_base_nats=values[0],
        to_base_pct=share,
        KL_raw=values[1],
        delta=values[2],
        real_over_noise=dict(zip(("gap_base_nats", "KL_raw", "delta"), over, strict=True)),
        delta_beyond_nats=beyond[2],
        gap_beyond_nats=beyond[0],
    )


def _ratios(means: Float64[ndarray, "*rows quantity"]) -> ndarray:
    real, noise = np.split(means, 2, axis=-1)
    return np.where(noise > 0, real / noise, np.inf)
