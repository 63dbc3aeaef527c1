"""The ladder: what a head set loses when something else stands in for it, from a constant up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rq4lens.analysis.effects.measured import Indices, MeasuredSets
from rq4lens.analysis.records import Ladder, LadderRow
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, Resampled, undefined
from rq4lens.patching.patch import BASE, CONSTANT, MAPPED, OUTPUT, SHIFTED

IDLE_PCT = 0.25
"""Of the layer's joint effect: what a head at most does if it is idle."""

NOISE_MULTIPLE = 10.0
"""A head below this many noise floors is idle, too."""

HELD_OUT = "held_out"
"""The source of a map that was fitted without the prompt's own content."""

SOURCES = {
    CONSTANT: "constant",
    BASE: "raw",
    SHIFTED: "shifted",
    MAPPED: "mapped",
    HELD_OUT: "held_out",
    OUTPUT: "output",
}
"""The rungs by source, and what records call them."""


def idle_rule(idle_below: float) -> str:
    """How the idle line is drawn, in words."""
    return (
        f"idle line {idle_below:.2g} nats: {IDLE_PCT:g}% of what all heads of the layer do "
        f"together, or {NOISE_MULTIPLE:g} noise floors if that is more"
    )


def ladder(
    measured: MeasuredSets,
    sets: Mapping[str, Indices],
    sources: Sequence[str],
    bootstrap: Bootstrap,
    noise_floor_nats: float = 0.0,
) -> Ladder:
    """Put each source in place of each head set, at the strength of the view.

    Args:
        measured: the layer, at one strength.
        sets: the head sets by name; ``full``, the whole layer, draws the idle line.
        sources: the sources; the constant first.
        bootstrap: the resamples of the prompts.
        noise_floor_nats: what patching nothing leaves.
    """
    damage = np.stack([measured.of_source(source, sets.values()) for source in sources])
    full = damage[:, list(sets).index("full")].mean(-1)
    joint = max(full[sources.index(CONSTANT)], full[sources.index(BASE)])
    idle_below = max(IDLE_PCT / 100 * float(joint), NOISE_MULTIPLE * noise_floor_nats)
    names = [SOURCES[source] for source in sources]
    # All resampled in one product: row by row, reading the weights would take most of the time.
    means = bootstrap.resampled(damage.swapaxes(0, 1).reshape(-1, damage.shape[-1]))
    rows = [
        _row(name, heads, measured.alpha, names, means.some(at * len(names), len(names)))
        for at, (name, heads) in enumerate(sets.items())
    ]
    return Ladder(
        tuple(_checked(row, idle_below) for row in rows), idle_below, idle_rule(idle_below)
    )


def _row(
    name: str,
    heads: Indices,
    alpha: float,
    names: Sequence[str],
    means: Resampled,
) -> LadderRow:
    at = {each: names.index(each) for each in names}

    def difference(first: str, second: str) -> Estimate:
        return means.apply(lambda m: m[..., [at[first]]] - m[..., [at[second]]]).estimates()[0]

    estimates = dict(zip(names, means.estimates(), strict=True))
    return LadderRow(
        name=name,
        heads=tuple(heads),
        alpha=alpha,
        damage_nats=estimates,
        # Studentised ends hold hardly more here, and leave heads undecided (docs/analysis.md).
        recovered_pct=dict(zip(names, recovered(means).estimates(), strict=True)),
        interference_nats=difference("raw", "constant"),
        restored_nats=difference("constant", "mapped"),
        lost_nats=estimates["mapped"],
    )


def recovered(damage: Resampled) -> Resampled:
    """``100 (1 - D(x) / D(constant))`` of damages, the constant's first."""
    return damage.apply(lambda m: 100 * (1 - m / m[..., :1]))


def _checked(row: LadderRow, idle_below: float) -> LadderRow:
    """Nothing is recovered of a head whose constant does no damage."""
    constant = row.damage_nats["constant"].value or 0.0
    if constant > idle_below:
        return row
    whose = "its" if len(row.heads) == 1 else "their"
    why = (
        f"a constant in {whose} place costs {constant:.2g} nats, "
        f"below the idle line of {idle_below:.2g}: there is nothing to recover"
    )
    return replace(row, recovered_pct=dict.fromkeys(row.recovered_pct, undefined(why)))
