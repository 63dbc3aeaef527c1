"""The Triton kernel of :func:`rq4lens.patching.patch.summed_by_tensors`."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.language.extra import libdevice

BLOCK = 1024
"""Logits that one program reads at a time."""


@no_type_check
@triton.jit(do_not_specialize=["n_rows"])
def _sums(
    patched,
    clean,
    q,
    answer,
    p,
    excess,
    moment,
    pull,
    n_rows,
    n_vocab,
    TILTED: tl.constexpr,
    PULLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a row. Offsets in 64 bits: rows times vocabulary exceeds 2^31.
    row = tl.program_id(0).to(tl.int64)
    prompt = row // n_rows
    patched += row * n_vocab
    clean += prompt * n_vocab
    q += prompt * n_vocab
    p += prompt * n_vocab
    best = tl.load(answer + prompt)
    at_best = tl.load(patched + best).to(tl.float32) - tl.load(clean + best)
    excesses = tl.zeros([BLOCK], tl.float32)
    moments = tl.zeros([BLOCK], tl.float32)
    pulls = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < n_vocab
        logits = tl.load(patched + token, mask=inside, other=0).to(tl.float32)
        delta = logits - tl.load(clean + token, mask=inside, other=0) - at_best
        delta = tl.where(inside, delta, 0)
        weight = tl.load(q + token, mask=inside, other=0)
        gained = weight * libdevice.expm1(delta)
        excesses += gained
        if TILTED:
            moments += (gained + weight) * delta
        else:
            moments += weight * delta
        if PULLED:
            pulls += tl.load(p + token, mask=inside, other=0) * delta
    tl.store(excess + row, tl.sum(excesses))
    tl.store(moment + row, tl.sum(moments))
    if PULLED:
        tl.store(pull + row, tl.sum(pulls))


def summed_by_kernel(
    patched: Float[Tensor, "prompt row vocab"],
    clean: Float[Tensor, "prompt 1 vocab"],
    q: Float[Tensor, "prompt 1 vocab"],
    answer: Int[Tensor, "prompt 1 1"],
    p: Float[Tensor, "prompt 1 vocab"] | None = None,
    *,
    tilted: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sums, each logit read once."""
    n_prompts, n_rows, n_vocab = patched.shape
    sums = torch.empty(3, n_prompts, n_rows, dtype=torch.float32, device=patched.device)
    tensors = (patched, clean, q, answer, q if p is None else p)
    with torch.cuda.device(patched.device):
        _sums[(n_prompts * n_rows,)](
            *(tensor.contiguous() for tensor in tensors),
            *sums.unbind(),
            n_rows,
            n_vocab,
            TILTED=tilted,
            PULLED=p is not None,
            BLOCK=BLOCK,
        )
    return sums[0], sums[1], None if p is None else sums[2]
