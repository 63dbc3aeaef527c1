"""How often intervals hold the truth: ``python benchmarks/interval_coverage.py``.

The 320 val prompts of the built-in pair are taken for all prompts there are. Studies with fewer
prompts are drawn from them, with replacement, and the intervals of each are those a run prints.
The printed table stands in ``docs/analysis.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

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
Population = Float64[ndarray, "both prompt"]


def percent(means: ndarray) -> ndarray:
    """``100 (1 - part / whole)``: transfer of what is left of the gap, recovered of damages."""
    return 100 * (1 - means[..., 1:] / means[..., :1])


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
        found[f"recovered({source}) of L{LAYER}H{HEAD}"] = np.stack(list(both))
    return found


def held(population: Population, n_prompts: int, n_studies: int, n_resamples: int) -> float:
    """Share of studies whose interval holds what all prompts say."""
    truth, rng = float(percent(population.mean(-1))[0]), np.random.default_rng(n_prompts)
    names, hits = tuple(map(str, range(n_prompts))), 0
    for study in range(n_studies):
        drawn = population[:, rng.integers(population.shape[1], size=n_prompts)]
        (found,) = Bootstrap(names, n_resamples, study).estimate(drawn, percent)
        hits += found.interval is not None and found.interval.low <= truth <= found.interval.high
    return hits / n_studies


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--resamples", type=int, default=1000)
    settings = parser.parse_args()
    print("| | " + " | ".join(f"n = {n}" for n in SIZES) + " |")
    print("|---" * (1 + len(SIZES)) + "|")
    for name, population in populations().items():
        shares = [held(population, n, settings.studies, settings.resamples) for n in SIZES]
        print(f"| {name} | " + " | ".join(f"{100 * share:.0f}%" for share in shares) + " |")


if __name__ == "__main__":
    main()
