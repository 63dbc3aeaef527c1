"""Testing ranking methods on a model whose changed heads are known, before believing them.

From the user's own base model planted pairs are made: copies in which chosen heads of one layer are
changed in known ways while everything drifts a little. Every ranking method is judged by how well
it finds the chosen heads, the kinds of heads by how often they are told right, and the significance
tests by how often they find something where nothing is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from transformer_lens import HookedTransformer

from rq4lens.analysis.rankings.methods import METHODS, RankingMethod
from rq4lens.config import Reading
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.models.load.fingerprint import arithmetic_libraries
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import ModelCard, PairMember
from rq4lens.models.prompts.prompt_set import FIT_SPLIT, MEASURE_SPLIT, PromptSet
from rq4lens.patching.activations import check_layers, device_of
from rq4lens.patching.patch import Progress
from rq4lens.validation.results import (
    FalseAlarms,
    Outcome,
    PlantedIngredients,
    Recovery,
    Validation,
)
from rq4lens.validation.trials import LEVEL, SCENARIOS, PlantedTrials, Scenario


def validate(
    base: LoadedModel,
    prompts: PromptSet,
    *,
    store: Store | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Validation:
    """Judge ranking methods on planted pairs made from a base model.

    Args:
        base: the model that pairs are made from; it is not changed.
        prompts: prompts with the splits train and val.
        store: where planted pairs that are done are kept and looked up, if anywhere.
        progress: called with 1 after each planted pair.
        **settings: passed on to :class:`Suite`.

    Returns:
        What each method found.

    Raises:
        UserError: if a method does not exist, or the model cannot be planted in.
    """
    return Suite(base, prompts, **settings).run(store, progress)


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
        n_val: at most so many val prompts are shown to the methods, the first ones.
        n_val_kinds: on at most so many val prompts the kinds of heads are told; single heads cost
            little, and intervals of effects that lie on few prompts need many.
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
    n_val_kinds: int = 320
    seed: int = 0
    scenarios: Sequence[Scenario] = SCENARIOS
    reading: Reading | None = None

    def __post_init__(self) -> None:
        _check(self.base, self.methods, self.pairs, self.layers or ())

    def __len__(self) -> int:
        """How many planted pairs there are."""
        return len(self.scenarios) * self.pairs

    def run(self, store: Store | None = None, progress: Progress | None = None) -> Validation:
        """Judge the methods on every planted pair; see :func:`validate`."""
        outcomes = []
        for place in range(len(self)):
            outcomes.append(self.outcome(place, store))
            if progress is not None:
                progress(1)
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
        n_train, n_val = (
            len(self._planted.prompts.split(each)) for each in (FIT_SPLIT, MEASURE_SPLIT)
        )
        settings = {
            "base": self.base.source,
            **{each: getattr(self, each) for each in ("alpha", "pairs", "drift", "strength")},
            "train_prompts": n_train,
            "val_prompts": min(n_val, self.n_val),
            "val_prompts_of_kinds": n_val,
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
    def _planted(self) -> PlantedTrials:
        train, val = (self.prompts.split(split).prompts for split in (FIT_SPLIT, MEASURE_SPLIT))
        some = PromptSet((*train[: self.n_train], *val[: max(self.n_val, self.n_val_kinds)]))
        return PlantedTrials(
            self.base,
            some,
            tuple(self.layers or ()),
            alpha=self.alpha,
            drift=self.drift,
            strength=self.strength,
            n_val=self.n_val,
            seed=self.seed,
            reading=self.reading,
        )

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
            n_val=self.n_val,
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


def _check(
    base: LoadedModel, methods: Sequence[str | RankingMethod], pairs: int, layers: Sequence[int]
) -> None:
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
    if layers:
        check_layers(layers, model.cfg.n_layers)
    if pairs < 1:
        raise UserError(f"{pairs} planted pairs say nothing: make at least 1.")
    for method in methods:
        if isinstance(method, str) and method not in METHODS:
            raise UserError(
                f"ranking method {method!r} does not exist: choose from {', '.join(METHODS)}."
            )


def _name(method: str | RankingMethod) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", repr(method))
