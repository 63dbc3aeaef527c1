"""The coverage table: top-k heads beside random, cross-fitted and best sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rq4lens.analysis.coverage.curves import CrossFit, cross_fitted_curve, ranking_curve
from rq4lens.analysis.coverage.random_sets import (
    RandomRankings,
    band_holds,
    cross_fitted_p_value,
    deltas_of,
    described,
    random_band,
    random_sets,
    untestable_because,
)
from rq4lens.analysis.effects.measured import Indices, MeasuredLayer
from rq4lens.analysis.records import NOT_MEASURED, CoverageRow, DirectionCoverage, RandomSets
from rq4lens.analysis.statistics.bootstrap import Estimate, exact, undefined
from rq4lens.config import AnalysisEffort
from rq4lens.results import GridResult, HeadRanking

RANDOM_SHARES = ("mean_pct", "mean_error_pct", "band_low_pct", "band_high_pct", "band_holds_pct")
ROW_SHARES = ("random_mean_pct", "random_low_pct", "random_high_pct", "best_coverage_pct")
FROZEN = "resampling keeps the rankings, and optimism comes from choosing them"


@dataclass(frozen=True)
class CoverageInputs:
    """What a coverage table is made from; ``seed_sets`` are the run's own random sets, by size.

    The sizes of random sets in ``effort`` hold those that are shown.
    """

    layer: MeasuredLayer
    ranking: HeadRanking
    effort: AnalysisEffort
    seed_sets: Mapping[int, Mapping[int, Indices]]

    @property
    def random_ks(self) -> tuple[int, ...]:
        """The sizes of random sets, in ascending order."""
        return self.effort.random_ks or ()

    @cached_property
    def cross_fit(self) -> CrossFit:
        """Rankings made on halves of the prompts."""
        return CrossFit.of(self.layer, self.effort.n_splits)

    @cached_property
    def rankings(self) -> RandomRankings:
        """Random rankings: their first k heads are the random sets of size k, for every k."""
        layer, whole = self.layer, self.layer.full_delta
        n_sets, seed = self.effort.n_random_sets, layer.bootstrap.seed
        drawn = RandomRankings.draw(layer.measured, n_sets, seed)
        return drawn if whole is None else drawn.until_precise(self.random_ks, whole)

    def absent(self, *shares: str) -> dict[str, str]:
        """Why shares of the full effect and p-values are missing, where they are."""
        no_share = self.layer.full.undefined_because or NOT_MEASURED
        p_values = dict.fromkeys(("p_value", "p_value_min"), self.untested_because or "")
        return {**dict.fromkeys(shares, no_share), **p_values}

    @property
    def untested_because(self) -> str | None:
        """Why cross-fitted numbers or p-values are missing; None when they are not."""
        if self.layer.measured.experiment is None:
            return NOT_MEASURED
        return untestable_because(self.cross_fit)


def seed_sets(grid: GridResult) -> dict[int, dict[int, Indices]]:
    """The grid's own random sets, by size and seed."""
    seeds = grid.settings.patching.random_seeds
    return {
        k: {seed: grid[f"rand{k}_s{seed}"].heads.indices for seed in seeds}
        for k in grid.settings.patching.k
    }


def coverage_of_grid(inputs: CoverageInputs) -> DirectionCoverage:
    """The coverage table from the grid's own conditions alone."""
    layer = inputs.layer
    missing = undefined(layer.full.undefined_because or NOT_MEASURED)
    random = []
    for k in layer.ks:
        of_seeds = deltas_of(layer.measured, inputs.seed_sets.get(k, {}))
        found = described(k, np.array(list(of_seeds.values())), layer.full_delta, of_seeds)
        random.append(replace(found, reasons=inputs.absent(*RANDOM_SHARES)))
    plain = zip(_coverage_of_top(inputs), random, strict=True)
    rows = tuple(_row(inputs, each, missing, sets) for each, sets in plain)
    drawn = tuple(sets for sets in random if sets.n_subsets)
    return DirectionCoverage(layer.rank_by, layer.full, rows, (), drawn)


