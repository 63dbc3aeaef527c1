"""Forward passes over padded prompts, and what is read of them on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from rq4lens.models.load.devices import copied_once
from rq4lens.models.load.lens import (
    HookedModel,
    HookedTransformer,
    HookPoint,
    Unembed,
    apply_softcap,
    z_site,
)
from rq4lens.models.prompts.prompt_set import Places, TokenBatch
from rq4lens.patching.engines.layout import Steps, fused

Reader = Callable[[Tensor], None]
"""Takes the activations that pass a hook point."""


def reader_at(places: Places) -> Callable[[Tensor], Tensor]:
    """A function that reads those places of activations, on whichever device they are.

    What a prompt lacks reads as 0.
    """
    prompts = copied_once(torch.arange(len(places.at))[:, None])
    at, absent = copied_once(places.at), copied_once(~places.there)
    every_there = bool(places.there.all())

    def read(value: Float[Tensor, "prompt pos *site"]) -> Float[Tensor, "prompt place *site"]:
        found = value[prompts(value.device), at(value.device)]
        if every_there:
            return found
        hidden = absent(value.device).reshape(*places.at.shape, *(1,) * (found.ndim - 2))
        return found.masked_fill(hidden, 0)

    return read


def forward_batch(
    model: HookedModel, batch: TokenBatch, stop_at_layer: int | None = None
) -> Tensor:
    """One forward pass over a padded batch.

    Right padding needs no mask: a causal model's earlier positions cannot see it. The padding side
    is named so that TransformerLens does not derive a mask from the tokenizer's own setting. After
    its last block a bridge does not stop: it ends with logits.
    """
    if stop_at_layer == model.cfg.n_layers and not isinstance(model, HookedTransformer):
        stop_at_layer = None
    left = batch.padding_side == "left"
    return model(
        batch.tokens.to(device_of(model)),
        attention_mask=batch.attention_mask.to(device_of(model)) if left else None,
        padding_side=batch.padding_side,
        stop_at_layer=stop_at_layer,
    )


def forward_steps(
    model: HookedModel, batch: TokenBatch, stop_at_layer: int, readers: Mapping[int, Reader]
) -> Steps[Tensor]:
    """:func:`forward_batch`, stopping before each block if the model is spread over devices."""
    devices = [next(block.parameters()).device for block in model.blocks]
    if len(set(devices)) == 1 or batch.padding_side == "left":
        yield device_of(model)
        # TransformerLens passes the hook point by its name.
        hooks = [
            (z_site(layer), lambda z, hook, read=read: read(z))  # noqa: ARG005
            for layer, read in readers.items()
        ]
        with model.hooks(fwd_hooks=hooks):
            return forward_batch(model, batch, stop_at_layer)
    resid = forward_batch(model, batch, stop_at_layer=0)
    for layer, block in enumerate(model.blocks[:stop_at_layer]):
        yield devices[layer]
        # A hook is there while its own batch is computed: another one may be under way.
        with reading(block.attn.hook_z, readers.get(layer)):
            resid = block(resid.to(devices[layer]))
    return resid


@contextmanager
def reading(point: HookPoint, read: Reader | None) -> Iterator[None]:
    """Give what passes a hook point to a reader.

    By a hook of torch's own on the one point: setting and lifting those of TransformerLens visits
    every point of the model, which takes longer than a GPU takes for the block.
    """
    if read is None:
        yield
        return
    with point.register_forward_hook(lambda _point, _inputs, value: read(value)):
        yield


def device_of(model: HookedModel) -> torch.device:
    """The device that the model's input goes to."""
    return next(model.parameters()).device


def unembed(
    model: HookedModel, resid: Float[Tensor, "prompt *row d_model"]
) -> Float[Tensor, "prompt *row vocab"]:
    """Logits of the residual stream after the last block; a bridge's pass ends with them."""
    if not isinstance(model, HookedTransformer):
        return resid
    if model.cfg.normalization_type is not None:
        with fused([model.ln_final]):
            resid = model.ln_final(resid)
    return apply_softcap(_logits(model.unembed, resid), model.cfg.output_logits_soft_cap)


LARGEST_PRODUCT = 2**31
"""Numbers that a product on a GPU gives at once: for more, libraries take a slower kernel."""


def _logits(
    unembed: Unembed, resid: Float[Tensor, "prompt *row d_model"]
) -> Float[Tensor, "prompt *row vocab"]:
    shape = (*resid.shape[:-1], unembed.W_U.shape[1])
    n_rows = max(1, LARGEST_PRODUCT // shape[-1])
    derived = torch.is_grad_enabled() or forward_ad.unpack_dual(resid).tangent is not None
    if not resid.is_cuda or prod(shape[:-1]) <= n_rows or derived:
        return unembed(resid)
    logits = resid.new_empty(shape)
    parts = (tensor.flatten(0, -2).split(n_rows) for tensor in (resid, logits))
    for rows, into in zip(*parts, strict=True):
        torch.addmm(unembed.b_U, rows, unembed.W_U, out=into)
    return logits


def precise_dtype(model: HookedModel) -> torch.dtype:
    """The number format of a model's probabilities: float32, or its own if that is more precise."""
    return torch.promote_types(torch.float32, model.cfg.dtype)
