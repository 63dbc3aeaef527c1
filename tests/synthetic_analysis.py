"""An analysis of a synthetic grid: seeded, not computed."""

from itertools import combinations

import numpy as np

from rq4lens.analysis.effects.table import bootstrap_of, grid_full_effect
from rq4lens.analysis.records import (
    Agreement,
    AlphaPoint,
    Control,
    CoverageCurve,
    CoverageRow,
    HeadKind,
    HeadKinds,
    HeadTests,
    Interactions,
    PairInteraction,
    RandomSets,
    RankStability,
)
from rq4lens.analysis.result import Analysis, AnalysisSettings
from rq4lens.analysis.statistics.bootstrap import LEVEL, Estimate, Interval, Spread, undefined
from rq4lens.config import AnalysisEffort
from rq4lens.results import GridResult, HeadRanking

METHODS = (
    "delta",
    "drop_pct",
    "KL_raw",
    "leave_one_out",
    "greedy_forward",
    "shapley",
    "attribution",
    "grad_act",
    "kl_curvature",
)


def about(value: float, width: float) -> Estimate:
    """An estimate with a symmetric interval."""
    return Estimate(float(value), Interval(value - width, value + width, LEVEL, "made up"))


def curve(name: str, grid: GridResult, scale: float) -> CoverageCurve:
    order, deltas = grid.ranking.heads, [grid.single(h).delta for h in grid.ranking.heads]
    values = np.concatenate([[0], 100 * scale * np.cumsum(deltas) / np.sum(deltas)])
    values[-1] = 100
    return CoverageCurve(
        ranking=name,
        head_sets=tuple(order[:k] for k in range(len(values))),
        delta_nats=tuple(about(value * grid.full.delta / 100, 1e-4) for value in values),
        coverage_pct=tuple(about(value, 3 if 0 < k < 32 else 0) for k, value in enumerate(values)),
        band_low_pct=tuple(values - 6),
        band_high_pct=tuple(values + 6),
        area_pct=about(values.mean(), 2),
        cmd=about(1 - values.mean() / 100, 0.02),
        k90=Estimate(float(np.argmax(values >= 90))),
    )


def random_sets(grid: GridResult) -> tuple[RandomSets, ...]:
    n = grid.n_heads
    return tuple(
        RandomSets(
            k=k,
            n_subsets=1000,
            exhaustive=False,
            delta_nats=(),
            coverage_pct=(),
            mean_pct=100 * k / n,
            quantiles_pct={"0.025": 100 * k / n - 12 * spread, "0.975": 100 * k / n + 14 * spread},
            seeds_pct={},
            band_low_pct=None,
            band_high_pct=None,
        )
        for k in range(1, n)
        for spread in [2 * np.sqrt(k * (n - k)) / n]
    )


def coverage_rows(grid: GridResult) -> tuple[CoverageRow, ...]:
    return tuple(
        CoverageRow(
            k=k,
            ranking="delta",
            heads=grid.ranking.top(k),
            coverage_pct=about(100 * grid[f"top{k}"].delta / grid.full.delta, 4),
            cross_fitted_coverage_pct=about(95 * grid[f"top{k}"].delta / grid.full.delta, 6),
            optimism_pct=about(5 * grid[f"top{k}"].delta / grid.full.delta, 2),
            p_value=0.001,
            p_value_min=0.001,
            n_subsets=1000,
            exhaustive=False,
            random_mean_pct=100 * k / grid.n_heads,
            random_low_pct=0.0,
            random_high_pct=30.0,
            best_heads=grid.ranking.top(k),
            best_coverage_pct=100 * grid[f"top{k}"].delta / grid.full.delta,
        )
        for k in grid.settings.patching.k
    )


def agreements(kind: str, names, seed: int = 0) -> tuple[Agreement, ...]:
    rng = np.random.default_rng(seed)
    return tuple(
        Agreement(
            kind,
            first,
            second,
            about(tau, 0.08),
            about(min(1.0, tau + 0.1), 0.06),
            about(0.5 + tau / 2, 0.05),
            {4: about(0.6, 0.2)},
        )
        for first, second in combinations(names, 2)
        for tau in [float(rng.uniform(0.2, 0.95))]
    )


def interactions(grid: GridResult) -> Interactions:
    rng = np.random.default_rng(4)
    deltas = np.array([single.delta for single in grid.singles])
    matrix = rng.normal(size=(grid.n_heads, grid.n_heads)) * np.sqrt(
        np.outer(deltas, deltas).clip(0)
    )
    matrix = 0.1 * (matrix + matrix.T)
    np.fill_diagonal(matrix, 0)
    first, second = np.unravel_index(np.abs(matrix).argmax(), matrix.shape)
    return Interactions(
        matrix_nats=matrix,
        strongest=(
            PairInteraction(int(first), int(second), about(matrix[first, second], 1e-4), 0.01),
        ),
        sum_of_singles=about(deltas.sum(), 1e-3),
        joint=about(grid.full.delta, 1e-3),
        sum_over_joint=about(deltas.sum() / grid.full.delta, 0.1),
        pairwise_prediction=about(grid.full.delta, 2e-3),
    )


