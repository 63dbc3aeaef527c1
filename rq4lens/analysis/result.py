"""The analysis of one run as a record: everything of ``analysis.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, ClassVar

from pydantic import TypeAdapter

from rq4lens.analysis import records
from rq4lens.analysis.statistics.bootstrap import LEVEL
from rq4lens.analysis.statistics.plain import Listed, to_json
from rq4lens.config import AnalysisEffort
from rq4lens.results import NO_CONTROL_LAYER, GridSettings, HeadRanking, Record


@dataclass(frozen=True)
class AnalysisSettings:
    """How the analysis was made.

    Args:
        grid: how the grid was made.
        effort: what was measured and compared beyond the grid; the sizes are those of which random
            sets were measured.
        ranking: the ranking whose top k the coverage table shows.
        n_prompts: measured prompts.
        n_groups: groups of prompts; resampling and folds keep a group together.
        level: nominal coverage of the intervals.
        interval_method: ``"bca"`` (bias-corrected and accelerated) unless a record says otherwise.
    """

    grid: GridSettings
    effort: AnalysisEffort
    ranking: str
    n_prompts: int
    n_groups: int
    level: float = LEVEL
    interval_method: str = "bca"

    def to_dict(self) -> dict[str, Any]:
        """The settings as flat JSON values."""
        parts = {"grid", "effort"}
        return {
            **self.grid.to_dict(),
            **self.effort.model_dump(mode="json"),
            "n_resamples": self.grid.effort.resamples,
            **{name: value for name, value in vars(self).items() if name not in parts},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AnalysisSettings:
        """Settings read back from JSON.

        Raises:
            ValueError: if one is missing or of another type.
        """
        grid = GridSettings.from_dict(values)
        effort = AnalysisEffort.checked(values, "the settings of the analysis")
        own = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return TypeAdapter(cls).validate_python({**own, "grid": grid, "effort": effort})


@dataclass(frozen=True)
class Analysis(Listed, Record):
    """Everything the analysis adds to a grid.

    What needs new measurements (an experiment) is empty or None when only the grid was given.

    Args:
        settings: how it was made.
        gap: how far apart the models are, and what all heads of all layers carry of that.
        transfer: what the heads of the layer carry, together and one by one.
        metric: the metric of the answer, and what the heads of the layer carry of it.
        directions: top k heads beside random ones in both directions of transfer.
        ladders: what stands in for heads, at strength 1 and at the run's own.
        neutral: the ladder at strength 1 on neutral prompts.
        noise: the same numbers of the noise pair.
        weight_cosine: cosine of the weights of the two models, over all matrices.
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
        kinds: what kind of change each head shows.
        stand_ins: what stands in for the map on the heads that changed.
        control_layer: the control layer beside the main one.
        alignment: heads and the first direction of a joint low-rank map.
        alphas: the sweep over blend strengths.
        claims: the answer, sentence by sentence.
        study_claims: what the study's own grid says, sentence by sentence.
        seconds: time of each part.
    """

    ROWS: ClassVar[str] = "coverage"
    ALSO_SAVED: ClassVar[tuple[str, ...]] = ("areas",)
    BECAUSE: ClassVar[Mapping[str, str]] = {
        "interactions": records.NOT_MEASURED,
        "neutral": records.NOT_MEASURED,
        "noise": records.NOT_MEASURED,
        "metric": records.NO_METRIC,
        "weight_cosine": "the models were not compared weight by weight",
        "control_layer": NO_CONTROL_LAYER,
        "alignment": (
            "only measured numbers were given: the direction comes from the models' activations"
        ),
    }

    settings: AnalysisSettings
    gap: records.Gap
    transfer: records.LayerTransfer
    metric: records.MetricSummary | None
    directions: tuple[records.DirectionCoverage, ...]
    ladders: tuple[records.Ladder, ...]
    neutral: records.Ladder | None
    noise: records.NoisePair | None
    weight_cosine: float | None
    full: records.FullEffect
    coverage: tuple[records.CoverageRow, ...]
    curves: tuple[records.CoverageCurve, ...]
    random: tuple[records.RandomSets, ...]
    rankings: tuple[HeadRanking, ...]
    methods: tuple[records.MethodRow, ...]
    stability: records.RankStability
    agreement: tuple[records.Agreement, ...]
    concentration: tuple[records.Concentration, ...]
    tests: records.HeadTests
    interactions: records.Interactions | None
    kinds: records.HeadKinds
    stand_ins: tuple[records.StandIn, ...]
    control_layer: records.ControlLayer | None
    alignment: records.Alignment | None
    alphas: tuple[records.AlphaPoint, ...]
    claims: tuple[str, ...]
    study_claims: tuple[str, ...]
    seconds: Mapping[str, float]

    def __repr__(self) -> str:
        return f"<Analysis of {self.settings.grid.pair}, layer {self.settings.grid.layer}>"

    def _repr_html_(self) -> str:
        return f"<p>{escape(str(self))}</p>{super()._repr_html_()}"

    def __str__(self) -> str:
        """What it claims, in sentences."""
        return " ".join(self.claims)

    @property
    def areas(self) -> tuple[Mapping[str, Any], ...]:
        """The area under each curve and its relatives."""
        names = ("ranking", "area_pct", "cpr", "cmd", "k90")
        return tuple({name: getattr(curve, name) for name in names} for curve in self.curves)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``analysis.json``, strict JSON values; every null has its reason."""
        return dict(to_json(self))
