"""Heads and sets of heads, and the grammar in which users write them."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import SupportsIndex, TypeAlias

from rq4lens.errors import UserError

_RANGE = re.compile(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?", re.ASCII)
_LABEL = re.compile(r"L(\d{1,9})H(\d{1,9})", re.ASCII)


@dataclass(frozen=True, order=True)
class Head:
    """One attention head, printed the way the field prints it: ``L9H6``.

    >>> rq.Head(9, 6).label
    'L9H6'
    """

    layer: int
    index: int

    @property
    def label(self) -> str:
        """The head's name, for instance ``L9H6``."""
        return f"L{self.layer}H{self.index}"

    def __str__(self) -> str:
        return self.label

    @classmethod
    def parse(cls, label: str) -> Head:
        """The head of a label such as ``L9H6``.

        Raises:
            UserError: if the text is no such label.
        """
        match = _LABEL.fullmatch(label)
        if match is None:
            raise UserError(f"{label[:40]!r} is no head: write layer and head as in 'L9H6'.")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class HeadSet:
    """A set of heads of one layer.

    Order and repetition do not matter: two specs that name the same heads give equal sets.

    >>> list(rq.HeadSet.parse("0-2,5", n_heads=8))
    [0, 1, 2, 5]

    Args:
        indices: head indices, each in ``[0, n_heads)``; kept sorted and unique.
        n_heads: number of heads of the layer.

    Raises:
        UserError: if an index is not a head of the layer.
    """

    indices: tuple[int, ...]
    n_heads: int

    def __post_init__(self) -> None:
        for index in self.indices:
            if not 0 <= index < self.n_heads:
                raise UserError(
                    f"head {index} does not exist: a layer of this model has heads "
                    f"0 to {self.n_heads - 1}; name heads in that range."
                )
        object.__setattr__(self, "indices", tuple(sorted(set(self.indices))))

    @classmethod
    def of(cls, indices: Iterable[SupportsIndex], n_heads: int) -> HeadSet:
        """The set of the given heads, which may be the integers of an array."""
        return cls(tuple(operator.index(head) for head in indices), n_heads)

    @classmethod
    def all(cls, n_heads: int) -> HeadSet:
        """Every head of the layer."""
        return cls(tuple(range(n_heads)), n_heads)

    @classmethod
    def none(cls, n_heads: int) -> HeadSet:
        """No head at all."""
        return cls((), n_heads)

    @classmethod
    def read(cls, heads: Heads, n_heads: int, layer: int) -> HeadSet:
        """Heads of a layer as Python users name them.

        >>> str(HeadSet.read("L1H0,L1H2", n_heads=16, layer=1))
        '0,2'

        Args:
            heads: a head set, a spec as :meth:`parse` reads it, an index, or indices and labels.
            n_heads: number of heads of the layer.
            layer: the layer, which labels must name.

        Raises:
            UserError: if they cannot be read, or are heads of another layer.
        """
        if isinstance(heads, HeadSet):
            return heads
        if isinstance(heads, str):
            return cls.parse(heads, n_heads, layer)
        each = heads if isinstance(heads, Iterable) else [heads]
        try:
            return cls.of((_index(head, layer) for head in each), n_heads)
        except TypeError:
            raise UserError(
                f"{_shown(str(heads))} is no head set: give heads as '0,2', [0, 2] or 'L1H0'."
            ) from None

    @classmethod
    def parse(cls, spec: str, n_heads: int, layer: int | None = None) -> HeadSet:
        """Read ``"3,7,12"``, ``"0-3,8"``, ``"ALL"`` or ``"NONE"`` (case does not matter).

        Where the layer is known, labels such as ``"L1H3"`` are read, too.

        Raises:
            UserError: if the spec is empty, has a word or sign in it, names a range backwards,
                or names a head that the layer does not have.
        """
        word = spec.strip().upper()
        if word == "ALL":
            return cls.all(n_heads)
        if word == "NONE":
            return cls.none(n_heads)
        heads = (head for part in spec.split(",") for head in _parse_part(part, spec, layer))
        return cls.of(heads, n_heads)

    @property
    def mask(self) -> tuple[int, ...]:
        """One 0 or 1 per head of the layer."""
        return tuple(int(head in self.indices) for head in range(self.n_heads))

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __contains__(self, head: object) -> bool:
        return head in self.indices

    def __str__(self) -> str:
        if not self.indices:
            return "NONE"
        if len(self.indices) == self.n_heads:
            return "ALL"
        return ",".join(_runs(self.indices))


Heads: TypeAlias = HeadSet | Head | str | SupportsIndex | Iterable[SupportsIndex | str | Head]
"""What can name heads of a layer."""


def head_sets(given: Heads | Iterable[Heads], n_heads: int, layer: int) -> list[HeadSet]:
    """Several head sets of a layer, or one: indices alone, as ``[0, 2]``, are one set."""
    if isinstance(given, HeadSet | str) or not isinstance(given, Iterable):
        return [HeadSet.read(given, n_heads, layer)]
    several = list(given)
    single = [each for each in several if isinstance(each, SupportsIndex | Head)]
    if single and len(single) == len(several):
        return [HeadSet.read(single, n_heads, layer)]
    return [HeadSet.read(each, n_heads, layer) for each in several]


def _index(head: SupportsIndex | str | Head, layer: int) -> int:
    """The index of a head of the layer."""
    if not isinstance(head, str | Head):
        return operator.index(head)
    named = head if isinstance(head, Head) else Head.parse(head)
    if named.layer != layer:
        raise UserError(
            f"head {named} is not of layer {layer}, which is patched: name heads of that layer, "
            "or patch the other one."
        )
    return named.index


def _parse_part(part: str, spec: str, layer: int | None) -> range:
    if layer is not None and _LABEL.fullmatch(label := part.strip().upper()):
        head = _index(label, layer)
        return range(head, head + 1)
    match = _RANGE.fullmatch(part.strip()) if len(part) <= 64 else None
    if match is None:
        raise UserError(
            f"cannot read {_shown(part)} in head set {_shown(spec)}: write heads as '3,7,12', "
            "'0-3,8', 'L1H3', 'ALL' or 'NONE'."
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise UserError(
            f"range {part.strip()!r} in head set {_shown(spec)} runs backwards: "
            f"write '{last}-{first}'."
        )
    if last - first > 100_000:
        raise UserError(f"range {part.strip()!r} is longer than any layer: name existing heads.")
    return range(first, last + 1)


def _shown(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")


def _runs(indices: tuple[int, ...]) -> Iterator[str]:
    # Consecutive heads share the difference between their index and their place in the list.
    for _, pairs in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        run = [index for _, index in pairs]
        yield str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
