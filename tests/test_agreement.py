"""Agreement of rankings, against scipy, closed forms and hand-worked cases."""

import numpy as np
import pytest
import scipy.stats
from games import Game, measured, noisy_game

from rq4lens.analysis.rankings.agreement import (
    ALL_TIED,
    FIXED,
    TOO_FEW_HEADS,
    Scored,
    agreement,
    kendall,
    rank_biased_overlap,
    spearman,
    strengths,
    top_jaccard,
)
from rq4lens.analysis.rankings.exact import (
    rank_greedy_backward,
    rank_greedy_forward,
    single_ranking,
)
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.results import HeadRanking, ranks_of

BOOTSTRAP = Bootstrap(tuple(map(str, range(20))), 300)


def rows(seed, ties=False):
    scores = np.random.default_rng(seed).normal(size=(5, 9))
    return np.round(scores) if ties else scores


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_equal_scipys(ties):
    """Row by row, Kendall's tau-b and Spearman's rho are scipy's, with and without ties."""
    first, second = rows(0, ties), rows(1, ties)
    for ours, reference in ((kendall, scipy.stats.kendalltau), (spearman, scipy.stats.spearmanr)):
        expected = [reference(a, b).statistic for a, b in zip(first, second, strict=True)]
        assert ours(first, second) == pytest.approx(expected)


def test_equal_rankings_agree_fully():
    """A ranking agrees with itself by every measure."""
    scores = rows(2)
    for value in (
        kendall(scores, scores),
        spearman(scores, scores),
        rank_biased_overlap(ranks_of(scores), ranks_of(scores)),
        top_jaccard(ranks_of(scores), ranks_of(scores), 3),
    ):
        assert value == pytest.approx(np.ones(5))


def test_reversed_rankings_disagree_fully():
    """A ranking and its reverse have correlation -1 and share no top heads."""
    scores = rows(3)
    assert kendall(scores, -scores) == pytest.approx(-np.ones(5))
    assert top_jaccard(ranks_of(scores), ranks_of(-scores), 4) == pytest.approx(np.zeros(5))


def test_rank_biased_overlap_worked_out_by_hand():
    """Two heads in opposite order, p = 0.9: overlaps 0 and 1 give 0.9² + (0.1/0.9)(0.81) = 0.9."""
    assert rank_biased_overlap(np.array([[1, 2]]), np.array([[2, 1]]))[0] == pytest.approx(
        0.9**2 + 0.1 / 0.9 * 0.9**2
    )


def test_rank_biased_overlap_weighs_the_top_more():
    """Swapping the best two heads costs more than swapping the worst two."""
    scores = np.array([[4.0, 3.0, 2.0, 1.0]])
    top, bottom = np.array([[3.0, 4, 2, 1]]), np.array([[4.0, 3, 1, 2]])
    ranks = ranks_of(scores)
    of_top, of_bottom = (rank_biased_overlap(ranks, ranks_of(each)) for each in (top, bottom))
    assert of_top[0] < of_bottom[0]


def test_top_jaccard_is_the_overlap_of_sets():
    """Top sets {0, 1} and {1, 2} share one of three heads."""
    first, second = np.array([[3.0, 2, 1]]), np.array([[1.0, 3, 2]])
    assert top_jaccard(ranks_of(first), ranks_of(second), 2)[0] == pytest.approx(1 / 3)


def test_interval_holds_resampled_agreement():
    """Both rankings are resampled together, and the interval holds the agreement on all prompts."""
    rng = np.random.default_rng(0)
    per_prompt = np.arange(6.0)[:, None] + rng.normal(size=(6, 20))
    first = Scored.of_prompts("first", per_prompt, BOOTSTRAP)
    second = Scored.of_prompts("second", per_prompt + rng.normal(size=(6, 20)), BOOTSTRAP)
    found = agreement("method", first, second, (1, 3, 6), BOOTSTRAP)
    for estimate in (found.kendall, found.spearman, found.rbo, found.jaccard[3]):
        assert estimate.interval.low <= estimate.value <= estimate.interval.high
    assert found.jaccard[6].value == 1


