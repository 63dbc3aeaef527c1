"""A model's layers as the engines run them: norms, weights, and batches on several devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from rq4lens.models.load.lens import (
    AbstractAttention,
    GatedMLP,
    HookPoint,
    LayerNorm,
    RMSNorm,
    Unembed,
)


@contextmanager
def fused(modules: Sequence[nn.Module], *, half_only: bool = False) -> Iterator[None]:
    """Let modules pass over the rows fewer times when they are called.

    Norms compute by torch's kernel of the same function; TransformerLens' own forward passes over
    the rows nine times. Gated MLPs multiply in place, which loses what a backward pass would need,
    and leave out a bias of zeros. A module that someone listens to, or of another kind, runs as it
    is.
    """
    chosen = [
        module
        for module in modules
        if _is_plain(module)
        and (not half_only or module.cfg.dtype in {torch.float16, torch.bfloat16})
    ]
    for module in chosen:
        module.forward = partial(FUSED[type(module)], module)
    try:
        yield
    finally:
        for module in chosen:
            del module.forward


def fusible(part: nn.Module) -> list[nn.Module]:
    """The modules that :func:`fused` knows; to look for them takes longer than to compute them."""
    return [
        module
        for module in part.modules()
        if type(module) in FUSED and not (isinstance(module, GatedMLP) and _adds_between(module))
    ]


def _adds_between(mlp: Any) -> bool:
    """Whether a gated MLP does more between its products than to multiply."""
    return bool(mlp.cfg.is_layer_norm_activation() or mlp.b_in.any())


def _is_plain(module: Any) -> bool:
    # A forward of its own: an outer context has seen to it, or somebody else has.
    if type(module) not in FUSED or "forward" in vars(module):
        return False
    return not any(
        point.fwd_hooks or point.bwd_hooks
        for point in module.children()
        if isinstance(point, HookPoint)
    )


def _fused_norm(norm: Any, rows: Float[Tensor, "*rows d_model"]) -> Tensor:
    if forward_ad.unpack_dual(rows).tangent is not None:
        # The fused kernels' derivative on a GPU is in float32, whatever the rows are in.
        return type(norm).forward(norm, rows)
    if isinstance(norm, RMSNorm):
        return functional.rms_norm(rows, norm.w.shape, norm.w, norm.eps)
    return functional.layer_norm(rows, norm.w.shape, norm.w, norm.b, norm.eps)


def _fused_mlp(mlp: Any, rows: Float[Tensor, "*rows d_model"]) -> Tensor:
    gate = mlp.act_fn(functional.linear(rows, mlp.W_gate.T))
    gated = gate.mul_(functional.linear(rows, mlp.W_in.T))
    return functional.linear(gated, mlp.W_out.T, mlp.b_out)


FUSED: dict[type, Callable[..., Tensor]] = {
    RMSNorm: _fused_norm,
    LayerNorm: _fused_norm,
    GatedMLP: _fused_mlp,
}
"""What modules of these types compute, in fewer passes."""


def store_for_products(parts: Iterable[nn.Module]) -> None:
    """Reorder weights in memory so that no forward pass has to copy them.

    TransformerLens' submodules transpose their weights with ``.T.contiguous()`` or einops at every
    call, a copy of the whole weight. A weight that already lies in memory in that order is used as
    it is. Values, shapes, names and results stay the same to the bit; only strides change.
    """
    for module in chain.from_iterable(part.modules() for part in parts):
        if isinstance(module, AbstractAttention):
            weights = dict(module.named_parameters(recurse=False))
            for name in ("W_Q", "W_K", "W_V", "_W_K", "_W_V"):
                if name in weights:
                    _store(weights[name], (0, 2, 1))
            _store(weights["W_O"], (2, 0, 1))
        elif isinstance(module, GatedMLP):
            for weight in (module.W_gate, module.W_in, module.W_out):
                _store(weight, (1, 0))
        elif isinstance(module, Unembed):
            _store(module.W_U, (1, 0))


def _store(weight: nn.Parameter | Tensor, order: tuple[int, ...]) -> None:
    """Let the axes lie in memory in the given order, outermost first."""
    if weight.ndim == len(order):
        inverse = tuple(order.index(axis) for axis in range(len(order)))
        weight.data = weight.data.permute(order).contiguous().permute(inverse)


T = TypeVar("T")

Steps = Generator[torch.device, None, T]
"""Work that stops before each block to say which device computes it, and ends with its result."""


def side_by_side(works: Iterable[Steps[T]]) -> Iterator[T]:
    """Do works so that every device has something to do.

    A device can be told about a thousand kernels ahead; then whoever tells it waits. Telling one
    all blocks of a batch would let the others run dry meanwhile. So works that are under way take
    turns, block by block, and the next one begins when the last one has left the first device. On a
    single device they come one after the other.
    """
    waiting, under_way = deque(works), deque[tuple[Steps[T], torch.device]]()
    entry: torch.device | None = None
    while waiting or under_way:
        if waiting and (not under_way or under_way[-1][1] != entry):
            work = waiting.popleft()
            entry = next(work)
            under_way.append((work, entry))
        for _ in range(len(under_way)):
            work, _ = under_way.popleft()
            try:
                under_way.append((work, next(work)))
            except StopIteration as end:
                yield end.value
