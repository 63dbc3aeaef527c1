"""Which token of one model stands for which of the other: patched tokens, and those of answers.

Base activations go to the places of tuned ones, so both sides patch the same piece of the prompt's
text, token by token; and an answer of several tokens is compared token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from rq4lens.config import Reading
from rq4lens.errors import UserError
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.models.prompts.reading import ReadAnswer, ReadPrompt, read_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def needs_matching(reading: Reading) -> bool:
    """Whether more is patched or compared than the last tokens."""
    return reading.positions != "decision" or reading.answer_tokens > 1


def require_matched(
    prompts: PromptSet,
    base: PreTrainedTokenizerBase,
    tuned: PreTrainedTokenizerBase,
    reading: Reading,
) -> None:
    """Refuse prompts whose patched tokens or answers the two models split differently.

    Raises:
        UserError: that names the first of them, and the fix.
    """
    for prompt in () if base is tuned else prompts:
        one, other = (read_prompt(prompt, each, reading) for each in (base, tuned))
        for why in unmatched(one, other, reading):
            raise UserError(f"prompt {prompt.id!r}: {why}.")


def unmatched(base: ReadPrompt, tuned: ReadPrompt, reading: Reading) -> Iterator[str]:
    """Why patched tokens or answers cannot be matched one to one."""
    if (why := _patched_differently(base, tuned, reading)) is not None:
        yield why
    if reading.answer_tokens == 1:
        return
    for what in ("answer", "foil"):
        one, other = (
            _compared(getattr(base, what), reading),
            _compared(getattr(tuned, what), reading),
        )
        if one is not None and other is not None and _words(one) != _words(other):
            yield (
                f"the {what} is {shown(one)} in base and {shown(other)} in tuned, which cannot be "
                "compared token by token: give one that both split alike, or --answer-tokens 1"
            )


def _compared(answer: ReadAnswer | None, reading: Reading) -> tuple[str, ...] | None:
    return None if answer is None else answer.texts[: reading.answer_tokens]


def _words(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The same text, split at the same places; whether a token shows its space differs."""
    return tuple(text.strip() for text in texts)


def shown(texts: Iterable[str]) -> str:
    """Tokens as sentences show them."""
    return f"{'|'.join(texts)!r}"


def _patched_differently(base: ReadPrompt, tuned: ReadPrompt, reading: Reading) -> str | None:
    same = base.rendered.text == tuned.rendered.text and base.kept == tuned.kept
    if reading.positions == "decision" or (same and base.patched == tuned.patched):
        return None
    if reading.positions == "subject":
        # Tokens of the same text are matched from its last one, wherever they are split.
        return _other_number(base, tuned) if len(base.patched) != len(tuned.patched) else None
    for of_base, of_tuned in zip_longest(reversed(base.patched), reversed(tuned.patched)):
        if _place(base, of_base) != _place(tuned, of_tuned) or _place(base, of_base) is None:
            one, other = _text(base, of_base), _text(tuned, of_tuned)
            return (
                f"its patched token {one!r} of base and {other!r} of tuned are not the same place "
                "of the text, so that they cannot be matched one to one: use positions subject or "
                "decision, or fewer tokens"
            )
    return None


def _other_number(base: ReadPrompt, tuned: ReadPrompt) -> str:
    one, other = ([_text(each, at) for at in each.patched] for each in (base, tuned))
    return (
        f"its subject is {len(one)} token{'s' * (len(one) > 1)} of base and {len(other)} of tuned "
        f"({shown(one)} and {shown(other)}), which cannot be matched one to one: mark a text that "
        "both split alike, such as its last letters, or patch the decision token"
    )


def _place(read: ReadPrompt, at: int | None) -> tuple[Any, ...] | None:
    """Where a token stands in the prompt's text; None if it is not known."""
    if at is None or read.spans is None:
        return None
    span = read.spans[at]
    if span is None:  # the tokenizer added it
        return ("added", at - read.decision)
    start, stop = read.rendered.spot(span[0]), read.rendered.spot(span[1])
    return None if start is None else (start, stop)


def _text(read: ReadPrompt, at: int | None) -> str:
    span = None if at is None or read.spans is None else read.spans[at]
    return read.rendered.text[slice(*span)] if span else ""
