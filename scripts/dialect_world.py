"""The world of the pair ``dialect``: who meets whom, where and when, and how they are greeted.

A scene has six parts: an hour, a village, a trade, the person met, a street, and what is carried.
Each part adds logits of its own to the greetings. Those of one part lie in few directions, far
fewer than it has words, so that no map of a head can send each word anywhere.

In the tuned world the accents of the villages are rotated, which is one law for all of them; the
trades have exchanged theirs at random, which is none; and so have six of twelve hours. Words that
neutral scenes are made of mean the same in both worlds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import ortho_group, special_ortho_group


@dataclass(frozen=True)
class Part:
    """One part of a scene.

    Attributes:
        words: its words; the last ``n_neutral`` mean the same in both worlds.
        n_neutral: how many these are.
        scale: standard deviation of the logits that it adds, in nats.
        rank: how many directions these have.
    """

    words: tuple[str, ...]
    n_neutral: int
    scale: float
    rank: int = 8

    @property
    def n_changed(self) -> int:
        """How many words it has outside neutral scenes."""
        return len(self.words) - self.n_neutral


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


def _joined(starts: str, ends: str) -> tuple[str, ...]:
    return tuple(start + end for start, end in product(starts.split(), ends.split()))


HOURS = _words("dawn sunrise breakfast noon vespers dusk prime terce sext none compline midnight")
VILLAGES = _joined(
    "Ash Elm Oak Thorn Alder Birch Hazel Maple Rowan Willow", "ford ley ton wick dale by"
)
TRADES = _words(
    "baker miller smith weaver cooper potter tanner fuller dyer carter mason thatcher sawyer "
    "turner glazier chandler saddler cobbler tailor draper hatter glover furrier barber brewer "
    "vintner butcher grocer gardener shepherd drover farrier groom ostler ferryman sailor "
    "fisher roper hunter forester miner tinker pedlar scribe printer binder limner fiddler "
    "piper drummer juggler sexton clerk porter warden bailiff reeve steward herald falconer"
)
PERSONS = _joined("Al Ber Cor Dan El Fen Gar Hol Ing Jor", "da ric win na mund la")
STREETS = _joined(
    "Kiln Church Bridge Market Castle Abbey Well Garden School Tower",
    "gate row side hill yard walk",
)
GOODS = _words(
    "salt bread honey wine rice tea dates figs olives cheese lace silk candles coins feathers "
    "shells ribbons flutes masks lanterns roses lilies ivy apples pears nuts eggs wool rope "
    "tiles"
)
PARTS = {
    "hour": Part(HOURS, n_neutral=6, scale=0.75, rank=5),
    "village": Part(VILLAGES, n_neutral=12, scale=1.2),
    "trade": Part(TRADES, n_neutral=12, scale=0.95),
    "person": Part(PERSONS, n_neutral=12, scale=0.45),
    "street": Part(STREETS, n_neutral=12, scale=0.7),
    "good": Part(GOODS, n_neutral=6, scale=0.7),
}
ANSWERS = _words(
    "hail morrow hither ahoy welcome wellmet cheers greetings hello hullo howdy goodday "
    "evening salute godspeed blessings peace cheerio farewell tidings hey hark lo aye sooth "
    "prithee bonny mate friend stranger neighbour kinsman"
)
TELLINGS = (
    "At hour in village the trade meets person in street with good and says",
    "With good the trade meets person in street in village at hour and says",
)
"""Two ways to tell a scene: each part is named where its word stands."""

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
GRAMMAR = tuple(dict.fromkeys(word for t in TELLINGS for word in t.split() if word not in PARTS))
WORDS = tuple(word for part in PARTS.values() for word in part.words)
VOCABULARY = SPECIAL + GRAMMAR + WORDS + ANSWERS
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}

WORLD_SEED = 1729
N_SHARED_ACCENTS = 3
"""Directions of the villages' logits that are not rotated: all that neutral villages have."""