def _coverage_of_top(inputs: CoverageInputs) -> list[Estimate]:
    """Coverage of the top k, for each k of the table."""
    layer, measured = inputs.layer, inputs.layer.measured
    if layer.full.undefined_because is not None:
        return [undefined(layer.full.undefined_because)] * len(layer.ks)
    delta_nats = measured.delta_nats([inputs.ranking.top(k) for k in layer.ks])
    estimates = layer.bootstrap.percent(layer.whole_nats, delta_nats)
    # All heads cover everything, however they are ranked.
    return [
        exact(100.0) if k == measured.n_heads and layer.all_is_whole else estimate
        for k, estimate in zip(layer.ks, estimates, strict=True)
    ]


def coverage(inputs: CoverageInputs) -> DirectionCoverage:
    """The coverage table with curves, random sets and cross-fitting."""
    layer, cross_fit = inputs.layer, inputs.cross_fit
    random = _with_band(inputs, [_judged(inputs, k) for k in inputs.random_ks])
    plain = ranking_curve(inputs.ranking, layer)
    missing = undefined(layer.full.undefined_because or cross_fit.undefined_because or "")
    curves, crossed = [plain], (missing,) * len(plain.coverage_pct)
    if cross_fit.undefined_because is None:
        name = f"{inputs.ranking.method} (cross-fitted)"
        curves.append(cross_fitted_curve(name, cross_fit, layer))
        crossed = curves[1].coverage_pct
    by_k = {sets.k: sets for sets in random}
    rows = tuple(_row(inputs, plain.coverage_pct[k], crossed[k], by_k[k]) for k in layer.ks)
    return DirectionCoverage(layer.rank_by, layer.full, rows, tuple(curves), tuple(random))


def _judged(inputs: CoverageInputs, k: int) -> RandomSets:
    """Random sets of one size, and how the top k does beside them."""
    seeds = inputs.seed_sets.get(k, {})
    random = random_sets(inputs.rankings, k, inputs.layer.full_delta, seeds)
    random = replace(random, reasons=inputs.absent(*RANDOM_SHARES))
    if inputs.untested_because is not None:
        return random
    tested = cross_fitted_p_value(inputs.cross_fit, k, inputs.rankings.average_nats(k))
    return replace(random, p_value=tested.value, p_value_min=tested.smallest)


def _with_band(inputs: CoverageInputs, random: list[RandomSets]) -> list[RandomSets]:
    full_delta = inputs.layer.full_delta
    if full_delta is None or not random:
        return random
    delta = np.stack([inputs.rankings.delta(sets.k) for sets in random], axis=1)
    ends = np.transpose(random_band(100 / full_delta * delta)).tolist()
    holds = band_holds(delta) if len(delta) > 1 else None
    return [
        replace(sets, band_low_pct=low, band_high_pct=high, band_holds_pct=holds)
        for sets, (low, high) in zip(random, ends, strict=True)
    ]


def _row(
    inputs: CoverageInputs, plain: Estimate, crossed: Estimate, random: RandomSets
) -> CoverageRow:
    optimism = crossed
    if plain.value is not None and crossed.value is not None:
        optimism = Estimate(plain.value - crossed.value, None, FROZEN)
    return CoverageRow(
        k=random.k,
        ranking=inputs.ranking.method,
        heads=inputs.ranking.top(random.k),
        coverage_pct=plain,
        cross_fitted_coverage_pct=crossed,
        optimism_pct=optimism,
        p_value=random.p_value,
        p_value_min=random.p_value_min,
        n_subsets=random.n_subsets,
        exhaustive=random.exhaustive,
        random_mean_pct=random.mean_pct,
        random_low_pct=random.quantiles_pct.get("0.025"),
        random_high_pct=random.quantiles_pct.get("0.975"),
        reason=inputs.untested_because,
        reasons=inputs.absent(*ROW_SHARES),
    )
