"""Find a checkpoint on disk or on the hub and say clearly why one cannot be used.

Nothing here reads a weight: a checkpoint is refused before anything large is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
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
from rq4lens.files import short_reason, short_value
from rq4lens.models.checkpoint_json import read_json
from rq4lens.models.weight_files import StoredTensor, stored_tensors, weight_files, weight_names

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
"""What is fetched from the hub before the weights: configuration, tokenizer, index."""

UNREACHABLE = (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    HfHubHTTPError,
    OSError,
)


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
        return weight_files(self.folder, self.source)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of the weights by name, from the headers of their files.

        Raises:
            UserError: A file is missing or damaged, or does not hold plain weights.
        """
        return stored_tensors(self.folder, self.source)


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
    path = _possible_path(source)
    if path.is_dir():
        _refuse_what_is_no_file(path)
        return Checkpoint(source=str(source), folder=path, revision=None)
    if is_path(source):
        raise UserError(
            f"There is no folder {source}; give an existing Hugging Face folder "
            "or a hub id as org/name."
        )
    folder = _download(str(source), revision, SMALL_FILES)
    if with_weights:
        _download(str(source), revision, weight_names(folder))
    return Checkpoint(source=str(source), folder=folder, revision=folder.name)


def _possible_path(source: str | Path) -> Path:
    """The source as a path, if any file system could have it."""
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as problem:
        raise UserError(
            f"{short_value(str(source))} can be neither a folder nor a hub id "
            f"({short_reason(problem)}); give an existing Hugging Face folder or a hub id as "
            "org/name."
        ) from None
    return path


def _refuse_what_is_no_file(folder: Path) -> None:
    """Refuse what libraries would pass over or hang at: dead links, pipes and devices."""
    for pattern in (*SMALL_FILES, "*.safetensors"):
        for path in folder.glob(pattern):
            if not path.is_file():
                raise UserError(
                    f"{path} is not a regular file (a link that leads nowhere, a folder, a pipe or "
                    "a device); fetch or save the checkpoint again."
                )


def is_path(source: str | Path) -> bool:
    """Whether a source can only be meant as a path: hub ids are ``name`` or ``org/name``."""
    text = str(source)
    path = Path(source)
    spelled = text.startswith((".", "~")) or text.count("/") > 1 or "\\" in text
    return isinstance(source, Path) or path.is_absolute() or spelled or path.exists()


def architecture_of(checkpoint: Checkpoint) -> str | None:
    """The architecture's name, from ``config.json`` or its model type; None if neither says.

    Raises:
        UserError: ``config.json`` cannot be read, or names it in no readable way.
    """
    config = checkpoint.config
    stated = config.get("architectures") or [None]
    if not isinstance(stated, list) or not isinstance(stated[0], str | None):
        raise UserError(
            f"architectures={short_value(stated)} in config.json of {checkpoint.source} must be a "
            "list of one name, as ['LlamaForCausalLM']; restore the file."
        )
    return stated[0] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuse weights that are stored packed or apart from their scales.

    Args:
        checkpoint: A folder with a ``config.json``.

    Raises:
        UserError: Its configuration declares a quantization.
    """
    config = checkpoint.config
    if config.get("quantization_config"):
        settings = config["quantization_config"]
        named = quantization_method(config) if isinstance(settings, dict) else None
        method = named or "an unnamed method"
        raise UserError(
            f"{checkpoint.source} is quantized with {method}; head patching needs the plain "
            "weights: use the full-precision checkpoint, or save a dequantized copy."
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
