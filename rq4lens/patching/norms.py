"""Norm modules by torch's fused kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens.components import LayerNorm, RMSNorm


@contextmanager
def fused_norms(part: nn.Module, *, half_only: bool = False) -> Iterator[None]:
    """Let norm modules compute by torch's fused kernel of the same function when they are called.

    TransformerLens' own forward passes over the rows nine times: 0.79 ms against 0.08 ms for 14,700
    rows of 4,096 bf16 values on an H200, where norms would take a tenth of a scan over all heads.
    A module that someone listens to, or of another kind, runs as it is.

    Args:
        part: a model or some of its modules; afterwards they are as they were.
        half_only: leave float32 modules alone, so that what is captured is what they give to the
            bit.
    """
    chosen = [
        module
        for module in part.modules()
        if _is_plain(module) and (_is_half(module) or not half_only)
    ]
    for norm in chosen:
        norm.forward = partial(_fused, norm)
    try:
        yield
    finally:
        for norm in chosen:
            del norm.forward


def _is_plain(norm: Any) -> bool:
    # A forward of its own: an outer context has seen to it, or somebody else has.
    if type(norm) not in {RMSNorm, LayerNorm} or "forward" in vars(norm):
        return False
    points = (norm.hook_scale, norm.hook_normalized)
    return not any(point.fwd_hooks or point.bwd_hooks for point in points)


def _is_half(norm: Any) -> bool:
    return norm.cfg.dtype in {torch.float16, torch.bfloat16}


def _fused(norm: Any, rows: Float[Tensor, "*rows d_model"]) -> Tensor:
    if isinstance(norm, RMSNorm):
        return functional.rms_norm(rows, norm.w.shape, norm.w, norm.eps)
    return functional.layer_norm(rows, norm.w.shape, norm.w, norm.b, norm.eps)
