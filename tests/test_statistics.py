"""The bootstrap over prompts and its intervals, against scipy, closed forms and simulation."""

import tracemalloc

import numpy as np
import pytest
import scipy.stats
from scipy.stats._resampling import BootstrapResult

from rq4lens.analysis.coverage.curves import half_splits
from rq4lens.analysis.rankings.exact import standard_errors
from rq4lens.analysis.statistics.bootstrap import (
    NO_SPREAD,
    ONE_GROUP,
    UNDEFINED_IN_RESAMPLES,
    Bootstrap,
    Estimate,
    Interval,
    bca_levels,
    number_text,
    quantiles,
    undefined,
)
from rq4lens.analysis.statistics.sign_flips import sign_flips
from rq4lens.errors import UserError


def singletons(n):
    return tuple(f"p{i}" for i in range(n))


def test_weights_are_means_of_whole_groups():
    """Rows sum to 1, and prompts of one group always have the same weight."""
    bootstrap = Bootstrap(("a", "a", "b", "c", "c", "c"), n_resamples=500, seed=3)
    assert np.allclose(bootstrap.weights.sum(1), 1)
    assert np.array_equal(bootstrap.weights[:, 0], bootstrap.weights[:, 1])
    assert np.array_equal(bootstrap.weights[:, 3], bootstrap.weights[:, 5])


def test_same_seed_same_resamples_for_every_quantity():
    """A quantity's resampled means do not depend on what is resampled beside it."""
    values = np.random.default_rng(0).normal(size=(3, 20))
    together = Bootstrap(singletons(20), 100, 1).means(values)
    alone = Bootstrap(singletons(20), 100, 1).means(values[1:2])
    assert np.allclose(together[:, 1], alone[:, 0])


def test_nothing_grows_with_the_square_of_the_prompts():
    """20,000 prompts take a few MB for each number of resamples, never prompts times prompts."""
    groups = tuple(f"g{i // 2}" for i in range(20_000))
    values = np.random.default_rng(0).normal(size=(2, 20_000))
    bootstrap = Bootstrap(groups, n_resamples=100)
    tracemalloc.start()
    try:
        bootstrap.estimate(values)
        half_splits(groups, 5, 0)
        standard_errors(values, groups)
        sign_flips(values, groups, n_flips=100)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 20_000**2 / 4  # a square matrix of these groups has 800 MB


def test_leaving_a_group_out_is_the_mean_of_the_others():
    """Sums over groups give what averaging without each group gives."""
    groups = ("a", "b", "a", "c", "b", "a")
    values = np.random.default_rng(0).normal(size=(3, 6))
    for row, group in zip(Bootstrap(groups).without_each_group(values), "abc", strict=True):
        others = [place for place, each in enumerate(groups) if each != group]
        assert row == pytest.approx(values[:, others].mean(1))


def test_resampling_does_not_depend_on_prompt_order_within_groups():
    """Swapping two prompts of one group leaves every resampled mean as it was."""
    groups = ("a", "a", "b", "b", "c")
    values = np.random.default_rng(0).normal(size=(1, 5))
    swapped = values[:, [1, 0, 2, 3, 4]]
    bootstrap = Bootstrap(groups, 50, 0)
    assert np.allclose(bootstrap.means(values), bootstrap.means(swapped))


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("shape", ["normal", "lognormal"])
def test_interval_of_a_mean_equals_scipy_on_the_same_draws(method, shape):
    """Percentile and BCa ends equal scipy's when scipy reads the same bootstrap distribution."""
    values = getattr(np.random.default_rng(5), shape)(size=30)
    bootstrap = Bootstrap(singletons(30), 2000, 7)
    ours = bootstrap.estimate(values[None], method=method)[0].interval
    draws = bootstrap.means(values[None])[:, 0]
    reference = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=0,
        method=method,
        bootstrap_result=BootstrapResult(None, draws, None),
    ).confidence_interval
    assert ours is not None
    assert ours.low == pytest.approx(reference.low, rel=1e-9)
    assert ours.high == pytest.approx(reference.high, rel=1e-9)


def test_quantiles_equal_numpy():
    """Columns read at their own levels equal numpy's linear quantiles."""
    draws = np.random.default_rng(0).normal(size=(101, 3))
    levels = np.array([[0.0, 0.1, 0.33], [1.0, 0.9, 0.5]])
    expected = [[np.quantile(draws[:, q], levels[t, q]) for q in range(3)] for t in range(2)]
    assert np.allclose(quantiles(draws, levels), expected)


