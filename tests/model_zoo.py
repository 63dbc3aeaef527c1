"""Tiny random models of real architectures with tokenizers trained on the spot.

Every model is made by Hugging Face's own classes and saved by ``save_pretrained``, so that a test
that loads one walks the path of a user's fine-tune. Weights are drawn wide enough that attention,
gates and norms all matter: with the usual 0.02 a wrong rotary base would go unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "The quick brown fox jumps over the lazy dog.",
    "A small library opened at the edge of the town, between the river and the old mill.",
    "What is the use of a number, she said, if one may keep what one likes?",
    "In 1999, 3 + 4 = 7; the shelf held seven copies, all of them alike.",
)
KAZAKH = (
    "Сәлем, әлем! Қалайсың? Бүгін ауа райы жақсы, көктем келді.",
    "Кітапхана өзен мен ескі диірменнің арасында, қаланың шетінде ашылды.",
)
"""What a tokenizer of another language is trained on."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>")
VOCABULARY = 320
"""256 bytes, the special tokens, and some merges."""


def train_tokenizer(
    corpus: tuple[str, ...] = CORPUS, *, vocabulary: int = VOCABULARY, adds_bos: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on a few sentences."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    if adds_bos:
        bpe.post_processor = _bos_processor()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _bos_processor() -> Any:
    from tokenizers.processors import TemplateProcessing  # noqa: PLC0415

    return TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])


@dataclass(frozen=True)
class Entry:
    """A tiny variant of one architecture."""

    config: Callable[[], Any]
    n_heads: int = 4
    n_groups: int | None = None

    def make(self, seed: int = 0) -> Any:
        """A random causal language model of this variant."""
        return random_model(self.config(), seed)


