"""An analysis of a synthetic grid: seeded, not computed."""

from itertools import combinations

import numpy as np

from rq4lens.analysis.effects.table import (
    gap_effect,
    gap_of,
    grid_full_effect,
    layer_transfer,
)
from rq4lens.analysis.records import (
    Agreement,
    AlphaPoint,
    Analysis,
    AnalysisSettings,
    ControlLayer,
    CoverageCurve,
    CoverageRow,
    DirectionCoverage,
    Gap,
    HeadKind,
    HeadKinds,
    HeadTests,
    Interactions,
    Ladder,
    LadderRow,
    NoisePair,
    PairInteraction,
    RandomSets,
    RankStability,
    StandIn,
)
from rq4lens.analysis.statistics.bootstrap import Estimate, Interval, Spread, undefined
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
    low, high = float(value - width), float(value + width)
    return Estimate(float(value), Interval(low, high))


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


SOURCES = ("constant", "raw", "shifted", "mapped", "held_out", "output")
"""The rungs of the made-up ladder, and what each recovers of a head of each kind."""

RECOVERED_PCT = {
    "idle": (None,) * 6,
    "undecided": (None,) * 6,
    "unchanged": (0, 97, 97, 99, 98, 97),
    "shifted": (0, 40, 95, 98, 97, 30),
    "recoded": (0, -60, -30, 92, 85, 96),
    "reassigned": (0, -80, -20, 94, -14, 10),
    "replaced": (0, -40, -10, 20, 5, -50),
}
CHANGED = ("reassigned", "recoded", "replaced", "unchanged", "shifted")
IDLE_BELOW = 1.5e-3


def kind_of(grid: GridResult, head: int) -> str:
    """Heads that do much are of every kind in turn; the others idle, or are not decided."""
    damage = grid.single(head).KL_raw
    if damage < IDLE_BELOW:
        return "idle" if damage < IDLE_BELOW / 3 else "undecided"
    return CHANGED[sum(grid.single(h).KL_raw >= IDLE_BELOW for h in range(head)) % len(CHANGED)]


def kinds(grid: GridResult) -> HeadKinds:
    return HeadKinds(
        heads=tuple(
            HeadKind(
                head,
                kind,
                "below the idle line" if kind == "undecided" else None,
                True if kind == "recoded" else None,
                about(single.KL_raw, 1e-4),
            )
            for head, single in enumerate(grid.singles)
            for kind in [kind_of(grid, head)]
        ),
        rule="idle: all do less than the idle line; unchanged: raw at least 90%",
        n_contents=5,
        few_contents=True,
    )


def ladder_row(name: str, heads: tuple[int, ...], alpha: float, raw: float, kind: str) -> LadderRow:
    recovered = dict(zip(SOURCES, RECOVERED_PCT[kind], strict=True))
    known = {name: value for name, value in recovered.items() if value is not None}
    damages = {name: about(raw * (1 - known.get(name, 0) / 100), raw / 10) for name in SOURCES}
    nothing = undefined("there is nothing to recover")
    return LadderRow(
        name=name,
        heads=heads,
        alpha=alpha,
        damage_nats=damages,
        recovered_pct={
            name: about(known[name], 0 if name == "constant" else 5) if name in known else nothing
            for name in SOURCES
        },
        interference_nats=about(-raw * known.get("raw", 0) / 100, raw / 10),
        restored_nats=about(raw * known.get("mapped", 0) / 100, raw / 10),
        lost_nats=damages["mapped"],
    )


def ladder(grid: GridResult, alpha: float) -> Ladder:
    heads = [
        ladder_row(f"head{head}", (head,), alpha, single.KL_raw, kind_of(grid, head))
        for head, single in enumerate(grid.singles)
    ]
    everything = tuple(range(grid.n_heads))
    full = ladder_row("full", everything, alpha, grid.full.KL_raw, "recoded")
    return Ladder((*heads, full), IDLE_BELOW, f"idle line {IDLE_BELOW:g} nats: made up")


def stand_ins(grid: GridResult) -> tuple[StandIn, ...]:
    heads = kinds(grid).of("recoded", "reassigned", "replaced")
    full = grid.full.KL_raw

    def row(name: str, question: str, recovered: float) -> StandIn:
        damage = about((1 - recovered / 100) * full, 1e-3)
        behind = about((0.9 - recovered / 100) * full, 1e-3)
        return StandIn(name, question, heads, damage, about(recovered, 4), behind)

    missing = undefined("the run has no control layer")
    return (
        row("shuffled pairs", "Does a map of other pairs do as well?", 3),
        row("random rotation", "Do random directions do as well?", -26),
        StandIn(
            "wrong layer",
            "Does another layer's map do as well?",
            (),
            missing,
            missing,
            missing,
            "the run has no control layer",
        ),
    )


def control_layer(grid: GridResult) -> ControlLayer | None:
    if grid.control is None:
        return None
    delta = grid.control.delta
    less = about(grid.full.delta - delta, 1e-3)
    return ControlLayer(grid.control.layer, about(delta, 1e-3), less, about(55, 3))


def noise_pair(grid: GridResult, gap: Gap) -> NoisePair:
    real = (gap.base_nats.value or 1.0, grid.full.KL_raw, grid.full.delta)
    names = ("gap_base_nats", "KL_raw", "delta")
    return NoisePair(
        gap_base_nats=about(real[0] / 50, real[0] / 500),
        to_base_pct=about(50, 5),
        KL_raw=about(real[1] / 50, real[1] / 500),
        delta=about(real[2] / 50, real[2] / 500),
        real_over_noise={name: about(50, 5) for name in names},
        delta_beyond_nats=about(real[2] * 0.98, real[2] / 10),
        gap_beyond_nats=about(real[0] * 0.98, real[0] / 10),
    )


def directions(grid: GridResult) -> tuple[DirectionCoverage, ...]:
    return tuple(
        DirectionCoverage(
            direction=name,
            full=gap_effect(grid, name),
            coverage=coverage_rows(grid),
            curves=(curve(name, grid, 0.8), curve(f"{name} (cross-fitted)", grid, 0.75)),
            random=random_sets(grid),
        )
        for name in ("to_base", "to_tuned")
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
                about(80 * alpha, 3),
                tuple(about(100 * score / scores.sum(), 2) for score in scores),
                tuple(about(80 * alpha * score / scores.sum(), 2) for score in scores),
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
    gap = gap_of(grid)
    return Analysis(
        settings=AnalysisSettings(
            grid.settings, AnalysisEffort(), "delta", grid.n_prompts, n_groups
        ),
        gap=gap,
        transfer=layer_transfer(grid),
        metric=None,
        directions=directions(grid),
        ladders=(ladder(grid, 1.0), ladder(grid, grid.settings.patching.alpha)),
        neutral=ladder(grid, 1.0),
        noise=noise_pair(grid, gap),
        weight_cosine=0.997,
        full=grid_full_effect(grid),
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
        stand_ins=stand_ins(grid),
        control_layer=control_layer(grid),
        alignment=None,
        alphas=alphas(grid),
        claims=(
            "Base and tuned differ by 0.7 nats here.",
            "Four of 32 heads carry most of the effect. <b>Not</b> a test.",
        ),
        study_claims=("At strength 0.3 the map takes back 0.05 nats.",),
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
