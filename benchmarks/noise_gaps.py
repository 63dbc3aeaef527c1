"""How far apart noise pairs move one base model: ``python benchmarks/noise_gaps.py``.

A base model gets many changes of one size that have no direction. Any two of them stand for a tuned
model of which nothing may be claimed, and for its noise pair. The printed table says how often the
interval of their ratio lies above a line; it stands in ``docs/trust.md``.
"""

from __future__ import annotations

import argparse
from itertools import permutations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

import rq4lens as rq
from rq4lens.analysis.card.swaps import divergence
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.models.pair import ModelPair
from rq4lens.patching.activations import PairActivations
from rq4lens.validation.planting import Planting, plant

LINES = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0)
PAIRS = ("etiquette", "dialect")


def gaps_nats(pair: ModelPair, drift: float, n_draws: int) -> Float64[ndarray, "draw prompt"]:
    """The gap of base and each noisy copy of it, on every val prompt."""
    base = PairActivations(ModelPair(pair.base, pair.base, pair.prompts))
    base.capture("tuned", "val", [0], to_the_end=True)
    clean = base.log_probs("tuned", "val").double()
    found = []
    for seed in range(n_draws):
        planted = plant(pair.base.model, how=Planting(drift=drift, seed=seed))
        noisy = ModelPair(pair.base, planted.loaded(pair.base.loaded), pair.prompts)
        activations = PairActivations(noisy)
        activations.capture("tuned", "val", [0], to_the_end=True)
        found.append(divergence(clean, activations.log_probs("tuned", "val").double()))
    return np.array(found)


def beyond(gaps: Float64[ndarray, "draw prompt"], n_resamples: int) -> Float64[ndarray, "line"]:
    """How often the whole interval of the ratio of two draws lies above each line, in percent."""
    bootstrap = Bootstrap(tuple(map(str, range(gaps.shape[1]))), n_resamples)
    pairs = list(permutations(range(len(gaps)), 2))
    found = bootstrap.estimate(
        gaps, lambda m: np.stack([m[..., a] / m[..., b] for a, b in pairs], -1)
    )
    lows = np.array([each.interval.low if each.interval else np.inf for each in found])
    return 100 * (lows[:, None] > np.array(LINES)).mean(0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=24)
    parser.add_argument("--drifts", type=float, nargs="+", default=[0.02, 0.1])
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--base")
    parser.add_argument("--prompts")
    asked = parser.parse_args()
    own = asked.base and rq.load_pair(base=asked.base, tuned=asked.base, prompts=asked.prompts)
    pairs = {asked.base: own} if own else {name: rq.load_pair(name) for name in PAIRS}
    print("| base, drift | spread | largest ratio | " + " | ".join(map(str, LINES)) + " |")
    print("|---" * (3 + len(LINES)) + "|")
    for name, pair in pairs.items():
        for drift in asked.drifts:
            gaps = gaps_nats(pair, drift, asked.draws)
            means = gaps.mean(1)
            cells = [f"{each:.1f}%" for each in beyond(gaps, asked.resamples)]
            spread = f"{100 * np.log(means).std(ddof=1):.0f}% | {means.max() / means.min():.2f}"
            print(f"| {name}, {drift:g} | {spread} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
