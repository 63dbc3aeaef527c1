"""Does the map hold elsewhere: on contents it was not fitted on, and from other heads?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rq4lens.models.prompts.prompt_set import FIT_SPLIT
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.maps.fitting import FitData, refit
from rq4lens.patching.maps.map import LayerMap

Site = Float[Tensor, "prompt position head d_head"]

NO_CONTENT = (
    "the prompts do not name their content: give each one a `content`, or name another field with "
    "--hold-out"
)
ONE_CONTENT = "all train prompts have the same content: none can be held out"


def contents_of(activations: PairActivations, split: str) -> list[str] | None:
    """The content of each prompt of a split; None unless all of them name one."""
    found = activations.pair.prompts.split(split).contents
    named = [each for each in found if each is not None]
    return named if len(named) == len(found) else None


def held_out(layer_map: LayerMap, activations: PairActivations, split: str) -> Site | str:
    """Each prompt mapped by a map that was fitted without its content; or why there is none."""
    train, measured = contents_of(activations, FIT_SPLIT), contents_of(activations, split)
    if train is None or measured is None:
        return NO_CONTENT
    if len(set(train)) < 2:
        return ONE_CONTENT
    data, z_base = (
        FitData.of(activations, layer_map.layer),
        activations.z("base", split, layer_map.layer),
    )
    of_rows = np.repeat(np.array(train, dtype=object), activations.k_positions)
    of_prompts = np.array(measured, dtype=object)
    predicted = layer_map(z_base)
    for content in sorted(set(measured) & set(train)):
        left, asked = of_rows != content, torch.from_numpy(of_prompts == content)
        predicted[asked] = refit(layer_map, data.some(left))(z_base[asked])
    return predicted


def from_other_heads(
    layer_map: LayerMap, activations: PairActivations, split: str
) -> Iterator[tuple[str, Site]]:
    """Predictions of each head from another base head, by how far the other's index lies above."""
    if layer_map.scope != "head":
        return
    data = FitData.of(activations, layer_map.layer)
    z_base = activations.z("base", split, layer_map.layer)
    for offset in range(1, layer_map.n_heads):
        others = other_heads(layer_map.n_heads, offset)
        fitted = refit(layer_map, replace(data, x=data.x[:, others]))
        yield f"from_head+{offset}", fitted(z_base[:, :, others])


def other_heads(n_heads: int, offset: int) -> Sequence[int]:
    """The head that stands in for each head."""
    return [(head + offset) % n_heads for head in range(n_heads)]
