"""A head card as the console prints it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rq4lens.analysis.card.fragment import estimate_text, signed, token_line, token_text
from rq4lens.analysis.card.records import Decision, HeadCard, Likely, NextTokens
from rq4lens.screen.terminal import printable, table_of

SEEN = 0.05
"""Share of the attention from which a token is marked."""


def card_parts(card: HeadCard) -> list[RenderableType]:
    """The card as what a console can print."""
    return [
        Text(
            f"{card.head} of {printable(card.pair)}, {card.n_prompts} {card.split} prompts", "bold"
        ),
        *(Text(f"{name:<32}{said}") for name, said in _facts(card)),
        Text("\nreads", "bold"),
        _roles(card),
        _texts(card),
        Text("\nwrites: tokens raised and lowered most by the direct effect", "bold"),
        _shifts(card),
        *(part for each in card.decides for part in _decision(each)),
    ]


def _facts(card: HeadCard) -> Iterator[tuple[str, str]]:
    numbers, carried = card.numbers, card.carried
    if numbers is not None:
        known = numbers.rank_low is not None
        between = f" [{numbers.rank_low}, {numbers.rank_high}]" if known else ""
        yield "kind", numbers.kind or numbers.reasons["kind"]
        yield "rank", f"{numbers.rank}{between}"
        yield f"ΔKL (α = {numbers.alpha:g})", estimate_text(numbers.delta, "nats")
        for source, recovered in numbers.recovered_pct.items():
            if source != "constant" and recovered.value is not None:
                yield f"recovered by {source}", format(recovered, ".0f%")
    yield "takes tuned to base", estimate_text(carried.to_base_pct, "%")
    yield "takes base to tuned", estimate_text(carried.to_tuned_pct, "%")
    yield "of it direct", estimate_text(carried.direct_pct, "%")
    if card.map is not None:
        yield "map", _map_text(card)
    yield "distance of the patterns", estimate_text(card.reads.distance)
    yield "output moved by attending", estimate_text(card.reads.output_change_pct, "%")
    yield "output moved by writing", estimate_text(card.writes.output_change_pct, "%")


def _map_text(card: HeadCard) -> str:
    facts = card.map
    assert facts is not None
    named = (
        (facts.r2, "R² {:.3f}"),
        (facts.rotation_degrees, "rotation {:.0f}°"),
        (facts.scale, "scale {:.2f}"),
        (facts.shift_pct, "shift {:.0f}%"),
    )
    return ", ".join([facts.kind, *(form.format(x) for x, form in named if x is not None)])


def _roles(card: HeadCard) -> Table:
    rows = []
    for role in card.reads.roles:
        change = signed(role.tuned_pct - role.base_pct, 1)
        between = f" {role.change_pct.interval:.1f}" if role.change_pct.interval else ""
        shares = (f"{role.base_pct:.1f}", f"{role.tuned_pct:.1f}")
        rows.append((role.name, *shares, change + between))
    return table_of(("attention to, %", "base", "tuned", "change"), rows)


def _texts(card: HeadCard) -> Table:
    rows = [
        (_shown(each.text), f"{each.base_pct:.2f}", f"{each.tuned_pct:.2f}", str(each.n_prompts))
        for each in card.reads.texts
    ]
    return table_of(("attention to token, %", "base", "tuned", "in prompts"), rows)


def _shifts(card: HeadCard) -> Table:
    named = {"base": card.writes.base, "tuned": card.writes.tuned}
    if card.writes.change is not None:
        named["tuned − base"] = card.writes.change
    each_column = (
        [f"{signed(each.logits, 3)} {_shown(each.token)}" for each in (*some.raised, *some.lowered)]
        for some in named.values()
    )
    return table_of(tuple(named), zip(*each_column, strict=True), others="left")


def _decision(decision: Decision) -> Iterator[RenderableType]:
    closed, delta = decision.closed_nats, decision.delta_nats
    said = [f"\ndecides {printable(decision.prompt)}, by {decision.chosen_by}"]
    said += [] if closed is None else [f"{closed:.3g} nats nearer to base"]
    said += [] if delta is None else [f"ΔKL {delta:.3g} nats"]
    yield Text("; ".join(said), "bold")
    for side in ("base", "tuned"):
        yield Text(f"{side:<6}{' '.join(_marked(*each) for each in token_line(decision, side))}")
    yield _next_tokens(decision.next_tokens)


def _marked(text: str, share: float, gap: bool) -> str:
    mark = f"({100 * share:.0f}%)" if share >= SEEN else ""
    return f"{'… ' if gap else ''}{_shown(text)}{mark}"


def _next_tokens(tokens: NextTokens) -> Table:
    voices: dict[str, Sequence[Likely]] = {
        "base": tokens.base,
        "with tuned's head": tokens.base_with_tuned_head,
        "tuned with base's head": tokens.tuned_with_base_head,
        "tuned": tokens.tuned,
    }
    rows = (
        [f"{100 * each.probability:5.1f}% {_shown(each.token)}" for each in row]
        for row in zip(*voices.values(), strict=True)
    )
    return table_of(tuple(voices), rows, others="left")


def _shown(token: str) -> str:
    return printable(token_text(token))
