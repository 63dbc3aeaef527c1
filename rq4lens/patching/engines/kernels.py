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


ROWS = 64
"""Rows (condition x position x query head of a group) that one program attends from."""

KEYS = 16
"""Keys that it reads at a time."""

WARPS = 4


@no_type_check
@triton.jit
def _turned(heads, cos, sin, partner, at, inside, D_HEAD: tl.constexpr):
    """Queries or keys as the rotary embedding turns them at their positions."""
    d = tl.arange(0, D_HEAD)
    # A product with a permutation brings each number's partner to its place, unrounded.
    swap = (d[:, None] == tl.load(partner + d)[None, :]).to(heads.dtype)
    at = at[:, None] * D_HEAD + d[None, :]
    kept = heads.to(tl.float32) * tl.load(cos + at, mask=inside, other=0).to(tl.float32)
    added = tl.dot(heads, swap) * tl.load(sin + at, mask=inside, other=0).to(tl.float32)
    return (kept + added).to(heads.dtype)


@no_type_check
@triton.jit
def _gather(highest, total, z, query, key, value, seen, scale):
    """More keys and values into a softmax that is under way."""
    score = tl.where(seen, tl.dot(query, tl.trans(key)) * scale, -float("inf"))
    now = tl.maximum(highest, tl.max(score, 1))
    kept, weight = tl.exp(highest - now), tl.exp(score - now[:, None])
    z = z * kept[:, None] + tl.dot(weight.to(value.dtype), value)
    return now, total * kept + tl.sum(weight, 1), z


