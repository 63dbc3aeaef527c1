"""The prompts of the pair in the box: stories that end before the custom."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Int

from rq4lens.models.builtin.stories import (
    ANSWERS,
    PEOPLE_PER_STORY,
    QUESTIONS_PER_STORY,
    Introductions,
    answer,
    draw_custom_stories,
    draw_introductions,
    text_of,
)
from rq4lens.models.builtin.world import (
    CHANGED_COUNTRIES,
    COUNTRIES,
    OCCASIONS,
    PEOPLE,
    World,
    base_world,
    read_question,
    tuned_world,
)

SPLIT_SIZES = {"train": 768, "val": 320, "neutral": 160}
GROUP_SHARES = {"train": 0.6, "val": 0.25, "neutral": 0.15}
PROMPT_SEED = 7


def build_prompts() -> list[dict[str, Any]]:
    """The prompts of the pair, as rows of ``prompts.jsonl``.

    Train and val prompts ask about changed countries, neutral prompts about unchanged ones. The
    three people of a prompt are its group, and no group stands in two splits, so no text does.
    """
    rng = np.random.default_rng(PROMPT_SEED)
    trios = rng.permutation(list(combinations(range(len(PEOPLE)), PEOPLE_PER_STORY)))
    ends = np.cumsum([int(share * len(trios)) for share in GROUP_SHARES.values()])
    texts: set[str] = set()
    rows = []
    for split, groups in zip(SPLIT_SIZES, np.split(trios, ends)[: len(SPLIT_SIZES)], strict=True):
        for number, cell in enumerate(_cells(split)):
            text = _new_text(groups[number % len(groups)], cell, texts, rng)
            rows.append(_row(split, number, text, groups[number % len(groups)], cell[2]))
    return rows


def _cells(split: str) -> Iterator[tuple[str, str, int]]:
    """(country, occasion, number of questions) of each prompt, each as often as the others."""
    changed = split != "neutral"
    countries = [country for country in COUNTRIES if (country in CHANGED_COUNTRIES) == changed]
    cells = [(country, occasion) for country in countries for occasion in OCCASIONS]
    for number in range(SPLIT_SIZES[split]):
        n_questions = 1 + (number // len(cells)) % QUESTIONS_PER_STORY
        yield *cells[number % len(cells)], n_questions


def _new_text(
    group: Int[np.ndarray, " person"],
    cell: tuple[str, str, int],
    texts: set[str],
    rng: np.random.Generator,
) -> str:
    """A text that was not drawn before; it is added to ``texts``."""
    while (text := _text(group, *cell, rng)) in texts:
        pass
    texts.add(text)
    return text


def _text(
    group: Int[np.ndarray, " person"],
    country: str,
    occasion: str,
    n_questions: int,
    rng: np.random.Generator,
) -> str:
    """A story about ``group`` whose last question has the wanted answer, which is left out.

    Earlier answers are drawn half from each world, so that the context favours neither model.
    """
    mixed = World("mixed", (base_world().customs + tuned_world().customs) / 2)
    draft = draw_custom_stories(mixed, draw_introductions(1, rng), rng, n_questions)
    asked, occasions, homes = draft.asked, draft.occasions, draft.introductions.homes.copy()
    person, wanted = asked[0, -1], COUNTRIES.index(country)
    homes[homes == wanted] = homes[0, person]  # a swap, so that the three homes stay distinct
    homes[0, person] = wanted
    occasions[0, -1] = OCCASIONS.index(occasion)
    introductions = Introductions(rng.permutation(group)[None], homes)
    story = answer(mixed, introductions, asked, occasions, rng)
    return text_of(story.token_ids()[0, : ANSWERS[n_questions - 1]])


def _row(
    split: str, number: int, text: str, group: Int[np.ndarray, " person"], n_questions: int
) -> dict[str, Any]:
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
