"""The whole analysis of one run, from its grid and the experiment behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rq4lens.analysis.claims import claims
from rq4lens.analysis.coverage.best_sets import best_subsets, interactions
from rq4lens.analysis.coverage.cross_fitted import half_splits
from rq4lens.analysis.coverage.random_sets import random_sizes
from rq4lens.analysis.coverage.table import (
    Coverage,
    CoverageInputs,
    coverage,
    coverage_of_grid,
    seed_sets,
)
from rq4lens.analysis.effects.layer import MeasuredLayer
from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.compared import (
    Methods,
    alignment,
    answer_coverage,
    compare_methods,
    fold_agreement,
    map_kind_agreement,
    metric_agreement,
    seed_agreement,
)
from rq4lens.analysis.rankings.exact import single_ranking
from rq4lens.analysis.rankings.methods import METHODS, Orders, RankingSettings
from rq4lens.analysis.rankings.stability import rank_stability
from rq4lens.analysis.records import (
    Agreement,
    Alignment,
    AlphaPoint,
    Concentration,
    Control,
    CoverageCurve,
    HeadKinds,
    HeadTests,
    Interactions,
    RankStability,
)
from rq4lens.analysis.result import Analysis, AnalysisSettings
from rq4lens.analysis.statistics.concentration import concentration
from rq4lens.analysis.statistics.sign_flips import head_tests
from rq4lens.analysis.structure.alphas import alpha_sweep
from rq4lens.analysis.structure.controls import (
    ControlInputs,
    grid_controls,
    measured_controls,
    random_controls,
)
from rq4lens.analysis.structure.heads import head_kinds
from rq4lens.config import AnalysisEffort
from rq4lens.heads import Head
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.maps.fitting import FitData
from rq4lens.patching.measured import MeasuresPatches
from rq4lens.patching.patch import Progress
from rq4lens.results import GridResult, HeadRanking

PARTS = (
    *("coverage", "compared", "interactions", "alphas", "controls", "alignment"),
    *("agreements", "stability", "tests", "kinds", "concentration", "best"),
)
"""The parts in the order in which they are computed and timed; the best sets are sought last."""


def analyse(
    grid: GridResult,
    experiment: MeasuresPatches | None = None,
    effort: AnalysisEffort | None = None,
    *,
    activations: PairActivations | None = None,
    neutral: MeasuresPatches | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Analyse a grid.

    With the grid alone, everything that its own conditions support is computed. With the experiment
    behind it, new head sets are measured: whole curves, random sets, cross-fitting, interactions,
    the other ranking methods and the controls.

    Args:
        grid: the measured grid.
        experiment: the experiment behind it, or a measurer with what it measured before.
        effort: what is measured and compared beyond the grid. Without sizes of random sets, there
            are as many as can be afforded, see
            :func:`rq4lens.analysis.coverage.random_sets.random_sizes`.
        activations: already captured activations of the pair, for the controls.
        neutral: the pair prepared on neutral prompts, for the side effect.
        progress: called with 1 when one of the ``PARTS`` is done.

    Returns:
        The analysis.

    Raises:
        UserError: if a size of random sets does not fit the layer.
    """
    effort = effort or AnalysisEffort()
    sizes = random_sizes(
        grid.n_heads,
        grid.settings.patching.k,
        grid.n_prompts,
        effort.n_random_sets,
        effort.random_ks,
    )
    methods = tuple(METHODS) if effort.methods is None else effort.methods
    work = _Work(
        grid=grid,
        layer=MeasuredLayer.of_grid(grid, experiment),
        effort=effort.but(random_ks=sizes, methods=methods),
        given_activations=activations,
        neutral=neutral,
        progress=progress,
    )
    return work.analysis()


