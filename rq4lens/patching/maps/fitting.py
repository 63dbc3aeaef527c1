"""Fitting the maps of a pair on its train prompts, judging them, and reusing stored ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import einops
import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Shaped
from numpy import ndarray
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor

from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.models.prompts.prompt_set import FIT_SPLIT
from rq4lens.patching.activations import PairActivations, check_layers
from rq4lens.patching.maps.kinds import fit_block
from rq4lens.patching.maps.map import (
    DEFAULT_KIND,
    MAP_KINDS,
    MAP_SCOPES,
    FitQuality,
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
    return maps_from(None, activations, layers, kind, scope=scope, seed=seed)


def maps_from(
    store: Store | None,
    activations: PairActivations,
    layers: Sequence[int],
    kind: MapKind = DEFAULT_KIND,
    *,
    scope: MapScope = "head",
    seed: int = 0,
) -> dict[int, LayerMap]:
    """What :func:`fit_maps` gives, from a store; maps that it lacks are fitted and stored."""
    if kind not in MAP_KINDS:
        raise UserError(f"map kind {kind!r} does not exist: choose one of {', '.join(MAP_KINDS)}.")
    if scope not in MAP_SCOPES:
        raise UserError(f"map scope {scope!r} does not exist: choose 'head' or 'layer'.")
    pair, k_positions = activations.pair, activations.k_positions
    check_layers(layers, pair.n_layers)
    maps: dict[int, LayerMap | None] = {}
    recipes = [MapRecipe(pair, layer, kind, scope, seed, k_positions) for layer in layers]
    for recipe in recipes:
        maps[recipe.layer] = None if store is None else get_map(store, recipe)
    missing = [recipe for recipe in recipes if maps[recipe.layer] is None]
    for side in SIDES:  # all of base before any of tuned: they may not fit into memory together
        activations.capture(side, FIT_SPLIT, [recipe.layer for recipe in missing])
    for recipe in missing:
        fitted = maps[recipe.layer] = _fit(recipe, activations)
        if store is not None:
            put_map(store, recipe, fitted)
    return {layer: layer_map for layer, layer_map in maps.items() if layer_map is not None}


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


@dataclass(frozen=True)
class FitData:
    """The rows that the map of one layer is fitted on: base and tuned activations in float64."""

    x: Float[Tensor, "row head d_head"]
    y: Float[Tensor, "row head d_head"]
    groups: Shaped[ndarray, "row"]

    @classmethod
    def of(cls, activations: PairActivations, layer: int) -> FitData:
        """The train rows of one layer: every patched position of every prompt."""
        groups = activations.pair.prompts.split(FIT_SPLIT).groups
        x, y = (
            einops.rearrange(
                activations.z(side, FIT_SPLIT, layer),
                "prompt position head d_head -> (prompt position) head d_head",
            ).double()
            for side in SIDES
        )
        return cls(x, y, np.repeat(groups, activations.k_positions))

    def some(self, rows: Bool[ndarray, "row"]) -> FitData:
        """Some of the rows."""
        kept = torch.from_numpy(rows)
        return FitData(self.x[kept], self.y[kept], self.groups[rows])

    def unpaired(self, seed: int) -> FitData:
        """The same rows, each base row beside the tuned row of another prompt."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self.y)))
        return replace(self, y=self.y[order])


def refit(layer_map: LayerMap, data: FitData, kind: MapKind | None = None) -> LayerMap:
    """A map of the same scope on other rows or of another kind; it has no diagnostics."""
    kind = kind or layer_map.kind
    weight, bias, _ = _fit_blocks(kind, layer_map.scope, data)
    return replace(layer_map, kind=kind, weight=weight, bias=bias, diagnostics=(), details={})


