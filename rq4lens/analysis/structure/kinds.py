"""The ladder, and the kinds of change that it tells apart.

The ladder says what a head set loses when something else stands in for it, from a constant up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from rq4lens.analysis.effects.measured import Indices, MeasuredSets
from rq4lens.analysis.records import NOT_MEASURED, HeadKind, HeadKinds, Ladder, LadderRow
from rq4lens.analysis.statistics.bootstrap import (
    NO_SPREAD,
    Bootstrap,
    Estimate,
    Resampled,
    undefined,
)
from rq4lens.analysis.structure.controls import from_other_heads
from rq4lens.patching.experiment import Experiment
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


def ladder(
    measured: MeasuredSets,
    sets: Mapping[str, Indices],
    sources: Sequence[str],
    bootstrap: Bootstrap,
    noise_floor_nats: float = 0.0,
) -> Ladder:
    """Put each source, the constant first, in place of each head set, at the strength of the view.

    The head set ``full``, the whole layer, draws the idle line.
    """
    damage = np.stack([measured.of_source(source, sets.values()) for source in sources])
    full = damage[:, list(sets).index("full")].mean(-1)
    joint = max(full[sources.index(CONSTANT)], full[sources.index(BASE)])
    idle_below = max(IDLE_PCT / 100 * float(joint), NOISE_MULTIPLE * noise_floor_nats)
    names = [SOURCES[source] for source in sources]
    # All resampled in one product: row by row, reading the weights would take most of the time.
    means = bootstrap.resampled(damage.swapaxes(0, 1).reshape(-1, damage.shape[-1]))
    rows = []
    for at, (name, heads) in enumerate(sets.items()):
        of_set = means.some(at * len(names), len(names))
        rows.append(_row(name, heads, measured.alpha, names, of_set, idle_below))
    rule = (
        f"idle line {idle_below:.2g} nats: {IDLE_PCT:g}% of what all heads of the layer do "
        f"together, or {NOISE_MULTIPLE:g} noise floors if that is more"
    )
    return Ladder(tuple(rows), idle_below, rule)


def _row(
    name: str,
    heads: Indices,
    alpha: float,
    names: Sequence[str],
    means: Resampled,
    idle_below: float,
) -> LadderRow:
    def difference(first: str, second: str) -> Estimate:
        one, other = names.index(first), names.index(second)
        return means.apply(lambda m: m[..., [one]] - m[..., [other]]).estimates()[0]

    damage = dict(zip(names, means.estimates(), strict=True))
    # Studentised ends hold hardly more here, and leave heads undecided (docs/analysis.md).
    shares = means.apply(lambda m: 100 * (1 - m / m[..., :1])).estimates()
    constant = damage["constant"].value or 0.0
    if constant <= idle_below:
        whose = "its" if len(heads) == 1 else "their"
        why = (
            f"a constant in {whose} place costs {constant:.2g} nats, "
            f"below the idle line of {idle_below:.2g}: there is nothing to recover"
        )
        shares = [undefined(why)] * len(names)
    return LadderRow(
        name=name,
        heads=tuple(heads),
        alpha=alpha,
        damage_nats=damage,
        recovered_pct=dict(zip(names, shares, strict=True)),
        interference_nats=difference("raw", "constant"),
        restored_nats=difference("constant", "mapped"),
        lost_nats=damage["mapped"],
    )


# The kinds

SAME_PCT = 90.0
"""Of what a head tells beyond a constant: above this nothing else is needed."""

HALF_PCT = 50.0
"""Above this a map stands for the head."""

NOT_ON_NEUTRAL = "the map does not work on neutral prompts"

KINDS = ("idle", "unchanged", "shifted", "recoded", "reassigned", "replaced", "undecided")

RULE = (
    f"idle: a constant, base's activation and leaving the head out of the layer all do less than "
    f"the idle line ({IDLE_PCT:g}% of the layer's joint effect, or {NOISE_MULTIPLE:g} noise floors "
    f"if that is more), whatever their intervals. Of the others, by how much of what the head "
    f"tells beyond a constant is recovered, at strength 1 and with its whole 95% interval: "
    f"unchanged: base's own activation at least {SAME_PCT:g}%; shifted: moved by the difference "
    f"of means at least {SAME_PCT:g}%; recoded: the map at least {HALF_PCT:g}%, more than the "
    f"shift, and also on contents it was not fitted on and on neutral prompts (where it may do "
    f"less than the idle line instead); reassigned: the map at least {HALF_PCT:g}%, but not "
    f"there; replaced: the map below {HALF_PCT:g}%; undecided: an interval holds a line, or what "
    f"decides was not measured"
)


@dataclass(frozen=True)
class KindInputs:
    """What kinds are decided by: the ladders at strength 1, here and on neutral prompts.

    The map over the shift, and what the layer's raw patch does less without a head, are by head.
    """

    ladder: Ladder
    neutral: Ladder | str
    map_over_shift_nats: tuple[Estimate, ...]
    leave_one_out_nats: tuple[Estimate, ...]
    held_out_because: str | None = None

    @classmethod
    def of(
        cls,
        measured: MeasuredSets,
        ladder: Ladder,
        neutral: Ladder | str,
        without_content: Tensor | str,
        bootstrap: Bootstrap,
    ) -> KindInputs:
        """What decides the kinds of a layer that is measured at strength 1."""
        everything = measured.everything
        without = [tuple(h for h in everything if h != head) for head in everything]
        full, *others = measured.of_source(BASE, [everything, *without])
        shifted, mapped = (measured.of_source(s, measured.singles) for s in (SHIFTED, MAPPED))
        return cls(
            ladder=ladder,
            neutral=neutral,
            map_over_shift_nats=tuple(bootstrap.estimate(shifted - mapped)),
            leave_one_out_nats=tuple(bootstrap.estimate(full - np.stack(others))),
            held_out_because=without_content if isinstance(without_content, str) else None,
        )


def head_kinds(inputs: KindInputs) -> HeadKinds:
    """Tell the kinds of all heads apart."""
    n_heads = len(inputs.leave_one_out_nats)
    return HeadKinds(tuple(_kind(inputs, head) for head in range(n_heads)), RULE)


def no_kinds(n_heads: int) -> HeadKinds:
    """Of heads whose ladder was not measured."""
    nothing = undefined(NOT_MEASURED)
    kind = HeadKind(0, "undecided", "the ladder was not measured", None, nothing)
    return HeadKinds(tuple(replace(kind, head=head) for head in range(n_heads)), RULE)


def _kind(inputs: KindInputs, head: int) -> HeadKind:
    row, left_out = inputs.ladder[f"head{head}"], inputs.leave_one_out_nats[head]
    kind, why = _verdict(inputs, row, head)
    changed = kind in {"recoded", "reassigned"}
    kept = above(row.recovered_pct.get("output"), SAME_PCT) if changed else None
    return HeadKind(head, kind, why, kept, left_out)


def _verdict(inputs: KindInputs, row: LadderRow, head: int) -> tuple[str, str | None]:
    """The kind, and what leaves it undecided."""
    line = inputs.ladder.idle_below_nats
    effects = [row.damage_nats["constant"], row.damage_nats["raw"], inputs.leave_one_out_nats[head]]
    if all(abs(each.value or 0.0) <= line for each in effects):
        return "idle", None
    if row.recovered_pct["constant"].value is None:
        return "undecided", row.recovered_pct["constant"].reason
    for source, kind in (("raw", "unchanged"), ("shifted", "shifted")):
        holds = _holds(source, row.recovered_pct[source], SAME_PCT)
        if holds:
            return (kind, None) if holds is True else ("undecided", holds)
    return _mapped(inputs, row, head)


def _mapped(inputs: KindInputs, row: LadderRow, head: int) -> tuple[str, str | None]:
    """Replaced where the map does not do, recoded where it holds elsewhere too, else reassigned.

    Of a reassigned head whose map does hold on other contents, or was not asked there, it says so.
    """
    mapped = _holds("mapped", row.recovered_pct["mapped"], HALF_PCT)
    if mapped is not True:
        return ("undecided", mapped) if mapped else ("replaced", None)
    if not above(inputs.map_over_shift_nats[head], 0.0):
        return "undecided", "the map does not clearly recover more than a shift of the mean"
    held_out, neutral = _on_held_out(inputs, row), _on_neutral(inputs, row.name)
    if held_out is False or neutral is False:
        return "reassigned", None if held_out is False else NOT_ON_NEUTRAL
    places = {"held-out content": held_out, "neutral prompts": neutral}
    open_ = [f"{place}: {found}" for place, found in places.items() if found is not True]
    if open_:
        return "undecided", f"recoded or reassigned ({'; '.join(open_)})"
    return "recoded", None


def _on_held_out(inputs: KindInputs, row: LadderRow) -> bool | str:
    found = row.recovered_pct.get("held_out")
    if found is None:
        return inputs.held_out_because or NOT_MEASURED
    return _holds("held_out", found, HALF_PCT)


def _on_neutral(inputs: KindInputs, name: str) -> bool | str:
    if isinstance(inputs.neutral, str):
        return inputs.neutral
    row, line = inputs.neutral[name], inputs.ladder.idle_below_nats
    if (row.damage_nats["mapped"].value or 0.0) <= line:
        return True
    if row.recovered_pct["mapped"].value is None:
        # A constant does nothing there, and the map does harm.
        return False
    return _holds("mapped", row.recovered_pct["mapped"], HALF_PCT)


def _holds(source: str, estimate: Estimate, line: float) -> bool | str:
    """Whether more than a line is recovered, or why that is open."""
    holds = above(estimate, line)
    if holds is not None:
        return holds
    if estimate.interval is None:
        return f"{source} has no interval: {estimate.reason}"
    return f"the interval of {source}, {estimate:.0f%}, holds {line:g}%"


def above(estimate: Estimate | None, line: float) -> bool | None:
    """Whether the whole interval lies above a line, or below; None where it holds the line."""
    if estimate is None or estimate.value is None:
        return None
    if estimate.interval is None:
        return estimate.value >= line if estimate.reason == NO_SPREAD else None
    if estimate.interval.low >= line:
        return True
    return False if estimate.interval.high < line else None


def with_other_heads(
    kinds: HeadKinds, ladder: Ladder, measured: MeasuredSets, bootstrap: Bootstrap
) -> HeadKinds:
    """Beside each head that may be recoded, the best other head of the layer."""
    asked = kinds.of("recoded", "reassigned", "undecided")
    experiment, n_heads = measured.experiment, measured.n_heads
    if not asked or not isinstance(experiment, Experiment):
        return kinds
    sources = dict(from_other_heads(experiment, measured.layer, asked))
    if not sources:
        return kinds
    measured, sets = measured.also(sources), [(head,) for head in asked]
    damage = np.stack([measured.of_source(source, sets) for source in sources])
    constant = measured.of_source(CONSTANT, sets)
    heads = list(kinds.heads)
    for at, head in enumerate(asked):
        if ladder[f"head{head}"].recovered_pct["mapped"].value is None:
            continue
        best = int(damage[:, at].mean(-1).argmin())
        (share,) = bootstrap.shares(constant[at][None], damage[best, at][None], method="bca")
        other = (head + best + 1) % n_heads
        heads[head] = replace(heads[head], other_head=other, other_recovered_pct=share)
    return replace(kinds, heads=tuple(heads))
