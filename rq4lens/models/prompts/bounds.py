"""Time and memory that a stranger's template may take.

Jinja's sandbox keeps a template from reaching Python, but not from looping or growing without end.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import psutil

MAX_SECONDS = 5.0
"""Of processor time for one prompt; an honest template takes thousandths."""

MAX_BYTES = 1 << 30
"""By which the process may grow meanwhile, where the system can enforce it."""


class OutOfBoundsError(RuntimeError):
    """What ran within bounds took too long."""


class _Stop(BaseException):
    """Passes through whatever catches errors on the way out, as Jinja does while it compiles."""


@contextlib.contextmanager
def within_bounds() -> Iterator[None]:
    """Stop Python code that takes more than ``MAX_SECONDS`` or grows by ``MAX_BYTES``.

    Raises:
        OutOfBoundsError: It took too long.
        MemoryError: It grew too large.
    """
    deadline = time.thread_time() + MAX_SECONDS

    def watch(_frame: FrameType, _event: str, _argument: Any) -> Any:
        if time.thread_time() > deadline:
            raise _Stop
        return watch

    before = sys.gettrace()
    with _limited_memory():
        sys.settrace(watch)  # the one way to stop a loop in any thread
        try:
            yield
        except _Stop:
            raise OutOfBoundsError(f"it takes more than {MAX_SECONDS:g} seconds") from None
        finally:
            sys.settrace(before)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    try:
        import resource  # noqa: PLC0415 - not on every system
    except ImportError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + MAX_BYTES
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    limited = _try_limit(resource, (min([most, *known]), hard))
    try:
        yield
    finally:
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _try_limit(resource: Any, limits: tuple[int, int]) -> bool:
    with contextlib.suppress(OSError, ValueError):  # such as macOS, which has no such limit
        resource.setrlimit(resource.RLIMIT_AS, limits)
        return True
    return False
