"""Records as strict JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import singledispatch
from typing import Any

import numpy as np

from rq4lens.analysis.statistics import Estimate, Spread
from rq4lens.heads import Head, HeadSet


@singledispatch
def plain(value: Any) -> Any:
    """A record, and everything in it, as strict JSON values.

    An :class:`Estimate` in a field ``x`` becomes ``x``, ``x_ci95`` and, where one of them is null,
    ``x_reason``; a :class:`Spread` has ``x_range95`` instead. Head sets become lists of head
    indices, heads their labels.

    Args:
        value: a frozen record, a mapping, a sequence, an array or a number.

    Returns:
        Dictionaries, lists, strings, numbers, booleans and None.

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
