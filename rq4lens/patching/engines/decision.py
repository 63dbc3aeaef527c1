"""What a clean pass leaves at the decision token: ``z``, attention, and the last residual stream.

The suffix engine has nearly all of it from its own clean pass. For another engine the model runs
once more, with hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from rq4lens.patching.engines.block_row import Pattern, finish_block, gathered, row_attention
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.engines.layout import fused
from rq4lens.patching.engines.row_engine import RowEngine
from rq4lens.patching.engines.suffix import SuffixEngine
from rq4lens.patching.passes import Reader, forward_batch, reader_at, reading

Patterns = Mapping[int, Float[Tensor, "prompt head pos"]]
"""Attention from the decision token by layer; zeros stand behind a prompt's last token."""

Of = Callable[[Tensor], Tensor]
"""What is kept of activations."""

Read = tuple[Int[Tensor, "prompt"], dict[tuple[str, int], Tensor]]
"""Some prompts, and what was read of them by name and layer, -1 for ``resid``."""


@dataclass(frozen=True)
class DecisionStates:
    """What a clean pass leaves at the decision token, by layer, on the CPU.

    ``z_elsewhere`` is the model's own values under the other model's attention; empty if no
    attention was given. ``resid`` enters the final norm.
    """

    z: Mapping[int, Float[Tensor, "prompt head d_head"]]
    pattern: Patterns
    z_elsewhere: Mapping[int, Float[Tensor, "prompt head d_head"]]
    resid: Float[Tensor, "prompt d_model"]


@torch.no_grad()
def decision_states(
    engine: RowEngine | HookEngine, layers: Sequence[int], attention: Patterns | None = None
) -> DecisionStates:
    """Read some layers of an engine's model on its prompts.

    Args:
        engine: patches the decision token alone; the model is a ``HookedTransformer``.
        layers: the layers.
        attention: the other model's, over the same tokens.
    """
    if isinstance(engine, SuffixEngine):
        found = list(_of_clean_pass(engine, layers, attention or {}))
    else:
        found = list(_by_hooks(engine, layers, attention or {}))
    order = torch.cat([rows for rows, _ in found]).argsort()

    def of(name: str) -> dict[int, Tensor]:
        keys = [key for key in found[0][1] if key[0] == name]
        return {key[1]: _joined([read[key].cpu() for _, read in found])[order, 0] for key in keys}

    return DecisionStates(of("z"), of("pattern"), of("elsewhere"), of("resid")[-1])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches one after the other; patterns of shorter prompts get zeros behind them."""
    longest = max(part.shape[-1] for part in parts)
    return torch.cat([functional.pad(part, (0, longest - part.shape[-1])) for part in parts])


def _of_clean_pass(
    engine: SuffixEngine, layers: Sequence[int], attention: Patterns
) -> Iterator[Read]:
    """What the clean pass stored, and the rest of the last block at the decision token."""
    blocks, last = engine.model.blocks, engine.model.cfg.n_layers - 1
    for clean in engine.clean_batches(min(layers)):
        decision, read = engine.prompts.lengths[clean.rows] - 1, {}
        with fused(engine.fusible):
            for layer in layers:
                at = clean.layers[layer].to(engine.placement.layers[layer])
                pattern, v = row_attention(blocks[layer], at.resid[:, None], at.earlier)
                read["z", layer] = at.z
                read["pattern", layer] = _by_position(pattern, decision)
                if layer in attention:
                    other = _by_column(attention[layer][clean.rows], decision, pattern)
                    read["elsewhere", layer] = gathered(other, v, at.earlier)[:, 0]
            end = clean.layers[last].to(engine.placement.layers[last])
            resid = finish_block(blocks[last], end.resid[:, None], end.z[:, None])
        yield clean.rows, read | {("resid", -1): resid[:, 0]}


def _by_position(
    pattern: Pattern, decision: Int[Tensor, "prompt"]
) -> Float[Tensor, "prompt 1 head pos"]:
    """Attention by the position of the token; the last column is the decision token's own."""
    columns = rearrange(pattern, "prompt kv_head group 1 1 key -> prompt 1 (kv_head group) key")
    found = functional.pad(columns[..., : int(decision.max())], (0, 1))
    found[torch.arange(len(found)), 0, :, decision] = columns[:, 0, :, -1]
    return found


def _by_column(
    attention: Float[Tensor, "prompt head longest"], decision: Int[Tensor, "prompt"], like: Pattern
) -> Pattern:
    """The reverse: attention by position in the columns of another one."""
    prompts, n_earlier = torch.arange(len(decision)), int(decision.max())
    columns = attention.new_zeros(*attention.shape[:2], like.shape[-1])
    columns[..., :n_earlier] = attention[..., :n_earlier]
    columns[prompts, :, decision] = 0
    columns[..., -1] = attention[prompts, :, decision]
    return columns.reshape(like.shape).to(like)


def _by_hooks(
    engine: RowEngine | HookEngine, layers: Sequence[int], attention: Patterns
) -> Iterator[Read]:
    """A forward pass of the model, with hooks."""
    model = engine.model
    for batch in engine.prompts.batches(engine.batch_size):
        decision, read = reader_at(batch.compared), dict[tuple[str, int], Tensor]()
        with ExitStack() as hooks:
            for layer in layers:
                attn = model.blocks[layer].attn
                points = {"z": (attn.hook_z, decision)}
                points["pattern"] = attn.hook_pattern, _of_queries(decision)
                if layer in attention:
                    points["elsewhere"] = attn.hook_v, _under(attn, attention[layer][batch.rows])
                for name, (point, of) in points.items():
                    hooks.enter_context(reading(point, _into(read, (name, layer), of)))
            resid = forward_batch(model, batch, stop_at_layer=model.cfg.n_layers)
            read["resid", -1] = decision(resid)
        yield batch.rows, read


def _into(read: dict[tuple[str, int], Tensor], key: tuple[str, int], of: Of) -> Reader:
    return lambda value: read.update({key: of(value)})


def _of_queries(decision: Of) -> Of:
    return lambda pattern: decision(pattern.transpose(1, 2))


def _under(attn: Any, attention: Float[Tensor, "prompt head longest"]) -> Of:
    """Gathers a layer's own values by attention that is not its own."""

    def gather(values: Float[Tensor, "prompt pos kv_head d_head"]) -> Tensor:
        limit, n_pos, n_kv_heads = attn.cfg.clip_qkv, *values.shape[1:3]
        values = values if limit is None else values.clamp(-limit, limit)
        here = attention[:, None, :, :n_pos].to(values).unflatten(2, (n_kv_heads, -1))
        product = "prompt one kv group pos, prompt pos kv d_head -> prompt one kv group d_head"
        return einsum(here, values, product).flatten(2, 3)

    return gather
