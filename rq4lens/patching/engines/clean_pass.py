"""One clean pass of the tuned model that stores what every condition will need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rq4lens.models.load.devices import Placement, copied_once
from rq4lens.models.load.lens import HookedTransformer, TransformerLensKeyValueCacheEntry
from rq4lens.models.prompts.prompt_set import Places, TokenBatch
from rq4lens.patching.engines.block_row import (
    SharedKeys,
    attention_bias,
    attention_input,
    turn_to_decision,
)
from rq4lens.patching.engines.layout import Steps
from rq4lens.patching.passes import forward_batch, forward_steps, reader_at, reading

COLUMN_MULTIPLE = 8
"""Half-precision matrix products are fast when their sides are multiples of this."""

Record = TypeVar("Record")


def each_tensor(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """The same dataclass with every tensor in it changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return each_tensor(value, change) if is_dataclass(value) else value

    values = {each.name: changed(getattr(record, each.name)) for each in fields(record)}  # type: ignore[arg-type]
    return replace(record, **values)  # type: ignore[type-var]


@dataclass(frozen=True)
class CleanLayer:
    """What one layer of the clean pass leaves behind at the last positions.

    ``earlier`` is keys and values of the positions before, in the form that the engine needs; None
    where there are none.
    """

    resid: Float[Tensor, "prompt position d_model"]
    z: Float[Tensor, "prompt position head d_head"]
    earlier: Any

    def of_prompts(self, prompts: slice) -> CleanLayer:
        """The same for some of the prompts."""
        return each_tensor(self, lambda tensor: tensor[prompts])

    def to(self, device: torch.device) -> CleanLayer:
        """The same on a device."""
        return each_tensor(self, lambda tensor: tensor.to(device))

    @property
    def n_bytes(self) -> int:
        """Memory of what depends on the layer: masks are shared by all."""
        earlier = [self.earlier.keys, self.earlier.values] if self.earlier else []
        return sum(tensor.nbytes for tensor in (self.resid, self.z, *earlier))


@dataclass(frozen=True)
class CleanBatch:
    """A batch of prompts, ``rows`` of the engine's, after its clean pass.

    ``z_below`` is z of the layers below the lowest one, and ``embedded`` what enters the first
    block, both at the last positions. ``patched`` says which of these are patched; None where all
    are. ``entering`` is the residual stream of two prompts,
    :func:`shortest_and_longest`, before the lowest layer; the start-up check runs native hooks
    on it, or on tokens without it.
    """

    rows: Int[Tensor, "prompt"]
    layers: dict[int, CleanLayer]
    z_below: dict[int, Float[Tensor, "prompt position head d_head"]]
    embedded: Float[Tensor, "prompt position d_model"]
    entering: Float[Tensor, "end pos d_model"] | None = None
    patched: Bool[Tensor, "prompt position"] | None = None

    def to(self, placement: Placement) -> CleanBatch:
        """The batch with each layer on its device."""
        layers = {index: each.to(placement.layers[index]) for index, each in self.layers.items()}
        below = {index: z.to(placement.layers[index]) for index, z in self.z_below.items()}
        embedded, entering = self.embedded.to(placement.layers[0]), self.entering
        if entering is not None:
            entering = entering.to(placement.layers[min(layers)])
        return replace(self, layers=layers, z_below=below, embedded=embedded, entering=entering)


def some_prompts(batch: TokenBatch, prompts: slice) -> TokenBatch:
    """Part of a batch, without the padding that no prompt of the part needs."""
    mask = batch.attention_mask[prompts]
    longest = int(mask.sum(-1).max())
    used = slice(-longest, None) if batch.padding_side == "left" else slice(longest)
    return replace(
        batch,
        rows=batch.rows[prompts],
        tokens=batch.tokens[prompts, used],
        attention_mask=mask[:, used],
        spots=batch.spots[prompts],
        n_answer=batch.n_answer[prompts],
    )


