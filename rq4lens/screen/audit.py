"""The audit of prompts as a terminal shows it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rq4lens.models.prompts.audit import AUDIT_SIDES, Audit, PromptAudit, SideAudit
from rq4lens.screen.tables import UNCUT, text_of

WIDTH = 120
"""Columns of the table where no terminal says how many there are."""

EXAMPLES = 5
"""How many prompts that align are shown beside those that do not."""


def audit_parts(audit: Audit, *, every_prompt: bool = False) -> list[RenderableType]:
    """The audit as what a console can print."""
    shown = list(_shown(audit, every_prompt))
    lines = [*_totals(audit), *(f"note: {note}" for note in audit.notes)]
    left_out = len(audit.prompts) - len(shown)
    if left_out:
        lines.append(f"{left_out} more prompts align; --all shows them.")
    return [_table(shown), *(Text(line) for line in lines)]


def audit_text(audit: Audit, *, every_prompt: bool = False) -> str:
    """The audit as plain text."""
    return text_of(audit_parts(audit, every_prompt=every_prompt), sentences=UNCUT, tables=WIDTH)


def _shown(audit: Audit, every_prompt: bool) -> Iterator[PromptAudit]:
    """The prompts that do not align, and some that do, in their order."""
    n_aligned = 0
    for each in audit.prompts:
        n_aligned += each.aligned
        if every_prompt or not each.aligned or n_aligned <= EXAMPLES:
            yield each


def _table(prompts: list[PromptAudit]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_lines=False)
    for name in ("prompt", "split", "base", "tuned", "ends after", "verdict"):
        table.add_column(name, overflow="fold")
    for each in prompts:
        verdict = Text("aligned" if each.aligned else "DIFFERS", "green" if each.aligned else "red")
        said = "; ".join((*each.problems, *each.notes))
        table.add_row(
            Text(printable(each.id)),
            Text(printable(each.split)),
            *(_around(each.sides.get(side)) for side in AUDIT_SIDES),
            Text(" / ".join(_end(each.sides.get(side)) for side in AUDIT_SIDES)),
            Text.assemble(verdict, f": {printable(said)}" if said else ""),
        )
    return table


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
        f"decided by rule: {printable(audit.reading)}"
    )
    if audit.excluded:
        yield f"{len(audit.excluded)} of those that do not align are left out of a run."
    cut = {side: audit.n_cut(side) for side in AUDIT_SIDES}
    if any(cut.values()):
        yield f"cut on the left: {cut['base']} prompts of base, {cut['tuned']} of tuned"
    if audit.warning is not None:
        yield audit.warning


def printable(text: str) -> str:
    """Text of one line on any terminal: line breaks and control characters are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