def test_symmetric_draws_leave_percentile_levels():
    """Without bias or skew the BCa levels are the nominal tails."""
    draws = np.linspace(-1, 1, 1001)[:, None]
    jackknife = np.array([[-1.0], [0.0], [1.0]])
    tails = np.array([0.025, 0.975])
    assert np.allclose(bca_levels(np.zeros(1), draws, jackknife, tails)[:, 0], tails)


def test_point_beyond_every_draw_stays_finite():
    """A bias correction without a finite value reads the draws at their end."""
    draws = np.linspace(0, 1, 100)[:, None]
    jackknife = np.array([[2.0], [2.1]])
    levels = bca_levels(np.array([5.0]), draws, jackknife, np.array([0.025, 0.975]))
    assert np.isfinite(quantiles(draws, levels)).all()


def test_standard_error_of_the_mean_is_the_closed_form():
    """The bootstrap variance of a mean is the population variance over n."""
    values = np.random.default_rng(2).normal(size=50)
    draws = Bootstrap(singletons(50), 20_000, 0).means(values[None])[:, 0]
    assert draws.std() == pytest.approx(values.std() / np.sqrt(50), rel=0.02)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_cover_at_their_nominal_rate(method):
    """In 2,000 simulated studies of 80 prompts, 95% intervals cover the mean 95% +- 2 points."""
    rng = np.random.default_rng(11)
    studies = rng.normal(size=(2000, 80))
    estimates = Bootstrap(singletons(80), 2000, 1).estimate(studies, method=method)
    covered = np.mean([estimate.interval.contains(0.0) for estimate in estimates])
    assert abs(covered - 0.95) < 0.02


def test_group_intervals_cover_where_prompt_intervals_do_not():
    """With paraphrases in groups, resampling prompts is overconfident; by group it is not."""
    rng = np.random.default_rng(4)
    shared = np.repeat(rng.normal(size=(1500, 60)), 4, axis=1)
    studies = shared + 0.1 * rng.normal(size=(1500, 240))
    groups = tuple(f"g{i // 4}" for i in range(240))

    def coverage(names):
        estimates = Bootstrap(names, 1500, 2).estimate(studies, method="percentile")
        return np.mean([estimate.interval.contains(0.0) for estimate in estimates])

    assert abs(coverage(groups) - 0.95) < 0.02
    assert coverage(singletons(240)) < 0.8


def test_ratio_intervals_keep_the_pairing():
    """A ratio of two proportional quantities has no spread at all, whatever each does by itself."""
    values = np.random.default_rng(0).lognormal(size=40)
    ratio = Bootstrap(singletons(40), 500, 0).estimate(
        np.stack([values, 2 * values]), lambda m: m[..., 1:] / m[..., :1]
    )[0]
    assert ratio.value == pytest.approx(2.0)
    assert ratio.interval is None
    assert ratio.reason == NO_SPREAD


def studentised_slowly(bootstrap, whole, left):
    """One resample after the other: logarithm of what is left, its error from group influences."""

    def log_left(counts):
        a, b = (sum(n * each[rows].sum() for n, rows in zip(counts, members, strict=True))
                for each in (left, whole))  # fmt: skip
        pulls = [left[rows].sum() / a - whole[rows].sum() / b for rows in members]
        return np.log(a / b), np.sqrt(sum(n * u**2 for n, u in zip(counts, pulls, strict=True)))

    names = list(dict.fromkeys(bootstrap.groups))
    members = [[at for at, g in enumerate(bootstrap.groups) if g == name] for name in names]
    point, error = log_left(np.ones(len(names)))
    drawn = np.array([log_left(counts) for counts in bootstrap.counts])
    t = (drawn[:, 0] - point) / drawn[:, 1]
    ends = point - error * np.quantile(t, [0.025, 0.975])
    return 100 * (1 - np.exp(ends))


def test_shares_are_studentised_on_what_is_left():
    """As a plain loop over resamples says, whole groups at a time."""
    rng = np.random.default_rng(0)
    whole = rng.lognormal(size=12)
    left = whole * rng.uniform(0.01, 0.3, 12)
    bootstrap = Bootstrap(tuple("aabbcdefghij"), 300, 1)
    (found,) = bootstrap.shares(whole[None], left[None])
    assert found.value == pytest.approx(100 * (1 - left.mean() / whole.mean()))
    assert found.interval == pytest.approx(studentised_slowly(bootstrap, whole, left))


