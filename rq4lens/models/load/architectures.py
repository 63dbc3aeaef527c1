"""What a Hugging Face configuration means in TransformerLens: one entry per architecture.

TransformerLens keeps the same knowledge behind a list of model names and, for some families, as
numbers per name. A fine-tune in a folder is never on that list, so each entry here reads nothing
but the configuration it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rq4lens.disk.files import short_value
from rq4lens.errors import UserError
from rq4lens.models.load.lens import SUPPORTED_ARCHITECTURES, Backend, HookedTransformer
from rq4lens.models.load.lens import weight_conversions as tl

Fields = dict[str, Any]
StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """How one Hugging Face architecture becomes a ``HookedTransformer``.

    ``family`` reads a Hugging Face configuration into ``HookedTransformerConfig`` fields, to which
    ``more`` is added; ``weights`` is TransformerLens' own conversion ``(hf_model, cfg) -> state
    dict``. Another value than the one in ``only`` would be converted into another function.
    """

    family: Callable[[Any], Fields]
    weights: Callable[[Any, Any], StateDict]
    more: Fields = field(default_factory=dict)
    only: Fields = field(default_factory=dict)

    def config(self, hf: Any) -> Fields:
        """What a Hugging Face configuration means in TransformerLens."""
        for name, allowed in self.only.items():
            _require(hf, name, allowed)
        return self.family(hf) | self.more


def _require(hf: Any, field: str, allowed: Any) -> None:
    """Refuse a variant that TransformerLens' conversion would turn into another function."""
    value = getattr(hf, field, allowed)
    if value != allowed:
        raise UserError(
            f"{field}={value!r} of this {hf.model_type} checkpoint has no counterpart in "
            f"TransformerLens; only {field}={allowed!r} can be loaded."
        )


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
    if kind not in ROPE_TYPES:
        raise UserError(
            f"rope_type {short_value(kind)} of this checkpoint cannot be computed by "
            f"TransformerLens; allowed are {', '.join(ROPE_TYPES)}; use a checkpoint with one of "
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
    } | _scaling(kind, hf, rope)


ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "yarn", "longrope")


def _scaling(kind: str, hf: Any, rope: Mapping[str, Any]) -> Fields:
    """How angles are scaled for long prompts.

    ``dynamic`` changes nothing up to ``n_ctx``, where HookedTransformer stops. ``llama3`` is NTK by
    parts, Section 3.2 of https://arxiv.org/abs/2309.00071, which YaRN is from, too.
    """
    if kind == "linear":
        return {"rotary_scaling_factor": float(rope["factor"])}
    if kind == "longrope":
        return {"n_ctx": rope["original_max_position_embeddings"]}
    if kind == "llama3":
        return {
            "use_NTK_by_parts_rope": True,
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_by_parts_factor": rope["factor"],
        }
    if kind == "yarn":  # its attention factor has several spellings
        layered = "full_attention" if rope_of(hf, "full_attention") else None
        _, factor = ROPE_INIT_FUNCTIONS["yarn"](hf, torch.device("cpu"), layer_type=layered)
        return {
            "use_yarn_rope": True,
            "yarn_factor": float(rope["factor"]),
            "yarn_attention_factor": float(factor),
            "yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "yarn_beta_slow": float(rope.get("beta_slow") or 1),
            "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
            "yarn_truncate": rope.get("truncate", True),
        }
    return {}


def _shape(hf: Any, n_ctx: int | None = None) -> Fields:
    return {
        "d_model": hf.hidden_size,
        "d_head": head_width(hf),
        "n_heads": hf.num_attention_heads,
        "n_layers": hf.num_hidden_layers,
        "n_ctx": n_ctx or hf.max_position_embeddings,
        "d_vocab": hf.vocab_size,
    }


def _sizes(hf: Any) -> Fields:
    activation = getattr(hf, "hidden_activation", None) or hf.hidden_act
    return _shape(hf) | {"d_mlp": hf.intermediate_size, "act_fn": activation}


def _windows(hf: Any) -> Fields:
    """Sliding-window attention: per layer where the configuration says so, else everywhere."""
    window = getattr(hf, "sliding_window", None)
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    if not window or "sliding_attention" not in kinds:
        return {}
    return {
        "use_local_attn": True,
        "window_size": window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in kinds],
    }


def _rms_gated(hf: Any, **rotary: Any) -> Fields:
    """The common decoder: RMSNorm, rotary positions, a gated MLP, perhaps grouped heads."""
    n_groups = hf.num_key_value_heads
    return (
        _sizes(hf)
        | rotary_fields(hf, **rotary)
        | _windows(hf)
        | {
            "n_key_value_heads": None if n_groups == hf.num_attention_heads else n_groups,
            "eps": hf.rms_norm_eps,
            "normalization_type": "RMS",
            "final_rms": True,
            "gated_mlp": True,
        }
    )


