"""Testing ranking methods on a model whose changed heads are known, before believing them.

From the user's own base model planted pairs are made: copies in which chosen heads of one layer are
changed in known ways while everything drifts a little. Every ranking method is judged by how well
it finds the chosen heads, the kinds of heads by how often they are told right, the answer by how
often it claims something of noise or of unrelated models, and the significance tests by how often
they find something where nothing is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar
from zlib import crc32

import numpy as np
from pydantic import TypeAdapter
from scipy.stats import binomtest

from rq4lens.analysis.rankings.methods import METHODS, RankingMethod, method_of
from rq4lens.analysis.statistics.plain import Listed
from rq4lens.config import Reading, RunConfig
from rq4lens.disk.store import NUMERICS_VERSION, NamedIngredients, Store
from rq4lens.errors import UserError
from rq4lens.models.catalog import pair_from
from rq4lens.models.load.fingerprint import arithmetic_libraries
from rq4lens.models.load.lens import HookedTransformer
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import ModelCard, ModelPair, PairMember
from rq4lens.models.prompts.prompt_set import (
    FIT_SPLIT,
    MEASURE_SPLIT,
    SIDE_EFFECT_SPLIT,
    PromptSet,
)
from rq4lens.patching.activations import PairActivations, check_layers
from rq4lens.patching.keys import identity
from rq4lens.patching.passes import device_of
from rq4lens.patching.patch import Progress
from rq4lens.validation.planting import Planting, plant, unrelated
from rq4lens.validation.scenarios import (
    LEVEL,
    SCENARIOS,
    VERDICTS,
    BaseHeads,
    Scenario,
    Trial,
    is_right,
)


@dataclass(frozen=True)
class ValidationSettings:
    """What is planted, and which methods are judged on it.

    >>> rq.ValidationSettings(pairs=1).alpha
    0.3

    Args:
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
        UserError: if a method does not exist, or there would be no pair.
    """

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
        if self.pairs < 1:
            raise UserError(f"{self.pairs} planted pairs say nothing: make at least 1.")
        for method in self.methods:
            if isinstance(method, str):
                method_of(method)


DEFAULTS = ValidationSettings()


def validate(
    base: LoadedModel,
    prompts: PromptSet,
    settings: ValidationSettings = DEFAULTS,
    *,
    store: Store | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Judge ranking methods on planted pairs made from a base model.

    >>> from importlib.resources import files
    >>> base = rq.load_hooked(str(files("rq4lens.models") / "builtin/etiquette/base"))
    >>> few = {"pairs": 1, "layers": [1], "n_train": 80, "n_val": 16, "n_val_kinds": 16}
    >>> one = rq.ValidationSettings(methods=["delta"], scenarios=SCENARIOS[:1], **few)
    >>> len(rq.validate(base, pair.prompts, one).planted)
    1

    Args:
        base: the model that pairs are made from; it is not changed.
        prompts: prompts with the splits train and val.
        settings: what is planted, and which methods are judged.
        store: where planted pairs that are done are kept and looked up, if anywhere.
        progress: called with 1 after each planted pair.

    Returns:
        What each method made of them.

    Raises:
        UserError: if the model cannot be planted in.
    """
    return Suite(base, prompts, settings).run(store, progress)


@dataclass(frozen=True)
class Outcome:
    """What one planted pair said, as :class:`Validation` counts it.

    ``recoveries`` are average precision and AUROC by method, ``kinds`` scenario, truth and verdict
    by head, and ``claimed`` whether something was claimed where nothing is to be found.
    """

    recoveries: tuple[tuple[float, float], ...]
    kinds: tuple[tuple[str, str, str], ...]
    alarms: tuple[bool, ...]
    claimed: bool | None
    planted: Mapping[str, Any]


