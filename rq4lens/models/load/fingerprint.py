"""Fingerprints: of checkpoints, of weights, and of the libraries that compute with them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from blake3 import blake3
from torch import Tensor

from rq4lens.models.load.adapters import base_of
from rq4lens.models.load.checkpoint import SMALL_FILES, Checkpoint


@cache
def arithmetic_libraries() -> str:
    """The libraries of which another version may round, or read a configuration, in another way."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformer-lens"))


def files_digest(checkpoint: Checkpoint) -> Future[str]:
    """BLAKE3 over name and content of a checkpoint's files, and of its base's.

    They are read beside other work; those that have not changed since are not read again.
    """
    return _digest_beside(file_states(checkpoint))


def file_states(checkpoint: Checkpoint) -> tuple[tuple[FileState, ...], ...]:
    """How the files of a checkpoint lie there, and those of its base."""
    parts = [checkpoint, base_of(checkpoint)] if checkpoint.is_adapter else [checkpoint]
    return tuple(tuple(map(FileState.of, _files_of(part))) for part in parts)


def _files_of(checkpoint: Checkpoint) -> list[Path]:
    small = (path for pattern in SMALL_FILES for path in checkpoint.folder.glob(pattern))
    return sorted({*small, *checkpoint.weight_files})


class FileState(NamedTuple):
    """A file as it lies there; another write is another state."""

    path: Path
    size: int
    inode: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """How a file lies there now."""
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=32)
def _digest_beside(parts: tuple[tuple[FileState, ...], ...]) -> Future[str]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="fingerprint")
    digest = pool.submit(_digest_of, parts)
    pool.shutdown(wait=False)
    return digest


def _digest_of(parts: tuple[tuple[FileState, ...], ...]) -> str:
    """One hash of all files."""
    whole = blake3()
    for number, files in enumerate(parts):
        for file in files:
            whole.update(f"{number}\0{file.path.name}\0{_file_digest(file.path)}\n".encode())
    return str(whole.hexdigest())


def _file_digest(path: Path) -> str:
    """The hash of a file, by all cores."""
    return str(blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest())


def weights_fingerprint(model: torch.nn.Module) -> str:
    """BLAKE3 over name, shape, type and bytes of every parameter, in order of name."""
    whole = blake3()
    for name, parameter in sorted(model.named_parameters()):
        whole.update(name.encode() + b"\0" + _tensor_digest(parameter))
    return str(whole.hexdigest())


def tensor_fingerprint(tensor: Tensor) -> str:
    """BLAKE3 over shape, type and bytes of a tensor."""
    return _tensor_digest(tensor).hex()


def _tensor_digest(tensor: Tensor) -> bytes:
    digest = blake3(f"{tuple(tensor.shape)}|{tensor.dtype}|".encode(), max_threads=blake3.AUTO)
    data = tensor.detach().contiguous().cpu()  # in order first: a GPU does that faster
    return bytes(digest.update(data.reshape(-1).view(torch.uint8).numpy().data).digest())
