"""Layers side by side: head effects, one global ranking, each layer's curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.coverage.curves import ranking_curve
from rq4lens.analysis.effects.measured import MeasuredLayer
from rq4lens.analysis.effects.table import bootstrap_of, carried_pct, condition_estimates
from rq4lens.analysis.effects.transfer import gap_of, transfer_estimates
from rq4lens.analysis.rankings.agreement import INDEX_NOTE, Scored, agreement
from rq4lens.analysis.rankings.compared import answer_repair_nats, rank_ranges
from rq4lens.analysis.rankings.exact import single_ranking
from rq4lens.analysis.records import Agreement, Gap, LayerComparison, LayerRow, RankedHead
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, number_text
from rq4lens.analysis.statistics.concentration import CHURN_QUANTILE, churn, concentration
from rq4lens.analysis.statistics.sign_flips import head_tests
from rq4lens.errors import UserError
from rq4lens.heads import Head
from rq4lens.patching.measured import MeasuresPatches
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

    def of_layer(self, row: LayerRow, grid: GridResult, bootstrap: Bootstrap) -> Estimate:
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
) -> LayerComparison:
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
    gap = gap_of(any_grid, bootstrap)
    singles = np.stack([kl_nats_of(grid.singles) for grid in grids.values()])
    delta = singles[:, 0] - singles[:, 1]
    raw, mapped = singles.mean(-1).swapaxes(0, 1)
    threshold = float(np.quantile(np.abs(delta.mean(-1)), CHURN_QUANTILE))
    heads = [Head(layer, head) for layer in layers for head in range(any_grid.n_heads)]
    of_heads = delta.reshape(len(heads), -1)
    return LayerComparison(
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
    grids: Mapping[int, GridResult], direction: RankBy, gap: Gap
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
    grid: GridResult, experiment: MeasuresPatches | None, gap: Gap, threshold: float
) -> LayerRow:
    layer, curve = MeasuredLayer.of_grid(grid, experiment), None
    if experiment is not None:
        curve = ranking_curve(single_ranking(layer.ranked_on, layer.rank_by), layer)
    bootstrap, delta_nats = layer.bootstrap, layer.single_deltas
    (estimates,) = condition_estimates(grid, [grid.full], bootstrap)
    (carried,) = transfer_estimates(grid, [grid.full.transfer], bootstrap, gap.undefined_because)
    return LayerRow(
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
) -> tuple[RankedHead, ...]:
    resampled = bootstrap.resampled(delta_nats)
    estimates, ranges = resampled.estimates(), rank_ranges(ranks_of(resampled.draws), bootstrap)
    return tuple(
        RankedHead(heads[at], rank, estimates[at], *ranges[at])
        for rank, at in enumerate(order_of(resampled.point), 1)
    )


def _by_index(
    layers: Sequence[int],
    delta_nats: Float64[ndarray, "layer head prompt"],
    ks: Sequence[int],
    bootstrap: Bootstrap,
) -> tuple[Agreement, ...]:
    """Neighbouring layers only: all pairs would only repeat a number that means little."""
    named = zip(layers, delta_nats, strict=True)
    scored = [Scored.of_prompts(f"layer {layer}", each, bootstrap) for layer, each in named]
    return tuple(
        agreement("layer_index", *both, ks, bootstrap, INDEX_NOTE) for both in pairwise(scored)
    )
