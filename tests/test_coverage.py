"""Coverage curves, cross-fitting and the best sets, on games with known truth."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from games import Game, inputs_of, layer_of, measured, noisy_game

from rq4lens.analysis.coverage.best_sets import best_subsets, interaction_matrix
from rq4lens.analysis.coverage.curves import (
    CrossFit,
    area,
    fewest_heads,
    half_means,
    half_splits,
    ranking_curve,
    share_of_whole,
)
from rq4lens.analysis.coverage.table import coverage, coverage_of_grid, seed_sets
from rq4lens.analysis.effects.measured import MeasuredLayer, MeasuredSets, prefixes
from rq4lens.errors import UserError
from rq4lens.results import single_scores


def curve_of_game(game, n_resamples=300):
    inputs = inputs_of(game, n_resamples=n_resamples)
    return ranking_curve(inputs.ranking, inputs.layer)


def test_curve_of_an_additive_game_is_the_cumulative_share():
    """Without interactions the top k cover the sum of their own effects."""
    game = Game(np.outer([4.0, 3.0, 2.0, 1.0], [1.0, 1.1, 0.9, 1.0]))
    values = [estimate.value for estimate in curve_of_game(game).coverage_pct]
    assert values == pytest.approx([0, 40, 70, 90, 100])


def test_areas_are_trapezoids_worked_out_by_hand():
    """Two heads of effects 3 and 1: f = 0, 3/4, 1, so CPR = 5/8 and CMD = 3/8."""
    curve = curve_of_game(Game(np.outer([3.0, 1.0], [1.0, 1.2, 0.8])))
    assert curve.cpr.value == pytest.approx(5 / 8)
    assert curve.area_pct.value == pytest.approx(62.5)
    assert curve.cmd.value == pytest.approx(3 / 8)
    assert curve.k90.value == 2


def test_cmd_counts_overshoot_that_cpr_rewards():
    """A curve above 1 raises CPR and CMD alike: f = 0, 2, 1 has CPR 5/4 and CMD 3/4."""
    f = np.array([[0.0, 2.0, 1.0]])
    assert area(f)[0] == pytest.approx(5 / 4)
    assert area(np.abs(1 - f))[0] == pytest.approx(3 / 4)


def test_k90_is_the_first_k_that_reaches_ninety_percent():
    """k90 is the first crossing, even if the curve falls again, and H if nothing crosses before."""
    shares = np.array([[0, 0.95, 0.5, 1.0], [0, 0.1, 0.2, 1 - 1e-12], [0, 0.9, 0.9, 1.0]])
    assert fewest_heads(shares).tolist() == [1, 3, 1]


def test_curve_ends_hold_by_definition():
    """No heads cover 0, all heads cover 100, without any uncertainty."""
    curve = curve_of_game(noisy_game([2.0, 1.0, 0.5], 30))
    assert curve.coverage_pct[0].interval == (0, 0)
    assert curve.coverage_pct[-1].interval == (100, 100)


def test_curve_is_never_clipped():
    """Harmful heads push the curve above 100 before they pull it back."""
    values = [e.value for e in curve_of_game(noisy_game([3.0, 1.0, -2.0], 60)).coverage_pct]
    assert values[2] > 150
    assert values[3] == 100


def test_band_is_wider_than_every_interval_of_its_kind():
    """A band that holds the whole curve holds each point with more than its nominal rate."""
    inputs = inputs_of(noisy_game([2.0, 1.5, 1.0, 0.5], 60, noise=1.0), n_resamples=4000)
    layer, sets = inputs.layer, prefixes(inputs.ranking.heads)
    nats = layer.measured.delta_nats([*sets, layer.measured.everything])
    draws = layer.bootstrap.resampled(nats).apply(share_of_whole).draws
    curve = ranking_curve(inputs.ranking, layer)
    inside = (100 * draws >= curve.band_low_pct) & (100 * draws <= curve.band_high_pct)
    assert inside.all(1).mean() == pytest.approx(0.95, abs=0.002)
    assert inside[:, 1:-1].mean(0).min() > 0.95


def test_undefined_full_effect_leaves_effects_in_nats():
    """Without a denominator the curve still has ΔKL, and every share says why it is missing."""
    curve = curve_of_game(noisy_game([0.0, 0.0], 20))
    assert all(estimate.value is not None for estimate in curve.delta_nats)
    for estimate in (*curve.coverage_pct, curve.area_pct, curve.cmd, curve.k90):
        assert estimate.value is None
        assert "reaches 0" in estimate.reason
    assert curve.band_low_pct == ()


def test_negative_full_effect_is_a_share_of_harm():
    """A map that clearly does harm is a valid denominator: heads cover their share of the harm."""
    values = [e.value for e in curve_of_game(Game(-np.ones((2, 5)))).coverage_pct]
    assert values == pytest.approx([0, 50, 100])


def test_a_reliable_ranking_has_a_small_cross_fitted_p_value():
    """Heads that are best on every prompt do better as firmly as the prompts can show."""
    row = coverage(inputs_of(noisy_game(np.arange(12) ** 2 / 10, 60), ks=(1,))).coverage[0]
    assert row.p_value == pytest.approx(row.p_value_min)
    # 30 prompts in a half: under the null, all gains positive have probability 2^-30.
    assert row.p_value_min == 2.0**-30
    assert abs(row.optimism_pct.value) < 1


def test_optimism_is_plain_minus_cross_fitted():
    """Heads that are all noise look better on the prompts that ranked them."""
    row = coverage(inputs_of(noisy_game(np.ones(10), 30, noise=1.0), ks=(3,))).coverage[0]
    gap = row.coverage_pct.value - row.cross_fitted_coverage_pct.value
    assert row.optimism_pct.value == pytest.approx(gap)
    assert gap > 0


def test_k_equal_to_all_heads_is_certain():
    """With k = H: coverage 100, no optimism, p-value 1."""
    row = coverage(inputs_of(noisy_game([1.0, 2.0, 3.0], 30), ks=(3,))).coverage[0]
    assert (row.coverage_pct.value, row.cross_fitted_coverage_pct.value) == (100, 100)
    assert (row.optimism_pct.value, row.p_value) == (0, 1)


def test_all_ties_give_p_value_one():
    """Heads that are all the same are never better than random ones."""
    row = coverage(inputs_of(Game(np.ones((5, 8))), ks=(2,))).coverage[0]
    assert row.p_value == 1


def test_a_single_prompt_has_no_cross_fitted_numbers():
    """One prompt cannot be split: what needs a split is missing and says so."""
    row = coverage(inputs_of(Game(np.array([[2.0], [1.0]])), ks=(1,))).coverage[0]
    assert row.p_value is None
    assert "cannot be split" in row.reason
    assert row.cross_fitted_coverage_pct.value is None
    assert row.cross_fitted_coverage_pct.reason is not None


def test_grid_alone_gives_the_table_of_the_grid():
    """Without an experiment the table has plain coverage and the grid's own random sets."""
    game = noisy_game([3.0, 2.0, 1.0, 0.0], 30)
    grid = game.grid(ks=(1, 2))
    own = MeasuredLayer.of_grid(grid)
    inputs = replace(inputs_of(game, ks=(1, 2)), seed_sets=seed_sets(grid), layer=own)
    table = coverage_of_grid(inputs)
    assert [row.n_subsets for row in table.coverage] == [3, 3]
    assert table.coverage[0].coverage_pct.value == pytest.approx(50, abs=3)
    assert "only the grid" in table.coverage[0].reason
    with pytest.raises(UserError, match="was not measured"):
        own.measured.delta([(0, 1, 2)])


