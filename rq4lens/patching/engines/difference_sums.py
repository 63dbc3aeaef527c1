"""The two sums over the vocabulary that every measured row needs."""

from __future__ import annotations

import logging
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

logger = logging.getLogger(__name__)

Rows = Float[Tensor, "prompt row"]


def difference_sums(
    patched: Float[Tensor, "prompt row vocab"],
    clean: Float[Tensor, "prompt 1 vocab"],
    q: Float[Tensor, "prompt 1 vocab"],
    answer: Int[Tensor, "prompt 1 1"],
    *,
    tilted: bool,
    by_kernel: bool,
) -> tuple[Rows, Rows]:
    """``Σ q (exp(δ) - 1)`` and ``Σ w δ``, where ``δ`` is the difference of the logits.

    ``δ`` counts from its value at the answer, so both sums are small where the effect is small.
    The kernel reads each logit once; as tensor operations they pass through memory fourteen times,
    a seventh of a scan where the vocabulary is large.
    """
    if (
        by_kernel
        and patched.is_cuda
        and _kernel_works(patched.device, patched.dtype, clean.dtype, patched.shape[-1])
    ):
        from rq4lens.patching.engines.difference_kernel import summed_by_kernel  # noqa: PLC0415

        return summed_by_kernel(patched, clean, q, answer, tilted=tilted)
    return summed_by_tensors(patched, clean, q, answer, tilted=tilted)


@cache
def _kernel_works(
    device: torch.device, dtype: torch.dtype, precise: torch.dtype, n_vocab: int
) -> bool:
    """Whether the kernel can be built here: it takes Triton and a C compiler."""
    if precise != torch.float32:
        return False
    try:
        from rq4lens.patching.engines.difference_kernel import summed_by_kernel  # noqa: PLC0415

        row = torch.zeros(1, 1, n_vocab, device=device)
        summed_by_kernel(row.to(dtype), row, row, row[..., :1].long(), tilted=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # Triton raises errors of many kinds; the other way is exact too
        logger.warning(
            "divergences are summed without the GPU kernel, which is slower but as exact (%s: %s)",
            type(problem).__name__,
            problem,
        )
        return False
    return True


def summed_by_tensors(
    patched: Float[Tensor, "prompt row vocab"],
    clean: Float[Tensor, "prompt 1 vocab"],
    q: Float[Tensor, "prompt 1 vocab"],
    answer: Int[Tensor, "prompt 1 1"],
    *,
    tilted: bool,
) -> tuple[Rows, Rows]:
    """:func:`difference_sums` as tensor operations, for any device and precision."""
    delta = patched - clean
    delta -= delta.take_along_dim(answer, -1)
    gained = delta.expm1().mul_(q)
    excess = gained.sum(-1)
    if tilted:
        return excess, gained.add_(q).mul_(delta).sum(-1)
    return excess, delta.mul_(q).sum(-1)
