"""Head cards in a page: one is open at a time, and choosing its head anywhere opens it."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from rq4lens.analysis.card.fragment import card_css, card_fragment
from rq4lens.analysis.card.records import HeadCard

MOST_BYTES = 2_000_000
"""Of all cards of a page, which may have 8 MB with its figures."""


def cards_section(cards: Sequence[HeadCard]) -> str:
    """The cards as a part of a page: folded, each under the anchor ``card-L1H0``.

    They need no script: the first ones whose size the page can hold are there, and the others are
    named. Every text of a prompt is escaped.

    Args:
        cards: the cards, the most important ones first.

    Returns:
        HTML with its own style; it takes the colours of the page around it.
    """
    parts, left_out, size = [], [], 0
    for card in cards:
        part = _folded(card)
        size += len(part.encode())
        if size > MOST_BYTES:
            left_out.append(card.head.label)
        else:
            parts.append(part)
    if left_out:
        names = ", ".join(left_out)
        said = "Left out, so that the page stays small: {}; see rq4lens head."
        parts.append(Markup("<p>{}</p>").format(said.format(names)))
    return Markup("<style>{}</style>\n").format(Markup(card_css())) + Markup("\n").join(parts)


def _folded(card: HeadCard) -> Markup:
    label = card.head.label
    kind = card.numbers.kind if card.numbers else None
    said = f"{label}, {kind}" if kind else label
    start = Markup('<details class="card" id="card-{}" name="card"><summary>{}</summary>')
    return start.format(label, said) + Markup(card_fragment(card)) + Markup("</details>")
