"""The analysis of one run as a record: everything of ``analysis.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rq4lens.analysis.coverage.cross_fitted import TOO_FEW_GROUPS
from rq4lens.analysis.coverage.random_sets import FEWEST_GROUPS, TOO_FEW_TO_TEST
from rq4lens.analysis.effects.table import FullEffect
from rq4lens.analysis.rankings.file import why_null
from rq4lens.analysis.records import (
    Agreement,
    AlphaPoint,
    Concentration,
    Control,
    CoverageCurve,
    CoverageRow,
    HeadKinds,
    Interactions,
    MethodRow,
    RandomSets,
    RankStability,
)
from rq4lens.analysis.statistics.plain import (
    NO_CONTROL_LAYER,
    NOT_MEASURED,
    ONE_SET,
    explained,
    plain,
)
from rq4lens.analysis.statistics.sign_flips import HeadTests
from rq4lens.analysis.structure.heads import Alignment
from rq4lens.results import HeadRanking

NO_MODELS = "only measured numbers were given: the direction comes from the models' activations"
NO_RANDOM_SETS = "no random sets were measured"
NOT_TIMED = "the ranking was not made here"


@dataclass(frozen=True)
class AnalysisSettings:
    """How the analysis was made.

    Args:
        layer: the main layer.
        control_layer: the control layer, or None.
        alpha: blend strength.
        ranking: the ranking whose top k the coverage table shows.
        ks: the sizes in the coverage table.
        n_heads: heads of a layer.
        n_prompts: measured prompts.
        n_groups: groups of prompts; resampling and folds keep a group together.
        n_resamples: bootstrap resamples.
        n_random_sets: random sets drawn of each size that has more.
        random_ks: the sizes of which random sets were measured.
        n_splits: random half splits behind the cross-fitted numbers.
        seed: seed of all draws.
        level: nominal coverage of the intervals.
        interval_method: ``"bca"`` (bias-corrected and accelerated) unless a record says otherwise.
    """

    layer: int
    control_layer: int | None
    alpha: float
    ranking: str
    ks: tuple[int, ...]
    n_heads: int
    n_prompts: int
    n_groups: int
    n_resamples: int
    n_random_sets: int
    random_ks: tuple[int, ...]
    n_splits: int
    seed: int
    level: float = 0.95
    interval_method: str = "bca"


@dataclass(frozen=True)
class Analysis:
    """Everything the analysis adds to a grid.

    What needs new measurements (an experiment) is empty or None when only the grid was given.

    Args:
        settings: how it was made.
        full: ``ΔKL(ALL)``, the denominator of coverage, and whether it can serve as one.
        coverage: the coverage table, a row a k.
        curves: coverage curves of every ranking method, the run's own first, then cross-fitted
            (``"<method> (cross-fitted)"``) and the envelope (``"best subset"``).
        random: random head sets by size.
        rankings: every ranking, the run's own first.
        methods: each method beside exact single-head ``ΔKL``.
        stability: stability of the run's own ranking.
        agreement: rankings of the same heads compared, across metrics, alphas, map kinds and folds.
        concentration: how unevenly scores lie on heads.
        tests: sign-flip tests of single heads.
        interactions: do heads add up?
        kinds: idle, re-coordinated and rewired heads.
        controls: does the claim survive?
        alignment: heads and the first direction of a joint low-rank map.
        alphas: the sweep over blend strengths.
        claims: a short paragraph built from the numbers, sentence by sentence.
        seconds: time of each part.
    """

    settings: AnalysisSettings
    full: FullEffect
    coverage: tuple[CoverageRow, ...]
    curves: tuple[CoverageCurve, ...]
    random: tuple[RandomSets, ...]
    rankings: tuple[HeadRanking, ...]
    methods: tuple[MethodRow, ...]
    stability: RankStability
    agreement: tuple[Agreement, ...]
    concentration: tuple[Concentration, ...]
    tests: HeadTests
    interactions: Interactions | None
    kinds: HeadKinds
    controls: tuple[Control, ...]
    alignment: Alignment | None
    alphas: tuple[AlphaPoint, ...]
    claims: tuple[str, ...]
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The content of ``analysis.json``, strict JSON values; every null has its reason."""
        record = plain({**vars(self), "rankings": [ranking_record(r) for r in self.rankings]})
        record["areas"] = [_area(curve) for curve in record["curves"]]
        record["settings"] = explained(record["settings"], lambda _: NO_CONTROL_LAYER)
        record["curves"] = [explained(curve, lambda _: ONE_SET) for curve in record["curves"]]
        for part in ("coverage", "random"):
            record[part] = [explained(row, self._why_no_coverage) for row in record[part]]
        record["methods"] = [explained(row, lambda _: NOT_TIMED) for row in record["methods"]]
        return explained(record, self._why_missing)

    def _why_missing(self, name: str) -> str:
        """Why a whole part is null."""
        return NO_MODELS if name == "alignment" else NOT_MEASURED

    def _why_no_coverage(self, name: str) -> str:
        """Why a number of the coverage table or of random sets is null.

        Shares need a full effect to be shares of, p-values halves of enough prompts, and both of
        them head sets that the grid does not have.
        """
        if name.endswith("_pct") and self.full.undefined_because is not None:
            return self.full.undefined_because
        if self.interactions is None:
            return NOT_MEASURED
        if self.settings.n_groups < FEWEST_GROUPS:
            return TOO_FEW_GROUPS if self.settings.n_groups < 2 else TOO_FEW_TO_TEST
        return NO_RANDOM_SETS


def ranking_record(ranking: HeadRanking) -> dict[str, Any]:
    """A ranking without its per-prompt scores, as strict JSON values; every null has its reason."""
    record = {
        "method": ranking.method,
        "layer": ranking.layer,
        "alpha": ranking.alpha,
        "heads": list(ranking.heads),
        "scores": list(ranking.scores),
        "standard_errors": plain(ranking.standard_errors),
        "settings": plain(ranking.settings),
    }
    return explained(record, lambda name: why_null(ranking, name))


def _area(curve: Mapping[str, Any]) -> dict[str, Any]:
    wanted = ("ranking", "area_pct", "cpr", "cmd", "k90")
    return {name: value for name, value in curve.items() if name.startswith(wanted)}
