"""What is added to the attention scores of the patched positions."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


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
