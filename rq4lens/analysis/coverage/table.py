"""The coverage table: top-k heads beside random, cross-fitted and best-found sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from rq4lens.analysis.coverage.cross_fitted import CrossFit, cross_fitted_curve
from rq4lens.analysis.coverage.curves import ranking_curve
from rq4lens.analysis.coverage.random_sets import (
    RandomBand,
    RandomRankings,
    cross_fitted_p_value,
    describe,
    random_band,
    random_sets,
    untestable_because,
)
from rq4lens.analysis.effects.measured import Indices, MeasuredSets
from rq4lens.analysis.records import (
    NOT_MEASURED,
    CoverageCurve,
    CoverageRow,
    FullEffect,
    RandomSets,
)
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, exact, undefined
from rq4lens.results import GridResult, HeadRanking, RankBy

RANDOM_SHARES = ("mean_pct", "band_low_pct", "band_high_pct")
ROW_SHARES = ("random_mean_pct", "random_low_pct", "random_high_pct", "best_coverage_pct")
FROZEN = "resampling keeps the rankings, and optimism comes from choosing them"


@dataclass(frozen=True)
class Coverage:
    """Coverage of one ranking, with everything it is to be compared with.

    Args:
        rows: the coverage table, a row a k.
        curves: the plain and the cross-fitted curve; empty without an experiment.
        random: random head sets by size, of more sizes than the table has rows.
    """

    rows: tuple[CoverageRow, ...]
    curves: tuple[CoverageCurve, ...]
    random: tuple[RandomSets, ...]

    def with_best(self, best: CoverageCurve) -> Coverage:
        """The same beside the best sets found."""
        rows = tuple(
            replace(
                row,
                best_heads=best.head_sets[row.k],
                best_coverage_pct=best.coverage_pct[row.k].value,
            )
            for row in self.rows
        )
        return replace(self, rows=rows, curves=(*self.curves, best))


@dataclass(frozen=True)
class CoverageStudy:
    """What a coverage table is made from.

    Args:
        ranking: the ranking whose top k is shown.
        rank_by: the score by which halves of the prompts are ranked.
        ks: the sizes shown.
        random_ks: the sizes of random sets, in ascending order; those shown are among them.
        seed_sets: the run's own random sets, by size and seed.
        measured: the head sets measured so far.
        full: the full effect.
        bootstrap: the resamples.
        n_random_sets: random sets drawn of each size that has more.
        n_splits: random half splits behind the cross-fitted numbers.
        seed: seed of splits and draws.
    """

    ranking: HeadRanking
    rank_by: RankBy
    ks: tuple[int, ...]
    random_ks: tuple[int, ...]
    seed_sets: Mapping[int, Mapping[int, Indices]]
    measured: MeasuredSets
    full: FullEffect
    bootstrap: Bootstrap
    n_random_sets: int = 1000
    n_splits: int = 5
    seed: int = 0

    @property
    def full_delta(self) -> float | None:
        """``ΔKL(ALL)``, or None when it cannot be a denominator."""
        return None if self.full.undefined_because else self.full.delta.value

    @cached_property
    def cross_fit(self) -> CrossFit:
        """Rankings made on halves of the prompts."""
        return CrossFit.of(self.measured, self.rank_by, self.n_splits, self.seed)

    @cached_property
    def rankings(self) -> RandomRankings:
        """Random rankings: their first k heads are the random sets of size k, for every k."""
        return RandomRankings.draw(self.measured, self.n_random_sets, self.seed)

    def top(self, k: int) -> Indices:
        """The top k heads, best first."""
        return self.ranking.top(k)

    def absent(self, *shares: str) -> dict[str, str]:
        """Why shares of the full effect and p-values are missing, where they are."""
        no_share = self.full.undefined_because or NOT_MEASURED
        p_values = dict.fromkeys(("p_value", "p_value_min"), self.untested_because or "")
        return {**dict.fromkeys(shares, no_share), **p_values}

    @property
    def untested_because(self) -> str | None:
        """Why cross-fitted numbers or p-values are missing; None when they are not."""
        return (
            NOT_MEASURED if self.measured.experiment is None else untestable_because(self.cross_fit)
        )


def seed_sets(grid: GridResult) -> dict[int, dict[int, Indices]]:
    """The grid's own random sets, by size and seed."""
    seeds = grid.settings.patching.random_seeds
    return {
        k: {seed: grid[f"rand{k}_s{seed}"].heads.indices for seed in seeds}
        for k in grid.settings.patching.k
    }


def coverage_of_grid(study: CoverageStudy) -> Coverage:
    """The coverage table from the grid's own conditions alone."""
    random = {k: _of_seeds(study, k) for k in study.ks if study.seed_sets.get(k)}
    sets = study.measured.delta_nats([study.top(k) for k in study.ks])
    missing = undefined(study.full.undefined_because or NOT_MEASURED)
    rows = tuple(
        _row(study, k, Selection(_by_definition(study, k, plain), missing, missing), random.get(k))
        for k, plain in zip(study.ks, _coverage_of(study, sets), strict=True)
    )
    return Coverage(rows, (), tuple(random.values()))


