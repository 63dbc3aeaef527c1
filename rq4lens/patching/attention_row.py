"""The decision row through one block, over keys and values that all conditions share.

A patch at the decision token cannot change an earlier position, so every condition is one more
query row at the end of the same prompt. Everything with weights is the model's own submodule; only
the order of the calls, which TransformerLens keeps inside ``forward``, is repeated here.

Source: the call order of ``TransformerBlock.forward`` and ``AbstractAttention.forward`` in
TransformerLens 3.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens.components import TransformerBlock
from transformer_lens.utilities.activation_functions import apply_softcap
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

WHOLE_VECTOR_QK_NORM = frozenset({"OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM"})
"""Architectures that normalise queries and keys before they are cut into heads."""


@dataclass(frozen=True)
class SharedKeys:
    """Keys and values of the positions before the patched ones, as they are attended to.

    Args:
        keys: after query-key norm, clipping and rotation.
        values: after clipping.
        bias: added to the attention scores: the position bias, or minus infinity where a query
            must not look; None where it changes nothing.

    The last columns (one per patched position) belong to the row's own keys: they hold zeros here.
    """

    keys: Float[Tensor, "prompt kv_head key d_head"]
    values: Float[Tensor, "prompt kv_head key d_head"]
    bias: Float[Tensor, "prompt #kv_head #group 1 position key"] | None

    def of_prompts(self, prompts: slice) -> SharedKeys:
        """The same for some of the prompts."""
        bias = None if self.bias is None else self.bias[prompts]
        return SharedKeys(self.keys[prompts], self.values[prompts], bias)

    def to(self, device: torch.device) -> SharedKeys:
        """The same on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return SharedKeys(self.keys.to(device), self.values.to(device), bias)


def is_post_norm(block: TransformerBlock) -> bool:
    """Whether the block normalises what its sublayers return instead of what they read."""
    return block.cfg.original_architecture in POST_NORM_ARCHITECTURES


def attention_input(block: TransformerBlock, resid: Tensor) -> Tensor:
    """What the attention reads from the residual stream."""
    return resid if is_post_norm(block) else block.ln1(resid)


def row_z(
    block: TransformerBlock,
    resid: Float[Tensor, "prompt condition position d_model"],
    shared: SharedKeys,
    position_mask: Int[Tensor, "prompt pos"],
) -> Float[Tensor, "prompt condition position head d_head"]:
    """Head activations of rows that a lower patch has changed.

    Args:
        block: the block the rows enter.
        resid: the rows' residual stream before the block.
        shared: what the rows can look at besides themselves.
        position_mask: ones for the prompt's tokens, aligned to the right; it tells the rotary
            embedding at which positions the rows stand.

    Returns:
        The rows' ``z``, before ``W_O``.
    """
    attn, n_conditions = block.attn, resid.shape[1]
    rows = rearrange(
        resid, "prompt condition position d_model -> prompt (condition position) d_model"
    )
    q, k, v = (
        rearrange(
            heads,
            "prompt (condition position) head d_head -> prompt condition position head d_head",
            condition=n_conditions,
        )
        for heads in _queries_keys_values(attn, attention_input(block, rows))
    )
    q, k = _rotate(attn, q, position_mask), _rotate(attn, k, position_mask)
    return _attend(attn, q, k, v, shared)


