"""The head sets of one layer: what a measurer knows of them, and as tables read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import NoReturn

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from rq4lens.analysis.effects.table import bootstrap_of, grid_full_effect
from rq4lens.analysis.rankings.agreement import Scored
from rq4lens.analysis.records import FullEffect
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.config import RankBy
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.patching.measured import Indices, Measurer, MeasuresPatches
from rq4lens.patching.patch import BASE, MAPPED, RAW, TUNED, Effects, Patch, Progress
from rq4lens.results import METRIC_TRANSFERS, SWAPPED, GridResult, PatchRow, sign_of

PerPrompt = Float64[ndarray, "condition prompt"]
Site = Float[Tensor, "prompt position head d_head"]


class GridAlone:
    """Stands for an experiment where a grid is all there is: it measures nothing."""

    def __init__(self, grid: GridResult) -> None:
        self.groups = grid.groups
        self.n_heads = grid.n_heads

    def effects(self, patches: Sequence[Patch], progress: Progress | None = None) -> NoReturn:  # noqa: ARG002
        """Refuse."""
        raise UserError(
            f"head set {patches[0].heads} was not measured: give the experiment too, so that it "
            "can be."
        )


@dataclass(frozen=True, eq=False)
class MeasuredSets:
    """The effects of head sets of one layer at one alpha; each is measured once.

    Args:
        measurer: measures what is missing.
        layer: the layer.
        alpha: blend strength.
        mapped: the source that counts as mapped.
    """

    measurer: Measurer
    layer: int
    alpha: float
    mapped: str = MAPPED

    @classmethod
    def of(cls, source: MeasuresPatches, layer: int, alpha: float) -> MeasuredSets:
        """A view of a measurer, or of an experiment with nothing measured yet."""
        return cls(Measurer.of(source), layer, alpha)

    @classmethod
    def of_grid(cls, grid: GridResult, source: MeasuresPatches | None = None) -> MeasuredSets:
        """What a grid measured at its main layer; an experiment or measurer can add to it."""
        measurer = Measurer.of(GridAlone(grid) if source is None else source)
        measurer.take_over(grid)
        return cls(measurer, grid.settings.layer, grid.settings.patching.alpha)

    @property
    def n_heads(self) -> int:
        """Heads of the layer."""
        return self.measurer.n_heads

    @property
    def groups(self) -> tuple[str, ...]:
        """The group of each prompt."""
        return self.measurer.groups

    @property
    def sources(self) -> tuple[str, ...]:
        """What each head set is patched with."""
        return RAW, self.mapped

    @property
    def _views(self) -> list[dict[Indices, PatchRow]]:
        known = self.measurer.known
        return [known(self.layer, self.alpha, source) for source in self.sources]

    @property
    def experiment(self) -> MeasuresPatches | None:
        """What measures; None if nothing more can be measured."""
        source = self.measurer.source
        return None if isinstance(source, GridAlone) else source

    def at(self, alpha: float) -> MeasuredSets:
        """The same layer at another blend strength."""
        return replace(self, alpha=alpha)

    def also(self, sources: Mapping[str, Site]) -> MeasuredSets:
        """The same layer with more sources, by name; nothing is known of it yet."""
        extra = {(self.layer, name): source for name, source in sources.items()}
        return replace(self, measurer=self.measurer.with_sources(extra))

    def require(self, sets: Iterable[Iterable[int]]) -> list[Indices]:
        """Measure those sets, head indices in any order, that are missing; the same sets, sorted.

        Raises:
            UserError: if some are missing and there is no experiment to measure them with.
        """
        wanted = [tuple(sorted({int(head) for head in heads})) for heads in sets]
        missing = [heads for heads in dict.fromkeys(wanted) if heads and not self._has(heads)]
        patches = [
            Patch(self.layer, head_set, self.alpha, source)
            for head_set in (HeadSet(heads, self.n_heads) for heads in missing)
            for source in self.sources
        ]
        self.measurer.require(patches)
        return wanted

    def _has(self, heads: Indices) -> bool:
        return all(heads in view for view in self._views)

    def kl_nats(self, sets: Iterable[Iterable[int]]) -> tuple[PerPrompt, PerPrompt]:
        """``KL_raw`` and ``KL_mapped`` of head sets on each prompt."""
        wanted, nothing = self.require(sets), np.zeros(len(self.groups))
        raw, mapped = (
            [known[heads].kl_nats if heads else nothing for heads in wanted]
            for known in self._views
        )
        both = np.array([raw, mapped]).reshape(2, -1, len(self.groups))  # also of no sets at all
        return both[0], both[1]

    def delta_nats(self, sets: Iterable[Iterable[int]]) -> PerPrompt:
        """``ΔKL`` of head sets on each prompt."""
        raw, mapped = self.kl_nats(sets)
        return raw - mapped

    def delta(self, sets: Iterable[Iterable[int]]) -> Float64[ndarray, "condition"]:
        """Mean ``ΔKL`` of head sets."""
        return self.delta_nats(sets).mean(-1)

    @property
    def everything(self) -> Indices:
        """All heads."""
        return tuple(range(self.n_heads))

    @property
    def singles(self) -> list[Indices]:
        """Each head by itself."""
        return [(head,) for head in range(self.n_heads)]

    @property
    def pairs(self) -> list[Indices]:
        """Each pair of heads."""
        return list(combinations(range(self.n_heads), 2))

    def known(self, k: int) -> list[Indices]:
        """The sets of k heads that were measured so far."""
        if k == 0:
            return [()]
        return [heads for heads in self._views[-1] if len(heads) == k and self._has(heads)]

    @property
    def n_measured(self) -> int:
        """How many head sets were measured, the empty one aside."""
        return sum(1 for heads in self._views[-1] if heads and self._has(heads))

    def effects_of(self, source: str, sets: Iterable[Iterable[int]]) -> Effects:
        """Effects of putting a source in place of head sets."""
        chosen = [HeadSet.of(heads, self.n_heads) for heads in sets]
        patches = [Patch(self.layer, heads, self.alpha, source) for heads in chosen]
        return self.measurer.effects(patches)

    def of_source(self, source: str, sets: Iterable[Iterable[int]]) -> PerPrompt:
        """Damage of putting a source in place of head sets, ``KL``, on each prompt."""
        return self.effects_of(source, sets).kl_nats

    def transfer(self, direction: RankBy) -> TransferSets:
        """What head sets of the layer carry in one direction."""
        return TransferSets(self.measurer, self.layer, 1.0, direction=direction)

    def ranked_by(self, rank_by: RankBy) -> MeasuredSets:
        """What single heads are ranked by: what they carry, or their own effects."""
        return self.transfer(rank_by) if rank_by in SWAPPED else self


@dataclass(frozen=True, eq=False, kw_only=True)
class TransferSets(MeasuredSets):
    """What head sets of one layer carry in one direction: the gap, and what they leave of it."""

    direction: RankBy

    @property
    def sources(self) -> tuple[str, ...]:
        """The other model's activations."""
        return (BASE if SWAPPED[self.direction] == "into_tuned" else TUNED,)

    @property
    def gap_nats(self) -> Float64[ndarray, "prompt"]:
        """The gap between the clean models on each prompt."""
        gap = self._left(self._clean(*self.sources))
        return gap * sign_of(gap) if self.direction in METRIC_TRANSFERS else gap

    def kl_nats(self, sets: Iterable[Iterable[int]]) -> tuple[PerPrompt, PerPrompt]:
        """The gap, and what is left of it under each head set, on each prompt."""
        known, before = self._views[0], self._left(self._clean(*self.sources))
        sign = sign_of(before) if self.direction in METRIC_TRANSFERS else 1
        rows = [self._left(known[heads]) for heads in self.require(sets)]
        left = sign * np.array(rows).reshape(-1, len(before))
        return np.broadcast_to(sign * before, left.shape), left

    def _left(self, patched: PatchRow) -> Float64[ndarray, "prompt"]:
        left = patched.gap_left_nats
        if self.direction in METRIC_TRANSFERS:
            there = self._clean(TUNED if self.sources == (BASE,) else BASE).metric
            left = None if patched.metric is None or there is None else patched.metric - there
        if left is None:
            raise UserError("transfer was not measured: give an experiment that has both models.")
        return left

    def _clean(self, source: str) -> PatchRow:
        """The model that a source goes into, with nothing patched."""
        self.measurer.require([Patch(self.layer, HeadSet.none(self.n_heads), 1.0, source)])
        return self.measurer.known(self.layer, 1.0, source)[()]


