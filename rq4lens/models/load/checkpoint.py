"""Find a checkpoint, look at its small files, and say why one cannot be used."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
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
from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rq4lens.disk.files import parse_json, read_regular_file, short_reason, short_value
from rq4lens.errors import UserError


def read_json(path: Path, source: str) -> dict[str, Any]:
    """A JSON object of a checkpoint."""
    try:
        value = parse_json(read_regular_file(path), unique_keys=True)
    except FileNotFoundError:
        raise UserError(
            f"{source} has no {path.name}; give a folder written by save_pretrained, "
            "or a hub id as org/name."
        ) from None
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(
            f"{path} is not valid JSON ({short_reason(problem)}); restore the file."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold an object, as {{...}}; restore the file.")
    return value


@contextmanager
def explained(what: str, fix: str) -> Iterator[None]:
    """Turn what a library raises on a damaged checkpoint into one sentence."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # a configuration can make it fail in any way
        raise UserError(
            f"{what} ({type(problem).__name__}: {short_reason(problem)}); {fix}."
        ) from problem


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"\w[\w.-]{0,200}\.safetensors")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""How weights that are neither packed nor quantized are stored."""

LEFTOVER = re.compile(
    r"(\.|^)(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|(\.|^)position_ids$"
)
"""Masks and frequencies that early checkpoints hold beside their weights; nothing reads them."""

ADAPTER = "adapter_model.safetensors"
FORMS = (
    WEIGHTS, INDEX, ADAPTER, "pytorch_model*.bin", "adapter_model.bin", "tf_model*.h5",
    "flax_model*.msgpack",
)  # fmt: skip
"""What save_pretrained writes weights as; a folder that was saved into twice may hold several."""

PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5")


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of a tensor; ``dtype`` as safetensors spells it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
"""What is fetched from the hub before the weights: configuration, tokenizer, index."""


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder on this machine, with what may be done with it.

    ``source`` is what the user asked for; ``revision`` the commit of a hub id, None for a folder.
    """

    source: str
    folder: Path
    revision: str | None
    with_weights: bool = True
    """Whether weights on the hub are fetched too, also those of an adapter's base."""
    trust_remote_code: bool = False

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
    def config_name(self) -> str:
        """The file that says what the weights are."""
        return "adapter_config.json" if self.is_adapter else "config.json"

    @cached_property
    def config(self) -> dict[str, Any]:
        """What it says."""
        return read_json(self.folder / self.config_name, self.source)

    @property
    def architecture(self) -> str | None:
        """The architecture's name, from ``config.json`` or its model type; None if neither says."""
        stated = self.config.get("architectures") or [None]
        if not isinstance(stated, list) or not isinstance(stated[0], str | None):
            raise UserError(
                f"architectures={short_value(stated)} in config.json of {self.source} must be a "
                "list of one name, as ['LlamaForCausalLM']; restore the file."
            )
        return stated[0] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(
            str(self.config.get("model_type"))
        )

    def wrong(self, name: str, value: Any, allowed: str) -> UserError:
        """What is said of a setting that cannot be meant."""
        writer = "PEFT" if self.is_adapter else "save_pretrained"
        return UserError(
            f"{name}={short_value(value)} in {self.config_name} of {self.source} must be "
            f"{allowed}; restore the file that {writer} wrote."
        )

    @property
    def weight_names(self) -> tuple[str, ...]:
        """File names of the weights as the small files name them, in transformers' own order."""
        if self.is_adapter:
            return (ADAPTER,)
        if (self.folder / WEIGHTS).is_file() or not (self.folder / INDEX).is_file():
            return (WEIGHTS,)
        weight_map: Any = read_json(self.folder / INDEX, self.source).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(
                f"{self.folder / INDEX} has no weight_map from tensors to files; restore the file."
            )
        for shard in weight_map.values():
            if not (isinstance(shard, str) and SHARD.fullmatch(shard)):
                raise UserError(
                    f"the weight_map of {self.folder / INDEX} names {short_value(shard)}; allowed "
                    "are safetensors files in the same folder: restore the file."
                )
        return tuple(sorted(set(weight_map.values())))

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files of the weights."""
        # A repository of the hub holds one commit's weights in several forms. So does a folder that
        # was saved into twice, and the weights that are read may be older ones.
        forms = [sorted(path.name for path in self.folder.glob(form))[:1] for form in FORMS]
        names = list(chain.from_iterable(forms))
        if len(names) > 1 and self.revision is None:
            raise UserError(
                f"{self.source} holds weights in two forms, {names[0]} and {names[1]}, and nothing "
                "says which of them are meant; move the others out of the folder."
            )
        files = tuple(self.folder / name for name in self.weight_names)
        missing = [file.name for file in files if not file.is_file()]
        if not missing:
            return files
        pickled = sorted(p.name for pattern in PICKLED for p in self.folder.glob(pattern))
        if pickled:
            raise UserError(
                f"{self.source} holds its weights as {pickled[0]}, which is not safetensors; only "
                "safetensors are read, as the others can run code: save it again with "
                "save_pretrained."
            )
        raise UserError(
            f"{self.source} lacks the weight file {missing[0]}; only safetensors are read, as one "
            f"model.safetensors or as shards with their {INDEX}."
        )

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of the weights by name, from the headers of their files."""
        found: dict[str, StoredTensor] = {}
        headers = map(_header, self.weight_files)
        for name, tensor in chain.from_iterable(header.items() for header in headers):
            if name in found:
                raise UserError(
                    f"{short_value(name)} stands in both {found[name].file} and "
                    f"{tensor.file.name}; keep the file that is right."
                )
            if tensor.dtype not in DTYPES and not LEFTOVER.search(name):
                raise UserError(
                    f"{short_value(name)} of {self.source} is stored as {tensor.dtype}, which is "
                    f"not the type of plain weights; allowed are {', '.join(DTYPES)}: save it "
                    "again in one of these."
                )
            found[name] = tensor
        return found

    @property
    def dtypes(self) -> set[torch.dtype | None]:
        """The types of the stored tensors; None for what are no weights."""
        return {DTYPES.get(each.dtype) for each in self.tensors.values()}


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


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold the same numbers under the same names, whatever their files."""
    if one.folder.samefile(other.folder):
        return True
    shapes = [{n: t.shape for n, t in each.tensors.items()} for each in (one, other)]
    return shapes[0] == shapes[1] and all(
        torch.equal(stored_values(name, one), stored_values(name, other)) for name in shapes[0]
    )


def stored_values(name: str, checkpoint: Checkpoint) -> torch.Tensor:
    """The numbers of one tensor of a checkpoint, in float32."""
    with safe_open(checkpoint.tensors[name].file, "pt") as tensors:
        return tensors.get_tensor(name).float()


def locate(
    source: str | Path,
    revision: str | None = None,
    *,
    with_weights: bool = True,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """The folder of a checkpoint, fetched from the hub if it is a hub id."""
    text = str(source)
    path = Path(os.path.expanduser(text))  # noqa: PTH111 - leaves an unknown home as it is
    if os.path.isdir(path):  # noqa: PTH112 - False for what no file system can have, too
        _refuse_what_is_no_file(path)
        return Checkpoint(text, path, None, with_weights, trust_remote_code)
    # Hub ids are NAME or ORG/NAME; anything else can only be meant as a path.
    spelled = text.startswith((".", "~", "/")) or text.count("/") > 1 or "\\" in text
    if spelled or isinstance(source, Path) or path.is_absolute() or os.path.exists(path):  # noqa: PTH110
        raise UserError(
            f"There is no folder {text[:200]}; give an existing Hugging Face folder "
            "or a hub id as org/name."
        )
    folder = _download(text, revision, SMALL_FILES)
    found = Checkpoint(text, folder, folder.name, with_weights, trust_remote_code)
    if with_weights:
        _download(text, revision, found.weight_names)
    return found


def _refuse_what_is_no_file(folder: Path) -> None:
    """Refuse what libraries would pass over or hang at: dead links, pipes and devices."""
    for pattern in (*SMALL_FILES, "*.safetensors"):
        for path in folder.glob(pattern):
            if not path.is_file():
                raise UserError(
                    f"{path} is not a regular file (a link that leads nowhere, a folder, a pipe or "
                    "a device); fetch or save the checkpoint again."
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
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = (
            f"is not a folder here, and the hub could not be reached ({type(error).__name__}); "
            "check the path or the network, or fetch it first with `hf download`"
        )
    raise UserError(f"{source[:200]} {reason}.")
