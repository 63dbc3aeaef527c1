"""Stability, concentration and interactions, against closed forms."""

import json

import numpy as np
import pytest
import torch
from games import Game, layer_of, noisy_game
from hypothesis import given
from hypothesis import strategies as st

from rq4lens.analysis.coverage.best_sets import interactions
from rq4lens.analysis.rankings.agreement import THE_SAME, Scored
from rq4lens.analysis.rankings.compared import NO_DIRECTION, alignment, head_shares, rank_stability
from rq4lens.analysis.rankings.exact import single_ranking
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, Spread
from rq4lens.analysis.statistics.concentration import (
    NO_SCORE,
    churn,
    concentration,
    effective_heads,
    entropy,
    gini,
)
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.analysis.structure.layers import alpha_sweep
from rq4lens.patching.maps.fitting import FitData
from rq4lens.results import ranks_of

NAMES = tuple(map(str, range(30)))


def stability_of(game, rank_by="delta", n_resamples=500):
    layer = layer_of(game, n_resamples=n_resamples, rank_by=rank_by)
    return rank_stability(single_ranking(layer.measured, "delta"), layer)


def test_well_separated_heads_never_change_rank():
    """When effects differ by far more than their noise, every resample gives the same ranking."""
    stability = stability_of(noisy_game([1.0, 3.0, 2.0], 40))
    assert [(head.head, head.rank_low, head.rank_high) for head in stability.heads] == [
        (1, 1, 1),
        (2, 2, 2),
        (0, 3, 3),
    ]
    assert stability.heads[0].top_probability == {1: 1.0, 2: 1.0}
    assert stability.split_half_spearman.value == pytest.approx(1)
    assert stability.split_half_jaccard[1].value == pytest.approx(1)


