"""The safetensors files of a checkpoint: which they are, and what their headers say.

No file outside the folder is named, no tensor comes from two files, and no number is read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rq4lens.errors import UserError
from rq4lens.files import short_reason, short_value
from rq4lens.models.checkpoint_json import read_json

INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
"""How weights that are neither packed nor quantized are stored."""

LEFTOVER = re.compile(
    r"(\.|^)(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|(\.|^)position_ids$"
)
"""Masks and frequencies that early checkpoints hold beside their weights; nothing reads them."""

PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5")


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of a tensor.

    Attributes:
        dtype: Its type, as safetensors spells it.
        shape: Its shape.
        file: The file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def n_values(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def weight_names(folder: Path) -> tuple[str, ...]:
    """File names of the weights as the small files name them, in transformers' own order.

    Raises:
        UserError: The index is damaged, or names anything but safetensors files beside it.
    """
    if (folder / "adapter_config.json").is_file():
        return ("adapter_model.safetensors",)
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return ("model.safetensors",)
    return tuple(sorted(set(_weight_map(folder).values())))


def weight_files(folder: Path, source: str) -> tuple[Path, ...]:
    """The safetensors files of the weights.

    Raises:
        UserError: There are none, or a shard that the index lists is missing.
    """
    files = tuple(folder / name for name in weight_names(folder))
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        return files
    pickled = sorted(p.name for pattern in PICKLED for p in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{source} holds its weights as {pickled[0]}, which is not safetensors; only "
            "safetensors are read, as the others can run code: save it again with "
            "save_pretrained."
        )
    raise UserError(
        f"{source} lacks the weight file {missing[0]}; only safetensors are read, as one "
        f"model.safetensors or as shards with their {INDEX}."
    )


def stored_tensors(folder: Path, source: str) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the headers of its files.

    Args:
        folder: A Hugging Face folder.
        source: The checkpoint, for the error.

    Returns:
        Type, shape and file of each.

    Raises:
        UserError: A file is damaged, a type is not that of plain weights, or files and index
            contradict each other.
    """
    files = weight_files(folder, source)
    found = _unrepeated(map(_header, files))
    if not found:
        raise UserError(f"{source} lacks weights, as its {files[0].name} is empty; save it again.")
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES and not LEFTOVER.search(name):
            raise UserError(
                f"{short_value(name)} of {source} is stored as {tensor.dtype}, which is not the "
                f"type of plain weights; allowed are {', '.join(DTYPES)}: save it again in one of "
                "these."
            )
    if len(files) > 1 or files[0].name not in ("model.safetensors", "adapter_model.safetensors"):
        _check_against(found, _weight_map(folder), source)
    return found


def _weight_map(folder: Path) -> Mapping[str, str]:
    index = read_json(folder / INDEX, str(folder))
    weight_map: Any = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{folder / INDEX} has no weight_map from tensors to files; restore the file."
        )
    for shard in weight_map.values():
        plain = isinstance(shard, str) and re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", shard)
        if not plain:
            raise UserError(
                f"the weight_map of {folder / INDEX} names {short_value(shard)}; allowed are "
                "safetensors files in the same folder: restore the file."
            )
    return weight_map


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(part.get_dtype(), tuple(part.get_shape()), file)
                for name, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError, OverflowError) as problem:
        raise UserError(
            f"{file} is no whole safetensors file ({short_reason(problem)}); fetch or save it "
            "again."
        ) from None


def _unrepeated(headers: Iterable[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for header in headers:
        for name, tensor in header.items():
            if name in found:
                raise UserError(
                    f"{short_value(name)} stands in both {found[name].file} and "
                    f"{tensor.file.name}; keep the file that is right."
                )
            found[name] = tensor
    return found


def _check_against(
    found: Mapping[str, StoredTensor], weight_map: Mapping[str, str], source: str
) -> None:
    for name, shard in weight_map.items():
        if name not in found or found[name].file.name != shard:
            raise UserError(
                f"{INDEX} of {source} says that {short_value(name)} is in {shard}, where it is "
                "not; fetch or save the checkpoint again."
            )