def test_shares_end_at_100_and_have_no_interval_where_nothing_varies():
    """Nothing left is 100, everything left is 0, and no interval goes beyond 100."""
    rng = np.random.default_rng(0)
    whole, bootstrap = rng.lognormal(size=(1, 20)), Bootstrap(singletons(20), 200)
    parts = np.concatenate([0 * whole, whole, whole * rng.lognormal(-4, 2, (3, 20))])
    nothing, everything, *others = bootstrap.shares(whole, parts)
    assert (nothing.value, everything.value) == (100, 0)
    assert nothing.reason == everything.reason == NO_SPREAD
    assert all(each.interval.low < each.value < each.interval.high < 100 for each in others)


def test_shares_of_skewed_values_are_held_more_often_than_by_the_usual_interval():
    """Few prompts have much left: 20 of them, and the truth far in the tail."""
    rng, hits = np.random.default_rng(0), np.zeros(2)
    truth = 100 * (1 - np.exp(-4 + 1.2**2 / 2))
    for seed in range(300):
        left = rng.lognormal(-4, 1.2, (1, 20))
        bootstrap = Bootstrap(singletons(20), 300, seed)
        usual = bootstrap.estimate(left, lambda mean: 100 * (1 - mean))[0].interval
        (share,) = bootstrap.shares(np.ones((1, 20)), left)
        hits += [usual.contains(truth), share.interval.contains(truth)]
    assert hits[1] > 0.89 * 300
    assert hits[1] > hits[0] + 15


def test_undefined_is_none_with_a_reason():
    """One group, no spread, and denominators that reach 0 each say why there is no interval."""
    one = Bootstrap(("only",), 100, 0).estimate(np.array([[1.5]]))[0]
    assert (one.value, one.interval, one.reason) == (1.5, None, ONE_GROUP)
    same = Bootstrap(singletons(9), 100, 0).estimate(np.full((1, 9), 0.1))[0]
    assert (same.interval, same.reason) == (None, NO_SPREAD)
    sometimes = np.array([[1.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    ratio = Bootstrap(singletons(3), 300, 0).estimate(sometimes, lambda m: m[..., 1:] / m[..., :1])
    assert (ratio[0].interval, ratio[0].reason) == (None, UNDEFINED_IN_RESAMPLES)
    never = Bootstrap(singletons(3), 300, 0).estimate(
        np.zeros((2, 3)), lambda m: m[..., 1:] / m[..., :1]
    )
    assert never[0].value is None
    assert never[0].reason is not None


def test_fields_of_an_estimate():
    """An estimate becomes a value, a pair, and a reason only where something is missing."""
    values = np.random.default_rng(0).normal(size=(1, 30))
    estimate = Bootstrap(singletons(30), 200, 0).estimate(values)[0]
    assert set(estimate.fields("x")) == {"x", "x_ci95"}
    one = Bootstrap(("only",), 10, 0).estimate(np.array([[1.0]]))[0]
    assert one.fields("x") == {"x": 1.0, "x_ci95": None, "x_reason": ONE_GROUP}


def test_nothing_to_resample_is_refused():
    """No prompts, or no resamples, is said in one sentence."""
    with pytest.raises(UserError, match="no prompt"):
        Bootstrap((), 10)
    with pytest.raises(UserError, match="n_resamples 0"):
        Bootstrap(("a",), 0)


def test_an_estimate_prints_itself():
    """Value, unit and interval by one form; what is undefined is called so."""
    estimate = Estimate(12.345, Interval(10.0, 15.0))
    assert f"{estimate:.1f%}" == "12.3% [10.0, 15.0]"
    assert f"{estimate:.3g nats}" == "12.3 nats [10, 15]"
    assert f"{Estimate(3.0):.0f of 8 heads}" == "3 of 8 heads"
    assert str(undefined("why")) == "undefined"
    assert [number_text(value, "auto") for value in (0.0, 0.1234567, 1.5e-5)] == [
        *("0.00000", "0.12346", "1.5e-05")
    ]


@pytest.mark.parametrize("form", [".1f%", ".0f", ".3g nats", "auto", ".2e"])
def test_what_rounds_to_zero_has_no_sign(form):
    """Neither minus nothing nor a small negative number; others keep theirs."""
    assert not number_text(-0.0, form).startswith("-")
    assert number_text(-0.0004, ".1f%") == "0.0%"
    assert number_text(-1.0, form).startswith("-1")
