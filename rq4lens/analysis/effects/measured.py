"""The head sets of one layer and alpha: a view of what a measurer knows and measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import NoReturn

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from rq4lens.config import RankBy
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.patching.measured import Indices, Measurer, MeasuresPatches
from rq4lens.patching.patch import BASE, MAPPED, RAW, TUNED, Effects, Patch, Progress
from rq4lens.results import METRIC_TRANSFERS, GridResult, PatchRow, sign_of

PerPrompt = Float64[ndarray, "condition prompt"]
Site = Float[Tensor, "prompt position head d_head"]


SWAPPED: dict[RankBy, str] = {
    "to_base": BASE,
    "to_tuned": TUNED,
    "metric": BASE,
    "metric_to_tuned": TUNED,
}
"""The directions of transfer, and whose activations are put into the other model."""


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


class MeasuredSets:
    """The effects of head sets of one layer at one alpha; each is measured once.

    Args:
        measurer: measures what is missing.
        layer: the layer.
        alpha: blend strength.
        mapped: the source that counts as mapped.
    """

    def __init__(
        self, measurer: Measurer, layer: int, alpha: float, *, mapped: str = MAPPED
    ) -> None:
        self.measurer = measurer
        self.layer = layer
        self.alpha = alpha
        self.mapped = mapped
        self.n_heads = measurer.n_heads
        self.groups = measurer.groups

    @property
    def sources(self) -> tuple[str, ...]:
        """What each head set is patched with."""
        return RAW, self.mapped

    @property
    def _views(self) -> list[dict[Indices, PatchRow]]:
        known = self.measurer.known
        return [known(self.layer, self.alpha, source) for source in self.sources]

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
    def experiment(self) -> MeasuresPatches | None:
        """What measures; None if nothing more can be measured."""
        source = self.measurer.source
        return None if isinstance(source, GridAlone) else source

    def at(self, alpha: float) -> MeasuredSets:
        """The same layer at another blend strength."""
        return MeasuredSets(self.measurer, self.layer, alpha, mapped=self.mapped)

    def with_mapped(self, sources: Mapping[str, Site]) -> dict[str, MeasuredSets]:
        """The same layer with something else in place of the mapped activations, by its name."""
        views = {}
        for name, source in sources.items():
            measurer = self.measurer.with_sources({(self.layer, name): source})
            views[name] = MeasuredSets(measurer, self.layer, self.alpha, mapped=name)
        return views

    def also(self, sources: Mapping[str, Site]) -> MeasuredSets:
        """The same layer with more sources, by name; nothing is known of it yet."""
        extra = {(self.layer, name): source for name, source in sources.items()}
        return MeasuredSets(self.measurer.with_sources(extra), self.layer, self.alpha)

    def require(self, sets: Iterable[Iterable[int]]) -> list[Indices]:
        """Measure those sets that are missing.

        Args:
            sets: head sets, as head indices in any order.

        Returns:
            The same sets, sorted.

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

    def is_exhausted(self, k: int) -> bool:
        """Whether every set of k heads was measured."""
        return len(self.known(k)) == comb(self.n_heads, k)

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
        return TransferSets(self.measurer, self.layer, direction)


class TransferSets(MeasuredSets):
    """What head sets of one layer carry in one direction: the gap, and what they leave of it.

    Args:
        measurer: measures what is missing.
        layer: the layer.
        direction: one of ``TRANSFERS`` or ``METRIC_TRANSFERS``.
    """

    def __init__(self, measurer: Measurer, layer: int, direction: RankBy) -> None:
        super().__init__(measurer, layer, 1.0)
        self.direction = direction

    @property
    def sources(self) -> tuple[str, ...]:
        """The other model's activations."""
        return (SWAPPED[self.direction],)

    @property
    def gap_nats(self) -> Float64[ndarray, "prompt"]:
        """The gap between the clean models on each prompt."""
        return self._left_of_nothing * self._sign

    @property
    def _left_of_nothing(self) -> Float64[ndarray, "prompt"]:
        nothing = Patch(self.layer, HeadSet.none(self.n_heads), 1.0, *self.sources)
        self.measurer.require([nothing])
        return self._left(())

    @property
    def _sign(self) -> int:
        return sign_of(self._left_of_nothing) if self.direction in METRIC_TRANSFERS else 1

    def kl_nats(self, sets: Iterable[Iterable[int]]) -> tuple[PerPrompt, PerPrompt]:
        """The gap, and what is left of it under each head set, on each prompt."""
        gap, wanted = self.gap_nats, self.require(sets)
        left = np.array([self._left(heads) for heads in wanted]).reshape(-1, len(gap)) * self._sign
        return np.broadcast_to(gap, left.shape), left

    def _left(self, heads: Indices) -> Float64[ndarray, "prompt"]:
        row = self._views[0][heads]
        left = row.gap_left_nats
        if self.direction in METRIC_TRANSFERS:
            other = self._of_other.metric
            left = None if row.metric is None or other is None else row.metric - other
        if left is None:
            raise UserError("transfer was not measured: give an experiment that has both models.")
        return left

    @property
    def _of_other(self) -> PatchRow:
        """The other model with nothing patched."""
        source = TUNED if self.sources == (BASE,) else BASE
        nothing = Patch(self.layer, HeadSet.none(self.n_heads), 1.0, source)
        self.measurer.require([nothing])
        return self.measurer.known(self.layer, 1.0, source)[()]


def prefixes(heads: Iterable[int]) -> list[Indices]:
    """The first 0, 1, 2, ... heads of a ranking."""
    order = tuple(int(head) for head in heads)
    return [order[:k] for k in range(len(order) + 1)]