def test_equal_heads_share_the_top_place():
    """Two heads of the same effect are each first in about half of the resamples."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1, 400))
    stability = stability_of(Game(np.concatenate([5 + noise, 5 - noise, 0 * noise])))
    first = {head.head: head.top_probability[1] for head in stability.heads}
    assert first[0] + first[1] == pytest.approx(1)
    assert first[2] == 0
    assert sum(head.top_probability[2] for head in stability.heads) == pytest.approx(2)


def test_null_heads_have_no_split_half_stability():
    """Heads that are all noise agree between halves no better than chance."""
    values = [
        stability_of(
            Game(np.random.default_rng(seed).normal(size=(12, 60))), n_resamples=20
        ).split_half_spearman.value
        for seed in range(60)
    ]
    # Halves of one finite sample are negatively related, never positively.
    assert np.mean(values) == pytest.approx(0, abs=0.1)


def test_spread_over_splits_is_a_range_around_its_median():
    """What halves give is a range that holds its value, and is not called an interval."""
    stability = stability_of(noisy_game([1.0, 1.05, 1.1, 2.0], 12, noise=0.2))
    record = to_json(stability)
    for name in ("bootstrap_spearman", "split_half_spearman"):
        low, high = record[f"{name}_range95"]
        assert low <= record[name] <= high
        assert low < high
        assert f"{name}_ci95" not in record
    assert record["split_half_jaccard"]["1_range95"][1] == 1.0
    draws = np.random.default_rng(0).permutation(np.arange(1001.0))
    spread = Spread.of(draws)
    assert [spread.value, *spread.interval] == pytest.approx([500, 25, 975])


def test_a_single_prompt_has_no_stability():
    """With one prompt ranks have no interval, and the reasons say so."""
    stability = stability_of(Game(np.array([[2.0], [1.0]])))
    assert stability.heads[0].rank_low is None
    assert stability.heads[0].top_probability == {}
    for estimate in (stability.bootstrap_spearman, stability.split_half_spearman):
        assert estimate.value is None
        assert estimate.reason is not None


def test_ranks_break_ties_by_head_index():
    """Equal scores take their places in index order."""
    assert ranks_of(np.array([[1.0, 2.0, 1.0]])).tolist() == [[2, 1, 3]]


def test_concentration_of_equal_heads():
    """Equal scores: Gini 0, entropy 1, H effective heads, no head above the rest."""
    scores = np.full((1, 8), 0.3)
    assert gini(scores)[0] == pytest.approx(0)
    assert entropy(scores)[0] == pytest.approx(1)
    assert effective_heads(scores)[0] == pytest.approx(8)
    assert churn(scores)[0] == 0


def test_concentration_of_a_single_head():
    """One head with everything: Gini 1 - 1/H, entropy 0, one effective head."""
    scores = np.array([[0.0, 0.0, 5.0, 0.0]])
    assert gini(scores)[0] == pytest.approx(1 - 1 / 4)
    assert entropy(scores)[0] == pytest.approx(0)
    assert effective_heads(scores)[0] == pytest.approx(1)


def test_gini_is_half_the_relative_mean_difference():
    """The sorted form equals the definition by all pairs of heads."""
    scores = np.random.default_rng(0).gamma(1.0, size=(4, 7))
    differences = np.abs(scores[:, :, None] - scores[:, None, :]).mean((1, 2))
    assert gini(scores) == pytest.approx(differences / (2 * scores.mean(1)))


def test_churn_counts_heads_above_the_80th_percentile():
    """Of ten different scores the best two lie above the 80th percentile; a fixed threshold too."""
    scores = np.arange(10.0)[None]
    assert churn(scores)[0] == pytest.approx(0.2)
    assert churn(scores, threshold=4.5)[0] == pytest.approx(0.5)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=20), st.floats(0.1, 10))
def test_concentration_does_not_depend_on_scale_or_order(scores, scale):
    """Scaling all scores, or listing heads in another order, changes no measure."""
    values = np.array([scores])
    for measure in (gini, entropy, effective_heads):
        assert measure(scale * values)[0] == pytest.approx(measure(values)[0], abs=1e-9)
        assert measure(values[:, ::-1])[0] == pytest.approx(measure(values)[0], abs=1e-9)
        assert 0 - 1e-9 <= gini(values)[0] <= 1 - 1 / len(scores)
        assert 1 - 1e-9 <= effective_heads(values)[0] <= len(scores) + 1e-9


def test_no_score_has_no_concentration():
    """All scores 0: nulls with a reason."""
    found = concentration("KL_raw", np.zeros((3, 30)), Bootstrap(NAMES, 50))
    assert found.gini.value is None
    assert found.gini.reason == NO_SCORE
    json.dumps(to_json(found), allow_nan=False)


def test_magnitudes_are_taken_of_means():
    """A harmful head counts by its size; noise that cancels over prompts does not count."""
    per_prompt = np.array([[1.0, -1.0], [-2.0, -2.0], [2.0, 2.0]])
    found = concentration("|ΔKL|", per_prompt, Bootstrap(("a", "b"), 50))
    assert found.effective_heads.value == pytest.approx(2)


def test_additive_heads_have_no_interactions():
    """When heads add up, every interaction is 0 and singles sum to the joint effect."""
    found = interactions(layer_of(noisy_game([1.0, 2.0, 3.0], 30), n_resamples=200))
    assert found.matrix_nats == pytest.approx(np.zeros((3, 3)), abs=1e-12)
    assert found.sum_over_joint.value == pytest.approx(1)
    assert found.pairwise_prediction.value == pytest.approx(found.joint.value)


def test_interactions_of_a_pairwise_game_are_its_bonuses():
    """The bonus of each pair is found, the strongest first, and pairs predict the joint effect."""
    pairs = np.zeros((3, 3))
    pairs[0, 1] = pairs[1, 0] = -2.0
    pairs[1, 2] = pairs[2, 1] = 0.5
    game = Game(np.random.default_rng(0).normal(3, 1, size=(3, 30)), pairs=pairs)
    found = interactions(layer_of(game, n_resamples=200))
    assert found.matrix_nats == pytest.approx(pairs)
    assert (found.strongest[0].first, found.strongest[0].second) == (0, 1)
    assert found.strongest[0].interaction.value == pytest.approx(-2)
    assert found.pairwise_prediction.value == pytest.approx(found.joint.value)


def test_one_head_has_no_pairs():
    """A layer of one head has an empty list of pairs, and its sum is the joint effect."""
    found = interactions(layer_of(Game(np.ones((1, 30))), n_resamples=50))
    assert found.strongest == ()
    assert found.sum_over_joint.value == pytest.approx(1)


def test_interactions_without_a_full_effect_have_no_ratio():
    """The ratio to a joint effect that cannot be told from zero is null with a reason."""
    found = interactions(layer_of(Game(np.zeros((2, 30))), n_resamples=50))
    assert found.sum_over_joint.value is None
    assert found.sum_over_joint.reason is not None


def test_alpha_sweep_holds_the_runs_own_alpha():
    """The run's alpha is one of the points and compared with no other one; effects grow as α²."""
    layer = layer_of(noisy_game([1.0, 2.0, 3.0], 30), (1,), n_resamples=100)
    points, at_alpha = alpha_sweep(layer, (0.1, 0.6))
    assert [point.alpha for point in points] == [0.1, 0.3, 0.6]
    assert points[1].agreement is None
    assert points[1].agreement_reason == THE_SAME
    for point in (points[0], points[2]):
        assert point.agreement.kendall.value == pytest.approx(1)
        assert {point.agreement.first, point.agreement.second} == {
            f"alpha {point.alpha:g}",
            "alpha 0.3",
        }
    assert points[2].KL_raw.value == pytest.approx(4 * points[1].KL_raw.value)
    assert at_alpha[1] is layer.measured


def test_head_shares_sum_to_one():
    """A vector's squared length is divided among the heads."""
    assert head_shares(np.array([3.0, 0.0, 0.0, 4.0]), 2) == pytest.approx([9 / 25, 16 / 25])


def test_alignment_finds_the_heads_that_changed():
    """When only one head's activations changed along a direction, the direction lies on it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3, 2))
    y = x.copy()
    y[:, 1] += np.outer(x[:, 0, 0], [1.0, 2.0])
    data = FitData(torch.from_numpy(x), torch.from_numpy(y), np.arange(200).astype(str))
    bootstrap = Bootstrap(NAMES, 50)
    delta = Scored.of_prompts("delta", np.outer([0.1, 2.0, 0.0], np.ones(30)), bootstrap)
    found = alignment(data, delta, bootstrap)
    assert found.share[1] > 0.99
    assert sum(found.share) == pytest.approx(1)
    same = FitData(data.x, data.x, data.groups)
    assert alignment(same, delta, bootstrap).reason == NO_DIRECTION


def test_numbers_that_are_not_finite_never_reach_a_file():
    """The strict writer refuses them, so no undefined value slips through without a reason."""
    with pytest.raises(ValueError, match="not a JSON number"):
        to_json({"x": np.array([1.0, np.nan])})
    assert to_json({"x": Estimate(None, None, "why")}) == {
        "x": None,
        "x_ci95": None,
        "x_reason": "why",
    }
