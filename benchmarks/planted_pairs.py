"""How well each ranking method finds planted heads: ``python benchmarks/planted_pairs.py``.

Every pair is a copy of the built-in base model in which every weight drifted a little and three
heads of one layer were rotated: they are re-coordinated, and a map can put them right. In a second
set of pairs two more heads are rewired: they change what the model does. A method is right when it
ranks the rotated heads first. The printed table stands in ``docs/analysis.md``.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from itertools import chain

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from rq4lens.analysis.agreement import strengths
from rq4lens.analysis.measured import MeasuredSets
from rq4lens.analysis.ranking import METHODS, rank_heads
from rq4lens.heads import Head
from rq4lens.models.builtin.plant import PlantedPair, plant
from rq4lens.models.catalog import load_pair
from rq4lens.models.pair import ModelPair, PairMember
from rq4lens.models.prompts import PromptSet
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.fitting import fit_maps

ALPHA = 0.3
N_ROTATED = 3
N_TRAIN, N_VAL = 240, 64

Precisions = dict[str, list[float]]


def planted(base_pair: ModelPair, seed: int, n_rewired: int, drift: float) -> PlantedPair:
    """A planted pair; its heads are changed in one layer."""
    cfg = base_pair.use("base").model.cfg
    rng = np.random.default_rng(seed)
    layer = int(rng.integers(cfg.n_layers))
    chosen = [Head(layer, int(head)) for head in rng.permutation(cfg.n_heads)]
    return plant(
        base_pair.use("base").model,
        rotated=chosen[:N_ROTATED],
        rewired=chosen[N_ROTATED : N_ROTATED + n_rewired],
        drift=drift,
        seed=seed,
    )


def experiment_of(base_pair: ModelPair, pair: PlantedPair, layer: int) -> Experiment:
    """The planted pair on some of the built-in prompts, ready to measure."""
    prompts = base_pair.prompts
    train, val = prompts.split("train").prompts, prompts.split("val").prompts
    some = PromptSet(tuple(chain(train[:N_TRAIN], val[:N_VAL])))
    loaded = base_pair.use("base").loaded
    members = [PairMember.of(loaded), PairMember.of(pair.loaded(loaded))]
    both = ModelPair("planted", *members, some)
    return prepare(both, fit_maps(both, [layer]))


def precisions(n_pairs: int, n_rewired: int, drift: float) -> Precisions:
    """Average precision of every method on every planted pair."""
    base_pair = load_pair("etiquette")
    found: Precisions = defaultdict(list)
    for seed in range(n_pairs):
        pair = planted(base_pair, seed, n_rewired, drift)
        layer = next(iter(pair.truth)).layer
        heads = [Head(layer, index) for index in range(pair.base.cfg.n_heads)]
        is_rotated = [pair.truth.get(head) == "rotated" for head in heads]
        measured = MeasuredSets.of(experiment_of(base_pair, pair, layer), layer, ALPHA)
        for method in METHODS:
            scores = strengths(rank_heads(method, measured))
            found[method].append(float(average_precision_score(is_rotated, scores)))
    return found


def cells(values: list[float]) -> str:
    """Mean and worst average precision, and how often it is perfect."""
    perfect = sum(value > 1 - 1e-9 for value in values)
    return f"{np.mean(values):.2f} | {min(values):.2f} | {perfect} of {len(values)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--drift", type=float, default=0.02)
    parser.add_argument("--rewired", type=int, default=2)
    settings = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    alone = precisions(settings.pairs, 0, settings.drift)
    beside = precisions(settings.pairs, settings.rewired, settings.drift)
    print("| method | rotated: mean | worst | perfect | beside rewired: mean | worst | perfect |")
    print("|---|---|---|---|---|---|---|")
    for method in METHODS:
        print(f"| `{method}` | {cells(alone[method])} | {cells(beside[method])} |")
    seconds = time.perf_counter() - start
    print(
        f"\n{settings.pairs} pairs each, drift {settings.drift:g}, alpha {ALPHA:g}; {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
