"""At which sizes random head sets are measured."""

from math import comb

import pytest

from rq4lens.analysis.random_sizes import EXHAUSTIVE_LIMIT, MAX_ROWS, random_sizes


@pytest.mark.parametrize(("n_heads", "n_prompts"), [(1, 5), (2, 5), (12, 320), (32, 40), (64, 20)])
def test_every_size_where_that_can_be_afforded(n_heads, n_prompts):
    """Small layers, or few prompts, have random sets of every size from 1 to H."""
    assert random_sizes(n_heads, (1,), n_prompts, 1000) == tuple(range(1, n_heads + 1))


@pytest.mark.parametrize("n_heads", [16, 32, 64])
@pytest.mark.parametrize("n_prompts", [320, 1000])
def test_what_is_added_stays_within_the_rows(n_heads, n_prompts):
    """Enumerated and own sizes are always there; the others fit and stand evenly."""
    own = (1, 2, 4, 8)
    sizes = random_sizes(n_heads, own, n_prompts, 1000)
    fixed = {*own, *(k for k in range(1, n_heads + 1) if comb(n_heads, k) <= EXHAUSTIVE_LIMIT)}
    assert fixed <= set(sizes)
    assert len(sizes) < n_heads
    n_rows = 2 * n_prompts * sum(min(comb(n_heads, k), 1000) for k in sizes)
    assert set(sizes) == fixed or n_rows <= MAX_ROWS
    assert n_rows + 2 * n_prompts * 1000 > MAX_ROWS


def test_the_widest_gap_is_halved_first():
    """Between 8 and 13 of 16 heads there is more room than between 4 and 8."""
    n_prompts = MAX_ROWS // (2 * (1392 + 3000))
    assert random_sizes(16, (4, 8), n_prompts, 1000) == (1, 2, 3, 4, 8, 10, 13, 14, 15, 16)


def test_named_sizes_are_measured_whatever_they_cost():
    """A named size is added to the run's own."""
    assert random_sizes(64, (2,), 10**6, 1000, range(1, 65)) == tuple(range(1, 65))
    assert random_sizes(64, (2,), 10**6, 1000, ()) == (2,)
