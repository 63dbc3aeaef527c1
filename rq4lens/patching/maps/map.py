"""Maps from base to tuned head activations: frozen, callable, stored as safetensors and JSON.

A map's **source** is the base model's z, its **target** the tuned model's z. It is affine,
``ẑ = z W + b``, either one per head or one over all heads of the layer jointly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import einops
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor

from rq4lens.config import MapKind, MapScope, Patching
from rq4lens.disk.files import short_reason
from rq4lens.disk.store import Ingredients, Store, content_key, read_record, read_tensors
from rq4lens.errors import UserError
from rq4lens.results import Shown

MAP_KINDS: tuple[MapKind, ...] = get_args(MapKind)
MAP_SCOPES: tuple[MapScope, ...] = get_args(MapScope)
DEFAULT_KIND = Patching().map_kind


@dataclass(frozen=True)
class FitQuality:
    """How well a predictor meets the tuned activations of one head on held-out prompts.

    R² counts from the held-out mean; the cosine is the mean over prompts, and CKA linear. Each is
    None where it is undefined.
    """

    r2: float | None
    cosine: float | None
    cka: float | None


@dataclass(frozen=True)
class HeadDiagnostics:
    """Held-out fit of one head, beside what simpler predictors reach.

    Args:
        head: the head.
        fitted: the map itself.
        mean: always the train mean of the target.
        identity: the base activation itself.
        shuffled: a map of the same kind fitted with the prompts of the two models unpaired.
    """

    head: int
    fitted: FitQuality
    mean: FitQuality
    identity: FitQuality
    shuffled: FitQuality


DIAGNOSTICS = TypeAdapter(tuple[HeadDiagnostics, ...])


@dataclass(frozen=True)
class LayerMap(Shown):
    """The fitted map of one layer, from base z (source) to tuned z (target).

    Args:
        layer: the layer.
        kind: how it was fitted.
        scope: one map per head, or one over all heads jointly.
        weight: ``W``; ``block`` is the head for scope ``"head"`` and 1 for scope ``"layer"``.
        bias: ``b``.
        n_heads: heads of the layer.
        ingredients: everything the fit depends on.
        diagnostics: held-out fit per head; empty when none was measured.
        details: what the fit chose by itself, such as the ridge strength.
    """

    layer: int
    kind: MapKind
    scope: MapScope
    weight: Float[Tensor, "block d_block d_block"]
    bias: Float[Tensor, "block d_block"]
    n_heads: int
    ingredients: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: tuple[HeadDiagnostics, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<LayerMap of layer {self.layer}, {self.kind} per {self.scope}>"

    def to_dataframe(self) -> pd.DataFrame:
        """A row a head: its held-out fit, beside what simpler predictors reach."""
        return pd.json_normalize([asdict(each) for each in self.diagnostics], sep="_")

    def __call__(self, z: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows head d_head"]:
        """Map base activations into the tuned model's space.

        Args:
            z: base activations of every head.

        Returns:
            The predicted tuned activations, in float32 or better.

        Raises:
            UserError: if the activations have another number of heads or another width.
        """
        blocks = to_blocks(z.to(torch.promote_types(z.dtype, torch.float32)), self.scope)
        if blocks.shape[-2:] != self.bias.shape or z.shape[-2] != self.n_heads:
            raise UserError(
                f"the map of layer {self.layer} takes {self.n_heads} heads of width "
                f"{self.weight.numel() // self.weight.shape[-1] // self.n_heads}, but the "
                f"activations are {tuple(z.shape[-2:])} [head d_head]; use a map of this model."
            )
        weight, bias = self.weight.to(blocks), self.bias.to(blocks)
        mapped = einops.einsum(blocks, weight, "... block i, block i j -> ... block j") + bias
        return from_blocks(mapped, self.n_heads)

    @property
    def mean_cka(self) -> float | None:
        """Mean calibration CKA over heads; None when no head has one."""
        return _mean([row.fitted.cka for row in self.diagnostics])

    @property
    def mean_r2(self) -> float | None:
        """Mean held-out R² over heads; None when no head has one."""
        return _mean([row.fitted.r2 for row in self.diagnostics])

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the bytes of ``W`` and ``b``."""
        digest = hashlib.sha256()
        for tensor in (self.weight, self.bias):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hash of what the map was fitted on and of what came out."""
        return content_key({"ingredients": self.ingredients, "weights": self.weights_sha256})

    def to_dict(self) -> dict[str, Any]:
        """Everything but tensors and ingredients, as plain JSON values."""
        return {
            "layer": self.layer,
            "kind": self.kind,
            "scope": self.scope,
            "n_heads": self.n_heads,
            "source": "base z",
            "target": "tuned z",
            "details": dict(self.details),
            "diagnostics": [asdict(row) for row in self.diagnostics],
        }


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def to_blocks(
    z: Float[Tensor, "*rows head d_head"], scope: MapScope
) -> Float[Tensor, "*rows block d_block"]:
    """Heads as the map's blocks: each by itself, or all in one."""
    if scope == "head":
        return z
    return einops.rearrange(z, "... head d_head -> ... 1 (head d_head)")


