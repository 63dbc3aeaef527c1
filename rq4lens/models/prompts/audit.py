"""Whether both models read each prompt alike: the same text, decided at the same place.

What a run compares are the distributions behind two decision tokens. They can be compared if both
models have read the same text up to them, whole, with nothing strange among the tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pandas as pd

from rq4lens.config import SIDES, Reading, Side
from rq4lens.errors import UserError
from rq4lens.models.prompts.prompt_set import FIT_SPLIT, MEASURE_SPLIT, PromptSet
from rq4lens.models.prompts.reading import (
    ReadingLimits,
    ReadPrompt,
    decoded,
    n_leading_bos,
    read_prompt,
    shown,
    subject_tokens,
    unmatched,
    unreadable,
)
from rq4lens.models.prompts.record import Message, Prompt
from rq4lens.models.prompts.rendering import apply_template
from rq4lens.results import Shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENOUGH_PCT = 95.0
"""A run whose prompts align less often than this says so in its report."""

N_BEFORE, N_AFTER = 3, 2
"""How many tokens are shown around the decision token."""

REPLACEMENT, JOINER = "\ufffd", "\u200d"
SKIN_TONES = range(0x1F3FB, 0x1F400)
FLAG_LETTERS = range(0x1F1E6, 0x1F200)


PieceName = Literal["answer", "foil", "patched"]
PIECES: tuple[PieceName, ...] = ("answer", "foil", "patched")


class ReadTokens(NamedTuple):
    """Tokens of an answer, of a foil, or that are patched: as text, and how they were found."""

    tokens: tuple[str, ...]
    how: str


@dataclass(frozen=True)
class SideAudit:
    """How one model reads a prompt.

    Args:
        before: the tokens before the decision token, as text.
        decision: the decision token.
        after: the tokens behind it, which the model does not read.
        n_tokens: number of tokens that it reads.
        n_dropped: number of tokens that were cut off on the left.
        text_end: how many characters of the prompt's text stand before the end of the decision
            token; None if the tokenizer or the template does not let it be known.
        in_template: whether it lies in what the chat template adds.
        problems: what is wrong on this side, a sentence part each.
        pieces: how its answer, its foil and its patched tokens were read, those that it has.
        notes: what was taken of them.
    """

    before: tuple[str, ...]
    decision: str
    after: tuple[str, ...]
    n_tokens: int
    n_dropped: int
    text_end: int | None
    in_template: bool | None
    problems: tuple[str, ...]
    pieces: Mapping[PieceName, ReadTokens] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptAudit:
    """How both models read a prompt.

    Args:
        id: the prompt's id.
        split: its split.
        sides: each model's reading; a model that cannot read the prompt at all is absent.
        problems: why its numbers would compare different things; none if the prompt aligns.
        notes: what differs without harm.
        same_tokens: whether both models read the same token ids.
        misread_by: the sides whose own tokenizer.json reads other tokens than transformers does.
    """

    id: str
    split: str
    sides: Mapping[Side, SideAudit]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    same_tokens: bool
    misread_by: tuple[Side, ...]

    @property
    def aligned(self) -> bool:
        """Whether both models decide at the same place of the same text."""
        return not self.problems


@dataclass(frozen=True)
class Audit(Shown):
    """How both models read all prompts.

    Args:
        prompts: a record per prompt, in order.
        reading: where prompts are decided, in a few words.
        notes: what holds for the whole set.
        excluded: the ids of prompts that a run leaves out because they do not align.
        lacking: what a run of these prompts would refuse.
    """

    prompts: tuple[PromptAudit, ...]
    reading: str
    notes: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Audit: {self.n_aligned} of {len(self.prompts)} prompts aligned>"

    def to_dataframe(self) -> pd.DataFrame:
        """A row a prompt."""
        return pd.DataFrame(
            {
                "id": each.id,
                "split": each.split,
                "aligned": each.aligned,
                "same_tokens": each.same_tokens,
                "problems": "; ".join(each.problems),
            }
            for each in self.prompts
        )

    @property
    def misaligned(self) -> tuple[str, ...]:
        """The ids of the prompts that do not align."""
        return tuple(each.id for each in self.prompts if not each.aligned)

    @property
    def n_aligned(self) -> int:
        """How many prompts align."""
        return len(self.prompts) - len(self.misaligned)

    @property
    def share_aligned_pct(self) -> float | None:
        """Share of the prompts that align, in percent; None without prompts."""
        return 100 * self.n_aligned / len(self.prompts) if self.prompts else None

    @property
    def n_same_tokens(self) -> int:
        """How many prompts are the same token ids for both models."""
        return sum(each.same_tokens for each in self.prompts)

    @property
    def enough(self) -> bool:
        """Whether enough of the prompts that take part align."""
        n = len(self.prompts) - len(self.excluded)
        return 100 * self.n_aligned >= ENOUGH_PCT * n and (n > 0 or not self.prompts)

    @property
    def warning(self) -> str | None:
        """What a report has to say of the prompts that take part; None if all is well."""
        said = []
        if not self.enough:
            n = len(self.prompts) - len(self.excluded)
            cause = max(causes(self.prompts), key=lambda each: len(each.ids))
            said.append(
                f"WARNING: only {self.n_aligned} of {n} prompts "
                f"({100 * self.n_aligned / max(n, 1):.1f}%, less than {ENOUGH_PCT:g}%) are read "
                f"alike by both models: of {len(cause.ids)}, {cause.said.rstrip('.')}; see "
                "audit.json or rq4lens audit."
            )
        misread = [each for each in self.prompts if each.misread_by]
        if misread:
            sides = dict.fromkeys(side for each in misread for side in each.misread_by)
            said.append(
                f"WARNING: transformers reads {len(misread)} of {len(self.prompts)} prompts, as "
                f"{misread[0].id!r}, as other tokens than the tokenizer.json of "
                f"{' and '.join(sides)} stands for: tokenizer_config.json makes another tokenizer "
                "of it; save the one that the model was trained with."
            )
        return " ".join(said) or None

    def n_cut(self, side: Side) -> int:
        """How many prompts of a side were cut on the left."""
        read = (each.sides[side] for each in self.prompts if side in each.sides)
        return sum(side_audit.n_dropped > 0 for side_audit in read)

    @property
    def summary(self) -> dict[str, Any]:
        """The audit in numbers, as plain JSON values."""
        return {
            "reading": self.reading,
            "n": len(self.prompts),
            "n_misaligned": len(self.misaligned),
            "share_aligned_pct": self.share_aligned_pct,
            "n_excluded": len(self.excluded),
            "n_same_tokens": self.n_same_tokens,
            "lacking": list(self.lacking),
            "warning": self.warning,
            "n_cut_left": {side: self.n_cut(side) for side in SIDES},
            "notes": list(self.notes),
        }

    def to_dict(self) -> dict[str, Any]:
        """The content of ``audit.json``."""
        prompts = [_record(each) for each in self.prompts]
        return {**self.summary, "excluded": list(self.excluded), "prompts": prompts}


class Cause(NamedTuple):
    """Why prompts do not align, or differ without harm: the words for the first, and all ids."""

    said: str
    ids: list[str]


VALUES = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\d+""")
"""What differs from prompt to prompt in what is said of one cause: quoted text, and numbers."""


