"""Cards of models that were loaded before, so that a model need not be loaded to be known.

A card is found by the content of the checkpoint's files. Whoever finds the card of a model, and the
activations that were captured with it, needs the model itself no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rq4lens.disk.store import Store
from rq4lens.models.load.adapters import base_of
from rq4lens.models.load.checkpoint import SMALL_FILES, Checkpoint, locate
from rq4lens.models.pair import ModelCard


@dataclass(frozen=True, kw_only=True)
class CardIngredients:
    """Everything that can change what is known of a model."""

    checkpoint: str
    dtype: str
    device: str
    """Kind of device; an adapter is merged there."""
    trust_remote_code: bool
    libraries: str

    @property
    def label(self) -> str:
        """A readable start of the file name."""
        return f"card_{self.dtype}"

    def to_dict(self) -> dict[str, Any]:
        """Every ingredient by name."""
        return asdict(self)


def kept_card(store: Store, ingredients: CardIngredients) -> ModelCard | None:
    """The card of a model that was loaded before, or None."""
    values = store.get(ingredients)
    try:
        return None if values is None else ModelCard(**values)
    except TypeError:  # written by a version that knew more or less of a model
        return None


def checkpoint_fingerprint(source: str | Path, revision: str | None = None) -> str:
    """SHA-256 over name and content of the files that a model and its tokenizer are loaded from.

    Raises:
        UserError: There is no such checkpoint, or it has no safetensors.
    """
    checkpoint = locate(source, revision)
    parts = [checkpoint, base_of(checkpoint)] if checkpoint.is_adapter else [checkpoint]
    return hashlib.sha256("".join(map(_digest_of_files, parts)).encode()).hexdigest()


def _digest_of_files(checkpoint: Checkpoint) -> str:
    small = (path for pattern in SMALL_FILES for path in checkpoint.folder.glob(pattern))
    files = sorted({*small, *checkpoint.weight_files})
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter lock
        return _joined(zip(files, pool.map(_file_digest, files), strict=True))


def _joined(digests: Iterable[tuple[Path, str]]) -> str:
    whole = "".join(f"{path.name}\0{digest}\n" for path, digest in digests)
    return hashlib.sha256(whole.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
