"""Axes for effects that span decades: a handful of heads can outweigh the others a thousandfold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rq4lens.analysis.statistics import Estimate

# Values further apart than this are not told apart by eye on a linear axis.
_WIDE = 100.0
# A signed axis shows this many decades on each side of its linear part.
_DECADES = 4


def is_wide(values: Iterable[float | None]) -> bool:
    """Whether values, all above 0, span so much that a logarithmic axis is needed.

    Args:
        values: the values; undefined ones do not count.

    Returns:
        Whether they do; never when a value is 0 or below.
    """
    known = [value for value in values if value is not None]
    return bool(known) and min(known) > 0 and max(known) > _WIDE * min(known)


def lows(estimates: Iterable[Estimate]) -> list[float | None]:
    """The lowest that each estimate may be; on a logarithmic axis none of them may reach 0."""
    return [e.value if e.interval is None else e.interval.low for e in estimates]


@dataclass(frozen=True)
class SignedLog:
    """An axis that is linear around 0 and logarithmic further out, on both sides.

    Args:
        unit: size below which it is linear, in the unit of the values; above 0.
    """

    unit: float

    @classmethod
    def of(cls, values: Sequence[float]) -> SignedLog | None:
        """The axis for some values; None where a linear one shows them well.

        That is where a typical value can still be seen beside the largest one.
        """
        sizes = sorted(abs(value) for value in values if value)
        if not sizes or sizes[-1] <= _WIDE * sizes[len(sizes) // 2]:
            return None
        return cls(10.0 ** (math.ceil(math.log10(sizes[-1])) - _DECADES))

    def place(self, value: float) -> float:
        """Where a value stands on the axis."""
        return math.asinh(value / self.unit)

    def ticks(self, low: float, high: float) -> tuple[list[float], list[str]]:
        """Places and texts of the ticks between two values: 0 and the powers of ten."""
        # The power next to 0 is left out: its text would touch the 0.
        powers = [self.unit * 10.0**decade for decade in range(1, _DECADES + 1)]
        shown = [-power for power in reversed(powers)] + [0.0, *powers]
        inside = [value for value in shown if low <= value <= high]
        return [self.place(value) for value in inside], [f"{value:g}" for value in inside]
