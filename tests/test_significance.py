"""Sign-flip tests against scipy, enumeration and statsmodels."""

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

from rq4lens.analysis.statistics.bootstrap import ONE_GROUP
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.analysis.statistics.sign_flips import NO_EFFECT, flips_for, head_tests, sign_flips
from rq4lens.heads import Head


def names(n):
    return tuple(map(str, range(n)))


def test_exhaustive_p_value_equals_scipys():
    """With few prompts all sign patterns are tried, and p equals scipy's exact test."""
    values = np.random.default_rng(0).normal(0.4, 1, size=(3, 10))
    flips = sign_flips(values, names(10))
    assert flips.exhaustive
    assert flips.n_flips == 1024
    for row, ours in zip(values, flips.p_value, strict=True):
        reference = scipy.stats.permutation_test(
            (row,), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert ours == pytest.approx(reference.pvalue)


def test_random_flips_estimate_the_exact_p_value():
    """Drawn sign patterns agree with all sign patterns."""
    values = np.random.default_rng(1).normal(0.5, 1, size=(2, 12))
    exact = sign_flips(values, names(12), n_flips=5000)
    drawn = sign_flips(values, names(12), n_flips=4000, seed=1)
    assert exact.exhaustive
    assert not drawn.exhaustive
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.03)


def test_one_group_of_prompts_flips_together():
    """Repeating every prompt inside its group leaves the p-values as they were."""
    values = np.random.default_rng(2).normal(0.4, 1, size=(3, 9))
    repeated = np.repeat(values, 3, axis=1)
    groups = tuple(np.repeat(names(9), 3).tolist())
    assert np.allclose(sign_flips(values, names(9)).p_value, sign_flips(repeated, groups).p_value)


def test_max_t_is_single_for_one_head_and_above_it_for_many():
    """Correcting a single test changes nothing; correcting several never lowers a p-value."""
    values = np.random.default_rng(3).normal(0.3, 1, size=(5, 11))
    alone = sign_flips(values[:1], names(11))
    assert alone.p_max_t == pytest.approx(alone.p_value)
    flips = sign_flips(values, names(11))
    assert (flips.p_max_t >= flips.p_value).all()


def test_flips_grow_with_the_family():
    """However many heads are tried, Holm can reject: its smallest p-value is reached and small."""
    effects = 1 + np.abs(np.random.default_rng(8).normal(size=(300, 40)))
    tried = [(Head(layer, head), 0.3) for layer in range(10) for head in range(30)]
    result = head_tests(tried, effects, names(40), n_flips=100)
    assert result.family == "30 heads x 10 layers x 1 alpha"
    assert result.n_tests == 300
    for name in ("p_value", "p_max_t", "p_holm", "p_bh"):
        smallest = getattr(result, f"{name}_min")
        assert min(getattr(test, name) for test in result.tests) == pytest.approx(smallest)
        assert smallest <= 0.005
    assert flips_for(8, 1000) == 1600
    assert flips_for(2, 1000) == 1000


def test_few_groups_bound_what_holm_can_say():
    """With all sign patterns of few groups tried, the smallest p-values are said, not beaten."""
    effects = np.ones((6, 5))
    result = head_tests([(Head(0, h), 0.3) for h in range(6)], effects, names(5))
    assert result.exhaustive
    assert result.p_value_min == 2 / 2**5
    assert result.p_holm_min == 6 * 2 / 2**5
    assert min(test.p_holm for test in result.tests) == result.p_holm_min


@pytest.mark.parametrize("n_groups", [9, 30])
def test_memory_does_not_change_p_values(monkeypatch, n_groups):
    """Sign patterns come in pieces: the size of the pieces changes no p-value."""
    values = np.random.default_rng(9).normal(0.3, 1, size=(4, n_groups))
    whole = sign_flips(values, names(n_groups), 2000)
    monkeypatch.setattr("rq4lens.analysis.statistics.sign_flips.CHUNK_VALUES", 7 * n_groups)
    pieces = sign_flips(values, names(n_groups), 2000)
    assert pieces.p_value.tolist() == whole.p_value.tolist()
    assert pieces.p_max_t.tolist() == whole.p_max_t.tolist()
    assert pieces.n_flips == whole.n_flips


def test_identical_heads_need_no_correction():
    """Five copies of one head are one test: max-T knows, Holm does not."""
    values = np.repeat(np.random.default_rng(4).normal(0.6, 1, size=(1, 10)), 5, axis=0)
    tests = head_tests([(Head(0, h), 0.3) for h in range(5)], values, names(10))
    assert tests.tests[0].p_max_t == pytest.approx(tests.tests[0].p_value)
    assert tests.tests[0].p_holm == pytest.approx(min(1, 5 * tests.tests[0].p_value))


def test_corrections_are_those_of_statsmodels():
    """Holm and Benjamini-Hochberg are statsmodels' own, over all heads that could be tested."""
    values = np.random.default_rng(5).normal(0.4, 1, size=(6, 14))
    values[2] = 0.0
    result = head_tests([(Head(1, h), 0.3) for h in range(6)], values, names(14))
    tested = [test for test in result.tests if test.p_value is not None]
    p_values = [test.p_value for test in tested]
    assert [t.p_holm for t in tested] == pytest.approx(multipletests(p_values, method="holm")[1])
    assert [t.p_bh for t in tested] == pytest.approx(multipletests(p_values, method="fdr_bh")[1])
    assert result.tests[2].reason == NO_EFFECT


def test_sign_of_an_effect_does_not_matter():
    """The test is two-sided."""
    values = np.random.default_rng(6).normal(0.4, 1, size=(2, 10))
    assert np.allclose(
        sign_flips(values, names(10)).p_value, sign_flips(-values, names(10)).p_value
    )


def test_smallest_p_value_is_attained():
    """An effect of one sign on every prompt has the smallest p-value that can occur."""
    values = np.abs(np.random.default_rng(7).normal(size=(1, 8))) + 0.1
    flips = sign_flips(values, names(8))
    assert flips.p_value[0] == pytest.approx(flips.p_value_min)
    many = sign_flips(np.abs(np.random.default_rng(7).normal(size=(1, 60))) + 0.1, names(60), 500)
    assert many.p_value[0] == pytest.approx(many.p_value_min)


@pytest.mark.parametrize(
    ("values", "groups", "reason"),
    [(np.zeros((2, 5)), names(5), NO_EFFECT), (np.ones((2, 3)), ("a", "a", "a"), ONE_GROUP)],
)
def test_untestable_heads_have_no_p_value_and_a_reason(values, groups, reason):
    """No effect at all, or a single group of prompts: nulls with a reason, never NaN."""
    result = head_tests([(Head(0, 0), 0.3), (Head(0, 1), 0.3)], values, groups)
    for test in result.tests:
        assert (test.p_value, test.p_max_t, test.p_holm, test.p_bh) == (None,) * 4
        assert test.reason == reason
    assert to_json(result)["tests"][0]["head"] == "L0H0"
