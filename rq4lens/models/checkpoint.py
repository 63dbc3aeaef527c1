"""Find a checkpoint on disk or on the hub and say clearly why one cannot be used.

Nothing here reads a weight: a checkpoint is refused before anything large is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformer_lens.utilities.quantization import quantization_method
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rq4lens.errors import UserError

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
"""What is fetched from the hub before the weights: configuration, tokenizer, index."""

UNREACHABLE = (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    HfHubHTTPError,
    OSError,
)
PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5")


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder on this machine.

    Attributes:
        source: What the user asked for: a folder or a hub id.
        folder: Where its files lie.
        revision: The commit of a hub id; None for a folder.
    """

    source: str
    folder: Path
    revision: str | None

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter, to be merged into its base model."""
        return (self.folder / "adapter_config.json").is_file()

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies in the folder."""
        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        return any((self.folder / name).is_file() for name in names)

    @property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``.

        Raises:
            UserError: The folder has none.
        """
        return read_json(self.folder / "config.json", self.source)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files of the weights.

        Raises:
            UserError: There are none, or a shard that the index lists is missing.
        """
        return _weight_files(self)


def read_json(path: Path, source: str) -> dict[str, Any]:
    """A JSON file of a checkpoint.

    Args:
        path: The file.
        source: The checkpoint, for the error.

    Returns:
        Its content.

    Raises:
        UserError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{source} has no {path.name}; give a folder written by save_pretrained, "
            "or a hub id as org/name."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore the file.") from None


def locate(
    source: str | Path, revision: str | None = None, *, with_weights: bool = True
) -> Checkpoint:
    """The folder of a checkpoint, fetched from the hub if it is a hub id.

    Args:
        source: A Hugging Face folder or a hub id as ``org/name``.
        revision: Commit, branch or tag of a hub id.
        with_weights: Also fetch the weights, not only configuration and tokenizer.

    Returns:
        The folder with the exact commit it holds.

    Raises:
        UserError: No such folder or hub id, no access, or no network.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return Checkpoint(source=str(source), folder=path, revision=None)
    if is_path(source):
        raise UserError(
            f"There is no folder {source}; give an existing Hugging Face folder "
            "or a hub id as org/name."
        )
    folder = _download(str(source), revision, SMALL_FILES)
    if with_weights:
        _download(str(source), revision, _weight_names(folder))
    return Checkpoint(source=str(source), folder=folder, revision=folder.name)


def is_path(source: str | Path) -> bool:
    """Whether a source can only be meant as a path: hub ids are ``name`` or ``org/name``."""
    text = str(source)
    path = Path(source)
    spelled = text.startswith((".", "~")) or text.count("/") > 1 or "\\" in text
    return isinstance(source, Path) or path.is_absolute() or spelled or path.exists()


def architecture_of(checkpoint: Checkpoint) -> str | None:
    """The architecture's name, from ``config.json`` or its model type; None if neither says."""
    config = checkpoint.config
    stated = config.get("architectures") or [None]
    return stated[0] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type", ""))


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuse weights that are stored packed or apart from their scales.

    Args:
        checkpoint: A folder with a ``config.json``.

    Raises:
        UserError: Its configuration declares a quantization.
    """
    config = checkpoint.config
    if config.get("quantization_config"):
        method = quantization_method(config) or "an unnamed method"
        raise UserError(
            f"{checkpoint.source} is quantized with {method}; head patching needs the plain "
            "weights: use the full-precision checkpoint, or save a dequantized copy."
        )


def _weight_names(folder: Path) -> tuple[str, ...]:
    """File names of the weights as the small files name them, in transformers' own order."""
    if (folder / "adapter_config.json").is_file():
        return ("adapter_model.safetensors",)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return ("model.safetensors",)
    weight_map = read_json(index, str(folder))["weight_map"]
    return tuple(sorted(set(weight_map.values())))


def _weight_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    files = tuple(checkpoint.folder / name for name in _weight_names(checkpoint.folder))
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        return files
    pickled = sorted(p.name for pattern in PICKLED for p in checkpoint.folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{checkpoint.source} holds its weights as {pickled[0]}, which is not safetensors; "
            "only safetensors are read, as the others can run code: save it again with "
            "save_pretrained."
        )
    raise UserError(
        f"{checkpoint.source} lacks the weight file {missing[0]}; only safetensors are read, as "
        "one model.safetensors or as shards with their model.safetensors.index.json."
    )


def _download(source: str, revision: str | None, names: tuple[str, ...]) -> Path:
    ignored = ["*/*"]  # copies for other runtimes lie in subfolders
    try:
        return Path(
            snapshot_download(
                source, revision=revision, allow_patterns=list(names), ignore_patterns=ignored
            )
        )
    except HFValidationError:
        reason = "is neither a folder nor a well-formed hub id; write org/name or an existing path"
    except GatedRepoError:
        reason = (
            "is gated and this machine has no access to it; accept its terms on huggingface.co "
            "and log in with `hf auth login`"
        )
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r}; give a branch, tag or commit that exists"
    except RepositoryNotFoundError:
        reason = (
            "is neither a folder here nor a hub id that this machine may read; check the "
            "spelling, or log in with `hf auth login` if it is private"
        )
    except UNREACHABLE as error:
        reason = (
            f"is not a folder here, and the hub could not be reached ({type(error).__name__}); "
            "check the path or the network, or fetch it first with `hf download`"
        )
    raise UserError(f"{source} {reason}.")
