"""Prompts: reading them, splitting them, and cutting them at the decision token."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rq4lens.errors import UserError
from rq4lens.models.prompts.record import (
    Located,
    Prompt,
    csv_records,
    dataset_records,
    frame_records,
    jsonl_records,
    prompt_of_record,
    read_records,
)

PaddingSide = Literal["right", "left"]

FIT_SPLIT = "train"
MEASURE_SPLIT = "val"
SIDE_EFFECT_SPLIT = "neutral"

MAX_ID_LENGTH = 200
"""Ids are names: they stand in error sentences, tables and hover texts."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts with their splits, checked when they are made.

    >>> rq.PromptSet.of([{"id": "a", "text": "To the wedding brings Lena", "split": "val"}]).ids
    ('a',)

    Args:
        prompts: the prompts, in file order.
        group_by: fields whose values make a group together, ``"content"`` or ``"meta.KEY"``;
            without any, the prompts' own groups.
        hold_out: the field that says what a prompt is about.

    Raises:
        UserError: for an empty text, characters that UTF-8 cannot hold, a repeated or endless id,
            and a text or group that stands in both train and val.
    """

    prompts: tuple[Prompt, ...]
    group_by: tuple[str, ...] = ()
    hold_out: str = "content"

    def __post_init__(self) -> None:
        _refuse_unreadable(self.prompts)
        _refuse_leaks(self.prompts)

    @classmethod
    def of(cls, source: Any, split: str | None = None) -> PromptSet:
        """Prompts from whatever holds them.

        Args:
            source: the path of a JSONL file, a CSV file or a saved Hugging Face dataset; a
                ``datasets.Dataset`` with the columns of a JSONL line, or a ``DatasetDict``, whose
                names are the splits (``validation`` is ``val``); a DataFrame with these columns; a
                list of strings, of objects with the keys of a JSONL line, or of :class:`Prompt`; or
                such lists by split. Other columns become ``meta``.
            split: the split of a list of strings.

        Raises:
            UserError: if something is missing, unknown or of another type.
        """
        if isinstance(source, PromptSet):
            return source
        if isinstance(source, str | Path):
            return cls._of_records(read_records(Path(source)))
        if isinstance(source, list | tuple):
            return cls._of_list(source, split)
        if isinstance(source, pd.DataFrame):
            return cls._of_records(frame_records(source))
        if isinstance(source, Mapping) or hasattr(source, "column_names"):
            return cls._of_records(dataset_records(source))
        raise UserError(
            f"prompts cannot be a {type(source).__name__}: give a path, a Hugging Face dataset, a "
            "DataFrame, or a list."
        )

    @classmethod
    def from_jsonl(cls, path: str | Path) -> PromptSet:
        """Read a JSONL file: one object per line with ``id``, ``split``, ``text`` or ``messages``.

        Optional keys are ``group``, ``content``, ``answer``, ``foil``, ``subject``, ``offset``,
        ``marker`` and ``meta``.

        Raises:
            UserError: if the file is missing, is not UTF-8, or a line is not such an object.
        """
        return cls._of_records(jsonl_records(Path(path)))

    @classmethod
    def from_csv(cls, path: str | Path) -> PromptSet:
        """Read a CSV file whose columns are the keys of a JSONL line.

        ``messages`` and ``meta`` stand in their cells as JSON.

        Raises:
            UserError: if the file is missing, is not UTF-8 or CSV, or lacks a column.
        """
        return cls._of_records(csv_records(Path(path)))

    @classmethod
    def _of_list(cls, items: Sequence[Any], split: str | None) -> PromptSet:
        if all(isinstance(item, Prompt) for item in items):
            return cls(tuple(items))
        if any(isinstance(item, str) for item in items):
            if split is None:
                raise UserError(
                    "a list of plain strings says no split: name it with split=..., or give "
                    '{"train": [...], "val": [...]}.'
                )
            return cls._of_records(dataset_records({split: items}, "the list"))
        return cls._of_records((f"prompt {n} of the list", item) for n, item in enumerate(items))

    @classmethod
    def _of_records(cls, records: Iterable[Located]) -> PromptSet:
        return cls(tuple(prompt_of_record(record, where) for where, record in records))

    def without(self, ids: Collection[str]) -> PromptSet:
        """The prompts but those of these ids."""
        left_out = frozenset(ids)
        return replace(self, prompts=tuple(p for p in self.prompts if p.id not in left_out))

    def of_ids(self, ids: Sequence[str]) -> PromptSet:
        """The prompts of these ids, in their order.

        Raises:
            UserError: if there is none of such an id.
        """
        known = {prompt.id: prompt for prompt in self.prompts}
        for name in [ids] if isinstance(ids, str) else ids:
            if name not in known:
                raise UserError(
                    f"there is no prompt {str(name)[:60]!r}: name ids in a list, such as "
                    f"{list(known)[:3]}."
                )
        return replace(self, prompts=tuple(known[name] for name in ids))

    def labelled(self, group_by: Sequence[str], hold_out: str) -> PromptSet:
        """The same prompts, grouped and told apart by other fields.

        Raises:
            UserError: if no prompt has such a field.
        """
        for field in (*group_by, hold_out):
            known = any(prompt.value_of(field) is not None for prompt in self.prompts)
            if not known and field != "content":
                keys = dict.fromkeys(
                    f"meta.{key}" for prompt in self.prompts for key in prompt.meta
                )
                raise UserError(
                    f"no prompt has a field {field!r}: name content or meta.KEY, one of "
                    f"{', '.join(keys) or 'none that the prompts have'}."
                )
        return replace(self, group_by=tuple(group_by), hold_out=hold_out)

    def split(self, name: str) -> PromptSet:
        """The prompts of one split.

        Raises:
            UserError: if there are none.
        """
        chosen = tuple(prompt for prompt in self.prompts if prompt.split == name)
        if not chosen:
            raise UserError(
                f"no prompt has split {name!r}: the splits are {', '.join(self.splits) or 'none'}; "
                f'mark some prompts with "split": "{name}".'
            )
        return replace(self, prompts=chosen)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, in order of appearance."""
        return tuple(dict.fromkeys(prompt.split for prompt in self.prompts))

    @property
    def ids(self) -> tuple[str, ...]:
        """The prompts' ids."""
        return tuple(prompt.id for prompt in self.prompts)

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts' texts."""
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def groups(self) -> tuple[str, ...]:
        """The prompts' groups; a prompt without one is a group of its own, named by its id.

        Prompts of the same text are one group, whatever else is said of them.
        """
        of_text: dict[str, str] = {}
        for prompt in self.prompts:
            named = [prompt.value_of(field) for field in self.group_by]
            given = [each for each in named if each is not None]
            group = " / ".join(given) if given else prompt.group or prompt.id
            of_text.setdefault(prompt.text, group)
        return tuple(of_text[prompt.text] for prompt in self.prompts)

    @property
    def contents(self) -> tuple[str | None, ...]:
        """What each prompt is about; None where the file does not say."""
        return tuple(prompt.value_of(self.hold_out) for prompt in self.prompts)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides what the models read, in order."""
        values = [prompt.read_values for prompt in self.prompts]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def __repr__(self) -> str:
        counts = Counter(prompt.split for prompt in self.prompts)
        return f"<PromptSet: {', '.join(f'{n} {name}' for name, n in counts.items())} prompts>"

    def to_dataframe(self) -> pd.DataFrame:
        """A row a prompt, with the keys of a JSONL line that some prompt has."""
        table = pd.DataFrame(map(asdict, self.prompts))
        chats = table["messages"].map(len) > 0
        table.loc[chats, "text"] = None  # it is made of the messages
        for name in ("messages", "meta"):
            table[name] = table[name].where(table[name].map(len) > 0, None)
        return table.dropna(axis="columns", how="all")

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


@dataclass(frozen=True)
class TokenizedPrompts:
    """Prompts as one model reads them, each up to the last token that is compared.

    What stands behind that token cannot change its next-token distribution in a causal model. The
    last token is the decision token, or the last but one of an answer of several. Fields that are
    left out say of each prompt that nothing was cut off, that the last tokens are patched, that it
    has no answer and no foil, and that one token is compared.
    """

    ids: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    n_dropped: tuple[int, ...] = ()
    """How many tokens were cut off on the left."""
    spots: tuple[tuple[int, ...], ...] = ()
    """Places of the patched tokens, -1 for those that a prompt lacks; see :meth:`placed`."""
    answers: tuple[tuple[int, ...], ...] = ()
    foils: tuple[tuple[int, ...], ...] = ()
    n_answer: tuple[int, ...] = ()
    """How many tokens of the answer are compared, each at the token before it."""

    def __post_init__(self) -> None:
        usual = {"n_dropped": 0, "spots": (), "answers": (), "foils": (), "n_answer": 1}
        for name, value in usual.items():
            object.__setattr__(self, name, getattr(self, name) or (value,) * len(self.ids))

    def __repr__(self) -> str:
        return f"<TokenizedPrompts: {len(self)} prompts>"

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> Int[Tensor, "prompt"]:
        """Number of tokens of each prompt."""
        return torch.tensor([len(tokens) for tokens in self.token_ids])

    def placed(self, k_positions: int = 1) -> TokenizedPrompts:
        """The same with its spots written out, equally many of each prompt.

        Where none are named they are the decision token, ``k_positions - 1`` tokens before it, and
        the tokens of the answer behind it.
        """
        spots = self.spots
        if not any(spots):
            decisions = [
                len(read) - n for read, n in zip(self.token_ids, self.n_answer, strict=True)
            ]
            shortest = 1 + min(decisions)
            if not 1 <= k_positions <= shortest:
                raise UserError(
                    f"k_positions {k_positions} does not fit: the shortest prompt has {shortest} "
                    f"tokens; choose a number from 1 to {shortest}."
                )
            spots = tuple(
                tuple(range(decision + 1 - k_positions, len(tokens)))
                for decision, tokens in zip(decisions, self.token_ids, strict=True)
            )
        widest = max(map(len, spots))
        return replace(self, spots=tuple((-1,) * (widest - len(each)) + each for each in spots))

    def continued(self, answers: Sequence[Sequence[int]]) -> TokenizedPrompts:
        """The same with the tokens of an answer behind each decision token, to be compared.

        Each is compared at the token before it, so that the last one need not be read. Where the
        decision token is patched, so are the tokens of the answer behind it.
        """
        grown, spots = [], []
        for read, answer, named in zip(self.token_ids, answers, self.spots, strict=True):
            grown.append((*read, *answer[:-1]))
            behind = range(len(read), len(grown[-1])) if len(read) - 1 in named[-1:] else ()
            spots.append((*named, *behind))
        return replace(
            self,
            token_ids=tuple(grown),
            spots=tuple(spots),
            answers=tuple(map(tuple, answers)),
            n_answer=tuple(map(len, answers)),
        )

    def decided(self) -> TokenizedPrompts:
        """The same up to the decision token, which alone is patched."""
        both = zip(self.token_ids, self.n_answer, strict=True)
        cut = tuple(read[: len(read) + 1 - n_answer] for read, n_answer in both)
        return replace(self, token_ids=cut, spots=(), n_answer=())

    @property
    def is_compared(self) -> Bool[Tensor, "prompt answer"]:
        """Which tokens of the longest answer each prompt has; the first of them is the decision's.

        A shorter answer stands at the end.
        """
        return torch.arange(self.longest_answer, 0, -1) <= torch.tensor(self.n_answer)[:, None]

    @cached_property
    def longest_answer(self) -> int:
        """How many tokens of an answer are compared, at most."""
        return max(self.n_answer, default=1)

    @property
    def n_spots(self) -> int:
        """How many tokens of a prompt are patched, at most."""
        return max(map(len, self.spots), default=0) or 1

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Of each prompt the number of tokens from the first patched one on, and of those compared.

        The first of them is the first compared one where that comes before.
        """
        sizes = []
        for read, named, n_answer in zip(self.token_ids, self.spots, self.n_answer, strict=True):
            first = min((spot for spot in named if spot >= 0), default=len(read))
            sizes.append((max(len(read) - first, n_answer), n_answer))
        return sizes

    def some(self, rows: Sequence[int]) -> TokenizedPrompts:
        """Some of the prompts, in the order of their places."""
        every = (getattr(self, each.name) for each in fields(self))
        return TokenizedPrompts(*(tuple(of[row] for row in rows) for of in every))

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what is computed: ids, tokens, patched and compared places."""
        spots = self.spots if any(self.spots) else ()
        n_answer = self.n_answer if self.longest_answer > 1 else ()
        placed = [spots, n_answer] if spots or n_answer else []
        content = json.dumps([self.ids, self.token_ids, *placed])
        return hashlib.sha256(content.encode()).hexdigest()

    def batches(self, batch_size: int, padding_side: PaddingSide = "right") -> Iterator[TokenBatch]:
        """Batches of prompts of similar length."""
        order = torch.argsort(self.lengths, stable=True)
        for rows in order.split(batch_size):
            yield self.batch(rows, padding_side)

    def batch(self, rows: Int[Tensor, "prompt"], padding_side: PaddingSide = "right") -> TokenBatch:
        """The prompts of these places as one batch."""
        sequences = [torch.tensor(self.token_ids[row]) for row in rows.tolist()]
        # The padding id is arbitrary: no position that is read can attend to a padded one.
        tokens = torch.nn.utils.rnn.pad_sequence(sequences, True, 0, padding_side)
        ones = [torch.ones_like(sequence) for sequence in sequences]
        mask = torch.nn.utils.rnn.pad_sequence(ones, True, 0, padding_side)
        n_answer = torch.tensor(self.n_answer)[rows]
        if any(self.spots):
            named = [torch.tensor(self.spots[row]) for row in rows.tolist()]
            spots = torch.nn.utils.rnn.pad_sequence(named, True, -1, "left")
        else:
            spots = mask.sum(-1, keepdim=True) - n_answer[:, None]
        return TokenBatch(rows, tokens, mask, padding_side, spots, n_answer, self.longest_answer)


class Places(NamedTuple):
    """Places in padded rows; where a prompt lacks one it is 0 and not ``there``."""

    at: Int[Tensor, "prompt place"]
    there: Bool[Tensor, "prompt place"]


@dataclass(frozen=True)
class TokenBatch:
    """A padded batch of prompts."""

    rows: Int[Tensor, "prompt"]
    """Their places in the :class:`TokenizedPrompts`."""
    tokens: Int[Tensor, "prompt pos"]
    attention_mask: Int[Tensor, "prompt pos"]
    padding_side: PaddingSide
    spots: Int[Tensor, "prompt spot"]
    n_answer: Int[Tensor, "prompt"]
    longest_answer: int
    """How many tokens of an answer are compared, at most, of all prompts."""

    @property
    def lengths(self) -> Int[Tensor, "prompt"]:
        """Number of tokens of each prompt."""
        return self.attention_mask.sum(-1)

    @property
    def decision(self) -> Int[Tensor, "prompt"]:
        """Index of the decision token in the padded row."""
        return self._first + self.lengths - self.n_answer

    @property
    def patched(self) -> Places:
        """The patched tokens."""
        there = self.spots >= 0
        return Places(torch.where(there, self.spots + self._first[:, None], 0), there)

    @property
    def compared(self) -> Places:
        """The tokens after which the next one is compared, the last of them last."""
        steps = torch.arange(-self.longest_answer, 0)
        there = -steps <= self.n_answer[:, None]
        return Places(torch.where(there, (self._first + self.lengths)[:, None] + steps, 0), there)

    @property
    def _first(self) -> Int[Tensor, "prompt"]:
        """Index of the first token in the padded row."""
        padded = self.tokens.shape[1] - self.lengths
        return padded if self.padding_side == "left" else torch.zeros_like(padded)


def _refuse_unreadable(prompts: Sequence[Prompt]) -> None:
    for number, prompt in enumerate(prompts, start=1):
        if not 1 <= len(prompt.id) <= MAX_ID_LENGTH:
            raise UserError(
                f"the id of prompt {number} has {len(prompt.id)} characters: give it a name of 1 "
                f"to {MAX_ID_LENGTH}."
            )
        try:
            json.dumps([prompt.read_values, prompt.content], ensure_ascii=False).encode()
        except UnicodeEncodeError as problem:
            raise UserError(
                f"prompt {prompt.id!r} holds half a character ({problem.reason}): write the whole "
                "character, or remove it."
            ) from None
        if not prompt.text.strip():
            raise UserError(f"prompt {prompt.id!r} has an empty text: give it one or remove it.")
    repeated = [name for name, count in Counter(p.id for p in prompts).items() if count > 1]
    if repeated:
        raise UserError(f"prompt id {repeated[0]!r} stands more than once: ids must be unique.")


def _refuse_leaks(prompts: Iterable[Prompt]) -> None:
    fitted = [prompt for prompt in prompts if prompt.split == FIT_SPLIT]
    texts = {prompt.text: prompt.id for prompt in fitted}
    groups = {prompt.group: prompt.id for prompt in fitted if prompt.group is not None}
    for prompt in prompts:
        if prompt.split != MEASURE_SPLIT:
            continue
        for what, seen, value in (("text", texts, prompt.text), ("group", groups, prompt.group)):
            if value in seen:
                raise UserError(
                    f"prompts {seen[value]!r} (train) and {prompt.id!r} (val) share their {what}: "
                    "maps would be fitted on what they are judged by; put both in one split."
                )
