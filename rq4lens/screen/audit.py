"""The audit of prompts as a terminal shows it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rq4lens.analysis.effects.apart import PairFacts, outside_layers, weights_table
from rq4lens.config import SIDES
from rq4lens.models.prompts.audit import PIECES, Audit, Cause, PromptAudit, SideAudit, causes
from rq4lens.screen.terminal import UNCUT, printable, table_of

WIDTHS = {"sentences": UNCUT, "tables": 120}
"""Columns where no terminal says how many there are."""

EXAMPLES = 5
"""How many prompts of each cause are named and shown, and how many of those that align."""


def audit_parts(
    audit: Audit,
    facts: PairFacts | None = None,
    why_not: str | None = None,
    *,
    every_prompt: bool = False,
) -> list[RenderableType]:
    """The audit as what a console can print, and what the pair is."""
    shown = list(audit.prompts if every_prompt else _shown(audit))
    lines = [
        *(_reasons(shown) if every_prompt else ()),
        *(f"DIFFERS: {_counted(cause)}" for cause in causes(audit.prompts)),
        *(f"note: {_counted(cause)}" for cause in causes(audit.prompts, "notes")),
        *(f"note: {note}" for note in audit.notes),
        *_totals(audit),
    ]
    if left_out := len(audit.prompts) - len(shown):
        lines.append(f"{left_out} more prompts are not shown; --all shows them.")
    tables = [_table(shown), *_pieces(shown)]
    return [*tables, *(Text(printable(line)) for line in lines), *_pair(facts, why_not)]


def _pair(facts: PairFacts | None, why_not: str | None) -> Iterator[RenderableType]:
    """What the pair is, and how each matrix changed."""
    if facts is None:
        if why_not is not None:
            yield Text(f"pair: {printable(why_not)}")
        return
    yield from (Text(printable(line)) for line in facts.lines)
    matrices, rows = weights_table(facts.weights)
    if rows and facts.relative_weight_change:
        outside = outside_layers(facts.weights)
        caption = f"relative change (cosine) of each matrix; outside the layers: {outside}"
        yield table_of(("layer", *matrices), rows, caption, no_wrap=True)


def _reasons(prompts: list[PromptAudit]) -> Iterator[str]:
    """What was found of each prompt, where something was."""
    for each in prompts:
        if said := "; ".join((*each.problems, *each.notes)):
            yield f"{each.id}: {said}"


def _counted(cause: Cause) -> str:
    """A cause in one line: how many prompts it holds for, the first of them, what it is."""
    n, more = len(cause.ids), len(cause.ids) - EXAMPLES
    named = ", ".join(cause.ids[:EXAMPLES]) + (f" and {more} more" if more > 0 else "")
    return f"{n} prompt{'s' * (n > 1)} ({named}): {cause.said}"


def _shown(audit: Audit) -> Iterator[PromptAudit]:
    """Some prompts of each cause, and some that align, in their order."""
    named = {name for cause in causes(audit.prompts) for name in cause.ids[:EXAMPLES]}
    n_aligned = 0
    for each in audit.prompts:
        n_aligned += each.aligned
        if each.id in named or (each.aligned and n_aligned <= EXAMPLES):
            yield each


def _table(prompts: list[PromptAudit]) -> Table:
    rows = [
        (
            Text(printable(each.id)),
            Text(printable(each.split)),
            *(_around(each.sides.get(side)) for side in SIDES),
            Text(" / ".join(_end(each.sides.get(side)) for side in SIDES)),
            Text("aligned" if each.aligned else "DIFFERS", "green" if each.aligned else "red"),
        )
        for each in prompts
    ]
    titles = ("prompt", "split", "base", "tuned", "ends after", "verdict")
    return table_of(titles, rows, others="left", fold=True)


def _pieces(prompts: list[PromptAudit]) -> Iterator[Table]:
    """How answers, foils and patched tokens were read, token by token, where prompts have any."""
    rows = []
    for each in prompts:
        for name in PIECES:
            read = [s.pieces.get(name) if (s := each.sides.get(side)) else None for side in SIDES]
            tokens = (Text(printable("|".join(piece.tokens)) if piece else "-") for piece in read)
            if how := " / ".join(dict.fromkeys(piece.how for piece in read if piece)):
                rows.append((Text(printable(each.id)), name, *tokens, how))
    if rows:
        titles = ("prompt", "piece", "base", "tuned", "how")
        yield table_of(titles, rows, others="left", fold=True)


def _around(side: SideAudit | None) -> Text:
    """The tokens around the decision token, which stands in brackets."""
    if side is None:
        return Text("-")
    before, after = ("|".join(map(printable, part)) for part in (side.before, side.after))
    return Text.assemble(before, (f"[{printable(side.decision)}]", "bold"), (after, "dim"))


def _end(side: SideAudit | None) -> str:
    if side is None or side.text_end is None:
        return "-"
    return f"{side.text_end}{'+' if side.in_template else ''}"


def _totals(audit: Audit) -> Iterator[str]:
    if audit.share_aligned_pct is None:
        yield "there are no prompts."
        return
    n_aligned = len(audit.prompts) - len(audit.misaligned)
    yield (
        f"{n_aligned} of {len(audit.prompts)} prompts align ({audit.share_aligned_pct:.1f}%), "
        f"decided by rule: {audit.reading}"
    )
    if audit.n_same_tokens < len(audit.prompts):
        yield f"{audit.n_same_tokens} of them are the same token ids for both models"
    if audit.excluded:
        yield f"{len(audit.excluded)} of those that do not align are left out of a run."
    cut = {side: audit.n_cut(side) for side in SIDES}
    if any(cut.values()):
        yield f"cut on the left: {cut['base']} prompts of base, {cut['tuned']} of tuned"
    yield from audit.lacking
    if audit.warning is not None:
        yield audit.warning
