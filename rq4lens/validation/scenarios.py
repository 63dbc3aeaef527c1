"""What is planted in a base model, in which heads of it, and what is then asked of the pair.

No rule can find a change of a head that does nothing. Heads are therefore drawn among those that
the base model misses, by a rule that sees the base model alone: a head matters when replacing its
activations by their mean over the prompts costs at least a tenth of an even share of what it costs
to replace the whole layer's, and a layer matters when that costs at least a tenth of an even share
of all layers together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from typing import Any, Literal

import einops
import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from sklearn.metrics import average_precision_score, roc_auc_score

from rq4lens.analysis.analyse import Beside, analyse
from rq4lens.analysis.claims import NO_SHARE, NOTHING
from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.agreement import strengths
from rq4lens.analysis.rankings.compared import rank_heads
from rq4lens.analysis.rankings.methods import RankingMethod
from rq4lens.analysis.records import Ladder
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.analysis.statistics.sign_flips import sign_flips
from rq4lens.analysis.structure.controls import held_out
from rq4lens.analysis.structure.kinds import (
    HELD_OUT,
    KINDS,
    KindInputs,
    head_kinds,
    ladder,
)
from rq4lens.config import AnalysisEffort, Effort, Patching, Place, Reading
from rq4lens.heads import Head, HeadSet
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import (
    FIT_SPLIT,
    MEASURE_SPLIT,
    SIDE_EFFECT_SPLIT,
    PromptSet,
)
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.experiment import prepare
from rq4lens.patching.grid import measure_grid
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.noise import noise_effects
from rq4lens.patching.patch import (
    BASE,
    CONSTANT,
    MAPPED,
    OUTPUT,
    SELF,
    SHIFTED,
    Engine,
    Patch,
    Sources,
)
from rq4lens.validation.attended import AttendedInputs
from rq4lens.validation.planting import ChangeKind, PlantedPair

Among = Literal["all", "mattering"]


@dataclass(frozen=True)
class Scenario:
    """What is done to the heads of one layer.

    Args:
        name: its name.
        planted: how many value heads are changed in which way; each is one head, or the group that
            shares it.
        sought: the kind of change that a ranking should put first; None where nothing is to be
            found and nothing may be claimed.
        strengths: sizes of the changes, of one pair after the other, relative to the suite's.
        among: ``"all"`` draws layer and heads from all, ``"mattering"`` from those that matter to
            the base model, as :class:`BaseHeads` says.
        unrelated: whether the tuned model shares nothing with the base but its shape.
    """

    name: str
    planted: Mapping[ChangeKind, int]
    sought: ChangeKind | None = None
    strengths: tuple[float, ...] = (1.0,)
    among: Among = "all"
    unrelated: bool = False


SCENARIOS = (
    Scenario("rotated", {"rotated": 3}, "rotated"),
    Scenario("scaled", {"scaled": 3}, "scaled"),
    Scenario("turned", {"turned": 3}, "turned"),
    Scenario("shifted", {"shifted": 3}, "shifted"),
    # A head that does nothing cannot be told to be replaced, whatever is planted in it.
    Scenario("replaced", {"replaced": 3}, "replaced", (0.5, 1.0, 2.0), "mattering"),
    Scenario("rotated beside replaced", {"rotated": 3, "replaced": 2}, "rotated"),
    Scenario("noise of every weight", {}),
    Scenario("unrelated models", {}, unrelated=True),
)


LEVEL = 0.05
NULLS_PER_PAIR = 4
NULL_NOISE = 0.3
"""Size of the noises that stand for raw and mapped activations, in standard deviations of z."""

RESAMPLES = 300

UNTOUCHED, UNRELATED, TOO_SMALL = "untouched", "unrelated", "too small"
"""The truth of a head that was not changed; of any head of a model that has nothing to do with the
base; and of one that does so little on train prompts that idle is what it is."""

NEAR_IDLE = 3.0
"""Up to so many idle lines on train prompts a head may be idle on others, too: of those just above
fewer than 3% are, of those just below more (docs/trust.md has the curve)."""

UNDONE, NOT_UNDONE = "recoded, undone", "recoded, not undone"
VERDICTS = (*KINDS[:4], UNDONE, NOT_UNDONE, *KINDS[4:])
"""What a head may be called; of a recoded one also whether ``W_O`` undoes it, if that is clear."""

RIGHT: Mapping[str, tuple[str, ...]] = {
    "rotated": ("recoded", UNDONE),
    "scaled": ("recoded", UNDONE),
    "turned": ("recoded", NOT_UNDONE),
    "shifted": ("shifted",),
    "replaced": ("replaced",),
    UNTOUCHED: ("unchanged", "idle"),  # neither says that it changed
    UNRELATED: ("replaced",),
}
"""The right words for each truth; ``"undecided"`` is no word, what is too small is idle, too."""

MATTERS = 0.1
"""Of an even share: what a head that matters does at least."""


def matters_from(full: float, n_parts: int) -> float:
    """From where on a part of some whole matters."""
    return MATTERS * full / n_parts


def is_right(truth: str, verdict: str) -> bool | None:
    """Whether a head is called what it is; None where it is not called anything, or has no name."""
    kind = truth.removesuffix(f", {TOO_SMALL}")
    if verdict == "undecided" or kind not in RIGHT:
        return None
    return verdict in (*RIGHT[kind], *(("idle",) if kind != truth else ()))


@dataclass(frozen=True)
class LayerCost:
    """What replacing activations by their means costs: all heads of a layer, each value head."""

    layer: int
    full_nats: float
    group_nats: Float64[ndarray, " value_head"]

    def mattering(self, at_least: int) -> list[int]:
        """The value heads that matter, most important first."""
        order = np.argsort(-self.group_nats, kind="stable").tolist()
        line = matters_from(self.full_nats, len(order))
        return order[: max(at_least, int((self.group_nats >= line).sum()))]


@dataclass(frozen=True)
class Chosen:
    """The heads of one planted pair, by kind of change, one of each value head, and their cost."""

    layer: int
    heads: Mapping[ChangeKind, tuple[Head, ...]]
    base_cost_nats: Mapping[Head, float]
    among: Among


class BaseHeads:
    """The heads of a base model, each measured once.

    Args:
        base: the base model.
        prompts: its prompts, with the splits train and val.
        reading: where prompts are decided and how long they may be.
    """

    def __init__(
        self, base: LoadedModel, prompts: PromptSet, reading: Reading | None = None
    ) -> None:
        self._model: Any = base.model
        self._pair = ModelPair(base, base, prompts, name="base", reading=reading)
        cfg = self._model.cfg
        self.n_layers, self.n_heads = cfg.n_layers, cfg.n_heads
        self.n_groups = cfg.n_key_value_heads or cfg.n_heads
        self._width = self.n_heads // self.n_groups
        self.cost = cache(self._cost)
        self.attended = cache(self._attended)

    def choose(
        self,
        planted: Mapping[ChangeKind, int],
        layer: int | None,
        rng: np.random.Generator,
        among: Among = "mattering",
    ) -> Chosen:
        """Draw heads to plant in.

        Args:
            planted: how many value heads are to be changed in which way.
            layer: the layer; None draws one.
            rng: the draws.
            among: ``"all"`` layers and heads, or the ``"mattering"`` ones.
        """
        everywhere = among == "all"
        drawn = int(rng.choice(self.n_layers if everywhere else self.layers))
        layer = drawn if layer is None else layer
        cost = None if everywhere else self.cost(layer)
        candidates = cost.mattering(len(planted)) if cost else list(range(self.n_groups))
        order = iter(rng.permutation(candidates).tolist())
        heads: dict[ChangeKind, tuple[Head, ...]] = {}
        costs: dict[Head, float] = {}
        for kind, count in fitted(planted, self.n_groups, len(candidates)).items():
            groups = [next(order) for _ in range(count)]
            heads[kind] = tuple(Head(layer, self._width * group) for group in groups)
            if cost:
                costs |= zip(heads[kind], cost.group_nats[groups].tolist(), strict=True)
        return Chosen(layer, heads, costs, among)

    @cached_property
    def layers(self) -> Sequence[int]:
        """The layers that matter."""
        full = np.array([self.cost(layer).full_nats for layer in range(self.n_layers)])
        return np.flatnonzero(full >= MATTERS * full.mean()).tolist()

    def _cost(self, layer: int) -> LayerCost:
        z = self._engine.clean_z(layer)
        sources = Sources({(layer, "mean"): z.mean(0, keepdim=True).expand_as(z).contiguous()})
        starts = range(0, self.n_heads, self._width)
        groups = [range(start, start + self._width) for start in starts]
        sets = [HeadSet.of(heads, self.n_heads) for heads in (*groups, range(self.n_heads))]
        patches = [(Patch(layer, heads, 1.0, "mean"),) for heads in sets]
        kl_nats = self._engine.effects(patches, sources).kl_nats.mean(-1)
        return LayerCost(layer, float(kl_nats[-1]), np.asarray(kl_nats[:-1], dtype=np.float64))

    @cached_property
    def _engine(self) -> Engine:
        return make_engine(self._model, self._pair.tokens("base", MEASURE_SPLIT))

    def _attended(self, layer: int) -> AttendedInputs:
        return AttendedInputs.of(self._model, self._pair.tokens("base", FIT_SPLIT), layer)


def fitted(
    planted: Mapping[ChangeKind, int], n_groups: int, n_candidates: int
) -> dict[ChangeKind, int]:
    """As many changes as leave half of the layer untouched, at least one of each kind."""
    share = min(1.0, min(n_groups / 2, n_candidates) / max(1, sum(planted.values())))
    return {kind: max(1, int(count * share)) for kind, count in planted.items()}


def damages_add(measured: MeasuredSets, heads: Sequence[int]) -> bool:
    """Whether each of some heads does harm by its raw patch in whatever company of the others.

    Where one head's damage undoes another's, what it adds to ``ΔKL`` is negative, and a method that
    measures heads in the company of others ranks it last, whatever was done to it. A head does harm
    when it adds at least a tenth of an even share of what all of the heads do together.

    Args:
        measured: the head sets measured so far; ``KL_raw`` alone counts.
        heads: the heads.
    """
    sets = [s for k in range(len(heads) + 1) for s in combinations(sorted(heads), k)]
    raw = dict(zip(sets, measured.kl_nats(sets)[0].mean(-1).tolist(), strict=True))
    line = matters_from(raw[sets[-1]], len(heads))
    return all(
        raw[tuple(sorted((*company, head)))] - raw[company] >= line
        for company in sets
        for head in heads
        if head not in company
    )


RUNGS = (CONSTANT, BASE, SHIFTED, MAPPED)


@dataclass(frozen=True)
class Trial:
    """One planted pair, ready to be asked.

    Its head sets are measured on the prompts that ranking methods see; on all val prompts, for the
    kinds of heads; on neutral ones, if there are any; on train ones, for the size of the truth.
    """

    scenario: Scenario
    planted: PlantedPair
    chosen: Chosen
    activations: PairActivations
    measured: MeasuredSets
    of_kinds: MeasuredSets
    of_neutral: MeasuredSets | None
    of_truth: MeasuredSets

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        planted: PlantedPair,
        chosen: Chosen,
        activations: PairActivations,
        n_val: int,
        alpha: float,
    ) -> Trial:
        """Fit the pair's maps and make it ready to be measured."""
        layer, pair = chosen.layer, activations.pair
        maps = fit_maps(pair, [layer], activations=activations)

        def ready(split: str, n_prompts: int | None = None) -> MeasuredSets:
            rows = range(len(pair.prompts.split(split)))[:n_prompts]
            patching = Patching(split=split)
            experiment = prepare(pair, maps, patching, activations=activations, rows=rows)
            return MeasuredSets.of(experiment, layer, 1.0)

        neutral = SIDE_EFFECT_SPLIT in pair.prompts.splits
        of_kinds = ready(MEASURE_SPLIT)
        sees_all = n_val >= len(of_kinds.groups)
        return cls(
            scenario,
            planted,
            chosen,
            activations,
            measured=(of_kinds if sees_all else ready(MEASURE_SPLIT, n_val)).at(alpha),
            of_kinds=of_kinds,
            of_neutral=ready(SIDE_EFFECT_SPLIT) if neutral else None,
            of_truth=ready(FIT_SPLIT),
        )

    @property
    def layer(self) -> int:
        """The layer that heads are planted in."""
        return self.chosen.layer

    @property
    def record(self) -> dict[str, Any]:
        """What was planted, and how its heads were chosen."""
        return {
            "scenario": self.scenario.name,
            "chosen": to_json(self.chosen),
            **self.planted.to_dict(),
        }

    def truth(self, head: int) -> str:
        """What was done to a head of the layer."""
        rest = UNRELATED if self.scenario.unrelated else UNTOUCHED
        kind: str = self.planted.truth.get(Head(self.layer, head), rest)
        row, small = self._truth[f"head{head}"], self._truth.idle_below_nats
        does = max(row.damage_nats[each].value or 0.0 for each in ("constant", "raw"))
        return f"{kind}, {TOO_SMALL}" if does <= NEAR_IDLE * small else kind

    @cached_property
    def _truth(self) -> Ladder:
        """What heads do on train prompts; no interval is asked for."""
        return self._ladder(self.of_truth, RUNGS)

    def recovery(self, method: str | RankingMethod) -> tuple[float, float]:
        """Average precision and AUROC of a method."""
        measured, planted = self.measured, self.planted.truth
        rank = rank_heads(method, measured) if isinstance(method, str) else method(measured)
        heads = [Head(self.layer, index) for index in range(measured.n_heads)]
        truth = [planted.get(head) == self.scenario.sought for head in heads]
        scores = strengths(rank)
        return float(average_precision_score(truth, scores)), float(roc_auc_score(truth, scores))

    def kinds(self) -> Iterator[tuple[str, str, str]]:
        """Truth and verdict of each head."""
        measured = self.of_kinds
        rungs: tuple[str, ...] = (*RUNGS, OUTPUT)
        without = held_out(measured.measurer.experiment, self.layer)
        if not isinstance(without, str):
            measured, rungs = measured.also({HELD_OUT: without}), (*rungs, HELD_OUT)
        neutral = self.of_neutral
        bootstrap = Bootstrap(measured.groups, RESAMPLES, self.planted.how.seed)
        elsewhere = "there are no neutral prompts"
        inputs = KindInputs.of(
            measured,
            self._ladder(measured, rungs),
            elsewhere if neutral is None else self._ladder(neutral, RUNGS),
            without,
            bootstrap,
        )
        for head in head_kinds(inputs).heads:
            kept = head.function_kept if head.kind == "recoded" else None
            # What a head is called, and of a recoded one whether its W_O undoes that.
            verdict = {None: head.kind, True: UNDONE, False: NOT_UNDONE}[kept]
            yield self.scenario.name, self.truth(head.head), verdict

    def _ladder(self, measured: MeasuredSets, rungs: Sequence[str]) -> Ladder:
        bootstrap = Bootstrap(measured.groups, RESAMPLES, self.planted.how.seed)
        sets = {f"head{head}": heads for head, heads in enumerate(measured.singles)}
        return ladder(measured, {**sets, "full": measured.everything}, rungs, bootstrap)

    def claims_something(self) -> bool:
        """Whether the answer says anything about heads, or what a map repairs of them."""
        seed = self.planted.how.seed
        patching = Patching(layer=self.layer, alpha=self.measured.alpha, k=(), random_seeds=())
        measurer = self.of_kinds.measurer
        grid = measure_grid(measurer, patching, Effort(resamples=RESAMPLES, seed=seed))
        beside = Beside(noise=noise_effects(measurer, self.activations, patching, Place(), seed))
        found = analyse(grid, None, AnalysisEffort(n_splits=1), beside=beside)
        said = " ".join((*found.claims, *found.study_claims))
        return NOTHING not in said or NO_SHARE not in said

    def null_alarms(self) -> Iterator[bool]:
        """Whether some head is significant where no map is better than another.

        Two noises of one size stand for the raw and the mapped activations: neither repairs what
        the other breaks.
        """
        experiment, seed = self.measured.measurer.experiment, self.planted.how.seed
        z = experiment.sources[self.layer, SELF]
        spread = NULL_NOISE * einops.reduce(
            z.float().std(0), "position head d_head -> 1 position head 1", "mean"
        )
        singles = [HeadSet.of([head], self.measured.n_heads) for head in range(z.shape[2])]
        for number in range(NULLS_PER_PAIR):
            generator = torch.Generator().manual_seed(NULLS_PER_PAIR * seed + number)
            wrong = {
                (self.layer, name): z + spread * torch.randn(z.shape, generator=generator)
                for name in ("one", "other")
            }
            one, other = experiment.with_sources(wrong).measure(
                self.layer, singles, self.measured.alpha, raw="one", mapped="other"
            )
            flips = sign_flips(one.kl_nats - other.kl_nats, experiment.groups, 1000, seed)
            yield bool(np.nanmin(flips.p_max_t) <= LEVEL)
