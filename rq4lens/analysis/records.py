"""The records of ``analysis.json`` and ``layers.json``: what the analysis adds to the grid.

Percentages are in percent, effects in nats. An :class:`Estimate` holds a value and its interval;
whatever is undefined is None with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.statistics.bootstrap import Estimate, Spread, undefined
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.heads import Head
from rq4lens.results import NO_RAW_EFFECT, Record

NO_ANSWER_COVERAGE = undefined("it was not measured")
NO_SHARE = undefined("there is nothing to take a share of")
NOT_MEASURED = "only the grid was given: new head sets would have to be measured"


@dataclass(frozen=True)
class ConditionRecord:
    """One condition of the grid with its intervals: a record of ``rq4_results.json``.

    Args:
        layer: the patched layer.
        hook: the patched activation.
        cond: name of the condition.
        alpha: blend strength.
        heads: the patched heads.
        head_mask: 1 for each patched head of the layer, else 0.
        split: the prompts that were measured.
        k_positions: how many positions were patched.
        n: how many prompts were measured.
        KL_raw_mean: KL of the raw patch, in nats.
        KL_mapped_mean: KL of the mapped patch, in nats.
        delta: ``ΔKL``, in nats.
        drop_pct: share of the raw damage that the map repairs.
        coverage_pct: ``ΔKL`` as a share of ``ΔKL(ALL)`` of the main layer.
    """

    layer: int
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


@dataclass(frozen=True)
class FullEffect:
    """``ΔKL(ALL)``, the denominator of every coverage, and whether it can serve as one.

    Args:
        delta: ``ΔKL(ALL)`` of the main layer, in nats.
        noise_floor_nats: largest mean KL that patching nothing leaves.
        undefined_because: why coverage is undefined; None when it is defined.
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
class CoverageCurve(Record):
    """Coverage of the first k heads of a ranking, for k = 0 to H.

    Args:
        ranking: the ranking method; ``"best subset"`` for the upper envelope, whose sets need not
            be nested.
        head_sets: the heads patched at k = 0, 1, ..., H, in rank order.
        delta_nats: ``ΔKL`` of these sets.
        coverage_pct: their coverage; never clipped.
        band_low_pct: lower end of a band that holds the whole curve with 95% confidence, by k;
            empty when coverage is undefined.
        band_high_pct: its upper end.
        area_pct: area under the curve over k/H, in percent: 100 when the first head carries all.
        cmd: area of ``|1 - coverage / 100|`` over k/H (MIB's circuit-model distance).
        k90: fewest heads that reach 90% of the full effect.
        exhaustive: for each k, whether every set of that size was measured; only the envelope has
            it.
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

    @property
    def cpr(self) -> Estimate:
        """Area under ``coverage / 100`` over k/H (MIB's circuit performance ratio)."""
        return self.area_pct.divided_by(100.0)


@dataclass(frozen=True)
class RandomSets(Record):
    """Random head sets of one size, as a distribution.

    Args:
        k: their size.
        n_subsets: how many were measured: all of them, or independent draws.
        exhaustive: whether these are all sets of that size.
        delta_nats: mean ``ΔKL`` of each.
        coverage_pct: coverage of each; empty when coverage is undefined.
        mean_pct: mean coverage.
        quantiles_pct: coverage quantiles by level, for instance ``"0.975"``.
        seeds_pct: coverage of the run's own random sets, by seed.
        band_low_pct: lower end of the band that holds a random ranking's coverage at all measured
            k at once with probability 95%.
        band_high_pct: its upper end.
        p_value: of the test that the k heads ranked first on one half of the prompts do no better
            on the other half than the average random set; selection is accounted for.
        p_value_min: smallest value ``p_value`` can take.
    """

    k: int
    n_subsets: int
    exhaustive: bool
    delta_nats: tuple[float, ...]
    coverage_pct: tuple[float, ...]
    mean_pct: float | None
    quantiles_pct: Mapping[str, float]
    seeds_pct: Mapping[int, float]
    band_low_pct: float | None = None
    band_high_pct: float | None = None
    p_value: float | None = None
    p_value_min: float | None = None


@dataclass(frozen=True)
class CoverageRow(Record):
    """One row of the coverage table.

    Args:
        k: number of heads.
        ranking: the ranking they come from.
        heads: the top k heads, best first.
        coverage_pct: their coverage, ranked and scored on the same prompts.
        cross_fitted_coverage_pct: coverage of the top k heads of one half of the prompts, scored on
            the other half.
        optimism_pct: the first minus the second, in percentage points; without an interval, since
            it comes from choosing heads and resampling keeps the choice.
        p_value: of the test that the top k heads of one half do no better on the other half than
            the average random set of k heads; selection is accounted for.
        p_value_min: smallest value ``p_value`` can take.
        n_subsets: how many random sets of this size were measured.
        exhaustive: whether these are all sets of that size.
        random_mean_pct: their mean coverage.
        random_low_pct: 2.5% quantile of their coverage.
        random_high_pct: 97.5% quantile of their coverage.
        reason: why cross-fitted values, p-values or random sets are missing.
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
    answer_coverage_pct: Estimate = NO_ANSWER_COVERAGE


@dataclass(frozen=True)
class HeadStability:
    """How firmly one head stands at its rank when prompts are resampled.

    Args:
        head: the head.
        rank: its rank on all prompts; 1 is best.
        score: its score.
        rank_low: 2.5% quantile of its rank over resamples.
        rank_high: 97.5% quantile.
        top_probability: share of resamples in which it is among the best k, by k.
        reason: why the range of the rank is missing, if it is.
    """

    head: int
    rank: int
    score: Estimate
    rank_low: int | None
    rank_high: int | None
    top_probability: Mapping[int, float]
    reason: str | None = None


@dataclass(frozen=True)
class RankStability:
    """Stability of a ranking under resampling and splitting of the prompts.

    Args:
        ranking: the ranking method.
        heads: one entry per head, best first.
        bootstrap_spearman: rank correlation between a resample and all prompts, over resamples.
        split_half_spearman: rank correlation between two halves of the prompts, over random splits.
        split_half_jaccard: overlap of the halves' top k, ``|A ∩ B| / |A ∪ B|``, by k.
        n_splits: number of random splits.
    """

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
        first: one ranking.
        second: the other one.
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
        method: the method.
        agreement: its agreement with the ranking by exact single-head ``ΔKL``, unless it is that.
        coverage_pct: coverage that its top k reaches, by k.
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
        first: one head.
        second: the other head.
        interaction: positive when the two repair more together than apart, in nats.
        p_max_t: sign-flip p-value corrected for all pairs.
        reason: why it is missing, if it is.
    """

    first: int
    second: int
    interaction: Estimate
    p_max_t: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Interactions:
    """Do heads add up?

    Args:
        matrix_nats: ``Δ({i,j}) - Δ(i) - Δ(j)``; the diagonal is 0.
        strongest: the pairs with the largest interaction, by magnitude.
        sum_of_singles: sum of single-head ``ΔKL``, in nats.
        joint: ``ΔKL(ALL)``, in nats.
        sum_over_joint: their ratio; 1 when heads add up.
        pairwise_prediction: ``ΔKL(ALL)`` as predicted by singles and pairs.
    """

    matrix_nats: Float64[ndarray, "head head"]
    strongest: tuple[PairInteraction, ...]
    sum_of_singles: Estimate
    joint: Estimate
    sum_over_joint: Estimate
    pairwise_prediction: Estimate


@dataclass(frozen=True)
class HeadKind:
    """What kind of head one is.

    Args:
        head: the head.
        kind: ``"idle"``, ``"re-coordinated"``, ``"rewired"`` or ``"undecided"``.
        KL_raw: mean KL of the raw patch, in nats.
        KL_mapped: mean KL of the mapped patch, in nats.
        drop_pct: share of the raw patch's damage that the map repairs.
    """

    head: int
    kind: str
    KL_raw: Estimate
    KL_mapped: Estimate
    drop_pct: Estimate


@dataclass(frozen=True)
class HeadKinds:
    """The kinds of all heads and the rule that tells them apart.

    Args:
        heads: one entry per head, in head order.
        rule: the rule in words, with its numbers.
        idle_below_nats: a head whose KL_raw lies below this is idle.
        recoordinated_above_pct: a head whose drop lies above this is re-coordinated.
    """

    heads: tuple[HeadKind, ...]
    rule: str
    idle_below_nats: float
    recoordinated_above_pct: float


@dataclass(frozen=True)
class Control:
    """One row of the table "does the claim survive".

    Args:
        name: the control.
        question: what it asks.
        value: the control's own effect, ``ΔKL`` in nats unless ``unit`` says otherwise.
        reference: what it is compared with.
        difference: reference minus value, paired where both are measured on the same prompts.
        unit: unit of the three numbers.
        survives: whether the claim survives; None when the control could not be run or decides
            nothing.
        reason: why ``survives`` is None.
        share_pct: value as a share of the reference, in percent: a claim can survive a control
            that comes close.
    """

    name: str
    question: str
    value: Estimate
    reference: Estimate
    difference: Estimate
    unit: str
    survives: bool | None
    reason: str | None = None
    share_pct: Estimate = NO_SHARE


@dataclass(frozen=True)
class AlphaPoint:
    """The full effect and the head ranking at one blend strength.

    Args:
        alpha: blend strength.
        KL_raw: of all heads, in nats.
        KL_mapped: of all heads, in nats.
        delta: ``ΔKL(ALL)``, in nats.
        drop_pct: share of the damage that is repaired.
        head_delta_nats: single-head ``ΔKL``, in head order.
        heads: heads ranked by it, best first.
        agreement: agreement of this ranking with that at the run's own alpha, unless it is that.
        agreement_reason: why it is missing, if it is.
    """

    alpha: float
    KL_raw: Estimate
    KL_mapped: Estimate
    delta: Estimate
    drop_pct: Estimate
    head_delta_nats: tuple[float, ...]
    heads: tuple[int, ...]
    agreement: Agreement | None
    agreement_reason: str | None = None


@dataclass(frozen=True)
class HeadTest:
    """Sign-flip test of one head's ``ΔKL`` against zero.

    Args:
        head: layer and index.
        alpha: blend strength.
        delta: mean ``ΔKL``, in nats.
        p_value: two-sided, for this head alone.
        p_max_t: corrected for everything tried, by the largest statistic of each flip.
        p_holm: corrected by Holm.
        p_bh: false discovery rate by Benjamini and Hochberg.
        reason: why the p-values are missing, if they are.
    """

    head: Head
    alpha: float
    delta: float
    p_value: float | None
    p_max_t: float | None
    p_holm: float | None
    p_bh: float | None
    reason: str | None = None


@dataclass(frozen=True)
class HeadTests:
    """Sign-flip tests of everything that was tried.

    Args:
        tests: one per head (and layer and alpha, where several were tried).
        family: what is corrected for, in words.
        n_tests: how many of the tests have a p-value; Holm and BH correct for these.
        n_flips: number of sign patterns.
        p_value_min: smallest p-value they can give.
        p_max_t_min: smallest ``p_max_t``.
        p_holm_min: smallest ``p_holm``, that of the clearest head.
        p_bh_min: smallest ``p_bh``, where all heads are as clear as can be.
        exhaustive: whether these are all sign patterns.
        n_groups: groups of prompts; their signs flip together.
    """

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
        share: share of the direction's squared length that lies on each head, in head order; sums
            to 1.
        spearman: rank correlation with single-head ``ΔKL``.
        kendall: the same by Kendall's tau-b.
        reason: why it is missing, if it is.
    """

    share: tuple[float, ...]
    spearman: Estimate
    kendall: Estimate
    reason: str | None = None


@dataclass(frozen=True)
class LayerRow(Record):
    """One layer beside the others.

    Args:
        layer: the layer.
        KL_raw: of all its heads, in nats.
        KL_mapped: of all its heads, in nats.
        delta: its ``ΔKL(ALL)``, in nats.
        drop_pct: share of the raw damage that its map repairs.
        full: whether its ``ΔKL(ALL)`` can be a denominator.
        curve: coverage of its own top k, with area and k90; None when only the grids were given.
        concentration: how unevenly its single-head ``|ΔKL|`` lies on heads.
        pooled_churn: share of its heads above the 80th percentile of ``|ΔKL|`` over all layers.
    """

    BECAUSE: ClassVar[Mapping[str, str]] = {"curve": NOT_MEASURED}

    layer: int
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
    """One head in the ranking of all heads of all layers.

    Args:
        head: layer and index.
        rank: its rank by ``ΔKL``; 1 is best.
        delta: its single-head ``ΔKL``, in nats.
        rank_low: 2.5% quantile of its rank over resamples.
        rank_high: 97.5% quantile.
        reason: why the range of the rank is missing, if it is.
    """

    head: Head
    rank: int
    delta: Estimate
    rank_low: int | None
    rank_high: int | None
    reason: str | None = None


@dataclass(frozen=True)
class LayerComparison(Record):
    """Everything that compares layers.

    Args:
        layers: the layers, in ascending order; rows of the matrices.
        alpha: blend strength.
        KL_raw: single-head ``KL_raw``, in nats.
        KL_mapped: single-head ``KL_mapped``, in nats.
        delta: single-head ``ΔKL``, in nats.
        drop_pct: single-head drop; None where ``KL_raw`` is 0.
        rows: the layers side by side.
        ranking: all heads of all layers, best first.
        tests: sign-flip tests of all of them, corrected for all of them.
        by_index: rankings of two layers compared index by index, each with a note on what that
            cannot mean.
    """

    BECAUSE: ClassVar[Mapping[str, str]] = {"drop_pct": NO_RAW_EFFECT}

    layers: tuple[int, ...]
    alpha: float
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
        cell: name of the cell.
        layer: the layer.
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
