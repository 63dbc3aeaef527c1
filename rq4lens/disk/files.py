"""Files that are complete or absent, and JSON that is strict."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from rq4lens.errors import UserError

MAX_TEXT_BYTES = 1 << 28
"""Larger text files are refused unread."""

LEFT_SECONDS = 3600.0
"""A temporary file of another machine that is older was left by a process that died."""

TEMPORARY = re.compile(r"\.(?:(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,9})-)?[0-9a-f]{32}\.tmp")
"""Names of temporary files; earlier versions did not name the process."""


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII, exact floats."""
    _refuse_foreign_types(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def read_text(
    path: Path,
    what: str,
    *,
    parse: Callable[[str], Any] = str,
    form: str = "UTF-8",
    missing: str = "check the path",
    fix: str = "save it as a plain UTF-8 file",
) -> Any:
    """What the text of a file says.

    ``parse`` raises ``ValueError`` where the text says nothing; ``what`` it is, the ``form`` it
    should have, and what to do if it is ``missing`` or to ``fix`` it stand in the error sentence.
    """
    name = f"{what} {str(path)!r}".lstrip()
    try:
        return parse(read_regular_file(path))
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: {missing}.") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(
            f"{name} cannot be read as {form} ({short_reason(problem)}): {fix}."
        ) from None


def read_json(path: Path) -> Any:
    """Read a strict JSON file."""
    fix = "restore it, or remove it and run again"
    return read_text(path, "", parse=parse_json, form="JSON", fix=fix)


@contextlib.contextmanager
def refuse_damage(what: str, fix: str) -> Iterator[None]:
    """Every way in which saved values can be damaged ends in one sentence."""
    try:
        yield
    except Exception as problem:
        raise UserError(
            f"{what} is damaged ({type(problem).__name__}: {short_reason(problem)}): {fix}."
        ) from problem


def write_json_atomic(path: Path, value: Any) -> None:
    """Write strict, indented JSON that is complete under its name or absent."""
    _refuse_foreign_types(value, path.name)
    # ASCII only: no character of a prompt, such as a right-to-left mark, acts on the reader.
    write_text_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text that is complete under its name or absent."""
    write_bytes_atomic(path, text.encode())


def refuse_no_file(path: Path | None) -> None:
    """Refuse, before work is done for it, a file that could not be written."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a directory: name a file in it.")
    if not path.parent.is_dir():
        raise UserError(
            f"{str(path)!r} cannot be written: there is no directory {str(path.parent)!r}; make "
            "it, or name another file."
        )


def refuse_no_directory(path: Path | str | None, option: str) -> None:
    """Refuse, before work is done for it, a directory that a file stands in the way of."""
    path = Path(path or ".")
    there = next((each for each in (path, *path.parents) if os.path.lexists(each)), Path())
    if not there.is_dir():
        raise UserError(
            f"cannot make the directory {str(path)!r} ({str(there)!r} is no directory): name "
            f"another place ({option})."
        )


def make_directory(path: Path) -> None:
    """Make a directory and those above it; one that is there already is fine."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(
            f"cannot make the directory {str(path)!r} ({problem.strerror}): name another place."
        ) from problem


@contextlib.contextmanager
def made_directory(path: Path) -> Iterator[None]:
    """Make a directory; take it away again if work in it fails before anything is written."""
    was_there = path.exists()
    make_directory(path)
    try:
        yield
    except BaseException:
        if not was_there:
            with contextlib.suppress(OSError):  # something was written
                path.rmdir()
        raise


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file that is complete under its name or absent, whatever interrupts the write."""
    try:
        _replace_through_temporary(path, data)
    except OSError as problem:
        raise UserError(
            f"cannot write {str(path)!r} ({problem.strerror or problem}): make the directory "
            "writable and leave room on the disk; what was finished before is kept."
        ) from problem


def _refuse_foreign_types(value: Any, where: str) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if value - value != 0:  # infinities and NaN, without a call per number
            raise UserError(f"{where} is {value}: JSON has finite numbers only; write None.")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise UserError(f"{where} has the key {key!r}: keys of JSON objects are strings.")
            _refuse_foreign_types(inner, key)
    elif isinstance(value, list | tuple):
        if set(map(type, value)) == {float} and math.isfinite(sum(value)):
            return  # thousands of numbers; a sum that overflows is looked at one by one
        for inner in value:
            _refuse_foreign_types(inner, where)
    else:
        raise UserError(f"{where} is a {type(value).__name__}: give a JSON value instead.")


def read_regular_file(path: Path) -> str:
    """The UTF-8 text of a regular file of sane size; anything else is an OSError or ValueError."""
    return read_regular_bytes(path, MAX_TEXT_BYTES).decode("utf-8")


def read_regular_bytes(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file; a directory, pipe or device is a ValueError."""
    # O_NONBLOCK: opening a named pipe that lies there instead of a file must not hang.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:  # noqa: PTH123 - from a descriptor
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if most is not None and status.st_size > most:
            raise ValueError(f"{status.st_size} bytes, more than {most}")
        return file.read()


def parse_json(text: str, *, unique_keys: bool = False) -> Any:
    """The value of a strict JSON text; a ValueError or RecursionError if it is none."""
    pairs = _object_of_unique_keys if unique_keys else None
    value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=pairs)
    json.dumps(value, allow_nan=False)  # an overflowing literal such as 1e999 reads as infinity
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not strict JSON")


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {short_value(key)} twice")
        found[key] = value
    return found


def short_value(value: Any, most: int = 80) -> str:
    """A value as Python writes it, cut to a length that fits a sentence; printable anywhere."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def short_reason(problem: BaseException, most: int = 200) -> str:
    """What an exception says, on one line that can be printed on any terminal."""
    line = " ".join(str(problem).split())[:most] or type(problem).__name__
    return "".join(c if c.isprintable() else "?" for c in line)


def _replace_through_temporary(path: Path, data: bytes, attempts: int = 3) -> None:
    for attempt in range(1, attempts + 1):
        temporary = path.with_name(f".{_machine()}-{os.getpid()}-{uuid.uuid4().hex}.tmp")
        try:
            _write_synced(temporary, data)
            os.replace(temporary, path)  # noqa: PTH105 - the atomic rename, by its known name
        except FileNotFoundError:
            # Another machine took our temporary file for one that was left (its clock jumped).
            if attempt == attempts or not path.parent.is_dir():
                raise
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        else:
            return _sync_directory(path.parent)
    return None


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - from a descriptor
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _sync_directory(directory: Path) -> None:
    # Some file systems cannot sync a directory; the rename is atomic there all the same, and a
    # record that a power cut loses is recomputed.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def set_aside(path: Path) -> None:
    """Rename a file that cannot be believed to ``*.damaged``, if the directory can be written."""
    with contextlib.suppress(OSError):
        os.replace(path, path.with_name(f"{path.name}.damaged"))  # noqa: PTH105


def remove_leftovers(directory: Path) -> None:
    """Remove temporary files, in a directory and below, that killed processes left behind."""
    for path in directory.rglob(".*.tmp"):
        with contextlib.suppress(OSError):
            if _is_left(path):
                path.unlink()


def _is_left(path: Path) -> bool:
    # A file that is taken from a living process by mistake, such as one of another container that
    # goes by the same name, is written again.
    name = TEMPORARY.fullmatch(path.name)
    if name is None:
        return False
    if name["machine"] == _machine():
        return not psutil.pid_exists(int(name["pid"]))
    return path.lstat().st_mtime < time.time() - LEFT_SECONDS


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