@dataclass(frozen=True)
class _Work:
    """One analysis under way: its parts, each computed once. See :func:`analyse`."""

    grid: GridResult
    layer: MeasuredLayer
    effort: AnalysisEffort
    given_activations: PairActivations | None
    neutral: MeasuresPatches | None
    progress: Progress | None

    def analysis(self) -> Analysis:
        """Everything, part by part."""
        seconds = {name: self._seconds(name) for name in PARTS}
        analysis = Analysis(
            settings=self.settings,
            full=self.layer.full,
            coverage=self.table.rows,
            curves=self.curves,
            random=self.coverage.random,
            rankings=self.rankings,
            methods=self.compared.rows,
            stability=self.stability,
            agreement=self.agreements,
            concentration=self.concentration,
            tests=self.tests,
            interactions=self.interactions,
            kinds=self.kinds,
            controls=self.controls,
            alignment=self.alignment,
            alphas=self.alphas[0],
            claims=(),
            seconds=seconds,
        )
        return replace(analysis, claims=claims(analysis))

    def _seconds(self, part: str) -> float:
        start = time.perf_counter()
        getattr(self, part)
        if self.progress is not None:
            self.progress(1)
        return round(time.perf_counter() - start, 3)

    @property
    def settings(self) -> AnalysisSettings:
        return AnalysisSettings(
            grid=self.grid.settings,
            effort=self.effort.but(random_ks=[sets.k for sets in self.coverage.random]),
            ranking=self.ranking.method,
            n_prompts=self.grid.n_prompts,
            n_groups=self.layer.bootstrap.n_groups,
        )

    @property
    def can_measure(self) -> bool:
        return self.layer.measured.experiment is not None

    @property
    def experiment(self) -> Experiment | None:
        """The experiment with its models and maps; None for anything that only measures."""
        experiment = self.layer.measured.experiment
        return experiment if isinstance(experiment, Experiment) else None

    @cached_property
    def activations(self) -> PairActivations | None:
        if self.experiment is None:
            return None
        return self.given_activations or PairActivations(
            self.experiment.pair, k_positions=self.experiment.k_positions
        )

    @cached_property
    def ranking(self) -> HeadRanking:
        return single_ranking(self.layer.measured, self.layer.rank_by)

    @cached_property
    def inputs(self) -> CoverageInputs:
        """What the coverage table is made from."""
        return CoverageInputs(
            layer=self.layer,
            ranking=self.ranking,
            random_ks=self.effort.random_ks or (),
            seed_sets=seed_sets(self.grid),
            n_random_sets=self.effort.n_random_sets,
            n_splits=self.effort.n_splits,
        )

    @cached_property
    def coverage(self) -> Coverage:
        found = coverage(self.inputs) if self.can_measure else coverage_of_grid(self.inputs)
        by_answer = answer_coverage(self.grid, self.layer.bootstrap)
        rows = tuple(replace(row, answer_coverage_pct=by_answer[row.k]) for row in found.rows)
        return replace(found, rows=rows)

    @cached_property
    def compared(self) -> Methods:
        if not self.can_measure:
            return Methods((), (), ())
        return compare_methods(self.effort.methods or (), self.layer, self.ranking_settings)

    @property
    def ranking_settings(self) -> RankingSettings:
        return RankingSettings(seed=self.layer.bootstrap.seed, orders=self.orders)

    @cached_property
    def orders(self) -> Orders | None:
        """Random orders of the heads along which every head set is measured, if there are any."""
        pairs = self.inputs.rankings.pairs
        every_size = len(self.effort.random_ks or ()) == self.grid.n_heads
        return pairs.tolist() if every_size and len(pairs) > 1 else None

    @cached_property
    def best(self) -> CoverageCurve | None:
        """The envelope of all head sets that were measured."""
        return best_subsets(self.layer) if self.can_measure else None

    @property
    def table(self) -> Coverage:
        """Coverage beside the best sets found."""
        return self.coverage if self.best is None else self.coverage.with_best(self.best)

    @property
    def rankings(self) -> tuple[HeadRanking, ...]:
        own = self.ranking.method
        return (self.ranking, *(r for r in self.compared.rankings if r.method != own))

    @property
    def curves(self) -> tuple[CoverageCurve, ...]:
        """The run's own first, then the other methods, cross-fitted and envelope last."""
        own = self.ranking.method
        others = tuple(curve for curve in self.compared.curves if curve.ranking != own)
        return (*self.table.curves[:1], *others, *self.table.curves[1:])

    @cached_property
    def interactions(self) -> Interactions | None:
        return interactions(self.layer) if self.can_measure else None

    @cached_property
    def alphas(self) -> tuple[tuple[AlphaPoint, ...], tuple[MeasuredSets, ...]]:
        """The sweep over blend strengths, and the measurements behind it."""
        if not self.can_measure:
            return (), (self.layer.measured,)
        points, measured = alpha_sweep(self.layer, self.effort.alphas)
        return tuple(points), tuple(measured)

    @cached_property
    def tests(self) -> HeadTests:
        """All heads at all blend strengths that were tried."""
        layer, heads = self.layer.measured.layer, range(self.grid.n_heads)
        at_alpha = self.alphas[1]
        return head_tests(
            [(Head(layer, head), each.alpha) for each in at_alpha for head in heads],
            np.concatenate([each.delta_nats(each.singles) for each in at_alpha]),
            self.grid.groups,
            n_flips=self.layer.bootstrap.n_resamples,
            seed=self.layer.bootstrap.seed,
        )

    @cached_property
    def controls(self) -> tuple[Control, ...]:
        rows = grid_controls(self.grid, self.layer.bootstrap)
        if self.experiment is not None and self.activations is not None:
            control_layer = self.grid.settings.patching.control_layer
            rows += measured_controls(
                ControlInputs(
                    self.layer, self.experiment, self.activations, control_layer, self.neutral
                )
            )
        return (*rows, *random_controls(self.coverage.rows, self.grid.n_heads, self.layer.full))

    @cached_property
    def alignment(self) -> Alignment | None:
        if self.activations is None:
            return None
        data = FitData.of(self.activations, self.layer.measured.layer)
        return alignment(data, self.layer.scored(), self.layer.bootstrap)

    @cached_property
    def agreements(self) -> tuple[Agreement, ...]:
        """Rankings of the same heads across metrics, folds, seeds, kinds of maps and alphas."""
        compared = [metric_agreement(self.grid, self.layer)]
        if self.experiment is not None and self.activations is not None:
            compared += map_kind_agreement(self.layer, self.experiment, self.activations)
        at_alphas = (point.agreement for point in self.alphas[0] if point.agreement is not None)
        return (*compared, *self._resampled, *at_alphas)

    @property
    def _resampled(self) -> Iterator[Agreement]:
        """The same heads ranked on other prompts, and from other random permutations."""
        halves = half_splits(self.grid.groups, 1, self.layer.bootstrap.seed)
        if len(halves):
            yield fold_agreement(self.layer, halves[0])
        for ranking in self.compared.rankings:
            if ranking.method == "shapley" and not ranking.settings["exact"]:
                yield seed_agreement(self.layer, self.ranking_settings)

    @cached_property
    def stability(self) -> RankStability:
        return rank_stability(self.ranking, self.layer)

    @cached_property
    def kinds(self) -> HeadKinds:
        full, floor = self.grid.full.KL_raw, self.grid.noise_floor_nats
        return head_kinds(*self.layer.singles, full, floor, self.layer.bootstrap)

    @cached_property
    def concentration(self) -> tuple[Concentration, ...]:
        scores = {"|ΔKL|": self.layer.single_deltas, "KL_raw": self.layer.singles[0]}
        return tuple(
            concentration(name, each, self.layer.bootstrap) for name, each in scores.items()
        )
