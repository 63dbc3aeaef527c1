"""Ranking methods on games with known truth, and Shapley values against enumeration."""

import json
from itertools import permutations
from typing import get_args

import numpy as np
import pytest
from games import GRADIENT_METHODS, Game, layer_of, measured, noisy_game

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.agreement import THE_SAME
from rq4lens.analysis.rankings.compared import compare_methods, rank_heads
from rq4lens.analysis.rankings.exact import (
    exact_shapley,
    rank_by_shapley,
    sampled_shapley,
    single_ranking,
    standard_errors,
)
from rq4lens.analysis.rankings.file import ranking_file_rows
from rq4lens.analysis.rankings.methods import (
    METHODS,
    refuse_unread,
)
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.config import RankBy
from rq4lens.errors import UserError

SET_METHODS = [method for method in METHODS if method not in GRADIENT_METHODS]


def pairwise_game(n_heads=6, n_prompts=5, seed=0):
    rng = np.random.default_rng(seed)
    pairs = np.triu(rng.normal(size=(n_heads, n_heads)), 1)
    return Game(rng.normal(1, 1, size=(n_heads, n_prompts)), pairs=pairs + pairs.T)


@pytest.mark.parametrize("method", SET_METHODS)
def test_every_exact_method_orders_an_additive_game(method):
    """When heads add up, every exact method ranks them by their own effect."""
    effects = np.array([0.5, 3.0, 1.0, 2.0, -1.0])
    game = Game(np.outer(effects, [1.0, 1.1]), raw=np.outer(effects + 2, [1.0, 1.1]))
    ranking = rank_heads(method, measured(game))
    assert ranking.heads == (1, 3, 2, 0, 4)
    assert ranking.method == method


@pytest.mark.parametrize("method", SET_METHODS)
def test_ties_break_by_head_index(method):
    """Heads that are all the same are ranked by index."""
    assert rank_heads(method, measured(Game(np.ones((4, 3))))).heads == (0, 1, 2, 3)


@pytest.mark.parametrize("method", SET_METHODS)
def test_one_head_one_prompt(method):
    """A layer of one head, measured on one prompt, has a ranking."""
    ranking = rank_heads(method, measured(Game(np.array([[2.0]]))))
    assert ranking.heads == (0,)
    json.dumps(ranking_file_rows(ranking), allow_nan=False)


def test_study_ranking_is_that_of_the_grid():
    """The method "delta" is the ranking the main job prints."""
    game = noisy_game([1.0, 3.0, 2.0], 20)
    grid = game.grid(ks=(1,))
    ours = single_ranking(MeasuredSets.of_grid(grid), "delta")
    theirs = grid.ranking
    assert ours.heads == theirs.heads
    assert ours.scores == pytest.approx(theirs.scores)


@pytest.mark.parametrize("rank_by", get_args(RankBy))
def test_a_grid_ranks_by_what_was_asked_for(rank_by):
    """`rank_by` names the score: `ΔKL`, `100 ΔKL / KL_raw`, `KL_raw` or transfer."""
    game = Game(
        np.array([[1.0, 1.0], [2.0, 2.2], [3.0, 3.1]]),
        raw=np.array([[9.0] * 2, [2.1, 2.3], [5.0] * 2]),
    )
    grid = game.grid(ks=(1,))
    if rank_by.startswith("metric"):
        with pytest.raises(UserError, match="no metric was measured: choose one with --metric"):
            grid.ranking_by(rank_by)
        return
    expected = {
        "delta": [each.delta for each in grid.singles],
        "drop_pct": [each.drop_pct for each in grid.singles],
        "kl_raw": [each.KL_raw for each in grid.singles],
    }
    # The game's swapped heads close the gap by their ΔKL.
    closed = [100 * each.delta / game.gap_nats.mean() for each in grid.singles]
    expected = expected.get(rank_by, closed)
    order = {"drop_pct": (1, 2, 0), "kl_raw": (0, 2, 1)}.get(rank_by, (2, 1, 0))
    for ranking in (grid.ranking_by(rank_by), rank_heads(rank_by, MeasuredSets.of_grid(grid))):
        assert ranking.method == rank_by
        assert ranking.heads == order
        assert ranking.by_head == pytest.approx(expected)


