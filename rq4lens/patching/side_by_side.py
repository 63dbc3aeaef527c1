"""Batches that follow one another through a model whose layers lie on several devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

Steps = Generator[torch.device, None, T]
"""Work that stops before each block to say which device computes it, and ends with its result."""


def side_by_side(works: Iterable[Steps[T]]) -> Iterator[T]:
    """Do works so that every device has something to do.

    A device can be told about a thousand kernels ahead; then whoever tells it waits. Telling one
    all blocks of a batch would let the others run dry meanwhile. So works that are under way take
    turns, block by block, and the next one begins when the last one has left the first device. On a
    single device they come one after the other.

    Args:
        works: the works, all of which begin on the same device.

    Yields:
        Their results, in their order.
    """
    waiting, under_way = deque(works), deque[tuple[Steps[T], torch.device]]()
    entry: torch.device | None = None
    while waiting or under_way:
        if waiting and (not under_way or under_way[-1][1] != entry):
            work = waiting.popleft()
            entry = next(work)
            under_way.append((work, entry))
        for _ in range(len(under_way)):
            work, _ = under_way.popleft()
            try:
                under_way.append((work, next(work)))
            except StopIteration as end:
                yield end.value