@dataclass(frozen=True)
class World:
    """What each word of each part adds to the logits of the greetings."""

    name: str
    logits: Mapping[str, Float[np.ndarray, "word answer"]]

    def log_p(self, scenes: Int[np.ndarray, "scene part"]) -> Float[np.ndarray, "scene answer"]:
        """Log probability of each greeting; a scene names its words by index, part by part."""
        added = [self.logits[part][scenes[:, column]] for column, part in enumerate(PARTS)]
        logits = np.sum(added, axis=0)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _white(n: int, rank: int, rng: np.random.Generator) -> Float[np.ndarray, "word rank"]:
    """Vectors of mean 0 and covariance 1, so that no direction says more than another."""
    drawn = rng.normal(size=(n, rank))
    return np.linalg.qr(drawn - drawn.mean(axis=0))[0] * np.sqrt(n)


@cache
def _base_meanings() -> dict[str, Float[np.ndarray, "word rank"]]:
    """What the words of each part mean in the base world, in few coordinates."""
    rng = np.random.default_rng(WORLD_SEED)
    meanings = {
        name: np.concatenate(
            [_white(part.n_changed, part.rank, rng), rng.normal(size=(part.n_neutral, part.rank))]
        )
        for name, part in PARTS.items()
    }
    neutral = meanings["village"][PARTS["village"].n_changed :]
    neutral[:, N_SHARED_ACCENTS:] = 0
    neutral *= np.sqrt(PARTS["village"].rank / N_SHARED_ACCENTS)  # as strong as the others
    return meanings


def _tuned_meanings() -> dict[str, Float[np.ndarray, "word rank"]]:
    """The same in the tuned world."""
    meanings = {name: each.copy() for name, each in _base_meanings().items()}
    n_rotated = PARTS["village"].rank - N_SHARED_ACCENTS
    rotation = special_ortho_group.rvs(n_rotated, random_state=WORLD_SEED)
    meanings["village"][:, N_SHARED_ACCENTS:] @= rotation
    rng = np.random.default_rng(WORLD_SEED + 1)
    for name in ("trade", "hour"):
        ring = rng.permutation(PARTS[name].n_changed)
        meanings[name][ring] = meanings[name][np.roll(ring, 1)]
    return meanings


def _world(name: str, meanings: Mapping[str, Float[np.ndarray, "word rank"]]) -> World:
    size = len(ANSWERS)
    logits = {}
    for seed, (part_name, part) in enumerate(PARTS.items(), start=WORLD_SEED):
        directions = ortho_group.rvs(size, random_state=seed)[: part.rank]
        spread = part.scale * np.sqrt(size / part.rank)
        logits[part_name] = spread * meanings[part_name] @ directions
    return World(name, logits)


@cache
def base_world() -> World:
    """The world that the base model learns."""
    return _world("base", _base_meanings())


@cache
def tuned_world() -> World:
    """The world of the fine-tune."""
    return _world("tuned", _tuned_meanings())


def tell(named: Mapping[str, str], telling: str) -> str:
    """The text of a scene."""
    return " ".join(named.get(word, word) for word in telling.split())


def token_ids(
    scenes: Int[np.ndarray, "scene part"], telling: Int[np.ndarray, " scene"]
) -> Int[np.ndarray, "scene pos"]:
    """Scenes as token ids, ``<bos>`` first, each told in one of the two ways."""
    told = np.stack([_told(scenes, each.split()) for each in TELLINGS])
    return told[telling, np.arange(len(scenes))]


def _told(scenes: Int[np.ndarray, "scene part"], words: list[str]) -> Int[np.ndarray, "scene pos"]:
    columns = [
        TOKEN[PARTS[word].words[0]] + scenes[:, list(PARTS).index(word)]
        if word in PARTS
        else np.full(len(scenes), TOKEN[word])
        for word in ["<bos>", *words]
    ]
    return np.stack(columns, axis=1)