_OUTCOME = TypeAdapter(Outcome)
_INGREDIENTS = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Suite:
    """Planted pairs that can be judged in any order, and by any process.

    It is made from what :func:`validate` takes, and refuses the same.
    """

    base: LoadedModel
    prompts: PromptSet
    settings: ValidationSettings = DEFAULTS

    def __post_init__(self) -> None:
        model = self.base.model
        if not isinstance(model, HookedTransformer):
            raise UserError(
                f"{self.base.source!r} loads as a {type(model).__name__}: planting needs weights "
                "per head, as a HookedTransformer has them."
            )
        if (model.cfg.n_key_value_heads or model.cfg.n_heads) < 4:
            raise UserError(
                f"{self.base.source!r} has fewer than 4 value heads in a layer: too few to plant "
                "some and leave others."
            )
        if self.settings.layers:
            check_layers(self.settings.layers, model.cfg.n_layers)

    def __len__(self) -> int:
        """How many planted pairs there are."""
        return len(self.settings.scenarios) * self.settings.pairs

    def run(self, store: Store | None = None, progress: Progress | None = None) -> Validation:
        """Judge the methods on every planted pair; see :func:`validate`."""
        outcomes = []
        for place in range(len(self)):
            outcomes.append(self.outcome(place, store))
            if progress is not None:
                progress(1)
        return self.result(outcomes)

    def outcome(self, place: int, store: Store | None = None) -> Outcome:
        """Plant one pair, by its place from 0 on, and judge the methods on it, or look it up.

        Raises:
            UserError: if there is a store, and a method is no named one.
        """
        which, number = divmod(place, self.settings.pairs)
        scenario = self.settings.scenarios[which]
        if store is None:
            return self._judged(scenario, number)
        ingredients = self._ingredients(scenario, number)
        kept = store.get(ingredients)
        if kept is not None:
            return _OUTCOME.validate_python(kept)
        outcome = self._judged(scenario, number)
        store.put(ingredients, _OUTCOME.dump_python(outcome, mode="json"))
        return outcome

    def result(self, outcomes: Sequence[Outcome]) -> Validation:
        """What all planted pairs, in their order, say together."""
        given = self.settings
        scenarios = [each.name for each in given.scenarios for _ in range(given.pairs)]
        scores: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        claimed: dict[str, list[bool]] = defaultdict(list)
        for scenario, outcome in zip(scenarios, outcomes, strict=True):
            # Where nothing is sought, no method was judged.
            for method, score in zip(given.methods, outcome.recoveries, strict=False):
                scores[scenario, _name(method)].append(score)
            if outcome.claimed is not None:
                claimed[scenario].append(outcome.claimed)
        n_train, n_val = (len(self._used.split(each)) for each in (FIT_SPLIT, MEASURE_SPLIT))
        settings = {
            "base": self.base.source,
            **{each: getattr(given, each) for each in ("alpha", "pairs", "drift", "strength")},
            "train_prompts": n_train,
            "val_prompts": min(n_val, given.n_val),
            "val_prompts_of_kinds": n_val,
            "seed": given.seed,
        }
        return Validation(
            settings=settings,
            recoveries=tuple(
                Recovery(*key, *zip(*each, strict=True)) for key, each in scores.items()
            ),
            kinds=dict(Counter(kind for outcome in outcomes for kind in outcome.kinds)),
            false_alarms=FalseAlarms.of(
                [alarm for outcome in outcomes for alarm in outcome.alarms], LEVEL
            ),
            claimed={name: (sum(each), len(each)) for name, each in claimed.items()},
            planted=tuple(outcome.planted for outcome in outcomes),
        )

    def trial(self, scenario: Scenario, number: int) -> Trial:
        """Plant one pair and make it ready to measure."""
        given = self.settings
        # Every pair of every scenario has random numbers of its own.
        seed = (given.seed * 1000 + number) * 1000 + crc32(scenario.name.encode()) % 1000
        layer = given.layers[number % len(given.layers)] if given.layers else None
        rng = np.random.default_rng(seed)
        chosen = self._heads.choose(scenario.planted, layer, rng, scenario.among)
        attends = {"rewired", "replaced"} & set(chosen.heads)
        how = Planting(
            drift=given.drift,
            strength=given.strength * scenario.strengths[number % len(scenario.strengths)],
            attended=self._heads.attended(chosen.layer) if attends else None,
            seed=seed,
        )
        heads = {str(kind): each for kind, each in chosen.heads.items()}
        model = self.base.model
        planted = unrelated(model, seed) if scenario.unrelated else plant(model, **heads, how=how)
        tuned = planted.loaded(self.base)
        pair = ModelPair(self.base, tuned, self._used, name="planted", reading=given.reading)
        activations = self._of_base.beside(pair)
        return Trial.of(scenario, planted, chosen, activations, given.n_val, given.alpha)

    def _judged(self, scenario: Scenario, number: int) -> Outcome:
        trial = self.trial(scenario, number)
        methods = () if scenario.sought is None else self.settings.methods
        return Outcome(
            tuple(trial.recovery(method) for method in methods),
            tuple(trial.kinds()),
            tuple(trial.null_alarms()),
            trial.claims_something() if scenario.sought is None else None,
            trial.record,
        )

    @cached_property
    def _used(self) -> PromptSet:
        """The prompts that are used: few of them may decide how heads are ranked."""
        given = self.settings
        return self._first(given.n_train, max(given.n_val, given.n_val_kinds))

    @cached_property
    def _of_base(self) -> PairActivations:
        """The base model's activations, where all planted pairs have them in common."""
        pair = ModelPair(self.base, self.base, self._used, reading=self.settings.reading)
        activations = PairActivations(pair)
        for split in pair.prompts.splits if pair.reading.answer_tokens == 1 else ():
            activations.capture("base", split, range(pair.n_layers), to_the_end=True)
        return activations

    @cached_property
    def _heads(self) -> BaseHeads:
        """What is known of the base model's heads, from what ranking methods see."""
        few = self._first(self.settings.n_train, self.settings.n_val)
        return BaseHeads(self.base, few, self.settings.reading)

    def _first(self, n_train: int, n_val: int) -> PromptSet:
        limits = {FIT_SPLIT: n_train, MEASURE_SPLIT: n_val}
        if SIDE_EFFECT_SPLIT in self.prompts.splits:
            limits[SIDE_EFFECT_SPLIT] = n_val
        some = (self.prompts.split(split).prompts[:n] for split, n in limits.items())
        return PromptSet(tuple(chain.from_iterable(some)))

    @cached_property
    def _card(self) -> ModelCard:
        return PairMember.of(self.base).card

    def _ingredients(self, scenario: Scenario, number: int) -> NamedIngredients:
        """Everything that can change what a planted pair says."""
        given = self.settings
        own = next((each for each in given.methods if not isinstance(each, str)), None)
        if own is not None:
            raise UserError(
                f"what {_name(own)!r} says cannot be kept, for nothing tells when the function "
                "changes: validate it without a store."
            )
        names = ("n_val", "reading", "alpha", "drift", "strength", "seed", "methods")
        values = {
            **{name: getattr(given, name) for name in names},
            **identity(self._card.to_dict()),
            "dtype": self._card.dtype,
            "device": device_of(self.base.model).type,
            "prompts": self._used.fingerprint,
            "scenario": scenario,
            "layers": given.layers or (),
            "number": number,
            "libraries": arithmetic_libraries(),
            "numerics_version": NUMERICS_VERSION,
        }
        plain = _INGREDIENTS.dump_python(values, mode="json")
        return NamedIngredients(f"{scenario.name}_{number}", plain)


