"""What the heads of a layer attend to, and content of it that no map of their activations holds.

A head's activations are ``z = x W_V + b_V``, where ``x`` is the layer's input, averaged by the
head's attention. A random new ``W_V`` reads the same ``x``, of which a few directions hold nearly
all: what it reads is mostly a linear function of the old ``z``. Content that no linear map explains
has to be read from what is left of ``x`` once everything that goes along with ``z`` is taken out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import einops
import torch
from jaxtyping import Float
from torch import Tensor

from rq4lens.errors import UserError
from rq4lens.models.load.lens import HookedTransformer, HookPoint, z_site
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.passes import forward_batch

ROUNDING = 1e-6
"""Relative size of what float32 sums of equal numbers differ by."""


@dataclass(frozen=True)
class AttendedInputs:
    """What the heads of one layer attend to at the decision token, and what they make of it.

    Args:
        layer: the layer.
        x: the layer's input, averaged by each head's attention.
        z: each head's activations, ``x W_V + b_V``.
    """

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
        attention: Any = model.blocks[layer].attn
        pattern_site, site = f"blocks.{layer}.attn.hook_pattern", z_site(layer)
        batches = tuple(prompts.batches(batch_size))
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
            for batch in batches:
                residual = forward_batch(model, batch, layer)
                model(residual, start_at_layer=layer, stop_at_layer=layer + 1)
                rows = torch.arange(len(batch.rows))
                pattern = seen[pattern_site][rows, :, batch.decision]
                axes = "prompt head key, prompt key d -> prompt head d"
                x = einops.einsum(pattern, seen["input"], axes)
                read.append((x, seen[site][rows, batch.decision]))
        order = torch.argsort(torch.cat([batch.rows for batch in batches]))
        x, z = (torch.cat(part)[order] for part in zip(*read, strict=True))
        return cls(layer, x, z)

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
                f"heads {heads} of layer {self.layer} read the same on every prompt: change other "
                "heads."
            )
        return strength * old / new * content


def _cross(
    one: Float[Tensor, "prompt head i"], other: Float[Tensor, "prompt head j"]
) -> Float[Tensor, "head i j"]:
    return einops.einsum(one, other, "prompt head i, prompt head j -> head i j")


def _unit(conditions: Float[Tensor, "head d_model condition"]) -> Tensor:
    """The conditions of each head at one size, so that none is lost among larger ones."""
    size = conditions.norm(dim=(1, 2), keepdim=True)
    return conditions / size.where(size > 0, 1.0)