def kinds(grid: GridResult) -> HeadKinds:
    def kind(single) -> str:
        if single.KL_raw < 5e-4:
            return "idle"
        if single.KL_raw < 1.5e-3:
            return "undecided"
        return "re-coordinated" if single.drop_pct > 50 else "rewired"

    return HeadKinds(
        heads=tuple(
            HeadKind(
                head,
                kind(single),
                about(single.KL_raw, 1e-4),
                about(single.KL_mapped, 1e-4),
                about(single.drop_pct, 5),
            )
            for head, single in enumerate(grid.singles)
        ),
        rule=(
            "idle: the interval of KL_raw lies below 0.0005 nats; re-coordinated: the interval of "
            "drop lies above 50%; rewired: it lies below; undecided: it does neither"
        ),
        idle_below_nats=5e-4,
        recoordinated_above_pct=50.0,
    )


def controls(grid: GridResult) -> tuple[Control, ...]:
    full = about(grid.full.delta, 1e-3)

    def row(name, question, share, survives) -> Control:
        value = about(share * grid.full.delta, 1e-3)
        gap = about((1 - share) * grid.full.delta, 1e-3)
        return Control(name, question, value, full, gap, "nats", survives)

    return (
        row("control layer", "Is the effect specific to the main layer?", 0.3, True),
        row("shuffled pairs", "Does the map need the right pairs?", 0.02, True),
        row("neutral prompts", "Does it stay away from prompts that did not change?", 0.9, False),
        Control(
            "wrong layer's map",
            "Does the map need its own layer?",
            undefined("no experiment was given"),
            full,
            undefined("no experiment was given"),
            "nats",
            None,
            "no experiment was given",
        ),
    )


def alphas(grid: GridResult) -> tuple[AlphaPoint, ...]:
    rng = np.random.default_rng(5)
    deltas = np.array([single.delta for single in grid.singles])
    points = []
    for alpha in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0):
        scale = (alpha / 0.3) ** 1.8
        scores = scale * deltas * rng.lognormal(sigma=0.15, size=len(deltas))
        order = tuple(int(head) for head in np.argsort(-scores, kind="stable"))
        agreement = agreements("alpha", (f"alpha {alpha:g}", "alpha 0.3"))[0]
        points.append(
            AlphaPoint(
                alpha,
                about(scale * grid.full.KL_raw, 0.05 * scale * grid.full.KL_raw),
                about(scale * grid.full.KL_mapped, 0.05 * scale * grid.full.KL_raw),
                about(scale * grid.full.delta, 0.05 * scale * grid.full.KL_raw),
                about(grid.full.drop_pct, 3),
                tuple(scores),
                order,
                agreement,
            )
        )
    return tuple(points)


def rankings(grid: GridResult) -> tuple[HeadRanking, ...]:
    rng = np.random.default_rng(6)
    deltas = np.array([single.delta for single in grid.singles])
    layer, alpha = grid.settings.layer, grid.settings.patching.alpha
    return tuple(
        HeadRanking.from_scores(scores.tolist(), method=name, layer=layer, alpha=alpha)
        for place, name in enumerate(METHODS)
        for scores in [deltas * rng.lognormal(sigma=0.25 * place, size=len(deltas))]
    )


def synthetic_analysis(grid: GridResult) -> Analysis:
    """An analysis as far as the figures and the report look at it."""
    n_groups = len(set(grid.groups))
    return Analysis(
        settings=AnalysisSettings(
            grid.settings, AnalysisEffort(), "delta", grid.n_prompts, n_groups
        ),
        full=grid_full_effect(grid, bootstrap_of(grid)),
        coverage=coverage_rows(grid),
        curves=(
            curve("delta", grid, 1.0),
            *(curve(name, grid, 1 - 0.05 * place) for place, name in enumerate(METHODS) if place),
            curve("delta (cross-fitted)", grid, 0.93),
            curve("best subset", grid, 1.02),
        ),
        random=random_sets(grid),
        rankings=rankings(grid),
        methods=(),
        stability=RankStability("delta", (), Spread(None), Spread(None), {}, 0),
        agreement=agreements("map_kind", ("identity", "procrustes_scaled", "ridge")),
        concentration=(),
        tests=HeadTests((), "nothing", 0, 0, 1.0, 1.0, 1.0, 1.0, False, n_groups),
        interactions=interactions(grid),
        kinds=kinds(grid),
        controls=controls(grid),
        alignment=None,
        alphas=alphas(grid),
        claims=("Four of 32 heads carry most of the effect. <b>Not</b> a test.",),
        seconds={},
    )


def synthetic_diagnostics(grid: GridResult) -> list[dict]:
    """Held-out fit of each head, as ``run.json`` keeps it."""
    rng = np.random.default_rng(7)

    def fit(r2: float) -> dict:
        return {"r2": r2, "cosine": 0.5 + r2 / 2, "cka": max(0.0, r2)}

    return [
        {
            "head": head,
            "fitted": fit(float(rng.uniform(0.3, 0.95))),
            "mean": {"r2": -0.02, "cosine": 0.4, "cka": None},
            "identity": fit(float(rng.uniform(-0.4, 0.3))),
            "shuffled": fit(float(rng.uniform(-0.2, 0.0))),
        }
        for head in range(grid.n_heads)
    ]
