"""The coverage table: top-k heads beside random, cross-fitted and best-found sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rq4lens.analysis.best_sets import best_subsets
from rq4lens.analysis.crossfit import CrossFit
from rq4lens.analysis.curves import curve_of, ranking_curve
from rq4lens.analysis.measured import Indices, MeasuredSets
from rq4lens.analysis.metrics import FullEffect
from rq4lens.analysis.random_sets import (
    RandomBand,
    RandomRankings,
    describe,
    plain_p_value,
    random_band,
    random_sets,
)
from rq4lens.analysis.records import CoverageCurve, CoverageRow, RandomSets
from rq4lens.analysis.statistics import Bootstrap, Estimate, exact, undefined
from rq4lens.results import GridResult, HeadRanking, RankBy

NO_EXPERIMENT = "only the grid was given: new head sets would have to be measured"


@dataclass(frozen=True)
class Coverage:
    """Coverage of one ranking, with everything it is to be compared with.

    Args:
        rows: the coverage table, a row a k.
        curves: plain, cross-fitted and best-subset curves; empty without an experiment.
        random: random head sets by size, of more sizes than the table has rows.
        random_p_value: probability that a random ranking strays as far, over all sizes at once.
    """

    rows: tuple[CoverageRow, ...]
    curves: tuple[CoverageCurve, ...]
    random: tuple[RandomSets, ...]
    random_p_value: float | None


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
        return RandomRankings.draw(self.cross_fit, self.n_random_sets, self.seed)

    def top(self, k: int) -> Indices:
        """The top k heads, best first."""
        return self.ranking.top(k)

    def plain_estimates(self) -> list[Estimate]:
        """Coverage of the top k, ranked and scored on the same prompts, by k."""
        sets = [self.top(k) for k in self.ks]
        estimates = _coverage_of(self, self.measured.delta_nats(sets))
        return [
            _by_definition(self, k, estimate, 100.0)
            for k, estimate in zip(self.ks, estimates, strict=True)
        ]


def seed_sets(grid: GridResult) -> dict[int, dict[int, Indices]]:
    """The grid's own random sets, by size and seed."""
    seeds = grid.settings.random_seeds
    return {
        k: {seed: grid[f"rand{k}_s{seed}"].heads.indices for seed in seeds}
        for k in grid.settings.ks
    }


def coverage_of_grid(study: CoverageStudy) -> Coverage:
    """The coverage table from the grid's own conditions alone."""
    random = {k: _of_seeds(study, k) for k in study.ks if study.seed_sets.get(k)}
    rows = tuple(
        _row(study, k, estimate, random.get(k), reason=NO_EXPERIMENT)
        for k, estimate in zip(study.ks, study.plain_estimates(), strict=True)
    )
    return Coverage(rows, (), tuple(random.values()), None)


def _of_seeds(study: CoverageStudy, k: int) -> RandomSets:
    """The run's own random sets as all that is known of random sets of that size."""
    sets = study.seed_sets[k]
    delta = study.measured.delta(sets.values())
    of_seeds = dict(zip(sets, delta.tolist(), strict=True))
    random = describe(k, delta, False, full_delta=study.full_delta, of_seeds=of_seeds)
    return _with_plain_p_value(study, random)


def coverage(study: CoverageStudy) -> Coverage:
    """The coverage table with curves, random sets, cross-fitting and the best sets found.

    Args:
        study: what it is made from; its experiment measures what is missing.
    """
    random = tuple(_judged(study, k) for k in study.random_ks)
    band = _band(study)
    if band is not None:
        random = tuple(
            replace(sets, band_low_pct=low, band_high_pct=high)
            for sets, low, high in zip(random, band.low_pct, band.high_pct, strict=True)
        )
    plain = ranking_curve(study.ranking, study.measured, study.full, study.bootstrap)
    best = best_subsets(study.measured, study.full, study.bootstrap)
    rows = _rows(study, {sets.k: sets for sets in random}, best)
    curves = (plain, *_cross_fitted_curve(study), best)
    return Coverage(rows, curves, random, None if band is None else band.p_value)


def _judged(study: CoverageStudy, k: int) -> RandomSets:
    """Random sets of one size, and how often they reach the top k."""
    seeds = dict(study.seed_sets.get(k, {}))
    random = random_sets(study.rankings, k, full_delta=study.full_delta, seeds=seeds)
    random = _with_plain_p_value(study, random)
    if study.cross_fit.undefined_because is not None:
        return random
    crossed = study.rankings.cross_fitted_p_value(k)
    return replace(random, p_value=crossed.value, p_value_min=crossed.smallest)


