"""A short paragraph that says what the numbers support; it changes when they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rq4lens.analysis.records import Control, CoverageRow
from rq4lens.analysis.result import Analysis
from rq4lens.analysis.statistics.bootstrap import Estimate
from rq4lens.analysis.structure.controls import QUESTIONS, SIGNIFICANT
from rq4lens.heads import Head

MOST_PCT = 50.0
"""Heads whose coverage lies above this with its whole interval carry most of the effect."""

NAMED = 8
"""So many heads are named in a sentence."""

FEW_SHARE = 0.25
"""Up to this share of a layer's heads are a few."""

CONCENTRATED_PCT = 75.0
"""A curve with more area than this rises early, however long its tail."""

OPTIMISTIC_PCT = 5.0
"""A gap between plain and cross-fitted coverage that is worth a sentence, in percentage points."""

ENOUGH_SETS = 40
"""Of fewer draws, none lies outside of the range that is said to hold 95%."""

NEAR_PCT = 80.0
"""A control that does more than this share of what the map does comes close."""


def claims(analysis: Analysis) -> tuple[str, ...]:
    """What the numbers support, sentence by sentence."""
    full, row = analysis.full, decisive_row(analysis)
    sentences = [_effect(analysis)]
    if full.is_harm:
        sentences += _who_does_harm(analysis)
    elif full.undefined_because is None and row is not None:
        sentences += [*_carriers(analysis, row), *_beside_random(row)]
    sentences += _tests(analysis)
    if full.undefined_because is None:
        sentences += _metric(analysis)
        if not full.is_harm:  # without a repair there is no claim that could survive
            sentences += [*_structure(analysis), *_controls(analysis)]
    return tuple(sentences)


def _effect(analysis: Analysis) -> str:
    settings, full = analysis.settings.grid, analysis.full
    where = f"At layer {settings.layer} (alpha {settings.patching.alpha:g})"
    why = full.undefined_because
    if why is not None:
        return f"{where} nothing can be said about shares: {why}. Coverage is undefined."
    does = "repairs part of what the raw patch damages"
    if full.is_harm:
        does = "makes the raw patch worse, not better"
    return f"{where} the map {does}: ΔKL(ALL) = {full.delta:.3g nats}."


def _carriers(analysis: Analysis, row: CoverageRow) -> Iterator[str]:
    which = f"top {row.k}" if row.k > 1 else "first"
    names = _labels(analysis, row.heads)
    heads = f"The {which} of {analysis.settings.grid.n_heads} heads by {row.ranking} ({names})"
    carry = "carry" if row.k > 1 else "carries"
    plain, crossed = f"{row.coverage_pct:.1f%}", row.cross_fitted_coverage_pct
    if crossed.value is None:
        yield f"{heads} {carry} {plain} of it on the prompts that ranked them."
        return
    yield (
        f"{heads} {carry} {amount_of(crossed)} of it: {plain} on the prompts that ranked them, "
        f"{crossed:.1f%} when ranked on other prompts."
    )
    gap = row.optimism_pct.value
    if gap is not None and abs(gap) > OPTIMISTIC_PCT:
        direction = "optimistic" if gap > 0 else "pessimistic"
        yield f"The first figure is {direction} by {abs(gap):.1f} points."


def _who_does_harm(analysis: Analysis) -> Iterator[str]:
    """Of harm only the best sets found can speak; the ranking starts at its other end."""
    yield (
        "Heads are ranked by what the map repairs, so those that do least harm come first: the "
        "ranking does not say which heads carry the harm."
    )
    for row in analysis.coverage:
        if row.best_heads is not None and (row.best_coverage_pct or 0.0) > MOST_PCT:
            who = f"{row.k} of {analysis.settings.grid.n_heads} heads"
            do, names = "do" if row.k > 1 else "does", _labels(analysis, row.best_heads)
            share = f"{row.best_coverage_pct:.1f}%"
            yield f"{who} {do} {share} of it ({names}), chosen on the same prompts."
            return


def _labels(analysis: Analysis, heads: Sequence[int]) -> str:
    names = [Head(analysis.settings.grid.layer, head).label for head in heads[:NAMED]]
    return ", ".join([*names, "..."] if len(heads) > NAMED else names)


def amount_of(share_pct: Estimate) -> str:
    """How much of the effect a share is, in words that its whole interval supports."""
    if share_pct.interval is None:
        return "an uncertain share"
    low, high = share_pct.interval.pair
    if low > MOST_PCT:
        return "most"
    if high < MOST_PCT:
        return "only part"
    return f"between {low:.0f}% and {high:.0f}%"


def decisive_row(analysis: Analysis) -> CoverageRow | None:
    """The row that the paragraph speaks of: the fewest heads that carry most of the effect.

    Where no size does, beyond the doubt that its interval leaves, it is the largest size below the
    whole layer.
    """
    rows = [row for row in analysis.coverage if row.k < analysis.settings.grid.n_heads]
    for row in rows:
        crossed, plain = row.cross_fitted_coverage_pct, row.coverage_pct
        if amount_of(plain if crossed.value is None else crossed) == "most":
            return row
    return rows[-1] if rows else None


