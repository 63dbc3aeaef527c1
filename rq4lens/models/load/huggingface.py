"""Load the Hugging Face side of a checkpoint: its model and its tokenizer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    modeling_utils,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from rq4lens.disk.files import short_value
from rq4lens.errors import UserError
from rq4lens.models.load.architectures import ARCHITECTURES, require_loadable
from rq4lens.models.load.checkpoint import (
    DTYPES,
    INDEX,
    LEFTOVER,
    WEIGHTS,
    Checkpoint,
    explained,
)
from rq4lens.models.load.devices import Placement
from rq4lens.models.load.lens import Backend, quantization_method

SIZES = (
    "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_layers", "num_attention_heads",
    "n_head", "num_heads", "num_key_value_heads", "head_dim", "vocab_size", "intermediate_size",
    "max_position_embeddings", "n_positions", "n_ctx",
)  # fmt: skip
"""Sizes by the names that architectures give to them; null leaves one to the architecture."""


def loadable_architecture(checkpoint: Checkpoint, backend: Backend) -> str:
    """The name of a checkpoint's architecture, after what ``config.json`` says was checked."""
    config, architecture = checkpoint.config, checkpoint.architecture
    require_loadable(architecture, backend)
    _refuse_quantized(checkpoint)
    _check_model_type(checkpoint)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name in SIZES:
            value: Any = part.get(name)
            if value is not None and not (isinstance(value, int) and 1 <= value < 2**31):
                raise checkpoint.wrong(name, value, f"a whole number from 1 to {2**31 - 1}")
    return str(architecture)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuse weights that are stored packed or apart from their scales."""
    settings = checkpoint.config.get("quantization_config")
    if settings:
        named = quantization_method(checkpoint.config) if isinstance(settings, dict) else None
        raise UserError(
            f"{checkpoint.source} is quantized with {named or 'an unnamed method'}; head patching "
            "needs the plain weights: use the full-precision checkpoint, or save a dequantized "
            "copy."
        )


def _check_model_type(checkpoint: Checkpoint) -> None:
    """Refuse a configuration that names two different models: one reads it, one is converted."""
    config, source = checkpoint.config, checkpoint.source
    own_code = config.get("auto_map")
    if own_code is not None and not isinstance(own_code, dict):
        raise checkpoint.wrong("auto_map", own_code, "an object that names classes")
    named = config.get("model_type")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(named) if isinstance(named, str) else None
    if known is None and own_code:
        return  # transformers asks for trust_remote_code, or has been given it
    named_by_both = checkpoint.architecture
    same = known == named_by_both or (
        known in ARCHITECTURES and ARCHITECTURES.get(str(named_by_both)) == ARCHITECTURES[known]
    )
    if not same and not (own_code and checkpoint.trust_remote_code):
        raise UserError(
            f"config.json of {source} says model_type={short_value(named)} and the architecture "
            f"{short_value(checkpoint.architecture)}, which do not belong together; write the "
            "model_type that save_pretrained writes for this architecture."
        )


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer."""
    if not checkpoint.has_tokenizer:
        raise UserError(
            f"{checkpoint.source} has no tokenizer; save the fine-tune's own tokenizer into the "
            "folder with tokenizer.save_pretrained."
        )
    with _reading("tokenizer", checkpoint):
        return AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code
        )


def read_hf_config(checkpoint: Checkpoint) -> Any:
    """The configuration of a checkpoint as transformers reads it."""
    with _reading("model", checkpoint):
        return AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code
        )


def skeleton_of(
    checkpoint: Checkpoint, hf_config: Any = None, dtype: torch.dtype | None = None
) -> Any:
    """The Hugging Face model that a configuration describes, without memory for its weights."""
    config = read_hf_config(checkpoint) if hf_config is None else hf_config
    with _reading("model", checkpoint), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code
        )


def device_map_of(skeleton: Any, placement: Placement) -> dict[str, str]:
    """A placement in the names of the Hugging Face model, as ``from_pretrained`` takes it."""
    path, layers = blocks_of(skeleton)
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


def blocks_of(skeleton: Any) -> tuple[str, nn.ModuleList]:
    """The list of a model's blocks, and the path to it."""
    n_layers = skeleton.config.get_text_config().num_hidden_layers
    return next(
        (name, module)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    )


READERS = 8
"""Pieces of files that are on their way to a GPU at once."""

PIECE_BYTES = 2**24


