"""One prompt: its fields, and how it is made of a record of a file, a data set or a list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