def _grouped(hf: Any, **rotary: Any) -> Fields:
    """As ``_rms_gated``, for conversions that know grouped heads only, be it one to a group."""
    return _rms_gated(hf, **rotary) | {"n_key_value_heads": hf.num_key_value_heads}


def _experts(hf: Any) -> Fields:
    """Several MLPs a layer, of which a router chooses some for each token."""
    return _grouped(hf) | {
        "num_experts": getattr(hf, "num_local_experts", None) or hf.num_experts,
        "experts_per_token": hf.num_experts_per_tok,
    }


def _olmoe(hf: Any) -> Fields:
    return _experts(hf) | {"norm_topk_prob": hf.norm_topk_prob, "clip_qkv": hf.clip_qkv}


def _gemma2(hf: Any, **rotary: Any) -> Fields:
    return _grouped(hf, **rotary) | {
        "use_normalization_before_and_after": True,
        "attn_scale": hf.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": hf.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": hf.final_logit_softcapping or -1.0,
    }


def _gemma3(hf: Any) -> Fields:
    text = hf.get_text_config()
    local = rope_of(text, "sliding_attention").get("rope_theta")
    fields = _gemma2(text, layer_type="full_attention")
    return fields | {"use_qk_norm": True, "rotary_base_local": local}


def _olmo(hf: Any) -> Fields:
    _require(hf, "num_key_value_heads", hf.num_attention_heads)
    # OlmoLayerNorm has no weights and a fixed epsilon.
    norm = {"normalization_type": "LN", "eps": 1e-5, "clip_qkv": hf.clip_qkv}
    return _sizes(hf) | rotary_fields(hf) | norm | {"gated_mlp": True}


def _olmo3(hf: Any) -> Fields:
    if not rope_of(hf, "full_attention"):
        return _rms_gated(hf)
    local = rope_of(hf, "sliding_attention").get("rope_theta")
    fields = _rms_gated(hf, layer_type="full_attention")
    return fields | {"rotary_base_local": local, "yarn_global_attn_only": True}


def _gpt(hf: Any, d_mlp: int | None = None, n_ctx: int | None = None) -> Fields:
    """The common part of the GPT family: LayerNorm and an MLP of usually four times the width."""
    return _shape(hf, n_ctx) | {
        "d_mlp": d_mlp or 4 * hf.hidden_size,
        "act_fn": getattr(hf, "activation_function", None),
        "eps": getattr(hf, "layer_norm_epsilon", 1e-5),
        "normalization_type": "LN",
    }


def _gpt2(hf: Any) -> Fields:
    return _gpt(hf, hf.n_inner) | {
        "use_attn_scale": hf.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": hf.scale_attn_by_inverse_layer_idx,
    }


def _gptj(hf: Any) -> Fields:
    return _gpt(hf, hf.n_inner) | {
        "parallel_attn_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": hf.rotary_dim or hf.n_embd // hf.n_head,
        "rotary_adjacent_pairs": True,
    }


def _gpt_neo(hf: Any) -> Fields:
    return _gpt(hf, hf.intermediate_size) | {
        "use_attn_scale": False,
        "use_local_attn": True,
        "attn_types": list(hf.attention_layers),
        "window_size": hf.window_size,
    }


def _neox(hf: Any) -> Fields:
    """LayerNorm and rotary positions in a part of each head, with attention beside the MLP."""
    parallel = getattr(hf, "use_parallel_residual", True)
    norm = {"eps": hf.layer_norm_eps, "normalization_type": "LN", "parallel_attn_mlp": parallel}
    return _sizes(hf) | rotary_fields(hf, partial=True) | norm


def _phi(hf: Any) -> Fields:
    _require(hf, "num_key_value_heads", hf.num_attention_heads)
    return _neox(hf)


def _opt(hf: Any) -> Fields:
    _require(hf, "word_embed_proj_dim", hf.hidden_size)
    return _gpt(hf, hf.ffn_dim)


def _bloom(hf: Any) -> Fields:
    # ALiBi itself has no limit.
    return _gpt(hf, n_ctx=getattr(hf, "seq_length", 2048)) | {
        "act_fn": "gelu_fast",
        "post_embedding_ln": True,
        "positional_embedding_type": "alibi",
    }


def with_biases(convert: Callable[[Any, Any], StateDict]) -> Callable[[Any, Any], StateDict]:
    """Add the optional attention biases (``attention_bias=True``) that a conversion drops."""

    def converted(hf_model: Any, cfg: Any) -> StateDict:
        weights, grouped = convert(hf_model, cfg), "_" if cfg.n_key_value_heads else ""
        for layer, block in enumerate(hf_model.model.layers):
            if block.self_attn.q_proj.bias is not None:
                attention, prefix = block.self_attn, f"blocks.{layer}.attn"
                weights |= {
                    f"{prefix}.b_Q": attention.q_proj.bias.view(-1, cfg.d_head),
                    f"{prefix}.{grouped}b_K": attention.k_proj.bias.view(-1, cfg.d_head),
                    f"{prefix}.{grouped}b_V": attention.v_proj.bias.view(-1, cfg.d_head),
                    f"{prefix}.b_O": attention.o_proj.bias,
                }
        return weights

    return converted


