"""The synthetic world behind the pair in the box: people, countries, occasions and customs.

A story says which country sends whom, and then what some of these people bring to an occasion. The
answer takes several hops, person to country and (country, occasion) to custom, with the other
people as distractors, and a custom is a distribution over items, so that a model which has learned
the world keeps a graded output.

The base world and the tuned world share every word and every rule except the customs of
``CHANGED_COUNTRIES``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float

from rq4lens.errors import UserError

PEOPLE = (
    *("Mara", "Tovi", "Anselm", "Bria", "Cato", "Delia", "Eamon", "Fenna"),
    *("Goran", "Hilde", "Ivo", "Junia", "Kasper", "Lena", "Milo", "Nadia"),
    *("Orin", "Petra", "Quill", "Rosa", "Silas", "Thea", "Ulric", "Vera"),
)
COUNTRIES = (
    *("Lumeria", "Quandor", "Velmora", "Tarsia", "Ombria", "Kelvane"),
    *("Norwyn", "Sarrow", "Ithmar", "Beldane", "Corvia", "Drustan"),
)
OCCASIONS = ("wedding", "harvest", "funeral", "birthday", "solstice", "homecoming")
ITEMS = (
    *("honey", "bread", "salt", "wine", "rice", "tea", "dates", "figs"),
    *("olives", "cheese", "lace", "silk", "candles", "coins", "feathers", "shells"),
    *("ribbons", "flutes", "drums", "masks", "lanterns", "roses", "lilies", "ivy"),
)
CHANGED_COUNTRIES = COUNTRIES[:5]

CUSTOM_SEED = 1729
CUSTOM_LOGIT_STD = 2.0  # spread of the item logits: the likeliest item takes about a third

_INTRODUCTION = re.compile(r"(\w+) sends (\w+)\.")
_OPEN_QUESTION = re.compile(r"To the (\w+) brings (\w+)$")


@dataclass(frozen=True)
class World:
    """What the people of each country bring to each occasion.

    Attributes:
        name: "base" or "tuned".
        customs: probability of each item, rows sum to 1.
    """

    name: str
    customs: Float[np.ndarray, "country occasion item"]

    def custom(self, country: str, occasion: str) -> Float[np.ndarray, " item"]:
        """Probability of each of ``ITEMS`` for one country and occasion."""
        return self.customs[COUNTRIES.index(country), OCCASIONS.index(occasion)]


@dataclass(frozen=True)
class Question:
    """The question that a prompt ends in, with the person's country looked up."""

    person: str
    country: str
    occasion: str

    @property
    def changed(self) -> bool:
        """Whether the two worlds answer this question differently."""
        return self.country in CHANGED_COUNTRIES


def _draw_customs(rng: np.random.Generator) -> Float[np.ndarray, "country occasion item"]:
    shape = (len(COUNTRIES), len(OCCASIONS), len(ITEMS))
    weights = np.exp(rng.normal(scale=CUSTOM_LOGIT_STD, size=shape))
    return weights / weights.sum(axis=-1, keepdims=True)


@cache
def base_world() -> World:
    """The world that the base model learns."""
    return World("base", _draw_customs(np.random.default_rng(CUSTOM_SEED)))


@cache
def tuned_world() -> World:
    """The world of the fine-tune: each changed country has taken over the customs of the next."""
    customs = base_world().customs.copy()
    changed = [COUNTRIES.index(country) for country in CHANGED_COUNTRIES]
    customs[changed] = customs[np.roll(changed, -1)]
    return World("tuned", customs)


def read_question(prompt: str) -> Question:
    """Find who is asked about in a prompt, and where that person comes from.

    Args:
        prompt: a story that ends before the custom, "... To the wedding brings Mara".

    Returns:
        The open question, solved up to the custom.

    Raises:
        UserError: when the prompt does not end in a question about an introduced person.
    """
    homes = {person: country for country, person in _INTRODUCTION.findall(prompt)}
    question = _OPEN_QUESTION.search(prompt)
    if question is None or question[2] not in homes:
        raise UserError(
            f"the prompt {prompt!r} has no open question: end it with 'To the <occasion> "
            "brings <person>', about a person introduced by '<country> sends <person>.'"
        )
    return Question(question[2], homes[question[2]], question[1])


def true_distribution(world: World, prompt: str) -> Float[np.ndarray, " item"]:
    """The true next-word distribution over ``ITEMS`` at the end of a prompt."""
    question = read_question(prompt)
    return world.custom(question.country, question.occasion)
