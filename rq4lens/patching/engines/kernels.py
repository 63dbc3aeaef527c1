"""Triton kernels, each of a function that is computed with plain tensors elsewhere.

:func:`summed_by_kernel` is :func:`rq4lens.patching.patch.summed_by_tensors`,
:func:`attended_by_kernel` what :mod:`rq4lens.patching.engines.block_row` does between a row's
queries and its ``z``.
"""

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


TILE = 32
"""Rows (condition x query head) that one program attends from, and keys that it reads at a time."""

WARPS = 4


@no_type_check
@triton.jit(do_not_specialize=["n_conditions", "n_columns", "n_tiles"])
def _attended(
    q,
    k,
    v,
    keys,
    values,
    bias,
    rotation,
    z,
    n_conditions,
    n_columns,
    n_tiles,
    scale,
    N_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    N_POSITIONS: tl.constexpr,
    D_HEAD: tl.constexpr,
    BIASED: tl.constexpr,
    ROTATED: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program for some rows of a prompt, key head and position: they share keys and a rotation.
    tile = tl.program_id(0) % n_tiles
    at = tl.program_id(0) // n_tiles
    position = at % N_POSITIONS
    kv_head = at // N_POSITIONS % N_KV_HEADS
    prompt = (at // (N_POSITIONS * N_KV_HEADS)).to(tl.int64)
    row = tile * TILE + tl.arange(0, TILE)
    condition, member = row // GROUP, row % GROUP
    inside = (row < n_conditions * GROUP)[:, None]
    d = tl.arange(0, D_HEAD)[None, :]
    first = (prompt * n_conditions + condition) * N_POSITIONS
    query_head = ((first + position) * N_KV_HEADS + kv_head) * GROUP + member
    query = tl.load(q + query_head[:, None] * D_HEAD + d, mask=inside, other=0)
    spot = prompt * N_POSITIONS + position
    bias += spot * n_columns
    if ROTATED:
        square = tl.arange(0, D_HEAD)[:, None] * D_HEAD + d
        query = tl.dot(query, tl.load(rotation + spot * D_HEAD * D_HEAD + square)).to(query.dtype)
    # A row always sees itself, so its sums begin with its own key and never divide by nothing.
    itself = ((first + position) * N_KV_HEADS + kv_head)[:, None] * D_HEAD + d
    own_key = tl.load(k + itself, mask=inside, other=0).to(tl.float32)
    highest = tl.sum(query.to(tl.float32) * own_key, 1) * scale
    total = tl.full([TILE], 1, tl.float32)
    gathered = tl.load(v + itself, mask=inside, other=0).to(tl.float32)
    for own in range(0, position):
        before = ((first + own) * N_KV_HEADS + kv_head)[:, None] * D_HEAD + d
        own_key = tl.load(k + before, mask=inside, other=0).to(tl.float32)
        score = tl.sum(query.to(tl.float32) * own_key, 1) * scale
        if BIASED:
            score += tl.load(bias + n_columns - N_POSITIONS + own).to(tl.float32)
        now = tl.maximum(highest, score)
        kept, weight = tl.exp(highest - now), tl.exp(score - now)
        own_value = tl.load(v + before, mask=inside, other=0).to(tl.float32)
        gathered = gathered * kept[:, None] + own_value * weight[:, None]
        total = total * kept + weight
        highest = now
    shared = (prompt * N_KV_HEADS + kv_head) * n_columns
    for start in range(0, n_columns - N_POSITIONS, TILE):
        column = start + tl.arange(0, TILE)
        there = column < n_columns - N_POSITIONS
        place = (shared + column)[:, None] * D_HEAD + d
        key = tl.load(keys + place, mask=there[:, None], other=0)
        score = tl.dot(query, tl.trans(key)) * scale
        if BIASED:
            score += tl.load(bias + column, mask=there, other=0).to(tl.float32)[None, :]
        score = tl.where(there[None, :], score, -float("inf"))
        now = tl.maximum(highest, tl.max(score, 1))
        kept, weight = tl.exp(highest - now), tl.exp(score - now[:, None])
        value = tl.load(values + place, mask=there[:, None], other=0)
        gathered = gathered * kept[:, None] + tl.dot(weight.to(value.dtype), value)
        total = total * kept + tl.sum(weight, 1)
        highest = now
    found = (gathered / total[:, None]).to(query.dtype)
    tl.store(z + query_head[:, None] * D_HEAD + d, found, mask=inside)


def attended_by_kernel(
    q: Float[Tensor, "prompt condition position head d_head"],
    k: Float[Tensor, "prompt condition position kv_head d_head"],
    v: Float[Tensor, "prompt condition position kv_head d_head"],
    keys: Float[Tensor, "prompt kv_head key d_head"],
    values: Float[Tensor, "prompt kv_head key d_head"],
    bias: Float[Tensor, "prompt 1 1 1 position key"] | None,
    rotation: Float[Tensor, "prompt position d_head d_head"] | None,
    *,
    scale: float,
) -> Float[Tensor, "prompt condition position head d_head"]:
    """The values that rows gather over shared keys and their own, in one pass over the rows.

    Scores and sums are in float32, whatever the rows are in.

    Args:
        q: queries; ``rotation`` is still to be applied to them.
        k: the rows' own keys, as queries meet them.
        v: the rows' own values.
        keys: keys of the positions before, and a column for each own key.
        values: their values.
        bias: what is added to the scores of all heads.
        rotation: what the rotary embedding does to queries at each position.
        scale: factor of the scores.
    """
    n_prompts, n_conditions, n_positions, n_heads, d_head = q.shape
    n_kv_heads, n_columns = keys.shape[1:3]
    group = n_heads // n_kv_heads
    n_tiles = triton.cdiv(n_conditions * group, TILE)
    tensors = [q, k, v, keys, values, *(q if each is None else each for each in (bias, rotation))]
    z = torch.empty_like(q, memory_format=torch.contiguous_format)
    with torch.cuda.device(q.device):
        _attended[(n_prompts * n_kv_heads * n_positions * n_tiles,)](
            *(tensor.contiguous() for tensor in tensors),
            z,
            n_conditions,
            n_columns,
            n_tiles,
            scale,
            N_KV_HEADS=n_kv_heads,
            GROUP=group,
            N_POSITIONS=n_positions,
            D_HEAD=d_head,
            BIASED=bias is not None,
            ROTATED=rotation is not None,
            TILE=TILE,
            num_warps=WARPS,
        )
    return z
