"""Is a ``config.json`` one that a model can be built from?

Checked before any library reads it: a size of another type, of zero or of billions would end in a
traceback, a full memory or a model of another shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rq4lens.disk.files import short_value
from rq4lens.errors import UserError
from rq4lens.models.load.architectures import ARCHITECTURES, find_architecture
from rq4lens.models.load.checkpoint import Checkpoint, architecture_of, refuse_quantized
from rq4lens.models.load.devices import free_bytes
from rq4lens.models.load.rotary import require_known_scaling

N_HEADS = ("num_attention_heads", "n_head", "num_heads")
N_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTHS = ("hidden_size", "n_embd")
CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length")
"""The names that architectures give to the same sizes."""

SIZES = (
    *N_HEADS, *N_LAYERS, *WIDTHS, *CONTEXTS, "num_key_value_heads", "head_dim", "vocab_size",
    "intermediate_size", "n_inner", "ffn_dim", "rotary_dim", "word_embed_proj_dim",
    "num_local_experts", "num_experts", "num_experts_per_tok", "sliding_window", "window_size",
)  # fmt: skip
OPTIONAL = (
    "num_key_value_heads", "head_dim", "intermediate_size", "n_inner", "rotary_dim",
    "sliding_window",
)  # fmt: skip
"""Sizes that a configuration may leave to the architecture by saying null."""

POSITIVE = (
    "rope_theta", "factor", "partial_rotary_factor", "low_freq_factor", "high_freq_factor",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
)  # fmt: skip
MOST = 2**31 - 1
TABLE_BYTES = 8
"""Of a sine and a cosine in float32, for each position and each component of a head."""


MOST_LAYERS = 1000
"""Of a checkpoint whose tensors were not fetched yet."""


def loadable_architecture(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False, with_weights: bool = True
) -> str:
    """The name of a checkpoint's architecture, after everything its small files say was checked.

    Raises:
        UserError: No model can be loaded from it.
    """
    architecture = architecture_of(checkpoint)
    find_architecture(architecture)
    refuse_quantized(checkpoint)
    n_tensors = len(checkpoint.tensors) if with_weights else MOST_LAYERS
    check_config(checkpoint, n_tensors=n_tensors, trust_remote_code=trust_remote_code)
    return str(architecture)


def check_config(checkpoint: Checkpoint, *, n_tensors: int, trust_remote_code: bool) -> None:
    """Refuse a configuration that no model can be built from.

    Raises:
        UserError: A size is no size, heads do not divide, or it names two different models.
    """
    config = checkpoint.config
    _check_model_type(config, checkpoint, trust_remote_code)
    for part in _parts(config):
        _check_sizes(part, checkpoint.source)
        _check_heads(part, checkpoint.source)
        _check_counts(part, checkpoint.source, n_tensors)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configuration, and that of the text model inside a model of several kinds of input."""
    yield config
    if isinstance(config.get("text_config"), dict):
        yield config["text_config"]


def _check_model_type(
    config: Mapping[str, Any], checkpoint: Checkpoint, trust_remote_code: bool
) -> None:
    source = checkpoint.source
    own_code = config.get("auto_map")
    if own_code is not None and not isinstance(own_code, dict):
        raise UserError(
            f"auto_map={short_value(own_code)} in config.json of {source} must be an object that "
            "names classes; take it out, or restore the file."
        )
    named = config.get("model_type")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(named) if isinstance(named, str) else None
    if known is None and own_code:
        return  # transformers asks for trust_remote_code, or has been given it
    stated = architecture_of(checkpoint)
    same = known in ARCHITECTURES and find_architecture(stated) == ARCHITECTURES[known]
    if not same and not (own_code and trust_remote_code):
        raise UserError(
            f"config.json of {source} says model_type={short_value(named)} and the architecture "
            f"{short_value(stated)}, which do not belong together; write the model_type that "
            "save_pretrained writes for this architecture."
        )


def _check_sizes(config: Mapping[str, Any], source: str) -> None:
    for name in SIZES:
        value: Any = config.get(name)
        left_open = name not in config or (value is None and name in OPTIONAL)
        if not left_open and not (_is_number(value, int) and 1 <= value <= MOST):
            raise _wrong(config, name, source, f"a whole number from 1 to {MOST}")
    for part in (config, *_rope_settings(config)):
        for name in POSITIVE:
            value = part.get(name, 1)
            if not (_is_number(value, int | float) and value > 0):
                raise _wrong(part, name, source, "a number above 0")
        require_known_scaling(part.get("rope_type"))


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _rope_settings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Settings of rotary positions, also where each type of layer has its own."""
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(settings := config.get(name), dict):
            yield settings
            yield from (each for each in settings.values() if isinstance(each, dict))


def _check_heads(config: Mapping[str, Any], source: str) -> None:
    n_heads, width = _first(config, N_HEADS), _first(config, WIDTHS)
    groups = config.get("num_key_value_heads")
    if n_heads and width and not config.get("head_dim") and config[width] % config[n_heads]:
        raise _wrong(config, width, source, f"a multiple of {n_heads}={config[n_heads]}")
    if n_heads and groups and config[n_heads] % groups:
        allowed = f"a divisor of {n_heads}={config[n_heads]}"
        raise _wrong(config, "num_key_value_heads", source, allowed)


def _check_counts(config: Mapping[str, Any], source: str, n_tensors: int) -> None:
    """Refuse what would take an age to build, or tables of positions that fill the memory."""
    n_layers, context = _first(config, N_LAYERS), _first(config, CONTEXTS)
    if n_layers and config[n_layers] > n_tensors:
        raise _wrong(config, n_layers, source, f"at most {n_tensors}, the number of its tensors")
    n_heads, width = _first(config, N_HEADS), _first(config, WIDTHS)
    if not (n_layers and context and n_heads and width):
        return
    head = config.get("head_dim") or config[width] // config[n_heads]
    tables = TABLE_BYTES * config[context] * head * config[n_layers]
    if tables > free_bytes("cpu"):
        raise UserError(
            f"{context}={config[context]} in config.json of {source} needs tables of "
            f"{tables / 1e9:.3g} GB (head_dim={head}), more than is free; write the length of "
            "the longest prompt there."
        )


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if config.get(name) is not None), None)


def _wrong(config: Mapping[str, Any], name: str, source: str, allowed: str) -> UserError:
    return UserError(
        f"{name}={short_value(config.get(name))} in config.json of {source} must be {allowed}; "
        "restore the file that save_pretrained wrote."
    )
