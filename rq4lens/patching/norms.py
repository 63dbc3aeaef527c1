"""Norm modules by torch's fused kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from transformer_lens.components import LayerNorm, RMSNorm


def normed(norm: Any, rows: Float[Tensor, "*rows d_model"]) -> Tensor:
    """What a norm module returns, by torch's fused kernel where that is the same function.

    TransformerLens' own forward passes over the rows nine times: 0.79 ms against 0.08 ms for 14,700
    rows of 4,096 bf16 values on an H200, where norms would take a tenth of a scan over all heads.
    A module that someone listens to, or of another kind, is called as it is; so is every module
    when a forward-mode derivative is taken, where the fused kernel gives a half-precision row a
    tangent in float32 on a GPU, which no later product accepts.

    Args:
        norm: a norm module of a model.
        rows: what it reads.

    Returns:
        What it returns.
    """
    has_tangent = forward_ad.unpack_dual(rows).tangent is not None
    return norm(rows) if has_tangent or not _is_plain(norm) else _fused(norm, rows)


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """Let the forward pass of a half-precision model use :func:`normed` for its norm modules.

    In float32 its modules run as they are, and what is captured is what they give to the bit.

    Args:
        model: a model; afterwards its modules are as they were.
    """
    plain = [module for module in model.modules() if _is_plain(module) and _is_half(module)]
    for norm in plain:
        norm.forward = partial(_fused, norm)
    try:
        yield
    finally:
        for norm in plain:
            del norm.forward


def _is_plain(norm: Any) -> bool:
    if type(norm) not in {RMSNorm, LayerNorm}:
        return False
    points = (norm.hook_scale, norm.hook_normalized)
    return not any(point.fwd_hooks or point.bwd_hooks for point in points)


def _is_half(norm: Any) -> bool:
    return norm.cfg.dtype in {torch.float16, torch.bfloat16}


def _fused(norm: Any, rows: Float[Tensor, "*rows d_model"]) -> Tensor:
    if isinstance(norm, RMSNorm):
        return functional.rms_norm(rows, norm.w.shape, norm.w, norm.eps)
    return functional.layer_norm(rows, norm.w.shape, norm.w, norm.b, norm.eps)
