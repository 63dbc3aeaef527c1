"""Why values of a record are null: whatever is undefined has a reason beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
    """A record with a reason beside every null that has none.

    Args:
        record: plain values by name; only its own fields are looked at, not those inside them.
        why: gives the reason of a field.

    Returns:
        The record; field ``x`` has its reason in ``x_reason``.
    """
    unexplained = [
        name for name in record if _is_null(record[name]) and not _has_reason(record, name)
    ]
    return {**record, **{f"{name}_reason": why(name) for name in unexplained}}


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, list) and any(map(_is_null, value)))


def _has_reason(record: Mapping[str, Any], name: str) -> bool:
    base = name.removesuffix("_ci95").removesuffix("_range95")
    return is_explanation(name) or f"{base}_reason" in record
