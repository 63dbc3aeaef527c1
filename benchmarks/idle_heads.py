"""How often a head is idle on other prompts than those it was measured on.

``python benchmarks/idle_heads.py``: all heads of the pairs in the box, by what a constant in their
place costs on 160 train prompts, as a multiple of the idle line there, and whether it costs less
than the line on 64 val prompts, over many draws of both. The numbers stand in ``docs/trust.md``.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

import rq4lens as rq
from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.structure.kinds import IDLE_PCT
from rq4lens.config import Patching
from rq4lens.patching.experiment import prepare
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.patch import CONSTANT

SIZES = {"train": 160, "val": 64}
LINES = (1.0, 1.5, 2.0, 2.5, 3.0)
DRAWS = 40


def multiples(damage: Float64[ndarray, "head prompt"], rows: ndarray) -> Float64[ndarray, " head"]:
    """Damage of each head in idle lines; the last row is the whole layer's."""
    means = damage[:, rows].mean(1)
    return means[:-1] / (IDLE_PCT / 100 * means[-1])


def both_of(name: str, rng: np.random.Generator) -> Float64[ndarray, "draw split"]:
    """Damage in idle lines on train and on val prompts, of every head in every draw."""
    pair, found = rq.load_pair(name), []
    maps = fit_maps(pair, list(range(pair.n_layers)))
    ready = {split: prepare(pair, maps, Patching(split=split)) for split in SIZES}
    for layer in maps:
        views = {split: MeasuredSets.of(each, layer, 1.0) for split, each in ready.items()}
        damage = {
            split: view.of_source(CONSTANT, [*view.singles, view.everything])
            for split, view in views.items()
        }
        for _ in range(DRAWS):
            rows = {
                split: rng.choice(each.shape[1], SIZES[split], replace=False)
                for split, each in damage.items()
            }
            found.append([multiples(damage[split], rows[split]) for split in SIZES])
    return np.concatenate(found, axis=1).T


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    train, val = np.concatenate([both_of(name, rng) for name in ("etiquette", "dialect")]).T
    for line in LINES:
        near = (train > line) & (train <= 1.5 * line)
        idle = 100 * (val[near] <= 1).mean()
        print(f"{line:g} to {1.5 * line:g} lines on train: {idle:.1f}% of {near.sum()} idle on val")


if __name__ == "__main__":
    main()