def causes(
    prompts: Iterable[PromptAudit], what: Literal["problems", "notes"] = "problems"
) -> list[Cause]:
    """Everything that was found, once each, with the prompts that it holds for."""
    found: dict[str, Cause] = {}
    for prompt in prompts:
        for said in getattr(prompt, what):
            found.setdefault(VALUES.sub("", said), Cause(said, [])).ids.append(prompt.id)
    return list(found.values())


@dataclass(frozen=True)
class Reader:
    """One model as far as it reads: its tokenizer, and how much it can read where that is known."""

    side: Side
    tokenizer: PreTrainedTokenizerBase
    reads: ReadingLimits | None = None

    @cached_property
    def own_file(self) -> Any:
        """The tokenizer.json that lies with the model, as it stands; None without one."""
        from tokenizers import Tokenizer  # noqa: PLC0415 - slow to import

        folder = str(self.tokenizer.name_or_path)
        path = Path(folder) / "tokenizer.json"
        if not folder or not path.is_file():
            return None
        own = Tokenizer.from_file(str(path))
        own.no_truncation()
        own.no_padding()
        return own

    def misreads(self, text: str) -> bool:
        """Whether transformers made of that file a tokenizer that reads a text otherwise."""
        if self.own_file is None:
            return False
        as_it_stands = self.own_file.encode(text, add_special_tokens=False).ids
        return bool(self.tokenizer(text, add_special_tokens=False)["input_ids"] != as_it_stands)


