"""What a Hugging Face configuration means in TransformerLens: one entry per architecture.

TransformerLens keeps the same knowledge behind a list of model names; a fine-tune in a folder is
never on that list, so each entry here reads only the configuration it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformer_lens.pretrained import weight_conversions as tl

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """How one Hugging Face architecture becomes a ``HookedTransformer``.

    Attributes:
        config: Reads a Hugging Face configuration into ``HookedTransformerConfig`` fields.
        weights: TransformerLens' own conversion ``(hf_model, cfg) -> state dict``.
    """

    config: Callable[[Any], dict[str, Any]]
    weights: Callable[[Any, Any], StateDict]


def rope_parameters(hf: Any) -> Mapping[str, Any]:
    """Rotary settings of a configuration: ``rope_theta``, ``rope_type`` and its factors."""
    return getattr(hf, "rope_parameters", None) or {}


def head_width(hf: Any) -> int:
    """``d_head``: stated by the configuration, else ``d_model / n_heads``."""
    stated = getattr(hf, "head_dim", None)
    return stated or hf.hidden_size // hf.num_attention_heads


def grouped_heads(hf: Any) -> int | None:
    """Number of key/value heads, or None where every query head has its own."""
    n_kv = getattr(hf, "num_key_value_heads", None)
    return None if n_kv in (None, hf.num_attention_heads) else n_kv


def _sizes(hf: Any) -> dict[str, Any]:
    return {
        "d_model": hf.hidden_size,
        "d_head": head_width(hf),
        "n_heads": hf.num_attention_heads,
        "n_layers": hf.num_hidden_layers,
        "n_ctx": hf.max_position_embeddings,
        "d_vocab": hf.vocab_size,
    }


def _rotary(hf: Any) -> dict[str, Any]:
    rope = rope_parameters(hf)
    fields = {
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": head_width(hf),
        "rotary_base": rope.get("rope_theta", 10000.0),
    }
    if rope.get("rope_type") == "llama3":
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_by_parts_factor": rope["factor"],
        }
    return fields


def _llama(hf: Any) -> dict[str, Any]:
    return (
        _sizes(hf)
        | _rotary(hf)
        | {
            "d_mlp": hf.intermediate_size,
            "n_key_value_heads": grouped_heads(hf),
            "eps": hf.rms_norm_eps,
            "act_fn": hf.hidden_act,
            "normalization_type": "RMS",
            "gated_mlp": True,
            "final_rms": True,
        }
    )


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(_llama, tl.convert_llama_weights),
}
"""Every architecture that loads, by the name in its ``config.json``."""
