"""The metric of the answer: what patches change of it, and how far heads take it to the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from einops import rearrange
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.effects.transfer import (
    BETWEEN,
    NOT_SWAPPED,
    effective_number,
    gap_undefined_because,
)
from rq4lens.analysis.records import FullEffect, MetricEffect, MetricSummary
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, exact, undefined
from rq4lens.results import (
    METRIC_UNITS,
    ConditionResult,
    GridResult,
    PatchRow,
    Transfer,
    gaps_of,
)

QUANTITIES = ("raw_change", "mapped_change", "to_base_pct", "to_tuned_pct")
AT_ONCE = "all layers are patched at once, with base's own activations alone"


def metric_effects(
    grid: GridResult, conditions: Sequence[ConditionResult], bootstrap: Bootstrap
) -> list[MetricEffect | None]:
    """What each condition does to the metric; None where none was measured."""
    rows = [(each.raw, each.mapped, each.transfer) for each in conditions]
    return _effects(grid, rows, bootstrap) if _has(grid) else [None] * len(conditions)


def every_layer_effect(grid: GridResult, bootstrap: Bootstrap) -> MetricEffect | None:
    """What all heads of all layers do to the metric."""
    if not _has(grid) or grid.every_layer is None:
        return None
    return _effects(grid, [(None, None, grid.every_layer)], bootstrap)[0]


def _has(grid: GridResult) -> bool:
    nothing = grid["none"].transfer
    return nothing is not None and nothing.into_tuned.metric is not None


def metric_summary(grid: GridResult, bootstrap: Bootstrap) -> MetricSummary | None:
    """The metric of both models, and what the heads of the main layer carry of its difference."""
    if not _has(grid):
        return None
    base, tuned, difference = bootstrap.estimate(_clean(grid), _with_difference)
    full, *heads = metric_effects(grid, [grid.full, *grid.singles], bootstrap)
    every = every_layer_effect(grid, bootstrap)
    whole, left = gaps_of(grid["none"], [grid.full], "metric")
    absent, name = undefined("it was not measured"), grid.settings.patching.metric
    assert full is not None
    return MetricSummary(
        name=name,
        unit=METRIC_UNITS.get(name, ""),
        base=base,
        tuned=tuned,
        difference=difference,
        noise=_noise(grid),
        undefined_because=_why_undefined(grid, difference),
        every_layer_to_base_pct=every.to_base_pct if every else absent,
        every_layer_to_tuned_pct=every.to_tuned_pct if every else absent,
        to_base_pct=full.to_base_pct,
        to_tuned_pct=full.to_tuned_pct,
        heads_to_base_pct=tuple(head.to_base_pct for head in heads if head),
        heads_to_tuned_pct=tuple(head.to_tuned_pct for head in heads if head),
        n_eff=effective_number((whole - left)[0]),
    )


def metric_full_effect(grid: GridResult, bootstrap: Bootstrap) -> FullEffect:
    """The difference of the metric as what shares are taken of."""
    gap = gaps_of(grid["none"], [grid["none"]], "metric")[0]
    (whole,) = bootstrap.estimate(gap)
    return FullEffect(whole, _noise(grid), _why_undefined(grid, whole))


def _clean(grid: GridResult) -> Float64[ndarray, "model prompt"]:
    """The metric of base and of tuned with nothing patched."""
    nothing = grid["none"].transfer
    assert nothing is not None
    return np.array([_value(nothing.into_base), _value(nothing.into_tuned)])


def _value(row: PatchRow) -> Float64[ndarray, "prompt"]:
    return np.asarray(row.metric)


def _with_difference(means: Float64[ndarray, "*rows model"]) -> ndarray:
    return np.concatenate([means, means[..., 1:] - means[..., :1]], axis=-1)


def _noise(grid: GridResult) -> float:
    """What patching nothing leaves of the metric, as its noise floor."""
    unchanged = _value(grid["none"].raw).mean()
    return float(abs(_value(grid["self"].raw).mean() - unchanged))


def _why_undefined(grid: GridResult, difference: Estimate) -> str | None:
    name = grid.settings.patching.metric
    what = f"the difference of {name}{BETWEEN}"
    return gap_undefined_because(difference, _noise(grid), what, METRIC_UNITS.get(name, ""))


Patched = tuple[PatchRow | None, PatchRow | None, Transfer | None]
"""The raw and the mapped patch of a condition, and both models swapped."""


def _effects(
    grid: GridResult, rows: Sequence[Patched], bootstrap: Bootstrap
) -> list[MetricEffect | None]:
    clean, nothing = _clean(grid), grid["none"]
    (difference,) = bootstrap.estimate(clean[1:] - clean[:1])
    why = _why_undefined(grid, difference)
    absent = np.zeros(grid.n_prompts)
    stacked = [
        [
            absent if raw is None else _value(raw) - _value(nothing.raw),
            absent if mapped is None else _value(mapped) - _value(nothing.mapped),
            absent if swapped is None else _value(swapped.into_tuned),
            absent if swapped is None else _value(swapped.into_base),
        ]
        for raw, mapped, swapped in rows
    ]
    flat = bootstrap.estimate(np.concatenate([clean, *map(np.array, stacked)]), _shares)
    found: list[MetricEffect | None] = []
    for at, (raw, mapped, swapped) in enumerate(rows):
        own = dict(zip(QUANTITIES, flat[4 * at : 4 * at + 4], strict=True))
        if raw is None or mapped is None:
            own |= dict.fromkeys(QUANTITIES[:2], undefined(AT_ONCE))
        if swapped is None or why is not None:
            own |= dict.fromkeys(QUANTITIES[2:], undefined(why or NOT_SWAPPED))
        elif swapped is nothing.transfer:
            own |= dict.fromkeys(QUANTITIES[2:], exact(0.0))
        found.append(MetricEffect(**own))
    return found


def _shares(means: Float64[ndarray, "*rows quantity"]) -> ndarray:
    """Of each condition; the metric of the clean base and tuned models comes first."""
    base, tuned = (means[..., at, None] for at in range(2))
    rows = rearrange(means[..., 2:], "... (conditions four) -> ... conditions four", four=4)
    shares = [
        *(rows[..., 0], rows[..., 1]),
        100 * (tuned - rows[..., 2]) / (tuned - base),
        100 * (rows[..., 3] - base) / (tuned - base),
    ]
    return rearrange(np.stack(shares, axis=-1), "... conditions share -> ... (conditions share)")
