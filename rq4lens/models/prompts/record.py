"""One prompt: its fields, and how it is made of a record of a file, a data set or a list.

Each record comes with the place that it stands at, for error sentences.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rq4lens.disk.files import parse_json, read_text, short_reason
from rq4lens.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")

KEYS = (
    *("id", "text", "messages", "split", "group", "content"),
    *("answer", "foil", "subject", "offset", "marker", "meta"),
)
"""What a record may say about a prompt."""


@dataclass(frozen=True)
class Message:
    """One message of a chat.

    >>> rq.Message("user", "What does Lena bring?").role
    'user'

    Args:
        role: who speaks: one of :data:`ROLES`.
        content: what is said.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    >>> rq.Prompt(id="a", text="To the wedding brings Lena", split="val").split
    'val'

    Args:
        id: its unique name.
        text: what the models read; of a chat, the contents of its messages, a line break between
            them. Offsets, markers and answers are looked up in it.
        split: ``train`` (maps are fitted on it), ``val`` (everything is measured on it),
            ``neutral`` (prompts that the fine-tune left alone, for side effects) or any other name.
        group: paraphrases of one question share a group; resampling and folds keep it together.
        meta: anything else that the file says about the prompt.
        messages: the messages of a chat, which each model's own template renders; none for plain
            text.
        answer: what the models are to say behind the decision token, with the space before it if it
            has one. Under the rule ``before_answer`` it stands in the text, and the prompt is
            decided at the token before it.
        foil: what ``answer`` is compared with, behind the same token.
        subject: what of the text is patched where ``positions`` is ``"subject"``: a string of it,
            or its first character and the one behind its last, counted from 0.
        offset: index of the character of the text that the rule ``offset`` decides at.
        marker: a string of the text whose last character the rule ``marker`` decides at; it
            replaces the marker that all prompts share.
        content: what it is about, as the country that is asked about; maps can be judged on
            contents that they were not fitted on. Models do not read it.
    """

    id: str
    text: str
    split: str
    group: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    answer: str | None = None
    offset: int | None = None
    marker: str | None = None
    content: str | None = None
    foil: str | None = None
    subject: str | tuple[int, int] | None = None

    @property
    def read_values(self) -> tuple[Any, ...]:
        """Everything that decides what the models read of it, as JSON values."""
        messages = [(message.role, message.content) for message in self.messages]
        asked = (self.answer, self.offset, self.marker)
        later = {"foil": self.foil, "subject": self.subject}
        given = [each for each in later.items() if each[1] is not None]
        return (self.id, self.text, self.split, self.group, messages, *asked, *given)

    def value_of(self, field: str) -> str | None:
        """Its content, or an entry of its meta (``"meta.KEY"``), as text."""
        if field == "content":
            return self.content
        found = self.meta.get(field.removeprefix("meta."))
        return None if found is None else str(found)


def split_named(name: str) -> str:
    """A split by the name that this package gives to it."""
    return "val" if name == "validation" else name


def chat_text(messages: tuple[Message, ...]) -> str:
    """The text of a chat: its contents, a line break between them."""
    return "\n".join(message.content for message in messages)


def prompt_of_record(record: Any, where: str) -> Prompt:
    """Check a record and make it a prompt."""
    if not isinstance(record, Mapping):
        raise UserError(
            f'{where} is not an object: write {{"id": ..., "text": ..., "split": ...}}.'
        )
    messages = _messages(record.get("messages"), where)
    _check_keys(record, "text" if messages is None else "messages", where)
    group, meta = record.get("group"), record.get("meta", {})
    if not isinstance(group, str | None) or not isinstance(meta, dict):
        raise UserError(f"{where}: group must be a string and meta an object.")
    content = record.get("content")
    if not isinstance(content, str | None) or content == "":
        raise UserError(f"{where}: content must say in a string what it is about, or be left out.")
    return Prompt(
        id=record["id"],
        text=record["text"] if messages is None else chat_text(messages),
        split=split_named(record["split"]),
        group=group,
        meta=meta,
        messages=messages or (),
        answer=_string(record, "answer", where),
        offset=_offset(record.get("offset"), where),
        marker=_string(record, "marker", where),
        content=content,
        foil=_string(record, "foil", where),
        subject=_subject(record.get("subject"), where),
    )


def _check_keys(record: Mapping[str, Any], body: str, where: str) -> None:
    needed = ("id", "text", "split") if body == "text" else ("id", "split")
    for key in needed:
        if not isinstance(record.get(key), str):
            raise UserError(
                f"{where} has no string {key!r}: every prompt needs id, split, and text or "
                "messages."
            )
    if body == "messages" and record.get("text") is not None:
        raise UserError(f"{where} has both text and messages: give one of them.")
    unknown = sorted(str(key) for key in record if key not in KEYS)
    if unknown:
        raise UserError(
            f"{where} has unknown key {unknown[0][:60]!r}: allowed are {', '.join(KEYS)}."
        )


def _messages(value: Any, where: str) -> tuple[Message, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value:
        raise UserError(
            f'{where}: messages must be a list like [{{"role": "user", "content": "..."}}].'
        )
    return tuple(_message(each, where) for each in value)


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping) or set(value) != {"role", "content"}:
        raise UserError(f"{where}: each message must have role and content, and nothing else.")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise UserError(
            f"{where} has a message of the unknown role {str(role)[:40]!r}: allowed are "
            f"{', '.join(ROLES)}."
        )
    if not isinstance(content, str):
        raise UserError(f"{where}: the content of the {role} message must be a string.")
    return Message(role, content)


def _string(record: Mapping[str, Any], key: str, where: str) -> str | None:
    value = record.get(key)
    if not isinstance(value, str | None) or value == "":
        meant = "one of what may be said" if key == "foil" else "a string of the text"
        raise UserError(f"{where}: {key} must be {meant}, or be left out.")
    return value


def _subject(value: Any, where: str) -> str | tuple[int, int] | None:
    if isinstance(value, list | tuple):
        whole = all(type(each) is int for each in value)
        if whole and len(value) == 2 and 0 <= value[0] < value[1]:
            return value[0], value[1]
    elif value is None or (isinstance(value, str) and value):
        return value
    raise UserError(
        f"{where}: subject {str(value)[:60]!r} is no place of the text: give a string of it, or "
        "[start, end] with the numbers of its first character, from 0, and of the one behind its "
        "last."
    )


def _offset(value: Any, where: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise UserError(
            f"{where}: offset must be the index of a character of the text, from 0, or be left out."
        )
    return value


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
        given = {
            str(key): value
            for key, value in row.items()
            if not (pd.api.types.is_scalar(value) and pd.isna(value))
        }
        if (offset := given.get("offset")) is not None and float(offset).is_integer():
            given["offset"] = int(offset)  # one empty cell makes a column of numbers a float one
        yield f"the DataFrame, row {number}", _with_meta({"id": f"row-{number}"} | given)


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