def random_model(config: Any, seed: int = 0) -> Any:
    """A causal language model with wide random weights, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.25 if parameter.ndim > 1 else 0.1
            centre = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(centre + scale * noise)
    return model


def save(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Path:
    """Save both as a Hugging Face folder."""
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


def _decoder(kind: str, **extra: Any) -> Callable[[], Any]:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return lambda: getattr(hf, kind)(**(sizes | extra))


def _gpt2_like(kind: str, **extra: Any) -> Callable[[], Any]:
    sizes = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return lambda: getattr(hf, kind)(**(sizes | extra))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_CONTEXT = 256
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 4.0],
    "original_max_position_embeddings": LONG_CONTEXT,
    "partial_rotary_factor": 0.75,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
OLMO3_ROPE = {
    "full_attention": YARN_ROPE,
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
TWO_GROUPS = {"num_key_value_heads": 2}
WINDOW = {"sliding_window": 5}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24} | TWO_GROUPS | WINDOW | MIXED

ZOO: Mapping[str, Entry] = {
    "gpt2": Entry(_gpt2_like("GPT2Config")),
    "gpt2-inverse-layer": Entry(
        _gpt2_like("GPT2Config", scale_attn_by_inverse_layer_idx=True, n_inner=40)
    ),
    "gptj": Entry(_gpt2_like("GPTJConfig", rotary_dim=4)),
    "gpt-neo": Entry(
        lambda: hf.GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=256,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
        )
    ),
    "pythia": Entry(
        _decoder(
            "GPTNeoXConfig",
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
        )
    ),
    "neox-sequential": Entry(_decoder("GPTNeoXConfig", use_parallel_residual=False)),
    "opt": Entry(_decoder("OPTConfig", ffn_dim=48, word_embed_proj_dim=32)),
    "bloom": Entry(
        lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4)
    ),
    "llama": Entry(_decoder("LlamaConfig")),
    "llama-bias-head-dim": Entry(
        _decoder("LlamaConfig", attention_bias=True, head_dim=12, **TWO_GROUPS), n_groups=2
    ),
    "llama3": Entry(_decoder("LlamaConfig", rope_parameters=LLAMA3_ROPE, **TWO_GROUPS), n_groups=2),
    "llama-yarn": Entry(_decoder("LlamaConfig", rope_parameters=YARN_ROPE)),
    "mistral": Entry(_decoder("MistralConfig", **TWO_GROUPS, **WINDOW), n_groups=2),
    "mixtral": Entry(
        _decoder("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, **TWO_GROUPS),
        n_groups=2,
    ),
    "qwen2": Entry(_decoder("Qwen2Config", **TWO_GROUPS), n_groups=2),
    "qwen3": Entry(_decoder("Qwen3Config", head_dim=16, **TWO_GROUPS), n_groups=2),
    "gemma": Entry(_decoder("GemmaConfig", head_dim=16, num_key_value_heads=1), n_groups=1),
    "gemma2": Entry(_decoder("Gemma2Config", **GEMMA), n_groups=2),
    "gemma3": Entry(_decoder("Gemma3TextConfig", rope_parameters=GEMMA3_ROPE, **GEMMA), n_groups=2),
    "phi": Entry(
        _decoder(
            "PhiConfig",
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        )
    ),
    "phi3": Entry(_decoder("Phi3Config", **WINDOW)),
    "phi3-grouped-longrope": Entry(
        _decoder(
            "Phi3Config",
            rope_parameters=LONG_ROPE,
            original_max_position_embeddings=256,
            **TWO_GROUPS,
        ),
        n_groups=2,
    ),
    "olmo": Entry(_decoder("OlmoConfig", clip_qkv=1.5)),
    "olmo2": Entry(_decoder("Olmo2Config")),
    "olmo2-grouped": Entry(_decoder("Olmo2Config", **TWO_GROUPS), n_groups=2),
    "olmo3": Entry(
        _decoder("Olmo3Config", rope_parameters=OLMO3_ROPE, **TWO_GROUPS, **WINDOW, **MIXED),
        n_groups=2,
    ),
    "olmoe": Entry(
        _decoder("OlmoeConfig", num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
    ),
    "apertus": Entry(
        _decoder("ApertusConfig", rope_parameters=LLAMA3_ROPE, **TWO_GROUPS), n_groups=2
    ),
    "gpt-oss": Entry(
        _decoder(
            "GptOssConfig",
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters=YARN_ROPE | {"truncate": False},
            **TWO_GROUPS,
            **WINDOW,
            **MIXED,
        ),
        n_groups=2,
    ),
}
"""Every architecture that is converted, with the variants that are easy to get wrong."""


def _falcon(**extra: Any) -> Callable[[], Any]:
    return _decoder("FalconConfig", ffn_hidden_size=48, **extra)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

BRIDGED: Mapping[str, Entry] = {
    "falcon": Entry(_falcon(), n_groups=1),
    "falcon-alibi": Entry(_falcon(alibi=True, multi_query=False, parallel_attn=False)),
    "granite": Entry(
        _decoder("GraniteConfig", residual_multiplier=0.5, logits_scaling=2.0, **TWO_GROUPS)
    ),
    "cohere": Entry(_decoder("CohereConfig", logit_scale=0.5, **TWO_GROUPS)),
    "cohere2": Entry(_decoder("Cohere2Config", logit_scale=0.5, **TWO_GROUPS, **WINDOW, **MIXED)),
    "stablelm": Entry(_decoder("StableLmConfig", **TWO_GROUPS)),
    "starcoder2": Entry(_decoder("Starcoder2Config", **TWO_GROUPS)),
    "smollm3": Entry(_decoder("SmolLM3Config", **TWO_GROUPS)),
    "glm4": Entry(_decoder("Glm4Config", head_dim=8, **TWO_GROUPS)),
    "seed-oss": Entry(_decoder("SeedOssConfig", head_dim=8, **TWO_GROUPS)),
    "nemotron": Entry(_decoder("NemotronConfig", **TWO_GROUPS)),
    "codegen": Entry(_gpt2_like("CodeGenConfig", rotary_dim=4)),
    "mpt": Entry(
        lambda: hf.MptConfig(
            vocab_size=VOCABULARY, d_model=32, n_layers=3, n_heads=4, max_seq_len=256
        )
    ),
    "qwen3-moe": Entry(_decoder("Qwen3MoeConfig", head_dim=8, **EXPERTS, **TWO_GROUPS)),
}
"""Families that are not converted and load as a bridge."""