def read_ahead(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> Future[dict[str, Tensor]] | None:
    """Begin to read a checkpoint onto a GPU, beside other work.

    None where transformers reads as well by itself: on other devices it maps the files, and weights
    of another type would be in memory twice until all are cast, as experts until they are merged.
    """
    merged = any(".experts." in name for name in checkpoint.tensors)
    if device.type != "cuda" or checkpoint.dtypes != {dtype} or merged:
        return None
    pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
    tensors = pool.submit(read_tensors, checkpoint, device)
    pool.shutdown(wait=False)
    return tensors


def read_tensors(checkpoint: Checkpoint, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on a device.

    A GPU copies from pinned memory as fast as its bus is. From a mapped file, which is what
    libraries hand to it, every piece is copied once more on the way.
    """
    starts = {file: _starts(file) for file in checkpoint.weight_files}
    found: dict[str, Tensor] = {}
    pieces: list[tuple[Path, int, Tensor]] = []
    for name, stored in checkpoint.tensors.items():
        found[name] = torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device=device)
        data, start = found[name].reshape(-1).view(torch.uint8), starts[stored.file][name]
        for at in range(0, len(data), PIECE_BYTES):
            pieces.append((stored.file, start + at, data[at : at + PIECE_BYTES]))
    with ThreadPoolExecutor(READERS) as pool:  # reading and copying let go of the interpreter lock
        readers = [pool.submit(_read_pieces, pieces[reader::READERS]) for reader in range(READERS)]
    for reader in readers:
        reader.result()
    return found


def _starts(file: Path) -> dict[str, int]:
    """Where each tensor of a safetensors file begins; its library does not say."""
    with file.open("rb") as opened:
        n_header = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(n_header))
    header.pop("__metadata__", None)
    return {name: 8 + n_header + entry["data_offsets"][0] for name, entry in header.items()}


def _read_pieces(pieces: Sequence[tuple[Path, int, Tensor]]) -> None:
    on_gpu = any(piece.is_cuda for _, _, piece in pieces)
    memory = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
    for path, start, piece in pieces:
        here = memory[: len(piece)]
        with path.open("rb") as file:
            file.seek(start)
            if file.readinto(here.numpy().data) != len(here):
                raise EOFError(f"{path.name} ends too early")
        piece.copy_(here)


def load_hugging_face(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device_map: Mapping[str, str] | None = None,
    tensors: Future[dict[str, Tensor]] | None = None,
) -> Any:
    """The checkpoint as a Hugging Face model, from safetensors alone.

    It takes over ``tensors`` where they were read ahead; else transformers reads the files.
    """
    _ = checkpoint.tensors  # refuses by name what transformers would quietly cast to numbers
    settings: dict[str, Any] = {
        "dtype": dtype,
        "device_map": dict(device_map or {"": "cpu"}),
        "attn_implementation": "eager",  # soft caps and sinks are exact in this one
        "experts_implementation": "eager",  # and this one knows every type
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused below, by name
    }
    # Weights come from the files: none need be drawn first.
    with _reading("model", checkpoint), _quiet_unless_terminal(), no_init_weights():
        if tensors is None:
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                use_safetensors=True,
                trust_remote_code=checkpoint.trust_remote_code,
                **settings,
            )
        else:
            skeleton = skeleton_of(checkpoint)
            with _nothing_reserved():
                model, report = type(skeleton).from_pretrained(
                    None, config=skeleton.config, state_dict=tensors.result(), **settings
                )
            model.name_or_path = model.config.name_or_path = str(checkpoint.folder)
    _refuse_other_weights(checkpoint, report)
    return model


@contextmanager
def _nothing_reserved() -> Iterator[None]:
    """Keep transformers from reserving a GPU's memory for weights that are there already."""
    reserve = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = reserve


def require_finite(hf_model: Any, source: str) -> None:
    """Refuse weights that are not numbers, also in tokens that no check reads."""
    for name, weight in hf_model.named_parameters():
        # The extremes are NaN if any number is, and need no copy of the tensor.
        if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            raise UserError(
                f"{source} has weights that are not finite, in {name}; save the fine-tune again "
                "from a step before it broke."
            )


def _refuse_other_weights(checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    source, missing = checkpoint.source, sorted(report["missing_keys"])
    lacking = WEIGHTS if checkpoint.weight_names == (WEIGHTS,) else INDEX
    if report["mismatched_keys"]:
        name, stored, asked = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"{name} of {source} has the shape {list(stored)}, and config.json asks for "
            f"{list(asked)}; restore the file that belongs to the weights."
        )
    if missing:
        raise UserError(
            f"{lacking} of {source} lacks {len(missing)} weights of its architecture, as "
            f"{missing[0]}; save the whole causal language model with save_pretrained."
        )
    surplus = sorted(n for n in report["unexpected_keys"] if not LEFTOVER.search(n))
    if surplus:
        raise UserError(
            f"{source} holds {len(surplus)} weights that its config.json has no place for, as "
            f"{short_value(surplus[0], 160)}; without them it would be another model: restore the "
            "config.json that belongs to the weights, or save the model without them."
        )


@contextmanager
def _reading(part: str, checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what transformers raises on a damaged folder into one sentence."""
    what = f"The {part} of {checkpoint.source}"
    fix = "restore the folder, or save it again with save_pretrained"
    with explained(f"{what} cannot be read", fix):
        try:
            yield
        except Exception as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"{what} needs code that it brings along; read that code, and if you trust it "
                "pass trust_remote_code=True."
            ) from error


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
