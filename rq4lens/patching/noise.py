"""The noise pair: base plus the fine-tune's weight change, its entries shuffled in each matrix."""

from __future__ import annotations

import copy
import logging
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from rq4lens.config import Patching, Place
from rq4lens.disk.store import NamedIngredients, content_key
from rq4lens.heads import HeadSet
from rq4lens.models.load.devices import has_room_for
from rq4lens.models.load.lens import HookedModel
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import ModelPair, PairMember
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.experiment import prepare
from rq4lens.patching.keys import settings_values
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.measured import Measurer
from rq4lens.patching.patch import BASE, MAPPED, RAW, Patch

log = logging.getLogger(__name__)


class NoiseEffects(NamedTuple):
    """What all heads of a layer do in the noise pair, on each prompt."""

    gap_base_nats: ndarray
    """``KL(p_base || p_noise)`` of the clean models."""
    gap_left_nats: ndarray
    """What is left of it with base's activations at strength 1."""
    kl_raw_nats: ndarray
    kl_mapped_nats: ndarray
    """``KL(ALL)`` at the run's alpha; mapped by a map that is fitted to this pair."""


MOST_AT_ONCE = 2**26
"""Entries that are shuffled together: their order takes many times their own memory."""


@torch.no_grad()
def shuffled_change(base: HookedModel, tuned: HookedModel, seed: int) -> HookedModel:
    """A model that lies as far from base as tuned does, matrix by matrix, in no direction."""
    noisy = copy.deepcopy(tuned)
    of_base = dict(base.named_parameters())
    for at, (name, parameter) in enumerate(noisy.named_parameters()):
        start = of_base[name].to(parameter)
        if start.shape != parameter.shape:
            continue  # an embedding of another vocabulary has no change to shuffle
        # Where the weights lie: a processor takes minutes for the entries of a large model.
        generator = torch.Generator(parameter.device).manual_seed(seed * 100_003 + at)
        parameter.copy_(start + _shuffled(parameter - start, generator))
    return noisy


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    """The entries in random order; of a very large matrix rows first, then entries of some rows."""

    def order(n: int) -> Tensor:
        return torch.randperm(n, generator=generator, device=values.device)

    if values.numel() <= MOST_AT_ONCE or len(values) == 1:
        return values.flatten()[order(values.numel())].view_as(values)
    rows_at_once = max(1, MOST_AT_ONCE * len(values) // values.numel())
    parts = values[order(len(values))].split(rows_at_once)
    return torch.cat([_shuffled(part, generator) for part in parts])


def noise_pair(pair: ModelPair, seed: int = 0) -> ModelPair:
    """The pair of base and a tuned model whose weight change was shuffled.

    It takes the memory of one more tuned model.
    """
    base, tuned = pair.base.loaded, pair.tuned.loaded
    noisy = LoadedModel.wrap(shuffled_change(base.model, tuned.model, seed), tuned.tokenizer)
    # What it was made of tells it apart; its own weights would have to be read back for that.
    made_from: Future[str] = Future()
    made_from.set_result(content_key({"of": [base.fingerprint, tuned.fingerprint], "seed": seed}))
    known = replace(noisy, files=made_from)
    name = f"{pair.name}, noise"
    member = PairMember(lambda: known)
    return ModelPair(pair.base, member, pair.prompts, name=name, reading=pair.reading)


def noise_effects(
    measurer: Measurer,
    activations: PairActivations,
    patching: Patching,
    place: Place,
    seed: int = 0,
) -> NoiseEffects | None:
    """The effects of the noise pair; from the store of the measurer if they lie there.

    None where there is no room for a third model.
    """
    on = {**measurer.on, **settings_values(patching), "seed": seed}
    ingredients = NamedIngredients("noise_pair", on)

    def measure() -> dict[str, Any]:
        pair = measurer.experiment.pair
        if not has_room_for(pair.tuned.model):
            log.warning("the noise pair is left out: there is no room for a third model")
            return {}
        effects = _measured(noise_pair(pair, seed), activations, patching, place)
        return {name: values.tolist() for name, values in effects._asdict().items()}

    found = measurer.once(ingredients, measure)
    return NoiseEffects(**{n: np.array(each) for n, each in found.items()}) if found else None


def _measured(
    noisy: ModelPair, activations: PairActivations, patching: Patching, place: Place
) -> NoiseEffects:
    layer = int(patching.layer or 0)
    beside = activations.beside(noisy)
    maps = fit_maps(noisy, [layer], patching.map_kind, scope=patching.map_scope, activations=beside)
    experiment = prepare(noisy, maps, patching.of_divergence, place, activations=beside)
    every, none = HeadSet.all(noisy.n_heads), HeadSet.none(noisy.n_heads)
    swaps = [Patch(layer, heads, 1.0, BASE) for heads in (none, every)]
    both = [Patch(layer, every, patching.alpha, source) for source in (RAW, MAPPED)]
    found = experiment.effects([*swaps, *both])
    gaps = found.gap_left_nats
    assert gaps is not None
    return NoiseEffects(gaps[0], gaps[1], found.kl_nats[2], found.kl_nats[3])
