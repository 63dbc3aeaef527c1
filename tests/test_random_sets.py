"""Random head sets: distribution, p-values and the band over k, on games with known truth."""

from dataclasses import replace
from math import comb

import numpy as np
import pytest
from games import Game, inputs_of, noisy_game

from rq4lens.analysis.coverage.random_sets import (
    BAND_HOLDS_PCT,
    EXHAUSTIVE_LIMIT,
    FEWEST_SQUARES,
    PRECISION_PCT,
    RandomRankings,
    error_of_mean,
    random_band,
    random_sets,
)
from rq4lens.analysis.coverage.table import coverage
from rq4lens.analysis.effects.measured import prefixes

BAND = ("band_low_pct", "band_high_pct")


def test_few_sets_are_enumerated_and_many_are_drawn():
    """Sizes with few sets give all of them, larger ones the number of draws asked for."""
    game = noisy_game(np.linspace(1, 2, 14), 10)
    inputs = inputs_of(game, ks=(2, 7))
    rankings = RandomRankings.draw(inputs.layer.measured, 300, 0)
    few = random_sets(rankings, 2, 1.0, {})
    many = random_sets(rankings, 7, 1.0, {})
    assert (few.exhaustive, few.n_subsets) == (True, 91)
    assert (many.exhaustive, many.n_subsets) == (False, 300)


def test_random_sets_of_an_additive_game_have_the_mean_of_their_size():
    """Enumerated sets of k heads cover 100 k/H on average."""
    inputs = inputs_of(Game(np.outer([5.0, 3, 2, 1, 1], [1.0, 1.1, 0.9])), ks=(2,))
    random = coverage(inputs).random[0]
    assert random.mean_pct == pytest.approx(40)
    assert random.seeds_pct[0] == pytest.approx(100 * 8 / 12)


def test_random_rankings_are_uniform():
    """Every head is equally likely at every place of a random ranking."""
    inputs = inputs_of(noisy_game([1.0, 2, 3, 4], 10))
    rankings = RandomRankings.draw(inputs.layer.measured, 8000, 1).rankings
    shares = (rankings[:, 0, None] == np.arange(4)).mean(0)
    assert shares == pytest.approx([0.25] * 4, abs=0.02)


def test_a_square_of_rankings_has_every_head_at_every_place():
    """So the mean of an additive game is exact from the first square on, at every size."""
    game = Game(np.outer(np.arange(13.0) ** 2, [1.0, 1.1]))
    rankings = RandomRankings.draw(inputs_of(game).layer.measured, 39, 0)
    for square in rankings.rankings.reshape(3, 13, 13):
        assert (np.sort(square, axis=0) == np.arange(13)[:, None]).all()
        assert (np.sort(square, axis=1) == np.arange(13)).all()
    assert error_of_mean(rankings.delta(6), 13) == pytest.approx(0, abs=1e-12)


def test_drawing_stops_when_the_mean_is_known():
    """Additive heads need the fewest squares; heads that only work together need every draw."""

    def drawn(game):
        return coverage(inputs_of(game, ks=(6,), random_ks=(6,))).random[0]

    easy = drawn(noisy_game(np.linspace(1, 2, 13), 20))
    assert easy.n_subsets == FEWEST_SQUARES * 13
    assert easy.mean_error_pct <= PRECISION_PCT
    assert easy.band_holds_pct >= BAND_HOLDS_PCT
    pairs = np.zeros((13, 13))
    pairs[0, 1] = pairs[1, 0] = 500.0
    hard = drawn(Game(np.ones((13, 20)), pairs=pairs))
    assert hard.n_subsets > easy.n_subsets
    assert hard.mean_error_pct <= PRECISION_PCT or hard.n_subsets == 200


def test_drawing_goes_on_while_the_band_is_too_narrow():
    """A band over many sizes takes more rankings than the means do."""
    inputs = inputs_of(noisy_game(np.arange(13.0) ** 2, 20), ks=(6,), random_ks=range(1, 14))
    found = coverage(inputs).random[5]
    assert found.n_subsets > FEWEST_SQUARES * 13
    assert found.band_holds_pct >= BAND_HOLDS_PCT or found.n_subsets == 200


@pytest.mark.parametrize("k", [2, 6])
def test_the_average_random_set_is_that_of_each_prompt(k):
    """In an additive game it has k times the mean head, prompt by prompt, enumerated or drawn."""
    game = noisy_game(np.linspace(1, 2, 13), 10)
    rankings = RandomRankings.draw(inputs_of(game).layer.measured, 4000, 0)
    expected = k * game.single.mean(0)
    assert rankings.average_nats(k) == pytest.approx(expected, abs=1e-12 if k == 2 else 0.05)


