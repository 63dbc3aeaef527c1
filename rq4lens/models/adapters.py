"""PEFT adapters (LoRA and its relatives), merged into their base model on load."""

from __future__ import annotations

from typing import Any

from safetensors import safe_open

from rq4lens.errors import UserError
from rq4lens.models.checkpoint import Checkpoint, locate, read_json

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""How the supported architectures end the name of their input embedding."""


def base_of(adapter: Checkpoint) -> Checkpoint:
    """The base model that an adapter names.

    Args:
        adapter: A folder with an ``adapter_config.json``.

    Returns:
        The base model's folder.

    Raises:
        UserError: It names none, or the named one cannot be found.
    """
    settings = read_json(adapter.folder / "adapter_config.json", adapter.source)
    base = settings.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"The adapter {adapter.source} names no base model; write base_model_name_or_path "
            "into its adapter_config.json."
        )
    try:
        return locate(base, settings.get("revision"))
    except UserError as error:
        raise UserError(f"The base model of the adapter {adapter.source}: {error}") from error


def merge_adapter(base_model: Any, adapter: Checkpoint) -> Any:
    """Add an adapter's change to the weights of its base model, in place.

    Args:
        base_model: The Hugging Face model that the adapter was trained on.
        adapter: The adapter's folder.

    Returns:
        The base model with merged weights, as an ordinary Hugging Face model.

    Raises:
        UserError: PEFT is not installed, or the adapter does not act on weights.
    """
    try:
        from peft import PeftModel  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise UserError(
            f"{adapter.source} is an adapter, and merging it needs PEFT: "
            "install it with `pip install peft`."
        ) from None
    n_tokens = _vocabulary(adapter)
    if n_tokens is not None and n_tokens != base_model.get_input_embeddings().weight.shape[0]:
        base_model.resize_token_embeddings(n_tokens)
    adapted = PeftModel.from_pretrained(base_model, str(adapter.folder))
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = type(adapted.active_peft_config).__name__.removesuffix("Config")
        raise UserError(
            f"{adapter.source} is a {kind} adapter, which adds tokens and not weights; only "
            "adapters that can be merged into the weights, as LoRA, are allowed."
        )
    return adapted.merge_and_unload().eval()


def _vocabulary(adapter: Checkpoint) -> int | None:
    """Rows of the input embedding if the adapter holds one, as after adding tokens."""
    with safe_open(adapter.weight_files[0], "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - this is not a dict
            if name.endswith(EMBEDDINGS):
                return int(tensors.get_slice(name).get_shape()[0])
    return None
