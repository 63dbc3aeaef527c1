"""What is planted in a base model, in which heads of it, and what is then asked of the pair.

No rule can find a change of a head that does nothing. Heads are therefore drawn among those that
the base model misses, by a rule that sees the base model alone: a head matters when replacing its
activations by their mean over the prompts costs at least a tenth of an even share of what it costs
to replace the whole layer's, and a layer matters when that costs at least a tenth of an even share
of all layers together. It is the line below which :mod:`rq4lens.analysis.structure.heads` calls a
head idle.
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

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.agreement import strengths
from rq4lens.analysis.rankings.compared import rank_heads
from rq4lens.analysis.rankings.methods import RankingMethod
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.analysis.statistics.sign_flips import sign_flips
from rq4lens.analysis.structure.heads import IDLE_SHARE, head_kinds, idle_line
from rq4lens.config import Patching, Reading
from rq4lens.heads import Head, HeadSet
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import ModelPair, PairMember
from rq4lens.models.prompts.prompt_set import FIT_SPLIT, MEASURE_SPLIT, PromptSet
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.patch import SELF, Engine, Patch, Sources
from rq4lens.validation.attended import AttendedInputs
from rq4lens.validation.planting import ChangeKind, PlantedPair, WeightName

Among = Literal["all", "mattering"]


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
            the base model, as :class:`BaseHeads` says.
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
class LayerCost:
    """What replacing activations by their means costs: all heads of a layer, each value head."""

    layer: int
    full_nats: float
    group_nats: Float64[ndarray, " value_head"]

    def mattering(self, at_least: int) -> list[int]:
        """The value heads that matter, most important first."""
        order = np.argsort(-self.group_nats, kind="stable").tolist()
        line = idle_line(self.full_nats, len(order))
        return order[: max(at_least, int((self.group_nats >= line).sum()))]


@dataclass(frozen=True)
class Chosen:
    """The heads of one planted pair, by kind of change, one of each value head.

    ``cost_nats`` is what each of their value heads costs the base model, where that decided.
    """

    layer: int
    heads: Mapping[ChangeKind, tuple[Head, ...]]
    among: Among
    cost_nats: Mapping[Head, float]

    def to_dict(self) -> dict[str, Any]:
        """The choice as JSON."""
        return {
            "layer": self.layer,
            "heads": {kind: [h.label for h in heads] for kind, heads in self.heads.items()},
            "base_cost_nats": {head.label: cost for head, cost in self.cost_nats.items()},
            "among": self.among,
        }


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
        member = PairMember.of(base)
        self._model: Any = base.model
        self._pair = ModelPair("base", member, member, prompts, reading=reading)
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
        return Chosen(layer, heads, among, costs)

    @cached_property
    def layers(self) -> Sequence[int]:
        """The layers that matter."""
        full = np.array([self.cost(layer).full_nats for layer in range(self.n_layers)])
        return np.flatnonzero(full >= IDLE_SHARE * full.mean()).tolist()

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
    """As many changes as there are heads that matter and as leave half of the layer untouched.

    There is one of each kind at least.
    """
    share = min(1.0, min(n_groups / 2, n_candidates) / sum(planted.values()))
    return {kind: max(1, int(count * share)) for kind, count in planted.items()}


def damages_add(measured: MeasuredSets, heads: Sequence[int]) -> bool:
    """Whether each of some heads does harm by its raw patch in whatever company of the others.

    Where one head's damage undoes another's, patching both does less harm than patching one. What
    such a head adds to ``ΔKL`` is negative, and a method that measures heads in the company of
    others ranks it last, whatever was done to it. A head does harm when it adds at least a tenth
    of an even share of what all of the heads do together.

    Args:
        measured: the head sets measured so far; ``KL_raw`` alone counts.
        heads: the heads.
    """
    sets = [s for k in range(len(heads) + 1) for s in combinations(sorted(heads), k)]
    raw = dict(zip(sets, measured.kl_nats(sets)[0].mean(-1).tolist(), strict=True))
    line = idle_line(raw[sets[-1]], len(heads))
    return all(
        raw[tuple(sorted((*company, head)))] - raw[company] >= line
        for company in sets
        for head in heads
        if head not in company
    )


@dataclass(frozen=True)
class Trial:
    """One planted pair, ready to be asked.

    The layer's head sets are measured on the prompts that ranking methods see; on all val prompts,
    for the kinds of heads; and on train prompts, for the size of what was planted.
    """

    scenario: Scenario
    planted: PlantedPair
    chosen: Chosen
    measured: MeasuredSets
    of_kinds: MeasuredSets
    of_truth: MeasuredSets

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        planted: PlantedPair,
        chosen: Chosen,
        pair: ModelPair,
        *,
        n_val: int,
        alpha: float,
    ) -> Trial:
        """Fit the pair's maps and make it ready to be measured."""
        layer, activations = chosen.layer, PairActivations(pair)
        maps = fit_maps(pair, [layer], activations=activations)

        def ready(split: str, n_prompts: int | None = None) -> MeasuredSets:
            rows = range(len(pair.prompts.split(split)))[:n_prompts]
            patching = Patching(split=split)
            experiment = prepare(pair, maps, patching, activations=activations, rows=rows)
            return MeasuredSets.of(experiment, layer, alpha)

        few, every, train = ready(MEASURE_SPLIT, n_val), ready(MEASURE_SPLIT), ready(FIT_SPLIT)
        return cls(scenario, planted, chosen, few, every, train)

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
        idle_below = idle_line(self._kl_raw[-1], self.of_truth.n_heads)
        return f"{kind}, {TOO_SMALL}" if self._kl_raw[head] <= idle_below else kind

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
        raw, mapped = self.of_kinds.kl_nats(self.of_kinds.singles)
        full = float(self.of_kinds.kl_nats([self.of_kinds.everything])[0].mean())
        bootstrap = Bootstrap(self.of_kinds.groups, RESAMPLES, self.planted.how.seed)
        for head in head_kinds(raw, mapped, full, 0.0, bootstrap).heads:
            yield self.scenario.name, self.truth(head.head), head.kind

    def null_alarms(self) -> Iterator[bool]:
        """Whether some head is significant where no map is better than another.

        Two independent noises of one size stand in place of the raw and the mapped activations, so
        that neither repairs what the other breaks.
        """
        experiment, seed = self.measured.experiment, self.planted.how.seed
        assert isinstance(experiment, Experiment)
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