def from_blocks(
    blocks: Float[Tensor, "*rows block d_block"], n_heads: int
) -> Float[Tensor, "*rows head d_head"]:
    """The inverse of :func:`to_blocks`."""
    return einops.rearrange(
        blocks,
        "... block (inner d_head) -> ... (block inner) d_head",
        inner=n_heads // blocks.shape[-2],
    )


def put_map(store: Store, ingredients: Ingredients, layer_map: LayerMap) -> Path:
    """Store a map."""
    tensors = {"weight": layer_map.weight, "bias": layer_map.bias}
    return store.put_tensors(ingredients, tensors, layer_map.to_dict())


def get_map(store: Store, ingredients: Ingredients) -> LayerMap | None:
    """The stored map, if there is one that can be believed."""
    tensors = store.get_tensors(ingredients)
    payload = None if tensors is None else store.get(ingredients)
    if tensors is None or payload is None:
        return None
    path = store.path(ingredients)
    try:
        return _layer_map(path, ingredients.to_dict(), payload, tensors)
    except UserError as problem:
        store.set_aside(path, str(problem))
        return None


def load_map(path: Path) -> LayerMap:
    """Read a map back and check it."""
    try:
        record = read_record(path.with_suffix(".json"))
        tensors = read_tensors(path, record)
    except (OSError, ValueError, RecursionError) as problem:
        raise _unreadable(path, problem) from problem
    return _layer_map(path, record.ingredients, record.payload, tensors)


def _layer_map(
    path: Path, ingredients: Mapping[str, Any], payload: Any, tensors: Mapping[str, Tensor]
) -> LayerMap:
    try:
        stored = {name: payload[name] for name in ("layer", "kind", "scope", "n_heads", "details")}
        diagnostics = DIAGNOSTICS.validate_python(payload["diagnostics"])
        stored |= {"weight": tensors["weight"], "bias": tensors["bias"]}
        layer_map = LayerMap(**stored, ingredients=ingredients, diagnostics=diagnostics)
    except Exception as problem:  # every way in which a file can be damaged ends in one sentence
        raise _unreadable(path, problem) from problem
    _check_tensors(layer_map, path)
    return layer_map


def _unreadable(path: Path, problem: Exception) -> UserError:
    return UserError(
        f"map file {str(path)!r} cannot be read ({type(problem).__name__}: "
        f"{short_reason(problem)}): delete it, and the run fits it again."
    )


def _check_tensors(layer_map: LayerMap, path: Path) -> None:
    weight, bias, n_heads = layer_map.weight, layer_map.bias, layer_map.n_heads
    blocks = n_heads if layer_map.scope == "head" else 1
    square = weight.ndim == 3 and weight.shape[1] == weight.shape[2]
    fits = square and weight.shape[0] == blocks and bias.shape == weight.shape[:2]
    floats = weight.dtype == bias.dtype == torch.float32
    if not fits or not floats or layer_map.kind not in MAP_KINDS:
        raise UserError(
            f"map file {str(path)!r} holds {weight.dtype} weight {tuple(weight.shape)} and "
            f"{bias.dtype} bias {tuple(bias.shape)} for {n_heads} heads: not a map; delete it."
        )
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise UserError(f"map file {str(path)!r} holds numbers that are not finite: delete it.")
