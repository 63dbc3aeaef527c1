"""The whole analysis of one run, from its grid and the experiment behind it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rq4lens.analysis import records
from rq4lens.analysis.claims import claims
from rq4lens.analysis.coverage import table
from rq4lens.analysis.coverage.best_sets import best_subsets, interactions
from rq4lens.analysis.coverage.cross_fitted import half_splits
from rq4lens.analysis.coverage.random_sets import random_sizes
from rq4lens.analysis.effects.layer import MeasuredLayer
from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings import compared
from rq4lens.analysis.rankings.exact import single_ranking
from rq4lens.analysis.rankings.methods import METHODS, Orders, RankingSettings
from rq4lens.analysis.rankings.stability import rank_stability
from rq4lens.analysis.result import Analysis, AnalysisSettings
from rq4lens.analysis.statistics.concentration import concentration
from rq4lens.analysis.statistics.sign_flips import head_tests
from rq4lens.analysis.structure import controls
from rq4lens.analysis.structure.alphas import alpha_sweep
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
    effort, own = effort or AnalysisEffort(), grid.settings.patching.k
    sizes = random_sizes(grid.n_heads, own, grid.n_prompts, effort.n_random_sets, effort.random_ks)
    methods = tuple(METHODS) if effort.methods is None else effort.methods
    effort = effort.but(random_ks=sizes, methods=methods)
    layer = MeasuredLayer.of_grid(grid, experiment)
    return _Work(grid, layer, effort, activations, neutral, progress).analysis()


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
        own, coverage = self.ranking.method, self.coverage
        if self.best is not None:
            coverage = coverage.with_best(self.best)
        others = [curve for curve in self.compared.curves if curve.ranking != own]
        analysis = Analysis(
            settings=self.settings,
            full=self.layer.full,
            coverage=coverage.rows,
            curves=(*coverage.curves[:1], *others, *coverage.curves[1:]),
            random=coverage.random,
            rankings=(self.ranking, *(r for r in self.compared.rankings if r.method != own)),
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
    def inputs(self) -> table.CoverageInputs:
        """What the coverage table is made from."""
        return table.CoverageInputs(
            layer=self.layer,
            ranking=self.ranking,
            random_ks=self.effort.random_ks or (),
            seed_sets=table.seed_sets(self.grid),
            n_random_sets=self.effort.n_random_sets,
            n_splits=self.effort.n_splits,
        )

    @cached_property
    def coverage(self) -> table.Coverage:
        of = table.coverage if self.can_measure else table.coverage_of_grid
        found = of(self.inputs)
        by_answer = compared.answer_coverage(self.grid, self.layer.bootstrap)
        rows = tuple(replace(row, answer_coverage_pct=by_answer[row.k]) for row in found.rows)
        return replace(found, rows=rows)

    @cached_property
    def compared(self) -> compared.Methods:
        if not self.can_measure:
            return compared.Methods((), (), ())
        return compared.compare_methods(
            self.effort.methods or (), self.layer, self.ranking_settings
        )

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
    def best(self) -> records.CoverageCurve | None:
        """The envelope of all head sets that were measured."""
        return best_subsets(self.layer) if self.can_measure else None

    @cached_property
    def interactions(self) -> records.Interactions | None:
        return interactions(self.layer) if self.can_measure else None

    @cached_property
    def alphas(self) -> tuple[tuple[records.AlphaPoint, ...], tuple[MeasuredSets, ...]]:
        """The sweep over blend strengths, and the measurements behind it."""
        if not self.can_measure:
            return (), (self.layer.measured,)
        points, measured = alpha_sweep(self.layer, self.effort.alphas)
        return tuple(points), tuple(measured)

    @cached_property
    def tests(self) -> records.HeadTests:
        """All heads at all blend strengths that were tried."""
        bootstrap, tried = self.layer.bootstrap, self.alphas[1]
        return head_tests(
            [(Head(each.layer, head), each.alpha) for each in tried for (head,) in each.singles],
            np.concatenate([each.delta_nats(each.singles) for each in tried]),
            self.grid.groups,
            n_flips=bootstrap.n_resamples,
            seed=bootstrap.seed,
        )

    @cached_property
    def controls(self) -> tuple[records.Control, ...]:
        layer, control_layer = self.layer, self.grid.settings.patching.control_layer
        rows = controls.grid_controls(self.grid, layer.bootstrap)
        if self.experiment is not None and self.activations is not None:
            inputs = controls.ControlInputs(
                layer, self.experiment, self.activations, control_layer, self.neutral
            )
            rows += controls.measured_controls(inputs)
        rows += controls.random_controls(self.coverage.rows, self.grid.n_heads, layer.full)
        return tuple(rows)

    @cached_property
    def alignment(self) -> records.Alignment | None:
        if self.activations is None:
            return None
        data = FitData.of(self.activations, self.layer.measured.layer)
        return compared.alignment(data, self.layer.scored(), self.layer.bootstrap)

    @cached_property
    def agreements(self) -> tuple[records.Agreement, ...]:
        """Rankings of the same heads across metrics, folds, seeds, kinds of maps and alphas."""
        found = [compared.metric_agreement(self.grid, self.layer)]
        if self.experiment is not None and self.activations is not None:
            found += compared.map_kind_agreement(self.layer, self.experiment, self.activations)
        halves = half_splits(self.grid.groups, 1, self.layer.bootstrap.seed)
        found += [compared.fold_agreement(self.layer, half) for half in halves]
        found += [
            compared.seed_agreement(self.layer, self.ranking_settings)
            for ranking in self.compared.rankings
            if ranking.method == "shapley" and not ranking.settings["exact"]
        ]
        return (*found, *(point.agreement for point in self.alphas[0] if point.agreement))

    @cached_property
    def stability(self) -> records.RankStability:
        return rank_stability(self.ranking, self.layer)

    @cached_property
    def kinds(self) -> records.HeadKinds:
        full, floor = self.grid.full.KL_raw, self.grid.noise_floor_nats
        return head_kinds(*self.layer.singles, full, floor, self.layer.bootstrap)

    @cached_property
    def concentration(self) -> tuple[records.Concentration, ...]:
        scores = {"|ΔKL|": self.layer.single_deltas, "KL_raw": self.layer.singles[0]}
        return tuple(
            concentration(name, each, self.layer.bootstrap) for name, each in scores.items()
        )
