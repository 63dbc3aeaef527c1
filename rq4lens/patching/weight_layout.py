"""Weights stored the way TransformerLens multiplies with them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from torch import Tensor, nn
from transformer_lens.components import AbstractAttention, GatedMLP, Unembed

_HEADS_LAST = ("W_Q", "W_K", "W_V", "_W_K", "_W_V")


def store_for_products(parts: Iterable[nn.Module]) -> None:
    """Reorder weights in memory so that no forward pass has to copy them.

    TransformerLens' submodules transpose their weights with ``.T.contiguous()`` or einops at every
    call, a copy of the whole weight. A weight that already lies in memory in that order is used as
    it is. Values, shapes, names and results stay the same to the bit; only strides change.

    Args:
        parts: blocks and unembeddings, whose weights are stored anew, one at a time. It pays where
            they are used more than once.
    """
    for module in chain.from_iterable(part.modules() for part in parts):
        if isinstance(module, AbstractAttention):
            _store_attention(module)
        elif isinstance(module, GatedMLP):
            for weight in (module.W_gate, module.W_in, module.W_out):
                _store(weight, (1, 0))
        elif isinstance(module, Unembed):
            _store(module.W_U, (1, 0))


def _store_attention(attn: AbstractAttention) -> None:
    weights = dict(attn.named_parameters(recurse=False))
    for name in _HEADS_LAST:
        if name in weights:
            _store(weights[name], (0, 2, 1))
    _store(weights["W_O"], (2, 0, 1))


def _store(weight: nn.Parameter | Tensor, order: tuple[int, ...]) -> None:
    """Let the axes lie in memory in the given order, outermost first."""
    if weight.ndim == len(order):
        inverse = tuple(order.index(axis) for axis in range(len(order)))
        weight.data = weight.data.permute(order).contiguous().permute(inverse)