def test_head_without_raw_effect_has_no_drop():
    """Its score is undefined, not infinite, and it comes last."""
    game = Game(np.array([[0.0], [1.0]]), raw=np.array([[0.0], [2.0]]))
    ranking = rank_heads("drop_pct", measured(game))
    assert ranking.heads == (1, 0)
    assert ranking.scores == (pytest.approx(50), None)


def test_leave_one_out_sees_interactions_that_singles_do_not():
    """A head that only helps in company scores 0 alone and its bonus when left out."""
    bonus = np.array([[0, 2.0], [2.0, 0]])
    game = Game(np.array([[1.0], [0.0]]), raw=np.ones((2, 1)), pairs=bonus)
    sets = measured(game)
    assert rank_heads("delta", sets).by_head == pytest.approx((1.0, 0.0))
    assert rank_heads("leave_one_out", sets).by_head == pytest.approx((3.0, 2.0))


def test_greedy_forward_takes_what_adds_most_given_what_is_taken():
    """With a bonus between heads 0 and 2, head 2 is taken before the better single head 1."""
    pairs = np.zeros((3, 3))
    pairs[0, 2] = pairs[2, 0] = 3.0
    ranking = rank_heads("greedy_forward", measured(Game(np.array([[5.0], [2], [1]]), pairs=pairs)))
    assert ranking.heads == (0, 2, 1)
    assert ranking.scores == pytest.approx((5.0, 4.0, 2.0))


def test_greedy_gains_add_up_to_the_full_effect():
    """What heads add at their turn, forward or backward, sums to ΔKL(ALL)."""
    sets = measured(pairwise_game())
    full = sets.delta([sets.everything])[0]
    for method in ("greedy_forward", "greedy_backward"):
        assert sum(rank_heads(method, sets).scores) == pytest.approx(full)


def test_exact_shapley_is_the_mean_over_all_orders():
    """Enumerated Shapley values are the mean marginal gain over all 4! orders of heads."""
    game = pairwise_game(n_heads=4)
    expected = np.zeros(4)
    for order in permutations(range(4)):
        reached = 0.0
        for k, head in enumerate(order, 1):
            now = game.delta(game.masks([order[:k]])).mean()
            expected[head] += (now - reached) / 24
            reached = now
    assert exact_shapley(measured(game)).by_head == pytest.approx(expected.tolist())


def test_shapley_of_a_pairwise_game_has_a_closed_form():
    """Each head gets its own effect and half of every bonus it takes part in."""
    game = pairwise_game()
    expected = game.single.mean(1) + game.pairs.sum(1) / 2
    assert exact_shapley(measured(game)).by_head == pytest.approx(expected.tolist())


def test_shapley_values_sum_to_the_full_effect():
    """Efficiency: sampled or enumerated, on every prompt, the values sum to ΔKL(ALL)."""
    sets = measured(pairwise_game(n_heads=8))
    full = sets.delta_nats([sets.everything])[0]
    sampled = sampled_shapley(sets, tolerance=0.1, max_pairs=6, seed=0)
    for ranking in (sampled, exact_shapley(sets)):
        assert ranking.per_prompt.sum(0) == pytest.approx(full)


def test_sampled_shapley_agrees_with_enumeration_at_eight_heads():
    """With three-way interactions at H = 8, samples meet enumeration within their own errors."""

    class Cubic(Game):
        def delta(self, masks):
            return super().delta(masks) + (masks.sum(1) ** 3 * masks[:, 0])[:, None] / 100

    game = Cubic(np.random.default_rng(0).normal(1, 1, size=(8, 3)))
    exact = np.array(exact_shapley(measured(game)).by_head)
    ranking = sampled_shapley(measured(game), tolerance=0.0, max_pairs=200, seed=1)
    by_head = dict(zip(ranking.heads, ranking.standard_errors, strict=True))
    errors = np.array([by_head[head] for head in range(8)])
    assert (np.abs(np.array(ranking.by_head) - exact) <= 4 * errors + 1e-12).all()
    assert errors.max() > 0


