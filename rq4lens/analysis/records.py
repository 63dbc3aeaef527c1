"""The records of ``analysis.json``: what the analysis adds to the numbers of the grid.

Percentages are in percent, effects in nats. An :class:`Estimate` holds a value and its interval;
whatever is undefined is None with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.statistics.bootstrap import Estimate, Spread, undefined

NO_SHARE = undefined("there is nothing to take a share of")
NOT_MEASURED = undefined("it was not measured")


@dataclass(frozen=True)
class CoverageCurve:
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
        cpr: area under ``f = coverage / 100`` over k/H (MIB's circuit performance ratio).
        cmd: area of ``|1 - f|`` over k/H (MIB's circuit-model distance).
        k90: fewest heads that reach 90% of the full effect.
        exhaustive: for each k, whether every set of that size was measured; only the envelope has
            it.
    """

    ranking: str
    head_sets: tuple[tuple[int, ...], ...]
    delta_nats: tuple[Estimate, ...]
    coverage_pct: tuple[Estimate, ...]
    band_low_pct: tuple[float, ...]
    band_high_pct: tuple[float, ...]
    area_pct: Estimate
    cpr: Estimate
    cmd: Estimate
    k90: Estimate
    exhaustive: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class RandomSets:
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
class CoverageRow:
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
    answer_coverage_pct: Estimate = NOT_MEASURED


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
class MethodRow:
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
