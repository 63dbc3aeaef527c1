"""How well each ranking method finds planted heads: ``python benchmarks/planted_pairs.py``.

Every pair is a copy of the built-in base model in which every weight drifted a little and three
heads of one layer were rotated: they are re-coordinated, and a map can put them right. Beside them
two more heads may be rewired: they have new content that no linear map of the old explains. A
method is right when it ranks the rotated heads first. The printed tables stand in
``docs/analysis.md``.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.agreement import strengths
from rq4lens.analysis.rankings.compared import rank_heads
from rq4lens.analysis.rankings.methods import METHODS
from rq4lens.heads import Head
from rq4lens.models.catalog import load_pair
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.patching.experiment import prepare
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.maps.map import MapKind
from rq4lens.validation.planting import PlantedPair, Planting, plant
from rq4lens.validation.scenarios import BaseHeads, Chosen, damages_add

ALPHA = 0.3
N_TRAIN, N_VAL = 240, 64
IN_COMPANY = ("leave_one_out", "greedy_forward", "greedy_backward", "shapley")
"""Methods that measure a head in the company of others."""


@dataclass(frozen=True)
class Suite:
    """How the heads of a set of pairs are drawn; nothing here looks at a ranking.

    Args:
        name: its name.
        rewired: how many heads are rewired beside three rotated ones.
        adding: whether heads are drawn anew until their raw patches do not undo one another, see
            :func:`rq4lens.validation.scenarios.damages_add`; they always are heads that matter to
            the base model, of a layer that has enough of them.
    """

    name: str
    rewired: int
    adding: bool


SUITES = (
    Suite("rotated", 0, adding=True),
    Suite("beside rewired", 2, adding=True),
    Suite("rotated, may cancel", 0, adding=False),
)


@dataclass
class Found:
    """What a suite gave.

    Args:
        precisions: average precision on each pair, by method.
        misses: what is known of each pair that a method in company misses.
        n_drawn: how many pairs were drawn to get those that count.
    """

    precisions: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    misses: list[str] = field(default_factory=list)
    n_drawn: int = 0


@dataclass(frozen=True)
class Bench:
    """The base model and its prompts.

    Args:
        base_pair: the built-in pair, of which the base model is used.
        prompts: some of its prompts.
        heads: what the base model says of its heads.
        drift: relative change of every weight.
    """

    base_pair: ModelPair
    prompts: PromptSet
    heads: BaseHeads
    drift: float

    @classmethod
    def of(cls, drift: float) -> Bench:
        """Load the base model."""
        pair = load_pair("etiquette")
        train, val = pair.prompts.split("train").prompts, pair.prompts.split("val").prompts
        some = PromptSet(tuple(chain(train[:N_TRAIN], val[:N_VAL])))
        return cls(pair, some, BaseHeads(pair.use("base").loaded, some), drift)

    def run(self, suite: Suite, n_pairs: int) -> Found:
        """Rank the heads of every pair by every method."""
        found = Found()
        for seed in range(n_pairs):
            chosen, draw = self.draw(suite, seed)
            found.n_drawn += draw + 1
            pair = self.planted(chosen, (seed, draw), self.drift)
            measured = self.measured(pair, chosen.layer)
            rotated = [head.index for head in chosen.heads["rotated"]]
            is_rotated = [head in rotated for head in range(measured.n_heads)]
            for method in METHODS:
                scores = strengths(rank_heads(method, measured))
                precision = float(average_precision_score(is_rotated, scores))
                found.precisions[method].append(precision)
            if any(found.precisions[method][-1] < 1 for method in IN_COMPANY):
                found.misses.append(f"pair {seed}: {'; '.join(company(measured, rotated))}")
        return found

    def draw(self, suite: Suite, seed: int) -> tuple[Chosen, int]:
        """The first draw of heads and rotations that the suite takes."""
        wanted = {"rotated": 3} | ({"rewired": suite.rewired} if suite.rewired else {})
        n_planted = sum(wanted.values())
        layers = [
            layer
            for layer in range(self.heads.n_layers)
            if len(self.heads.cost(layer).mattering(at_least=0)) >= n_planted
        ]
        rng = np.random.default_rng(seed)
        for draw in count():
            chosen = self.heads.choose(wanted, int(rng.choice(layers)), rng)
            if not suite.adding:
                return chosen, draw
            pair = self.planted(chosen, (seed, draw), drift=0.0)
            undrifted = self.measured(pair, chosen.layer, "identity")
            if damages_add(undrifted, [head.index for head in pair.truth]):
                return chosen, draw
        raise AssertionError

    def planted(self, chosen: Chosen, seed: tuple[int, int], drift: float) -> PlantedPair:
        """The pair with these heads changed; a draw has random numbers of its own."""
        return plant(
            self.base_pair.use("base").model,
            rotated=chosen.heads["rotated"],
            rewired=chosen.heads.get("rewired", ()),
            how=Planting(
                weights=("W_V",),
                attended=self.heads.attended(chosen.layer),
                drift=drift,
                seed=1000 * seed[1] + seed[0],
            ),
        )

    def measured(
        self, pair: PlantedPair, layer: int, map_kind: MapKind | None = None
    ) -> MeasuredSets:
        """The planted pair's layer, nothing measured yet."""
        loaded = self.base_pair.use("base").loaded
        both = ModelPair(loaded, pair.loaded(loaded), self.prompts)
        maps = fit_maps(both, [layer]) if map_kind is None else fit_maps(both, [layer], map_kind)
        return MeasuredSets.of(prepare(both, maps), layer, ALPHA)


def company(measured: MeasuredSets, rotated: list[int]) -> Iterator[str]:
    """What each rotated head adds to the damage of the others."""
    for head in sorted(rotated):
        others = [other for other in sorted(rotated) if other != head]
        without, together = measured.kl_nats([others, rotated])[0].mean(-1)
        label, company = (
            ",".join(Head(measured.layer, h).label for h in some) for some in ([head], others)
        )
        yield f"KL_raw({company}) {without:.2g}, with {label} {together:.2g}"


def cells(values: list[float]) -> str:
    """Mean and worst average precision, and how often it is perfect."""
    perfect = sum(value > 1 - 1e-9 for value in values)
    return f"{np.mean(values):.2f} | {min(values):.2f} | {perfect} of {len(values)}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--drift", type=float, default=0.02)
    settings = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    bench = Bench.of(settings.drift)
    found = [bench.run(suite, settings.pairs) for suite in SUITES]
    heads = [f"{suite.name}: mean | worst | perfect |" for suite in SUITES]
    print("| method | " + " ".join(heads))
    print("|---" * (1 + 3 * len(SUITES)) + "|")
    for method in METHODS:
        print(f"| `{method}` | " + " | ".join(cells(f.precisions[method]) for f in found) + " |")
    for suite, each in zip(SUITES, found, strict=True):
        print(f"\n{suite.name}: {settings.pairs} pairs of {each.n_drawn} drawn")
        print("\n".join(each.misses))
    seconds = time.perf_counter() - start
    print(f"\ndrift {settings.drift:g}, alpha {ALPHA:g}; {seconds:.0f} s")


if __name__ == "__main__":
    main()
