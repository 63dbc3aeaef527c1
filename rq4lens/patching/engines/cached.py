"""The fallback for models the suffix engine does not cover: TransformerLens' own key-value cache.

Rows are ``prompt x condition``, each with its own copy of its prompt's keys and values, and the
last positions are run again from the patched layer up through ``past_kv_cache``,
``start_at_layer`` and ``hook_z``. No part of a block is repeated here, so whatever TransformerLens
computes in a cached forward pass is what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import (
    HookedTransformer,
    TransformerLensKeyValueCache,
    TransformerLensKeyValueCacheEntry,
)
from transformer_lens.hook_points import HookPoint

from rq4lens.models.load.devices import Placement
from rq4lens.models.prompts.prompt_set import PaddingSide, TokenBatch
from rq4lens.patching.activations import device_of, z_site
from rq4lens.patching.engines.kept import SourceTensors
from rq4lens.patching.engines.row_engine import RowEngine
from rq4lens.patching.engines.rows import RowGroup, Rows

CacheEntry = TransformerLensKeyValueCacheEntry


@dataclass(frozen=True)
class CachedBatch:
    """A batch of prompts after its clean pass, padded on the left.

    Args:
        rows: which prompts of the engine these are.
        attention_mask: ones for tokens, zeros for padding.
        cache: keys and values of the positions before the patched ones, by layer.
        resid: the residual stream entering each layer, at the patched positions.
        z_by_layer: the head activations there.
    """

    rows: Int[Tensor, "prompt"]
    attention_mask: Int[Tensor, "prompt pos"]
    cache: TransformerLensKeyValueCache
    resid: dict[int, Float[Tensor, "prompt position d_model"]]
    z_by_layer: dict[int, Float[Tensor, "prompt position head d_head"]]

    @property
    def entering(self) -> None:
        """Not kept: padded on the left, it would not do for a pass without a mask."""

    @property
    def n_bytes(self) -> int:
        """Memory that the keys and values take."""
        return sum(e.past_keys.nbytes + e.past_values.nbytes for e in self.cache.entries)

    def z(self, layer: int) -> Float[Tensor, "prompt position head d_head"]:
        """Clean activations of a layer."""
        return self.z_by_layer[layer]

    def to(self, placement: Placement) -> CachedBatch:
        """The batch on another device; this engine does not serve models on several."""
        device = placement.exit
        return CachedBatch(
            self.rows,
            self.attention_mask.to(device),
            _each_entry(self.cache, lambda tensor: tensor.to(device)),
            {layer: tensor.to(device) for layer, tensor in self.resid.items()},
            {layer: tensor.to(device) for layer, tensor in self.z_by_layer.items()},
        )


class CachedEngine(RowEngine):
    """Measures interventions through TransformerLens' key-value cache; exact, slower than suffix.

    For the arguments see :class:`RowEngine`.
    """

    name = "cached"
    padding_side: PaddingSide = "left"
    rows_copy_keys = True

    def _clean_pass(self, batch: TokenBatch, first_layer: int) -> list[CachedBatch]:
        device, n_last = device_of(self.model), self.k_positions
        tokens, mask = batch.tokens.to(device), batch.attention_mask.to(device)
        cache = TransformerLensKeyValueCache.init_cache(self.model.cfg, device, len(tokens))
        if tokens.shape[1] > n_last:
            earlier = slice(-n_last)
            _forward(self.model, tokens[:, earlier], mask[:, earlier], cache)
        cache.freeze()
        layers = range(first_layer, self.model.cfg.n_layers)
        read: dict[str, Tensor] = {}
        names = [name for layer in layers for name in (_resid_site(layer), z_site(layer))]
        with self.model.hooks(fwd_hooks=[(name, _reader(read)) for name in names]):
            _forward(self.model, tokens[:, -n_last:], mask[:, -n_last:], cache)
        resid = {layer: read[_resid_site(layer)] for layer in layers}
        z = {layer: read[z_site(layer)] for layer in layers}
        return [CachedBatch(batch.rows, mask, cache, resid, z)]

    def _group_logits(
        self, kept: CachedBatch, prompts: slice, rows: Rows, sources: SourceTensors
    ) -> Iterator[tuple[RowGroup, Float[Tensor, "prompt row vocab"]]]:
        for group in rows.groups:
            yield group, self._run_again(kept, prompts, rows.only(group), group.layer, sources)

    def _run_again(
        self, kept: CachedBatch, prompts: slice, rows: Rows, layer: int, sources: SourceTensors
    ) -> Float[Tensor, "prompt row vocab"]:
        """Run the last positions from a layer up, once per row."""
        n_rows = len(rows.interventions)

        def per_row(tensor: Tensor) -> Tensor:
            return repeat(tensor[prompts], "prompt ... -> (prompt row) ...", row=n_rows)

        def blending(patched_layer: int) -> Callable[[Tensor, HookPoint], Tensor]:
            def hook(z: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001 - passed by the library
                by_row = rearrange(z.clone(), "(prompt row) ... -> prompt row ...", row=n_rows)
                rows.blend_into(by_row, patched_layer, sources)
                return by_row.flatten(0, 1)

            return hook

        patched = sorted({patched_layer for patched_layer, _ in rows.patches})
        with self.model.hooks(fwd_hooks=[(z_site(at), blending(at)) for at in patched]):
            logits = self.model(
                per_row(kept.resid[layer]),
                start_at_layer=layer,
                attention_mask=per_row(kept.attention_mask),
                past_kv_cache=_each_entry(kept.cache, per_row, from_layer=layer),
                padding_side="left",
            )
        return rearrange(logits[:, -1], "(prompt row) vocab -> prompt row vocab", row=n_rows)


def _resid_site(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_pre"


def _reader(into: dict[str, Tensor]) -> Any:
    def read(value: Tensor, hook: HookPoint) -> None:
        assert hook.name is not None
        into[hook.name] = value

    return read


def _forward(
    model: HookedTransformer, tokens: Tensor, mask: Tensor, cache: TransformerLensKeyValueCache
) -> None:
    model(tokens, attention_mask=mask, past_kv_cache=cache, padding_side="left", return_type=None)


def _each_entry(
    cache: TransformerLensKeyValueCache,
    change: Callable[[Tensor], Tensor],
    from_layer: int = 0,
) -> TransformerLensKeyValueCache:
    """A frozen cache whose keys and values are changed from a layer up."""
    entries = [
        CacheEntry(change(entry.past_keys), change(entry.past_values), frozen=True)
        if layer >= from_layer
        else entry
        for layer, entry in enumerate(cache.entries)
    ]
    return TransformerLensKeyValueCache(entries, cache.previous_attention_mask, frozen=True)


def not_covered(model: Any) -> str | None:
    """Why the cached engine does not cover a model, or None if it does."""
    if not isinstance(model, HookedTransformer):
        return f"it is a {type(model).__name__}, not a HookedTransformer"
    cfg = model.cfg
    reasons = {
        f"its attention is {cfg.attention_dir}": cfg.attention_dir != "causal",
        "it adds position embeddings inside the blocks": (
            cfg.positional_embedding_type == "shortformer"
        ),
        "its rotary base depends on the length of the batch": cfg.use_dynamic_ntk_rope,
        "its query scaling counts padding": cfg.use_logn_attn,
        "it is spread over several devices": len(Placement.of(model).devices) > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