def _bloom_weights(hf_model: Any, cfg: Any) -> StateDict:
    # HookedTransformer has a position table beside ALiBi, which it never reads.
    unread = torch.zeros(cfg.n_ctx, cfg.d_model, dtype=cfg.dtype)
    return tl.convert_bloom_weights(hf_model, cfg) | {"pos_embed.W_pos": unread}


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


QK_NORM: Fields = {"use_qk_norm": True}

ARCHITECTURES: dict[str, Architecture] = {
    "ApertusForCausalLM": Architecture(
        _rms_gated, tl.convert_apertus_weights, QK_NORM | {"gated_mlp": False}
    ),
    "BloomForCausalLM": Architecture(
        _bloom, _bloom_weights, only={"apply_residual_connection_post_layernorm": False}
    ),
    "GPT2LMHeadModel": Architecture(_gpt2, tl.convert_gpt2_weights),
    "GPTJForCausalLM": Architecture(_gptj, tl.convert_gptj_weights),
    "GPTNeoForCausalLM": Architecture(_gpt_neo, tl.convert_neo_weights),
    "GPTNeoXForCausalLM": Architecture(
        _neox, tl.convert_neox_weights, only={"attention_bias": True}
    ),
    "Gemma2ForCausalLM": Architecture(_gemma2, tl.convert_gemma_weights),
    "Gemma3ForCausalLM": Architecture(_gemma3, tl.convert_gemma_weights),
    "Gemma3ForConditionalGeneration": Architecture(_gemma3, tl.convert_gemma_weights),
    "GemmaForCausalLM": Architecture(_grouped, tl.convert_gemma_weights),
    "GptOssForCausalLM": Architecture(
        _experts,
        tl.convert_gpt_oss_weights,
        {"norm_topk_prob": False, "use_attention_sinks": True},
    ),
    "LlamaForCausalLM": Architecture(
        _rms_gated, with_biases(tl.convert_llama_weights), only={"mlp_bias": False}
    ),
    "MistralForCausalLM": Architecture(_grouped, tl.convert_mistral_weights),
    # Mixtral's router always renormalizes the chosen experts' weights and has no switch for it.
    "MixtralForCausalLM": Architecture(
        _experts, tl.convert_mixtral_weights, {"norm_topk_prob": True}
    ),
    "OPTForCausalLM": Architecture(
        _opt, tl.convert_opt_weights, only={"do_layer_norm_before": True, "enable_bias": True}
    ),
    # OLMo-2's own conversion knows no grouped heads; OLMo-3's names the same modules and does.
    "Olmo2ForCausalLM": Architecture(_rms_gated, tl.convert_olmo3_weights),
    "Olmo3ForCausalLM": Architecture(_olmo3, tl.convert_olmo3_weights),
    "OlmoForCausalLM": Architecture(_olmo, tl.convert_olmo_weights),
    "OlmoeForCausalLM": Architecture(_olmoe, tl.convert_olmoe_weights),
    "Phi3ForCausalLM": Architecture(partial(_rms_gated, partial=True), tl.convert_phi3_weights),
    "PhiForCausalLM": Architecture(_phi, tl.convert_phi_weights, only={"qk_layernorm": False}),
    "Qwen2ForCausalLM": Architecture(_grouped, tl.convert_qwen2_weights),
    "Qwen3ForCausalLM": Architecture(_rms_gated, with_biases(tl.convert_qwen3_weights), QK_NORM),
}
"""Every architecture that loads as a ``HookedTransformer``, by the name in its ``config.json``."""


def loadable(backend: Backend) -> tuple[str, ...]:
    """The architectures that load as one kind of model, by the name in their ``config.json``.

    A bridge runs what transformers itself knows as a causal language model; BERT reads both ways.
    """
    if backend == "hooked":
        return tuple(ARCHITECTURES)
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) - {"BertLMHeadModel"}
    return tuple(sorted(causal & set(SUPPORTED_ARCHITECTURES)))


def require_loadable(name: str | None, backend: Backend) -> None:
    """Refuse an architecture that does not load as this kind of model."""
    if name in loadable(backend):
        return
    other = " or use backend 'bridge'" if name in loadable("bridge") else ""
    raise UserError(
        f"Architecture {str(name)[:80]} cannot be loaded with backend {backend!r}; allowed are "
        f"{', '.join(loadable(backend))}; use a causal language model of one of these{other}."
    )


def find_architecture(name: str | None) -> Architecture:
    """The entry of an architecture."""
    require_loadable(name, "hooked")
    return ARCHITECTURES[str(name)]
