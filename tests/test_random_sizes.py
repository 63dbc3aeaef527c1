"""At which sizes random head sets are measured."""

from math import comb

import pytest

from rq4lens.analysis.coverage.random_sets import FEW_SETS, MAX_ROWS, random_sizes
from rq4lens.config import AnalysisEffort

N_SETS = AnalysisEffort().n_random_sets


@pytest.mark.parametrize(("n_heads", "n_prompts"), [(1, 5), (2, 5), (12, 120), (32, 30), (64, 15)])
def test_every_size_where_that_can_be_afforded(n_heads, n_prompts):
    """Small layers, or few prompts, have random sets of every size from 1 to H."""
    assert random_sizes(n_heads, (1,), n_prompts, N_SETS) == tuple(range(1, n_heads + 1))


@pytest.mark.parametrize("n_heads", [16, 32, 64])
@pytest.mark.parametrize("n_prompts", [320, 1000])
def test_what_is_added_stays_within_the_rows(n_heads, n_prompts):
    """Sizes with few sets and own sizes are always there; the others fit and stand evenly."""
    own = (1, 2, 4, 8)
    sizes = random_sizes(n_heads, own, n_prompts, N_SETS)
    fixed = {*own, *(k for k in range(1, n_heads + 1) if comb(n_heads, k) <= FEW_SETS)}
    assert fixed <= set(sizes)
    assert len(sizes) < n_heads
    n_rows = 2 * n_prompts * sum(min(comb(n_heads, k), N_SETS) for k in sizes)
    assert set(sizes) == fixed or n_rows <= MAX_ROWS
    assert n_rows + 2 * n_prompts * N_SETS > MAX_ROWS


def test_the_widest_gap_is_halved_first():
    """Between 8 and 15 of 16 heads there is more room than between 4 and 8."""
    n_sets = 2 * 16 + 1 + 3 * N_SETS  # of 1, 15 and 16 heads, and of 4, 8 and 11
    n_prompts = MAX_ROWS // (2 * n_sets)
    assert random_sizes(16, (4, 8), n_prompts, N_SETS) == (1, 4, 8, 11, 15, 16)


def test_named_sizes_are_measured_whatever_they_cost():
    """A named size is added to the run's own."""
    assert random_sizes(64, (2,), 10**6, N_SETS, range(1, 65)) == tuple(range(1, 65))
    assert random_sizes(64, (2,), 10**6, N_SETS, ()) == (2,)
