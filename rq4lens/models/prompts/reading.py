"""How prompts become tokens: rendered, tokenized once, and cut at the decision token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rq4lens.config import Reading
from rq4lens.errors import UserError
from rq4lens.models.prompts.prompt_set import PromptSet, TokenizedPrompts
from rq4lens.models.prompts.record import Prompt
from rq4lens.models.prompts.rendering import Rendered, TextEnd, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character of a token in the rendered text, and the one behind its last."""


class ReadingLimits(NamedTuple):
    """How much a model can read."""

    n_ctx: int
    d_vocab: int


class ReadAnswer(NamedTuple):
    """The tokens that follow the decision token in an answer or a foil, also as text.

    They stand in the prompt's text, continue it, or were tokenized alone, since the tokens before
    would be others with them.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    how: Literal["in the text", "continued", "alone"]


@dataclass(frozen=True)
class ReadPrompt:
    """One prompt as one model reads it, before it is cut: ``n_dropped`` tokens on the left.

    Spans are None for tokens that the tokenizer added of itself, or altogether if it cannot tell.
    ``patched`` are the places of the patched tokens; none where the last ones are.
    """

    prompt: Prompt
    rendered: Rendered
    tokens: tuple[int, ...]
    spans: tuple[Span | None, ...] | None
    decision: int
    n_dropped: int
    has_bos: bool
    patched: tuple[int, ...] = ()
    answer: ReadAnswer | None = None
    foil: ReadAnswer | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """What the model reads: up to the decision token, without what is cut off."""
        head = int(self.has_bos)
        return self.tokens[:head] + self.tokens[head + self.n_dropped : self.decision + 1]

    @property
    def first_kept(self) -> int:
        """Index of the first token behind the BOS that is read."""
        return int(self.has_bos) + self.n_dropped

    @property
    def decision_end(self) -> TextEnd | None:
        """Where the decision token ends in the prompt's text; None if it is not known."""
        span = None if self.spans is None else self.spans[self.decision]
        return None if span is None else self.rendered.place(span[1])


def tokenize(
    prompts: PromptSet, tokenizer: PreTrainedTokenizerBase, reading: Reading | None = None
) -> TokenizedPrompts:
    """Render and tokenize each prompt once and cut it at its decision token."""
    read = [read_prompt(prompt, tokenizer, reading or Reading()) for prompt in prompts]
    for each in read:
        if tokenizer.bos_token_id is not None and n_leading_bos(each, tokenizer) > 1:
            raise UserError(
                f"prompt {each.prompt.id!r} starts with {tokenizer.bos_token!r} more than once: "
                "remove it from the text or the chat template; see `rq4lens audit`."
            )
    answers, foils = ([getattr(each, name) for each in read] for name in ("answer", "foil"))
    placed = reading is not None and reading.positions != "decision"
    return TokenizedPrompts(
        prompts.ids,
        tuple(each.kept for each in read),
        tuple(each.n_dropped for each in read),
        tuple(tuple(at - each.n_dropped for at in each.patched) for each in read if placed),
        _tokens_of(answers),
        _tokens_of(foils),
    )