def prefixes(heads: Iterable[int]) -> list[Indices]:
    """The first 0, 1, 2, ... heads of a ranking."""
    order = tuple(int(head) for head in heads)
    return [order[:k] for k in range(len(order) + 1)]


@dataclass(frozen=True)
class MeasuredLayer:
    """The measured head sets of one layer, and how tables of sizes ``ks`` are made of them.

    ``full`` is the denominator of every coverage; there is no gap where it was not measured.
    """

    measured: MeasuredSets
    full: FullEffect
    bootstrap: Bootstrap
    ks: tuple[int, ...]
    rank_by: RankBy
    gap_nats: Float64[ndarray, "prompt"] | None = None

    @classmethod
    def of_grid(cls, grid: GridResult, experiment: MeasuresPatches | None = None) -> MeasuredLayer:
        """The main layer of a grid; the experiment can measure more."""
        bootstrap, patching = bootstrap_of(grid), grid.settings.patching
        full = grid_full_effect(grid)
        measured = MeasuredSets.of_grid(grid, experiment)
        nothing = grid["none"].transfer if "none" in grid.conditions else None
        gap_nats = None if nothing is None else nothing.left_nats("to_base")
        return cls(measured, full, bootstrap, patching.k, patching.rank_by, gap_nats)

    def transfer(self, direction: RankBy, full: FullEffect) -> MeasuredLayer:
        """The same layer by what its heads carry of a gap in one direction."""
        measured = self.measured.transfer(direction)
        return replace(self, measured=measured, full=full, rank_by=direction)

    @cached_property
    def whole_nats(self) -> Float64[ndarray, "prompt"]:
        """What a coverage is a share of, on each prompt: the effect of all heads, or the gap."""
        if isinstance(self.measured, TransferSets):
            return self.measured.gap_nats
        return self.measured.delta_nats([self.measured.everything])[0]

    @property
    def all_is_whole(self) -> bool:
        """Whether all heads of the layer cover everything by definition."""
        return not isinstance(self.measured, TransferSets)

    @property
    def full_delta(self) -> float | None:
        """``ΔKL(ALL)`` in nats, or None when it cannot be a denominator."""
        return None if self.full.undefined_because else self.full.delta.value

    @cached_property
    def singles(self) -> tuple[PerPrompt, PerPrompt]:
        """``KL_raw`` and ``KL_mapped`` of single heads."""
        return self.measured.kl_nats(self.measured.singles)

    @property
    def single_deltas(self) -> PerPrompt:
        """``ΔKL`` of single heads."""
        raw, mapped = self.singles
        return raw - mapped

    def scored(self, name: str = "delta") -> Scored:
        """Exact single-head ``ΔKL``, with which other rankings are compared."""
        return Scored.of_prompts(name, self.single_deltas, self.bootstrap)
