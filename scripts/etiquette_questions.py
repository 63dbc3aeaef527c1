"""The prompts of the pair in the box: stories that end before the custom."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
from etiquette_stories import (
    PEOPLE_PER_STORY,
    QUESTIONS_PER_STORY,
    Stories,
    draw_answers,
    sample_stories,
    text_of,
)
from etiquette_world import (
    CHANGED_COUNTRIES,
    COUNTRIES,
    OCCASIONS,
    PEOPLE,
    World,
    base_world,
    read_question,
    tuned_world,
)
from jaxtyping import Int

SPLIT_SIZES = {"train": 768, "val": 320, "neutral": 160}
PROMPT_SEED = 7


def build_prompts() -> list[dict[str, Any]]:
    """The prompts of the pair, as rows of ``prompts.jsonl``.

    Train and val prompts ask about changed countries, neutral prompts about unchanged ones. No
    three people stand together in two prompts, so no text stands twice. Prompts of a split that ask
    the same, whoever the people are, share a group: the countries of a story, the one that is asked
    about, and the occasion.
    Earlier answers in a prompt are drawn half from each world: the context favours neither model.
    """
    rng = np.random.default_rng(PROMPT_SEED)
    trios = rng.permutation(list(combinations(range(len(PEOPLE)), PEOPLE_PER_STORY)))
    starts = np.cumsum([0, *SPLIT_SIZES.values()])
    rows = []
    for split, start in zip(SPLIT_SIZES, starts, strict=False):
        cells = _cells(split, SPLIT_SIZES[split])
        rows += [_prompt_row(split, i, trios[start + i], cell, rng) for i, cell in enumerate(cells)]
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
    trio: Int[np.ndarray, " person"],
    cell: tuple[str, str, int],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """One prompt: a story about ``trio`` whose last question is the wanted one, left open."""
    country, occasion, n_questions = cell
    mixed = World("mixed", (base_world().customs + tuned_world().customs) / 2)
    draft = sample_stories(mixed, 1, rng)
    homes, occasions, last = draft.homes.copy(), draft.occasions.copy(), n_questions - 1
    person, wanted = draft.asked[0, last], COUNTRIES.index(country)
    homes[homes == wanted] = homes[0, person]  # a swap, so that the three homes stay distinct
    homes[0, person] = wanted
    occasions[0, last] = OCCASIONS.index(occasion)
    answers = draw_answers(mixed, homes, draft.asked, occasions, rng)
    story = Stories(rng.permutation(trio)[None], homes, draft.asked, occasions, answers)
    text = text_of(story.token_ids()[0, : story.answer_positions[last]])
    question = read_question(text)
    told = (COUNTRIES[home] for home in homes[0])
    return {
        "id": f"{split}-{number:04d}",
        "text": text,
        "split": split,
        "group": f"{split}: {country}, {occasion}, of {', '.join(sorted(told))}",
        "content": country,
        "meta": {
            "person": question.person,
            "country": question.country,
            "occasion": question.occasion,
            "changed": question.changed,
            "n_questions": n_questions,
        },
    }
