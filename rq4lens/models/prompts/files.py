"""Prompt files and data sets as plain records, each with the place that it stands at.

What a record must say is checked where prompts are made of them; see ``prompt_record``.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rq4lens.disk.files import parse_json, read_text, short_reason
from rq4lens.errors import UserError
from rq4lens.models.prompts.record import KEYS, split_named

Located = tuple[str, Any]
"""Where a record stands, and its value."""


def read_records(path: Path) -> Iterator[Located]:
    """The records of a JSONL file, a CSV file, or the folder of a saved Hugging Face dataset."""
    if os.path.isdir(path):  # noqa: PTH112 - False for a name that no file system takes, too
        return dataset_records(_load_dataset(path), str(path))
    return csv_records(path) if path.suffix.lower() == ".csv" else jsonl_records(path)


def jsonl_records(path: Path) -> Iterator[Located]:
    """The objects of a JSONL file, one per line."""
    # Not splitlines(): a text may hold a form feed or a Unicode line separator.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}", "write one object per line")


def csv_records(path: Path) -> Iterator[Located]:
    """The rows of a CSV file whose first line names the columns; an empty cell says nothing."""
    rows = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
    try:
        columns = rows.fieldnames or ()
        _check_columns(columns, str(path))
        repeated = [name for name, count in Counter(columns).items() if count > 1]
        if repeated:
            raise UserError(f"{path} has column {repeated[0][:60]!r} twice: keep one.")
        for row in rows:
            yield f"{path}:{rows.line_num}", _csv_record(row, f"{path}:{rows.line_num}")
    except csv.Error as problem:
        raise UserError(
            f"{path}:{rows.line_num} is not CSV ({short_reason(problem)}): quote texts that hold "
            "commas, quotes or line breaks, or write JSONL."
        ) from None


def dataset_records(dataset: Any, where: str = "the dataset") -> Iterator[Located]:
    """The rows of a Hugging Face dataset, or of several splits by name.

    A row of a named split needs no ``split`` of its own, and one without an ``id`` is named by its
    split and number. Columns that say nothing about the prompt are kept as its ``meta``.
    """
    if not isinstance(dataset, Mapping):
        yield from _rows(dataset, None, where)
        return
    for name, rows in dataset.items():
        yield from _rows(rows, split_named(name), f"{where}, split {name!r}")


def frame_records(frame: pd.DataFrame) -> Iterator[Located]:
    """The rows of a DataFrame; an empty cell says nothing, and other columns are ``meta``."""
    _check_columns([*map(str, frame.columns), "id"], "the DataFrame")
    for number, row in enumerate(frame.to_dict("records")):
        given = {str(key): value for key, value in row.items() if not _is_empty(value)}
        if (offset := given.get("offset")) is not None and float(offset).is_integer():
            given["offset"] = int(offset)  # one empty cell makes a column of numbers a float one
        yield f"the DataFrame, row {number}", _with_meta({"id": f"row-{number}"} | given)


def _is_empty(cell: Any) -> bool:
    return cell is None or bool(pd.api.types.is_scalar(cell) and pd.isna(cell))


def _rows(rows: Iterable[Any], split: str | None, where: str) -> Iterator[Located]:
    columns = getattr(rows, "column_names", None)
    if columns is not None:
        _check_columns((*columns, "id", *(("split",) if split else ())), where)
        rows = _plain_columns(rows)
    for number, row in enumerate(rows):
        place = f"{where}, row {number}"
        record = {"text": row} if isinstance(row, str) else row
        if not isinstance(record, Mapping):
            raise UserError(f"{place} is a {type(row).__name__}: give a string or a dict.")
        named = {"id": f"{split or 'row'}-{number}"} | ({"split": split} if split else {})
        given = {key: value for key, value in record.items() if value is not None}
        yield place, _with_meta(named | given) if columns is not None else named | given


def _plain_columns(dataset: Any) -> Any:
    """A dataset without columns that would be decoded, such as pictures and sounds."""
    features = getattr(dataset, "features", None) or {}
    plain = [
        name for name, kind in features.items() if name in KEYS or type(kind).__name__ == "Value"
    ]
    return dataset.select_columns(plain) if features else dataset


def _with_meta(record: dict[str, Any]) -> dict[str, Any]:
    other = {key: value for key, value in record.items() if key not in KEYS}
    known = {key: value for key, value in record.items() if key in KEYS}
    return known | {"meta": {**(record.get("meta") or {}), **other}}


def _check_columns(columns: Iterable[str], where: str) -> None:
    present = set(columns)
    body = () if "messages" in present else ("text",)
    missing = [name for name in ("id", *body, "split") if name not in present]
    if missing:
        raise UserError(
            f"{where} has no column {missing[0]!r}: prompts need the columns id, split, and text "
            "or messages."
        )


def _csv_record(row: Mapping[Any, Any], where: str) -> dict[str, Any]:
    if None in row or None in row.values():
        raise UserError(f"{where} has more or fewer cells than the first line: give each column.")
    record: dict[str, Any] = {key: value for key, value in row.items() if value != ""}
    for key in ("messages", "meta"):
        if key in record:
            record[key] = _parse(record[key], f"{where}, column {key!r},", "write it as JSON")
    if re.fullmatch(r"\[\s*\d+\s*,\s*\d+\s*\]", str(record.get("subject"))):
        record["subject"] = parse_json(record["subject"])
    if str(record.get("offset", "")).isdecimal():
        record["offset"] = int(record["offset"])
    return record


def _load_dataset(path: Path) -> Any:
    import datasets  # noqa: PLC0415 - only those who bring a dataset wait for it

    try:
        return datasets.load_from_disk(str(path))
    except Exception as problem:  # every way in which a folder can fail to be a dataset
        raise UserError(
            f"folder {str(path)!r} is no Hugging Face dataset ({short_reason(problem)}): give a "
            "folder written by save_to_disk, or a JSONL or CSV file."
        ) from None


def _read(path: Path) -> str:
    return str(read_text(path, "prompt file")).removeprefix("\ufeff")  # a BOM is no content


def _parse(text: str, where: str, advice: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{where} is not JSON ({short_reason(problem)}): {advice}.") from None
