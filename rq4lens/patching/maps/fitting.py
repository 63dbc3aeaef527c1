"""Fitting the maps of a pair on its train prompts, and reusing those that a store holds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import einops
import numpy as np
import torch
from jaxtyping import Float
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor

from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.models.prompts.prompt_set import FIT_SPLIT
from rq4lens.patching.activations import PairActivations, check_layers
from rq4lens.patching.maps.diagnostics import diagnose
from rq4lens.patching.maps.kinds import fit_block
from rq4lens.patching.maps.map import (
    DEFAULT_KIND,
    MAP_KINDS,
    MAP_SCOPES,
    HeadDiagnostics,
    LayerMap,
    MapKind,
    MapScope,
    get_map,
    put_map,
    to_blocks,
)

MAP_NUMERICS = 1
"""Raised whenever the same ingredients would give other map weights than before."""

CALIBRATION_SHARE = 0.2
MIN_GROUPS = 5


def fit_maps(
    pair: ModelPair,
    layers: Sequence[int],
    kind: MapKind = DEFAULT_KIND,
    *,
    scope: MapScope = "head",
    seed: int = 0,
    activations: PairActivations | None = None,
) -> dict[int, LayerMap]:
    """Fit the maps from base z (source) to tuned z (target) on the train prompts.

    Each map is fitted on all train prompts. Its diagnostics come from a second fit that leaves a
    fifth of the train groups out and is judged on them.

    Args:
        pair: the pair.
        layers: the layers to map.
        kind: how to fit, one of ``identity``, ``mean_shift``, ``moments``, ``procrustes``,
            ``procrustes_scaled``, ``ridge`` and ``low_rank``.
        scope: one map per head, or one over all heads of the layer jointly.
        seed: decides which train groups are held out for the diagnostics.
        activations: already captured activations of this pair.

    Returns:
        The maps by layer.

    Raises:
        UserError: if the kind, scope or a layer does not exist.

    Warns:
        UserWarning: when there are fewer train rows than twice the map's width, or too few groups
            to hold some out.
    """
    activations = activations or PairActivations(pair)
    return _fitted(_recipes(activations, layers, kind, scope, seed), activations)


def maps_from(
    store: Store,
    activations: PairActivations,
    layers: Sequence[int],
    kind: MapKind = DEFAULT_KIND,
    *,
    scope: MapScope = "head",
    seed: int = 0,
) -> dict[int, LayerMap]:
    """The maps that :func:`fit_maps` gives, from a store; those that it lacks are fitted into it.

    Raises:
        UserError: if the kind, scope or a layer does not exist, or a map cannot be written.
    """
    recipes = _recipes(activations, layers, kind, scope, seed)
    stored = {recipe.layer: get_map(store, recipe) for recipe in recipes}
    missing = [recipe for recipe in recipes if stored[recipe.layer] is None]
    fitted = _fitted(missing, activations)
    for recipe in missing:
        put_map(store, recipe, fitted[recipe.layer])
    return {layer: found or fitted[layer] for layer, found in stored.items()}


@dataclass(frozen=True)
class MapRecipe:
    """Everything that decides a fitted map: what a store addresses it by."""

    pair: ModelPair
    layer: int
    kind: MapKind
    scope: MapScope
    seed: int
    k_positions: int

    @property
    def label(self) -> str:
        """Layer, kind and scope."""
        return f"L{self.layer}_{self.kind}_{self.scope}"

    def to_dict(self) -> dict[str, Any]:
        """Everything the fitted map depends on, as plain JSON values."""
        base, tuned = self.pair.base.card, self.pair.tuned.card
        return {
            "numerics": MAP_NUMERICS,
            "base_weights": base.weights_fingerprint,
            "tuned_weights": tuned.weights_fingerprint,
            "base_config": base.config_fingerprint,
            "tuned_config": tuned.config_fingerprint,
            "base_tokens": self.pair.token_fingerprint("base", FIT_SPLIT),
            "tuned_tokens": self.pair.token_fingerprint("tuned", FIT_SPLIT),
            "prompts": self.pair.prompts.split(FIT_SPLIT).fingerprint,
            "dtypes": [base.dtype, tuned.dtype],
            "layer": self.layer,
            "kind": self.kind,
            "scope": self.scope,
            "seed": self.seed,
            "k_positions": self.k_positions,
        }


def _recipes(
    activations: PairActivations, layers: Sequence[int], kind: MapKind, scope: MapScope, seed: int
) -> list[MapRecipe]:
    if kind not in MAP_KINDS:
        raise UserError(f"map kind {kind!r} does not exist: choose one of {', '.join(MAP_KINDS)}.")
    if scope not in MAP_SCOPES:
        raise UserError(f"map scope {scope!r} does not exist: choose 'head' or 'layer'.")
    pair, k_positions = activations.pair, activations.k_positions
    check_layers(layers, pair.n_layers)
    return [MapRecipe(pair, layer, kind, scope, seed, k_positions) for layer in layers]


def _fitted(recipes: Sequence[MapRecipe], activations: PairActivations) -> dict[int, LayerMap]:
    for side in SIDES:  # all of base before any of tuned: they may not fit into memory together
        activations.capture(side, FIT_SPLIT, [recipe.layer for recipe in recipes])
    return {recipe.layer: _fit(recipe, activations) for recipe in recipes}


class _Blocks(NamedTuple):
    weight: Float[Tensor, "block d_block d_block"]
    bias: Float[Tensor, "block d_block"]
    details: dict[str, Any]


def _fit(recipe: MapRecipe, activations: PairActivations) -> LayerMap:
    base, tuned = (activations.z(side, FIT_SPLIT, recipe.layer) for side in SIDES)
    x, y = rows_of(base), rows_of(tuned)
    groups = np.repeat(recipe.pair.prompts.split(FIT_SPLIT).groups, recipe.k_positions)
    blocks = _fit_blocks(recipe.kind, recipe.scope, x, y, groups)
    _warn_if_few(len(x), blocks.weight.shape[-1], recipe.layer)
    fitted = LayerMap(
        layer=recipe.layer,
        kind=recipe.kind,
        scope=recipe.scope,
        weight=blocks.weight,
        bias=blocks.bias,
        n_heads=recipe.pair.n_heads,
        ingredients=recipe.to_dict(),
        details={"train_rows": len(x), "blocks": blocks.details},
    )
    return replace(fitted, diagnostics=_held_out(fitted, x, y, groups, recipe.seed))


def rows_of(z: Float[Tensor, "prompt position head d_head"]) -> Float[Tensor, "row head d_head"]:
    """The rows that a map is fitted on, in float64: every patched position of every prompt."""
    return einops.rearrange(
        z, "prompt position head d_head -> (prompt position) head d_head"
    ).double()


def _fit_blocks(kind: MapKind, scope: MapScope, x: Tensor, y: Tensor, groups: Any) -> _Blocks:
    x_blocks, y_blocks = to_blocks(x, scope).numpy(), to_blocks(y, scope).numpy()
    fits = [
        fit_block(kind, x_blocks[:, block], y_blocks[:, block], groups)
        for block in range(x_blocks.shape[1])
    ]
    weight = torch.tensor(np.stack([fit.weight for fit in fits]), dtype=torch.float32)
    bias = torch.tensor(np.stack([fit.bias for fit in fits]), dtype=torch.float32)
    details = {str(block): fit.details for block, fit in enumerate(fits) if fit.details}
    return _Blocks(weight, bias, details)


def _held_out(
    fitted: LayerMap, x: Tensor, y: Tensor, groups: Any, seed: int
) -> tuple[HeadDiagnostics, ...]:
    n_groups = len(np.unique(groups))
    if n_groups < MIN_GROUPS:
        warnings.warn(
            f"the map of layer {fitted.layer} has no held-out diagnostics: its train prompts are "
            f"{n_groups} groups, and {MIN_GROUPS} are needed to hold some out.",
            stacklevel=5,
        )
        return ()
    split = GroupShuffleSplit(1, test_size=CALIBRATION_SHARE, random_state=seed)
    kept, held = next(split.split(x, groups=groups))
    unpaired = np.random.default_rng(seed).permutation(kept)

    def predict(targets: Any) -> Any:
        blocks = _fit_blocks(fitted.kind, fitted.scope, x[kept], y[targets], groups[kept])
        return replace(fitted, weight=blocks.weight, bias=blocks.bias)(x[held]).numpy()

    return diagnose(
        y[held].numpy(),
        fitted=predict(kept),
        mean=y[kept].mean(0).numpy(),
        identity=x[held].numpy(),
        shuffled=predict(unpaired),
    )


def _warn_if_few(rows: int, width: int, layer: int) -> None:
    if rows < 2 * width:
        warnings.warn(
            f"the map of layer {layer} is {width} wide and has only {rows} train rows: it may fit "
            "them without generalising; use more train prompts or maps per head, and read the "
            "held-out R².",
            stacklevel=5,
        )
