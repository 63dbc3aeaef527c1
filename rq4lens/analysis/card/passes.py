"""What heads write into the residual stream, and how logits are made of the last one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from rq4lens.models.load.lens import LayerNorm, LayerNormPre, apply_softcap
from rq4lens.models.load.loading import HookedModel
from rq4lens.patching.engines.block_row import is_post_norm

LOGITS_AT_ONCE = 2**26
"""Rows times vocabulary whose probabilities are in memory together."""


def some_at_once(n: int, n_logits: int) -> Iterator[Int[Tensor, "some"]]:
    """Places of a few things at a time, each of which makes so many logits."""
    yield from torch.arange(n).split(max(1, LOGITS_AT_ONCE // n_logits))


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
    """What ``each`` head of a layer writes, ``z W_O``, before the block's own norm of it."""

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
    def whole(self) -> Float[Tensor, "prompt 1 d_model"]:
        """The attention's output before that norm."""
        return self.each.sum(1, keepdim=True) + _precise(self.block.attn.b_O)

    @property
    def in_stream(self) -> Float[Tensor, "prompt head d_model"]:
        """What each head adds to the residual stream; norms have the scale of that very prompt."""
        return through(self.norm, self.each, self.whole)

    def changes(self, others: HeadWrites) -> Float[Tensor, "prompt head d_model"]:
        """What the residual stream gains when one head by itself writes what another one does."""
        before, after = self.whole, self.whole + others.each - self.each
        return through(self.norm, after, after) - through(self.norm, before, before)


@dataclass(frozen=True)
class Readout:
    """From the last residual stream of a model to logits, on the model's own device.

    Its weights may outlive the model's: they are a small part of them.
    """

    norm: Any
    weight: Float[Tensor, "d_model vocab"]
    bias: Float[Tensor, " vocab"]
    cap: float
    resid: Float[Tensor, "*prompt d_model"]

    @classmethod
    def of(cls, model: HookedModel, resid: Float[Tensor, "prompt d_model"]) -> Readout:
        """The end of a model behind residual streams."""
        norm, cap = getattr(model, "ln_final", None), model.cfg.output_logits_soft_cap
        return cls(norm, model.W_U, model.b_U, cap, _precise(resid.to(model.W_U.device)))

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary."""
        return self.weight.shape[-1]

    def of_prompts(self, rows: Int[Tensor, "*some"]) -> Readout:
        """The same for some of the prompts, in any arrangement."""
        return replace(self, resid=self.resid[rows.to(self.resid.device)])

    def beside_heads(self) -> Readout:
        """The same with an axis behind the prompts, for what several heads add."""
        return replace(self, resid=self.resid[:, None])

    def normed(self, added: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """Vectors in the stream through the final norm; its scale is the clean one."""
        return through(self.norm, added.to(self.resid), self.resid)

    def direct(self, added: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row vocab"]:
        """What vectors in the stream add to the logits."""
        return self.unembedded(self.normed(added))

    def log_probs(
        self, added: Float[Tensor, "*row d_model"] | None = None
    ) -> Float[Tensor, "*row vocab"]:
        """Next-token log-probabilities, clean or with vectors added to the last stream."""
        before = self.normed(self.resid)
        shift = getattr(self.norm, "b", None)
        logits = self.unembedded(before if shift is None else before + _precise(shift))
        logits = logits + _precise(self.bias)
        if added is not None:
            after = self.resid + added.to(self.resid)
            # The difference is unembedded by itself: small effects keep their digits.
            logits = logits + self.unembedded(through(self.norm, after, after) - before)
        return apply_softcap(logits, self.cap).log_softmax(-1)

    def unembedded(self, normed: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row vocab"]:
        """Logits of normed vectors, without biases."""
        return _precise(normed.to(self.weight.dtype) @ self.weight)
