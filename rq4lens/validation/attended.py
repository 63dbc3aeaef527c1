"""What the heads of a layer attend to, and content of it that no map of their activations holds.

A head's activations are ``z = x W_V + b_V``, where ``x`` is the layer's input, averaged by the
head's attention. A random new ``W_V`` reads the same ``x``, of which a few directions hold nearly
all: what it reads is mostly a linear function of the old ``z``. Content that no linear map explains
has to be read from what is left of ``x`` once everything that goes along with ``z`` is taken out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import einops
import torch
from jaxtyping import Float
from torch import Tensor

from rq4lens.errors import UserError
from rq4lens.models.load.lens import HookedTransformer, HookPoint, z_site
from rq4lens.models.prompts.prompt_set import TokenBatch, TokenizedPrompts
from rq4lens.patching.activations import forward_batch

ROUNDING = 1e-6
"""Relative size of what float32 sums of equal numbers differ by."""

LEAST_CHANGE = 0.2
"""How far the activations of a rewired head change at least, relative to how far they vary."""

MOST_EXPLAINED_PCT = 25.0
"""Share of a rewired head's change that a linear map explains at most.

Half of the share above which a map is said to explain a head.
"""


@dataclass(frozen=True)
class ContentChange:
    """How activations changed: root mean square, relative to how far the old ones vary.

    ``explained_pct`` is the share of the squared change that the best affine map from the old
    activations explains, over the same prompts.
    """

    size: float
    explained_pct: float

    @property
    def shortfall(self) -> tuple[float, float]:
        """How much too small it is for a rewired head, and then how much too well explained."""
        too_small = max(0.0, LEAST_CHANGE - self.size)
        return too_small, max(0.0, self.explained_pct - MOST_EXPLAINED_PCT)

    @property
    def is_rewired(self) -> bool:
        """Whether a head that changed so is rewired: no linear map explains what it does now."""
        return self.shortfall == (0, 0)


LayerInput = tuple[TokenBatch, Tensor]
"""A batch of prompts and the residual stream before a layer, ``[prompt pos d_model]``."""


@torch.no_grad()
def layer_inputs(
    model: HookedTransformer, prompts: TokenizedPrompts, layer: int, batch_size: int = 32
) -> tuple[LayerInput, ...]:
    """What a layer of a model reads of prompts."""
    return tuple(
        (batch, forward_batch(model, batch, layer)) for batch in prompts.batches(batch_size)
    )


@dataclass(frozen=True)
class AttendedInputs:
    """What the heads of one layer attend to at the decision token, and what they make of it.

    Args:
        prompts: the prompts they were read on.
        layer: the layer.
        x: the layer's input, averaged by each head's attention.
        z: each head's activations, ``x W_V + b_V``.
    """

    prompts: TokenizedPrompts
    layer: int
    x: Float[Tensor, "prompt head d_model"]
    z: Float[Tensor, "prompt head d_head"]

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: HookedTransformer, prompts: TokenizedPrompts, layer: int, batch_size: int = 32
    ) -> AttendedInputs:
        """Read them from a model.

        Args:
            model: the base model.
            prompts: its prompts.
            layer: the layer.
            batch_size: prompts per forward pass.
        """
        inputs = layer_inputs(model, prompts, layer, batch_size)
        return cls(prompts, layer, *_read(model, layer, inputs))

    def change_in(
        self, model: HookedTransformer, heads: tuple[int, ...], inputs: Sequence[LayerInput]
    ) -> ContentChange:
        """How the activations of heads differ in a changed copy of the model.

        Args:
            model: the changed copy.
            heads: the heads; what is said holds for each of them.
            inputs: what this layer of the copy reads on the prompts, see :func:`layer_inputs`: read
                once for many changes of the layer.
        """
        _, new_z = _read(model, self.layer, inputs)
        changes = [_change(self.z[:, head], new_z[:, head]) for head in heads]
        return ContentChange(
            min(change.size for change in changes), max(change.explained_pct for change in changes)
        )

    def unread(
        self, heads: tuple[int, ...], strength: float, mixing: Float[Tensor, "d_model d_head"]
    ) -> Float[Tensor, "d_model d_head"]:
        """Weights whose content ``x N`` no linear map of the heads' ``z`` explains.

        Over the prompts, for each of the heads, ``x N`` has mean zero and is uncorrelated with
        ``z``: the best map from ``z`` to ``z + x N`` is the identity, and repairs nothing. With
        more such conditions than half of the directions that the prompts span, only the leading
        conditions are met: those that hold most of what goes along with ``z``.

        Args:
            heads: the heads that share the weights.
            strength: how far ``x N`` varies, relative to how far ``z`` varies.
            mixing: decides which of the directions that are left are read, and how.

        Raises:
            UserError: if the heads read the same on every prompt, or nothing else is left to read.
        """
        x, z = self.x[:, heads], self.z[:, heads]
        x_centred, z_centred = x - x.mean(0), z - z.mean(0)
        conditions = torch.cat(
            [*_unit(x.mean(0)[:, :, None]), *_unit(_cross(x_centred, z_centred))], 1
        )
        spanned = int(torch.linalg.matrix_rank(einops.rearrange(x_centred, "p h d -> (p h) d")))
        taken = torch.linalg.svd(conditions, full_matrices=False).U[:, : max(1, spanned // 2)]
        content = _cross(x_centred, x_centred).sum(0) @ mixing
        content -= taken @ (taken.T @ content)
        old, new = z_centred.norm(), (x_centred @ content).norm()
        # What does not vary differs from its mean by rounding.
        if float(old) <= ROUNDING * float(z.norm()) or float(new) == 0:
            raise UserError(
                f"heads {heads} of layer {self.layer} read the same on every prompt: rewire their "
                "W_Q and W_K instead, or other heads."
            )
        return strength * old / new * content


def _change(old: Float[Tensor, "prompt d"], new: Float[Tensor, "prompt d"]) -> ContentChange:
    change, spread = new - old, (old - old.mean(0)).norm()
    if min(float(change.norm()), float(spread)) == 0:
        return ContentChange(0.0, 0.0)
    inputs = torch.cat([old, torch.ones(len(old), 1, dtype=old.dtype)], 1)
    # Inputs of low rank are the rule here: the driver has to be one that bears them.
    fitted = inputs @ torch.linalg.lstsq(inputs, change, driver="gelsd").solution
    left = (change - fitted).norm() / change.norm()
    return ContentChange(float(change.norm() / spread), float(100 * (1 - left**2)))


def _cross(
    one: Float[Tensor, "prompt head i"], other: Float[Tensor, "prompt head j"]
) -> Float[Tensor, "head i j"]:
    return einops.einsum(one, other, "prompt head i, prompt head j -> head i j")


def _unit(conditions: Float[Tensor, "head d_model condition"]) -> Tensor:
    """The conditions of each head at one size, so that none is lost among larger ones."""
    size = conditions.norm(dim=(1, 2), keepdim=True)
    return conditions / size.where(size > 0, 1.0)


def _read(
    model: HookedTransformer, layer: int, inputs: Sequence[LayerInput]
) -> tuple[Float[Tensor, "prompt head d_model"], Float[Tensor, "prompt head d_head"]]:
    attention: Any = model.blocks[layer].attn
    pattern_site, site = f"blocks.{layer}.attn.hook_pattern", z_site(layer)
    seen: dict[str, Tensor] = {}
    read: list[tuple[Tensor, Tensor]] = []

    def keep(value: Tensor, hook: HookPoint) -> None:
        seen[str(hook.name)] = value.double().cpu()

    def keep_input(_module: Any, _args: Any, inputs: dict[str, Tensor]) -> None:
        seen["input"] = inputs["value_input"].double().cpu()

    with (
        attention.register_forward_pre_hook(keep_input, with_kwargs=True),
        model.hooks(fwd_hooks=[(pattern_site, keep), (site, keep)]),
    ):
        for batch, residual in inputs:
            model(residual, start_at_layer=layer, stop_at_layer=layer + 1)
            rows = torch.arange(len(batch.rows))
            pattern = seen[pattern_site][rows, :, batch.decision]
            axes = "prompt head key, prompt key d -> prompt head d"
            x = einops.einsum(pattern, seen["input"], axes)
            read.append((x, seen[site][rows, batch.decision]))
    order = torch.argsort(torch.cat([batch.rows for batch, _ in inputs]))
    x, z = (torch.cat(part)[order] for part in zip(*read, strict=True))
    return x, z