def _name(method: str | RankingMethod) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", repr(method))


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

    @classmethod
    def of(cls, alarms: Sequence[bool], level: float) -> FalseAlarms:
        """From whether each null experiment raised an alarm."""
        found = binomtest(sum(alarms), len(alarms)).proportion_ci(0.95)
        return cls(len(alarms), sum(alarms), level, (float(found.low), float(found.high)))

    @property
    def rate(self) -> float:
        """Share of the null experiments with an alarm."""
        return self.n_alarms / self.n_nulls


@dataclass(frozen=True, repr=False)
class Validation(Listed):
    """What a suite of planted pairs said about the methods.

    Args:
        settings: how the suite was made.
        recoveries: one per scenario and method.
        kinds: how often a head that was changed in some way (``"untouched"`` if in none) was told
            to be of some kind, by scenario, truth and verdict.
        false_alarms: of the significance tests.
        claimed: in how many of how many pairs something was claimed about heads, by the scenarios
            in which there is nothing to find.
        planted: of each planted pair, its scenario, which heads were chosen and why, and the truth.
    """

    ROWS: ClassVar[str] = "recoveries"

    settings: Mapping[str, Any]
    recoveries: tuple[Recovery, ...]
    kinds: Mapping[tuple[str, str, str], int]
    false_alarms: FalseAlarms
    claimed: Mapping[str, tuple[int, int]]
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
            "claimed": {
                name: {"n_claims": n, "n_pairs": of} for name, (n, of) in self.claimed.items()
            },
            "planted": [dict(each) for each in self.planted],
        }