def audit_prompts(
    prompts: PromptSet,
    tokenizers: Mapping[Side, PreTrainedTokenizerBase],
    reading: Reading | None = None,
    reads: Mapping[Side, ReadingLimits] | None = None,
) -> Audit:
    """Compare how two models read prompts; only their tokenizers are needed.

    >>> tokenizers = {side: pair.member(side).tokenizer for side in ("base", "tuned")}
    >>> len(rq.audit_prompts(pair.prompts, tokenizers).prompts)
    1248

    Args:
        prompts: the prompts.
        tokenizers: each model's own tokenizer.
        reading: where prompts are decided and how long they may be.
        reads: how much each model can read; left out, nothing is too long.

    Returns:
        What was found, prompt by prompt.
    """
    reading, reads = reading or Reading(), reads or {}
    readers = [Reader(side, tokenizers[side], reads.get(side)) for side in SIDES]
    audited = tuple(_audit(prompt, readers, reading) for prompt in prompts)
    return Audit(audited, reading.label, tuple(_notes(prompts, tokenizers)))


def lacking(prompts: PromptSet) -> tuple[str, ...]:
    """Splits that every run needs, and these prompts do not have."""
    there = ", ".join(prompts.splits) or "none"
    return tuple(
        f"no prompt has split {name!r}, which a run needs: the splits are {there}"
        for name in (FIT_SPLIT, MEASURE_SPLIT)
        if name not in prompts.splits
    )


def _audit(prompt: Prompt, readers: Sequence[Reader], reading: Reading) -> PromptAudit:
    read: dict[Side, ReadPrompt] = {}
    found: dict[Side, tuple[str, ...]] = {}
    for reader in readers:
        try:
            read[reader.side] = read_prompt(prompt, reader.tokenizer, reading)
        except UserError as problem:
            found[reader.side] = (str(problem),)
    able = [reader for reader in readers if reader.side in read]
    sides = {reader.side: _side(read[reader.side], reader) for reader in able}
    problems = list(_by_side(found | {side: each.problems for side, each in sides.items()}))
    notes = list(_by_side({side: each.notes for side, each in sides.items()}))
    if len(sides) == len(SIDES):
        problems += _disagreements(read, sides)
        problems += unmatched(read["base"], read["tuned"])
        notes += _harmless(sides)
    return PromptAudit(
        prompt.id,
        prompt.split,
        sides,
        tuple(problems),
        tuple(notes),
        same_tokens=len({each.kept for each in read.values()}) == 1 and len(read) == len(readers),
        misread_by=tuple(
            each.side for each in able if each.misreads(read[each.side].rendered.text)
        ),
    )


def _by_side(problems: Mapping[Side, tuple[str, ...]]) -> Iterator[str]:
    """Each problem with the side that has it; what is wrong on both is said once."""
    base, tuned = problems.get("base", ()), problems.get("tuned", ())
    for what in base:
        yield f"{'both' if what in tuned else 'base'}: {what}"
    yield from (f"tuned: {what}" for what in tuned if what not in base)


def _side(read: ReadPrompt, reader: Reader) -> SideAudit:
    place, tokenizer = read.decision_end, read.tokenizer
    start, behind = max(read.first_kept, read.decision - N_BEFORE), read.decision + 1
    before, after = (
        tuple(decoded(tokenizer, token) for token in read.tokens[part])
        for part in (slice(start, read.decision), slice(behind, behind + N_AFTER))
    )
    return SideAudit(
        before=before,
        decision=decoded(tokenizer, read.tokens[read.decision]),
        after=after,
        n_tokens=len(read.kept),
        n_dropped=read.n_dropped,
        text_end=None if place is None else place.end,
        in_template=None if place is None else place.in_template,
        problems=tuple(_problems(read, reader)),
        pieces=dict(_pieces(read)),
        notes=tuple(_taken(read)),
    )


