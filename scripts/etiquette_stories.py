"""Stories of the synthetic world, as token ids and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from etiquette_world import COUNTRIES, ITEMS, OCCASIONS, PEOPLE, World
from jaxtyping import Int

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
GRAMMAR = (".", "sends", "To", "the", "brings")
VOCABULARY = SPECIAL + GRAMMAR + PEOPLE + COUNTRIES + OCCASIONS + ITEMS
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}

PEOPLE_PER_STORY = 3
QUESTIONS_PER_STORY = 3
_INTRODUCTION_TOKENS = 4  # "Lumeria sends Mara ."
_QUESTION_TOKENS = 7  # "To the wedding brings Mara honey ."


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
    answers = draw_answers(world, homes, asked, occasions, rng)
    return Stories(people, homes, asked, occasions, answers)


def draw_answers(
    world: World,
    homes: Int[np.ndarray, "story person"],
    asked: Int[np.ndarray, "story question"],
    occasions: Int[np.ndarray, "story question"],
    rng: np.random.Generator,
) -> Int[np.ndarray, "story question"]:
    """Draw the item of each answer from the custom of the asked person's country."""
    customs = world.customs[np.take_along_axis(homes, asked, axis=1), occasions]
    below = customs.cumsum(axis=-1) < rng.random(asked.shape)[..., None]
    return np.minimum(below.sum(axis=-1), len(ITEMS) - 1)  # a cumulative sum may end under 1


def text_of(token_ids: Int[np.ndarray, " pos"]) -> str:
    """The readable sentences of one row of token ids, without special tokens."""
    words = [VOCABULARY[token] for token in token_ids if VOCABULARY[token] not in SPECIAL]
    return " ".join(words).replace(" .", ".")
