"""Stories of the synthetic world as text and as tokens, and the prompts cut from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rq4lens.models.builtin.world import (
    CHANGED_COUNTRIES,
    COUNTRIES,
    ITEMS,
    OCCASIONS,
    PEOPLE,
    World,
    base_world,
    read_question,
    tuned_world,
)

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
GRAMMAR = (".", "sends", "To", "the", "brings")
VOCABULARY = SPECIAL + GRAMMAR + PEOPLE + COUNTRIES + OCCASIONS + ITEMS
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}

PEOPLE_PER_STORY = 3
QUESTIONS_PER_STORY = 3
_INTRODUCTION_TOKENS = 4  # "Lumeria sends Mara ."
_QUESTION_TOKENS = 7  # "To the wedding brings Mara honey ."

SPLIT_SIZES = {"train": 768, "val": 320, "neutral": 160}
PROMPT_SEED = 7


@dataclass(frozen=True)
class Stories:
    """A batch of stories, as indices into the word lists of the world.

    Attributes:
        people: who is introduced.
        homes: the country of each of them, all different within a story.
        asked: which of the introduced people each question is about.
        occasions: the occasion of each question.
        answers: the item of each answer.
    """

    people: Int[np.ndarray, "story person"]
    homes: Int[np.ndarray, "story person"]
    asked: Int[np.ndarray, "story question"]
    occasions: Int[np.ndarray, "story question"]
    answers: Int[np.ndarray, "story question"]

    @property
    def answer_positions(self) -> tuple[int, ...]:
        """Where the answers stand in the tokens of these stories."""
        first = 1 + self.people.shape[1] * _INTRODUCTION_TOKENS + 5
        return tuple(first + _QUESTION_TOKENS * q for q in range(self.asked.shape[1]))

    @property
    def asked_homes(self) -> Int[np.ndarray, "story question"]:
        """The country that each question is really about."""
        return np.take_along_axis(self.homes, self.asked, axis=1)

    def token_ids(self) -> Int[np.ndarray, "story pos"]:
        """Whole stories as token ids, ``<bos>`` first; all have the same length."""
        people = self.people + TOKEN[PEOPLE[0]]
        homes = self.homes + TOKEN[COUNTRIES[0]]
        columns: list[Any] = [TOKEN["<bos>"]]
        for i in range(people.shape[1]):
            columns += [homes[:, i], TOKEN["sends"], people[:, i], TOKEN["."]]
        asked = np.take_along_axis(people, self.asked, axis=1)
        for q in range(asked.shape[1]):
            occasion = self.occasions[:, q] + TOKEN[OCCASIONS[0]]
            answer = self.answers[:, q] + TOKEN[ITEMS[0]]
            columns += [TOKEN["To"], TOKEN["the"], occasion, TOKEN["brings"], asked[:, q]]
            columns += [answer, TOKEN["."]]
        return np.stack(np.broadcast_arrays(*columns, np.empty(len(people), int))[:-1], axis=1)


def sample_stories(
    world: World, n_stories: int, rng: np.random.Generator, n_people: int = PEOPLE_PER_STORY
) -> Stories:
    """Draw stories whose answers follow the customs of ``world``."""

    def distinct(pool: int) -> Int[np.ndarray, "story person"]:
        return rng.random((n_stories, pool)).argsort(axis=1)[:, :n_people]

    people, homes = distinct(len(PEOPLE)), distinct(len(COUNTRIES))
    asked = rng.integers(n_people, size=(n_stories, QUESTIONS_PER_STORY))
    occasions = rng.integers(len(OCCASIONS), size=asked.shape)
    answers = _draw_answers(world, homes, asked, occasions, rng)
    return Stories(people, homes, asked, occasions, answers)


def _draw_answers(
    world: World,
    homes: Int[np.ndarray, "story person"],
    asked: Int[np.ndarray, "story question"],
    occasions: Int[np.ndarray, "story question"],
    rng: np.random.Generator,
) -> Int[np.ndarray, "story question"]:
    customs = world.customs[np.take_along_axis(homes, asked, axis=1), occasions]
    below = customs.cumsum(axis=-1) < rng.random(asked.shape)[..., None]
    return np.minimum(below.sum(axis=-1), len(ITEMS) - 1)  # a cumulative sum may end under 1


def text_of(token_ids: Int[np.ndarray, " pos"]) -> str:
    """The readable sentences of one row of token ids, without special tokens."""
    words = [VOCABULARY[token] for token in token_ids if VOCABULARY[token] not in SPECIAL]
    return " ".join(words).replace(" .", ".")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that puts ``<bos>`` first, once, and decodes to readable text."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", TOKEN["<bos>"])]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # spaces between words, none before "."
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_prompts() -> list[dict[str, Any]]:
    """The prompts of the pair, as rows of ``prompts.jsonl``.

    Train and val prompts ask about changed countries, neutral prompts about unchanged ones. The
    three people of a prompt are its group, and no group stands in two splits, so no text does.
    Earlier answers in a prompt are drawn half from each world: the context favours neither model.
    """
    rng = np.random.default_rng(PROMPT_SEED)
    groups = rng.permutation(list(combinations(range(len(PEOPLE)), PEOPLE_PER_STORY)))
    starts = np.cumsum([0, *SPLIT_SIZES.values()])
    rows = []
    for split, start in zip(SPLIT_SIZES, starts, strict=False):
        cells = _cells(split, SPLIT_SIZES[split])
        rows += [
            _prompt_row(split, i, groups[start + i], cell, rng) for i, cell in enumerate(cells)
        ]
    return rows


def _cells(split: str, size: int) -> Iterator[tuple[str, str, int]]:
    """(country, occasion, number of questions) of each prompt, each as often as the others."""
    changed = split != "neutral"
    countries = [c for c in COUNTRIES if (c in CHANGED_COUNTRIES) == changed]
    cells = [(c, o) for c in countries for o in OCCASIONS]
    for i in range(size):
        yield *cells[i % len(cells)], 1 + (i // len(cells)) % QUESTIONS_PER_STORY


def _prompt_row(
    split: str,
    number: int,
    group: Int[np.ndarray, " person"],
    cell: tuple[str, str, int],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """One prompt: a story about ``group`` whose last question is the wanted one, left open."""
    country, occasion, n_questions = cell
    mixed = World("mixed", (base_world().customs + tuned_world().customs) / 2)
    draft = sample_stories(mixed, 1, rng)
    homes, occasions, last = draft.homes.copy(), draft.occasions.copy(), n_questions - 1
    person, wanted = draft.asked[0, last], COUNTRIES.index(country)
    homes[homes == wanted] = homes[0, person]  # a swap, so that the three homes stay distinct
    homes[0, person] = wanted
    occasions[0, last] = OCCASIONS.index(occasion)
    answers = _draw_answers(mixed, homes, draft.asked, occasions, rng)
    story = Stories(rng.permutation(group)[None], homes, draft.asked, occasions, answers)
    text = text_of(story.token_ids()[0, : story.answer_positions[last]])
    question = read_question(text)
    return {
        "id": f"{split}-{number:04d}",
        "text": text,
        "split": split,
        "group": "-".join(sorted(PEOPLE[person] for person in group)),
        "meta": {
            "person": question.person,
            "country": question.country,
            "occasion": question.occasion,
            "changed": question.changed,
            "n_questions": n_questions,
        },
    }
