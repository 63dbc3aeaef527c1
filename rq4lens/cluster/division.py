"""Whether pieces are conditions on all prompts, or on a part of them."""

from __future__ import annotations

from typing import Literal, get_args

from rq4lens.errors import UserError

Division = Literal["auto", "conditions", "prompts"]
DIVISIONS: tuple[Division, ...] = get_args(Division)

FEW_PIECES = 16
"""Pieces of conditions per worker below which the clean pass is felt.

A piece of 32 patches of a middle layer costs about as much as 32 tokens in half of the layers; the
clean pass of a prompt of T tokens, which every worker makes unless prompts are divided, about T
tokens in all of them. With T = 96 that is the work of six pieces.
"""


def checked_division(text: str) -> Division:
    """A division as a user writes it.

    Raises:
        UserError: if there is no such one.
    """
    for each in DIVISIONS:
        if text == each:
            return each
    raise UserError(f"--divide {text[:40]!r} does not exist: choose {', '.join(DIVISIONS)}.")


def divides_prompts(division: Division, n_pieces: int, n_workers: int, n_parts: int) -> bool:
    """Whether the prompts of a job are divided too.

    Args:
        division: what was asked for.
        n_pieces: pieces of conditions.
        n_workers: workers or shares among which they are divided.
        n_parts: parts in which the clean pass goes over the prompts.

    Returns:
        As asked for; by default where there are several workers, and few pieces for each of them.
        Prompts that go through the clean model together are never divided.
    """
    if division == "auto":
        return n_parts > 1 and n_workers > 1 and n_pieces < FEW_PIECES * n_workers
    return division == "prompts" and n_parts > 1
