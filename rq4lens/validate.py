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
from sklearn.metrics import average_precision_score, roc_auc_score
from transformer_lens import HookedTransformer

from rq4lens.analysis.agreement import strengths
from rq4lens.analysis.head_kinds import head_kinds
from rq4lens.analysis.measured import MeasuredSets
from rq4lens.analysis.ranking import METHODS, RankingMethod, rank_heads
from rq4lens.analysis.significance import sign_flips
from rq4lens.analysis.statistics import Bootstrap
from rq4lens.choosing import Among, BaseHeads, Chosen
from rq4lens.errors import UserError
from rq4lens.heads import Head, HeadSet
from rq4lens.models.builtin.plant import ChangeKind, PlantedPair, WeightName, plant
from rq4lens.models.fingerprint import arithmetic_libraries
from rq4lens.models.loading import LoadedModel
from rq4lens.models.pair import ModelCard, ModelPair, PairMember
from rq4lens.models.prompts import FIT_SPLIT, MEASURE_SPLIT, PromptSet
from rq4lens.models.reading import Reading
from rq4lens.patching.activations import device_of
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.fitting import fit_maps
from rq4lens.patching.patch import SELF
from rq4lens.planted_outcomes import Outcome, PlantedIngredients
from rq4lens.store import Store
from rq4lens.validation_results import FalseAlarms, Recovery, Validation

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


def validate(
    base: LoadedModel,
    prompts: PromptSet,
    *,
    store: Store | None = None,
    advance: Callable[[int], None] | None = None,
    **settings: Any,
) -> Validation:
    """Judge ranking methods on planted pairs made from a base model.

    Args:
        base: the model that pairs are made from; it is not changed.
        prompts: prompts with the splits train and val.
        store: where planted pairs that are done are kept and looked up, if anywhere.
        advance: called with 1 after each planted pair.
        **settings: passed on to :class:`Suite`.

    Returns:
        What each method found.

    Raises:
        UserError: if a method does not exist, or the model cannot be planted in.
    """
    return Suite(base, prompts, **settings).run(store, advance)


@dataclass(frozen=True)
class Suite:
    """Planted pairs that can be judged in any order, and by any process.

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

    Raises:
        UserError: if a method does not exist, or the model cannot be planted in.
    """

    base: LoadedModel
    prompts: PromptSet
    methods: Sequence[str | RankingMethod] = tuple(METHODS)
    layers: Sequence[int] | None = None
    alpha: float = 0.3
    pairs: int = 4
    drift: float = 0.02
    strength: float = 1.0
    n_train: int = 240
    n_val: int = 64
    seed: int = 0
    scenarios: Sequence[Scenario] = SCENARIOS
    reading: Reading | None = None

    def __post_init__(self) -> None:
        _check(self.base, self.methods, self.pairs)

    def __len__(self) -> int:
        """How many planted pairs there are."""
        return len(self.scenarios) * self.pairs

    def run(
        self, store: Store | None = None, advance: Callable[[int], None] | None = None
    ) -> Validation:
        """Judge the methods on every planted pair; see :func:`validate`."""
        outcomes = []
        for place in range(len(self)):
            outcomes.append(self.outcome(place, store))
            if advance is not None:
                advance(1)
        return self.result(outcomes)

    def outcome(self, place: int, store: Store | None = None) -> Outcome:
        """Plant one pair and judge the methods on it, or find it done.

        Args:
            place: which one, from 0 on.
            store: where it is kept and looked up, if anywhere.

        Raises:
            UserError: if it is to be kept, and a method is no named one.
        """
        which, number = divmod(place, self.pairs)
        scenario = self.scenarios[which]
        if store is None:
            return self._judged(scenario, number)
        ingredients = self._ingredients(scenario, number)
        kept = store.get(ingredients)
        if kept is not None:
            return Outcome.from_dict(kept)
        outcome = self._judged(scenario, number)
        store.put(ingredients, outcome.to_dict())
        return outcome

    def result(self, outcomes: Sequence[Outcome]) -> Validation:
        """What all planted pairs say together.

        Args:
            outcomes: of each pair, in order.
        """
        scenarios = [each.name for each in self.scenarios for _ in range(self.pairs)]
        scores: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for scenario, outcome in zip(scenarios, outcomes, strict=True):
            for method, score in zip(self.methods, outcome.recoveries, strict=True):
                scores.setdefault((scenario, _name(method)), []).append(score)
        some = self._planted.prompts
        settings = {
            "base": self.base.source,
            **{each: getattr(self, each) for each in ("alpha", "pairs", "drift", "strength")},
            "train_prompts": len(some.split(FIT_SPLIT)),
            "val_prompts": len(some.split(MEASURE_SPLIT)),
            "seed": self.seed,
        }
        return Validation(
            settings=settings,
            recoveries=tuple(Recovery.of(*key, values) for key, values in scores.items()),
            kinds=dict(Counter(kind for outcome in outcomes for kind in outcome.kinds)),
            false_alarms=FalseAlarms.of(
                [alarm for outcome in outcomes for alarm in outcome.alarms], LEVEL
            ),
            planted=tuple(outcome.planted for outcome in outcomes),
        )

    def _judged(self, scenario: Scenario, number: int) -> Outcome:
        trial = self._planted.trial(scenario, number)
        return Outcome(
            tuple(trial.recovery(method) for method in self.methods),
            tuple(trial.kinds()),
            tuple(trial.null_alarms()),
            trial.record,
        )

    @cached_property
    def _planted(self) -> _Suite:
        some = _some_prompts(self.prompts, self.n_train, self.n_val)
        layers, numbers = tuple(self.layers or ()), (self.alpha, self.drift, self.strength)
        return _Suite(self.base, some, layers, *numbers, self.seed, self.reading)

    @cached_property
    def _card(self) -> ModelCard:
        return PairMember.of(self.base).card

    def _ingredients(self, scenario: Scenario, number: int) -> PlantedIngredients:
        own = next((each for each in self.methods if not isinstance(each, str)), None)
        if own is not None:
            raise UserError(
                f"what {_name(own)!r} says cannot be kept, for nothing tells when the function "
                "changes: validate it without a store."
            )
        return PlantedIngredients(
            weights=self._card.weights_fingerprint,
            config=self._card.config_fingerprint,
            tokenizer=self._card.tokenizer_fingerprint,
            dtype=self._card.dtype,
            device=device_of(self.base.model).type,
            prompts=self._planted.prompts.fingerprint,
            reading=None if self.reading is None else asdict(self.reading),
            scenario=asdict(scenario),
            layers=self._planted.layers,
            alpha=self.alpha,
            drift=self.drift,
            strength=self.strength,
            seed=self.seed,
            number=number,
            methods=tuple(map(_name, self.methods)),
            libraries=arithmetic_libraries(),
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