@no_type_check
@triton.jit(do_not_specialize=["n_own", "n_columns", "n_tiles", "window"])
def _attended(
    q,
    k,
    v,
    keys,
    values,
    n_before,
    cos,
    sin,
    partner,
    z,
    n_own,
    n_columns,
    n_tiles,
    window,
    scale,
    N_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    N_POSITIONS: tl.constexpr,
    D_HEAD: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    # One program for some rows of a prompt and key head. A row's own key is one of n_own, which
    # lie in the order of conditions and, within one, of positions. Here they are counted from the
    # first that the tile sees: the first of its first row's condition.
    tile = tl.program_id(0) % n_tiles
    kv_head = tl.program_id(0) // n_tiles % N_KV_HEADS
    prompt = (tl.program_id(0) // (n_tiles * N_KV_HEADS)).to(tl.int64)
    first = tile * ROWS // GROUP // N_POSITIONS * N_POSITIONS
    row = tile * ROWS + tl.arange(0, ROWS)
    itself, member = row // GROUP - first, row % GROUP
    position, condition = itself % N_POSITIONS, itself // N_POSITIONS
    inside = (itself < n_own - first)[:, None]
    d = tl.arange(0, D_HEAD)[None, :]
    start_own = ((prompt * n_own + first) * N_KV_HEADS + kv_head) * D_HEAD
    start_shared = (prompt * N_KV_HEADS + kv_head) * n_columns * D_HEAD
    start_turns = prompt * N_POSITIONS * D_HEAD
    q, z = q + start_own * GROUP, z + start_own * GROUP
    k, v = k + start_own, v + start_own
    keys, values = keys + start_shared, values + start_shared
    cos, sin = cos + start_turns, sin + start_turns
    place = (itself * (N_KV_HEADS * GROUP) + member)[:, None] * D_HEAD + d
    query = tl.load(q + place, mask=inside, other=0)
    if ROTATED:
        query = _turned(query, cos, sin, partner, position, inside, D_HEAD)
    # Finite, so that keys of which a row sees none leave no NaN.
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    gathered = tl.zeros([ROWS, D_HEAD], tl.float32)
    before = tl.load(n_before + prompt).to(tl.int32)
    for start in range(0, before, KEYS):
        column = start + tl.arange(0, KEYS)
        there = column < before
        at = column[:, None] * D_HEAD + d
        key = tl.load(keys + at, mask=there[:, None], other=0)
        value = tl.load(values + at, mask=there[:, None], other=0)
        seen = there[None, :]
        if WINDOWED:
            seen = seen & (column[None, :] > (before + position - window)[:, None])
        highest, total, gathered = _gather(highest, total, gathered, query, key, value, seen, scale)
    end = tl.minimum((tile * ROWS + ROWS - 1) // GROUP + 1, n_own) - first
    for start in range(0, end, KEYS):
        own = start + tl.arange(0, KEYS)
        there = (own < end)[:, None]
        at = own[:, None] * (N_KV_HEADS * D_HEAD) + d
        key = tl.load(k + at, mask=there, other=0)
        if ROTATED:
            key = _turned(key, cos, sin, partner, own % N_POSITIONS, there, D_HEAD)
        value = tl.load(v + at, mask=there, other=0)
        behind = itself[:, None] - own[None, :]
        seen = (own // N_POSITIONS == condition[:, None]) & (behind >= 0)
        if WINDOWED:
            seen = seen & (behind < window)
        highest, total, gathered = _gather(highest, total, gathered, query, key, value, seen, scale)
    found = (gathered / total[:, None]).to(query.dtype)
    tl.store(z + place, found, mask=inside)


def attended_by_kernel(
    q: Float[Tensor, "prompt condition position head d_head"],
    k: Float[Tensor, "prompt condition position kv_head d_head"],
    v: Float[Tensor, "prompt condition position kv_head d_head"],
    keys: Float[Tensor, "prompt kv_head key d_head"],
    values: Float[Tensor, "prompt kv_head key d_head"],
    n_before: Int[Tensor, "prompt"],
    rotation: Float[Tensor, "prompt position d_head rotated"] | None,
    *,
    scale: float,
    window: int | None,
) -> Float[Tensor, "prompt condition position head d_head"]:
    """The values that rows gather over shared keys and their own, in one pass over the rows.

    Scores and sums are in float32, whatever the rows are in.

    Args:
        q: queries; ``rotation`` is still to be applied to them.
        k: the rows' own keys, likewise.
        v: the rows' own values.
        keys: keys of the positions before; those of each prompt come first.
        values: their values.
        n_before: how many positions each prompt has before the rows' own.
        rotation: what the rotary embedding does at each position.
        scale: factor of the scores.
        window: how many positions are attended to, with the row's own; None: all.
    """
    n_prompts, n_conditions, n_positions, n_heads, d_head = q.shape
    n_kv_heads, n_columns = keys.shape[1:3]
    group, n_own = n_heads // n_kv_heads, n_conditions * n_positions
    n_tiles = triton.cdiv(n_own * group, ROWS)
    turns = (q, q, q) if rotation is None else _turns(rotation)
    z = torch.empty_like(q, memory_format=torch.contiguous_format)
    with torch.cuda.device(q.device):
        _attended[(n_prompts * n_kv_heads * n_tiles,)](
            *(tensor.contiguous() for tensor in (q, k, v, keys, values, n_before, *turns)),
            z,
            n_own,
            n_columns,
            n_tiles,
            window or 0,
            scale,
            N_KV_HEADS=n_kv_heads,
            GROUP=group,
            N_POSITIONS=n_positions,
            D_HEAD=d_head,
            WINDOWED=window is not None,
            ROTATED=rotation is not None,
            ROWS=ROWS,
            KEYS=KEYS,
            num_warps=WARPS,
        )
    return z


def _turns(
    rotation: Float[Tensor, "prompt position d_head rotated"],
) -> tuple[
    Float[Tensor, "prompt position rotated"],
    Float[Tensor, "prompt position rotated"],
    Int[Tensor, "rotated"],
]:
    """A rotary embedding turns pairs: the share kept, the partner's share, and who that is."""
    cos = rotation.diagonal(dim1=-2, dim2=-1)
    others = rotation - torch.diag_embed(cos)
    partner = others.abs().amax((0, 1)).argmax(0)
    sin = others.gather(-2, partner.expand(*others.shape[:2], 1, -1)).squeeze(-2)
    return cos, sin, partner
