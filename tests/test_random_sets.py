"""Random head sets: distribution, p-values and the band over k, on games with known truth."""

from dataclasses import replace
from math import comb

import numpy as np
import pytest
from games import Game, noisy_game, study_of
from scipy.stats import kstest

from rq4lens.analysis.coverage.random_sets import (
    RandomRankings,
    at_least,
    monte_carlo_p_value,
    random_band,
    random_sets,
)
from rq4lens.analysis.coverage.table import coverage
from rq4lens.analysis.effects.measured import prefixes

BAND = ("band_low_pct", "band_high_pct")


def test_few_sets_are_enumerated_and_many_are_drawn():
    """Sizes with at most 1,000 sets give all of them, larger ones the number of draws asked for."""
    game = noisy_game(np.linspace(1, 2, 14), 10)
    study = study_of(game, ks=(2, 7))
    rankings = RandomRankings.draw(study.measured, 300, 0)
    few = random_sets(rankings, 2, full_delta=1.0, seeds={})
    many = random_sets(rankings, 7, full_delta=1.0, seeds={})
    assert (few.exhaustive, few.n_subsets) == (True, 91)
    assert (many.exhaustive, many.n_subsets) == (False, 300)


def test_random_sets_of_an_additive_game_have_the_mean_of_their_size():
    """Enumerated sets of k heads cover 100 k/H on average."""
    study = study_of(Game(np.outer([5.0, 3, 2, 1, 1], [1.0, 1.1, 0.9])), ks=(2,))
    random = coverage(study).random[0]
    assert random.mean_pct == pytest.approx(40)
    assert random.seeds_pct[0] == pytest.approx(100 * 8 / 12)


def test_random_rankings_are_uniform():
    """Every head is equally likely at every place of a random ranking."""
    study = study_of(noisy_game([1.0, 2, 3, 4], 10))
    rankings = RandomRankings.draw(study.measured, 8000, 1).rankings
    shares = (rankings[:, 0, None] == np.arange(4)).mean(0)
    assert shares == pytest.approx([0.25] * 4, abs=0.02)


@pytest.mark.parametrize("k", [2, 6])
def test_the_average_random_set_is_that_of_each_prompt(k):
    """In an additive game it has k times the mean head, prompt by prompt, enumerated or drawn."""
    game = noisy_game(np.linspace(1, 2, 13), 10)
    rankings = RandomRankings.draw(study_of(game).measured, 4000, 0)
    expected = k * game.single.mean(0)
    assert rankings.average_nats(k) == pytest.approx(expected, abs=1e-12 if k == 2 else 0.05)


def test_p_value_counts_ties_and_is_never_zero():
    """Equal values reach the observed one; the smallest p-value is 1/(n+1)."""
    assert monte_carlo_p_value(np.array([1.0, 2.0, 3.0]), 2.0) == pytest.approx(3 / 4)
    assert monte_carlo_p_value(np.zeros(99), 1.0) == pytest.approx(1 / 100)
    assert at_least(np.array([0.1 + 0.2]), 0.3) == 1


def test_random_band_holds_whole_rankings():
    """95% of random rankings stay inside the band at every k."""
    rng = np.random.default_rng(0)
    curves = rng.normal(size=(4000, 5)).cumsum(1)
    band = random_band(curves, np.full(5, 100.0))
    inside = (curves >= band.low_pct) & (curves <= band.high_pct)
    assert inside.all(1).mean() == pytest.approx(0.95, abs=0.002)
    assert band.p_value == pytest.approx(1 / 4001)


def test_random_band_follows_a_skewed_distribution():
    """Where nine of ten rankings cover nothing, the band does not reach below nothing."""
    rng = np.random.default_rng(0)
    curves = (rng.random((4000, 5)) < 0.1).cumsum(1) * rng.exponential(size=(4000, 1))
    band = random_band(curves, np.full(5, 100.0))
    assert band.low_pct == (0, 0, 0, 0, 0)
    assert (np.array(band.high_pct) < curves.max(0)).all()
    inside = (curves >= band.low_pct) & (curves <= band.high_pct)
    assert inside.all(1).mean() == pytest.approx(0.95, abs=0.005)


def test_random_band_guards_both_sides_alike():
    """Mirrored curves have the mirrored band and the same p-value."""
    curves = np.random.default_rng(2).exponential(size=(1000, 4)).cumsum(1)
    observed = np.full(4, 0.01)
    band, mirrored = random_band(curves, observed), random_band(-curves, -observed)
    assert mirrored.low_pct == tuple(-high for high in band.high_pct)
    assert mirrored.high_pct == tuple(-low for low in band.low_pct)
    assert mirrored.p_value == band.p_value < 0.01


def test_how_extreme_a_ranking_is_has_a_uniform_p_value():
    """Over random rankings that are judged by others of their kind, the p-value is uniform."""
    rng = np.random.default_rng(1)
    p_values = []
    for _ in range(200):
        curves = rng.exponential(size=(100, 4)).cumsum(1)
        p_values.append(random_band(curves[1:], curves[0]).p_value)
    assert kstest(p_values, "uniform").pvalue > 0.01


def test_random_sets_of_every_size_come_from_the_same_rankings():
    """At every k: a distribution, p-values with their minimum, and one band; sets are nested."""
    study = study_of(noisy_game(np.arange(13) ** 2 / 9, 20), random_ks=range(1, 14))
    found = coverage(study)
    assert [sets.k for sets in found.random] == list(range(1, 14))
    assert [row.k for row in found.rows] == [1, 2]
    assert {sets.k for sets in found.random if not sets.exhaustive} == {5, 6, 7, 8}
    for sets in found.random:
        assert sets.n_subsets == (comb(13, sets.k) if sets.exhaustive else 200)
        assert 0 < sets.p_value_min <= sets.p_value <= 1
        assert sets.band_low_pct <= sets.mean_pct <= sets.band_high_pct
    for ranking in study.rankings.rankings[:20].tolist():
        nested = study.measured.delta(prefixes(ranking)[1:-1])
        drawn = [sets.delta_nats for sets in found.random[:-1] if not sets.exhaustive]
        assert all(nested[k - 1] in delta for k, delta in zip((5, 6, 7, 8), drawn, strict=True))


def test_the_table_repeats_the_p_values_of_its_sizes():
    """A row's p-values are those of the random sets of its size."""
    found = coverage(study_of(noisy_game([5.0, 3, 2, 1, 0], 30), random_ks=(1, 3)))
    by_k = {sets.k: sets for sets in found.random}
    for row in found.rows:
        sets = by_k[row.k]
        assert (row.p_value, row.p_value_min) == (sets.p_value, sets.p_value_min)
        assert row.n_subsets == sets.n_subsets


def test_one_band_holds_random_rankings_at_every_size():
    """Rankings drawn afresh stay inside the band at all k at once at its nominal rate."""
    study = study_of(noisy_game(np.arange(12.0) ** 2, 30), random_ks=range(1, 13))
    study = replace(study, n_random_sets=2000)
    random = coverage(study).random
    low, high = (np.array([getattr(s, name) for s in random]) for name in BAND)
    orders = np.random.default_rng(5).permuted(np.tile(np.arange(12), (2000, 1)), axis=1)
    drawn = np.array([study.measured.delta(prefixes(order)[1:]) for order in orders.tolist()])
    drawn_pct = 100 / study.full_delta * drawn
    inside = (drawn_pct >= low) & (drawn_pct <= high)
    assert inside[:, :-1].all(1).mean() == pytest.approx(0.95, abs=0.02)
