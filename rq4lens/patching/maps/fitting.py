"""Fitting the maps of a pair on its train prompts, judging them, and reusing stored ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import einops
import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Shaped
from numpy import ndarray
from torch import Tensor

from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.models.load.fingerprint import arithmetic_libraries
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.models.prompts.prompt_set import FIT_SPLIT
from rq4lens.patching.activations import PairActivations, check_layers
from rq4lens.patching.maps.kinds import Fit, FitRows, fit_all
from rq4lens.patching.maps.map import (
    DEFAULT_KIND,
    MAP_KINDS,
    MAP_SCOPES,
    FitQuality,
    HeadDiagnostics,
    LayerMap,
    MapKind,
    MapScope,
    from_blocks,
    get_map,
    put_map,
    to_blocks,
)
from rq4lens.patching.passes import device_of

MAP_NUMERICS = 2
"""Raised whenever the same ingredients would give other map weights than before."""

MIN_GROUPS = 5
HELD_OUT = 0.2
"""Share of the train groups that judges the maps."""

AT_ONCE = 8
"""Subsets of rows, or layers, that are held at once."""


def fit_maps(
    pair: ModelPair,
    layers: int | Sequence[int],
    kind: MapKind = DEFAULT_KIND,
    *,
    scope: MapScope = "head",
    seed: int = 0,
    activations: PairActivations | None = None,
) -> dict[int, LayerMap]:
    """Fit the maps from base z (source) to tuned z (target) on the train prompts.

    Each map is fitted on all train prompts. Its diagnostics come from a second fit that leaves a
    fifth of the train groups out and is judged on them.

    >>> sorted(rq.fit_maps(pair, layers=[0, 1]))
    [0, 1]

    Args:
        pair: the pair.
        layers: the layers to map, or one.
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
    layers: int | Sequence[int],
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
    layers = check_layers(layers, activations.pair.n_layers)
    recipes = [MapRecipe(activations, layer, kind, scope, seed) for layer in layers]
    maps = {each.layer: None if store is None else get_map(store, each) for each in recipes}
    missing = [recipe for recipe in recipes if maps[recipe.layer] is None]
    for side in SIDES:  # all of base before any of tuned: they may not fit into memory together
        activations.capture(side, FIT_SPLIT, [recipe.layer for recipe in missing])
    for start in range(0, len(missing), AT_ONCE):
        some = [_Fitting.of(recipe) for recipe in missing[start : start + AT_ONCE]]
        fits = iter(fit_all(kind, [sample for each in some for sample in each.samples]))
        for each in some:
            fitted = each.fitted([next(fits) for _ in each.samples])
            maps[fitted.layer] = fitted
            if store is not None:
                put_map(store, each.recipe, fitted)
    return {layer: layer_map for layer, layer_map in maps.items() if layer_map is not None}


@dataclass(frozen=True)
class MapRecipe:
    """Everything that decides a fitted map: what a store addresses it by."""

    activations: PairActivations
    layer: int
    kind: MapKind
    scope: MapScope
    seed: int

    @property
    def pair(self) -> ModelPair:
        """The pair."""
        return self.activations.pair

    @property
    def label(self) -> str:
        """Layer, kind and scope."""
        return f"L{self.layer}_{self.kind}_{self.scope}"

    def to_dict(self) -> dict[str, Any]:
        """Everything the fitted map depends on, as plain JSON values."""
        cards = {side: self.pair.member(side).card for side in SIDES}
        of_sides: dict[str, Any] = {}
        for side, card in cards.items():
            of_sides |= {
                f"{side}_weights": card.weights_fingerprint,
                f"{side}_config": card.config_fingerprint,
                f"{side}_tokens": self.activations.read(side, FIT_SPLIT).fingerprint,
            }
        return of_sides | {
            "numerics": MAP_NUMERICS,
            "libraries": arithmetic_libraries(),
            "prompts": self.pair.prompts.split(FIT_SPLIT).fingerprint,
            "dtypes": [card.dtype for card in cards.values()],
            "layer": self.layer,
            "kind": self.kind,
            "scope": self.scope,
            "seed": self.seed,
            "k_positions": self.activations.k_positions,
        }