def _tokens_of(read: Sequence[ReadAnswer | None]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each answer; empty where no prompt has one."""
    return tuple(each.tokens if each else () for each in read) if any(read) else ()


def read_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> ReadPrompt:
    """One prompt as one model reads it."""
    rendered = render(prompt, tokenizer)
    tokens, spans = _encode(prompt, rendered.text, tokenizer)
    has_bos = bool(tokens) and tokens[0] == tokenizer.bos_token_id
    read = ReadPrompt(prompt, rendered, tokens, spans, len(tokens) - 1, 0, has_bos)
    if reading.decision_rule in ("last", "last_content"):
        skipped = _special_ids(tokenizer) if reading.decision_rule == "last_content" else ()
        deciding = [index for index, token in enumerate(tokens) if token not in skipped]
    else:
        deciding = _at_character(read, reading)
    if not deciding:
        raise UserError(
            f"prompt {prompt.id!r} has no token to decide at: its text must have at least one "
            "token outside the special ones."
        )
    decision = deciding[-1]
    most = reading.max_tokens or decision + 1
    read = replace(read, decision=decision, n_dropped=max(0, decision + 1 - max(most, 1 + has_bos)))
    return replace(
        read,
        patched=patched_tokens(read, reading),
        answer=_answer(read, "answer", tokenizer, reading),
        foil=_answer(read, "foil", tokenizer, reading),
    )


def patched_tokens(read: ReadPrompt, reading: Reading) -> tuple[int, ...]:
    """Places of the tokens that ``positions`` names, in order; none for the last ones.

    Raises:
        UserError: if there is no such token, or it was cut off.
    """
    name, end = read.prompt.id, read.decision + 1
    if reading.positions == "decision":
        return ()
    if reading.positions == "subject":
        return _subject_tokens(read)
    first, last = reading.last_tokens or (read.first_kept - end, -1)
    if first >= 0 or end + first < read.first_kept:
        raise UserError(
            f"prompt {name!r} has {end - read.first_kept} tokens up to its decision token, its BOS "
            f"and what was cut off left out, too few for positions {reading.positions!r}: name "
            "fewer, or leave the prompt out."
        )
    return tuple(range(end + first, end + last + 1))


def _subject_tokens(read: ReadPrompt) -> tuple[int, ...]:
    """The tokens that hold a character of the subject."""
    start, stop = _subject_span(read)
    whole = _spans(read, "positions 'subject'", "the decision token")
    first, last = (read.rendered.index_of(at) for at in (start, stop - 1))
    found = [n for n, span in enumerate(whole) if span and span[0] <= last and span[1] > first]
    name, subject = read.prompt.id, read.prompt.text[start:stop][:60]
    if not found or found[-1] > read.decision:
        where = "behind its decision token" if found else "where no token stands"
        raise UserError(
            f"the subject {subject!r} of prompt {name!r} lies {where}: mark a text before it."
        )
    if found[0] < read.first_kept:
        raise UserError(
            f"the subject {subject!r} of prompt {name!r} is cut off on the left: raise "
            "--max-tokens, or leave the prompt out."
        )
    return tuple(found)


def _subject_span(read: ReadPrompt) -> Span:
    """The subject's first character in the prompt's text, and the one behind its last."""
    subject, text, name = read.prompt.subject, read.prompt.text, read.prompt.id
    if subject is None:
        raise UserError(
            f"prompt {name!r} has no subject, which positions 'subject' needs: give a text of it, "
            "or [start, end]."
        )
    if not isinstance(subject, str):
        if not subject[0] < subject[1] <= len(text):
            raise UserError(
                f"subject {list(subject)} of prompt {name!r} is no span of its text of {len(text)} "
                "characters: count from 0, the end behind the last one."
            )
        return subject
    end = read.decision_end
    # The last one that is read: an answer behind the decision token may name it again.
    at = text.rfind(subject, 0, end.end if end else len(text))
    at = at if at >= 0 else text.find(subject)
    if at < 0 or not subject:
        raise UserError(
            f"the subject {subject[:60]!r} does not stand in prompt {name!r}: give a string of its "
            "text, letter for letter, or [start, end]."
        )
    return at, at + len(subject)


def _answer(
    read: ReadPrompt,
    what: Literal["answer", "foil"],
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
) -> ReadAnswer | None:
    """The prompt's answer or foil behind its decision token; None if it has none."""
    text: str | None = getattr(read.prompt, what)
    if text is None:
        return None
    how: Literal["in the text", "continued", "alone"] = "continued"
    if reading.decision_rule == "before_answer" and what == "answer":
        tokens, how = (
            _in_text(read, _character(read.prompt, reading) + len(text) - 1),
            "in the text",
        )
    else:
        tokens = _continued(read, text, tokenizer, reading)
    if not tokens:
        tokens, how = tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), "alone"
    if not tokens:
        raise UserError(
            f"the {what} {text[:60]!r} of prompt {read.prompt.id!r} has no token: give one that "
            "the models can say."
        )
    return ReadAnswer(tokens, tuple(decoded(tokenizer, token) for token in tokens), how)


def _in_text(read: ReadPrompt, last: int) -> tuple[int, ...]:
    """The tokens behind the decision token, up to a character of the prompt's text."""
    end, behind = read.rendered.index_of(last), read.decision + 1
    spans = (read.spans or ())[behind:]
    both = zip(read.tokens[behind:], spans, strict=True)
    return tuple(token for token, span in both if span is not None and span[0] <= end)


def _continued(
    read: ReadPrompt, text: str, tokenizer: PreTrainedTokenizerBase, reading: Reading
) -> tuple[int, ...]:
    """The tokens of a text behind the decision token; none if those before become others."""
    before, behind = _text_before(read, reading), read.decision + 1
    if before is None:
        return ()
    tokens, spans = _encode(read.prompt, before + text, tokenizer)
    if tokens[:behind] != read.tokens[:behind]:
        return ()
    ends = len(tokens) if spans is None else max(n for n, span in enumerate(spans) if span) + 1
    return tokens[behind:ends]


def _text_before(read: ReadPrompt, reading: Reading) -> str | None:
    """The rendered text that an answer stands behind; None if it is not known."""
    text, span = read.rendered.text, read.spans[read.decision] if read.spans else None
    if reading.decision_rule == "before_answer":
        return text[: read.rendered.index_of(_character(read.prompt, reading))]
    if span is not None:
        return text[: span[1]]
    return text if read.decision + 1 == len(read.tokens) else None


