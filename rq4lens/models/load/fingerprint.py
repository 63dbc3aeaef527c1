"""Fingerprints: of checkpoints, of weights, and of the libraries that compute with them."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from rq4lens.models.load.adapters import base_of
from rq4lens.models.load.checkpoint import SMALL_FILES, Checkpoint, locate


def arithmetic_libraries() -> str:
    """The libraries of which another version may round, or read a configuration, in another way."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformer-lens"))


def checkpoint_fingerprint(source: str | Path, revision: str | None = None) -> str:
    """SHA-256 over name and content of the files that a model and its tokenizer are loaded from."""
    checkpoint = locate(source, revision)
    parts = [checkpoint, base_of(checkpoint)] if checkpoint.is_adapter else [checkpoint]
    return hashlib.sha256("".join(map(_digest_of_files, parts)).encode()).hexdigest()


def _digest_of_files(checkpoint: Checkpoint) -> str:
    small = (path for pattern in SMALL_FILES for path in checkpoint.folder.glob(pattern))
    files = sorted({*small, *checkpoint.weight_files})
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter lock
        digests = pool.map(_file_digest, files)
    whole = "".join(f"{path.name}\0{digest}\n" for path, digest in zip(files, digests, strict=True))
    return hashlib.sha256(whole.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over name, shape, type and bytes of every parameter, in order of name."""
    parameters = sorted(model.named_parameters())
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_tensor_digest, (parameter for _, parameter in parameters))
    whole = hashlib.sha256()
    for (name, _), digest in zip(parameters, digests, strict=True):
        whole.update(name.encode() + b"\0" + digest)
    return whole.hexdigest()


def tensor_fingerprint(tensor: Tensor) -> str:
    """SHA-256 over shape, type and bytes of a tensor."""
    return _tensor_digest(tensor).hex()


def _tensor_digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tuple(tensor.shape)}|{tensor.dtype}|".encode())
    data = tensor.detach().contiguous().cpu()  # in order first: a GPU does that faster
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
