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
from rq4lens.patching.maps.fitting import FitData, fit_subsets
from rq4lens.patching.maps.kinds import Fit
from rq4lens.patching.maps.map import LayerMap, MapScope, from_blocks, to_blocks

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
    data = FitData.of(activations, layer_map.layer)
    z_base = activations.z("base", split, layer_map.layer)
    of_rows = np.array(train, dtype=object)[activations.prompt_of_rows(FIT_SPLIT)]
    of_prompts = np.array(measured, dtype=object)
    shared = sorted(set(measured) & set(train))
    kept = [np.flatnonzero(of_rows != content) for content in shared]
    predicted = layer_map(z_base).to(z_base)
    fits = fit_subsets(layer_map.kind, data, kept, layer_map.scope)
    for content, fit in zip(shared, fits, strict=True):
        asked = torch.from_numpy(of_prompts == content)
        predicted[asked] = _applied(fit, z_base[asked], layer_map.scope)
    return predicted


def _applied(fit: Fit, z: Site, scope: MapScope) -> Site:
    """A fit applied to activations, back in their own format."""
    n_prompts, _, n_heads, _ = z.shape
    rows = to_blocks(z.flatten(0, 1).to(fit.weight), scope)
    found = from_blocks(fit(rows), n_heads).unflatten(0, (n_prompts, -1))
    return found.to(z.device, z.dtype)


def from_other_heads(
    layer_map: LayerMap, activations: PairActivations, split: str, heads: Sequence[int]
) -> Iterator[tuple[str, Site]]:
    """Predictions of some heads from another base head, by how far its index lies above.

    The predictions of the heads that are not asked for are those of the map itself.
    """
    if layer_map.scope != "head" or not heads:
        return
    data = FitData.of(activations, layer_map.layer)
    z_base = activations.z("base", split, layer_map.layer)
    every, own = np.arange(len(data.x)), layer_map(z_base).to(z_base)
    for offset in range(1, layer_map.n_heads):
        others = [(head + offset) % layer_map.n_heads for head in heads]
        problem = replace(data, x=data.x[:, others], y=data.y[:, list(heads)])
        (fit,) = fit_subsets(layer_map.kind, problem, [every])
        predicted = own.clone()
        predicted[:, :, list(heads)] = _applied(fit, z_base[:, :, others], "head")
        yield f"from_head+{offset}", predicted


def other_heads(n_heads: int, offset: int) -> Sequence[int]:
    """The head that stands in for each head."""
    return [(head + offset) % n_heads for head in range(n_heads)]
