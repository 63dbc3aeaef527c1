"""Layers side by side, by head effects, one global ranking and curves; one layer by strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis import records
from rq4lens.analysis.coverage.curves import ranking_curve
from rq4lens.analysis.effects.measured import MeasuredLayer, MeasuredSets, Site
from rq4lens.analysis.effects.table import (
    NO_GAP,
    bootstrap_of,
    carried_pct,
    condition_estimates,
    gap_of,
    transfer_estimates,
)
from rq4lens.analysis.rankings.agreement import INDEX_NOTE, THE_SAME, Scored, agreement
from rq4lens.analysis.rankings.compared import answer_repair_nats, rank_ranges
from rq4lens.analysis.rankings.exact import single_ranking
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, number_text, undefined
from rq4lens.analysis.statistics.concentration import CHURN_QUANTILE, churn, concentration
from rq4lens.analysis.statistics.sign_flips import head_tests
from rq4lens.errors import UserError
from rq4lens.heads import Head
from rq4lens.patching.measured import MeasuresPatches
from rq4lens.patching.patch import RAW
from rq4lens.results import (
    TRANSFERS,
    ConditionResult,
    GridResult,
    RankBy,
    gaps_of,
    kl_nats_of,
    order_of,
    ranks_of,
)


@dataclass(frozen=True)
class GridNumber:
    """One number of a head set, on the mean over prompts.

    Args:
        name: its name in files.
        label: its symbol.
        unit: ``"nats"`` or ``"%"``.
        meaning: what it says, in a few words.
        ranks: the setting ``rank_by`` that orders single heads by it, if there is one.
    """

    name: str
    label: str
    unit: str
    meaning: str
    ranks: RankBy | None = None

    def of(self, grid: GridResult, condition: ConditionResult) -> float | None:
        """Its value under a condition of a grid; None where it is undefined."""
        if self.name == "answer_logprob":
            return float(answer_repair_nats(condition).mean())
        if self.ranks not in TRANSFERS:
            found: float | None = getattr(condition, self.name)
            return found
        if condition.transfer is None or grid["none"].transfer is None:
            return None
        whole, left = gaps_of(grid["none"], [condition], self.ranks).mean(-1)
        noise = grid.compared.noise_nats + grid.noise_floor_nats
        return float(100 * (1 - left[0] / whole[0])) if whole[0] > noise else None

    @property
    def title(self) -> str:
        """Symbol and unit, for an axis."""
        return f"{self.label} of all heads ({self.unit})"

    def text(self, value: float | None) -> str:
        """A value as it is printed."""
        return number_text(value, ".1f%" if self.unit == "%" else ".6f")

    def of_layer(self, row: records.LayerRow, grid: GridResult, bootstrap: Bootstrap) -> Estimate:
        """The value under a patch of all heads, from the layer's row or else from its grid."""
        if self.name in COMPARED:
            found: Estimate = getattr(row, self.name)
            return found
        (estimate,) = bootstrap.estimate(answer_repair_nats(grid.full)[None])
        return estimate

    def best_head(self, grids: Mapping[int, GridResult]) -> Head | None:
        """The single head of all layers with the largest value; ties go to the lower one."""
        found = [
            (value, Head(layer, head))
            for layer, grid in sorted(grids.items())
            for head, single in enumerate(grid.singles)
            if (value := self.of(grid, single)) is not None
        ]
        return max(found, key=lambda each: each[0])[1] if found else None


METRICS: Mapping[str, GridNumber] = {
    each.name: each
    for each in (
        GridNumber("to_base_pct", "to_base", "%", "of the gap undone", "to_base"),
        GridNumber("to_tuned_pct", "to_tuned", "%", "of it given base", "to_tuned"),
        GridNumber("delta", "ΔKL", "nats", "raw minus mapped", "delta"),
        GridNumber("KL_raw", "KL_raw", "nats", "damage of the raw patch"),
        GridNumber("KL_mapped", "KL_mapped", "nats", "damage of the mapped one"),
        GridNumber("drop_pct", "drop", "%", "100 ΔKL / KL_raw", "drop_pct"),
        GridNumber(
            "answer_logprob",
            "answer",
            "nats",
            "log-probability of the tuned model's own answer that the map wins back",
        ),
    )
}
"""The metrics by name."""

COMPARED = ("to_base_pct", "to_tuned_pct", "delta", "KL_raw", "KL_mapped", "drop_pct")
"""What a study compares unless it says otherwise."""


def rank_by_of(names: Sequence[str]) -> RankBy | None:
    """The setting that orders single heads by the first of some metrics that can order them."""
    return next((ranks for name in names if (ranks := METRICS[name].ranks) is not None), None)


