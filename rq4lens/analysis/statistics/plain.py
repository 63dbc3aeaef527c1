"""Records as strict JSON values, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, singledispatch
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
from jaxtyping import AbstractArray

from rq4lens.analysis.statistics.bootstrap import Estimate, Spread
from rq4lens.heads import Head
from rq4lens.results import Record, Shown

T = TypeVar("T")


@singledispatch
def to_json(value: Any) -> Any:
    """A record, and everything in it, as strict JSON values.

    An :class:`Estimate` in a field ``x`` becomes ``x``, ``x_ci95`` and, where one of them is null,
    ``x_reason``; a :class:`Spread` has ``x_range95`` instead. The reasons of a :class:`Record`
    become ``x_reason``, too. Heads become their labels. Fields that do not count when records are
    compared are left out. A class with ``from_dict`` writes and reads itself.

    Raises:
        ValueError: for a number that is not finite; undefined values must be None with a reason.
    """
    kind = type(value)
    if not is_dataclass(kind):
        return value
    if hasattr(value, "from_dict"):
        return value.to_dict()
    names = [*_saved_fields(kind), *getattr(value, "ALSO_SAVED", ())]
    record = to_json({name: getattr(value, name) for name in names})
    if isinstance(value, Record):
        record |= {f"{name}_reason": reason for name, reason in value.reasons.items()}
    return record


@to_json.register
def _(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number: undefined values are None with a reason.")
    return float(value)


@to_json.register
def _(value: Estimate) -> dict[str, Any]:
    return value.fields("value")


@to_json.register
def _(value: Head) -> str:
    return value.label


@to_json.register(Mapping)
def _(value: Mapping[Any, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, item in value.items():
        named = isinstance(item, Estimate)
        record |= item.fields(str(name)) if named else {str(name): to_json(item)}
    return record


@to_json.register(tuple)
@to_json.register(list)
def _(value: tuple[Any, ...] | list[Any]) -> list[Any]:
    return [to_json(item) for item in value]


@to_json.register(np.ndarray)
@to_json.register(np.generic)
def _(value: np.ndarray | np.generic) -> Any:
    return to_json(value.tolist())


def frame_of(records: Iterable[Any]) -> pd.DataFrame:
    """A row a record, its parts beside each other."""
    return pd.json_normalize([to_json(record) for record in records], sep="_")


class Listed(Shown):
    """A result whose table has a row for each record in one of its fields."""

    ROWS: ClassVar[str]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(getattr(self, self.ROWS))} {self.ROWS}>"

    def to_dataframe(self) -> pd.DataFrame:
        """A row a record."""
        return frame_of(getattr(self, self.ROWS))


def from_json(kind: type[T], value: Any) -> T:
    """The record that :func:`to_json` wrote, read by the type hints of its class.

    Raises:
        Exception: of one kind or another if the value is not such a record.
    """
    return cast(T, _read(kind, value))


def _read(kind: Any, value: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _read(parts[0], value)
    if origin is tuple:
        return tuple(_read(parts[0], each) for each in _checked(list, value))
    if origin is not None:
        return _read_mapping(parts[0], parts[1], _checked(dict, value))
    return value if kind is Any else _read_class(kind, value)


def _read_class(kind: type, value: Any) -> Any:
    if issubclass(kind, AbstractArray):
        return np.array(_checked(list, value), dtype=np.float64)
    if issubclass(kind, Head):
        return kind.parse(_checked(str, value))
    if issubclass(kind, Estimate):
        return kind.from_fields("value", value)
    return (
        _read_record(kind, _checked(dict, value)) if is_dataclass(kind) else _checked(kind, value)
    )


def _read_mapping(name_kind: type, kind: Any, values: Mapping[str, Any]) -> dict[Any, Any]:
    flat = kind in (Estimate, Spread)
    names = [name for name in values if not flat or name + kind.ENDS in values]
    return {name_kind(name): _read_field(kind, name, values) for name in names}


def _read_field(kind: Any, name: str, values: Mapping[str, Any]) -> Any:
    """What stands under a name; an estimate stands there with its parts beside it."""
    if kind in (Estimate, Spread):
        return kind.from_fields(name, values)
    return _read(kind, values[name])


def _read_record(kind: Any, values: Mapping[str, Any]) -> Any:
    if hasattr(kind, "from_dict"):
        return kind.from_dict(values)
    known = _saved_fields(kind)
    read = {name: _read_field(hint, name, values) for name, hint in known.items()}
    if issubclass(kind, Record):
        why = {name: f"{name}_reason" for name in known if f"{name}_reason" not in known}
        read["reasons"] = {name: values[key] for name, key in why.items() if key in values}
    return kind(**read)


@cache
def _saved_fields(kind: type) -> dict[str, Any]:
    """The fields of a record that are written, with their types."""
    hints = get_type_hints(kind)
    skipped = {"reasons"} if issubclass(kind, Record) else set()
    return {
        field.name: hints[field.name]
        for field in fields(cast(Any, kind))
        if field.compare and field.name not in skipped
    }


def _checked(kind: type, value: Any) -> Any:
    """A plain value of a type; whole numbers are numbers, too."""
    allowed: Any = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{str(value)[:40]!r} stands for a {kind.__name__}")
    return float(value) if kind is float else value