def n_leading_bos(read: ReadPrompt, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many BOS tokens a prompt starts with."""
    others = (n for n, token in enumerate(read.tokens) if token != tokenizer.bos_token_id)
    return next(others, len(read.tokens))


def unreadable(tokens: Sequence[int], side: str, model: ReadingLimits) -> str | None:
    """Why a model cannot read so many tokens, or one of them."""
    if len(tokens) > model.n_ctx:
        return (
            f"has {len(tokens)} tokens up to its decision token, but the {side} model reads at "
            f"most {model.n_ctx}: shorten it, leave it out, or cut it from the left with "
            "--max-tokens"
        )
    if max(tokens) >= model.d_vocab:
        return (
            f"has token {max(tokens)}, but the vocabulary of the {side} model has {model.d_vocab}: "
            "save the model's own tokenizer with it, or resize its embeddings to the tokenizer's "
            "length"
        )
    return None


def _encode(
    prompt: Prompt, text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[Span | None, ...] | None]:
    # A template holds all special tokens: apply_chat_template(tokenize=True) adds none either.
    rendered = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
    whole = bool(prompt.messages) or rendered
    encoding: Any = tokenizer(
        text, add_special_tokens=not whole, return_offsets_mapping=tokenizer.is_fast
    )
    tokens = tuple(encoding["input_ids"])
    if not tokenizer.is_fast:
        return tokens, None
    of_text = (sequence is not None for sequence in encoding.sequence_ids(0))
    spans = [
        (span[0], span[1]) if own else None
        for span, own in zip(encoding["offset_mapping"], of_text, strict=True)
    ]
    return tokens, tuple(_with_whitespace(text, tokens, spans, tokenizer))


def _with_whitespace(
    text: str,
    tokens: Sequence[int],
    spans: Sequence[Span | None],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Span | None]:
    """Spans that hold all whitespace of their tokens: some tokenizers leave it out of the span.

    Of the whitespace between two tokens, the later one has as much as it decodes to at its start,
    and the earlier one as much of the rest as it decodes to at its end.
    """
    text_of = partial(decoded, tokenizer)
    closed, last, end = list(spans), -1, 0
    for index, span in enumerate([*spans, (len(text), len(text))]):
        if span is None:
            continue
        start, stop = span
        if (gap := text[end:start]).isspace():
            if index < len(spans):
                start -= min(len(gap), _n_leading(text_of(tokens[index])))
                closed[index] = (start, stop)
            before = closed[last] if last >= 0 else None
            if before is not None:
                trailing = _n_leading(text_of(tokens[last])[::-1])
                closed[last] = (before[0], before[1] + min(start - end, trailing))
        last, end = index, max(end, stop)
    return closed


def _n_leading(text: str) -> int:
    """How many characters of whitespace a text starts with."""
    return len(text) - len(text.lstrip())


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that the tokenizer calls special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = {index for index, token in added.items() if token.special}
    return frozenset(named | set(tokenizer.all_special_ids))


def _at_character(read: ReadPrompt, reading: Reading) -> list[int]:
    """The tokens that hold the character that the rule names, or the one before the answer's."""
    spans = _spans(read, f"decision rule {reading.decision_rule!r}", "rule 'last'")
    at = read.rendered.index_of(_character(read.prompt, reading))
    if reading.decision_rule == "before_answer":
        return [_before(read.prompt, at, spans)]
    # A character of several bytes may be several tokens: the last one decides.
    return [index for index, span in enumerate(spans) if span is not None and span[0] <= at]


def _spans(read: ReadPrompt, what: str, instead: str) -> tuple[Span | None, ...]:
    """The characters of each token, where they can be found in the prompt's text."""
    if read.spans is None:
        raise UserError(
            f"{what} needs a tokenizer that tells the characters of its tokens: save the fast "
            f"tokenizer with the model, or use {instead}."
        )
    if read.rendered.parts is None:
        raise UserError(
            f"the chat template does not hold the messages of prompt {read.prompt.id!r} as they "
            f"were written, so that no character can be found: use {instead} instead of {what}."
        )
    return read.spans


@lru_cache(maxsize=2**16)
def decoded(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of one token, its whitespace included."""
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _before(prompt: Prompt, at: int, spans: tuple[Span | None, ...]) -> int:
    """The token before the one in which a character starts."""
    first = next((n for n, span in enumerate(spans) if span is not None and span[1] > at), 0)
    if first == 0 or spans[first - 1] is None:
        raise UserError(
            f"prompt {prompt.id!r} starts with its answer: there is no token before it to decide "
            "at."
        )
    return first - 1


def _character(prompt: Prompt, reading: Reading) -> int:
    """Index of a character of the prompt's text: where the answer starts, or what decides."""
    rule = reading.decision_rule
    what = "answer" if rule == "before_answer" else rule
    wanted = getattr(prompt, what)
    if rule == "marker":
        wanted = wanted or reading.marker
    if wanted is None:
        raise UserError(f"prompt {prompt.id!r} has no {what}, which rule {rule!r} needs: give one.")
    if rule == "offset":
        if wanted >= len(prompt.text):
            raise UserError(
                f"offset {wanted} of prompt {prompt.id!r} lies behind its text of "
                f"{len(prompt.text)} characters: count from 0."
            )
        return int(wanted)
    at = prompt.text.rfind(wanted)
    if at < 0:
        raise UserError(
            f"the {what} {wanted[:60]!r} does not stand in prompt {prompt.id!r}: give a string of "
            "its text, letter for letter."
        )
    return at if what == "answer" else at + len(wanted) - 1
