"""At which sizes random head sets are measured: every k where that can be afforded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import comb

from rq4lens.errors import UserError

EXHAUSTIVE_LIMIT = 1000
"""Sizes with at most this many sets are enumerated."""

FEW_SETS = 200
"""Sizes with at most this many sets cost next to nothing, and are always measured."""

MAX_ROWS = 2_000_000
"""Rows (prompt x head set, raw and mapped) that random sets take unless sizes are named.

About half a minute of two CPU cores for the built-in pair, and of one H200 for a pair of 8 billion
parameters.
"""


def random_sizes(
    n_heads: int,
    own: Sequence[int],
    n_prompts: int,
    n_random_sets: int,
    asked: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The sizes of random sets.

    Those of the run are always among them, and so are 1 and all sizes with few sets. As long as
    ``MAX_ROWS`` allows, the middle of the widest gap between two sizes is added, until there is no
    gap.

    Args:
        n_heads: heads of the layer.
        own: the run's own sizes.
        n_prompts: measured prompts.
        n_random_sets: sets drawn of a size that is not enumerated.
        asked: sizes that are named instead of chosen.

    Returns:
        The sizes, ascending.

    Raises:
        UserError: if a named size does not fit the layer.
    """
    if asked is not None:
        return tuple(sorted({*own, *_existing(asked, n_heads)}))
    sizes = range(1, n_heads + 1)
    chosen = {1, *own, *(k for k in sizes if comb(n_heads, k) <= FEW_SETS)}
    left = MAX_ROWS // (2 * n_prompts) - sum(_n_sets(n_heads, k, n_random_sets) for k in chosen)
    while len(chosen) < n_heads:
        k = _middle_of_widest_gap(chosen)
        left -= _n_sets(n_heads, k, n_random_sets)
        if left < 0:
            break
        chosen.add(k)
    return tuple(sorted(chosen))


def _n_sets(n_heads: int, k: int, n_random_sets: int) -> int:
    return every if (every := comb(n_heads, k)) <= EXHAUSTIVE_LIMIT else n_random_sets


def _middle_of_widest_gap(sizes: Iterable[int]) -> int:
    low, high = max(pairwise(sorted(sizes)), key=lambda gap: (gap[1] - gap[0], -gap[0]))
    return (low + high) // 2


def _existing(asked: Sequence[int], n_heads: int) -> Sequence[int]:
    for k in asked:
        if not 1 <= k <= n_heads:
            raise UserError(
                f"random sets of {k} heads do not exist: the layer has {n_heads}; give sizes from "
                f"1 to {n_heads}."
            )
    return asked
