"""Load the Hugging Face side of a checkpoint: its model and its tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from rq4lens.errors import UserError
from rq4lens.models.checkpoint import Checkpoint

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError)
"""What transformers raises for a folder it cannot make sense of."""


def load_tokenizer(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer.

    Args:
        checkpoint: A folder.
        trust_remote_code: Allow code that the checkpoint brings along to run.

    Returns:
        The tokenizer as it was saved.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    if not checkpoint.has_tokenizer:
        raise UserError(
            f"{checkpoint.source} has no tokenizer; save the fine-tune's own tokenizer into the "
            "folder with tokenizer.save_pretrained."
        )
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise _unreadable(checkpoint, "tokenizer", error) from error


def load_hugging_face(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """The checkpoint as a Hugging Face model, from safetensors alone.

    Args:
        checkpoint: A folder.
        dtype: Type of the weights.
        device: Where they go; shards are read straight into it, one after the other.
        trust_remote_code: Allow code that the checkpoint brings along to run.

    Returns:
        A causal language model in evaluation mode.

    Raises:
        UserError: The weights are pickled, incomplete, or cannot be read.
    """
    _ = checkpoint.weight_files  # refuses pickles and missing shards in its own words
    try:
        with _quiet_unless_terminal():
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                attn_implementation="eager",  # soft caps and sinks are exact in this one
                experts_implementation="eager",  # and this one knows every type
                output_loading_info=True,
            )
    except UNREADABLE as error:
        raise _unreadable(checkpoint, "model", error) from error
    _refuse_incomplete(checkpoint, report)
    return model.eval()


def _refuse_incomplete(checkpoint: Checkpoint, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{checkpoint.source} lacks {len(missing)} weights of its architecture, as "
            f"{missing[0]}; save the whole causal language model with save_pretrained."
        )


def _unreadable(checkpoint: Checkpoint, part: str, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"The {part} of {checkpoint.source} needs code that it brings along; read that code, "
            "and if you trust it pass trust_remote_code=True."
        )
    first_line = str(error).strip().partition("\n")[0]
    return UserError(
        f"The {part} of {checkpoint.source} cannot be read ({type(error).__name__}: {first_line}); "
        "restore the folder, or save it again with save_pretrained."
    )


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Show transformers' progress bars only to a person who watches."""
    hide = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()
