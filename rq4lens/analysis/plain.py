"""Records as strict JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from rq4lens.analysis.statistics import Estimate
from rq4lens.heads import Head, HeadSet


def plain(value: Any) -> Any:
    """A record, and everything in it, as strict JSON values.

    An :class:`Estimate` in a field ``x`` becomes ``x``, ``x_ci95`` and, where one of them is null,
    ``x_reason``. Head sets become lists of head indices, heads their labels.

    Args:
        value: a frozen record, a mapping, a sequence, an array or a number.

    Returns:
        Dictionaries, lists, strings, numbers, booleans and None.

    Raises:
        ValueError: for a number that is not finite; undefined values must be None with a reason.
    """
    if isinstance(value, Estimate):
        return value.fields("value")
    if isinstance(value, Head):
        return value.label
    if isinstance(value, HeadSet):
        return list(value.indices)
    if is_dataclass(value) and not isinstance(value, type):
        return _record({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, Mapping):
        return _record(value)
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return _scalar(value)


def _record(values: Mapping[Any, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Estimate):
            record |= value.fields(str(name))
        else:
            record[str(name)] = plain(value)
    return record


def _scalar(value: Any) -> Any:
    number = value.item() if isinstance(value, np.generic) else value
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{number} is not a JSON number: undefined values are None with a reason.")
    return number
