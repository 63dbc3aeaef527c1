"""What the engines keep of a clean pass, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from rq4lens.models.load.devices import Placement
from rq4lens.models.prompts.prompt_set import TokenBatch

SourceTensors = Mapping[tuple[int, str], Float[Tensor, "prompt position head d_head"]]
"""Activations to blend in, of the prompts at hand, by layer and source."""


@runtime_checkable
class Kept(Protocol):
    """A batch of prompts after its clean pass."""

    @property
    def rows(self) -> Int[Tensor, "prompt"]:
        """Which prompts of the engine these are."""

    @property
    def entering(self) -> Float[Tensor, "end pos d_model"] | None:
        """Residual stream of its shortest and longest prompt before the lowest kept layer."""

    @property
    def n_bytes(self) -> int:
        """Memory that the batch takes."""

    def z(self, layer: int) -> Float[Tensor, "prompt position head d_head"]:
        """Clean activations of a layer."""

    def to(self, placement: Placement) -> Any:
        """The batch with each layer on its device."""


def some_prompts(batch: TokenBatch, prompts: slice) -> TokenBatch:
    """Part of a batch, without the padding that no prompt of the part needs."""
    mask = batch.attention_mask[prompts]
    longest = int(mask.sum(-1).max())
    used = slice(-longest, None) if batch.padding_side == "left" else slice(longest)
    return TokenBatch(
        batch.rows[prompts], batch.tokens[prompts, used], mask[:, used], batch.padding_side
    )