def _fit(recipe: MapRecipe, activations: PairActivations) -> LayerMap:
    data = FitData.of(activations, recipe.layer)
    weight, bias, details = _fit_blocks(recipe.kind, recipe.scope, data)
    rows, width = len(data.x), weight.shape[-1]
    if rows < 2 * width:
        warnings.warn(
            f"the map of layer {recipe.layer} is {width} wide and has only {rows} train rows: it "
            "may fit them without generalising; use more train prompts or maps per head, and read "
            "the held-out R².",
            stacklevel=4,
        )
    fitted = LayerMap(
        layer=recipe.layer,
        kind=recipe.kind,
        scope=recipe.scope,
        weight=weight,
        bias=bias,
        n_heads=recipe.pair.n_heads,
        ingredients=recipe.to_dict(),
        details={"train_rows": rows, "blocks": details},
    )
    return replace(fitted, diagnostics=_held_out(fitted, data, recipe.seed))


def _fit_blocks(
    kind: MapKind, scope: MapScope, data: FitData
) -> tuple[Float[Tensor, "block d_block d_block"], Float[Tensor, "block d_block"], dict[str, Any]]:
    """Weights, biases, and what the fits chose by themselves."""
    x, y = (to_blocks(z, scope).numpy() for z in (data.x, data.y))
    fits = [fit_block(kind, x[:, block], y[:, block], data.groups) for block in range(x.shape[1])]
    weight = torch.tensor(np.stack([fit.weight for fit in fits]), dtype=torch.float32)
    bias = torch.tensor(np.stack([fit.bias for fit in fits]), dtype=torch.float32)
    details = {str(block): fit.details for block, fit in enumerate(fits) if fit.details}
    return weight, bias, details


def _held_out(fitted: LayerMap, data: FitData, seed: int) -> tuple[HeadDiagnostics, ...]:
    """How well predictors of the tuned activations do on held-out prompts, head by head."""
    x, y, groups = data.x, data.y, data.groups
    n_groups = len(np.unique(groups))
    if n_groups < MIN_GROUPS:
        warnings.warn(
            f"the map of layer {fitted.layer} has no held-out diagnostics: its train prompts are "
            f"{n_groups} groups, and {MIN_GROUPS} are needed to hold some out.",
            stacklevel=5,
        )
        return ()
    split = GroupShuffleSplit(1, test_size=0.2, random_state=seed)
    kept, held = next(split.split(x, groups=groups))
    unpaired = np.random.default_rng(seed).permutation(kept)

    def predict(targets: Any) -> Tensor:
        rows = FitData(x[kept], y[targets], groups[kept])
        return refit(fitted, rows)(x[held])

    constant = y[kept].mean(0).expand_as(y[held])
    predictors = [predict(kept), constant, x[held], predict(unpaired)]
    target, *predicted = (each.numpy() for each in (y[held], *predictors))
    return tuple(
        HeadDiagnostics(head, *(fit_quality(each[:, head], target[:, head]) for each in predicted))
        for head in range(target.shape[1])
    )


Rows = Float64[ndarray, "row d_head"]


def fit_quality(predicted: Rows, target: Rows) -> FitQuality:
    """R², mean cosine and linear CKA of predictions; None where a quantity is undefined."""
    return FitQuality(r2(predicted, target), mean_cosine(predicted, target), cka(predicted, target))


def r2(predicted: Rows, target: Rows) -> float | None:
    """``1 - |target - predicted|² / |target - mean(target)|²``, at most 1."""
    spread = ((target - target.mean(axis=0)) ** 2).sum()
    return float(1 - ((target - predicted) ** 2).sum() / spread) if spread > 0 else None


def mean_cosine(predicted: Rows, target: Rows) -> float | None:
    """Mean over rows of the cosine between prediction and target."""
    norms = np.linalg.norm(predicted, axis=1) * np.linalg.norm(target, axis=1)
    return float(((predicted * target).sum(axis=1) / norms).mean()) if norms.all() else None


def cka(predicted: Rows, target: Rows) -> float | None:
    """Linear centred kernel alignment, in [0, 1].

    Source: Kornblith et al., "Similarity of neural network representations revisited" (2019),
    the linear case of equation 4.
    """
    x, y = predicted - predicted.mean(axis=0), target - target.mean(axis=0)
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    # A constant predictor has no spread up to rounding; its alignment is not defined.
    if np.allclose(x, 0) or np.allclose(y, 0):
        return None
    return float(np.linalg.norm(x.T @ y) ** 2 / scale)
