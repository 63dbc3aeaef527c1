"""PEFT adapters (LoRA and its relatives), merged into their base model on load."""

from __future__ import annotations

from typing import Any

from rq4lens.errors import UserError
from rq4lens.files import short_reason, short_value
from rq4lens.models.adapter_check import adapter_settings, check_adapter
from rq4lens.models.checkpoint import Checkpoint, locate

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""How the supported architectures end the name of their input embedding."""

SHARED = ("vblora_vector_bank", ".tinylora_v.", ".unilora_theta_d.")
"""Adapter weights that PEFT holds once and names again in each layer."""


def base_of(adapter: Checkpoint, *, with_weights: bool = True) -> Checkpoint:
    """The base model that an adapter names.

    Args:
        adapter: A folder with an ``adapter_config.json``.
        with_weights: Also fetch the weights of a hub id.

    Returns:
        The base model's folder.

    Raises:
        UserError: It names none, or the named one cannot be found or is an adapter too.
    """
    settings = adapter_settings(adapter)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise UserError(
            f"The adapter {adapter.source} names no base model; write base_model_name_or_path "
            "into its adapter_config.json."
        )
    if not isinstance(base, str) or not isinstance(revision, str | None):
        raise UserError(
            f"base_model_name_or_path={short_value(base)} and revision={short_value(revision)} in "
            f"adapter_config.json of {adapter.source} must be text; restore the file."
        )
    try:
        found = locate(base, revision, with_weights=with_weights)
    except UserError as error:
        raise UserError(f"The base model of the adapter {adapter.source}: {error}") from error
    if found.is_adapter:
        raise UserError(
            f"The base model of the adapter {adapter.source}, {found.source}, is itself an "
            "adapter; merge that one into its own base first, and name the merged model."
        )
    return found


def merge_adapter(base_model: Any, adapter: Checkpoint) -> Any:
    """Add an adapter's change to the weights of its base model, in place.

    Args:
        base_model: The Hugging Face model that the adapter was trained on.
        adapter: The adapter's folder.

    Returns:
        The base model with merged weights, as an ordinary Hugging Face model.

    Raises:
        UserError: PEFT is not installed, or the adapter is damaged or does not fit the base.
    """
    try:
        from peft import PeftModel  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise UserError(
            f"{adapter.source} is an adapter, and merging it needs PEFT: "
            "install it with `pip install peft`."
        ) from None
    check_adapter(adapter, [name for name, _ in base_model.named_modules()])
    n_tokens = vocabulary_of(adapter)
    if n_tokens is not None and n_tokens != base_model.get_input_embeddings().weight.shape[0]:
        base_model.resize_token_embeddings(n_tokens)
    try:
        adapted = PeftModel.from_pretrained(base_model, str(adapter.folder))
        _require_whole(adapted, adapter)
        return adapted.merge_and_unload().eval()
    except UserError:
        raise
    except Exception as problem:  # PEFT checks what it reads by failing in any way
        raise UserError(
            f"The adapter {adapter.source} cannot be merged into its base model "
            f"({type(problem).__name__}: {short_reason(problem)}); use the base and the files that "
            "it was trained with."
        ) from problem


def _require_whole(adapted: Any, adapter: Checkpoint) -> None:
    """PEFT itself passes over weights that it does not find, or has no place for."""
    result = adapted.load_adapter(str(adapter.folder), "default")
    missing = [name for name in result.missing_keys if not any(s in name for s in SHARED)]
    for what, names in (("lacks", missing), ("has no place for", result.unexpected_keys)):
        if names:
            raise UserError(
                f"The adapter {adapter.source} cannot be merged into its base model, which "
                f"{what} {len(names)} of its weights, as {short_value(sorted(names)[0], 160)}; "
                "use the base and the files that it was trained with."
            )


def vocabulary_of(adapter: Checkpoint) -> int | None:
    """Rows of the input embedding if the adapter holds one, as after adding tokens."""
    rows = (t.shape[0] for name, t in adapter.tensors.items() if name.endswith(EMBEDDINGS))
    return next(rows, None)
