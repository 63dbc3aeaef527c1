"""Reading an analysis, live or saved: figures see the content of ``analysis.json`` either way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from rq4lens.analysis.statistics.bootstrap import LEVEL, Estimate, Interval

Record: TypeAlias = Mapping[str, Any]


@runtime_checkable
class HasRecord(Protocol):
    """Something with a JSON form, for instance :class:`rq4lens.analysis.analyse.Analysis`."""

    def to_dict(self) -> dict[str, Any]:
        """The content of its file."""
        ...


def as_record(analysis: HasRecord | Record | None) -> Record:
    """The JSON form of an analysis; empty when there is none."""
    if analysis is None:
        return {}
    return analysis.to_dict() if isinstance(analysis, HasRecord) else analysis


def estimate(record: Record, name: str = "value") -> Estimate:
    """Read ``name``, ``name_ci95`` and ``name_reason`` back into an estimate."""
    value, ends = record.get(name), record.get(f"{name}_ci95")
    interval = None if ends is None else Interval(float(ends[0]), float(ends[1]), LEVEL, "saved")
    return Estimate(None if value is None else float(value), interval, record.get(f"{name}_reason"))


def estimates(records: Sequence[Record]) -> list[Estimate]:
    """Read a list of estimates back."""
    return [estimate(record) for record in records]
