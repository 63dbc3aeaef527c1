"""Planted pairs, one at a time: made, measured, and asked what is known to be true of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from zlib import crc32

import einops
import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.agreement import strengths
from rq4lens.analysis.rankings.methods import RankingMethod, rank_heads
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.analysis.statistics.sign_flips import sign_flips
from rq4lens.analysis.structure.heads import head_kinds, idle_line
from rq4lens.config import Patching, Reading
from rq4lens.heads import Head, HeadSet
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import ModelPair, PairMember
from rq4lens.models.prompts.prompt_set import FIT_SPLIT, MEASURE_SPLIT, PromptSet
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.patch import SELF
from rq4lens.validation.choosing import Among, BaseHeads, Chosen
from rq4lens.validation.planting import ChangeKind, PlantedPair, WeightName, plant


@dataclass(frozen=True)
class Scenario:
    """What is done to the heads of one layer.

    Args:
        name: its name.
        planted: how many value heads are changed in which way; each is one head, or the group that
            shares it.
        sought: the kind of change that a ranking should put first.
        weights: which weights of a rewired head get new content.
        among: ``"all"`` draws layer and heads from all, ``"mattering"`` from those that matter to
            the base model: see :mod:`rq4lens.validation.choosing`.
    """

    name: str
    planted: Mapping[ChangeKind, int]
    sought: ChangeKind
    weights: tuple[WeightName, ...] = ("W_Q", "W_K")
    among: Among = "all"


SCENARIOS = (
    Scenario("rotated", {"rotated": 3}, "rotated"),
    Scenario("scaled", {"scaled": 3}, "scaled"),
    Scenario("shifted", {"shifted": 3}, "shifted"),
    # A head that does nothing cannot be told to be rewired, whatever is planted in it.
    Scenario("rewired attention", {"rewired": 3}, "rewired", ("W_Q", "W_K"), "mattering"),
    Scenario("rewired values", {"rewired": 3}, "rewired", ("W_V", "W_O"), "mattering"),
    Scenario("rotated beside rewired", {"rotated": 3, "rewired": 2}, "rotated"),
)


LEVEL = 0.05
NULLS_PER_PAIR = 4
NULL_NOISE = 0.3
"""Size of the noises that stand for raw and mapped activations, in standard deviations of z."""

RESAMPLES = 300

UNTOUCHED, PARTLY, TOO_SMALL = "untouched", "rewired in part", "too small"
"""The truth of a head that was not changed; of one whose change a map explains in part; and of one
whose change does so little, by its raw patch on train prompts, that idle is what it is."""


@dataclass(frozen=True)
class PlantedTrials:
    """What all planted pairs of a validation share.

    Args:
        base: the model that pairs are made from.
        prompts: prompts with the splits train and val.
        layers: the layers that heads are planted in, in turn; empty draws one per pair.
        alpha: blend strength.
        drift: how far every weight moves, relative to its matrix.
        strength: size of the planted changes.
        n_val: how many val prompts the ranking methods see; kinds are told on all.
        seed: decides layers, heads and changes.
        reading: where prompts are decided and how long they may be.
    """

    base: LoadedModel
    prompts: PromptSet
    layers: tuple[int, ...]
    alpha: float
    drift: float
    strength: float
    n_val: int
    seed: int
    reading: Reading | None

    @cached_property
    def heads(self) -> BaseHeads:
        """What is known of the base model's heads."""
        return BaseHeads(self.base, self._few, self.reading)

    @cached_property
    def _few(self) -> PromptSet:
        train, val = (self.prompts.split(split).prompts for split in (FIT_SPLIT, MEASURE_SPLIT))
        return PromptSet((*train, *val[: self.n_val]))

    def trial(self, scenario: Scenario, number: int) -> Trial:
        """Plant one pair and make it ready to measure."""
        # Every pair of every scenario has random numbers of its own.
        seed = (self.seed * 1000 + number) * 1000 + crc32(scenario.name.encode()) % 1000
        layer = self.layers[number % len(self.layers)] if self.layers else None
        rng = np.random.default_rng(seed)
        chosen = self.heads.choose(scenario.planted, layer, rng, scenario.among)
        planted = plant(
            self.base.model,
            rotated=chosen.heads.get("rotated", ()),
            scaled=chosen.heads.get("scaled", ()),
            rewired=chosen.heads.get("rewired", ()),
            shifted=chosen.heads.get("shifted", ()),
            drift=self.drift,
            strength=self.strength,
            weights=scenario.weights,
            attended=self.heads.attended(chosen.layer) if "rewired" in chosen.heads else None,
            seed=seed,
        )
        base, tuned = PairMember.of(self.base), PairMember.of(planted.loaded(self.base))
        pair = ModelPair("planted", base, tuned, self.prompts, reading=self.reading)
        return Trial.of(scenario, planted, chosen, pair, self.n_val, self.alpha, seed)


