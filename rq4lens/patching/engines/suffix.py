"""The default engine: one clean pass, then one row per condition at the decision token.

A patch at the decision token cannot change an earlier position of a causal model. So the clean
pass serves every head, head set, alpha, source and layer, and a condition costs one row from the
patched layer up, over keys and values that all conditions of the prompt share. This is exact, not
an approximation: the numbers are those of a full forward pass through native hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from rq4lens.models.load.lens import (
    Attention,
    GroupedQueryAttention,
    HookedModel,
    HookedTransformer,
    TransformerBlock,
)
from rq4lens.models.prompts.prompt_set import PaddingSide, TokenBatch
from rq4lens.patching.engines.block_row import (
    SharedKeys,
    finish_block,
    kernel_covers,
    row_z,
    row_z_by_kernel,
)
from rq4lens.patching.engines.clean_pass import CleanBatch, clean_pass, some_prompts
from rq4lens.patching.engines.layout import fused, fusible, side_by_side, store_for_products
from rq4lens.patching.engines.memory import RowBlock, even_parts
from rq4lens.patching.engines.row_engine import RowEngine, RowGroup, Rows, SourceTensors
from rq4lens.patching.passes import unembed
from rq4lens.patching.patch import (
    Effects,
    OtherModel,
    Sources,
    all_effects,
    answer_effects,
    is_built,
    n_measures,
)

BATCHES_PER_DEVICE = 3
"""Of a model that is spread over several. Only one device has work when the first batch begins and
when the last one ends; with more and smaller batches it is the caller that cannot keep up."""


class SuffixEngine(RowEngine):
    """Measures interventions on a model; exact and fast.

    The model's weights are stored anew in memory (see :mod:`rq4lens.patching.engines.layout`);
    their values do not change.
    """

    name = "suffix"
    padding_side: PaddingSide = "right"
    rows_copy_keys = False

    @staticmethod
    def _limits(model: HookedModel) -> dict[str, bool]:
        cfg = model.cfg
        if not isinstance(model, HookedTransformer):
            return {f"it is a {type(model).__name__}, not a HookedTransformer": True}
        parts = [part for block in model.blocks for part in (block, getattr(block, "attn", None))]
        # Exactly these classes: a subclass may do something in forward that is not repeated here.
        mirrored = {TransformerBlock, Attention, GroupedQueryAttention}
        foreign = {type(part).__name__ for part in parts if type(part) not in mirrored}
        return {
            f"its blocks are made of {', '.join(sorted(foreign))}": bool(foreign),
            f"its position embedding is {cfg.positional_embedding_type}": (
                cfg.positional_embedding_type not in {"standard", "rotary", "alibi"}
            ),
            "it has attention sinks": cfg.use_attention_sinks,
            "it scales queries by the logarithm of their position": cfg.use_logn_attn,
            "its weights are 4-bit": cfg.load_in_4bit,
            "its heads read inputs of their own": cfg.use_attn_in or cfg.use_split_qkv_input,
        }

    def _clean_pass(self, batch: TokenBatch, first_layer: int) -> list[CleanBatch]:
        lowest = first_layer if self._at_once(len(self.prompts)) == len(self.prompts) else 0
        store_for_products((*self.model.blocks[lowest:], self.model.unembed))
        parts = even_parts(slice(0, len(batch.rows)), self._at_once(len(batch.rows)))
        works = (
            clean_pass(self.model, some_prompts(batch, part), first_layer, self.window.n_positions)
            for part in parts
        )
        with fused(fusible(self.model), half_only=True):
            return list(side_by_side(works))

    @cached_property
    def fusible(self) -> list[nn.Module]:
        """The parts of the blocks that can pass over the rows fewer times."""
        return fusible(self.model.blocks)

    @cached_property
    def _row_z(self) -> Callable[[TransformerBlock, Tensor, SharedKeys], Tensor]:
        """What rows attend to, by the kernel where it covers the model and can be built."""
        last, cfg = self.model.blocks[-1], self.model.cfg
        device = self.placement.layers[-1]
        # One position has no query to rotate: there a kernel takes longer to build than it saves.
        several = self.window.n_positions > 1
        if device.type != "cuda" or not several or not kernel_covers(cfg):
            return row_z
        at = self._clean[0].layers[cfg.n_layers - 1].of_prompts(slice(1)).to(device)
        form = (device, cfg.dtype, cfg.n_heads, at.earlier.keys.shape[1], *at.resid.shape[1:])
        by_kernel = is_built(
            "rows attend", form, lambda: row_z_by_kernel(last, at.resid[:, None], at.earlier)
        )
        return row_z_by_kernel if by_kernel else row_z

    def _at_once(self, n_prompts: int) -> int:
        """Prompts that go through the model together; several devices want several batches."""
        n_devices = len(self.placement.devices)
        n_batches = 1 if n_devices == 1 else BATCHES_PER_DEVICE * n_devices
        return min(-(-n_prompts // n_batches), self._memory.passes.max_rows)

    @torch.no_grad()
    def every_layer(
        self, source: str, sources: Sources, other: OtherModel | None = None
    ) -> Effects:
        """Effect of a source in place of every head of every layer.

        With every head replaced nothing is attended to at the patched positions: where all of the
        window's are, this needs neither keys nor values, only the rest of each block.
        """
        if not self.window.is_patched_whole:
            return super().every_layer(source, sources, other)
        n_answer = self.window.n_answer
        found = np.empty((n_measures(n_answer, other), 1, len(self.prompts)))
        for batch in self.clean_batches(self.first_layer):

            def work(block: RowBlock, batch: CleanBatch = batch) -> None:
                rows = batch.rows[block.prompts]
                logits = self._replaced(batch.embedded[block.prompts], rows, source, sources)
                beside = other and other.of_prompts(rows).by_token(n_answer).to(logits.device)
                reference = self.logits_of(batch, block.prompts, [()], {})
                there = torch.ones(len(rows), n_answer, dtype=torch.bool)
                effects = answer_effects(
                    all_effects, logits, reference, there, self.settings.kl_direction, beside
                )
                for measure, values in zip(found, effects, strict=True):
                    measure[0, rows.numpy()] = values[:, 0].cpu()

            self._memory.rows.run(RowBlock(slice(0, len(batch.rows)), slice(0, 1)), work)
        return Effects.of(found, n_answer)

    def _replaced(
        self,
        embedded: Float[Tensor, "prompt position d_model"],
        rows: Int[Tensor, "prompt"],
        source: str,
        sources: Sources,
    ) -> Float[Tensor, "token 1 vocab"]:
        resid = embedded[:, None]
        with fused(self.fusible):
            for layer, block in enumerate(self.model.blocks):
                device = self.placement.layers[layer]
                z = sources[layer, source][rows][:, None].to(device, self.model.cfg.dtype)
                resid = finish_block(block, resid.to(device), z)
        return unembed(self.model, self._by_token(resid))

    def _group_logits(
        self, clean: CleanBatch, prompts: slice, rows: Rows, sources: SourceTensors
    ) -> Iterator[tuple[RowGroup, Float[Tensor, "token row vocab"]]]:
        with fused(self.fusible):
            resid = self._walk(clean, prompts, rows, sources)
        for group in rows.groups:
            yield group, unembed(self.model, resid[:, group.rows])

    def _walk(
        self, clean: CleanBatch, prompts: slice, rows: Rows, sources: SourceTensors
    ) -> Float[Tensor, "token row d_model"]:
        """Carry the rows from the layers they enter at to the end of the last block."""
        resid: Tensor | None = None
        changed: Tensor | None = None
        patched = None if clean.patched is None else clean.patched[prompts]
        for layer in range(rows.groups[0].layer, self.model.cfg.n_layers):
            block, at = self.model.blocks[layer], clean.layers[layer].of_prompts(prompts)
            if resid is not None:
                resid = resid.to(self.placement.layers[layer])
                changed = self._row_z(block, resid, at.earlier)
            n_new = rows.entering(layer)
            resid, z = _joined(resid, at.resid, n_new), _joined(changed, at.z, n_new)
            written = rows.blend_into(z, layer, sources, patched)
            resid = finish_block(block, resid, z, written)
        assert resid is not None
        return self._by_token(resid)

    def _by_token(
        self, resid: Float[Tensor, "prompt row position d_model"]
    ) -> Float[Tensor, "token row d_model"]:
        """The residual stream at each compared token."""
        last = resid[:, :, -self.window.n_answer :].to(self.placement.exit)
        return rearrange(last, "prompt row token d_model -> (prompt token) row d_model")


def _joined(
    rows: Float[Tensor, "prompt row position *site"] | None,
    clean: Float[Tensor, "prompt position *site"],
    n_new: int,
) -> Float[Tensor, "prompt all_rows position *site"]:
    """The rows under way, followed by rows that enter with the clean activations."""
    if rows is not None and n_new == 0:
        return rows
    new = repeat(clean, "prompt position ... -> prompt row position ...", row=n_new)
    return new.contiguous() if rows is None else torch.cat([rows, new], dim=1)
