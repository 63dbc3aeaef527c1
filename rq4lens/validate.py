"""Testing ranking methods on a model whose changed heads are known, before believing them.

From the user's own base model planted pairs are made: copies in which chosen heads of one layer are
changed in known ways while everything drifts a little. Every ranking method is judged by how well
it finds the chosen heads, the kinds of heads by how often they are told right, and the significance
tests by how often they find something where nothing is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any
from zlib import crc32

import einops
import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score
from transformer_lens import HookedTransformer

from rq4lens.analysis.agreement import strengths
from rq4lens.analysis.head_kinds import head_kinds
from rq4lens.analysis.measured import MeasuredSets
from rq4lens.analysis.ranking import METHODS, RankingMethod, rank_heads
from rq4lens.analysis.significance import sign_flips
from rq4lens.analysis.statistics import Bootstrap
from rq4lens.choosing import Among, BaseHeads, Chosen
from rq4lens.config import RunConfig
from rq4lens.errors import UserError
from rq4lens.heads import Head, HeadSet
from rq4lens.models.builtin.plant import ChangeKind, PlantedPair, WeightName, plant
from rq4lens.models.catalog import pair_from_config
from rq4lens.models.loading import LoadedModel
from rq4lens.models.pair import ModelPair, PairMember
from rq4lens.models.prompts import FIT_SPLIT, MEASURE_SPLIT, PromptSet
from rq4lens.models.reading import Reading
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.fitting import fit_maps
from rq4lens.patching.patch import SELF

LEVEL = 0.05
NULLS_PER_PAIR = 4
NULL_NOISE = 0.3
"""Size of the noise that stands for two equally wrong maps, in standard deviations of z."""

RESAMPLES = 300

UNTOUCHED, PARTLY = "untouched", "rewired in part"
"""The truth of a head that was not changed, and of one whose change a map explains in part."""


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
            the base model: see :mod:`rq4lens.choosing`.
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


@dataclass(frozen=True)
class Recovery:
    """How well one method finds the planted heads of one scenario.

    Args:
        scenario: the scenario.
        method: the ranking method.
        average_precision: of each planted pair; 1 when the planted heads come first.
        auroc: probability that a planted head is ranked before another one, of each pair.
    """

    scenario: str
    method: str
    average_precision: tuple[float, ...]
    auroc: tuple[float, ...]


@dataclass(frozen=True)
class FalseAlarms:
    """How often the corrected sign-flip test of single heads finds something where nothing is.

    Args:
        n_nulls: how many null experiments were made.
        n_alarms: in how many of them some head was significant.
        level: the promised rate.
        ci95: where the true rate may lie (Clopper and Pearson).
    """

    n_nulls: int
    n_alarms: int
    level: float
    ci95: tuple[float, float]

    @property
    def rate(self) -> float:
        """Share of the null experiments with an alarm."""
        return self.n_alarms / self.n_nulls


@dataclass(frozen=True)
class Validation:
    """What a suite of planted pairs said about the methods.

    Args:
        settings: how the suite was made.
        recoveries: one per scenario and method.
        kinds: how often a head that was changed in some way (``"untouched"`` if in none) was told
            to be of some kind, by scenario, truth and verdict.
        false_alarms: of the significance tests.
        planted: of each planted pair, its scenario, which heads were chosen and why, and the truth.
    """

    settings: Mapping[str, Any]
    recoveries: tuple[Recovery, ...]
    kinds: Mapping[tuple[str, str, str], int]
    false_alarms: FalseAlarms
    planted: tuple[Mapping[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "settings": dict(self.settings),
            "recoveries": [asdict(each) for each in self.recoveries],
            "kinds": [
                {"scenario": scenario, "truth": truth, "verdict": verdict, "n": n}
                for (scenario, truth, verdict), n in sorted(self.kinds.items())
            ],
            "false_alarms": {**asdict(self.false_alarms), "rate": self.false_alarms.rate},
            "planted": [dict(each) for each in self.planted],
        }


def validate(
    base: LoadedModel,
    prompts: PromptSet,
    *,
    methods: Sequence[str | RankingMethod] = tuple(METHODS),
    layers: Sequence[int] | None = None,
    alpha: float = 0.3,
    pairs: int = 4,
    drift: float = 0.02,
    strength: float = 1.0,
    n_train: int = 240,
    n_val: int = 64,
    seed: int = 0,
    scenarios: Sequence[Scenario] = SCENARIOS,
    reading: Reading | None = None,
    advance: Callable[[int], None] | None = None,
) -> Validation:
    """Judge ranking methods on planted pairs made from a base model.

    Args:
        base: the model that pairs are made from; it is not changed.
        prompts: prompts with the splits train and val.
        methods: names of ranking methods, or functions that rank :class:`MeasuredSets`.
        layers: the layers that heads are planted in, in turn; None draws one per pair.
        alpha: blend strength.
        pairs: planted pairs per scenario.
        drift: how far every weight moves, relative to its matrix.
        strength: size of the planted changes.
        n_train: at most so many train prompts are used.
        n_val: at most so many val prompts are used.
        seed: decides layers, heads and changes.
        scenarios: what is planted.
        reading: where prompts are decided and how long they may be.
        advance: called with 1 after each planted pair.

    Returns:
        What each method found.

    Raises:
        UserError: if a method does not exist, or the model cannot be planted in.
    """
    _check(base, methods, pairs)
    some = _some_prompts(prompts, n_train, n_val)
    suite = _Suite(base, some, tuple(layers or ()), alpha, drift, strength, seed, reading)
    scores: dict[tuple[str, str], list[tuple[float, float]]] = {}
    kinds: Counter[tuple[str, str, str]] = Counter()
    alarms: list[bool] = []
    planted: list[Mapping[str, Any]] = []
    for scenario in scenarios:
        for number in range(pairs):
            trial = suite.trial(scenario, number)
            for method in methods:
                scores.setdefault((scenario.name, _name(method)), []).append(trial.recovery(method))
            kinds.update(trial.kinds())
            alarms += trial.null_alarms()
            planted.append(trial.record)
            if advance is not None:
                advance(1)
    return Validation(
        settings={
            "base": base.source,
            "alpha": alpha,
            "pairs": pairs,
            "drift": drift,
            "strength": strength,
            "train_prompts": len(some.split(FIT_SPLIT)),
            "val_prompts": len(some.split(MEASURE_SPLIT)),
            "seed": seed,
        },
        recoveries=tuple(_recovery(key, values) for key, values in scores.items()),
        kinds=dict(kinds),
        false_alarms=_false_alarms(alarms),
        planted=tuple(planted),
    )


@dataclass(frozen=True)
class _Suite:
    """What all planted pairs of a validation share."""

    base: LoadedModel
    prompts: PromptSet
    layers: tuple[int, ...]
    alpha: float
    drift: float
    strength: float
    seed: int
    reading: Reading | None

    @cached_property
    def heads(self) -> BaseHeads:
        """What is known of the base model's heads."""
        return BaseHeads(self.base, self.prompts, self.reading)

    def trial(self, scenario: Scenario, number: int) -> _Trial:
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
        experiment = prepare(pair, fit_maps(pair, [chosen.layer]))
        measured = MeasuredSets.of(experiment, chosen.layer, self.alpha)
        return _Trial(scenario, planted, experiment, measured, chosen, seed)


