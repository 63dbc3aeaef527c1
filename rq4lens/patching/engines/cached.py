"""The fallback for models the suffix engine does not cover: TransformerLens' own key-value cache.

Rows are ``prompt x condition``, each with its own copy of its prompt's keys and values, and the
last positions are run again from the patched layer up through ``past_kv_cache``,
``start_at_layer`` and ``hook_z``. No part of a block is repeated here, so whatever TransformerLens
computes in a cached forward pass is what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
from rq4lens.patching.engines.clean_pass import CleanBatch, CleanLayer
from rq4lens.patching.engines.hooks import added
from rq4lens.patching.engines.row_engine import RowEngine, RowGroup, Rows, SourceTensors


@dataclass(frozen=True)
class CachedKeys:
    """Keys and values of the positions before the patched ones, of prompts padded on the left."""

    keys: Float[Tensor, "prompt key kv_head d_head"]
    values: Float[Tensor, "prompt key kv_head d_head"]
    attention_mask: Int[Tensor, "prompt pos"]


class CachedEngine(RowEngine):
    """Measures interventions through TransformerLens' key-value cache; exact, but slow."""

    name = "cached"
    padding_side: PaddingSide = "left"
    rows_copy_keys = True

    @staticmethod
    def _limits(model: HookedTransformer) -> dict[str, bool]:
        return {
            "it adds position embeddings inside the blocks": (
                model.cfg.positional_embedding_type == "shortformer"
            ),
            "its query scaling counts padding": model.cfg.use_logn_attn,
            "it is spread over several devices": len(Placement.of(model).devices) > 1,
        }

    def _clean_pass(self, batch: TokenBatch, first_layer: int) -> list[CleanBatch]:
        device, n_last = device_of(self.model), self.settings.k_positions
        tokens, mask = batch.tokens.to(device), batch.attention_mask.to(device)
        cache = TransformerLensKeyValueCache.init_cache(self.model.cfg, device, len(tokens))
        earlier, last = slice(-n_last), slice(-n_last, None)
        if tokens.shape[1] > n_last:
            self._forward(tokens[:, earlier], mask[:, earlier], cache)
        cache.freeze()
        layers = range(first_layer, self.model.cfg.n_layers)
        read: dict[str, Tensor] = {}

        def note(value: Tensor, hook: HookPoint) -> None:
            read[str(hook.name)] = value

        names = [name for layer in layers for name in (_resid_site(layer), z_site(layer))]
        names += [_resid_site(0), *(z_site(layer) for layer in range(first_layer))]
        with self.model.hooks(fwd_hooks=[(name, note) for name in names]):
            self._forward(tokens[:, last], mask[:, last], cache)
        made = {
            layer: CleanLayer(
                read[_resid_site(layer)],
                read[z_site(layer)],
                CachedKeys(cache[layer].past_keys, cache[layer].past_values, mask),
            )
            for layer in layers
        }
        below = {layer: read[z_site(layer)] for layer in range(first_layer)}
        return [CleanBatch(batch.rows, made, below, read[_resid_site(0)])]

    def _forward(self, tokens: Tensor, mask: Tensor, cache: TransformerLensKeyValueCache) -> None:
        self.model(
            tokens,
            attention_mask=mask,
            past_kv_cache=cache,
            padding_side="left",
            return_type=None,
        )

    def _group_logits(
        self, clean: CleanBatch, prompts: slice, rows: Rows, sources: SourceTensors
    ) -> Iterator[tuple[RowGroup, Float[Tensor, "prompt row vocab"]]]:
        for group in rows.groups:
            yield group, self._run_again(clean, prompts, rows.only(group), group.layer, sources)

    def _run_again(
        self, clean: CleanBatch, prompts: slice, rows: Rows, layer: int, sources: SourceTensors
    ) -> Float[Tensor, "prompt row vocab"]:
        """Run the last positions from a layer up, once per row."""
        n_rows, at = len(rows.interventions), clean.layers[layer]

        def per_row(tensor: Tensor) -> Tensor:
            return repeat(tensor[prompts], "prompt ... -> (prompt row) ...", row=n_rows)

        def blended(z: Tensor, hook: HookPoint) -> Tensor:
            by_row = rearrange(z.clone(), "(prompt row) ... -> prompt row ...", row=n_rows)
            beside = rows.blend_into(by_row, hook.layer(), sources)
            written[hook.layer()] = None if beside is None else beside.flatten(0, 1)
            return by_row.flatten(0, 1)

        mask = per_row(at.earlier.attention_mask)
        earlier = [clean.layers[index].earlier for index in range(layer, self.model.cfg.n_layers)]
        entries = [
            TransformerLensKeyValueCacheEntry(per_row(each.keys), per_row(each.values), frozen=True)
            for each in earlier
        ]
        # Layers below are not run again: any entry may stand in their place.
        cache = TransformerLensKeyValueCache([entries[0]] * layer + entries, mask, frozen=True)
        patched = sorted({patched_layer for patched_layer, _ in rows.patches})
        written: dict[int, Tensor | None] = {}
        hooks = self.model.hooks(fwd_hooks=[(z_site(each), blended) for each in patched])
        with hooks, added(self.model, patched, written.get):
            logits = self.model(
                per_row(at.resid),
                start_at_layer=layer,
                attention_mask=mask,
                past_kv_cache=cache,
                padding_side="left",
            )
        return rearrange(logits[:, -1], "(prompt row) vocab -> prompt row vocab", row=n_rows)


def _resid_site(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_pre"