def clean_pass(
    model: HookedTransformer, batch: TokenBatch, first_layer: int, n_positions: int
) -> Steps[CleanBatch]:
    """Run the model once over right-padded prompts and store what a patched row will look at.

    A step is a block, so that several batches can be under way on several devices.

    Of the last block only the attention is run: its MLP and the unembedding are read at the
    decision token alone, where the engine's own clean row computes them.
    """
    placement = Placement.of(model)
    read = reader_at(last_places(batch, n_positions))
    layers: dict[int, CleanLayer] = {}
    z: list[Tensor] = []
    bias = _bias_of_layers(batch, n_positions)
    longest = int(batch.lengths.max())
    aligned_right = torch.arange(longest) >= longest - batch.lengths[:, None]
    position_mask = copied_once(aligned_right.long())
    below: dict[int, Tensor] = {}

    def reader(layer: int) -> Callable[[Tensor], None]:
        return lambda value: below.update({layer: read(value)})

    readers = {layer: reader(layer) for layer in range(first_layer)}
    embedded = read(forward_batch(model, batch, stop_at_layer=0))
    resid = yield from forward_steps(model, batch, first_layer, readers)
    entering = resid[shortest_and_longest(len(resid))].clone()
    for layer in range(first_layer, model.cfg.n_layers):
        device = placement.layers[layer]
        yield device
        resid = resid.to(device)
        block, seen = model.blocks[layer], _SeenKeys(resid)
        at_positions = read(resid)
        with reading(block.attn.hook_z, lambda value: z.append(read(value))):
            if layer < model.cfg.n_layers - 1:
                resid = block(resid, past_kv_cache_entry=seen)
            else:
                read_in = attention_input(block, resid)
                block.attn(read_in, read_in, read_in, past_kv_cache_entry=seen)
        bias_here = bias(block.attn, device)
        shared = seen.share(block.attn, n_positions, bias_here, position_mask(device))
        layers[layer] = CleanLayer(at_positions, z.pop(), shared)
    return CleanBatch(batch.rows, layers, below, embedded, entering)


def last_places(batch: TokenBatch, n_positions: int) -> Places:
    """The last ``n_positions`` tokens of each prompt."""
    last = batch.decision + batch.n_answer - 1
    at = last[:, None] + torch.arange(1 - n_positions, 1)
    return Places(at, torch.ones_like(at, dtype=torch.bool))


def shortest_and_longest(n_prompts: int) -> slice:
    """The ends of a batch, whose prompts are sorted by length; padding matters for one of them."""
    return slice(0, n_prompts, max(1, n_prompts - 1))


class _SeenKeys(TransformerLensKeyValueCacheEntry):
    """A cache entry that starts empty and holds what the attention appends, without copying it."""

    def __init__(self, resid: Float[Tensor, "prompt pos d_model"]) -> None:
        nothing = resid.new_empty(len(resid), 0, 1, 1)
        super().__init__(past_keys=nothing, past_values=nothing)

    def append(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        self.past_keys, self.past_values = new_keys, new_values
        return new_keys, new_values

    def share(
        self,
        attn: Any,
        n_positions: int,
        bias: Tensor | None,
        position_mask: Int[Tensor, "prompt pos"],
    ) -> SharedKeys:
        """Keys and values in the layout of the decision row, the row's own columns left empty."""
        rotary = attn.cfg.positional_embedding_type == "rotary"
        keys = attn.apply_rotary(self.past_keys) if rotary else self.past_keys
        shared = SharedKeys(
            _by_head(keys, n_positions),
            _by_head(self.past_values, n_positions),
            bias,
            position_mask,
        )
        # Several patched positions are rotated differently: their queries turn one by one.
        one_rotation = rotary and n_positions == 1
        return turn_to_decision(attn, shared) if one_rotation else shared


def _by_head(
    heads: Float[Tensor, "prompt pos kv_head d_head"], n_positions: int
) -> Float[Tensor, "prompt kv_head key d_head"]:
    n_prompts, n_pos, n_heads, d_head = heads.shape
    columns = heads.new_zeros(n_prompts, n_heads, n_columns(n_pos), d_head)
    earlier = heads[:, : n_pos - n_positions]
    columns[:, :, : n_pos - n_positions] = rearrange(
        earlier, "prompt pos kv_head d_head -> prompt kv_head pos d_head"
    )
    return columns


def n_columns(n_pos: int) -> int:
    """Key columns for prompts of this padded length."""
    return -(-n_pos // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def _bias_of_layers(
    batch: TokenBatch, n_positions: int
) -> Callable[[Any, torch.device], Tensor | None]:
    """The score bias of an attention module; layers of one kind on one device share it."""
    made: dict[tuple[str, torch.device], Tensor | None] = {}
    columns = n_columns(batch.tokens.shape[1])

    def bias(attn: Any, device: torch.device) -> Tensor | None:
        key = (attn.attn_type, device)
        if key not in made:
            found = attention_bias(attn, batch.lengths, n_positions, columns)
            made[key] = None if found is None else found.to(device)
        return made[key]

    return bias
