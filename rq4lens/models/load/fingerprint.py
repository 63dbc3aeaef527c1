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

READ_BYTES = 2**22


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
    """One hash of all files, which are read side by side."""
    named = [(number, file.path) for number, files in enumerate(parts) for file in files]
    whole = blake3()
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter lock
        digests = pool.map(_file_digest, (path for _, path in named))
        for (number, path), digest in zip(named, digests, strict=True):
            whole.update(f"{number}\0{path.name}\0{digest}\n".encode())
    return str(whole.hexdigest())


def _file_digest(path: Path) -> str:
    # Read, not mapped: a mapped file that somebody cuts short meanwhile would end the process. And
    # by one thread: those of the library's own pool would leave a forked process waiting for ever.
    digest, memory = blake3(), bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(memory):
            digest.update(memoryview(memory)[:n_bytes])
    return str(digest.hexdigest())


def weights_fingerprint(model: torch.nn.Module) -> str:
    """BLAKE3 over name, shape, type and bytes of every parameter, in order of name."""
    parameters = sorted(model.named_parameters())
    whole = blake3()
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_tensor_digest, (parameter for _, parameter in parameters))
        for (name, _), digest in zip(parameters, digests, strict=True):
            whole.update(name.encode() + b"\0" + digest)
    return str(whole.hexdigest())


def tensor_fingerprint(tensor: Tensor) -> str:
    """BLAKE3 over shape, type and bytes of a tensor."""
    return _tensor_digest(tensor).hex()


def _tensor_digest(tensor: Tensor) -> bytes:
    digest = blake3(f"{tuple(tensor.shape)}|{tensor.dtype}|".encode())
    data = tensor.detach().contiguous().cpu()  # in order first: a GPU does that faster
    return bytes(digest.update(data.reshape(-1).view(torch.uint8).numpy().data).digest())