@dataclass(frozen=True)
class FitData:
    """The rows that a map is fitted on, from source ``x`` to target ``y``, in float64."""

    x: Float[Tensor, "row head d_head"]
    y: Float[Tensor, "row head d_head"]
    groups: Shaped[ndarray, "row"]
    device: torch.device | str = "cpu"
    """Where fits are computed."""

    @classmethod
    def of(cls, activations: PairActivations, layer: int) -> FitData:
        """The train rows of one layer: every patched token of every prompt."""
        groups = np.array(activations.pair.prompts.split(FIT_SPLIT).groups)
        there = activations.there(FIT_SPLIT)
        x, y = (activations.z(side, FIT_SPLIT, layer)[there].double() for side in SIDES)
        of_rows = groups[activations.prompt_of_rows(FIT_SPLIT)]
        return cls(x, y, of_rows, _device_of(activations.pair))

    def unpaired(self, seed: int) -> FitData:
        """The same rows, each base row beside the tuned row of another prompt."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self.y)))
        return replace(self, y=self.y[order])

    def rows(self, scope: MapScope) -> FitRows:
        """The rows by block, where fits are computed."""
        x, y = (
            einops.rearrange(to_blocks(z, scope), "row block d -> block row d").to(self.device)
            for z in (self.x, self.y)
        )
        return FitRows(x, y, self.groups)


def _device_of(pair: ModelPair) -> torch.device:
    """The device of a loaded model, if it computes in float64."""
    members = (pair.member(side) for side in reversed(SIDES))
    found = next((device_of(each.model) for each in members if each.is_loaded), None)
    return found if found is not None and found.type == "cuda" else torch.device("cpu")


def refit(layer_map: LayerMap, data: FitData, kind: MapKind | None = None) -> LayerMap:
    """A map of the same scope on other rows or of another kind; it has no diagnostics."""
    kind = kind or layer_map.kind
    (fit,) = fit_all(kind, [data.rows(layer_map.scope)])
    weight, bias = _tensors(fit)
    return replace(layer_map, kind=kind, weight=weight, bias=bias, diagnostics=(), details={})


def fit_subsets(
    kind: MapKind,
    data: FitData,
    subsets: Sequence[Int[ndarray, "_"]],
    scope: MapScope = "head",
) -> list[Fit]:
    """Fit maps on subsets of rows, such as all prompts but those of one content.

    A subset that lacks few rows takes its sums from those of all rows, so that leaving out each
    content in turn reads every row twice, however many contents there are. What ``x`` and ``y``
    hold need not be the same heads: each place of the second axis is a problem of its own.
    """
    rows, found = data.rows(scope), []
    for start in range(0, len(subsets), AT_ONCE):
        found += fit_all(kind, [rows.part(kept) for kept in subsets[start : start + AT_ONCE]])
    return found


@dataclass(frozen=True)
class _Fitting:
    """What the map of one layer is fitted on, and what judges it."""

    recipe: MapRecipe
    data: FitData
    split: Split | None
    samples: Sequence[FitRows]

    @classmethod
    def of(cls, recipe: MapRecipe) -> _Fitting:
        """All rows, and those of the calibration beside them."""
        data = FitData.of(recipe.activations, recipe.layer)
        rows = data.rows(recipe.scope)
        n_rows, width = rows.x.shape[1:]
        if n_rows < 2 * width:
            warnings.warn(
                f"the map of layer {recipe.layer} is {width} wide and has only {n_rows} train "
                "rows: it may fit them without generalising; use more train prompts or maps per "
                "head, and read the held-out R².",
                stacklevel=5,
            )
        n_groups = len(np.unique(data.groups))
        if n_groups < MIN_GROUPS:
            warnings.warn(
                f"the map of layer {recipe.layer} has no held-out diagnostics: its train prompts "
                f"are {n_groups} groups, and {MIN_GROUPS} are needed to hold some out.",
                stacklevel=5,
            )
            return cls(recipe, data, None, [rows])
        split = group_split(data.groups, recipe.seed)
        kept = split.kept
        # Judged beside a map of the same kind of which the prompts are unpaired.
        unpaired = rows.y[:, np.random.default_rng(recipe.seed).permutation(kept)]
        judged = [rows.part(kept), FitRows(rows.x[:, kept], unpaired, rows.groups[kept])]
        return cls(recipe, data, split, [rows, *judged])

    def fitted(self, fits: Sequence[Fit]) -> LayerMap:
        """The map from the fits of the samples."""
        fit, *judged = fits
        weight, bias = _tensors(fit)
        recipe, split = self.recipe, self.split
        chosen = enumerate(zip(*fit.details.values(), strict=True))
        by_block = {str(block): dict(zip(fit.details, row, strict=True)) for block, row in chosen}
        return LayerMap(
            layer=recipe.layer,
            kind=recipe.kind,
            scope=recipe.scope,
            weight=weight,
            bias=bias,
            n_heads=recipe.pair.n_heads,
            ingredients=recipe.to_dict(),
            diagnostics=() if split is None else _judge(judged, self.data, split, recipe.scope),
            details={"train_rows": self.samples[0].x.shape[1], "blocks": by_block},
        )


def _tensors(fit: Fit) -> tuple[Tensor, Tensor]:
    """Weights and biases as a map holds them."""
    return fit.weight.to("cpu", torch.float32), fit.bias.to("cpu", torch.float32)


class Split(NamedTuple):
    """Indices of rows that fit the judged maps, and of those that judge them."""

    kept: Int[ndarray, "_"]
    held: Int[ndarray, "_"]


def group_split(groups: Shaped[ndarray, "row"], seed: int) -> Split:
    """Hold a fifth of the groups out, as ``GroupShuffleSplit`` of scikit-learn does."""
    names, group_of = np.unique(groups, return_inverse=True)
    order = np.random.RandomState(seed).permutation(len(names))
    held = np.isin(group_of, order[: math.ceil(HELD_OUT * len(names))])
    return Split(np.flatnonzero(~held), np.flatnonzero(held))


def _judge(
    fits: Sequence[Fit], data: FitData, split: Split, scope: MapScope
) -> tuple[HeadDiagnostics, ...]:
    """How well predictors of the tuned activations do on held-out prompts, head by head."""
    x, y = (z[split.held].to(data.device) for z in (data.x, data.y))
    fitted, shuffled = (from_blocks(fit(to_blocks(x, scope)), x.shape[1]) for fit in fits)
    constant = data.y[split.kept].mean(0).to(y).expand_as(y)
    by_predictor = [fit_qualities(each, y) for each in (fitted, constant, x, shuffled)]
    return tuple(
        HeadDiagnostics(head, *row) for head, row in enumerate(zip(*by_predictor, strict=True))
    )


HeadRows = Float64[Tensor, "row head d_head"]
PerHead = Float64[Tensor, "head"]


def fit_qualities(predicted: HeadRows, target: HeadRows) -> list[FitQuality]:
    """R², mean cosine and linear CKA of each head; None where a quantity is undefined."""
    measures = (each(predicted, target).tolist() for each in (r2, mean_cosine, cka))
    return [
        FitQuality(*(None if math.isnan(value) else value for value in row))
        for row in zip(*measures, strict=True)
    ]


def r2(predicted: HeadRows, target: HeadRows) -> PerHead:
    """``1 - |target - predicted|² / |target - mean(target)|²``, at most 1; NaN where undefined."""
    spread, left = (z.square().sum((0, 2)) for z in (_around_mean(target), target - predicted))
    return torch.where(spread > 0, 1 - left / spread, torch.nan)


def mean_cosine(predicted: HeadRows, target: HeadRows) -> PerHead:
    """Mean over rows of the cosine between prediction and target; NaN where one is zero."""
    return ((predicted * target).sum(2) / (predicted.norm(dim=2) * target.norm(dim=2))).mean(0)


def cka(predicted: HeadRows, target: HeadRows) -> PerHead:
    """Linear centred kernel alignment, in [0, 1]; NaN where one side is constant.

    Source: Kornblith et al., "Similarity of neural network representations revisited" (2019),
    the linear case of equation 4.
    """
    x, y = _around_mean(predicted), _around_mean(target)
    scale = (_kernel(x, x) * _kernel(y, y)).sqrt()
    # A constant predictor has no spread up to rounding; its alignment is not defined.
    constant = torch.stack([(z.abs() <= 1e-8).all(2).all(0) for z in (x, y)]).any(0)
    return torch.where(constant, torch.nan, _kernel(x, y) / scale)


def _around_mean(z: HeadRows) -> HeadRows:
    return z - z.mean(0)


def _kernel(x: HeadRows, y: HeadRows) -> PerHead:
    """``|xᵀ y|²``."""
    return torch.einsum("rhi,rhj->hij", x, y).square().sum((1, 2))
