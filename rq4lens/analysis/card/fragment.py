"""A head card as HTML: attention as tinted tokens, bars of raised and lowered tokens, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from rq4lens.analysis.statistics.bootstrap import Estimate

_HERE = Path(__file__).parent

MOST_TOKENS = 60
"""Tokens that a line shows; of a longer prompt the least attended ones are left out."""


@cache
def card_css() -> str:
    """The style of fragments; it takes the colours of the page around them."""
    return (_HERE / "card.css").read_text(encoding="utf-8")


def card_fragment(card: Any) -> str:
    """A :class:`HeadCard` as HTML, with every text in it escaped; it takes :func:`card_css`."""
    return _template().render(card=card)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"number": estimate_text, "line": token_line, "longest": longest}
    environment.filters |= {"token": token_text, "signed": signed}
    return environment.get_template("card.html.jinja")


def estimate_text(estimate: Estimate, unit: str = "") -> str:
    """A number with its interval, or why there is none."""
    if estimate.value is None:
        return f"undefined: {estimate.reason}"
    form = {"%": ".1f%", "nats": "auto"}.get(unit, ".3f")
    return f"{estimate:{form}}" + (" nats" if unit == "nats" else "")


def signed(value: float, digits: int) -> str:
    """A number with its sign; one that is shown as 0 has none."""
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if not float(text) else text


def token_text(text: str) -> str:
    """A token in which spaces and line breaks can be seen."""
    return text.replace("\n", "⏎").replace(" ", "␣") if not text.strip() else text.strip()


def token_line(decision: Any, side: str) -> list[tuple[str, float, bool]]:
    """Tokens of a prompt, their attention, and whether some were left out before them."""
    read = getattr(decision, side)
    both = [read.attention]
    if decision.base.tokens == decision.tuned.tokens:  # lines stand under each other
        both = [decision.base.attention, decision.tuned.attention]
    places = _most_attended([max(each) for each in zip(*both, strict=True)])
    before = [-1, *places]
    return [
        (read.tokens[at], read.attention[at], at != last + 1)
        for last, at in zip(before, places, strict=False)
    ]


def _most_attended(attention: Sequence[float]) -> list[int]:
    last = len(attention) - 1
    order = sorted(range(len(attention)), key=lambda at: (at != last, -attention[at]))
    return sorted(order[:MOST_TOKENS])


def longest(shifts: Iterable[Any]) -> float:
    """The longest bar of some shifts: what all of them are drawn against."""
    each = [abs(one.logits) for some in shifts for one in (*some.raised, *some.lowered)]
    return max(each, default=0.0) or 1.0
