"""The prompts of the pair ``dialect``: scenes that end before the greeting, each told twice."""

from __future__ import annotations

from typing import Any

import numpy as np
from dialect_world import PARTS, TELLINGS, Part, tell
from jaxtyping import Int

N_SCENES = {"train": 240, "val": 144, "neutral": 72}
PROMPT_SEED = 7


def build_prompts() -> list[dict[str, Any]]:
    """The prompts of the pair, as rows of ``prompts.jsonl``.

    Both tellings of a scene are its group. Neutral scenes are made of the words that mean the same
    in both worlds, which no other split has: a map that holds for them holds for new words.
    """
    rng = np.random.default_rng(PROMPT_SEED)
    rows = []
    for split, n_scenes in N_SCENES.items():
        words = [_drawn(part, split, n_scenes, rng) for part in PARTS.values()]
        for number, scene in enumerate(np.stack(words, axis=1)):
            rows += [_row(split, number, scene, telling) for telling in range(len(TELLINGS))]
    return rows


def _drawn(
    part: Part, split: str, n_scenes: int, rng: np.random.Generator
) -> Int[np.ndarray, " scene"]:
    """A word of a part for each scene, each as often as the others."""
    size = part.n_neutral if split == "neutral" else part.n_changed
    first = len(part.words) - size if split == "neutral" else 0
    return first + rng.permutation(np.arange(n_scenes) % size)


def _row(split: str, number: int, scene: Int[np.ndarray, " part"], telling: int) -> dict[str, Any]:
    named = {name: part.words[i] for (name, part), i in zip(PARTS.items(), scene, strict=True)}
    return {
        "id": f"{split}-{number:03d}{'ab'[telling]}",
        "text": tell(named, TELLINGS[telling]),
        "split": split,
        "group": f"{split}-{number:03d}",
        "content": named["village"],
        "meta": named,
    }
