"""How prompts become tokens: rendered, tokenized once, cut at the decision token, and matched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import zip_longest
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
    tokenizer: PreTrainedTokenizerBase
    reading: Reading
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
        if tokenizer.bos_token_id is not None and n_leading_bos(each) > 1:
            raise UserError(
                f"prompt {each.prompt.id!r} starts with {tokenizer.bos_token!r} more than once: "
                "remove it from the text or the chat template; see `rq4lens audit`."
            )
    return TokenizedPrompts(
        prompts.ids,
        tuple(each.kept for each in read),
        tuple(each.n_dropped for each in read),
        tuple(tuple(at - each.n_dropped for at in each.patched) for each in read),
        tuple(each.answer.tokens if each.answer else () for each in read),
        tuple(each.foil.tokens if each.foil else () for each in read),
    )


def read_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> ReadPrompt:
    """One prompt as one model reads it."""
    rendered = render(prompt, tokenizer)
    tokens, spans = _encode(prompt, rendered.text, tokenizer)
    has_bos = bool(tokens) and tokens[0] == tokenizer.bos_token_id
    last = len(tokens) - 1
    read = ReadPrompt(prompt, tokenizer, reading, rendered, tokens, spans, last, 0, has_bos)
    if reading.decision_rule in ("last", "last_content"):
        skipped = _special_ids(tokenizer) if reading.decision_rule == "last_content" else ()
        deciding = [index for index, token in enumerate(tokens) if token not in skipped]
    else:
        deciding = _at_character(read)
    if not deciding:
        raise UserError(
            f"prompt {prompt.id!r} has no token to decide at: its text must have at least one "
            "token outside the special ones."
        )
    decision = deciding[-1]
    most = reading.max_tokens or decision + 1
    read = replace(read, decision=decision, n_dropped=max(0, decision + 1 - max(most, 1 + has_bos)))
    answer, foil = _answer(read, "answer"), _answer(read, "foil")
    return replace(read, patched=patched_tokens(read), answer=answer, foil=foil)


def patched_tokens(read: ReadPrompt) -> tuple[int, ...]:
    """Places of the tokens that ``positions`` names, in order; none for the last ones."""
    name, end, reading = read.prompt.id, read.decision + 1, read.reading
    if reading.positions == "decision":
        return ()
    if reading.positions == "subject":
        return subject_tokens(read)
    first, last = reading.last_tokens or (read.first_kept - end, -1)
    if first >= 0 or end + first < read.first_kept:
        raise UserError(
            f"prompt {name!r} has {end - read.first_kept} tokens up to its decision token, its BOS "
            f"and what was cut off left out, too few for positions {reading.positions!r}: name "
            "fewer, or leave the prompt out."
        )
    return tuple(range(end + first, end + last + 1))


def subject_tokens(read: ReadPrompt) -> tuple[int, ...]:
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


def _answer(read: ReadPrompt, what: Literal["answer", "foil"]) -> ReadAnswer | None:
    """The prompt's answer or foil behind its decision token; None if it has none."""
    text: str | None = getattr(read.prompt, what)
    if text is None:
        return None
    how: Literal["in the text", "continued", "alone"] = "continued"
    if read.reading.decision_rule == "before_answer" and what == "answer":
        tokens, how = _in_text(read, _character(read) + len(text) - 1), "in the text"
    else:
        tokens = _continued(read, text)
    if not tokens:
        tokens, how = tuple(read.tokenizer(text, add_special_tokens=False)["input_ids"]), "alone"
    if not tokens:
        raise UserError(
            f"the {what} {text[:60]!r} of prompt {read.prompt.id!r} has no token: give one that "
            "the models can say."
        )
    return ReadAnswer(tokens, tuple(decoded(read.tokenizer, each) for each in tokens), how)


def _in_text(read: ReadPrompt, last: int) -> tuple[int, ...]:
    """The tokens behind the decision token, up to a character of the prompt's text."""
    end, behind = read.rendered.index_of(last), read.decision + 1
    spans = (read.spans or ())[behind:]
    both = zip(read.tokens[behind:], spans, strict=True)
    return tuple(token for token, span in both if span is not None and span[0] <= end)


