"""One layer of a run as every table of its analysis reads it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.effects.table import bootstrap_of, grid_full_effect
from rq4lens.analysis.rankings.agreement import Scored
from rq4lens.analysis.records import FullEffect
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Resampled
from rq4lens.patching.measured import MeasuresPatches
from rq4lens.results import GridResult, RankBy

PerPrompt = Float64[ndarray, "head prompt"]


@dataclass(frozen=True)
class MeasuredLayer:
    """The measured head sets of one layer, and how tables of them are made.

    Args:
        full: the full effect, the denominator of every coverage.
        ks: sizes of the head sets in tables.
    """

    measured: MeasuredSets
    full: FullEffect
    bootstrap: Bootstrap
    ks: tuple[int, ...]
    rank_by: RankBy

    @classmethod
    def of_grid(cls, grid: GridResult, experiment: MeasuresPatches | None = None) -> MeasuredLayer:
        """The main layer of a grid; the experiment can measure more."""
        bootstrap, patching = bootstrap_of(grid), grid.settings.patching
        full = grid_full_effect(grid, bootstrap)
        measured = MeasuredSets.of_grid(grid, experiment)
        return cls(measured, full, bootstrap, patching.k, patching.rank_by)

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

    @cached_property
    def resampled_singles(self) -> Resampled:
        """Mean ``ΔKL`` of single heads in every resample."""
        return self.bootstrap.resampled(self.single_deltas)

    def scored(self, name: str = "delta") -> Scored:
        """Exact single-head ``ΔKL``, with which other rankings are compared."""
        return Scored(name, self.single_deltas.mean(-1), self.resampled_singles)