def _queries_keys_values(attn: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = attn.calculate_qkv_matrices(rows, rows, rows)
    if attn.cfg.original_architecture in WHOLE_VECTOR_QK_NORM:
        q, k = _norm_whole_vector(attn.q_norm, q), _norm_whole_vector(attn.k_norm, k)
    limit = attn.cfg.clip_qkv
    if limit is not None:
        q, k, v = (heads.clamp(-limit, limit) for heads in (q, k, v))
    return q, k, v


def _norm_whole_vector(norm: Any, heads: Float[Tensor, "prompt row head d_head"]) -> Tensor:
    return norm(heads.flatten(-2)).reshape(heads.shape)


def _rotate(
    attn: Any,
    heads: Float[Tensor, "prompt condition position head d_head"],
    position_mask: Int[Tensor, "prompt pos"],
) -> Float[Tensor, "prompt condition position head d_head"]:
    if attn.cfg.positional_embedding_type != "rotary":
        return heads
    n_conditions, n_positions = heads.shape[1:3]
    # All conditions of a prompt stand at the same positions: to the rotation they are more heads.
    stacked = rearrange(
        heads, "prompt condition position head d_head -> prompt position (condition head) d_head"
    )
    rotated = attn.apply_rotary(stacked, position_mask.shape[1] - n_positions, position_mask)
    return rearrange(
        rotated,
        "prompt position (condition head) d_head -> prompt condition position head d_head",
        condition=n_conditions,
    )


def _attend(
    attn: Any,
    q: Float[Tensor, "prompt condition position head d_head"],
    k: Float[Tensor, "prompt condition position kv_head d_head"],
    v: Float[Tensor, "prompt condition position kv_head d_head"],
    shared: SharedKeys,
) -> Float[Tensor, "prompt condition position head d_head"]:
    n_conditions, n_positions, n_kv_heads = k.shape[1:4]
    # Query heads that share a key head become rows of one product, so keys are never repeated.
    q = rearrange(
        q,
        "prompt condition position (kv_head group) d_head"
        " -> prompt kv_head (group condition position) d_head",
        kv_head=n_kv_heads,
    )
    scores = q @ shared.keys.mT
    sizes = {"condition": n_conditions, "position": n_positions}
    by_row = "prompt kv_head group condition position"
    scores = rearrange(
        scores, f"prompt kv_head (group condition position) key -> {by_row} key", **sizes
    )
    q = rearrange(
        q, f"prompt kv_head (group condition position) d_head -> {by_row} d_head", **sizes
    )
    scores[..., -n_positions:] = einsum(
        q, k, f"{by_row} d_head, prompt condition own kv_head d_head -> {by_row} own"
    )
    pattern = _attention_pattern(attn, scores, shared.bias).to(v.dtype)
    z_own = einsum(
        pattern[..., -n_positions:],
        v,
        f"{by_row} own, prompt condition own kv_head d_head -> {by_row} d_head",
    )
    z = (pattern.flatten(2, 4) @ shared.values).reshape(z_own.shape) + z_own
    return rearrange(z, f"{by_row} d_head -> prompt condition position (kv_head group) d_head")


def _attention_pattern(attn: Any, scores: Tensor, bias: Tensor | None) -> Tensor:
    # In place where it can be: these are the largest tensors of a model with many small heads.
    scores = apply_softcap(scores.div_(attn.attn_scale), attn.cfg.attn_scores_soft_cap)
    if bias is not None:
        scores = scores.add_(bias)
    return functional.softmax(scores, dim=-1)


def attention_bias(
    attn: Any, lengths: Int[Tensor, "prompt"], n_positions: int, n_columns: int
) -> Float[Tensor, "prompt #kv_head #group 1 position key"] | None:
    """What is added to the scores of the last positions of each prompt.

    Args:
        attn: the attention module: causal, perhaps with a local window or ALiBi.
        lengths: tokens of each prompt.
        n_positions: the patched positions; they are the last of each prompt and the last columns.
        n_columns: all columns, those of the shared keys first.

    Returns:
        The bias, or None where it is zero everywhere.
    """
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


def project_out(
    block: TransformerBlock, z: Float[Tensor, "prompt condition position head d_head"]
) -> Float[Tensor, "prompt condition position d_model"]:
    """``W_O`` and its bias; TransformerLens has no submodule of its own for this product."""
    W_O = rearrange(block.attn.W_O, "head d_head d_model -> d_model (head d_head)")
    return functional.linear(z.flatten(-2).to(W_O.dtype), W_O, block.attn.b_O)


def finish_block(
    block: TransformerBlock,
    resid_pre: Float[Tensor, "prompt condition position d_model"],
    z: Float[Tensor, "prompt condition position head d_head"],
) -> Float[Tensor, "prompt condition position d_model"]:
    """Everything in a block that comes after ``z``.

    Args:
        block: the block.
        resid_pre: the residual stream that entered it.
        z: the head activations, patched where they are to be patched.

    Returns:
        The residual stream that leaves the block.
    """
    shape = resid_pre.shape
    resid_pre, attn_out = resid_pre.flatten(1, 2), project_out(block, z).flatten(1, 2)
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
