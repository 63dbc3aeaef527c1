"""A check that a record is strict JSON and says why each of its nulls is null."""

import json

EXPLAINS = ("reason", "note", "undefined_because")
"""Fields that say why something else is null; null there means that nothing is."""


def is_explanation(name):
    """Whether a field says why another one is null, or what it cannot mean."""
    return name in EXPLAINS or name.endswith("_reason")


def check_explained(record):
    """No number that is not finite, and no null without a reason beside it or of its row."""
    json.dumps(record, allow_nan=False)
    assert list(unexplained(record)) == []


def unexplained(value, where="", known=False):
    """Where a null stands that neither its own field nor its row has a reason for."""
    if value is None and not known:
        yield where
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from unexplained(each, f"{where}[{index}]", known)
    elif isinstance(value, dict):
        for name, each in value.items():
            base = name.removesuffix("_ci95").removesuffix("_range95")
            reason = value.get(f"{base}_reason") or value.get("reason")
            yield from unexplained(each, f"{where}.{name}", bool(reason) or is_explanation(name))