def _with_plain_p_value(study: CoverageStudy, random: RandomSets) -> RandomSets:
    plain = plain_p_value(random, float(study.measured.delta([study.top(random.k)])[0]))
    return replace(random, plain_p_value=plain.value, plain_p_value_min=plain.smallest)


def _band(study: CoverageStudy) -> RandomBand | None:
    if study.full_delta is None or not study.random_ks:
        return None
    random_pct = np.stack([study.rankings.delta(k) for k in study.random_ks], axis=1)
    observed = study.measured.delta([study.top(k) for k in study.random_ks])
    scale = 100 / study.full_delta
    return random_band(scale * random_pct, scale * observed)


def _cross_fitted_curve(study: CoverageStudy) -> tuple[CoverageCurve, ...]:
    if study.cross_fit.undefined_because is not None:
        return ()
    # The sets differ between halves and splits, so the curve names none.
    sets: list[Indices] = [()] * (study.measured.n_heads + 1)
    name = f"{study.ranking.method} (cross-fitted)"
    return (curve_of(name, sets, study.cross_fit.delta_nats, study.full, study.bootstrap),)


def _rows(
    study: CoverageStudy, random: Mapping[int, RandomSets], best: CoverageCurve
) -> tuple[CoverageRow, ...]:
    reason = study.cross_fit.undefined_because
    rows = []
    for k, estimate in zip(study.ks, study.plain_estimates(), strict=True):
        row = _row(study, k, estimate, random[k], reason=reason)
        best_pct = best.coverage_pct[k].value
        row = replace(row, best_heads=best.head_sets[k], best_coverage_pct=best_pct)
        rows.append(row if reason else _with_cross_fit(study, row))
    return tuple(rows)


def _row(
    study: CoverageStudy,
    k: int,
    estimate: Estimate,
    random: RandomSets | None,
    reason: str | None,
) -> CoverageRow:
    missing = undefined(study.full.undefined_because or reason or "not computed yet")
    quantiles = {} if random is None else random.quantiles_pct
    return CoverageRow(
        k=k,
        ranking=study.ranking.method,
        heads=study.top(k),
        coverage_pct=estimate,
        cross_fitted_coverage_pct=missing,
        optimism_pct=missing,
        p_value=None if random is None else random.p_value,
        p_value_min=None if random is None else random.p_value_min,
        plain_p_value=None if random is None else random.plain_p_value,
        plain_p_value_min=None if random is None else random.plain_p_value_min,
        n_subsets=0 if random is None else random.n_subsets,
        exhaustive=False if random is None else random.exhaustive,
        random_mean_pct=None if random is None else random.mean_pct,
        random_low_pct=quantiles.get("0.025"),
        random_high_pct=quantiles.get("0.975"),
        best_heads=None,
        best_coverage_pct=None,
        reason=reason,
    )


def _with_cross_fit(study: CoverageStudy, row: CoverageRow) -> CoverageRow:
    k = row.k
    plain = study.measured.delta_nats([study.top(k)])[0]
    crossed = study.cross_fit.delta_nats[k]
    cross_fitted, optimism = _coverage_of(study, np.stack([crossed, plain - crossed]))
    if optimism.value is not None and np.allclose(plain, crossed, rtol=1e-12, atol=0):
        optimism = exact(0.0)  # every half chose the heads that all prompts choose
    return replace(
        row,
        cross_fitted_coverage_pct=_by_definition(study, k, cross_fitted, 100.0),
        optimism_pct=_by_definition(study, k, optimism, 0.0),
    )


def _coverage_of(study: CoverageStudy, delta_nats: np.ndarray) -> list[Estimate]:
    """``ΔKL`` of some sets as a share of the full effect, on the shared resamples."""
    if study.full.undefined_because is not None:
        return [undefined(study.full.undefined_because)] * len(delta_nats)
    full = study.measured.delta_nats([study.measured.everything])
    values = np.concatenate([full, delta_nats])
    return study.bootstrap.estimate(values, lambda m: 100 * m[..., 1:] / m[..., :1])


def _by_definition(study: CoverageStudy, k: int, estimate: Estimate, value: float) -> Estimate:
    """All heads cover everything, however they are ranked."""
    whole = k == study.measured.n_heads and estimate.value is not None
    return exact(value) if whole else estimate
