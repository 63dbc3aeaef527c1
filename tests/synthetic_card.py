"""Head cards without models: numbers and tokens of any kind, as many as a card may have."""

from __future__ import annotations

from rq4lens.analysis.card.card import MOST_PROMPTS
from rq4lens.analysis.card.records import (
    Attended,
    Carried,
    Decision,
    HeadCard,
    HeadReads,
    Likely,
    NextTokens,
    Role,
    Shifts,
    TextShare,
    TokenShift,
    Writes,
)
from rq4lens.analysis.statistics.bootstrap import Estimate, Interval
from rq4lens.heads import Head

ESTIMATE = Estimate(12.5, Interval(10.0, 15.0))


def synthetic_card(head: Head, token: str = "token", n_tokens: int = 200) -> HeadCard:
    """A card in which every token has this text, and every list its full length."""
    shifts = Shifts((TokenShift(token, 0.5),) * 10, (TokenShift(token, -0.25),) * 10)
    short = Shifts(shifts.raised[:5], shifts.lowered[:5])
    read = Attended((token,) * n_tokens, (1 / n_tokens,) * n_tokens)
    likely = (Likely(token, 0.2),) * 5
    tables = NextTokens(likely, likely, likely, likely)
    decision = Decision(token, "transfer", 0.5, 0.1, read, read, tables, short, short)
    return HeadCard(
        head=head,
        pair=token,
        split="val",
        n_prompts=60,
        carried=Carried(ESTIMATE, ESTIMATE, ESTIMATE),
        numbers=None,
        reads=HeadReads(
            (Role("first token", 50.0, 62.5, ESTIMATE),) * 5,
            (TextShare(token, 60, 50.0, 62.5),) * 12,
            ESTIMATE,
            ESTIMATE,
        ),
        writes=Writes(shifts, shifts, shifts, ESTIMATE),
        map=None,
        decides=(decision,) * MOST_PROMPTS,
        reasons={"numbers": "none were measured", "map": "none was fitted"},
    )
