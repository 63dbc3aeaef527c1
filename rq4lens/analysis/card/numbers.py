"""The numbers of a head card: what the run measured, what the head carries, what its map does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray
from scipy.linalg import polar
from torch import Tensor

from rq4lens.analysis.card.records import Carried, HeadNumbers, MapFacts
from rq4lens.analysis.card.swaps import Swapped
from rq4lens.analysis.effects.table import records
from rq4lens.analysis.effects.transfer import why_no_gap
from rq4lens.analysis.result import Analysis
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, undefined
from rq4lens.heads import Head
from rq4lens.patching.maps.map import LayerMap
from rq4lens.results import GridResult

NO_TRANSFER = "the head carries nothing to take a share of: the interval of its transfer reaches 0"
NO_OUTPUT = "the head writes nothing in base"
NO_ANALYSIS = "no analysis of the grid was given"


def numbers_of(
    grid: GridResult | None, analysis: Analysis | None, head: Head
) -> HeadNumbers | None:
    """What a run measured of a head; None for a layer whose single heads were not measured."""
    if grid is None or head.layer != grid.settings.layer:
        return None
    (record,) = records(grid, [grid.single(head.index)])
    stable = {row.head: row for row in (analysis.stability.heads if analysis else ())}
    row, ladders = stable.get(head.index), analysis.ladders if analysis else ()
    return HeadNumbers(
        alpha=grid.settings.patching.alpha,
        kind=analysis.kinds.heads[head.index].kind if analysis else None,
        rank=grid.ranking.heads.index(head.index) + 1,
        rank_low=row.rank_low if row else None,
        rank_high=row.rank_high if row else None,
        KL_raw=record.KL_raw_mean,
        KL_mapped=record.KL_mapped_mean,
        delta=record.delta,
        drop_pct=record.drop_pct,
        recovered_pct=ladders[0][f"head{head.index}"].recovered_pct if ladders else {},
        reasons=dict.fromkeys(("kind", "rank_low", "rank_high"), NO_ANALYSIS),
    )


# Transfer, and how much of it is direct


def carried_by(
    tuned: Swapped, base: Swapped, direct: Float64[ndarray, "row prompt"], bootstrap: Bootstrap
) -> list[Carried]:
    """How far each head takes one model to the other; the models have one vocabulary."""
    there, back = (_transfers_pct(each, bootstrap) for each in (tuned, base))
    shares = _shares_pct(tuned, direct, there, bootstrap)
    return [Carried(*each) for each in zip(there, back, shares, strict=True)]


def _transfers_pct(swap: Swapped, bootstrap: Bootstrap) -> list[Estimate]:
    """The share of the gap that each swap closes, in percent; undefined where there is no gap."""
    assert swap.kl_nats is not None
    gap, left = swap.kl_nats[:1], swap.kl_nats[1:]
    why = why_no_gap(bootstrap.estimate(gap)[0], swap.noise_nats)
    return bootstrap.shares(gap, left) if why is None else [undefined(why)] * len(left)


def _shares_pct(
    swap: Swapped,
    direct: Float64[ndarray, "row prompt"],
    transfers: Sequence[Estimate],
    bootstrap: Bootstrap,
) -> list[Estimate]:
    """How much of each transfer is direct."""
    assert swap.kl_nats is not None
    closed = [each[0] - each[1:] for each in (direct, swap.kl_nats)]
    shares = bootstrap.estimate(np.concatenate(closed), _ratio_pct)
    return [
        transfer
        if transfer.value is None
        else undefined(NO_TRANSFER)
        if _reaches_zero(transfer)
        else share
        for transfer, share in zip(transfers, shares, strict=True)
    ]


def _ratio_pct(mean: Float64[ndarray, "*rows both"]) -> ndarray:
    """The first half of quantities in percent of the second half."""
    above, below = np.split(mean, 2, axis=-1)
    return 100 * above / below


def _reaches_zero(estimate: Estimate) -> bool:
    interval = estimate.interval
    return interval.contains(0.0) if interval is not None else not estimate.value


def moved_pct(
    moved: Float[Tensor, "prompt head d_model"],
    beside: Float[Tensor, "prompt head d_model"],
    bootstrap: Bootstrap,
) -> list[Estimate]:
    """The size of each head's movement: root mean square, in percent of that of its vectors."""
    squares = [each.double().square().sum(-1).T.numpy() for each in (moved, beside)]
    sizes = bootstrap.estimate(np.concatenate(squares), lambda mean: 10 * np.sqrt(_ratio_pct(mean)))
    return [
        size if there else undefined(NO_OUTPUT)
        for size, there in zip(sizes, map(np.any, squares[1]), strict=True)
    ]


# The map


def map_facts(layer_map: LayerMap, head: int, z_tuned: Float[Tensor, "prompt d_head"]) -> MapFacts:
    """One head's map in a few numbers; a map over the whole layer has no rotation of one head."""
    fitted = [row.fitted.r2 for row in layer_map.diagnostics if row.head == head]
    facts: dict[str, Any] = {"rotation_degrees": None, "scale": None, "shift_pct": None}
    reasons = dict.fromkeys(facts, "the map is one over all heads of the layer")
    if layer_map.scope == "head":
        facts, reasons = _shape(layer_map, head, z_tuned), {}
        reasons["shift_pct"] = "the head's tuned activations are all 0"
    reasons["r2"] = "no held-out fit was measured, or the activations do not vary"
    return MapFacts(layer_map.kind, fitted[0] if fitted else None, **facts, reasons=reasons)


def _shape(layer_map: LayerMap, head: int, z_tuned: Tensor) -> dict[str, float | None]:
    weight = layer_map.weight[head].double().numpy()
    rotation, _ = polar(weight)
    angles = np.abs(np.angle(np.linalg.eigvals(rotation)))
    length = z_tuned.double().square().sum(-1).mean().sqrt()
    shift = float(100 * layer_map.bias[head].double().norm() / length) if length else None
    return {
        "rotation_degrees": float(np.degrees(angles).mean()),
        "scale": float(np.sqrt(np.square(weight).sum() / len(weight))),
        "shift_pct": shift,
    }
