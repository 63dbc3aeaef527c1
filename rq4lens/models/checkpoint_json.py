"""The JSON objects of a checkpoint: ``config.json``, the index of shards, an adapter's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rq4lens.errors import UserError
from rq4lens.files import parse_json, read_regular_file, short_reason


def read_json(path: Path, source: str) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Args:
        path: The file.
        source: The checkpoint, for the error.

    Returns:
        Its content.

    Raises:
        UserError: The file is missing, or is not one strict JSON object.
    """
    try:
        value = parse_json(read_regular_file(path), unique_keys=True)
    except FileNotFoundError:
        raise UserError(
            f"{source} has no {path.name}; give a folder written by save_pretrained, "
            "or a hub id as org/name."
        ) from None
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(
            f"{path} is not valid JSON ({short_reason(problem)}); restore the file."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold an object, as {{...}}; restore the file.")
    return value