def test_random_band_holds_whole_rankings():
    """95% of random rankings stay inside the band at every k."""
    rng = np.random.default_rng(0)
    curves = rng.normal(size=(4000, 5)).cumsum(1)
    low, high = random_band(curves)
    inside = (curves >= low) & (curves <= high)
    assert inside.all(1).mean() == pytest.approx(0.95, abs=0.002)


def test_random_band_follows_a_skewed_distribution():
    """Where nine of ten rankings cover nothing, the band does not reach below nothing."""
    rng = np.random.default_rng(0)
    curves = (rng.random((4000, 5)) < 0.1).cumsum(1) * rng.exponential(size=(4000, 1))
    low, high = random_band(curves)
    assert low.tolist() == [0, 0, 0, 0, 0]
    assert (high < curves.max(0)).all()
    inside = (curves >= low) & (curves <= high)
    assert inside.all(1).mean() == pytest.approx(0.95, abs=0.005)


def test_random_band_guards_both_sides_alike():
    """Mirrored curves have the mirrored band."""
    curves = np.random.default_rng(2).exponential(size=(1000, 4)).cumsum(1)
    (low, high), (mirrored_low, mirrored_high) = random_band(curves), random_band(-curves)
    assert np.array_equal(mirrored_low, -high)
    assert np.array_equal(mirrored_high, -low)


def test_random_sets_of_every_size_come_from_the_same_rankings():
    """At every k: a distribution, a p-value with its minimum, and one band; sets are nested."""
    inputs = inputs_of(noisy_game(np.arange(13) ** 2 / 9, 20), random_ks=range(1, 14))
    found = coverage(inputs)
    assert [sets.k for sets in found.random] == list(range(1, 14))
    assert [row.k for row in found.coverage] == [1, 2]
    many = [k for k in range(1, 14) if comb(13, k) > EXHAUSTIVE_LIMIT]
    assert [sets.k for sets in found.random if not sets.exhaustive] == many
    for sets in found.random:
        if sets.exhaustive:
            assert (sets.n_subsets, sets.mean_error_pct) == (comb(13, sets.k), 0)
        else:
            assert sets.n_subsets == len(inputs.rankings.rankings) <= 200
        assert 0 < sets.p_value_min <= sets.p_value <= 1
        assert sets.band_low_pct <= sets.mean_pct <= sets.band_high_pct
    for ranking in inputs.rankings.rankings[:20].tolist():
        nested = inputs.layer.measured.delta(prefixes(ranking)[1:-1])
        drawn = [sets.delta_nats for sets in found.random[:-1] if not sets.exhaustive]
        assert all(nested[k - 1] in delta for k, delta in zip(many, drawn, strict=True))


def test_the_table_repeats_the_p_values_of_its_sizes():
    """A row's p-values are those of the random sets of its size."""
    found = coverage(inputs_of(noisy_game([5.0, 3, 2, 1, 0], 30), random_ks=(1, 3)))
    by_k = {sets.k: sets for sets in found.random}
    for row in found.coverage:
        sets = by_k[row.k]
        assert (row.p_value, row.p_value_min) == (sets.p_value, sets.p_value_min)
        assert row.n_subsets == sets.n_subsets


def test_one_band_holds_random_rankings_at_every_size():
    """Rankings drawn afresh stay inside the band at all k at once at the rate that is stated."""
    inputs = inputs_of(noisy_game(np.arange(12.0) ** 2, 30), random_ks=range(1, 13))
    inputs = replace(inputs, effort=inputs.effort.but(n_random_sets=2000))
    random = coverage(inputs).random
    low, high = (np.array([getattr(s, name) for s in random]) for name in BAND)
    orders = np.random.default_rng(5).permuted(np.tile(np.arange(12), (2000, 1)), axis=1)
    drawn = np.array(
        [inputs.layer.measured.delta(prefixes(order)[1:]) for order in orders.tolist()]
    )
    drawn_pct = 100 / inputs.layer.full_delta * drawn
    inside = (drawn_pct >= low) & (drawn_pct <= high)
    stated = random[0].band_holds_pct / 100
    assert stated >= BAND_HOLDS_PCT / 100
    assert inside[:, :-1].all(1).mean() == pytest.approx(stated, abs=0.03)
