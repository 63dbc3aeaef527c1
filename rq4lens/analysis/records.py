"""The records of ``analysis.json`` and ``layers.json``: what the analysis adds to the grid.

An :class:`Estimate` holds a value and its interval; whatever is undefined is None with a reason.
A name means the same in every record, and a record explains only those that stand in no other:

- ``layer``, ``head``, ``heads``, ``alpha``: what was patched, and the blend strength; ``k`` is a
  number of heads. Tuples of numbers of heads are in head order.
- ``KL_raw`` and ``KL_mapped``, in nats; ``delta``: their difference ``ΔKL``; ``drop_pct``: the
  share of the raw damage that the map repairs. Of a layer they are those of all its heads.
- ``coverage_pct``: ``ΔKL`` as a share of ``ΔKL(ALL)`` of the main layer; never clipped.
- ``to_base_pct``: how far base's activations, at strength 1, take the tuned model back to base;
  ``to_tuned_pct``: how far tuned ones take base towards the tuned model.
- ``every_layer_...``: of all heads of all layers at once.
- ``n_eff``: how many prompts carry the effect of all heads of the layer, ``(Σ d)² / Σ d²``.
- ``rank``: 1 is best; ``rank_low`` and ``rank_high`` hold it in 95% of the resamples.
- ``p_value_min``: the smallest value ``p_value`` can take.
- ``n_subsets``: how many head sets of a size were measured; ``exhaustive``: whether these are all.
- ``undefined_because``: why shares of a whole are undefined; None when they are defined.
- ``reason``: why what is None in the record is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, ClassVar

import pandas as pd
from jaxtyping import Float64
from numpy import ndarray
from pydantic import TypeAdapter

from rq4lens.analysis.statistics.bootstrap import LEVEL, Estimate, Spread, undefined
from rq4lens.analysis.statistics.plain import Listed, frame_of, to_json
from rq4lens.config import AnalysisEffort
from rq4lens.heads import Head
from rq4lens.results import (
    NO_CONTROL_LAYER,
    NO_RAW_EFFECT,
    GridSettings,
    HeadRanking,
    Record,
    Shown,
)

NO_METRIC = "the divergence alone was measured: no metric was asked for"
NOT_MEASURED = "only the grid was given: new head sets would have to be measured"
NO_NEUTRAL = "the pair has no neutral prompts"
NO_NOISE_PAIR = "it was not asked for, or there was no room for three models in memory"
NOT_COVERED = undefined("it was not measured")
NOT_ASKED = undefined("it is asked of heads that changed alone")
UNMEASURED = undefined(NOT_MEASURED)
NO_EFFECT_ANYWHERE = {"n_eff": "its heads carry nothing on any prompt"}


@dataclass(frozen=True)
class MetricEffect:
    """What a condition does to the metric of the answer.

    Args:
        raw_change: of the tuned model with the raw patch, less that of the clean one.
        mapped_change: with the mapped patch.
        to_base_pct: how far it goes to its value of base.
        to_tuned_pct: how far that of base goes to its value of tuned.
    """

    raw_change: Estimate
    mapped_change: Estimate
    to_base_pct: Estimate
    to_tuned_pct: Estimate


@dataclass(frozen=True)
class ConditionRecord(Record):
    """One condition of the grid with its intervals: a record of ``rq4_results.json``.

    Args:
        layer: the patched layer; None of all layers at once.
        hook: the patched activation.
        cond: name of the condition.
        head_mask: 1 for each patched head of the layer, else 0.
        split: the prompts that were measured.
        k_positions: how many positions were patched.
        n: how many prompts were measured.
        KL_raw_mean: mean over prompts, in nats.
        KL_mapped_mean: mean over prompts, in nats.
        raw_coverage_pct: ``KL_raw`` as a share of ``KL_raw(ALL)`` of the main layer.
        gap_base_nats: ``KL(p_base || p_tuned)`` of the clean models.
        gap_tuned_nats: ``KL(p_tuned || p_base)`` of the clean models.
        flipped_pct: share of prompts whose most likely token base's activations change.
        as_base_pct: of the prompts on which base and tuned have different most likely tokens, the
            share on which the patched tuned model has that of base.
        metric: what it does to the metric of the answer; None where none was measured.
    """

    BECAUSE: ClassVar[Mapping[str, str]] = {
        "layer": "all layers are patched at once",
        "metric": NO_METRIC,
    }

    layer: int | None
    hook: str
    cond: str
    alpha: float
    heads: tuple[int, ...]
    head_mask: tuple[int, ...]
    split: str
    k_positions: int
    n: int
    KL_raw_mean: Estimate
    KL_mapped_mean: Estimate
    delta: Estimate
    drop_pct: Estimate
    coverage_pct: Estimate
    raw_coverage_pct: Estimate
    to_base_pct: Estimate
    to_tuned_pct: Estimate
    gap_base_nats: Estimate
    gap_tuned_nats: Estimate
    flipped_pct: Estimate
    as_base_pct: Estimate
    metric: MetricEffect | None

    @property
    def metric_pct(self) -> Estimate:
        """How far the metric goes to base."""
        return undefined(NO_METRIC) if self.metric is None else self.metric.to_base_pct

    @property
    def metric_to_tuned_pct(self) -> Estimate:
        """How far the metric goes to tuned."""
        return undefined(NO_METRIC) if self.metric is None else self.metric.to_tuned_pct


@dataclass(frozen=True)
class Gap(Record):
    """How far apart the two models are, and what all heads of all layers carry of that.

    Args:
        base_nats: ``KL(p_base || p_tuned)``.
        tuned_nats: ``KL(p_tuned || p_base)``.
        answers_differ_pct: share of prompts on which their most likely tokens differ.
        noise_nats: what two ways to compute one and the same distribution differ by.
        left_out_base_pct: probability that base gives to tokens that tuned lacks.
        left_out_tuned_pct: probability that tuned gives to tokens that base lacks.
    """

    BECAUSE: ClassVar[Mapping[str, str]] = {"undefined_because": "shares of the gap are defined"}

    base_nats: Estimate
    tuned_nats: Estimate
    answers_differ_pct: Estimate
    every_layer_to_base_pct: Estimate
    every_layer_to_tuned_pct: Estimate
    noise_nats: float
    left_out_base_pct: float
    left_out_tuned_pct: float
    undefined_because: str | None


@dataclass(frozen=True)
class LayerTransfer(Record):
    """What the heads of one layer carry, all together and each alone."""

    BECAUSE: ClassVar[Mapping[str, str]] = NO_EFFECT_ANYWHERE

    to_base_pct: Estimate
    to_tuned_pct: Estimate
    heads_to_base_pct: tuple[Estimate, ...]
    heads_to_tuned_pct: tuple[Estimate, ...]
    n_eff: float | None


@dataclass(frozen=True)
class MetricSummary(LayerTransfer):
    """The metric of the answer in both models, and what the heads of one layer carry of it.

    Args:
        name: the metric.
        unit: its unit, as it stands behind a number.
        base: its mean over prompts, of the clean base model.
        tuned: of the clean tuned model.
        difference: tuned less base, what shares are taken of.
        noise: what patching nothing changes of it.
    """

    BECAUSE: ClassVar[Mapping[str, str]] = {
        "undefined_because": "shares of the difference are defined",
        **NO_EFFECT_ANYWHERE,
    }

    name: str
    unit: str
    base: Estimate
    tuned: Estimate
    difference: Estimate
    noise: float
    undefined_because: str | None
    every_layer_to_base_pct: Estimate
    every_layer_to_tuned_pct: Estimate


@dataclass(frozen=True)
class FullEffect:
    """What shares are taken of, such as ``ΔKL(ALL)``, and whether it can serve as a denominator.

    Args:
        delta: ``ΔKL(ALL)`` of the main layer, or the gap between the models.
        noise_floor_nats: largest mean KL that patching nothing leaves.
    """

    delta: Estimate
    noise_floor_nats: float
    undefined_because: str | None

    @property
    def is_harm(self) -> bool:
        """Whether the map clearly does harm, so that coverage is a share of harm."""
        value = self.delta.value
        return self.undefined_because is None and value is not None and value < 0


@dataclass(frozen=True)
class CoverageCurve(Record, Shown):
    """Coverage of the first k heads of a ranking, for k = 0 to H.

    Args:
        ranking: the ranking method; ``"best subset"`` for the upper envelope, whose sets need not
            be nested.
        head_sets: the heads patched at k = 0, 1, ..., H, in rank order.
        delta_nats: ``ΔKL`` of these sets.
        band_low_pct: lower end of a band that holds the whole curve with 95% confidence, by k;
            empty when coverage is undefined.
        band_high_pct: its upper end.
        area_pct: area under the curve over k/H, in percent: 100 when the first head carries all.
        cmd: area of ``|1 - coverage / 100|`` over k/H (MIB's circuit-model distance).
        k90: fewest heads that reach 90% of the full effect.
        exhaustive: by k; only the envelope has it.
    """

    ALSO_SAVED: ClassVar[tuple[str, ...]] = ("cpr",)
    BECAUSE: ClassVar[Mapping[str, str]] = {
        "exhaustive": "only the one set of each size that the ranking names was measured"
    }

    ranking: str
    head_sets: tuple[tuple[int, ...], ...]
    delta_nats: tuple[Estimate, ...]
    coverage_pct: tuple[Estimate, ...]
    band_low_pct: tuple[float, ...]
    band_high_pct: tuple[float, ...]
    area_pct: Estimate
    cmd: Estimate
    k90: Estimate
    exhaustive: tuple[bool, ...] | None = None

    def __repr__(self) -> str:
        return f"<CoverageCurve of {len(self.head_sets) - 1} heads by {self.ranking}>"

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each k: the heads, their ``ΔKL`` and its share."""
        rows = zip(self.head_sets, self.delta_nats, self.coverage_pct, strict=True)
        return frame_of(
            {"k": len(heads), "heads": heads, "delta_nats": delta, "coverage_pct": share}
            for heads, delta, share in rows
        )

    @property
    def cpr(self) -> Estimate:
        """Area under ``coverage / 100`` over k/H (MIB's circuit performance ratio)."""
        return self.area_pct.divided_by(100.0)


@dataclass(frozen=True)
class RandomSets(Record):
    """Random head sets of one size, as a distribution.

    Args:
        delta_nats: mean ``ΔKL`` of each.
        coverage_pct: coverage of each; empty when coverage is undefined.
        mean_pct: mean coverage.
        mean_error_pct: its standard error over the draws; 0 of all sets.
        quantiles_pct: coverage quantiles by level, for instance ``"0.975"``.
        seeds_pct: coverage of the run's own random sets, by seed.
        band_low_pct: lower end of the band that holds a random ranking's coverage at all measured
            k at once with probability 95%.
        band_high_pct: its upper end.
        band_holds_pct: how many of the drawn rankings lie within the band of the others.
        p_value: of the test that the k heads ranked first on one half of the prompts do no better
            on the other half than the average random set; selection is accounted for.
    """

    k: int
    n_subsets: int
    exhaustive: bool
    delta_nats: tuple[float, ...]
    coverage_pct: tuple[float, ...]
    mean_pct: float | None
    quantiles_pct: Mapping[str, float]
    seeds_pct: Mapping[int, float]
    mean_error_pct: float | None = None
    band_low_pct: float | None = None
    band_high_pct: float | None = None
    band_holds_pct: float | None = None
    p_value: float | None = None
    p_value_min: float | None = None


@dataclass(frozen=True)
class CoverageRow(Record):
    """One row of the coverage table: the top k heads of a ranking beside random sets.

    Args:
        heads: best first.
        coverage_pct: ranked and scored on the same prompts.
        cross_fitted_coverage_pct: coverage of the top k heads of one half of the prompts, scored on
            the other half.
        optimism_pct: the first minus the second, in percentage points; without an interval, since
            it comes from choosing heads and resampling keeps the choice.
        p_value: that of the random sets, see :class:`RandomSets`.
        random_mean_pct: mean coverage of the random sets.
        random_low_pct: 2.5% quantile of their coverage.
        random_high_pct: 97.5% quantile of their coverage.
        best_heads: the set of this size with the largest coverage that was found.
        best_coverage_pct: its coverage; it was chosen on the prompts it is scored on.
        answer_coverage_pct: coverage of the same heads by another metric: what the map repairs of
            the log-probability of the tuned model's own answer, as a share of what it repairs
            under the full patch.
    """

    BECAUSE: ClassVar[Mapping[str, str]] = {"best_heads": NOT_MEASURED}

    k: int
    ranking: str
    heads: tuple[int, ...]
    coverage_pct: Estimate
    cross_fitted_coverage_pct: Estimate
    optimism_pct: Estimate
    p_value: float | None
    p_value_min: float | None
    n_subsets: int
    exhaustive: bool
    random_mean_pct: float | None
    random_low_pct: float | None
    random_high_pct: float | None
    reason: str | None = None
    best_heads: tuple[int, ...] | None = None
    best_coverage_pct: float | None = None
    answer_coverage_pct: Estimate = NOT_COVERED


@dataclass(frozen=True)
class HeadStability:
    """How firmly one head stands at its rank when prompts are resampled.

    Args:
        top_probability: share of resamples in which it is among the best k, by k.
    """

    head: int
    rank: int
    score: Estimate
    rank_low: int | None
    rank_high: int | None
    top_probability: Mapping[int, float]
    reason: str | None = None


@dataclass(frozen=True, repr=False)
class RankStability(Listed):
    """Stability of a ranking under resampling and splitting of the prompts.

    Args:
        heads: best first.
        bootstrap_spearman: rank correlation between a resample and all prompts, over resamples.
        split_half_spearman: rank correlation between two halves of the prompts, over random splits.
        split_half_jaccard: overlap of the halves' top k, ``|A ∩ B| / |A ∪ B|``, by k.
    """

    ROWS: ClassVar[str] = "heads"

    ranking: str
    heads: tuple[HeadStability, ...]
    bootstrap_spearman: Spread
    split_half_spearman: Spread
    split_half_jaccard: Mapping[int, Spread]
    n_splits: int


@dataclass(frozen=True)
class Agreement:
    """How two rankings of the same heads agree.

    Args:
        kind: what differs: ``"method"``, ``"metric"``, ``"alpha"``, ``"map_kind"``, ``"fold"``,
            ``"seed"`` or ``"layer_index"``.
        kendall: Kendall's tau-b.
        spearman: Spearman's rank correlation.
        rbo: rank-biased overlap with persistence 0.9; 1 for equal rankings.
        jaccard: overlap of the top k, by k.
        note: what the comparison cannot mean, where it has such a limit.
    """

    kind: str
    first: str
    second: str
    kendall: Estimate
    spearman: Estimate
    rbo: Estimate
    jaccard: Mapping[int, Estimate]
    note: str | None = None


@dataclass(frozen=True)
class MethodRow(Record):
    """One ranking method beside exact single-head ``ΔKL``.

    Args:
        agreement: its agreement with the ranking by exact single-head ``ΔKL``, unless it is that.
        coverage_pct: of its top k, by k.
        area_pct: area under its coverage curve.
        k90: fewest of its heads that reach 90%.
        seconds: how long the ranking took.
        reason: why the method is missing, if it is.
        agreement_reason: why the agreement is missing, if it is.
    """

    BECAUSE: ClassVar[Mapping[str, str]] = {"seconds": "the ranking was not made here"}

    method: str
    agreement: Agreement | None
    coverage_pct: Mapping[int, Estimate]
    area_pct: Estimate
    k90: Estimate
    seconds: float | None
    reason: str | None = None
    agreement_reason: str | None = None


@dataclass(frozen=True)
class Concentration:
    """How unevenly scores lie on heads.

    Args:
        scores: which scores: ``"KL_raw"``, or ``"|ΔKL|"`` (magnitudes, since ΔKL has a sign).
        gini: 0 when all heads are equal, ``1 - 1/H`` when one head has everything.
        entropy: Shannon entropy over ``ln H``: 1 when all are equal, 0 when one has everything.
        effective_heads: ``exp`` of the entropy: between 1 and H.
        churn: share of heads above the 80th percentile of the scores.
    """

    scores: str
    gini: Estimate
    entropy: Estimate
    effective_heads: Estimate
    churn: Estimate


@dataclass(frozen=True)
class PairInteraction:
    """``Δ({i,j}) - Δ(i) - Δ(j)`` of one pair of heads.

    Args:
        interaction: positive when the two repair more together than apart, in nats.
        p_max_t: sign-flip p-value corrected for all pairs.
    """

    first: int
    second: int
    interaction: Estimate
    p_max_t: float | None
    reason: str | None = None


@dataclass(frozen=True, repr=False)
class Interactions(Listed):
    """Do heads add up?

    Args:
        matrix_nats: ``Δ({i,j}) - Δ(i) - Δ(j)``; the diagonal is 0.
        strongest: the pairs with the largest interaction, by magnitude.
        sum_of_singles: sum of single-head ``ΔKL``, in nats.
        joint: ``ΔKL(ALL)``, in nats.
        sum_over_joint: their ratio; 1 when heads add up.
        pairwise_prediction: ``ΔKL(ALL)`` as predicted by singles and pairs.
    """

    ROWS: ClassVar[str] = "strongest"

    matrix_nats: Float64[ndarray, "head head"]
    strongest: tuple[PairInteraction, ...]
    sum_of_singles: Estimate
    joint: Estimate
    sum_over_joint: Estimate
    pairwise_prediction: Estimate


@dataclass(frozen=True)
class LadderRow(Record):
    """What stands in for a head set, from a constant to the head itself.

    Args:
        name: name of the set: ``head{h}``, ``top{k}`` or ``full``.
        damage_nats: ``D(x) = KL(patched || clean)`` of the tuned model with ``x`` in place of the
            heads, by source ``x``.
        recovered_pct: ``100 (1 - D(x) / D(constant))`` by source; undefined where ``D(constant)``
            lies below the idle line.
        interference_nats: ``D(raw) - D(constant)``: what base's activation costs beyond silence.
        restored_nats: ``D(constant) - D(mapped)``: what the map gives back.
        lost_nats: ``D(mapped)``: what it does not.
    """

    name: str
    heads: tuple[int, ...]
    alpha: float
    damage_nats: Mapping[str, Estimate]
    recovered_pct: Mapping[str, Estimate]
    interference_nats: Estimate
    restored_nats: Estimate
    lost_nats: Estimate


@dataclass(frozen=True, repr=False)
class Ladder(Listed, Record):
    """What replaces heads, at one blend strength and on one split.

    Args:
        rows: a row a head, then a row a chosen set, the whole layer last.
        idle_below_nats: the idle line: a share of the joint effect, or so many noise floors.
        rule: how the idle line is drawn, in words.
    """

    ROWS: ClassVar[str] = "rows"

    rows: tuple[LadderRow, ...]
    idle_below_nats: float
    rule: str

    def __getitem__(self, name: str) -> LadderRow:
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class HeadKind(Record):
    """What kind of change one head shows.

    Args:
        kind: ``"idle"``, ``"unchanged"``, ``"shifted"``, ``"recoded"``, ``"reassigned"``,
            ``"replaced"`` or ``"undecided"``.
        why: what leaves it undecided, or that a reassigned one fails on neutral prompts alone; else
            None.
        function_kept: whether base's own head output does for the tuned head's, of a head that is
            recoded or reassigned; None where it is not clear or not asked.
        leave_one_out_nats: what the raw patch of the layer does less without this head.
        other_head: the other base head of the layer from which most is recovered.
        other_recovered_pct: how much that is.
    """

    BECAUSE: ClassVar[Mapping[str, str]] = {
        "why": "the kind is clear",
        "function_kept": "it is not asked of this kind, or not clear",
        "other_head": "it is asked of heads that changed alone",
    }

    head: int
    kind: str
    why: str | None
    function_kept: bool | None
    leave_one_out_nats: Estimate
    other_head: int | None = None
    other_recovered_pct: Estimate = NOT_ASKED


@dataclass(frozen=True, repr=False)
class HeadKinds(Listed, Record):
    """The kinds of all heads.

    Args:
        heads: one entry per head.
        rule: the rule in words, with its numbers.
        n_contents: how many contents the train prompts have; None if they name none.
        few_contents: whether these are so few that a map can send each of them anywhere.
    """

    ROWS: ClassVar[str] = "heads"
    BECAUSE: ClassVar[Mapping[str, str]] = {"n_contents": "the train prompts name no content"}

    heads: tuple[HeadKind, ...]
    rule: str
    n_contents: int | None = None
    few_contents: bool = False

    def of(self, *kinds: str) -> tuple[int, ...]:
        """The heads of some kinds."""
        return tuple(each.head for each in self.heads if each.kind in kinds)


SHUFFLED = "shuffled pairs"
"""The stand-in that a claim names: a map fitted on prompts that do not belong together."""


@dataclass(frozen=True)
class StandIn:
    """Something that stands in for the map, on the heads that changed, at strength 1.

    Args:
        question: what it asks, in plain words.
        damage: what is lost with it, in nats.
        recovered_pct: of what these heads tell beyond a constant, how much is there with it.
        behind_nats: its damage less that of the map, prompt by prompt.
    """

    name: str
    question: str
    heads: tuple[int, ...]
    damage: Estimate
    recovered_pct: Estimate
    behind_nats: Estimate
    reason: str | None = None


@dataclass(frozen=True)
class ControlLayer(Record):
    """The control layer, and the main layer beside it, prompt by prompt.

    Args:
        less_nats: ``ΔKL(ALL)`` of the main layer less that of the control layer.
        less_to_base_pct: ``to_base`` of the main layer less that of the control layer.
    """

    layer: int
    delta: Estimate
    less_nats: Estimate
    less_to_base_pct: Estimate


@dataclass(frozen=True)
class NoisePair(Record):
    """The same numbers of a tuned model whose weight change was shuffled inside each matrix.

    Args:
        gap_base_nats: its gap to base.
        to_base_pct: what all heads of the layer carry of that.
        real_over_noise: the real pair's number as a multiple of the noise pair's, by name.
        delta_beyond_nats: the real ``ΔKL(ALL)`` less the noise pair's, prompt by prompt.
        gap_beyond_nats: the real gap less the noise pair's, prompt by prompt.
    """

    gap_base_nats: Estimate
    to_base_pct: Estimate
    KL_raw: Estimate
    delta: Estimate
    real_over_noise: Mapping[str, Estimate]
    delta_beyond_nats: Estimate
    gap_beyond_nats: Estimate


@dataclass(frozen=True, repr=False)
class DirectionCoverage(Listed):
    """What the top k heads cover by one score, beside random heads.

    Args:
        direction: ``"to_base"`` or ``"to_tuned"``; of the metric ``"metric"``, to base, or
            ``"metric_to_tuned"``; else the run's own score, as ``"delta"``.
        full: what everything is a share of: the gap, or the effect of all heads.
        curves: the curve of the ranking by this score, and the cross-fitted one.
    """

    ROWS: ClassVar[str] = "coverage"

    direction: str
    full: FullEffect
    coverage: tuple[CoverageRow, ...]
    curves: tuple[CoverageCurve, ...]
    random: tuple[RandomSets, ...]


@dataclass(frozen=True)
class AlphaPoint:
    """The full effect and the head ranking at one blend strength.

    Args:
        to_base_pct: with the raw patch of this strength.
        coverage_pct: coverage of each single head.
        head_to_base_pct: the same of each single head.
        head_delta_nats: single-head ``ΔKL``.
        heads: ranked by it, best first.
        agreement: agreement of this ranking with that at the run's own alpha, unless it is that.
        agreement_reason: why it is missing, if it is.
        shuffled_pct: what a map of shuffled pairs repairs, as a share of ``ΔKL(ALL)``.
    """

    alpha: float
    KL_raw: Estimate
    KL_mapped: Estimate
    delta: Estimate
    drop_pct: Estimate
    to_base_pct: Estimate
    coverage_pct: tuple[Estimate, ...]
    head_to_base_pct: tuple[Estimate, ...]
    head_delta_nats: tuple[float, ...]
    heads: tuple[int, ...]
    agreement: Agreement | None
    agreement_reason: str | None = None
    shuffled_pct: Estimate = UNMEASURED


@dataclass(frozen=True)
class HeadTest:
    """Sign-flip test of one head's ``ΔKL`` against zero.

    Args:
        delta: mean ``ΔKL``, in nats.
        p_value: two-sided, for this head alone.
        p_max_t: corrected for everything tried, by the largest statistic of each flip.
        p_holm: corrected by Holm.
        p_bh: false discovery rate by Benjamini and Hochberg.
    """

    head: Head
    alpha: float
    delta: float
    p_value: float | None
    p_max_t: float | None
    p_holm: float | None
    p_bh: float | None
    reason: str | None = None


@dataclass(frozen=True, repr=False)
class HeadTests(Listed):
    """Sign-flip tests of everything that was tried; ``..._min`` is the smallest value of a kind.

    Args:
        tests: one per head (and layer and alpha, where several were tried).
        family: what is corrected for, in words.
        n_tests: how many of the tests have a p-value; Holm and BH correct for these.
        n_flips: number of sign patterns.
        p_holm_min: that of the clearest head.
        p_bh_min: where all heads are as clear as can be.
        exhaustive: whether these are all sign patterns.
        n_groups: groups of prompts; their signs flip together.
    """

    ROWS: ClassVar[str] = "tests"

    tests: tuple[HeadTest, ...]
    family: str
    n_tests: int
    n_flips: int
    p_value_min: float
    p_max_t_min: float
    p_holm_min: float
    p_bh_min: float
    exhaustive: bool
    n_groups: int


@dataclass(frozen=True)
class Alignment:
    """How the first direction of a joint low-rank map lies on the heads.

    Args:
        share: share of the direction's squared length that lies on each head; sums to 1.
        spearman: rank correlation with single-head ``ΔKL``.
        kendall: the same by Kendall's tau-b.
    """

    share: tuple[float, ...]
    spearman: Estimate
    kendall: Estimate
    reason: str | None = None


@dataclass(frozen=True)
class LayerRow(Record):
    """One layer beside the others.

    Args:
        full: whether its ``ΔKL(ALL)`` can be a denominator.
        curve: coverage of its own top k, with area and k90; None when only the grids were given.
        concentration: how unevenly its single-head ``|ΔKL|`` lies on heads.
        pooled_churn: share of its heads above the 80th percentile of ``|ΔKL|`` over all layers.
    """

    BECAUSE: ClassVar[Mapping[str, str]] = {"curve": NOT_MEASURED}

    layer: int
    to_base_pct: Estimate
    to_tuned_pct: Estimate
    KL_raw: Estimate
    KL_mapped: Estimate
    delta: Estimate
    drop_pct: Estimate
    full: FullEffect
    curve: CoverageCurve | None
    concentration: Concentration
    pooled_churn: float


@dataclass(frozen=True)
class RankedHead:
    """One head in the ranking of all heads of all layers by single-head ``ΔKL``."""

    head: Head
    rank: int
    delta: Estimate
    rank_low: int | None
    rank_high: int | None
    reason: str | None = None


@dataclass(frozen=True, repr=False)
class LayerComparison(Listed, Record):
    """Everything that compares layers. Matrices hold single heads, a row a layer.

    Args:
        layers: in ascending order.
        gap: how far apart the models are, and what all heads of all layers carry of that.
        to_base_pct: None where shares of the gap are undefined.
        to_tuned_pct: None where shares of the gap are undefined.
        drop_pct: None where ``KL_raw`` is 0.
        rows: the layers side by side.
        ranking: all heads of all layers, best first.
        tests: sign-flip tests of all of them, corrected for all of them.
        by_index: rankings of two layers compared index by index, each with a note on what that
            cannot mean.
    """

    ROWS: ClassVar[str] = "rows"
    BECAUSE: ClassVar[Mapping[str, str]] = {
        "drop_pct": NO_RAW_EFFECT,
        "to_base_pct": "shares of the gap are undefined",
        "to_tuned_pct": "shares of the gap are undefined",
    }

    layers: tuple[int, ...]
    alpha: float
    gap: Gap
    to_base_pct: tuple[tuple[float | None, ...], ...]
    to_tuned_pct: tuple[tuple[float | None, ...], ...]
    KL_raw: Float64[ndarray, "layer head"]
    KL_mapped: Float64[ndarray, "layer head"]
    delta: Float64[ndarray, "layer head"]
    drop_pct: tuple[tuple[float | None, ...], ...]
    rows: tuple[LayerRow, ...]
    ranking: tuple[RankedHead, ...]
    tests: HeadTests
    by_index: tuple[Agreement, ...]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as strict JSON values; every null has its reason."""
        return dict(to_json(self))


@dataclass(frozen=True)
class LayerChoice:
    """Which layers a sweep proposes, and why.

    Args:
        main: the proposed main layer; None where no layer qualifies.
        control: the proposed control layer; None where none qualifies.
        reasons: a sentence for each.
    """

    main: int | None
    control: int | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class CellRow:
    """One layer of a cell of a study.

    Args:
        n_layers: how many layers the models have.
        values: what is compared, by metric, of all heads of the layer.
        k90: fewest heads that reach 90% of it.
        gini: how unevenly single-head ``|ΔKL|`` lies on heads.
        is_main: whether the sweep proposes it as main layer.
    """

    cell: str
    layer: int
    n_layers: int
    values: Mapping[str, Estimate]
    k90: float | None
    gini: float | None
    is_main: bool


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
        "interactions": NOT_MEASURED,
        "neutral": NOT_MEASURED,
        "noise": NOT_MEASURED,
        "metric": NO_METRIC,
        "weight_cosine": "the models were not compared weight by weight",
        "control_layer": NO_CONTROL_LAYER,
        "alignment": (
            "only measured numbers were given: the direction comes from the models' activations"
        ),
    }

    settings: AnalysisSettings
    gap: Gap
    transfer: LayerTransfer
    metric: MetricSummary | None
    directions: tuple[DirectionCoverage, ...]
    ladders: tuple[Ladder, ...]
    neutral: Ladder | None
    noise: NoisePair | None
    weight_cosine: float | None
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
    stand_ins: tuple[StandIn, ...]
    control_layer: ControlLayer | None
    alignment: Alignment | None
    alphas: tuple[AlphaPoint, ...]
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
