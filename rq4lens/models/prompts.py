"""Prompts: reading them, splitting them, and cutting them at the decision token."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from rq4lens.errors import UserError
from rq4lens.files import parse_json, read_regular_file, short_reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PaddingSide = Literal["right", "left"]
DecisionRule = Literal["last", "last_content"]

FIT_SPLIT = "train"
MEASURE_SPLIT = "val"
SIDE_EFFECT_SPLIT = "neutral"

MAX_ID_LENGTH = 200
"""Ids are names: they stand in error sentences, tables and hover texts."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        id: its unique name.
        text: what the models read.
        split: ``train`` (maps are fitted on it), ``val`` (everything is measured on it),
            ``neutral`` (prompts that the fine-tune left alone, for side effects) or any other name.
        group: paraphrases of one question share a group; resampling and folds keep it together.
        meta: anything else that the file says about the prompt.
    """

    id: str
    text: str
    split: str
    group: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """Prompts with their splits, checked when they are made.

    Args:
        prompts: the prompts, in file order.

    Raises:
        UserError: for an empty text, characters that UTF-8 cannot hold, a repeated or endless id,
            and a text or group that stands in both train and val.
    """

    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        _refuse_unreadable(self.prompts)
        _refuse_empty_texts(self.prompts)
        _refuse_repeated_ids(self.prompts)
        _refuse_leaks(self.prompts)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> PromptSet:
        """Read a JSONL file: one object per line with ``id``, ``text``, ``split``.

        Optional keys are ``group`` and ``meta``.

        Args:
            path: the file.

        Returns:
            The prompts, checked.

        Raises:
            UserError: if the file is missing, is not UTF-8, or a line is not such an object.
        """
        return cls(tuple(_read_jsonl(Path(path))))

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
        return PromptSet(chosen)

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
        """The prompts' groups; a prompt without one is a group of its own, named by its id."""
        return tuple(prompt.group or prompt.id for prompt in self.prompts)

    @property
    def fingerprint(self) -> str:
        """Hash of every id, text, split and group."""
        content = [(p.id, p.text, p.split, p.group) for p in self.prompts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


@dataclass(frozen=True)
class TokenizedPrompts:
    """Prompts as one model reads them, each cut at its decision token (its last token).

    What stands behind the decision token cannot change its next-token distribution in a causal
    model, so it is not kept.

    Args:
        ids: the prompts' ids.
        token_ids: the tokens of each prompt, up to and including the decision token.
    """

    ids: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Int[Tensor, "prompt"]:
        """Number of tokens of each prompt."""
        return torch.tensor([len(tokens) for tokens in self.token_ids])

    @property
    def fingerprint(self) -> str:
        """Hash of the ids and tokens, and with them of every decision index."""
        content = json.dumps([self.ids, self.token_ids])
        return hashlib.sha256(content.encode()).hexdigest()

    def batches(self, batch_size: int, padding_side: PaddingSide = "right") -> Iterator[TokenBatch]:
        """Batches of prompts of similar length.

        Args:
            batch_size: prompts in a batch.
            padding_side: where shorter prompts are filled up.

        Yields:
            Batches that together hold every prompt once.
        """
        order = torch.argsort(self.lengths, stable=True)
        for rows in order.split(batch_size):
            yield self._batch(rows, padding_side)

    def _batch(self, rows: Int[Tensor, "prompt"], padding_side: PaddingSide) -> TokenBatch:
        sequences = [torch.tensor(self.token_ids[row]) for row in rows.tolist()]
        # The padding id is arbitrary: no position that is read can attend to a padded one.
        tokens = torch.nn.utils.rnn.pad_sequence(sequences, True, 0, padding_side)
        ones = [torch.ones_like(sequence) for sequence in sequences]
        mask = torch.nn.utils.rnn.pad_sequence(ones, True, 0, padding_side)
        return TokenBatch(rows, tokens, mask, padding_side)


@dataclass(frozen=True)
class TokenBatch:
    """A padded batch of prompts.

    Args:
        rows: which prompts of the :class:`TokenizedPrompts` these are.
        tokens: the padded tokens.
        attention_mask: 1 for tokens, 0 for padding.
        padding_side: where the padding stands.
    """

    rows: Int[Tensor, "prompt"]
    tokens: Int[Tensor, "prompt pos"]
    attention_mask: Int[Tensor, "prompt pos"]
    padding_side: PaddingSide

    @property
    def lengths(self) -> Int[Tensor, "prompt"]:
        """Number of tokens of each prompt."""
        return self.attention_mask.sum(-1)

    @property
    def decision(self) -> Int[Tensor, "prompt"]:
        """Index of the decision token in the padded row."""
        if self.padding_side == "left":
            return torch.full_like(self.rows, self.tokens.shape[1] - 1)
        return self.lengths - 1


def tokenize(
    prompts: PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    decision_rule: DecisionRule = "last",
) -> TokenizedPrompts:
    """Tokenize each prompt once and cut it at its decision token.

    Args:
        prompts: the prompts.
        tokenizer: the model's own tokenizer; it adds its special tokens, except to a text that
            starts with its BOS: that is a rendered chat template and holds them already.
        decision_rule: ``"last"`` takes the last token, ``"last_content"`` the last token that is
            not a special one.

    Returns:
        The tokens of each prompt up to the decision token.

    Raises:
        UserError: if a prompt has no token that can be the decision token.
    """
    special = (
        frozenset(tokenizer.all_special_ids) if decision_rule == "last_content" else frozenset()
    )
    cut = tuple(_cut(_encode(prompt.text, tokenizer), special, prompt.id) for prompt in prompts)
    return TokenizedPrompts(prompts.ids, cut)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    rendered = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tuple(tokenizer(text, add_special_tokens=not rendered)["input_ids"])


def _cut(tokens: tuple[int, ...], skipped: frozenset[int], prompt_id: str) -> tuple[int, ...]:
    for index in range(len(tokens) - 1, -1, -1):
        if tokens[index] not in skipped:
            return tokens[: index + 1]
    raise UserError(
        f"prompt {prompt_id!r} has no token to decide at: its text must have at least one token "
        "outside the special ones."
    )


def _refuse_unreadable(prompts: Sequence[Prompt]) -> None:
    for number, prompt in enumerate(prompts, start=1):
        if not 1 <= len(prompt.id) <= MAX_ID_LENGTH:
            raise UserError(
                f"the id of prompt {number} has {len(prompt.id)} characters: give it a name of 1 "
                f"to {MAX_ID_LENGTH}."
            )
        try:
            "".join((prompt.id, prompt.text, prompt.split, prompt.group or "")).encode()
        except UnicodeEncodeError as problem:
            raise UserError(
                f"prompt {prompt.id!r} holds half a character ({problem.reason}): write the whole "
                "character, or remove it."
            ) from None


def _refuse_empty_texts(prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if not prompt.text.strip():
            raise UserError(f"prompt {prompt.id!r} has an empty text: give it one or remove it.")


def _refuse_repeated_ids(prompts: Sequence[Prompt]) -> None:
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


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    try:
        content = read_regular_file(path).removeprefix("\ufeff")  # a byte order mark is no content
    except FileNotFoundError:
        raise UserError(f"prompt file {str(path)!r} does not exist: check the path.") from None
    except (OSError, ValueError) as problem:
        raise UserError(
            f"prompt file {str(path)!r} cannot be read as UTF-8 ({short_reason(problem)}): save it "
            "as a plain UTF-8 file."
        ) from None
    # Not splitlines(): a text may hold a form feed or a Unicode line separator.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield _parse_line(line, f"{path}:{number}")


def _parse_line(line: str, where: str) -> Prompt:
    try:
        record = parse_json(line)
    except (ValueError, RecursionError) as problem:
        raise UserError(
            f"{where} is not JSON ({short_reason(problem)}): write one object per line."
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f'{where} is not an object: write {{"id": ..., "text": ..., "split": ...}}.'
        )
    for key in ("id", "text", "split"):
        if not isinstance(record.get(key), str):
            raise UserError(
                f"{where} has no string {key!r}: every prompt needs id, text and split."
            )
    unknown = sorted(set(record) - {"id", "text", "split", "group", "meta"})
    if unknown:
        raise UserError(
            f"{where} has unknown key {unknown[0][:60]!r}: allowed are id, text, split, group and "
            "meta."
        )
    group, meta = record.get("group"), record.get("meta", {})
    if not isinstance(group, str | None) or not isinstance(meta, dict):
        raise UserError(f"{where}: group must be a string and meta an object.")
    return Prompt(record["id"], record["text"], record["split"], group, meta)