def test_fixed_scores_have_no_interval_but_a_reason():
    """Two rankings that do not come from prompts agree by a number without an interval."""
    first, second = (Scored(name, rows(0)[0]) for name in "ab")
    found = agreement("method", first, second, (2,), BOOTSTRAP)
    assert found.kendall.value == pytest.approx(1)
    assert found.kendall.interval is None
    assert found.kendall.reason == FIXED


def test_a_ranking_by_shares_is_resampled_as_a_ratio_of_means():
    """The interval of drop_pct's agreement is that of the ratio computed resample by resample."""
    rng = np.random.default_rng(1)
    raw = 1 + np.arange(6.0)[:, None] / 5 + rng.gamma(1.0, size=(6, 20))
    sets = measured(Game(0.5 * raw + 0.3 * rng.normal(size=(6, 20)), raw=raw))
    kl_raw, kl_mapped = sets.kl_nats(sets.singles)
    share = Scored.of(single_ranking(sets, "drop_pct"), BOOTSTRAP)
    exact = Scored.of_prompts("delta", kl_raw - kl_mapped, BOOTSTRAP)
    draws = []
    for weights in BOOTSTRAP.weights:
        raw_mean, delta = kl_raw @ weights, (kl_raw - kl_mapped) @ weights
        draws.append(scipy.stats.kendalltau(delta / raw_mean, delta).statistic)
    found = agreement("method", share, exact, (), BOOTSTRAP).kendall
    assert found.interval == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist())
    only_one = Scored("drop_pct", share.scores)
    fixed = agreement("method", only_one, exact, (), BOOTSTRAP).kendall.interval
    assert fixed != found.interval


def test_shares_of_nothing_come_last_in_every_resample():
    """A head without a raw effect has no share: it ranks last, and nothing is NaN."""
    raw = np.outer([0.0, 1.0, 2.0], np.ones(8)) * np.random.default_rng(2).uniform(1, 2, (3, 8))
    sets = measured(Game(raw * np.array([[0.0], [0.2], [0.8]]), raw=raw))
    share = Scored.of(single_ranking(sets, "drop_pct"), Bootstrap(tuple(map(str, range(8))), 50))
    assert (np.argmin(share.resampled.draws, axis=1) == 0).all()
    assert np.isfinite(share.resampled.draws).all()


def test_a_ranking_from_prompts_without_resamples_has_no_interval():
    """Greedy rankings come from the prompts: to count them as fixed would look too certain."""
    game = noisy_game([1.0, 2.0, 3.0], 20)
    sets = measured(game)
    delta = Scored.of_prompts("delta", sets.delta_nats(sets.singles), BOOTSTRAP)
    for rank in (rank_greedy_forward, rank_greedy_backward):
        found = agreement("method", Scored.of(rank(sets), BOOTSTRAP), delta, (1,), BOOTSTRAP)
        for estimate in (found.kendall, found.rbo, found.jaccard[1]):
            assert estimate.value == pytest.approx(1)
            assert estimate.interval is None
            assert "new measurements" in estimate.reason


def test_ties_and_single_heads_are_undefined_with_a_reason():
    """A ranking that is all ties, and a single head, have no rank correlation."""
    tied = Scored("tied", np.ones(4))
    other = Scored("other", np.arange(4.0))
    assert agreement("method", tied, other, (1,), BOOTSTRAP).kendall.reason == ALL_TIED
    single = Scored("one", np.ones(1))
    found = agreement("method", single, single, (1,), BOOTSTRAP)
    assert found.spearman.reason == TOO_FEW_HEADS
    assert to_json(found)["kendall"] is None


def test_strengths_follow_the_ranking():
    """Scores that fall along the ranking are used; gains of a greedy ranking become places."""
    falling = HeadRanking("delta", 0, 0.3, (2, 0, 1), (5.0, 3.0, 3.0))
    assert strengths(falling).tolist() == [3, 3, 5]
    greedy = HeadRanking("greedy_forward", 0, 0.3, (2, 0, 1), (1.0, 3.0, -1.0))
    assert strengths(greedy).tolist() == [-1, -2, 0]
    partly = HeadRanking("drop_pct", 0, 0.3, (1, 0), (2.0, None))
    assert strengths(partly).tolist() == [-1, 0]
