"""The tuned model's decision logits as a differentiable function of one layer's ``z``.

The rows of a prompt are versions of its ``z`` at the patched positions; everything before is the
clean run. With the suffix engine's parts a row costs one token; for models that those parts do not
cover, every row is a full forward pass through native hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.activation_functions import apply_softcap

from rq4lens.models.placement import Placement
from rq4lens.models.prompts import TokenBatch
from rq4lens.patching.activations import forward_batch, patched_positions, z_site
from rq4lens.patching.attention_row import row_z
from rq4lens.patching.block_row import finish_block
from rq4lens.patching.clean_pass import KeptBatch
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.suffix import SuffixEngine

RowsOfZ = Float[Tensor, "prompt row position head d_head"]
RowsOfLogits = Float[Tensor, "prompt row vocab"]


MAX_VALUES = 2**24
"""Numbers in the widest layer of a batch; bounds the memory of a derivative."""


@runtime_checkable
class DecisionFunction(Protocol):
    """Logits at the decision token of some prompts, as a function of ``z`` at one layer."""

    @property
    def rows(self) -> Int[Tensor, "prompt"]:
        """Which prompts of the experiment these are."""

    def __call__(self, z: RowsOfZ) -> RowsOfLogits:
        """Logits of every row."""


@dataclass(frozen=True)
class SuffixFunction:
    """From ``z`` to logits over keys and values kept from the clean pass.

    Args:
        model: the tuned model.
        layer: the layer whose ``z`` is the argument.
        kept: the clean pass of a batch.
        prompts: which prompts of the batch.
    """

    model: HookedTransformer
    layer: int
    kept: KeptBatch
    prompts: slice

    @property
    def rows(self) -> Int[Tensor, "prompt"]:
        """Which prompts of the experiment these are."""
        return self.kept.rows[self.prompts]

    def __call__(self, z: RowsOfZ) -> RowsOfLogits:
        """Logits of every row.

        Args:
            z: the activations, on the model's device.
        """
        placement = Placement.of(self.model)
        clean = self.kept.layers[self.layer].resid[self.prompts]
        resid = repeat(clean, "prompt position d -> prompt row position d", row=z.shape[1])
        resid = finish_block(self.model.blocks[self.layer], resid, z.to(clean.device))
        for layer in range(self.layer + 1, self.model.cfg.n_layers):
            block, at = self.model.blocks[layer], self.kept.layers[layer].of_prompts(self.prompts)
            resid = resid.to(placement.layers[layer])
            resid = finish_block(block, resid, row_z(block, resid, at.shared))
        return _unembed(self.model, resid[:, :, -1].to(placement.exit))


@dataclass(frozen=True)
class NativeFunction:
    """From ``z`` to logits by full forward passes through a native hook.

    Args:
        model: the tuned model.
        layer: the layer whose ``z`` is the argument.
        batch: the prompts.
        k_positions: how many positions, ending at the decision token, are replaced.
    """

    model: HookedTransformer
    layer: int
    batch: TokenBatch
    k_positions: int

    @property
    def rows(self) -> Int[Tensor, "prompt"]:
        """Which prompts of the experiment these are."""
        return self.batch.rows

    def __call__(self, z: RowsOfZ) -> RowsOfLogits:
        """Logits of every row.

        Args:
            z: the activations, on the model's device.
        """
        return torch.stack([self._one(row) for row in z.unbind(1)], dim=1)

    def _one(self, z: Float[Tensor, "prompt position head d_head"]) -> Tensor:
        positions = patched_positions(self.batch, self.k_positions)
        prompts = torch.arange(len(positions))

        def replace(clean: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001 - by the library
            at = (prompts[:, None].to(clean.device), positions.to(clean.device))
            return clean.index_put(at, z.to(clean))

        with self.model.hooks(fwd_hooks=[(z_site(self.layer), replace)]):
            logits = forward_batch(self.model, self.batch)
        return logits[prompts, self.batch.decision]


def decision_functions(
    experiment: Experiment, layer: int, rows_per_prompt: int
) -> Iterator[DecisionFunction]:
    """The decision function of each batch of the measured prompts.

    Args:
        experiment: the pair and its prompts.
        layer: the layer whose ``z`` is the argument.
        rows_per_prompt: how many rows each prompt will have; it decides the size of the batches.

    Yields:
        One function per batch; together they hold every prompt once.
    """
    model, engine = experiment.tuned_model, experiment.engine
    size = _prompts_at_once(experiment, rows_per_prompt)
    if isinstance(engine, SuffixEngine):
        for kept in engine.kept_batches(layer):
            for start in range(0, len(kept.rows), size):
                here = kept.to(Placement.of(model))
                yield SuffixFunction(model, layer, here, slice(start, start + size))
    else:
        for batch in experiment.prompts.batches(size):
            yield NativeFunction(model, layer, batch, experiment.k_positions)


def _prompts_at_once(experiment: Experiment, rows_per_prompt: int) -> int:
    cfg = experiment.tuned_model.cfg
    longest = int(experiment.prompts.lengths.max())
    widest = cfg.d_vocab + (cfg.d_mlp or 0) + cfg.n_heads * longest
    return max(1, MAX_VALUES // (rows_per_prompt * experiment.k_positions * widest))


def _unembed(model: HookedTransformer, resid: Float[Tensor, "prompt row d_model"]) -> RowsOfLogits:
    if model.cfg.normalization_type is not None:
        resid = model.ln_final(resid)
    return apply_softcap(model.unembed(resid), model.cfg.output_logits_soft_cap)


def as_rows(z: Float[Tensor, "prompt position head d_head"]) -> RowsOfZ:
    """Activations as the single row of their prompt."""
    return rearrange(z, "prompt position head d_head -> prompt 1 position head d_head")
