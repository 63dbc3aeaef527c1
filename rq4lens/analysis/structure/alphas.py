"""The full effect and the head ranking at other blend strengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.effects.table import order_of
from rq4lens.analysis.rankings.agreement import THE_SAME, Scored, agreement
from rq4lens.analysis.records import AlphaPoint
from rq4lens.analysis.statistics.bootstrap import Bootstrap


def alpha_sweep(
    measured: MeasuredSets, alphas: Sequence[float], ks: Sequence[int], bootstrap: Bootstrap
) -> tuple[list[AlphaPoint], list[MeasuredSets]]:
    """Measure all heads together and one by one at several blend strengths."""
    own = Scored.of_prompts(
        f"alpha {measured.alpha:g}", measured.delta_nats(measured.singles), bootstrap
    )
    at_alpha = [
        measured if alpha == measured.alpha else _at(measured, alpha)
        for alpha in sorted({*alphas, measured.alpha})
    ]
    points = [_point(each, own, measured.alpha, ks, bootstrap) for each in at_alpha]
    return points, at_alpha


def _at(measured: MeasuredSets, alpha: float) -> MeasuredSets:
    return MeasuredSets(
        measured.experiment,
        measured.layer,
        alpha,
        n_heads=measured.n_heads,
        groups=measured.groups,
        mapped=measured.mapped,
        progress=measured.progress,
    )


def _point(
    measured: MeasuredSets,
    own: Scored,
    own_alpha: float,
    ks: Sequence[int],
    bootstrap: Bootstrap,
) -> AlphaPoint:
    raw, mapped = measured.kl_nats([measured.everything, *measured.singles])
    full = bootstrap.estimate(
        np.stack([raw[0], mapped[0]]),
        lambda m: np.stack(
            [
                m[..., 0],
                m[..., 1],
                m[..., 0] - m[..., 1],
                100 * (m[..., 0] - m[..., 1]) / m[..., 0],
            ],
            axis=-1,
        ),
    )
    singles, is_own = raw[1:] - mapped[1:], measured.alpha == own_alpha
    scored = Scored.of_prompts(f"alpha {measured.alpha:g}", singles, bootstrap)
    return AlphaPoint(
        alpha=measured.alpha,
        KL_raw=full[0],
        KL_mapped=full[1],
        delta=full[2],
        drop_pct=full[3],
        head_delta_nats=tuple(scored.scores.tolist()),
        heads=tuple(order_of(scored.scores).tolist()),
        agreement=None if is_own else agreement("alpha", scored, own, ks, bootstrap),
        agreement_reason=THE_SAME if is_own else None,
    )