def test_halves_keep_groups_together_and_are_balanced():
    """Prompts of a group are never on both sides; halves differ by at most one group."""
    groups = ("a", "a", "b", "c", "c", "d", "e")
    for first in half_splits(groups, 50, 0):
        assert first[0] == first[1]
        assert first[3] == first[4]
        assert len({g for g, f in zip(groups, first, strict=True) if f}) == 2


def test_half_means_are_means():
    """Means over both halves are numpy's."""
    values = np.random.default_rng(0).normal(size=(3, 9))
    first = half_splits(tuple("abcdefghi"), 4, 0)
    for split, half in enumerate(first):
        expected = [values[:, half].mean(1), values[:, ~half].mean(1)]
        assert np.allclose(half_means(values, first)[split], expected)


def test_cross_fitting_scores_each_half_with_the_other_halfs_heads():
    """With two prompts each prompt is scored by the head that is best on the other one."""
    game = Game(np.array([[5.0, 1.0], [2.0, 4.0]]))
    crossed = CrossFit.of(layer_of(game), 1).delta_nats
    # Prompt 0 prefers head 0 and prompt 1 head 1, so each gets the other's choice.
    assert crossed[1] == pytest.approx([2.0, 1.0])
    assert crossed[2] == pytest.approx([7.0, 5.0])


def test_drop_pct_without_raw_effect_ranks_last():
    """A head without a raw effect has no relative drop and comes last."""
    scores = single_scores(np.array([0.0, 2.0]), np.array([0.0, 0.1]), "drop_pct")
    assert scores[0] == -np.inf
    assert scores[1] == pytest.approx(5)


@pytest.mark.parametrize("offset", [3.0, -3.0])
def test_best_sets_are_the_best_by_enumeration(offset):
    """With interactions the envelope finds the largest coverage of every size, of harm too."""
    rng = np.random.default_rng(3)
    pairs = rng.normal(size=(8, 8))
    game = Game(
        np.repeat(offset + rng.normal(size=(8, 1)), 3, axis=1),
        pairs=np.triu(pairs, 1) + np.triu(pairs, 1).T,
    )
    layer = layer_of(game, n_resamples=50)
    assert layer.full.is_harm == (offset < 0)
    envelope = best_subsets(layer)
    for k in range(1, 9):
        effects = game.delta(game.masks(list(combinations(range(8), k)))).mean(1)
        best = max(100 * effects / layer.full.delta.value)
        assert envelope.coverage_pct[k].value == pytest.approx(best)
    assert envelope.exhaustive[:3] == (True, True, True)


def test_interaction_matrix_is_the_bonus_of_pairs():
    """In a pairwise game the interaction of two heads is the bonus that was put in."""
    bonus = np.array([[0, 1.5, 0], [1.5, 0, -0.5], [0, -0.5, 0]])
    matrix = interaction_matrix(measured(Game(np.ones((3, 4)), pairs=bonus)))
    assert np.allclose(matrix.mean(-1), bonus)


def test_each_head_set_is_measured_once():
    """Asking again, in another order or with repeated heads, measures nothing new."""
    game = Game(np.ones((4, 2)))
    sets = measured(game)
    sets.delta([(0, 1), (1, 0), (1, 1, 0)])
    sets.delta([(0, 1)])
    assert game.n_measured == 1
    assert sets.n_measured == 1


def test_measurements_of_a_grid_are_taken_over():
    """The grid's conditions are known without measuring; the self-patch is not one of them."""
    game = noisy_game([1.0, 2.0], 5)
    grid = game.grid(ks=(1,))
    reordered = {name: grid[name] for name in reversed(grid.conditions)}
    sets = MeasuredSets.of_grid(replace(grid, conditions=reordered))
    assert sets.delta([(0, 1)])[0] == pytest.approx(game.single.sum(0).mean())