def compare_layers(
    grids: Mapping[int, GridResult], experiment: MeasuresPatches | None = None
) -> records.LayerComparison:
    """Compare the layers that were measured on the same prompts.

    >>> rq.compare_layers({1: run}).rows[0].layer
    1

    Args:
        grids: the grid of each layer; full and single-head conditions are enough.
        experiment: measures the rest of each layer's curve.

    Returns:
        The comparison.

    Raises:
        UserError: if there is no layer, or the grids differ in prompts or alpha.
    """
    _check(grids)
    grids = {layer: grids[layer] for layer in sorted(grids)}
    layers, any_grid = tuple(grids), next(iter(grids.values()))
    bootstrap, alpha = bootstrap_of(any_grid), any_grid.settings.patching.alpha
    gap = gap_of(any_grid)
    singles = np.stack([kl_nats_of(grid.singles) for grid in grids.values()])
    delta = singles[:, 0] - singles[:, 1]
    raw, mapped = singles.mean(-1).swapaxes(0, 1)
    threshold = float(np.quantile(np.abs(delta.mean(-1)), CHURN_QUANTILE))
    heads = [Head(layer, head) for layer in layers for head in range(any_grid.n_heads)]
    of_heads = delta.reshape(len(heads), -1)
    return records.LayerComparison(
        layers=layers,
        alpha=alpha,
        gap=gap,
        to_base_pct=_carried(grids, "to_base", gap),
        to_tuned_pct=_carried(grids, "to_tuned", gap),
        KL_raw=raw,
        KL_mapped=mapped,
        delta=raw - mapped,
        drop_pct=tuple(tuple(head.drop_pct for head in grid.singles) for grid in grids.values()),
        rows=tuple(_row(grid, experiment, gap, threshold) for grid in grids.values()),
        ranking=_global_ranking(heads, of_heads, bootstrap),
        tests=head_tests(
            [(head, alpha) for head in heads],
            of_heads,
            any_grid.groups,
            n_flips=bootstrap.n_resamples,
            seed=bootstrap.seed,
        ),
        by_index=_by_index(layers, delta, any_grid.settings.patching.k, bootstrap),
    )


def _carried(
    grids: Mapping[int, GridResult], direction: RankBy, gap: records.Gap
) -> tuple[tuple[float | None, ...], ...]:
    """What each single head carries in one direction, layer by layer."""
    if gap.undefined_because is not None:
        return tuple((None,) * grid.n_heads for grid in grids.values())
    rows = (carried_pct(grid, grid.singles, direction) for grid in grids.values())
    return tuple(tuple(row.tolist()) for row in rows)


def _check(grids: Mapping[int, GridResult]) -> None:
    if not grids:
        raise UserError("there is no layer to compare: measure the grid of at least one.")
    first = next(iter(grids.values()))
    for layer, grid in grids.items():
        own, alphas = grid.settings.layer, {g.settings.patching.alpha for g in (first, grid)}
        if own != layer:
            raise UserError(f"the grid given for layer {layer} is one of layer {own}.")
        if grid.prompt_ids != first.prompt_ids or len(alphas) > 1:
            raise UserError(
                f"layer {layer} was measured on other prompts or at another alpha than layer "
                f"{first.settings.layer}: compare layers of one sweep."
            )


def _row(
    grid: GridResult, experiment: MeasuresPatches | None, gap: records.Gap, threshold: float
) -> records.LayerRow:
    layer, curve = MeasuredLayer.of_grid(grid, experiment), None
    if experiment is not None:
        curve = ranking_curve(single_ranking(layer.measured, layer.rank_by), layer)
    bootstrap, delta_nats = layer.bootstrap, layer.single_deltas
    (estimates,) = condition_estimates(grid, [grid.full])
    (carried,) = transfer_estimates(grid, [grid.full.transfer], gap.undefined_because)
    return records.LayerRow(
        layer=grid.settings.layer,
        to_base_pct=carried["to_base_pct"],
        to_tuned_pct=carried["to_tuned_pct"],
        KL_raw=estimates["KL_raw_mean"],
        KL_mapped=estimates["KL_mapped_mean"],
        delta=estimates["delta"],
        drop_pct=estimates["drop_pct"],
        full=layer.full,
        curve=curve,
        concentration=concentration("|ΔKL|", delta_nats, bootstrap),
        pooled_churn=float(churn(np.abs(delta_nats.mean(-1))[None], threshold)[0]),
    )


