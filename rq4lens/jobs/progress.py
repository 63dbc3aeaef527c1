"""Stages of a long job: watched by whoever shows progress, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from rq4lens.patching.patch import Progress

Stage = Callable[[str, int | None], AbstractContextManager[Progress | None]]
"""Opens a stage of the work: its name and its number of rows; gives what reports progress."""


@dataclass
class Clock:
    """Seconds of each stage of a run.

    Args:
        stage: opens a stage for whoever watches.
    """

    stage: Stage
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, rows: int | None = None) -> Iterator[Progress | None]:
        """Time a stage."""
        started = time.perf_counter()
        with self.stage(name, rows) as progress:
            yield progress
        self.seconds[name] = round(time.perf_counter() - started, 4)


def silent(_name: str, _rows: int | None) -> AbstractContextManager[Progress | None]:
    """A stage that nobody watches."""
    return nullcontext()
