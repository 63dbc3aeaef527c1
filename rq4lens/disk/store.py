"""Results on disk: addressed by what made them, written whole or not at all, verified when read.

A record's key is a hash of everything that can change its numbers, so a record is never looked up
by a pattern or by its age. Every file appears under its final name only when it is complete, and
is believed only when its checksum and its stored ingredients agree with what is asked for.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import orjson
from jaxtyping import Num
from numpy import ndarray

from rq4lens.disk.files import (
    canonical_json,
    make_directory,
    parse_json,
    read_regular_bytes,
    read_regular_file,
    remove_leftovers,
    set_aside,
    short_reason,
    write_bytes_atomic,
)
from rq4lens.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # whoever reads JSON alone, such as a figure, loads no torch

log = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = "rq4lens record 1"
CHECKSUM = ',"payload_sha256":'
WRITERS = 16
"""Records that are written at a time."""

TENSORS = ".safetensors"
SHA256 = "sha256"
"""Name of the checksum of the tensors in the payload of their record."""

NUMERICS_VERSION = "3"
"""Raised whenever a change of the code changes a stored number; older records are then unused."""


def content_key(ingredients: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of the ingredients, as 64 hexadecimal digits."""
    return _sha256(canonical_json(dict(ingredients)))


@runtime_checkable
class Ingredients(Protocol):
    """What a record is addressed by."""

    @property
    def label(self) -> str:
        """A readable start of the file name; it follows from the values."""

    def to_dict(self) -> dict[str, Any]:
        """Every value that can change the record, by name."""


PutAll = Callable[[Iterable[tuple[Ingredients, Any]]], None]
"""Takes records to be stored: what they are addressed by, and their payloads."""


class NamedIngredients(NamedTuple):
    """Ingredients that are there already."""

    label: str
    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Every ingredient by name."""
        return self.values


@dataclass
class StoreCounters:
    """What a store did so far."""

    reused: int = 0
    computed: int = 0
    set_aside: list[tuple[str, str]] = field(default_factory=list)
    """File name and reason of each file that could not be believed."""


class Store:
    """A directory of small verified JSON records, some with tensors beside them.

    It is made when the first record is written; a ``fresh`` store uses no record that is there.
    """

    def __init__(self, directory: Path, fresh: bool = False) -> None:
        self.directory = Path(directory)
        self.fresh = fresh
        self.counters = StoreCounters()
        self._counting = Lock()
        if os.path.lexists(self.directory):
            make_directory(self.directory)  # refuses a file that lies there
        remove_leftovers(self.directory)

    def path(self, ingredients: Ingredients) -> Path:
        """The one file name that these ingredients can have."""
        return self._named(ingredients.label, content_key(ingredients.to_dict()))

    def _named(self, label: str, key: str) -> Path:
        readable = re.sub(r"[^A-Za-z0-9+._-]", "_", label)
        return self.directory / f"{readable[:80]}_{key[:16]}.json"

    def get(self, ingredients: Ingredients) -> Any | None:
        """The stored payload, if there is one that can be believed."""
        path = self.path(ingredients)
        return self._believed(path, lambda: _record_of(path, ingredients).payload)

    def get_tensors(self, ingredients: Ingredients) -> Mapping[str, Tensor] | None:
        """The stored tensors by name, if there are any that can be believed."""
        path = self.path(ingredients)
        return self._believed(path, lambda: read_tensors(path, _record_of(path, ingredients)))

    def put(self, ingredients: Ingredients, payload: Any) -> Path:
        """Store a payload; another process may write the same record at the same time."""
        path, record = self._record(ingredients, payload)
        make_directory(self.directory)
        self._write(path, record)
        return path

    def _record(self, ingredients: Ingredients, payload: Any) -> tuple[Path, bytes]:
        """The name and the content of a record's file."""
        made_of, text = canonical_json(ingredients.to_dict()), _payload_text(payload)
        record = _record_text(made_of, text).encode("ascii")
        return self._named(ingredients.label, _sha256(made_of)), record

    def _write(self, path: Path, record: bytes) -> None:
        write_bytes_atomic(path, record)
        with self._counting:
            self.counters.computed += 1

    def put_all(self, records: Iterable[tuple[Ingredients, Any]]) -> None:
        """Store payloads side by side: a disk takes its time for each to be safe on it."""
        make_directory(self.directory)
        with ThreadPoolExecutor(WRITERS) as pool:
            # Their text is made here: threads that all hold the interpreter only wait for it.
            texts = (self._record(*record) for record in records)
            written = [pool.submit(self._write, *each) for each in texts]
        for each in written:
            each.result()

    @contextmanager
    def writing(self) -> Iterator[PutAll]:
        """Store payloads beside the work that makes the next ones; one lot is under way at most."""
        with ThreadPoolExecutor(1) as pool:
            under_way: list[Future[None]] = []

            def put_beside(records: Iterable[tuple[Ingredients, Any]]) -> None:
                finish()
                under_way.append(pool.submit(self.put_all, records))

            def finish() -> None:
                while under_way:
                    under_way.pop().result()

            yield put_beside
            finish()

    def put_tensors(
        self,
        ingredients: Ingredients,
        tensors: Mapping[str, Tensor],
        payload: Mapping[str, Any] = MappingProxyType({}),
    ) -> Path:
        """Store tensors in a safetensors file beside the record of their payload and checksum."""
        from safetensors.torch import save  # noqa: PLC0415 - loads torch

        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        make_directory(self.directory)
        # The record comes last: whoever finds it finds whole tensors.
        write_bytes_atomic(self.path(ingredients).with_suffix(TENSORS), data)
        return self.put(ingredients, {**payload, SHA256: hashlib.sha256(data).hexdigest()})

    def _believed(self, path: Path, read: Callable[[], T]) -> T | None:
        if self.fresh:
            log.info("computing %s: the store is to be made fresh", path.name)
            return None
        try:
            found = read()
        except (FileNotFoundError, NotADirectoryError):
            log.info("computing %s: no record yet", path.name)
            return None
        except DamagedTensorsError as problem:
            self.set_aside(path.with_suffix(TENSORS), str(problem))
            return None
        except (OSError, ValueError, RecursionError) as problem:
            self.set_aside(path, short_reason(problem))
            return None
        self.counters.reused += 1
        log.info("reused %s: checksum and ingredients agree", path.name)
        return found

    def set_aside(self, path: Path, reason: str) -> None:
        """Rename a file that cannot be believed, and say so."""
        self.counters.set_aside.append((path.name, reason))
        log.warning("set aside %s and computing it again: %s", path.name, reason)
        set_aside(path)


