"""What the controls blend in instead of the map's own prediction.

Each control keeps something of the real map and breaks something: the pairing of prompts, the
layer, the direction, or everything but the means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import einops
import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped
from numpy import ndarray
from scipy.stats import ortho_group
from torch import Tensor

from rq4lens.models.prompts import FIT_SPLIT
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.fitting import rows_of
from rq4lens.patching.map_kinds import fit_block
from rq4lens.patching.maps import LayerMap, MapKind, to_blocks

Site = Float[Tensor, "prompt position head d_head"]

SHUFFLED = "shuffled pairs"
WRONG_LAYER = "wrong layer"
ROTATED = "random rotation"
MEAN_ONLY = "mean only"
TUNED_MEAN = "tuned mean"


@dataclass(frozen=True)
class FitData:
    """The rows that the map of one layer was fitted on.

    Args:
        x: base activations.
        y: tuned activations.
        groups: the group of each row.
    """

    x: Float[Tensor, "row head d_head"]
    y: Float[Tensor, "row head d_head"]
    groups: Shaped[ndarray, "row"]

    @classmethod
    def of(cls, activations: PairActivations, layer: int) -> FitData:
        """The train rows of one layer."""
        prompts = activations.pair.prompts.split(FIT_SPLIT)
        x, y = (rows_of(activations.z(side, FIT_SPLIT, layer)) for side in ("base", "tuned"))
        groups = np.repeat(prompts.groups, activations.k_positions)
        return cls(x, y, groups)

    def unpaired(self, seed: int) -> FitData:
        """The same rows, each base row beside the tuned row of another prompt."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self.y)))
        return replace(self, y=self.y[order])


def refit(layer_map: LayerMap, data: FitData, kind: MapKind | None = None) -> LayerMap:
    """A map of the same scope on other rows or of another kind; it has no diagnostics.

    Args:
        layer_map: the map that is varied.
        data: the rows to fit.
        kind: how to fit; the same way when left out.
    """
    kind = kind or layer_map.kind
    x, y = (to_blocks(z, layer_map.scope).numpy() for z in (data.x, data.y))
    fits = [fit_block(kind, x[:, block], y[:, block], data.groups) for block in range(x.shape[1])]
    weight, bias = (np.stack([getattr(fit, name) for fit in fits]) for name in ("weight", "bias"))
    return replace(
        layer_map,
        kind=kind,
        weight=torch.tensor(weight, dtype=torch.float32),
        bias=torch.tensor(bias, dtype=torch.float32),
        diagnostics=(),
        details={},
    )


def rotated(
    predicted: Site, centre: Float[Tensor, "head d_head"], rotations: Float64[ndarray, "head d d"]
) -> Site:
    """Predictions turned around a centre; their distance from it stays the same.

    Args:
        predicted: the map's predictions.
        centre: what is turned around: the tuned means.
        rotations: one rotation per head.
    """
    turned = einops.einsum(
        (predicted - centre).double(),
        torch.from_numpy(rotations),
        "prompt position head i, head i j -> prompt position head j",
    )
    return (centre + turned).to(predicted.dtype)


def random_rotations(n_heads: int, width: int, seed: int) -> Float64[ndarray, "head d d"]:
    """One random orthogonal matrix per head."""
    rng = np.random.default_rng(seed)
    if width == 1:
        return rng.choice([-1.0, 1.0], size=(n_heads, 1, 1))
    return ortho_group.rvs(width, size=n_heads, random_state=rng).reshape(n_heads, width, width)


def control_sources(
    experiment: Experiment,
    layer: int,
    control_layer: int | None,
    activations: PairActivations,
    seed: int,
) -> dict[str, Site]:
    """What each control blends in at the main layer.

    Args:
        experiment: the pair and its maps.
        layer: the main layer.
        control_layer: whose map is the wrong one; without one that control is missing.
        activations: train and measured activations of the pair.
        seed: seed of shuffling and rotation.

    Returns:
        Activations by name of the control.
    """
    own, data = experiment.maps[layer], FitData.of(activations, layer)
    z_base = activations.z("base", experiment.split, layer)
    predicted = own(z_base)
    mean = data.y.mean(0).to(predicted)
    turns = random_rotations(experiment.n_heads, z_base.shape[-1], seed)
    sources = {
        SHUFFLED: refit(own, data.unpaired(seed))(z_base),
        ROTATED: rotated(predicted, mean, turns),
        MEAN_ONLY: refit(own, data, "mean_shift")(z_base),
        TUNED_MEAN: mean.expand_as(predicted),
    }
    if control_layer is not None and control_layer in experiment.maps:
        sources[WRONG_LAYER] = experiment.maps[control_layer](z_base)
    return sources