def test_shapley_stops_when_it_knows_enough():
    """An additive game needs the fewest rounds; an impossible tolerance uses them all."""
    additive = measured(Game(np.ones((12, 2))))
    sure = sampled_shapley(additive, tolerance=0.01, max_pairs=50, seed=0)
    assert sure.settings["stopped"] == "standard errors are small enough"
    assert sure.settings["n_permutations"] == 8
    sets = measured(pairwise_game(n_heads=12))

    never = sampled_shapley(sets, tolerance=-1.0, max_pairs=6, seed=0)
    assert never.settings["n_permutations"] == 12
    assert "largest number" in never.settings["stopped"]


def test_small_layers_are_enumerated():
    """Where enumeration costs no more than sampling, Shapley values are exact."""
    assert rank_by_shapley(measured(pairwise_game(n_heads=5))).settings["exact"] is True
    assert rank_by_shapley(measured(Game(np.ones((11, 2))))).settings["exact"] is False


def test_standard_errors_are_those_of_a_mean():
    """Without groups the standard error is the textbook one; repeated prompts do not shrink it."""
    values = np.random.default_rng(0).normal(size=(2, 12))
    names = tuple(map(str, range(12)))
    expected = values.std(axis=1, ddof=1) / np.sqrt(12)
    assert standard_errors(values, names) == pytest.approx(expected)
    repeated = np.repeat(values, 2, axis=1)
    assert standard_errors(repeated, tuple(np.repeat(names, 2).tolist())) == pytest.approx(expected)
    assert standard_errors(values, ("one",) * 12) == [None, None]


def test_standard_errors_of_shares_are_those_of_a_ratio():
    """To first order: exact where the whole does not vary, and close to a bootstrap elsewhere."""
    rng = np.random.default_rng(3)
    raw = np.stack([np.full(400, 2.0), rng.gamma(4.0, size=400)])
    game = Game(0.5 * raw + rng.normal(size=(2, 400)), raw=raw)
    ranking = rank_heads("drop_pct", measured(game))
    errors = dict(zip(ranking.heads, ranking.standard_errors, strict=True))
    assert errors[0] == pytest.approx(100 * standard_errors(game.single, game.groups)[0] / 2)
    weights = Bootstrap(game.groups, 2000).weights
    draws = 100 * (weights @ game.single[1]) / (weights @ raw[1])
    assert errors[1] == pytest.approx(draws.std(), rel=0.1)


def test_unknown_method_and_setting_are_refused():
    """The error names what was asked for and what there is."""
    sets = measured(Game(np.ones((2, 2))))
    with pytest.raises(UserError, match="'magic' does not exist: choose one of delta, "):
        rank_heads("magic", sets)
    with pytest.raises(UserError, match="ig_steps 3 has no method to go to: add the method integr"):
        refuse_unread([("ig_steps", 3)], ["delta", "attribution"])
    with pytest.raises(UserError, match="'grad_act' needs the models"):
        rank_heads("grad_act", sets)


def test_ranking_file_rows():
    """A ranking file lists head, rank, score and standard error, best first."""
    rows = ranking_file_rows(single_ranking(measured(noisy_game([1.0, 2.0], 9)), "delta"))
    assert [row["head"] for row in rows] == [1, 0]
    assert set(rows[0]) == {"head", "rank", "score", "se"}


def test_methods_are_compared_on_the_same_heads():
    """Methods that agree with exact ΔKL say so; those that cannot run say why."""
    game = noisy_game([3.0, 2.0, 1.0, 0.5], 30)
    compared = compare_methods(list(METHODS), layer_of(game, n_resamples=200))
    rows = {row.method: row for row in compared.rows}
    assert rows["shapley"].agreement.kendall.value == pytest.approx(1)
    assert rows["shapley"].coverage_pct[2].value == pytest.approx(100 * 5 / 6.5, abs=3)
    assert rows["kl_curvature"].agreement is None
    assert rows["delta"].agreement is None
    assert rows["delta"].agreement_reason == THE_SAME
    assert "needs the models" in rows["kl_curvature"].reason
    assert [ranking.method for ranking in compared.rankings] == SET_METHODS