def _global_ranking(
    heads: Sequence[Head], delta_nats: Float64[ndarray, "head prompt"], bootstrap: Bootstrap
) -> tuple[records.RankedHead, ...]:
    resampled = bootstrap.resampled(delta_nats)
    estimates, ranges = resampled.estimates(), rank_ranges(ranks_of(resampled.draws), bootstrap)
    return tuple(
        records.RankedHead(heads[at], rank, estimates[at], *ranges[at])
        for rank, at in enumerate(order_of(resampled.point), 1)
    )


def _by_index(
    layers: Sequence[int],
    delta_nats: Float64[ndarray, "layer head prompt"],
    ks: Sequence[int],
    bootstrap: Bootstrap,
) -> tuple[records.Agreement, ...]:
    """Neighbouring layers only: all pairs would only repeat a number that means little."""
    named = zip(layers, delta_nats, strict=True)
    scored = [Scored.of_prompts(f"layer {layer}", each, bootstrap) for layer, each in named]
    return tuple(
        agreement("layer_index", *both, ks, bootstrap, INDEX_NOTE) for both in pairwise(scored)
    )


# The full effect and the head ranking at other blend strengths


def alpha_sweep(
    layer: MeasuredLayer, alphas: Sequence[float], shuffled: Site | None = None
) -> tuple[list[records.AlphaPoint], list[MeasuredSets]]:
    """Measure all heads together and one by one at several blend strengths.

    ``shuffled`` is what a map of shuffled pairs says, to be put in place of all heads.
    """
    measured = layer.measured
    at_alpha = [
        measured if alpha == measured.alpha else measured.at(alpha)
        for alpha in sorted({*alphas, measured.alpha})
    ]
    return [_alpha_point(each, layer, shuffled) for each in at_alpha], at_alpha


def _alpha_point(
    measured: MeasuredSets, layer: MeasuredLayer, shuffled: Site | None
) -> records.AlphaPoint:
    bootstrap, is_own = layer.bootstrap, measured is layer.measured
    raw, mapped = measured.kl_nats([measured.everything, *measured.singles])
    full = bootstrap.estimate(np.stack([raw[0], mapped[0]]), _four_numbers)
    delta_nats, is_clear = raw - mapped, full_is_clear(full[2])
    coverage = bootstrap.percent(delta_nats[0], delta_nats[1:])
    shares = _to_base(measured, layer)
    scored = Scored.of_prompts(f"alpha {measured.alpha:g}", delta_nats[1:], bootstrap)
    own = layer.scored(f"alpha {layer.measured.alpha:g}")
    shuffled_pct = records.UNMEASURED if shuffled is None else undefined(UNCLEAR)
    if shuffled is not None and is_clear:
        left = measured.also({records.SHUFFLED: shuffled}).of_source(
            records.SHUFFLED, [measured.everything]
        )
        (shuffled_pct,) = bootstrap.percent(delta_nats[0], raw[:1] - left)
    return records.AlphaPoint(
        alpha=measured.alpha,
        KL_raw=full[0],
        KL_mapped=full[1],
        delta=full[2],
        drop_pct=full[3],
        to_base_pct=shares[0],
        coverage_pct=tuple(coverage) if is_clear else (),
        head_to_base_pct=tuple(shares[1:]),
        head_delta_nats=tuple(scored.scores.tolist()),
        heads=tuple(order_of(scored.scores).tolist()),
        agreement=None if is_own else agreement("alpha", scored, own, layer.ks, bootstrap),
        agreement_reason=THE_SAME if is_own else None,
        shuffled_pct=shuffled_pct,
    )


UNCLEAR = "the interval of ΔKL of all heads reaches 0 at this strength"


def full_is_clear(delta: Estimate) -> bool:
    """Whether a full effect can be a denominator."""
    return delta.interval is not None and not delta.interval.contains(0.0)


def _to_base(measured: MeasuredSets, layer: MeasuredLayer) -> list[Estimate]:
    """``to_base`` of all heads and of each head alone, with the raw patch of this strength."""
    sets = [measured.everything, *measured.singles]
    left = measured.effects_of(RAW, sets).gap_left_nats
    if left is None or layer.gap_nats is None:
        return [undefined(NO_GAP)] * len(sets)
    return layer.bootstrap.shares(layer.gap_nats[None], np.asarray(left))


def _four_numbers(means: Float64[ndarray, "*rows both"]) -> ndarray:
    """``KL_raw``, ``KL_mapped``, ``ΔKL`` and the share of the damage that is repaired."""
    raw, mapped = means[..., 0], means[..., 1]
    return np.stack([raw, mapped, raw - mapped, 100 * (raw - mapped) / raw], axis=-1)
