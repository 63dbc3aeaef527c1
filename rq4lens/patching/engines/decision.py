"""What a clean pass leaves at the decision token: ``z``, attention, and the last residual stream.

The suffix engine has nearly all of it from its own clean pass. For another engine the model runs
once more, with hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from rq4lens.models.load.lens import HookPoint
from rq4lens.models.prompts.prompt_set import TokenBatch
from rq4lens.patching.engines.block_row import Pattern, finish_block, gathered, row_attention
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.engines.layout import fused_norms
from rq4lens.patching.engines.row_engine import RowEngine
from rq4lens.patching.engines.suffix import SuffixEngine
from rq4lens.patching.passes import forward_batch, reading

Patterns = Mapping[int, Float[Tensor, "prompt head pos"]]
"""Attention from the decision token by layer; zeros stand behind a prompt's last token."""

Read = tuple[Int[Tensor, "prompt"], dict[tuple[str, int], Tensor]]
"""Some prompts, and what was read of them by name and layer; that of ``resid`` is -1."""


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
    attention = attention or {}
    if isinstance(engine, SuffixEngine):
        found = list(_of_clean_pass(engine, layers, attention))
    else:
        found = list(_by_hooks(engine, layers, attention))
    order = torch.cat([rows for rows, _ in found]).argsort()
    whole = {key: _joined([read[key].cpu() for _, read in found])[order] for key in found[0][1]}

    def of(name: str) -> dict[int, Tensor]:
        return {layer: each for (kind, layer), each in whole.items() if kind == name}

    return DecisionStates(of("z"), of("pattern"), of("elsewhere"), whole["resid", -1])


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
        with fused_norms(blocks):
            for layer in layers:
                at = clean.layers[layer].to(engine.placement.layers[layer])
                pattern, v = row_attention(blocks[layer], at.resid[:, None], at.earlier)
                read["z", layer] = at.z[:, 0]
                read["pattern", layer] = _by_position(pattern, decision)
                if layer in attention:
                    other = attention[layer][clean.rows].to(pattern)
                    z = gathered(_by_column(other, decision, pattern), v, at.earlier)
                    read["elsewhere", layer] = z[:, 0, 0]
            end = clean.layers[last].to(engine.placement.layers[last])
            resid = finish_block(blocks[last], end.resid[:, None], end.z[:, None])
        yield clean.rows, read | {("resid", -1): resid[:, 0, 0]}


def _by_position(
    pattern: Pattern, decision: Int[Tensor, "prompt"]
) -> Float[Tensor, "prompt head pos"]:
    """Attention by the position of the token; the last column is the decision token's own."""
    columns = rearrange(pattern, "prompt kv_head group 1 1 key -> prompt (kv_head group) key")
    found = functional.pad(columns[..., : int(decision.max())], (0, 1))
    found[torch.arange(len(found)), :, decision] = columns[..., -1]
    return found


def _by_column(
    attention: Float[Tensor, "prompt head longest"],
    decision: Int[Tensor, "prompt"],
    like: Pattern,
) -> Pattern:
    """The reverse: attention by position in the columns of another one."""
    prompts, n_earlier = torch.arange(len(decision)), int(decision.max())
    columns = attention.new_zeros(*attention.shape[:2], like.shape[-1])
    columns[..., :n_earlier] = attention[..., :n_earlier]
    columns[prompts, :, decision] = 0
    columns[..., -1] = attention[prompts, :, decision]
    return columns.reshape(like.shape)


def _by_hooks(
    engine: RowEngine | HookEngine, layers: Sequence[int], attention: Patterns
) -> Iterator[Read]:
    """A forward pass of the model, with hooks."""
    model = engine.model
    for batch in engine.prompts.batches(engine.batch_size):
        read: dict[tuple[str, int], Tensor] = {}

        def note(
            key: tuple[str, int], of: Callable[[Tensor], Tensor], value: Tensor, read: Any = read
        ) -> None:
            read[key] = of(value)

        with ExitStack() as hooks:
            for layer in layers:
                other = attention[layer][batch.rows] if layer in attention else None
                for name, point, of in _points(model.blocks[layer].attn, batch, other):
                    hooks.enter_context(reading(point, partial(note, (name, layer), of)))
            resid = forward_batch(model, batch, stop_at_layer=model.cfg.n_layers)
        yield batch.rows, read | {("resid", -1): _at_decision(batch, resid)}


def _at_decision(batch: TokenBatch, value: Float[Tensor, "prompt pos *site"]) -> Tensor:
    return value[torch.arange(len(value), device=value.device), batch.decision.to(value.device)]


def _points(
    attn: Any, batch: TokenBatch, attention: Float[Tensor, "prompt head pos"] | None
) -> Iterator[tuple[str, HookPoint, Callable[[Tensor], Tensor]]]:
    """What is read of an attention module: by name, where, and how."""
    at_decision = partial(_at_decision, batch)
    yield "z", attn.hook_z, at_decision
    yield "pattern", attn.hook_pattern, lambda pattern: at_decision(pattern.transpose(1, 2))
    if attention is not None:
        yield "elsewhere", attn.hook_v, partial(_under, attn, attention)


def _under(
    attn: Any,
    attention: Float[Tensor, "prompt head longest"],
    values: Float[Tensor, "prompt pos kv_head d_head"],
) -> Float[Tensor, "prompt head d_head"]:
    """A layer's own values, gathered by attention that is not its own."""
    if attn.cfg.clip_qkv is not None:
        values = values.clamp(-attn.cfg.clip_qkv, attn.cfg.clip_qkv)
    group = attn.cfg.n_heads // values.shape[2]
    values = repeat(values, "prompt pos kv d_head -> prompt pos (kv group) d_head", group=group)
    here = attention[..., : values.shape[1]].to(values)
    return einsum(here, values, "prompt head pos, prompt pos head d_head -> prompt head d_head")
