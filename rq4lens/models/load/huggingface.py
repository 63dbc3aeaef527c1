"""Load the Hugging Face side of a checkpoint: its model and its tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from rq4lens.disk.files import short_reason, short_value
from rq4lens.errors import UserError
from rq4lens.models.load.checkpoint import LEFTOVER, Checkpoint
from rq4lens.models.load.devices import Placement

MODEL_SLACK = 1_000_000
"""How many values more than twice its files a model may have; buffers are not in files."""


def load_tokenizer(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer.

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
    except Exception as error:  # a stranger's folder makes it fail in any way
        raise _unreadable(checkpoint, "tokenizer", error) from error


def read_hf_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a checkpoint as transformers reads it.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a stranger's folder makes it fail in any way
        raise _unreadable(checkpoint, "model", error) from error


def skeleton_of(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The Hugging Face model that a configuration describes, without memory for its weights.

    Raises:
        UserError: There is no such model, or it is larger than the checkpoint's files.
    """
    config = read_hf_config(checkpoint, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a stranger's folder makes it fail in any way
        raise _unreadable(checkpoint, "model", error) from error
    _refuse_larger_than_files(checkpoint, model)
    return model


def device_map_of(skeleton: Any, placement: Placement) -> dict[str, str]:
    """A placement in the names of the Hugging Face model, as ``from_pretrained`` takes it."""
    path, layers = _blocks_of(skeleton)
    tied = skeleton.get_output_embeddings().weight is skeleton.get_input_embeddings().weight
    first, last = str(placement.entry), str(placement.exit)
    found = {f"{path}.{i}": str(place) for i, place in enumerate(placement.layers[: len(layers)])}
    module, prefix = skeleton, ""
    for part in path.split("."):
        device = first
        for name, child in module.named_children():
            if name == part:
                device = last
            elif child is skeleton.get_output_embeddings() and tied:
                found[prefix + name] = first
            else:
                found[prefix + name] = device
        module, prefix = getattr(module, part), f"{prefix}{part}."
    return found


def _blocks_of(skeleton: Any) -> tuple[str, nn.ModuleList]:
    """The list of a model's blocks, and the path to it."""
    n_layers = skeleton.config.get_text_config().num_hidden_layers
    return next(
        (name, module)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    )


def _n_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def load_hugging_face(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device_map: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The checkpoint as a Hugging Face model, from safetensors alone.

    Raises:
        UserError: The weights are pickled, incomplete, or cannot be read.
    """
    try:
        with _quiet_unless_terminal():
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=dtype,
                device_map=dict(device_map or {"": "cpu"}),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                attn_implementation="eager",  # soft caps and sinks are exact in this one
                experts_implementation="eager",  # and this one knows every type
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a stranger's folder makes it fail in any way
        raise _unreadable(checkpoint, "model", error) from error
    _refuse_other_weights(checkpoint, report)
    return model.eval()


def require_finite(hf_model: Any, source: str) -> None:
    """Refuse weights that are not numbers: one of them, in a token that no check reads, is enough.

    Raises:
        UserError: A weight is NaN or infinite.
    """
    for name, weight in hf_model.named_parameters():
        # The extremes are NaN if any number is, and need no copy of the tensor.
        if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            raise UserError(
                f"{source} has weights that are not finite, in {name}; save the fine-tune again "
                "from a step before it broke."
            )


def _refuse_larger_than_files(checkpoint: Checkpoint, skeleton: Any) -> None:
    """Refuse a configuration whose model would be filled up with random numbers, or the memory."""
    asked = _n_weights(skeleton)
    held = sum(tensor.n_values for tensor in checkpoint.tensors.values())
    if asked > 2 * held + MODEL_SLACK:
        name, largest = max(skeleton.named_parameters(), key=lambda each: each[1].numel())
        raise UserError(
            f"config.json of {checkpoint.source} describes {asked:,} weights, as {name} of shape "
            f"{list(largest.shape)}, and its files hold {held:,}; restore the file that "
            "save_pretrained wrote."
        )


def _refuse_other_weights(checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    source, missing = checkpoint.source, sorted(report["missing_keys"])
    if report["mismatched_keys"]:
        name, stored, asked = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"{name} of {source} has the shape {list(stored)}, and config.json asks for "
            f"{list(asked)}; restore the file that belongs to the weights."
        )
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} weights of its architecture, as "
            f"{missing[0]}; save the whole causal language model with save_pretrained."
        )
    surplus = sorted(n for n in report["unexpected_keys"] if not LEFTOVER.search(n))
    if surplus:
        raise UserError(
            f"{source} holds {len(surplus)} weights that its config.json has no place for, as "
            f"{short_value(surplus[0], 160)}; without them it would be another model: restore the "
            "config.json that belongs to the weights, or save the model without them."
        )


def _unreadable(checkpoint: Checkpoint, part: str, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"The {part} of {checkpoint.source} needs code that it brings along; read that code, "
            "and if you trust it pass trust_remote_code=True."
        )
    first_line = short_reason(error)
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
