"""Records as strict JSON values, with a reason beside every null."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import singledispatch
from typing import Any

import numpy as np

from rq4lens.analysis.statistics.bootstrap import Estimate, Spread
from rq4lens.heads import Head, HeadSet

EXPLAINS = ("reason", "note", "undefined_because")
"""Fields that say why something else is null; null there means that nothing is."""

NOT_MEASURED = "only the grid was given: new head sets would have to be measured"
NO_CONTROL_LAYER = "the run has no control layer"
ONE_SET = "only the one set of each size that the ranking names was measured"

Record = dict[str, Any]


def is_explanation(name: str) -> bool:
    """Whether a field says why another one is null, or what it cannot mean."""
    return name in EXPLAINS or name.endswith("_reason")


def explained(record: Mapping[str, Any], why: Callable[[str], str]) -> Record:
    """A record with a reason beside every null that has none."""
    unexplained = [
        name for name in record if _is_null(record[name]) and not _has_reason(record, name)
    ]
    return {**record, **{f"{name}_reason": why(name) for name in unexplained}}


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, list) and any(map(_is_null, value)))


def _has_reason(record: Mapping[str, Any], name: str) -> bool:
    base = name.removesuffix("_ci95").removesuffix("_range95")
    return is_explanation(name) or f"{base}_reason" in record


@singledispatch
def plain(value: Any) -> Any:
    """A record, and everything in it, as strict JSON values.

    An :class:`Estimate` in a field ``x`` becomes ``x``, ``x_ci95`` and, where one of them is null,
    ``x_reason``; a :class:`Spread` has ``x_range95`` instead. Head sets become lists of head
    indices, heads their labels.

    Raises:
        ValueError: for a number that is not finite; undefined values must be None with a reason.
    """
    if is_dataclass(value):
        return plain({field.name: getattr(value, field.name) for field in fields(value)})
    return value


@plain.register
def _(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number: undefined values are None with a reason.")
    return float(value)


@plain.register
def _(value: Estimate | Spread) -> dict[str, Any]:
    return value.fields("value")


@plain.register
def _(value: Head) -> str:
    return value.label


@plain.register
def _(value: HeadSet) -> list[int]:
    return list(value.indices)


@plain.register(Mapping)
def _(value: Mapping[Any, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, item in value.items():
        named = isinstance(item, Estimate | Spread)
        record |= item.fields(str(name)) if named else {str(name): plain(item)}
    return record


@plain.register(tuple)
@plain.register(list)
def _(value: tuple[Any, ...] | list[Any]) -> list[Any]:
    return [plain(item) for item in value]


@plain.register(np.ndarray)
@plain.register(np.generic)
def _(value: np.ndarray | np.generic) -> Any:
    return plain(value.tolist())