def _pieces(read: ReadPrompt) -> Iterator[tuple[PieceName, ReadTokens]]:
    """What was read of a prompt's answer and foil, and which tokens of it are patched."""
    if read.answer is not None:
        yield "answer", ReadTokens(read.answer.texts, read.answer.how)
    if read.foil is not None:
        yield "foil", ReadTokens(read.foil.texts, read.foil.how)
    patched, how = read.patched, read.reading.positions
    if how == "decision" and read.prompt.subject is not None:
        try:
            patched, how = subject_tokens(read), "subject, not patched"
        except UserError:  # it is not asked for
            patched = ()
    if patched:
        texts = (decoded(read.tokenizer, read.tokens[at]) for at in patched)
        yield "patched", ReadTokens(tuple(texts), how)


def _taken(read: ReadPrompt) -> Iterator[str]:
    """What is taken of an answer or foil that is not one token, or does not continue the prompt."""
    most = read.reading.answer_tokens
    for what, said in (("answer", read.answer), ("foil", read.foil)):
        if said is None:
            continue
        if (n := len(said.tokens)) > 1:
            compared = f"the first {most} are compared"
            if n <= most:
                compared = "all are compared"
            elif most == 1:
                compared = "the first is compared"
            yield f"the {what} is {n} tokens, {shown(said.texts)}: {compared}"
        if said.how == "alone":
            yield (
                f"the {what} {shown(said.texts)} is tokenized alone, since it changes the tokens "
                "before it"
            )
    if read.answer and read.foil and read.answer.tokens[0] == read.foil.tokens[0]:
        yield (
            f"answer and foil start with the same token {read.answer.texts[0]!r}, so that no logit "
            "tells them apart"
        )


def _problems(read: ReadPrompt, reader: Reader) -> Iterator[str]:
    """What is wrong with one model's reading."""
    if reader.reads is not None and (why := unreadable(read.kept, reader.side, reader.reads)):
        yield f"it {why}"
    yield from _special_problems(read)
    yield from _template_problems(read)
    yield from _character_problems(read)


def _special_problems(read: ReadPrompt) -> Iterator[str]:
    tokenizer, decision = read.tokenizer, read.tokens[read.decision]
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if bos is not None and n_leading_bos(read) > 1:
        yield f"it starts with {n_leading_bos(read)} BOS tokens"
    if pad is not None and pad not in (bos, eos) and pad in read.kept:
        trailing = " and is decided at it" if decision == pad else ""
        yield f"padding {tokenizer.pad_token!r} stands among its tokens{trailing}"
    elif eos is not None and decision == eos:
        yield f"it is decided at the end-of-text token {tokenizer.eos_token!r}"
    if decision == bos != eos:
        yield f"it is decided at the BOS token {tokenizer.bos_token!r}"


def _template_problems(read: ReadPrompt) -> Iterator[str]:
    if read.prompt.messages:
        if read.rendered.parts is None:
            yield "its chat template does not hold the messages as they were written"
        without = apply_template(read.prompt, read.tokenizer, generation_prompt=False)
        if read.rendered.text == without and _header_is_missing(read):
            yield "its chat template adds no generation prompt"
        if read.n_dropped:
            yield f"the start of its chat template is cut off, {read.n_dropped} tokens in all"
    elif read.spans is not None and read.n_dropped and _inside_character(read, read.first_kept):
        yield "the cut on the left goes through a character"


def _header_is_missing(read: ReadPrompt) -> bool:
    """Whether the template writes more before the next turn than what the prompt ends with.

    Nothing but space is missing where a closing tag ends the user's turn and the model answers
    behind it, or where the header of the answer is always written.
    """
    messages, stand_in = read.prompt.messages, chr(0xE000)
    role = "user" if messages[-1].role == "assistant" else "assistant"
    try:
        longer = apply_template(read.prompt, read.tokenizer, [*messages, Message(role, stand_in)])
    except UserError:  # it takes no further turn
        return role == "user"
    before, text = longer.partition(stand_in)[0], read.rendered.text.rstrip()
    return before.startswith(text) and bool(before[len(text) :].strip())