class StoredRecord(NamedTuple):
    """A record that agrees with its checksum."""

    ingredients: dict[str, Any]
    payload: Any


def read_record(path: Path) -> StoredRecord:
    """Read a record; it is whole, or the reading fails as that of any file or JSON."""
    if path.is_symlink():
        raise ValueError("a symlink instead of a record")
    text = read_regular_file(path)
    record = parse_json(text)
    fields = {"format", "ingredients", "payload", "payload_sha256"}
    if not isinstance(record, dict) or set(record) != fields:
        raise ValueError("not a record of this store")
    if record["format"] != FORMAT:
        raise ValueError(f"written in another format, {str(record['format'])[:40]!r}")
    if not isinstance(record["ingredients"], dict):
        raise ValueError("no ingredients")
    made_of = canonical_json(record["ingredients"])
    payload, _, _ = text[len(_head(made_of)) :].rpartition(CHECKSUM)
    if text != _record_text(made_of, payload):
        raise ValueError("the checksum does not match")
    return StoredRecord(record["ingredients"], record["payload"])


def _head(made_of: str) -> str:
    return f'{{"format":"{FORMAT}","ingredients":{made_of},"payload":'


def _record_text(made_of: str, payload: str) -> str:
    # The payload stands in the record as the very text that its checksum is taken of.
    return f'{_head(made_of)}{payload}{CHECKSUM}"{_sha256(payload)}"}}\n'


def _payload_text(payload: Any) -> str:
    if isinstance(payload, dict) and any(isinstance(each, ndarray) for each in payload.values()):
        return _arrays_text(payload)
    return canonical_json(payload)


def _arrays_text(arrays: Mapping[str, Num[ndarray, "..."]]) -> str:
    """Arrays of numbers as JSON, exact, null where there is none (NaN), sorted by name."""
    for name, each in arrays.items():
        if np.isinf(each).any():
            raise UserError(f"{name} holds an infinity: JSON has finite numbers only.")
    whole = {name: np.ascontiguousarray(each) for name, each in arrays.items()}
    # Thousands of records are spelled beside other work, which waits for the interpreter meanwhile.
    return orjson.dumps(whole, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_SORT_KEYS).decode()


def _record_of(path: Path, ingredients: Ingredients) -> StoredRecord:
    record = read_record(path)
    if canonical_json(record.ingredients) != canonical_json(ingredients.to_dict()):
        raise ValueError("made from other ingredients")
    return record


class DamagedTensorsError(ValueError):
    """Tensors that do not agree with their record."""


def read_tensors(path: Path, record: StoredRecord) -> dict[str, Tensor]:
    """The tensors beside the record that was read from a path."""
    from safetensors.torch import load  # noqa: PLC0415 - loads torch

    path = path.with_suffix(TENSORS)
    try:
        if path.is_symlink():
            raise ValueError("a symlink instead of tensors")
        data = read_regular_bytes(path)
        if hashlib.sha256(data).hexdigest() != record.payload[SHA256]:
            raise ValueError("the checksum does not match")
        return dict(load(data))
    except Exception as problem:  # a disk, a header, a number format: every damage is one error
        raise DamagedTensorsError(short_reason(problem)) from problem


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()