@dataclass(frozen=True)
class _Trial:
    """One planted pair, ready to be asked."""

    scenario: Scenario
    planted: PlantedPair
    experiment: Experiment
    measured: MeasuredSets
    chosen: Chosen
    seed: int

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
        kind = self.planted.truth.get(Head(self.layer, head), UNTOUCHED)
        # The weights are new, but a map explains more of what came out than a rewired head's may.
        return PARTLY if kind == "rewired" and head in self._partly_explained else kind

    @cached_property
    def _partly_explained(self) -> set[int]:
        contents = [(change.heads, change.content) for change in self.planted.changes]
        return {
            h.index for heads, found in contents if found and not found.is_rewired for h in heads
        }

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
        raw, mapped = self.measured.kl_nats(self.measured.singles)
        full = float(self.measured.kl_nats([self.measured.everything])[0].mean())
        bootstrap = Bootstrap(self.measured.groups, RESAMPLES, self.seed)
        for head in head_kinds(raw, mapped, full, 0.0, bootstrap).heads:
            yield self.scenario.name, self.truth(head.head), head.kind

    def null_alarms(self) -> Iterator[bool]:
        """Whether some head is significant where two equally wrong maps are compared.

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
            effects = self.experiment.with_sources(wrong).measure(
                self.layer, singles, self.measured.alpha, raw="one", mapped="other"
            )
            flips = sign_flips(effects.delta_nats, self.experiment.groups, 1000, self.seed)
            yield bool(np.nanmin(flips.p_max_t) <= LEVEL)


def _some_prompts(prompts: PromptSet, n_train: int, n_val: int) -> PromptSet:
    train, val = prompts.split(FIT_SPLIT).prompts, prompts.split(MEASURE_SPLIT).prompts
    return PromptSet((*train[:n_train], *val[:n_val]))


def base_of(config: RunConfig) -> tuple[LoadedModel, PromptSet]:
    """The base model and the prompts that a configuration names; a tuned model is not loaded.

    Args:
        config: the configuration; it need not name a tuned model.

    Returns:
        The base model and the prompts.

    Raises:
        UserError: if something is missing or the model cannot be loaded.
    """
    pair = pair_from_config(config.updated(tuned=config.tuned or config.base, keep_both=False))
    return pair.use("base").loaded, pair.prompts


def _check(base: LoadedModel, methods: Sequence[str | RankingMethod], pairs: int) -> None:
    model = base.model
    if not isinstance(model, HookedTransformer):
        raise UserError(
            f"{base.source!r} loads as a {type(model).__name__}: planting needs weights per head, "
            "as a HookedTransformer has them."
        )
    if (model.cfg.n_key_value_heads or model.cfg.n_heads) < 4:
        raise UserError(
            f"{base.source!r} has fewer than 4 value heads in a layer: too few to plant some and "
            "leave others."
        )
    if pairs < 1:
        raise UserError(f"{pairs} planted pairs say nothing: make at least 1.")
    for method in methods:
        if isinstance(method, str) and method not in METHODS:
            raise UserError(
                f"ranking method {method!r} does not exist: choose from {', '.join(METHODS)}."
            )


def _name(method: str | RankingMethod) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", repr(method))


def _recovery(key: tuple[str, str], values: Sequence[tuple[float, float]]) -> Recovery:
    precisions, aurocs = zip(*values, strict=True)
    return Recovery(*key, average_precision=precisions, auroc=aurocs)


def _false_alarms(alarms: Sequence[bool]) -> FalseAlarms:
    found = binomtest(sum(alarms), len(alarms)).proportion_ci(0.95)
    return FalseAlarms(len(alarms), sum(alarms), LEVEL, (float(found.low), float(found.high)))
