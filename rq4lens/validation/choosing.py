"""Choosing the heads of a base model that changes are planted in: those that matter to it.

No rule can find a change of a head that does nothing. Heads are therefore drawn among those that
the base model misses, by a rule that sees the base model alone: a head matters when replacing its
activations by their mean over the prompts costs at least a tenth of an even share of what it costs
to replace the whole layer's, and a layer matters when that costs at least a tenth of an even share
of all layers together. It is the line below which :mod:`rq4lens.analysis.structure.heads` calls a
head idle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, combinations
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.structure.heads import IDLE_SHARE, idle_line
from rq4lens.config import Reading
from rq4lens.heads import Head, HeadSet
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import ModelPair, PairMember
from rq4lens.models.prompts.prompt_set import FIT_SPLIT, MEASURE_SPLIT, PromptSet
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.patch import Engine, Patch, Sources
from rq4lens.validation.attended import AttendedInputs
from rq4lens.validation.planting import ChangeKind

Among = Literal["all", "mattering"]


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs the base model when activations are replaced by their means.

    Args:
        layer: the layer.
        full_nats: cost of replacing all heads.
        group_nats: cost of replacing each value head: one head, or all that share it.
    """

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
    """The heads of one planted pair, and what the base model says of them.

    Args:
        layer: the layer.
        heads: the heads to change, by kind of change; one of each value head.
        among: what they were drawn from.
        cost_nats: what each of their value heads costs the base model, where that decided.
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
        candidates = (
            list(range(self.n_groups))
            if everywhere
            else self.cost(layer).mattering(at_least=len(planted))
        )
        width = self.n_heads // self.n_groups
        order = iter(rng.permutation(candidates).tolist())
        heads = {
            kind: tuple(Head(layer, width * next(order)) for _ in range(count))
            for kind, count in fitted(planted, self.n_groups, len(candidates)).items()
        }
        return Chosen(layer, heads, among, self._costs(heads) if not everywhere else {})

    @cached_property
    def layers(self) -> Sequence[int]:
        """The layers that matter."""
        full = np.array([self.cost(layer).full_nats for layer in range(self.n_layers)])
        return np.flatnonzero(full >= IDLE_SHARE * full.mean()).tolist()

    def _costs(self, heads: Mapping[ChangeKind, tuple[Head, ...]]) -> dict[Head, float]:
        width = self.n_heads // self.n_groups
        return {
            head: float(self.cost(head.layer).group_nats[head.index // width])
            for head in chain.from_iterable(heads.values())
        }

    def _cost(self, layer: int) -> LayerCost:
        z = self._engine.tuned_z(layer)
        sources = Sources({(layer, "mean"): z.mean(0, keepdim=True).expand_as(z).contiguous()})
        width = self.n_heads // self.n_groups
        groups = [range(start, start + width) for start in range(0, self.n_heads, width)]
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
