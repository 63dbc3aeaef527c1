"""Every head set of one layer and alpha that was measured, and measuring what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.patching.experiment import HeadSetEffects
from rq4lens.patching.patch import MAPPED, Progress
from rq4lens.results import ConditionResult, GridResult

CHUNK = 1024
"""Head sets measured in one call; bounds the memory of their results."""

PerPrompt = Float64[ndarray, "condition prompt"]
Indices = tuple[int, ...]


@runtime_checkable
class MeasuresHeadSets(Protocol):
    """Whatever can measure head sets: an :class:`~rq4lens.patching.experiment.Experiment`."""

    @property
    def groups(self) -> tuple[str, ...]:
        """The group of each prompt."""

    @property
    def n_heads(self) -> int:
        """Heads per layer."""

    def measure(
        self,
        layer: int,
        head_sets: Sequence[HeadSet],
        alpha: float,
        *,
        mapped: str = MAPPED,
        progress: Progress | None = None,
    ) -> HeadSetEffects:
        """Patch each head set by itself, raw and mapped."""


class MeasuredSets:
    """The effects of head sets of one layer at one alpha; each is measured once.

    Args:
        experiment: measures what is missing; None if nothing more can be measured.
        layer: the layer.
        alpha: blend strength.
        n_heads: heads of the layer.
        groups: the group of each prompt.
        mapped: the source that counts as mapped.
        progress: called with the number of rows (prompt x patch) just finished.
    """

    def __init__(
        self,
        experiment: MeasuresHeadSets | None,
        layer: int,
        alpha: float,
        *,
        n_heads: int,
        groups: tuple[str, ...],
        mapped: str = MAPPED,
        progress: Progress | None = None,
    ) -> None:
        self.experiment = experiment
        self.layer = layer
        self.alpha = alpha
        self.n_heads = n_heads
        self.groups = groups
        self.mapped = mapped
        self.progress = progress
        nothing = np.zeros(len(groups))
        self._effects: dict[Indices, tuple[ndarray, ndarray]] = {(): (nothing, nothing)}

    @classmethod
    def of(
        cls,
        experiment: MeasuresHeadSets,
        layer: int,
        alpha: float,
        *,
        mapped: str = MAPPED,
        progress: Progress | None = None,
    ) -> MeasuredSets:
        """Nothing measured yet."""
        return cls(
            experiment,
            layer,
            alpha,
            n_heads=experiment.n_heads,
            groups=experiment.groups,
            mapped=mapped,
            progress=progress,
        )

    @classmethod
    def of_grid(
        cls,
        grid: GridResult,
        experiment: MeasuresHeadSets | None = None,
        progress: Progress | None = None,
    ) -> MeasuredSets:
        """What a grid measured at its main layer; the experiment can add to it."""
        settings = grid.settings
        measured = cls(
            experiment,
            settings.layer,
            settings.patching.alpha,
            n_heads=grid.n_heads,
            groups=grid.groups,
            progress=progress,
        )
        for condition in grid.conditions.values():
            measured._take_over(condition)
        return measured

    def _take_over(self, condition: ConditionResult) -> None:
        # "self" patches the tuned activations into themselves: it is no raw and mapped pair.
        if condition.layer == self.layer and condition.cond not in {"self", "none"}:
            effects = (condition.kl_raw_nats, condition.kl_mapped_nats)
            self._effects.setdefault(condition.heads.indices, effects)

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
        missing = [heads for heads in dict.fromkeys(wanted) if heads not in self._effects]
        for start in range(0, len(missing), CHUNK):
            self._measure(missing[start : start + CHUNK])
        return wanted

    def _measure(self, sets: Sequence[Indices]) -> None:
        if self.experiment is None:
            raise UserError(
                f"head set {HeadSet(sets[0], self.n_heads)} was not measured: give the experiment "
                "too, so that it can be."
            )
        effects = self.experiment.measure(
            self.layer,
            [HeadSet(heads, self.n_heads) for heads in sets],
            self.alpha,
            mapped=self.mapped,
            progress=self.progress,
        )
        rows = zip(effects.kl_raw_nats, effects.kl_mapped_nats, strict=True)
        self._effects.update(zip(sets, rows, strict=True))

    def kl_nats(self, sets: Iterable[Iterable[int]]) -> tuple[PerPrompt, PerPrompt]:
        """``KL_raw`` and ``KL_mapped`` of head sets on each prompt."""
        effects = [self._effects[heads] for heads in self.require(sets)]
        both = np.array(effects).reshape(-1, 2, len(self.groups))  # also of no sets at all
        return both[:, 0], both[:, 1]

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
        return [heads for heads in self._effects if len(heads) == k]

    def is_exhausted(self, k: int) -> bool:
        """Whether every set of k heads was measured."""
        return len(self.known(k)) == comb(self.n_heads, k)

    @property
    def n_measured(self) -> int:
        """How many head sets were measured, the empty one aside."""
        return len(self._effects) - 1


def prefixes(heads: Iterable[int]) -> list[Indices]:
    """The first 0, 1, 2, ... heads of a ranking."""
    order = tuple(int(head) for head in heads)
    return [order[:k] for k in range(len(order) + 1)]