@dataclass(frozen=True)
class Trial:
    """One planted pair, ready to be asked.

    Args:
        scenario: what was to be planted.
        planted: the pair, and the truth about it.
        chosen: where it was planted, and why there.
        experiment: the pair on the prompts that ranking methods see.
        measured: the layer's head sets on these.
        of_kinds: the same on all val prompts, for the kinds of heads.
        of_truth: the same on train prompts, for the size of what was planted.
        seed: decides what is random.
    """

    scenario: Scenario
    planted: PlantedPair
    chosen: Chosen
    experiment: Experiment
    measured: MeasuredSets
    of_kinds: MeasuredSets
    of_truth: MeasuredSets
    seed: int

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        planted: PlantedPair,
        chosen: Chosen,
        pair: ModelPair,
        n_val: int,
        alpha: float,
        seed: int,
    ) -> Trial:
        """Fit the pair's maps and make it ready to be measured."""
        layer, activations = chosen.layer, PairActivations(pair)
        maps = fit_maps(pair, [layer], activations=activations)

        def ready(split: str, n_prompts: int | None = None) -> Experiment:
            rows = range(len(pair.prompts.split(split)))[:n_prompts]
            return prepare(pair, maps, Patching(split=split), activations=activations, rows=rows)

        experiments = ready(MEASURE_SPLIT, n_val), ready(MEASURE_SPLIT), ready(FIT_SPLIT)
        few, every, train = (MeasuredSets.of(each, layer, alpha) for each in experiments)
        return cls(scenario, planted, chosen, experiments[0], few, every, train, seed)

    @property
    def layer(self) -> int:
        """The layer that heads are planted in."""
        return self.chosen.layer

    @property
    def record(self) -> dict[str, Any]:
        """What was planted, and how its heads were chosen."""
        return {
            "scenario": self.scenario.name,
            "chosen": self.chosen.to_dict(),
            **self.planted.to_dict(),
        }

    def truth(self, head: int) -> str:
        """What was done to a head of the layer."""
        kind: str = self.planted.truth.get(Head(self.layer, head), UNTOUCHED)
        if kind == UNTOUCHED:
            return kind
        # The weights are new, but a map explains more of what came out than a rewired head's may.
        kind = PARTLY if kind == "rewired" and head in self._partly_explained else kind
        return f"{kind}, {TOO_SMALL}" if self._kl_raw[head] <= self._idle_below else kind

    @cached_property
    def _partly_explained(self) -> set[int]:
        contents = [(change.heads, change.content) for change in self.planted.changes]
        return {
            h.index for heads, found in contents if found and not found.is_rewired for h in heads
        }

    @cached_property
    def _kl_raw(self) -> list[float]:
        """``KL_raw`` of every head, and last of all together, on train prompts."""
        sets = [*self.of_truth.singles, self.of_truth.everything]
        kl_raw: list[float] = self.of_truth.kl_nats(sets)[0].mean(-1).tolist()
        return kl_raw

    @property
    def _idle_below(self) -> float:
        return idle_line(self._kl_raw[-1], self.of_truth.n_heads)

    def recovery(self, method: str | RankingMethod) -> tuple[float, float]:
        """Average precision and AUROC of a method."""
        rank = (
            rank_heads(method, self.measured) if isinstance(method, str) else method(self.measured)
        )
        heads = range(self.measured.n_heads)
        planted = self.planted.truth
        is_sought = [planted.get(Head(self.layer, h)) == self.scenario.sought for h in heads]
        scores = strengths(rank)
        return (
            float(average_precision_score(is_sought, scores)),
            float(roc_auc_score(is_sought, scores)),
        )

    def kinds(self) -> Iterator[tuple[str, str, str]]:
        """Truth and verdict of each head."""
        raw, mapped = self.of_kinds.kl_nats(self.of_kinds.singles)
        full = float(self.of_kinds.kl_nats([self.of_kinds.everything])[0].mean())
        bootstrap = Bootstrap(self.of_kinds.groups, RESAMPLES, self.seed)
        for head in head_kinds(raw, mapped, full, 0.0, bootstrap).heads:
            yield self.scenario.name, self.truth(head.head), head.kind

    def null_alarms(self) -> Iterator[bool]:
        """Whether some head is significant where no map is better than another.

        Two independent noises of one size stand in place of the raw and the mapped activations, so
        that neither repairs what the other breaks.
        """
        z = self.experiment.sources[self.layer, SELF]
        spread = NULL_NOISE * einops.reduce(
            z.float().std(0), "position head d_head -> 1 position head 1", "mean"
        )
        singles = [HeadSet.of([head], self.measured.n_heads) for head in range(z.shape[2])]
        for number in range(NULLS_PER_PAIR):
            generator = torch.Generator().manual_seed(NULLS_PER_PAIR * self.seed + number)
            wrong = {
                (self.layer, name): z + spread * torch.randn(z.shape, generator=generator)
                for name in ("one", "other")
            }
            one, other = self.experiment.with_sources(wrong).measure(
                self.layer, singles, self.measured.alpha, raw="one", mapped="other"
            )
            delta_nats = one.kl_nats - other.kl_nats
            flips = sign_flips(delta_nats, self.experiment.groups, 1000, self.seed)
            yield bool(np.nanmin(flips.p_max_t) <= LEVEL)
