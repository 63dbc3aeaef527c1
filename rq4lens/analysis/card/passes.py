"""What a clean pass leaves at the decision token, and how logits are made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from rq4lens.models.load.lens import HookPoint, LayerNorm, LayerNormPre, apply_softcap
from rq4lens.models.load.loading import HookedModel
from rq4lens.models.prompts.prompt_set import TokenBatch, TokenizedPrompts
from rq4lens.patching.engines.block_row import is_post_norm
from rq4lens.patching.passes import Reader, forward_batch, reading

Patterns = Mapping[int, Float[Tensor, "prompt head pos"]]
"""Attention from the decision token by layer; zeros stand behind a prompt's last token."""


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
    model: HookedModel,
    prompts: TokenizedPrompts,
    layers: Sequence[int],
    batch_size: int,
    attention: Patterns | None = None,
) -> DecisionStates:
    """One clean pass over all prompts that reads the named layers on its way."""
    parts: dict[tuple[str, int], list[Tensor]] = {}
    rows: list[Tensor] = []
    for batch in prompts.batches(batch_size):
        with ExitStack() as hooks:
            for layer in layers:
                other = None if attention is None else attention[layer][batch.rows]
                for name, point, read in _points(model.blocks[layer].attn, batch, other):
                    kept = parts.setdefault((name, layer), [])
                    hooks.enter_context(reading(point, _into(kept, read)))
            resid = forward_batch(model, batch, stop_at_layer=model.cfg.n_layers)
        parts.setdefault(("resid", -1), []).append(_at_decision(batch, resid).cpu())
        rows.append(batch.rows)
    order = torch.cat(rows).argsort()
    whole = {key: _joined(each)[order] for key, each in parts.items()}

    def of(name: str) -> dict[int, Tensor]:
        return {layer: each for (kind, layer), each in whole.items() if kind == name}

    return DecisionStates(of("z"), of("pattern"), of("elsewhere"), whole["resid", -1])


def _into(kept: list[Tensor], read: Callable[[Tensor], Tensor]) -> Reader:
    return lambda value: kept.append(read(value).cpu())


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches one after the other; patterns of shorter prompts get zeros behind them."""
    longest = max(part.shape[-1] for part in parts)
    return torch.cat([functional.pad(part, (0, longest - part.shape[-1])) for part in parts])


def _at_decision(batch: TokenBatch, value: Float[Tensor, "prompt pos *site"]) -> Tensor:
    return value[torch.arange(len(value), device=value.device), batch.decision.to(value.device)]


def _points(
    attn: Any, batch: TokenBatch, attention: Float[Tensor, "prompt head pos"] | None
) -> Iterator[tuple[str, HookPoint, Callable[[Tensor], Tensor]]]:
    """What is read of an attention module: by name, where, and how."""
    read = partial(_at_decision, batch)
    yield "z", attn.hook_z, read
    yield "pattern", attn.hook_pattern, lambda pattern: read(pattern.transpose(1, 2))
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


# Norms, in float32 or better: half precision would swamp what a single head adds


def _precise(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _centred(norm: Any, value: Tensor) -> Tensor:
    if isinstance(norm, LayerNorm | LayerNormPre):
        return value - value.mean(-1, keepdim=True)
    return value


def through(
    norm: Any, value: Float[Tensor, "*rows d_model"], at: Float[Tensor, "*#rows d_model"]
) -> Float[Tensor, "*rows d_model"]:
    """A vector through a norm with the scale that it has at other activations; no bias.

    With the activations themselves this is the norm, but for its bias.
    """
    if norm is None:
        return value
    size = _centred(norm, at).square().mean(-1, keepdim=True).add(norm.eps).sqrt()
    gain = getattr(norm, "w", None)
    normed = _centred(norm, value) / size
    return normed if gain is None else normed * _precise(gain).to(normed)


@dataclass(frozen=True)
class HeadWrites:
    """What the heads of a layer add before the block's own norm of the attention's output, if any.

    Args:
        block: the block.
        each: ``z W_O`` of every head.
    """

    block: Any
    each: Float[Tensor, "prompt head d_model"]

    @classmethod
    def of(cls, block: Any, z: Float[Tensor, "prompt head d_head"]) -> HeadWrites:
        """The outputs of all heads for their activations."""
        weight = _precise(block.attn.W_O)
        product = "prompt head d_head, head d_head d_model -> prompt head d_model"
        return cls(block, einsum(z.to(weight), weight, product))

    @property
    def norm(self) -> Any:
        """The norm that the attention's output goes through, or None."""
        if self.block.cfg.use_normalization_before_and_after:
            return self.block.ln1_post
        return self.block.ln1 if is_post_norm(self.block) else None

    @property
    def whole(self) -> Float[Tensor, "prompt d_model"]:
        """The attention's output before that norm."""
        return self.each.sum(1) + _precise(self.block.attn.b_O)

    def in_stream(self, head: int) -> Float[Tensor, "prompt d_model"]:
        """What one head adds to the residual stream; norms have the scale of that very prompt."""
        return through(self.norm, self.each[:, head], self.whole)

    def change(self, head: int, other: Float[Tensor, "prompt d_model"]) -> Tensor:
        """What the residual stream gains when one head writes something else."""
        before, after = self.whole, self.whole + other - self.each[:, head]
        return through(self.norm, after, after) - through(self.norm, before, before)


class Readout:
    """From the last residual stream of a model to logits, on the model's own device."""

    def __init__(self, model: HookedModel, resid: Float[Tensor, "prompt d_model"]) -> None:
        self.norm = getattr(model, "ln_final", None)
        self.weight, self.bias = model.W_U, model.b_U
        self.cap = model.cfg.output_logits_soft_cap
        self.resid = _precise(resid.to(self.weight.device))

    def direct(self, added: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt vocab"]:
        """What vectors in the stream add to the logits; the norm's scale is the clean one."""
        return self._unembedded(through(self.norm, added.to(self.resid), self.resid))

    def mean_direct(self, added: Float[Tensor, "prompt d_model"]) -> Float[Tensor, " vocab"]:
        """:meth:`direct`, on average over the prompts."""
        return self._unembedded(through(self.norm, added.to(self.resid), self.resid).mean(0))

    def uncapped(self) -> Float[Tensor, "prompt vocab"]:
        """The clean logits before a soft cap."""
        normed = through(self.norm, self.resid, self.resid)
        shift = getattr(self.norm, "b", None)
        normed = normed if shift is None else normed + _precise(shift)
        return self._unembedded(normed) + _precise(self.bias)

    def log_probs(
        self, added: Float[Tensor, "prompt d_model"] | None = None
    ) -> Float[Tensor, "prompt vocab"]:
        """Next-token log-probabilities, clean or with vectors added to the last stream."""
        logits = self.uncapped()
        if added is not None:
            after = self.resid + added.to(self.resid)
            normed = through(self.norm, after, after)
            # The difference is unembedded by itself: small effects keep their digits.
            normed = normed - through(self.norm, self.resid, self.resid)
            logits = logits + self._unembedded(normed)
        return apply_softcap(logits, self.cap).log_softmax(-1)

    def _unembedded(self, normed: Tensor) -> Tensor:
        return _precise(normed.to(self.weight.dtype) @ self.weight)
