"""A prompt as a model's own chat template writes it, and where its text stands in that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rq4lens.disk.files import short_reason
from rq4lens.errors import UserError
from rq4lens.models.prompts.record import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = "26 Jul 2024"
"""What a template is told the date is (the one that Llama 3.1's writes of itself): with today's, a
run could not be repeated tomorrow."""


class Part(NamedTuple):
    """A piece of the prompt's text inside the rendered one: both its starts, and its length."""

    rendered: int
    text: int
    length: int


class TextEnd(NamedTuple):
    """A place of the rendered text in terms of the prompt's text; so models can be compared."""

    end: int
    """How many characters of the prompt's text stand before it."""
    in_template: bool


@dataclass(frozen=True)
class Rendered:
    """A prompt as one model is given it."""

    text: str
    parts: tuple[Part, ...] | None
    """The pieces of the prompt's text; None if the template does not hold every one as written."""

    def index_of(self, character: int) -> int:
        """Index in the rendered text of a character of the prompt's text; ``parts`` are known."""
        assert self.parts is not None
        before = (each for each in reversed(self.parts) if each.text <= character)
        part = next(before, self.parts[0])
        # What a template trims off a message counts to its first or last character.
        return part.rendered + min(max(character - part.text, 0), max(part.length - 1, 0))

    def spot(self, index: int) -> tuple[int, int] | None:
        """An index of the rendered text in terms of the prompt's text; None if unknown.

        Which message it stands in or behind, and how many characters of the prompt's text from the
        start: as many on both sides for one place, whatever stands before it in their templates.
        """
        if self.parts is None:
            return None
        number = max(sum(part.rendered <= index for part in self.parts) - 1, 0)
        part = self.parts[number]
        return number, part.text + index - part.rendered

    def place(self, end: int) -> TextEnd | None:
        """Where an index of the rendered text lies in the prompt's text; None if unknown."""
        if self.parts is None:
            return None
        before = [part for part in self.parts if part.rendered < end]
        if not before:
            return TextEnd(0, True)
        inside = end - before[-1].rendered
        return TextEnd(before[-1].text + min(inside, before[-1].length), inside > before[-1].length)


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The prompt's text, or its messages in the tokenizer's own chat template."""
    if not prompt.messages:
        return Rendered(prompt.text, (Part(0, 0, len(prompt.text)),))
    text = apply_template(prompt, tokenizer)
    return Rendered(text, _parts(prompt, tokenizer, text))


def apply_template(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message] | None = None,
    *,
    generation_prompt: bool = True,
) -> str:
    """The messages as the template writes them."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            f"prompt {prompt.id!r} is a chat, but the tokenizer of "
            f"{str(tokenizer.name_or_path) or 'the model'} has no chat template: give plain text, "
            "or save a template with the tokenizer."
        )
    chat = [{"role": m.role, "content": m.content} for m in messages or prompt.messages]
    try:
        text: Any = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=generation_prompt, date_string=DATE
        )
    except Exception as problem:  # templates are code of the checkpoint and can fail in any way
        raise UserError(
            f"the chat template of {str(tokenizer.name_or_path) or 'the model'} refuses prompt "
            f"{prompt.id!r} ({short_reason(problem)}): change its messages."
        ) from None
    return str(text)


def _parts(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[Part, ...] | None:
    """Find each message in the rendered text through the frame that the template puts around it."""
    # Letters for private use stand in for the contents: a content such as "user" may also be a
    # word of the template.
    stand_ins = [chr(0xE000 + n) for n in range(len(prompt.messages))]
    framed = [Message(m.role, s) for m, s in zip(prompt.messages, stand_ins, strict=True)]
    try:
        frame = apply_template(prompt, tokenizer, framed)
    except UserError:
        return None
    if any(frame.count(each) != 1 for each in stand_ins):
        return None
    for trimmed in (False, True):
        parts = _fill(frame, stand_ins, prompt.messages, trimmed=trimmed)
        if parts is not None and parts[0] == text:
            return parts[1]
    return None


def _fill(
    frame: str, stand_ins: Sequence[str], messages: Sequence[Message], *, trimmed: bool
) -> tuple[str, tuple[Part, ...]] | None:
    """The frame with the contents in it, and where they stand; None if their order changes."""
    written, parts, rest, start = "", [], frame, 0
    for stand_in, message in zip(stand_ins, messages, strict=True):
        before, found, rest = rest.partition(stand_in)
        if not found:
            return None
        content = message.content.strip() if trimmed else message.content
        written += before
        lead = message.content.index(content)
        parts.append(Part(len(written), start + lead, len(content)))
        written += content
        start += len(message.content) + 1  # and the line break between messages
    return written + rest, tuple(parts)
