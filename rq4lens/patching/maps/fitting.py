"""Fitting the maps of a pair on its train prompts, and reusing what is already fitted."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import einops
import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor

from rq4lens.disk.files import set_aside
from rq4lens.disk.store import content_key
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
    load_map,
    save_map,
    to_blocks,
)

log = logging.getLogger(__name__)

MAP_NUMERICS = 1
"""Raised whenever the same ingredients would give other map weights than before."""

CALIBRATION_SHARE = 0.2
MIN_GROUPS = 5

CKA_TIE = 1e-6
"""CKA does not see rotations and scales, so kinds that only add these differ by rounding alone."""


def fit_maps(
    pair: ModelPair,
    layers: Sequence[int],
    kind: MapKind | None = None,
    *,
    scope: MapScope = "head",
    seed: int = 0,
    activations: PairActivations | None = None,
    directory: Path | None = None,
    fresh: bool = False,
) -> dict[int, LayerMap]:
    """Fit the maps from base z (source) to tuned z (target) on the train prompts.

    Each map is fitted on all train prompts. Its diagnostics come from a second fit that leaves a
    fifth of the train groups out and is judged on them.

    Args:
        pair: the pair.
        layers: the layers to map.
        kind: how to fit; None takes the already fitted map with the best calibration CKA (the best
            held-out R² among equals), and fits a scaled Procrustes map where there is none.
        scope: one map per head, or one over all heads of the layer jointly.
        seed: decides which train groups are held out for the diagnostics.
        activations: already captured activations of this pair.
        directory: where fitted maps are looked up and kept.
        fresh: do not use any map that is there; new ones replace them.

    Returns:
        The maps by layer.

    Raises:
        UserError: if the kind, scope or a layer does not exist.

    Warns:
        UserWarning: when there are fewer train rows than twice the map's width, or too few groups
            to hold some out.
    """
    _check_kind(kind, scope)
    check_layers(layers, pair.n_layers)
    activations = activations or PairActivations(pair)
    recipes = {
        layer: MapRecipe(pair, layer, kind or DEFAULT_KIND, scope, seed, activations.k_positions)
        for layer in layers
    }
    looked_up = None if fresh else directory
    kept = {layer: _best_kept(recipe, kind, looked_up) for layer, recipe in recipes.items()}
    for side in SIDES:  # all of base before any of tuned: they may not fit into memory together
        activations.capture(side, FIT_SPLIT, [layer for layer in recipes if kept[layer] is None])
    maps = {}
    for layer, recipe in recipes.items():
        maps[layer] = kept[layer] or _fit(recipe, activations)
        if directory is not None and kept[layer] is None:
            save_map(maps[layer], directory / recipe.file_name)
    return maps


@dataclass(frozen=True)
class MapRecipe:
    """Everything that decides a fitted map.

    Args:
        pair: the pair.
        layer: the layer.
        kind: how to fit.
        scope: one map per head, or one over all heads jointly.
        seed: decides which train groups are held out for the diagnostics.
        k_positions: how many positions of each prompt are rows of the fit.
    """

    pair: ModelPair
    layer: int
    kind: MapKind
    scope: MapScope
    seed: int
    k_positions: int

    @property
    def ingredients(self) -> dict[str, Any]:
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

    @property
    def file_name(self) -> str:
        """Its name says what the map is, its key what it was fitted on."""
        key = content_key(self.ingredients)[:16]
        return f"L{self.layer}_{self.kind}_{self.scope}_{key}.safetensors"


def _check_kind(kind: str | None, scope: str) -> None:
    if kind is not None and kind not in MAP_KINDS:
        raise UserError(f"map kind {kind!r} does not exist: choose one of {', '.join(MAP_KINDS)}.")
    if scope not in MAP_SCOPES:
        raise UserError(f"map scope {scope!r} does not exist: choose 'head' or 'layer'.")


def _best_kept(recipe: MapRecipe, kind: MapKind | None, directory: Path | None) -> LayerMap | None:
    """The best kept map among those that fit the recipe, of any kind unless one was asked for."""
    if directory is None:
        return None
    recipes = [replace(recipe, kind=each) for each in (MAP_KINDS if kind is None else (kind,))]
    kept = [found for each in recipes if (found := _load_kept(each, directory)) is not None]
    best = max((found.mean_cka or 0.0 for found in kept), default=0.0)
    tied = [found for found in kept if (found.mean_cka or 0.0) >= best - CKA_TIE]
    return max(tied, key=lambda found: found.mean_r2 or -math.inf, default=None)


def _load_kept(recipe: MapRecipe, directory: Path) -> LayerMap | None:
    path = directory / recipe.file_name
    if not path.exists():
        return None
    try:
        found = load_map(path)
    except UserError as problem:
        log.warning("set aside %s and fitting it again: %s", path.name, problem)
        for file in (path, path.with_suffix(".json")):
            set_aside(file)
        return None
    return found if found.ingredients == recipe.ingredients else None


@dataclass(frozen=True)
class FitData:
    """The rows that the map of one layer is fitted on, in float64.

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

    def unpaired(self, seed: int) -> FitData:
        """The same rows, each base row beside the tuned row of another prompt."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self.y)))
        return replace(self, y=self.y[order])


def refit(layer_map: LayerMap, data: FitData, kind: MapKind | None = None) -> LayerMap:
    """A map of the same scope on other rows or of another kind; it has no diagnostics."""
    kind = kind or layer_map.kind
    blocks = _fit_blocks(kind, layer_map.scope, data)
    return replace(
        layer_map, kind=kind, weight=blocks.weight, bias=blocks.bias, diagnostics=(), details={}
    )


class _Blocks(NamedTuple):
    weight: Float[Tensor, "block d_block d_block"]
    bias: Float[Tensor, "block d_block"]
    details: dict[str, Any]


def _fit(recipe: MapRecipe, activations: PairActivations) -> LayerMap:
    data = FitData.of(activations, recipe.layer)
    blocks = _fit_blocks(recipe.kind, recipe.scope, data)
    _warn_if_few(len(data.x), blocks.weight.shape[-1], recipe.layer)
    fitted = LayerMap(
        layer=recipe.layer,
        kind=recipe.kind,
        scope=recipe.scope,
        weight=blocks.weight,
        bias=blocks.bias,
        n_heads=recipe.pair.n_heads,
        ingredients=recipe.ingredients,
        details={"train_rows": len(data.x), "blocks": blocks.details},
    )
    return replace(fitted, diagnostics=_held_out(fitted, data, recipe.seed))


def _fit_blocks(kind: MapKind, scope: MapScope, data: FitData) -> _Blocks:
    x, y = (to_blocks(z, scope).numpy() for z in (data.x, data.y))
    fits = [fit_block(kind, x[:, block], y[:, block], data.groups) for block in range(x.shape[1])]
    weight = torch.tensor(np.stack([fit.weight for fit in fits]), dtype=torch.float32)
    bias = torch.tensor(np.stack([fit.bias for fit in fits]), dtype=torch.float32)
    details = {str(block): fit.details for block, fit in enumerate(fits) if fit.details}
    return _Blocks(weight, bias, details)


def _held_out(fitted: LayerMap, data: FitData, seed: int) -> tuple[HeadDiagnostics, ...]:
    x, y, groups = data.x, data.y, data.groups
    n_groups = len(np.unique(groups))
    if n_groups < MIN_GROUPS:
        warnings.warn(
            f"the map of layer {fitted.layer} has no held-out diagnostics: its train prompts are "
            f"{n_groups} groups, and {MIN_GROUPS} are needed to hold some out.",
            stacklevel=4,
        )
        return ()
    split = GroupShuffleSplit(1, test_size=CALIBRATION_SHARE, random_state=seed)
    kept, held = next(split.split(x, groups=groups))
    unpaired = np.random.default_rng(seed).permutation(kept)

    def predict(targets: Any) -> Any:
        rows = FitData(x[kept], y[targets], groups[kept])
        return refit(fitted, rows)(x[held]).numpy()

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
            stacklevel=4,
        )