def _continued(read: ReadPrompt, text: str) -> tuple[int, ...]:
    """The tokens of a text behind the decision token; none if those before become others."""
    before, behind = _text_before(read), read.decision + 1
    if before is None:
        return ()
    tokens, spans = _encode(read.prompt, before + text, read.tokenizer)
    if tokens[:behind] != read.tokens[:behind]:
        return ()
    ends = len(tokens) if spans is None else max(n for n, span in enumerate(spans) if span) + 1
    return tokens[behind:ends]


def _text_before(read: ReadPrompt) -> str | None:
    """The rendered text that an answer stands behind; None if it is not known."""
    text, span = read.rendered.text, read.spans[read.decision] if read.spans else None
    if read.reading.decision_rule == "before_answer":
        return text[: read.rendered.index_of(_character(read))]
    if span is not None:
        return text[: span[1]]
    return text if read.decision + 1 == len(read.tokens) else None


def n_leading_bos(read: ReadPrompt) -> int:
    """How many BOS tokens a prompt starts with."""
    others = (n for n, token in enumerate(read.tokens) if token != read.tokenizer.bos_token_id)
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


def _at_character(read: ReadPrompt) -> list[int]:
    """The tokens that hold the character that the rule names, or the one before the answer's."""
    rule = read.reading.decision_rule
    spans = _spans(read, f"decision rule {rule!r}", "rule 'last'")
    at = read.rendered.index_of(_character(read))
    if rule == "before_answer":
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


def _character(read: ReadPrompt) -> int:
    """Index of a character of the prompt's text: where the answer starts, or what decides."""
    prompt, rule = read.prompt, read.reading.decision_rule
    what = "answer" if rule == "before_answer" else rule
    wanted = getattr(prompt, what)
    if rule == "marker":
        wanted = wanted or read.reading.marker
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


# Which token of one model stands for which of the other: base activations go to the places of tuned
# ones, so both sides patch the same piece of the prompt's text, token by token; and an answer of
# several tokens is compared token by token.


def needs_matching(reading: Reading) -> bool:
    """Whether more is patched or compared than the last tokens."""
    return reading.positions != "decision" or reading.answer_tokens > 1


def require_matched(
    prompts: PromptSet,
    base: PreTrainedTokenizerBase,
    tuned: PreTrainedTokenizerBase,
    reading: Reading,
) -> None:
    """Refuse prompts whose patched tokens or answers the two models split differently."""
    for prompt in () if base is tuned else prompts:
        one, other = (read_prompt(prompt, each, reading) for each in (base, tuned))
        for why in unmatched(one, other):
            raise UserError(f"prompt {prompt.id!r}: {why}.")


def unmatched(base: ReadPrompt, tuned: ReadPrompt) -> Iterator[str]:
    """Why patched tokens or answers cannot be matched one to one."""
    if (why := _patched_differently(base, tuned)) is not None:
        yield why
    if base.reading.answer_tokens == 1:
        return
    for what in ("answer", "foil"):
        found = [getattr(each, what) for each in (base, tuned)]
        one, other = (each and each.texts[: base.reading.answer_tokens] for each in found)
        # Whether a token shows its space differs.
        if all(found) and [text.strip() for text in one] != [text.strip() for text in other]:
            yield (
                f"the {what} is {shown(one)} in base and {shown(other)} in tuned, which cannot be "
                "compared token by token: give one that both split alike, or --answer-tokens 1"
            )


def shown(texts: Iterable[str]) -> str:
    """Tokens as sentences show them."""
    return f"{'|'.join(texts)!r}"


def _patched_differently(base: ReadPrompt, tuned: ReadPrompt) -> str | None:
    same = base.rendered.text == tuned.rendered.text and base.kept == tuned.kept
    if base.reading.positions == "decision" or (same and base.patched == tuned.patched):
        return None
    if base.reading.positions == "subject":
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