def validation_text(validation: Validation) -> str:
    """The result as Markdown tables, which a terminal shows as well."""
    values, alarms = validation.settings, validation.false_alarms
    low, high = (100 * end for end in alarms.ci95)
    parts = [
        f"{values['base']}: planted pairs per scenario: {values['pairs']}, drift "
        f"{values['drift']:g}, strength {values['strength']:g}, alpha {values['alpha']:g}, "
        f"{values['train_prompts']} train and {values['val_prompts']} val prompts "
        f"({values['val_prompts_of_kinds']} for the kinds of heads), seed {values['seed']}.\n"
        "Average precision of the planted heads, mean (worst); 1.00 means that they come first.",
        _recovery_table(validation.recoveries, "average_precision"),
        "Area under the ROC curve: the probability that a planted head is ranked before another.",
        _recovery_table(validation.recoveries, "auroc"),
        _kinds_table(validation),
        _wrong_words(validation),
        f"False alarms: some head significant in {alarms.n_alarms} of {alarms.n_nulls} experiments "
        f"where two equal noises stood for the raw and the mapped activations, "
        f"{100 * alarms.rate:.1f}% [{low:.1f}, {high:.1f}]; promised {100 * alarms.level:g}%.",
    ]
    return "\n\n".join(parts) + "\n"


def _recovery_table(recoveries: tuple[Recovery, ...], measure: str) -> str:
    scenarios = list(dict.fromkeys(each.scenario for each in recoveries))
    rows: dict[str, list[str]] = {}
    for each in recoveries:
        values = getattr(each, measure)
        cell = f"{sum(values) / len(values):.2f} ({min(values):.2f})"
        rows.setdefault(each.method, [each.method]).append(cell)
    return _table(["method", *scenarios], rows.values())


def _kinds_table(validation: Validation) -> str:
    kinds = validation.kinds
    called = [each for each in VERDICTS if any(key[2] == each for key in kinds)]
    rows = [
        [scenario, truth, *(str(kinds.get((scenario, truth, verdict), 0)) for verdict in called)]
        for scenario, truth in dict.fromkeys(key[:2] for key in sorted(kinds))
    ]
    return _table(["scenario", "truth", *(f"called {verdict}" for verdict in called)], rows)


def _wrong_words(validation: Validation) -> str:
    """How often a head is called what it is not, and where something is claimed of nothing."""
    rows: dict[str, Counter[bool | None]] = defaultdict(Counter)
    for (_, truth, verdict), n in sorted(validation.kinds.items()):
        rows[truth][is_right(truth, verdict)] += n
    table = _table(
        ["truth", "heads", "called what they are", "undecided", "called something else"],
        (
            [truth, *(str(n) for n in (found.total(), found[True], found[None], found[False]))]
            for truth, found in rows.items()
        ),
    )
    claims = [
        f"{name}: something is claimed about heads in {n} of {of} pairs."
        for name, (n, of) in validation.claimed.items()
    ]
    return "\n\n".join([table, *claims])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@dataclass(frozen=True)
class ValidationRequest:
    """What is to be validated, as any process understands it; without a layer one is drawn."""

    config: RunConfig
    methods: tuple[str, ...] = tuple(METHODS)
    layer: int | None = None
    pairs: int = 4
    drift: float = 0.02

    def suite(self) -> Suite:
        """Load the base model."""
        settings = ValidationSettings(
            methods=self.methods,
            layers=None if self.layer is None else [self.layer],
            alpha=self.config.patching.alpha,
            pairs=self.pairs,
            drift=self.drift,
            seed=self.config.effort.seed,
            reading=self.config.reading,
        )
        return Suite(*base_of(self.config), settings)

    @property
    def n_planted(self) -> int:
        """How many planted pairs there are."""
        return self.pairs * len(SCENARIOS)


def base_of(config: RunConfig) -> tuple[LoadedModel, PromptSet]:
    """The base model and the prompts that a configuration names; a tuned model is not loaded."""
    source = config.pair.but(tuned=config.pair.tuned or config.pair.base)
    pair = pair_from(source, config.reading, config.place.but(keep_both=False))
    return pair.use("base").loaded, pair.prompts
