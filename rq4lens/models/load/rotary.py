"""Rotary settings of a Hugging Face configuration, in TransformerLens' words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rq4lens.disk.files import short_value
from rq4lens.errors import UserError

Fields = dict[str, Any]


def rope_of(hf: Any, layer_type: str | None = None) -> Mapping[str, Any]:
    """Rotary settings: ``rope_theta``, ``rope_type`` and the factors that go with the type."""
    settings = getattr(hf, "rope_parameters", None) or {}
    return settings.get(layer_type) or {} if layer_type else settings


def head_width(hf: Any) -> int:
    """``d_head``: stated by the configuration, else ``d_model / n_heads``."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def rotary_fields(hf: Any, *, partial: bool = False, layer_type: str | None = None) -> Fields:
    """Rotary fields of ``HookedTransformerConfig``."""
    rope = rope_of(hf, layer_type)
    kind = rope.get("rope_type") or "default"
    if kind not in _SCALINGS:
        raise UserError(
            f"rope_type {short_value(kind)} of this checkpoint cannot be computed by "
            f"TransformerLens; allowed are {', '.join(_SCALINGS)}; use a checkpoint with one of "
            "these."
        )
    for name in ("rope_theta", "factor"):
        if rope.get(name, 1) <= 0:
            raise UserError(
                f"{name}={rope[name]} of this checkpoint makes every number infinite; it must be "
                "above 0: restore the config.json that save_pretrained wrote."
            )
    share = rope.get("partial_rotary_factor", 1.0) if partial else 1.0
    return {
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": int(head_width(hf) * share),
        "rotary_base": rope.get("rope_theta", 10000.0),
    } | _SCALINGS[kind](hf, rope)


def _unscaled(_hf: Any, _rope: Mapping[str, Any]) -> Fields:
    return {}


def _linear(_hf: Any, rope: Mapping[str, Any]) -> Fields:
    return {"rotary_scaling_factor": float(rope["factor"])}


def _llama3(_hf: Any, rope: Mapping[str, Any]) -> Fields:
    """NTK by parts, Section 3.2 of https://arxiv.org/abs/2309.00071, as Llama 3.1 uses it."""
    return {
        "use_NTK_by_parts_rope": True,
        "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
        "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
        "NTK_by_parts_factor": rope["factor"],
    }


def _yarn(hf: Any, rope: Mapping[str, Any]) -> Fields:
    """YaRN, https://arxiv.org/abs/2309.00071; the attention factor has several spellings."""
    layered = "full_attention" if rope_of(hf, "full_attention") else None
    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](hf, torch.device("cpu"), layer_type=layered)
    return {
        "use_yarn_rope": True,
        "yarn_factor": float(rope["factor"]),
        "yarn_attention_factor": float(attention_factor),
        "yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1),
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_truncate": rope.get("truncate", True),
    }


def _longrope(_hf: Any, rope: Mapping[str, Any]) -> Fields:
    return {"n_ctx": rope["original_max_position_embeddings"]}


_SCALINGS: dict[str, Callable[[Any, Mapping[str, Any]], Fields]] = {
    "default": _unscaled,
    "dynamic": _unscaled,  # changes nothing up to n_ctx, where HookedTransformer stops
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def write_longrope_tables(model: HookedTransformer, hf: Any) -> None:
    """Write the sine and cosine tables of LongRoPE, which TransformerLens has no formula for.

    ``n_ctx`` of such a model is the length it was pre-trained with: up to there Hugging Face's
    frequencies do not depend on the length of the prompt, so a table is exact.

    Source:
        https://arxiv.org/abs/2402.13753, through ``transformers.modeling_rope_utils``.
    """
    if rope_of(hf).get("rope_type") != "longrope":
        return
    frequencies, scale = ROPE_INIT_FUNCTIONS["longrope"](hf, torch.device("cpu"))
    angles = torch.outer(torch.arange(model.cfg.n_ctx).float(), frequencies).repeat(1, 2)
    for block in model.blocks:
        block.attn.rotary_sin = (angles.sin() * scale).to(model.cfg.dtype)
        block.attn.rotary_cos = (angles.cos() * scale).to(model.cfg.dtype)
