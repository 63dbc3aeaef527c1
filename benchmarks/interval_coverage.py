"""How often intervals hold the truth: ``python benchmarks/interval_coverage.py``.

The 320 val prompts of the built-in pair are taken for all prompts there are. Studies with fewer
prompts are drawn from them, with replacement, and the intervals of each are those a run prints;
in brackets, how often they hold the truth or miss it by a percentage point at most.
The printed table stands in ``docs/analysis.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.models.catalog import load_pair
from rq4lens.patching.experiment import prepare
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.patch import BASE, CONSTANT, MAPPED

LAYER, HEAD = 1, 0
SIZES = (20, 40, 80, 320)
NEAR = 1.0
"""Percentage points by which an interval nearly holds a share."""

Population = Float64[ndarray, "both prompt"]


def populations() -> Mapping[str, Population]:
    """Whole and part on every prompt, by what their ratio says."""
    pair = load_pair("etiquette")
    measured = MeasuredSets.of(prepare(pair, fit_maps(pair, [LAYER])), LAYER, 1.0)
    sets = {f"L{LAYER}H{HEAD}": (HEAD,), f"layer {LAYER}": measured.everything}
    found: dict[str, Population] = {}
    for direction in ("to_base", "to_tuned"):
        gap, left = measured.transfer(direction).kl_nats(sets.values())
        found |= {
            f"{direction} of {name}": np.stack([gap[at], left[at]]) for at, name in enumerate(sets)
        }
    for source in (MAPPED, BASE):
        both = (measured.of_source(each, [(HEAD,)])[0] for each in (CONSTANT, source))
        name = f"recovered({source}) of L{LAYER}H{HEAD}"
        found[name] = np.stack(list(both))
        if source == MAPPED:
            found[f"{name} but for one prompt"] = np.delete(found[name], found[name][1].argmax(), 1)
    return found


class Held(NamedTuple):
    """How many studies' intervals hold what all prompts say, and hold it or miss it by a point."""

    rate: float
    nearly: float

    def __str__(self) -> str:
        return f"{100 * self.rate:.0f}% ({100 * self.nearly:.0f}%)"


def held(name: str, population: Population, n_prompts: int, asked: argparse.Namespace) -> Held:
    """How often the interval of a study, made as a run makes it, holds the truth."""
    whole, left = population.mean(-1)
    truth, rng = float(100 * (1 - left / whole)), np.random.default_rng(n_prompts)
    names, hits = tuple(map(str, range(n_prompts))), []
    method: Any = "bca" if name.startswith("recovered") else "studentised"
    for study in range(asked.studies):
        drawn = population[:, rng.integers(population.shape[1], size=n_prompts)]
        bootstrap = Bootstrap(names, asked.resamples, study)
        (found,) = bootstrap.shares(drawn[:1], drawn[1:], method=method)
        low, high = (truth, truth - 2 * NEAR) if found.interval is None else found.interval
        hits.append((low <= truth <= high, low - NEAR <= truth <= high + NEAR))
    return Held(*np.mean(hits, axis=0).tolist())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--resamples", type=int, default=1000)
    settings = parser.parse_args()
    print("| | " + " | ".join(f"n = {n}" for n in SIZES) + " |")
    print("|---" * (1 + len(SIZES)) + "|")
    for name, population in populations().items():
        found = [held(name, population, n, settings) for n in SIZES]
        print(f"| {name} | " + " | ".join(map(str, found)) + " |", flush=True)


if __name__ == "__main__":
    main()
