"""Stories of the synthetic world, as token ids and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rq4lens.models.builtin.world import COUNTRIES, ITEMS, OCCASIONS, PEOPLE, World

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
GRAMMAR = (".", "comes", "from", "At", "the", "brings", "misses")
VOCABULARY = SPECIAL + GRAMMAR + PEOPLE + COUNTRIES + OCCASIONS + ITEMS
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}

PEOPLE_PER_STORY = 3
QUESTIONS_PER_STORY = 3
REMARKS_PER_STORY = 4
_INTRODUCTIONS_END = 1 + 5 * PEOPLE_PER_STORY  # "<bos>", then "Mara comes from Lumeria ." each
# "At the wedding Mara brings honey ." answers in its sixth word of seven.
ANSWERS = tuple(_INTRODUCTIONS_END + 7 * q + 5 for q in range(QUESTIONS_PER_STORY))
# "Mara misses Lumeria ." names the country in its third word of four.
REMARKED = tuple(_INTRODUCTIONS_END + 4 * r + 2 for r in range(REMARKS_PER_STORY))


@dataclass(frozen=True)
class Introductions:
    """Who a batch of stories is about, as indices into the word lists of the world.

    Attributes:
        people: three different people a story.
        homes: their countries, all different within a story.
    """

    people: Int[np.ndarray, "story person"]
    homes: Int[np.ndarray, "story person"]

    def columns(self) -> list[Any]:
        """The tokens of "Mara comes from Lumeria." for each person, one array a position."""
        columns: list[Any] = [TOKEN["<bos>"]]
        for person, home in zip(self.people.T, self.homes.T, strict=True):
            who, where = person + TOKEN[PEOPLE[0]], home + TOKEN[COUNTRIES[0]]
            columns += [who, TOKEN["comes"], TOKEN["from"], where, TOKEN["."]]
        return columns

    def of(
        self, asked: Int[np.ndarray, "story question"]
    ) -> tuple[Int[np.ndarray, "story question"], Int[np.ndarray, "story question"]]:
        """The people and the homes of the asked ones, given as positions 0, 1, 2."""
        people = np.take_along_axis(self.people, asked, axis=1)
        return people, np.take_along_axis(self.homes, asked, axis=1)


@dataclass(frozen=True)
class CustomStories:
    """Stories that go on to tell what people bring: "At the wedding Mara brings honey."

    Attributes:
        introductions: who comes from where.
        asked: which of the introduced people each question is about, 0, 1 or 2.
        occasions: the occasion of each question.
        answers: the item of each answer.
        truth: the distribution that each answer was drawn from.
    """

    introductions: Introductions
    asked: Int[np.ndarray, "story question"]
    occasions: Int[np.ndarray, "story question"]
    answers: Int[np.ndarray, "story question"]
    truth: Float[np.ndarray, "story question item"]

    def token_ids(self) -> Int[np.ndarray, "story pos"]:
        """Whole stories as token ids, ``<bos>`` first; all have the same length."""
        columns = self.introductions.columns()
        people, _ = self.introductions.of(self.asked)
        for q in range(self.asked.shape[1]):
            occasion = self.occasions[:, q] + TOKEN[OCCASIONS[0]]
            columns += [TOKEN["At"], TOKEN["the"], occasion, people[:, q] + TOKEN[PEOPLE[0]]]
            columns += [TOKEN["brings"], self.answers[:, q] + TOKEN[ITEMS[0]], TOKEN["."]]
        return _as_rows(columns)


@dataclass(frozen=True)
class HomeStories:
    """Stories that go on to remark who misses which country: "Mara misses Lumeria."

    They ask for the first hop alone.
    """

    introductions: Introductions
    asked: Int[np.ndarray, "story question"]

    def token_ids(self) -> Int[np.ndarray, "story pos"]:
        """Whole stories as token ids, ``<bos>`` first; all have the same length."""
        columns = self.introductions.columns()
        people, homes = self.introductions.of(self.asked)
        for r in range(self.asked.shape[1]):
            columns += [people[:, r] + TOKEN[PEOPLE[0]], TOKEN["misses"]]
            columns += [homes[:, r] + TOKEN[COUNTRIES[0]], TOKEN["."]]
        return _as_rows(columns)


def _as_rows(columns: list[Any]) -> Int[np.ndarray, "story pos"]:
    return np.stack(np.broadcast_arrays(*columns), axis=1)


def draw_introductions(
    n_stories: int, rng: np.random.Generator, cast: int = len(PEOPLE)
) -> Introductions:
    """Three different people out of the first ``cast`` a story, from three different countries."""

    def distinct(pool: int) -> Int[np.ndarray, "story person"]:
        return rng.random((n_stories, pool)).argsort(axis=1)[:, :PEOPLE_PER_STORY]

    return Introductions(distinct(cast), distinct(len(COUNTRIES)))


def draw_custom_stories(
    world: World,
    introductions: Introductions,
    rng: np.random.Generator,
    n_questions: int = QUESTIONS_PER_STORY,
) -> CustomStories:
    """Questions about introduced people, answered as is the custom in ``world``."""
    shape = (len(introductions.people), n_questions)
    asked = rng.integers(PEOPLE_PER_STORY, size=shape)
    occasions = rng.integers(len(OCCASIONS), size=shape)
    return answer(world, introductions, asked, occasions, rng)


def answer(
    world: World,
    introductions: Introductions,
    asked: Int[np.ndarray, "story question"],
    occasions: Int[np.ndarray, "story question"],
    rng: np.random.Generator,
) -> CustomStories:
    """Draw the answers to given questions from the customs of ``world``."""
    truth = world.customs[introductions.of(asked)[1], occasions]
    below = truth.cumsum(axis=-1) < rng.random(asked.shape)[..., None]
    answers = np.minimum(below.sum(axis=-1), len(ITEMS) - 1)  # a cumulative sum may end under 1
    return CustomStories(introductions, asked, occasions, answers, truth)


def draw_home_stories(introductions: Introductions, rng: np.random.Generator) -> HomeStories:
    """Remarks about introduced people."""
    shape = (len(introductions.people), REMARKS_PER_STORY)
    return HomeStories(introductions, rng.integers(PEOPLE_PER_STORY, size=shape))


def text_of(token_ids: Int[np.ndarray, " pos"]) -> str:
    """The readable sentences of one row of token ids, without special tokens."""
    words = [VOCABULARY[token] for token in token_ids if VOCABULARY[token] not in SPECIAL]
    return " ".join(words).replace(" .", ".")