def _character_problems(read: ReadPrompt) -> Iterator[str]:
    if read.spans is None:
        yield "its tokenizer does not tell the characters of its tokens, so nothing can be compared"
        return
    text, span = read.rendered.text, read.spans[read.decision]
    end = len(text) if span is None else span[1]
    if _inside_character(read, read.decision + 1) or _inside_cluster(text, end):
        yield f"the decision token cuts the character {text[max(0, end - 1) : end + 1]!r} in two"
    elif text[max(0, end - 1) : end] == REPLACEMENT:
        yield "it is decided at half a character (U+FFFD): the text was cut inside it before"


def _inside_character(read: ReadPrompt, index: int) -> bool:
    """Whether a token starts inside a character that the one before it has begun."""
    spans = read.spans or ()
    before, span = (spans[at] if 0 <= at < len(spans) else None for at in (index - 1, index))
    return before is not None and span is not None and span[0] < before[1]


def _inside_cluster(text: str, end: int) -> bool:
    """Whether what is seen as one character, such as a family emoji, goes on behind an index."""
    if not 0 < end < len(text):
        return False
    last, following = text[end - 1], text[end]
    if unicodedata.category(following) in ("Mn", "Me") or ord(following) in SKIN_TONES:
        return True
    flags = len(text[:end]) - len(text[:end].rstrip("".join(map(chr, FLAG_LETTERS))))
    return JOINER in (last, following) or (ord(following) in FLAG_LETTERS and flags % 2 == 1)


def _disagreements(
    read: Mapping[Side, ReadPrompt], sides: Mapping[Side, SideAudit]
) -> Iterator[str]:
    """Where both readings, each sound by itself, are of different text."""
    base, tuned = sides["base"], sides["tuned"]
    if base.text_end is not None and tuned.text_end is not None:
        if base.text_end != tuned.text_end:
            yield (
                f"decided at different places: base after character {base.text_end} at "
                f"{base.decision!r}, tuned after {tuned.text_end} at {tuned.decision!r}"
            )
        elif base.in_template != tuned.in_template:
            where = {True: "in its chat template", False: "in the text"}
            yield (
                f"decided at different places: base {where[bool(base.in_template)]} at "
                f"{base.decision!r}, tuned {where[bool(tuned.in_template)]} at {tuned.decision!r}"
            )
    starts = {side: _text_start(each) for side, each in read.items()}
    if any(each.n_dropped for each in read.values()) and starts["base"] != starts["tuned"]:
        yield (
            f"cut on the left at different places: base reads from character {starts['base']}, "
            f"tuned from {starts['tuned']}"
        )


def _text_start(read: ReadPrompt) -> int | None:
    """The first character of the prompt's text that is read."""
    span = None if read.spans is None else read.spans[read.first_kept]
    place = None if span is None else read.rendered.place(span[0] + 1)
    return None if place is None else max(0, place.end - (not place.in_template))


def _harmless(sides: Mapping[Side, SideAudit]) -> Iterator[str]:
    base, tuned = sides["base"], sides["tuned"]
    same_place = (base.text_end, base.in_template) == (tuned.text_end, tuned.in_template)
    # Whether a token holds its space differs harmlessly.
    same_token = base.decision.strip() == tuned.decision.strip()
    if same_place and not base.in_template and not same_token:
        yield (
            f"the last word is split differently: base ends in {base.decision!r}, tuned in "
            f"{tuned.decision!r}"
        )


def _notes(prompts: PromptSet, tokenizers: Mapping[Side, PreTrainedTokenizerBase]) -> Iterator[str]:
    chats = any(prompt.messages for prompt in prompts)
    for side, tokenizer in tokenizers.items():
        template = str(getattr(tokenizer, "chat_template", None) or "")
        if chats and "strftime_now" in template and "date_string" not in template:
            yield f"the {side} chat template writes today's date: tokens change from day to day"


def _record(audit: PromptAudit) -> dict[str, Any]:
    values = asdict(audit)
    sides = values.pop("sides")
    for side in sides.values():
        del side["problems"], side["notes"]  # they stand beside both sides
        side |= {name: piece._asdict() for name, piece in side.pop("pieces").items()}
    first = {"id": values.pop("id"), "split": values.pop("split"), "aligned": audit.aligned}
    return first | sides | values