def _of_seeds(study: CoverageStudy, k: int) -> RandomSets:
    """The run's own random sets as all that is known of random sets of that size."""
    sets = study.seed_sets[k]
    delta = study.measured.delta(sets.values())
    of_seeds = dict(zip(sets, delta.tolist(), strict=True))
    random = describe(k, delta, False, full_delta=study.full_delta, of_seeds=of_seeds)
    return replace(random, reasons=study.absent(*RANDOM_SHARES))


def coverage(study: CoverageStudy) -> Coverage:
    """The coverage table with curves, random sets and cross-fitting."""
    random = tuple(_judged(study, k) for k in study.random_ks)
    band = _band(study)
    if band is not None:
        random = tuple(
            replace(sets, band_low_pct=low, band_high_pct=high)
            for sets, low, high in zip(random, band.low_pct, band.high_pct, strict=True)
        )
    plain = ranking_curve(study.ranking, study.measured, study.full, study.bootstrap)
    crossed = _cross_fitted(study)
    by_k = {sets.k: sets for sets in random}
    rows = tuple(
        _row(study, k, selection, by_k[k])
        for k, selection in zip(study.ks, _selections(study, plain, crossed), strict=True)
    )
    curves = (plain,) if crossed is None else (plain, crossed)
    return Coverage(rows, curves, random)


def _judged(study: CoverageStudy, k: int) -> RandomSets:
    """Random sets of one size, and how the top k does beside them."""
    seeds = dict(study.seed_sets.get(k, {}))
    random = random_sets(study.rankings, k, full_delta=study.full_delta, seeds=seeds)
    random = replace(random, reasons=study.absent(*RANDOM_SHARES))
    if study.untested_because is not None:
        return random
    tested = cross_fitted_p_value(study.cross_fit, k, study.rankings.average_nats(k))
    return replace(random, p_value=tested.value, p_value_min=tested.smallest)


def _band(study: CoverageStudy) -> RandomBand | None:
    if study.full_delta is None or not study.random_ks:
        return None
    random_pct = np.stack([study.rankings.delta(k) for k in study.random_ks], axis=1)
    observed = study.measured.delta([study.top(k) for k in study.random_ks])
    scale = 100 / study.full_delta
    return random_band(scale * random_pct, scale * observed)


class Selection(NamedTuple):
    """Coverage of the top k with and without choosing them on the prompts they are scored on."""

    coverage_pct: Estimate
    cross_fitted_coverage_pct: Estimate
    optimism_pct: Estimate


def _cross_fitted(study: CoverageStudy) -> CoverageCurve | None:
    if study.cross_fit.undefined_because is not None:
        return None
    name = f"{study.ranking.method} (cross-fitted)"
    return cross_fitted_curve(name, study.cross_fit, study.full, study.bootstrap)


def _selections(
    study: CoverageStudy, plain: CoverageCurve, crossed: CoverageCurve | None
) -> list[Selection]:
    """One for each size of the table."""
    if crossed is None:
        missing = undefined(study.full.undefined_because or study.cross_fit.undefined_because or "")
        return [Selection(plain.coverage_pct[k], missing, missing) for k in study.ks]
    by_k = zip(plain.coverage_pct, crossed.coverage_pct, strict=True)
    selections = [Selection(*both, _optimism(*both)) for both in by_k]
    return [selections[k] for k in study.ks]


def _optimism(plain: Estimate, crossed: Estimate) -> Estimate:
    """Plain minus cross-fitted coverage, in percentage points."""
    if plain.value is None or crossed.value is None:
        return crossed
    return Estimate(plain.value - crossed.value, None, FROZEN)


def _row(
    study: CoverageStudy, k: int, selection: Selection, random: RandomSets | None
) -> CoverageRow:
    return CoverageRow(
        k=k,
        ranking=study.ranking.method,
        heads=study.top(k),
        reason=study.untested_because,
        reasons=study.absent(*ROW_SHARES),
        **selection._asdict(),
        **_beside(random),
    )


def _beside(random: RandomSets | None) -> dict[str, Any]:
    """What a row says of random sets of its size."""
    quantiles = {} if random is None else random.quantiles_pct
    return {
        **{name: getattr(random, name, None) for name in ("p_value", "p_value_min")},
        "n_subsets": 0 if random is None else random.n_subsets,
        "exhaustive": random is not None and random.exhaustive,
        "random_mean_pct": None if random is None else random.mean_pct,
        "random_low_pct": quantiles.get("0.025"),
        "random_high_pct": quantiles.get("0.975"),
    }


def _coverage_of(study: CoverageStudy, delta_nats: np.ndarray) -> list[Estimate]:
    """``ΔKL`` of some sets as a share of the full effect, on the shared resamples."""
    if study.full.undefined_because is not None:
        return [undefined(study.full.undefined_because)] * len(delta_nats)
    full = study.measured.delta_nats([study.measured.everything])
    values = np.concatenate([full, delta_nats])
    return study.bootstrap.estimate(values, lambda m: 100 * m[..., 1:] / m[..., :1])


def _by_definition(study: CoverageStudy, k: int, estimate: Estimate) -> Estimate:
    """All heads cover everything, however they are ranked."""
    whole = k == study.measured.n_heads and estimate.value is not None
    return exact(100.0) if whole else estimate
