"""The whole analysis of one run, from its grid and the experiment behind it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from rq4lens.analysis import records
from rq4lens.analysis.claims import claims, study_claims
from rq4lens.analysis.coverage import table
from rq4lens.analysis.coverage.best_sets import best_subsets, interactions
from rq4lens.analysis.coverage.curves import half_splits
from rq4lens.analysis.coverage.random_sets import random_sizes
from rq4lens.analysis.effects.measured import MeasuredLayer, MeasuredSets
from rq4lens.analysis.effects.table import (
    gap_effect,
    gap_of,
    layer_transfer,
    metric_full_effect,
    metric_summary,
)
from rq4lens.analysis.rankings import compared
from rq4lens.analysis.rankings.compared import rank_stability
from rq4lens.analysis.rankings.exact import single_ranking
from rq4lens.analysis.rankings.methods import METHODS, RankingSettings
from rq4lens.analysis.records import Analysis, AnalysisSettings
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.analysis.statistics.concentration import concentration
from rq4lens.analysis.statistics.sign_flips import head_tests
from rq4lens.analysis.structure import controls
from rq4lens.analysis.structure.kinds import (
    HELD_OUT,
    KindInputs,
    head_kinds,
    ladder,
    no_kinds,
    with_other_heads,
)
from rq4lens.analysis.structure.layers import alpha_sweep
from rq4lens.config import AnalysisEffort, RankBy
from rq4lens.heads import Head
from rq4lens.models.prompts.prompt_set import FIT_SPLIT
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.maps.fitting import FitData
from rq4lens.patching.measured import Indices, MeasuresPatches
from rq4lens.patching.noise import NoiseEffects
from rq4lens.patching.patch import BASE, CONSTANT, MAPPED, OUTPUT, SHIFTED, Progress
from rq4lens.results import METRIC_TRANSFERS, TRANSFERS, GridResult, HeadRanking

RUNGS = (CONSTANT, BASE, SHIFTED, MAPPED)
"""The rungs of every ladder."""

NOT_BESIDE = {"neutral": records.NO_NEUTRAL, "noise": records.NO_NOISE_PAIR}
"""Why these parts are missing although an experiment was given."""

PARTS = (
    *("coverage", "compared", "interactions", "alphas", "directions", "ladders", "kinds"),
    *("stand_ins", "alignment", "agreements", "stability", "tests", "concentration", "best"),
)
"""The parts in the order in which they are computed and timed; the best sets are sought last."""


def analyse(
    grid: GridResult,
    experiment: MeasuresPatches | None = None,
    effort: AnalysisEffort | None = None,
    *,
    beside: Beside | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Analyse a grid.

    With the grid alone, everything that its own conditions support is computed. With the experiment
    behind it, new head sets are measured: whole curves, random sets, cross-fitting, interactions,
    the other ranking methods and the controls.

    >>> rq.analyse(run)
    <Analysis of etiquette, layer 1>

    Args:
        grid: the measured grid.
        experiment: the experiment behind it, or a measurer with what it measured before.
        effort: what is measured and compared beyond the grid. Without sizes of random sets, there
            are as many as can be afforded, see
            :func:`rq4lens.analysis.coverage.random_sets.random_sizes`.
        beside: what the pair is compared with: neutral prompts, its noise pair.
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
    return _Work(grid, layer, effort, beside or Beside(), progress).analysis()


@dataclass(frozen=True)
class Beside:
    """What a pair is compared with.

    >>> rq.Beside().noise is None
    True

    Args:
        neutral: the pair prepared on neutral prompts, with the same maps.
        noise: the effects of its noise pair.
    """

    neutral: MeasuresPatches | None = None
    noise: NoiseEffects | None = None


@dataclass(frozen=True)
class _Work:
    """One analysis under way: its parts, each computed once. See :func:`analyse`."""

    grid: GridResult
    layer: MeasuredLayer
    effort: AnalysisEffort
    beside: Beside
    progress: Progress | None

    def analysis(self) -> Analysis:
        """Everything, part by part."""
        seconds = {name: self._seconds(name) for name in PARTS}
        own, coverage, best = self.ranking.method, self.coverage, self.best
        noise = self.beside.noise
        others = [curve for curve in self.compared.curves if curve.ranking != own]
        settings = AnalysisSettings(
            grid=self.grid.settings,
            effort=self.effort.but(random_ks=[sets.k for sets in coverage.random]),
            ranking=own,
            n_prompts=self.grid.n_prompts,
            n_groups=self.layer.bootstrap.n_groups,
        )
        analysis = Analysis(
            settings=settings,
            gap=gap_of(self.grid),
            transfer=layer_transfer(self.grid),
            metric=metric_summary(self.grid),
            directions=self.directions,
            ladders=self.ladders,
            neutral=self.neutral_ladder,
            noise=noise and controls.beside_noise(self.grid, noise),
            weight_cosine=self.grid.compared.weight_cosine,
            full=self.layer.full,
            coverage=self._rows(),
            curves=(*coverage.curves[:1], *others, *coverage.curves[1:], *([best] if best else [])),
            random=coverage.random,
            rankings=(self.ranking, *(r for r in self.compared.rankings if r.method != own)),
            methods=self.compared.rows,
            stability=self.stability,
            agreement=self.agreements,
            concentration=self.concentration,
            tests=self.tests,
            interactions=self.interactions,
            kinds=self.kinds,
            stand_ins=self.stand_ins,
            control_layer=controls.control_layer(self.grid),
            alignment=self.alignment,
            alphas=self.alphas[0],
            claims=(),
            study_claims=(),
            seconds=seconds,
            reasons={} if self.experiment is None else NOT_BESIDE,
        )
        return replace(analysis, claims=claims(analysis), study_claims=study_claims(analysis))

    def _seconds(self, part: str) -> float:
        start = time.perf_counter()
        getattr(self, part)
        if self.progress is not None:
            self.progress(1)
        return round(time.perf_counter() - start, 3)

    @property
    def can_measure(self) -> bool:
        return self.layer.measured.experiment is not None

    @property
    def experiment(self) -> Experiment | None:
        """The experiment with its models and maps; None for anything that only measures."""
        experiment = self.layer.measured.experiment
        return experiment if isinstance(experiment, Experiment) else None

    @cached_property
    def ranking(self) -> HeadRanking:
        return single_ranking(self.layer.measured, self.layer.rank_by)

    @cached_property
    def inputs(self) -> table.CoverageInputs:
        """What the coverage table is made from."""
        seed_sets = table.seed_sets(self.grid)
        return table.CoverageInputs(self.layer, self.ranking, self.effort, seed_sets)

    @cached_property
    def coverage(self) -> records.DirectionCoverage:
        of = table.coverage if self.can_measure else table.coverage_of_grid
        return of(self.inputs)

    def _rows(self) -> tuple[records.CoverageRow, ...]:
        """The coverage table beside its coverage by the answer, and the best sets."""
        by_answer = compared.answer_coverage(self.grid)
        rows = [
            replace(row, answer_coverage_pct=by_answer[row.k]) for row in self.coverage.coverage
        ]
        if self.best is None:
            return tuple(rows)
        sets, shares = self.best.head_sets, self.best.coverage_pct
        return tuple(
            replace(row, best_heads=sets[row.k], best_coverage_pct=shares[row.k].value)
            for row in rows
        )

    @cached_property
    def compared(self) -> compared.Methods:
        if not self.can_measure:
            return compared.Methods((), (), ())
        return compared.compare_methods(
            self.effort.methods or (), self.layer, self.ranking_settings
        )

    @cached_property
    def ranking_settings(self) -> RankingSettings:
        """With the random orders of heads along which every head set is measured, if there are."""
        pairs = self.inputs.rankings.pairs
        every_size = len(self.inputs.random_ks) == self.grid.n_heads
        orders = pairs.tolist() if every_size and len(pairs) > 1 else None
        return RankingSettings(seed=self.layer.bootstrap.seed, orders=orders)

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
        shuffled = None
        if self.experiment is not None:
            layer, seed = self.layer.measured.layer, self.layer.bootstrap.seed
            sources = controls.stand_in_sources(self.experiment, layer, None, seed)
            shuffled = sources[records.SHUFFLED]
        points, measured = alpha_sweep(self.layer, self.effort.alphas, shuffled)
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
    def directions(self) -> tuple[records.DirectionCoverage, ...]:
        """The coverage table of each direction of transfer, on the sizes of the run."""
        if not self.can_measure or self.layer.gap_nats is None:
            return ()
        wholes = {name: gap_effect(self.grid, name) for name in TRANSFERS}
        if self.grid.settings.patching.metric != "kl":
            wholes |= dict.fromkeys(METRIC_TRANSFERS, metric_full_effect(self.grid))
        return tuple(self._direction(*each) for each in wholes.items())

    def _direction(self, direction: RankBy, whole: records.FullEffect) -> records.DirectionCoverage:
        layer = self.layer.transfer(direction, whole)
        inputs = replace(
            self.inputs,
            layer=layer,
            ranking=single_ranking(layer.measured, direction),
            effort=self.effort.but(random_ks=sorted({1, *layer.ks})),
        )
        return table.coverage(inputs)

    @cached_property
    def full_strength(self) -> MeasuredSets:
        """The layer at strength 1, with maps that hold out the prompt's content if it has one."""
        measured, held_out = self.layer.measured.at(1.0), self.held_out
        if isinstance(held_out, str):
            return measured
        return measured.also({HELD_OUT: held_out})

    @cached_property
    def held_out(self) -> Tensor | str:
        """Each prompt mapped without its content; or why there is none."""
        if self.experiment is None:
            return records.NOT_MEASURED
        return controls.held_out(self.experiment, self.layer.measured.layer)

    @cached_property
    def ladders(self) -> tuple[records.Ladder, ...]:
        """At full strength, and at the run's own."""
        if self.experiment is None:
            return ()
        held_out = [] if isinstance(self.held_out, str) else [HELD_OUT]
        output = [OUTPUT] if OUTPUT in self.experiment.sources.made else []
        full = self._ladder(self.full_strength, [*RUNGS, *held_out, *output])
        own = self.layer.measured
        return (full,) if own.alpha == 1.0 else (full, self._ladder(own, [*RUNGS, *output]))

    def _ladder(self, measured: MeasuredSets, sources: Sequence[str]) -> records.Ladder:
        sets = _singles(self.grid)
        sets |= {f"top{k}": tuple(sorted(self.ranking.top(k))) for k in self.layer.ks if k > 1}
        sets["full"] = measured.everything
        return ladder(measured, sets, sources, self.layer.bootstrap, self.grid.noise_floor_nats)

    @cached_property
    def neutral_ladder(self) -> records.Ladder | None:
        neutral = self.beside.neutral
        if neutral is None or self.experiment is None:
            return None
        measured = MeasuredSets.of(neutral, self.layer.measured.layer, 1.0)
        sets = _singles(self.grid)
        sets["full"] = measured.everything
        own = self.layer.bootstrap
        other = Bootstrap(measured.groups, own.n_resamples, own.seed + 1)
        return ladder(measured, sets, RUNGS, other, self.grid.noise_floor_nats)

    @cached_property
    def stand_ins(self) -> tuple[records.StandIn, ...]:
        if self.experiment is None:
            return ()
        changed = self.kinds.of("shifted", "recoded", "reassigned", "replaced", "undecided")
        control_layer = self.grid.settings.patching.control_layer
        measured = self.layer.measured.at(1.0)
        return controls.stand_ins(measured, control_layer, changed, self.layer.bootstrap)

    @cached_property
    def alignment(self) -> records.Alignment | None:
        if self.experiment is None:
            return None
        data = FitData.of(self.experiment.ends.activations, self.layer.measured.layer)
        return compared.alignment(data, self.layer.scored(), self.layer.bootstrap)

    @cached_property
    def agreements(self) -> tuple[records.Agreement, ...]:
        """Rankings of the same heads across metrics, folds, seeds, kinds of maps and alphas."""
        found = [compared.metric_agreement(self.grid, self.layer)]
        if self.experiment is not None:
            found += compared.map_kind_agreement(self.layer, self.experiment)
        halves = half_splits(self.grid.groups, 1, self.layer.bootstrap.seed)
        found += [compared.fold_agreement(self.layer, half) for half in halves]
        found += [
            compared.seed_agreement(self.layer, self.ranking_settings, ranking)
            for ranking in self.compared.rankings
            if ranking.method == "shapley" and not ranking.settings["exact"]
        ]
        return (*found, *(point.agreement for point in self.alphas[0] if point.agreement))

    @cached_property
    def stability(self) -> records.RankStability:
        return rank_stability(self.ranking, self.layer)

    @cached_property
    def kinds(self) -> records.HeadKinds:
        if self.experiment is None:
            return no_kinds(self.grid.n_heads)
        bootstrap, ladder = self.layer.bootstrap, self.ladders[0]
        neutral = self.neutral_ladder or records.NO_NEUTRAL
        inputs = KindInputs.of(self.full_strength, ladder, neutral, self.held_out, bootstrap)
        found = with_other_heads(head_kinds(inputs), ladder, self.layer.measured.at(1.0), bootstrap)
        named = controls.contents_of(self.experiment.pair, FIT_SPLIT)
        if named is None:
            return found
        n_contents, width = len(set(named)), self.experiment.pair.base.card.d_head
        return replace(found, n_contents=n_contents, few_contents=n_contents <= width + 1)

    @cached_property
    def concentration(self) -> tuple[records.Concentration, ...]:
        scores = {"|ΔKL|": self.layer.single_deltas, "KL_raw": self.layer.singles[0]}
        return tuple(
            concentration(name, each, self.layer.bootstrap) for name, each in scores.items()
        )


def _singles(grid: GridResult) -> dict[str, Indices]:
    return {f"head{head}": (head,) for head in range(grid.n_heads)}
