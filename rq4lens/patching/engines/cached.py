"""The engine for models that the suffix engine does not cover: the model's own key-value cache.

Rows are ``prompt x condition``, each with its own copy of its prompt's keys and values, and the
last positions are run again over them with ``hook_z`` patched. No part of a block is repeated here,
so whatever the model computes in a cached forward pass is what is measured. Only prompts of one
length are run together: nothing is padded, and no architecture has its own way with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from rq4lens.models.load.devices import Placement
from rq4lens.models.load.lens import HookedModel, KeptKeys, run_over, z_site
from rq4lens.models.prompts.prompt_set import PaddingSide, TokenBatch
from rq4lens.patching.engines.clean_pass import CleanBatch, CleanLayer, some_prompts
from rq4lens.patching.engines.hooks import added
from rq4lens.patching.engines.row_engine import RowEngine, RowGroup, Rows, SourceTensors
from rq4lens.patching.passes import device_of


class CachedEngine(RowEngine):
    """Measures interventions through the model's key-value cache, for every kind of model."""

    name = "cached"
    padding_side: PaddingSide = "right"
    rows_copy_keys = True

    @staticmethod
    def _limits(model: HookedModel) -> dict[str, bool]:
        return {"it is spread over several devices": len(Placement.of(model).devices) > 1}

    def _clean_pass(self, batch: TokenBatch, first_layer: int) -> list[CleanBatch]:  # noqa: ARG002
        """Rows run from the first layer up, so that every layer is stored."""
        at, passes = 0, []
        for _, same in groupby(batch.lengths.tolist()):
            stop = at + len(list(same))
            passes.append(self._pass_of(some_prompts(batch, slice(at, stop))))
            at = stop
        return passes

    def _pass_of(self, batch: TokenBatch) -> CleanBatch:
        """The clean pass of prompts of one length."""
        tokens, n_last = batch.tokens.to(device_of(self.model)), self.window.n_positions
        n_layers = self.model.cfg.n_layers
        earlier: list[KeptKeys] = []
        if tokens.shape[1] > n_last:
            _, earlier = run_over(self.model, tokens[:, :-n_last])
        read: dict[str, Tensor] = {}
        sites = [site(layer) for layer in range(n_layers) for site in (_resid_site, z_site)]
        hooks = [(site, _note(read, site)) for site in sites]
        with self.model.hooks(fwd_hooks=hooks):
            run_over(self.model, tokens[:, -n_last:], earlier)
        made = {
            layer: CleanLayer(
                read[_resid_site(layer)], read[z_site(layer)], earlier[layer] if earlier else None
            )
            for layer in range(n_layers)
        }
        return CleanBatch(batch.rows, made, {}, read[_resid_site(0)])

    def _group_logits(
        self, clean: CleanBatch, prompts: slice, rows: Rows, sources: SourceTensors
    ) -> Iterator[tuple[RowGroup, Float[Tensor, "token row vocab"]]]:
        n_rows, layers = len(rows.interventions), clean.layers.values()
        last = [
            self.prompts.token_ids[row][-self.window.n_positions :]
            for row in clean.rows[prompts].tolist()
        ]
        tokens = torch.tensor(last, device=device_of(self.model)).repeat_interleave(n_rows, dim=0)
        earlier = [each.earlier.rows(prompts, n_rows) for each in layers if each.earlier]
        written: dict[int, Tensor | None] = {}
        spots = None if clean.patched is None else clean.patched[prompts]

        def blended(z: Tensor, hook: Any, layer: int) -> Tensor:  # noqa: ARG001 - by the library
            by_row = rearrange(z.clone(), "(prompt row) ... -> prompt row ...", row=n_rows)
            beside = rows.blend_into(by_row, layer, sources, spots)
            written[layer] = None if beside is None else beside.flatten(0, 1)
            return by_row.flatten(0, 1)

        patched = sorted({layer for layer, _ in rows.patches})
        hooks = [(z_site(layer), partial(blended, layer=layer)) for layer in patched]
        with self.model.hooks(fwd_hooks=hooks), added(self.model, patched, written.get):
            logits, _ = run_over(self.model, tokens, earlier)
        by_row = rearrange(
            logits[:, -self.window.n_answer :],
            "(prompt row) token vocab -> (prompt token) row vocab",
            row=n_rows,
        )
        for group in rows.groups:
            yield group, by_row[:, group.rows]


def _note(read: dict[str, Tensor], site: str) -> Callable[..., None]:
    # TransformerLens passes the hook point by its name.
    return lambda value, hook: read.update({site: value})  # noqa: ARG005


def _resid_site(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_pre"