def _tests(analysis: Analysis) -> Iterator[str]:
    """How many heads differ from zero; an effect of next to nothing can, too."""
    corrected = {
        test.head.index: test.p_max_t
        for test in analysis.tests.tests
        if test.p_max_t is not None and test.alpha == analysis.settings.grid.patching.alpha
    }
    if not corrected:
        return
    firm = {head for head, p_value in corrected.items() if p_value <= SIGNIFICANT}
    weight = ""
    if firm:
        busy = firm - {kind.head for kind in analysis.kinds.heads if kind.kind == "idle"}
        line = f"{analysis.kinds.idle_below_nats:.2g} nats"
        weight = f"; {len(busy)} of these are not idle (KL_raw above {line})"
    yield (
        f"{len(firm)} of {analysis.settings.grid.n_heads} heads by themselves differ from zero at "
        f"this alpha, corrected (max-T) for all {len(analysis.tests.tests)} tests "
        f"({analysis.tests.family}){weight}."
    )


def _metric(analysis: Analysis) -> Iterator[str]:
    """Whether a second metric ranks the heads in another order."""
    for found in analysis.agreement:
        tau = found.kendall
        if found.kind != "metric" or tau.value is None:
            continue
        low = tau.value if tau.interval is None else tau.interval.low
        if low <= 0:
            yield (
                f"By the {found.first} the heads rank otherwise: Kendall's tau with their order "
                f"by {'ΔKL' if found.second == 'delta' else found.second} is {tau:.3g}."
            )


def _beside_random(row: CoverageRow) -> Iterator[str]:
    if row.random_mean_pct is None:
        return
    drawn, between = f"Random sets of {row.k}", ""
    if row.n_subsets < ENOUGH_SETS and not row.exhaustive:
        drawn = f"The {row.n_subsets} random sets of {row.k}"
    elif row.random_low_pct is not None and row.random_high_pct is not None:
        between = f" (95% between {row.random_low_pct:.1f}% and {row.random_high_pct:.1f}%)"
    judged = ""
    if row.p_value is not None and (row.p_value_min or 0.0) <= SIGNIFICANT:
        clearly = "" if row.p_value <= SIGNIFICANT else "not clearly "
        judged = (
            f"; ranked on other prompts the top {row.k} are {clearly}better (p = {row.p_value:.3g})"
        )
    yield f"{drawn} cover {row.random_mean_pct:.1f}% on average{between}{judged}."


def _structure(analysis: Analysis) -> Iterator[str]:
    """How the effect lies on heads by the run's own curve, cross-fitted where it can be."""
    own, n_heads = analysis.settings.ranking, analysis.settings.grid.n_heads
    by_name = {curve.ranking: curve for curve in analysis.curves}
    curve = by_name.get(f"{own} (cross-fitted)", by_name.get(own))
    if curve is None or n_heads == 1 or curve.k90.value is None or curve.area_pct.value is None:
        return
    reading = spread_of(int(curve.k90.value), n_heads, curve.area_pct.value)
    judged = ", ranked on other prompts," if curve.ranking != own else ""
    few = format(curve.k90, f".0f of {n_heads} heads")
    yield (
        f"90% takes {few}{judged} and the area under the curve is "
        f"{curve.area_pct:.1f%} (an even spread has 50%): {reading}."
    )


def spread_of(k90: int, n_heads: int, area_pct: float) -> str:
    """How the effect lies on heads, in words."""
    if k90 == 1:
        return "one head carries it"
    if k90 <= FEW_SHARE * n_heads:
        return "a few heads carry it"
    if area_pct >= CONCENTRATED_PCT:
        return "a few heads carry most of it and many carry the rest"
    return "it is spread over many heads"


def _controls(analysis: Analysis) -> Iterator[str]:
    judged = [control for control in analysis.controls if control.survives is not None]
    if not judged:
        return
    failed = [control for control in judged if not control.survives]
    verdict = f"The claim survives {len(judged) - len(failed)} of {len(judged)} controls"
    yield verdict + (f"; it does not survive: {_names(failed)}." if failed else ".")
    yield from _closest(judged)
    untested = [control for control in analysis.controls if control.survives is None]
    if untested:
        yield f"Without a verdict: {_names(untested)}."


def _closest(controls: Sequence[Control]) -> Iterator[str]:
    """How near those controls come that put something else in the map's place."""
    instead = [c for c in controls if c.name in QUESTIONS and c.share_pct.value is not None]
    instead.sort(key=lambda control: -(control.share_pct.value or 0.0))
    near = [c for c in instead if (c.share_pct.value or 0.0) >= NEAR_PCT]
    if len(near) > 1:
        shares = ", ".join(f"{control.name} {control.share_pct:.1f%}" for control in near)
        yield f"Of what stands in for the map, {len(near)} come close to its repair: {shares}."
    elif instead:
        first, share = instead[0].name, instead[0].share_pct
        yield f"Of what stands in for the map, {first} comes closest: {share:.1f%} of its repair."


def _names(controls: list[Control]) -> str:
    return ", ".join(control.name for control in controls)
