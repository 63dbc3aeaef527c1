"""One layer of a run as every table of its analysis reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.effects.measured import MeasuredSets, TransferSets
from rq4lens.analysis.effects.table import bootstrap_of, grid_full_effect
from rq4lens.analysis.rankings.agreement import Scored
from rq4lens.analysis.records import FullEffect
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Resampled
from rq4lens.patching.measured import MeasuresPatches
from rq4lens.results import METRIC_TRANSFERS, TRANSFERS, GridResult, RankBy

PerPrompt = Float64[ndarray, "head prompt"]


@dataclass(frozen=True)
class MeasuredLayer:
    """The measured head sets of one layer, and how tables of them are made.

    Args:
        full: the full effect, the denominator of every coverage.
        ks: sizes of the head sets in tables.
        gap_nats: the gap to base of the clean models; None if it was not measured.
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
        full = grid_full_effect(grid, bootstrap)
        measured = MeasuredSets.of_grid(grid, experiment)
        nothing = grid["none"].transfer if "none" in grid.conditions else None
        gap_nats = None if nothing is None else nothing.left_nats("to_base")
        return cls(measured, full, bootstrap, patching.k, patching.rank_by, gap_nats)

    def transfer(self, direction: RankBy, full: FullEffect) -> MeasuredLayer:
        """The same layer by what its heads carry of a gap in one direction."""
        measured = self.measured.transfer(direction)
        return replace(self, measured=measured, full=full, rank_by=direction)

    @property
    def ranked_on(self) -> MeasuredSets:
        """What single heads are ranked by: their transfer, or the layer's own effects."""
        swapped = self.rank_by in TRANSFERS or self.rank_by in METRIC_TRANSFERS
        by_transfer = swapped and not isinstance(self.measured, TransferSets)
        return self.measured.transfer(self.rank_by) if by_transfer else self.measured

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

    @cached_property
    def resampled_singles(self) -> Resampled:
        """Mean ``ΔKL`` of single heads in every resample."""
        return self.bootstrap.resampled(self.single_deltas)

    def scored(self, name: str = "delta") -> Scored:
        """Exact single-head ``ΔKL``, with which other rankings are compared."""
        return Scored(name, self.single_deltas.mean(-1), self.resampled_singles)
