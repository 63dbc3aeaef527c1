"""A block as rows at the decision token pass it, over keys and values that all rows share.

Norms, the MLP and the projections are the model's own submodules; only the order of the calls,
which TransformerLens keeps inside ``forward``, is repeated here.

Source: the call order of ``TransformerBlock.forward`` in TransformerLens 3.9.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from rq4lens.models.load.lens import (
    POST_NORM_ARCHITECTURES,
    ModelConfig,
    TransformerBlock,
    apply_softcap,
)


def attention_bias(
    attn: Any, lengths: Int[Tensor, "prompt"], n_positions: int, n_columns: int
) -> Float[Tensor, "prompt #kv_head #group 1 position key"] | None:
    """What is added to the scores of the last positions of each prompt."""
    first = rearrange(lengths - n_positions, "prompt -> prompt 1")
    own = first + torch.arange(n_positions)
    before = torch.arange(n_columns - n_positions).expand(len(lengths), -1)
    key_at = torch.cat([before, own], dim=1)[:, None, :]
    distance = key_at - own[:, :, None]
    unseen = torch.cat([before >= first, torch.zeros_like(own, dtype=torch.bool)], dim=1)[
        :, None, :
    ]
    hidden = (distance > 0) | unseen
    if attn.attn_type == "local":
        hidden = hidden | (distance <= -attn.cfg.window_size)
    alibi = attn.cfg.positional_embedding_type == "alibi"
    if not alibi and not hidden.any():
        return None
    bias = rearrange(distance, "prompt position key -> prompt 1 1 1 position key")
    slopes = attn.create_alibi_multipliers(attn.cfg.n_heads) if alibi else torch.zeros(1)
    n_kv_heads = (attn.cfg.n_key_value_heads or attn.cfg.n_heads) if alibi else 1
    slopes = rearrange(slopes, "(kv_head group) -> kv_head group 1 1 1", kv_head=n_kv_heads)
    hidden = rearrange(hidden, "prompt position key -> prompt 1 1 1 position key")
    bias = (slopes * bias).masked_fill(hidden, -torch.inf)
    return bias if alibi else bias.to(attn.cfg.dtype)


WHOLE_VECTOR_QK_NORM = frozenset({"OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM"})
"""Architectures that normalise queries and keys before they are cut into heads."""


@dataclass(frozen=True)
class SharedKeys:
    """Keys and values of the positions before the patched ones, as a row's query meets them.

    The last columns (one per patched position) belong to the row's own keys: they hold zeros here.
    Keys are normed, clipped and rotated, values clipped. Where :func:`turn_to_decision` has moved
    the rotation of the query into the keys, a row's own key is only scaled by ``own_scale``.
    ``position_mask`` has ones for the prompt's tokens, aligned to the right; it tells the rotary
    embedding at which positions the rows stand.
    """

    keys: Float[Tensor, "prompt kv_head key d_head"]
    values: Float[Tensor, "prompt kv_head key d_head"]
    bias: Float[Tensor, "prompt #kv_head #group 1 position key"] | None
    position_mask: Int[Tensor, "prompt pos"]
    own_scale: Float[Tensor, "prompt 1 1 1 d_head"] | None = None


Pattern = Float[Tensor, "prompt kv_head group condition position key"]
"""Attention of rows over the columns of :class:`SharedKeys`."""


def turn_to_decision(attn: Any, shared: SharedKeys) -> SharedKeys:
    """Rotate the shared keys once, so that no query at the decision token has to be rotated.

    The rotation at one position is a linear map ``R``, the same for all rows of a prompt, and a
    score is ``(q R)·k = q·(k Rᵀ)``. With its own key a row scores ``(q R)·(k R) = q·(k s)``, where
    ``s``, the diagonal of ``R Rᵀ``, is 1 up to rounding and the attention factor of YaRN.
    """
    keys = shared.keys
    rotation = _rotations(attn, keys, shared.position_mask, 1)[:, 0]
    turned = einsum(
        keys,
        rotation,
        "prompt kv_head key rotated, prompt d_head rotated -> prompt kv_head key d_head",
    )
    # In float32 or better: half precision would round a sum that is nearly 1 up to 1/128 away.
    precise = rotation.to(torch.promote_types(keys.dtype, torch.float32))
    scale = precise.square().sum(-1).to(keys.dtype)
    own_scale = rearrange(scale, "prompt d_head -> prompt 1 1 1 d_head")
    return replace(shared, keys=turned, own_scale=own_scale)


def row_z(
    block: TransformerBlock,
    resid: Float[Tensor, "prompt condition position d_model"],
    shared: SharedKeys,
) -> Float[Tensor, "prompt condition position head d_head"]:
    """Head activations of rows that a lower patch has changed."""
    return gathered(*row_attention(block, resid, shared), shared)


def row_z_by_kernel(
    block: TransformerBlock,
    resid: Float[Tensor, "prompt condition position d_model"],
    shared: SharedKeys,
) -> Float[Tensor, "prompt condition position head d_head"]:
    """The same by the kernel of :func:`kernel_covers`, which has no derivative."""
    from rq4lens.patching.engines.kernels import attended_by_kernel  # noqa: PLC0415

    (q, k, v), rotation = _heads(block, resid, shared)
    attn, n_before = block.attn, shared.position_mask.sum(-1) - q.shape[2]
    window = attn.cfg.window_size if attn.attn_type == "local" else None
    how: dict[str, Any] = {"scale": 1 / attn.attn_scale, "window": window}
    return attended_by_kernel(q, k, v, shared.keys, shared.values, n_before, rotation, **how)


def kernel_covers(cfg: ModelConfig) -> bool:
    """Whether the attention kernel computes what a model's attention does.

    It is for half precision, where float32 sums lose nothing; its tiles have powers of two as
    sides, and all heads of a prompt share a bias.
    """
    sides = cfg.d_head >= 16 and cfg.d_head & (cfg.d_head - 1) == 0
    plain = cfg.attn_scores_soft_cap <= 0 and cfg.positional_embedding_type != "alibi"
    return cfg.dtype in {torch.float16, torch.bfloat16} and sides and plain


def row_attention(
    block: TransformerBlock,
    resid: Float[Tensor, "prompt condition position d_model"],
    shared: SharedKeys,
) -> tuple[Pattern, Float[Tensor, "prompt condition position kv_head d_head"]]:
    """What rows attend to, and their own values."""
    (q, k, v), rotation = _heads(block, resid, shared)
    if rotation is not None:
        q, k = _rotate(q, rotation), _rotate(k, rotation)
    return _pattern(block.attn, q, k, shared).to(v.dtype), v


def _heads(
    block: TransformerBlock,
    resid: Float[Tensor, "prompt condition position d_model"],
    shared: SharedKeys,
) -> tuple[
    tuple[
        Float[Tensor, "prompt condition position head d_head"],
        Float[Tensor, "prompt condition position kv_head d_head"],
        Float[Tensor, "prompt condition position kv_head d_head"],
    ],
    Float[Tensor, "prompt position d_head rotated"] | None,
]:
    """Queries, keys and values of rows, and the rotation that the first two still lack, if any."""
    attn, n_conditions = block.attn, resid.shape[1]
    rows = attention_input(block, resid.flatten(1, 2))
    q, k, v = attn.calculate_qkv_matrices(rows, rows, rows)
    if attn.cfg.original_architecture in WHOLE_VECTOR_QK_NORM:
        q = attn.q_norm(q.flatten(-2)).reshape(q.shape)
        k = attn.k_norm(k.flatten(-2)).reshape(k.shape)
    limit = attn.cfg.clip_qkv
    if limit is not None:
        q, k, v = (heads.clamp(-limit, limit) for heads in (q, k, v))
    q, k, v = (heads.unflatten(1, (n_conditions, -1)) for heads in (q, k, v))
    if shared.own_scale is not None:
        return (q, k * shared.own_scale, v), None
    if attn.cfg.positional_embedding_type != "rotary":
        return (q, k, v), None
    return (q, k, v), _rotations(attn, q, shared.position_mask, q.shape[2])


def _rotations(
    attn: Any, like: Tensor, position_mask: Int[Tensor, "prompt pos"], n_positions: int
) -> Float[Tensor, "prompt position d_head rotated"]:
    """What the rotary embedding does at the last positions of each prompt, as matrices."""
    d_head = like.shape[-1]
    basis = torch.eye(d_head, dtype=like.dtype, device=like.device)
    basis = basis.expand(len(position_mask), n_positions, d_head, d_head)
    rotated: Tensor = attn.apply_rotary(basis, position_mask.shape[1] - n_positions, position_mask)
    return rotated


def _rotate(
    heads: Float[Tensor, "prompt condition position head d_head"],
    rotations: Float[Tensor, "prompt position d_head rotated"],
) -> Float[Tensor, "prompt condition position head d_head"]:
    # A product passes over the rows once, TransformerLens' own function seven times. All conditions
    # of a prompt stand at the same positions: to the rotation they are more heads.
    stacked = rearrange(
        heads, "prompt condition position head d_head -> prompt position (condition head) d_head"
    )
    return rearrange(
        stacked @ rotations,
        "prompt position (condition head) d_head -> prompt condition position head d_head",
        condition=heads.shape[1],
    )


OWN_ROWS = "prompt condition own kv_head d_head"
PER_HEAD = "prompt condition position (kv_head group) d_head"
WITH_SHARED = "prompt kv_head (group condition position)"
WITH_OWN = "(prompt condition kv_head) (group position)"
SIX = "prompt kv_head group condition position"
"""Two layouts of the same rows: for products with keys that all conditions of a prompt share, and
for products with a row's own key. Query heads that share a key head are rows of one product in
both, so keys are never repeated."""


def _pattern(
    attn: Any,
    q: Float[Tensor, "prompt condition position head d_head"],
    k: Float[Tensor, "prompt condition position kv_head d_head"],
    shared: SharedKeys,
) -> Pattern:
    sizes = {"condition": k.shape[1], "position": k.shape[2], "kv_head": k.shape[3]}
    q_own = rearrange(q, f"{PER_HEAD} -> {WITH_OWN} d_head", **sizes)
    scores = rearrange(q, f"{PER_HEAD} -> {WITH_SHARED} d_head", **sizes) @ shared.keys.mT
    scores = rearrange(scores, f"{WITH_SHARED} key -> {SIX} key", **sizes)
    k = rearrange(k, f"{OWN_ROWS} -> (prompt condition kv_head) d_head own")
    own = rearrange(q_own @ k, f"{WITH_OWN} own -> {SIX} own", **sizes)
    scores[..., -sizes["position"] :] = own
    # In place where it can be: these are the largest tensors of a model with many small heads.
    scores = apply_softcap(scores.div_(attn.attn_scale), attn.cfg.attn_scores_soft_cap)
    if shared.bias is not None:
        scores = scores.add_(shared.bias)
    return functional.softmax(scores, dim=-1)


def gathered(
    pattern: Pattern,
    v: Float[Tensor, "prompt condition position kv_head d_head"],
    shared: SharedKeys,
) -> Float[Tensor, "prompt condition position head d_head"]:
    """The values that rows gather by an attention."""
    sizes = {"condition": v.shape[1], "position": v.shape[2], "kv_head": v.shape[3]}
    z = pattern.flatten(2, 4) @ shared.values
    z = rearrange(z, f"{WITH_SHARED} d_head -> {WITH_OWN} d_head", **sizes)
    own = rearrange(pattern[..., -sizes["position"] :], f"{SIX} own -> {WITH_OWN} own")
    v = rearrange(v, f"{OWN_ROWS} -> (prompt condition kv_head) own d_head")
    z = torch.addcmul(z, own, v) if sizes["position"] == 1 else torch.baddbmm(z, own, v)
    return rearrange(z, f"{WITH_OWN} d_head -> {PER_HEAD}", **sizes)


def is_post_norm(block: TransformerBlock) -> bool:
    """Whether the block normalises what its sublayers return instead of what they read."""
    return block.cfg.original_architecture in POST_NORM_ARCHITECTURES


def attention_input(block: TransformerBlock, resid: Tensor) -> Tensor:
    """What the attention reads from the residual stream."""
    return resid if is_post_norm(block) else block.ln1(resid)


def finish_block(
    block: TransformerBlock,
    resid_pre: Float[Tensor, "prompt condition position d_model"],
    z: Float[Tensor, "prompt condition position head d_head"],
    written: Float[Tensor, "prompt condition position d_model"] | None = None,
) -> Float[Tensor, "prompt condition position d_model"]:
    """Everything in a block that comes after ``z``; ``written`` is added to what heads write."""
    shape = resid_pre.shape
    resid_pre = resid_pre.flatten(1, 2)
    # TransformerLens has no submodule for this product.
    W_O = rearrange(block.attn.W_O, "head d_head d_model -> d_model (head d_head)")
    z = z.flatten(-2).flatten(1, 2).to(W_O.dtype)
    attn_out = functional.linear(z, W_O, block.attn.b_O)
    if written is not None:
        attn_out += written.flatten(1, 2)
    if block.cfg.use_normalization_before_and_after:
        attn_out = block.ln1_post(attn_out)
    if is_post_norm(block):
        attn_out = block.ln1(attn_out)
    resid_mid = attn_out.add_(resid_pre)
    if block.cfg.parallel_attn_mlp:
        resid_mid = resid_mid.add_(block.apply_mlp(block.ln2(resid_pre)))
    elif not block.cfg.attn_only:
        mlp_in = resid_mid if is_post_norm(block) else block.ln2(resid_mid)
        resid_mid = block.apply_mlp(mlp_in).add_(resid_mid)
    return resid_mid.reshape(shape)
