"""Simulated studies: what selection does to plain numbers, and that the honest ones resist it."""

import numpy as np
import pytest
import scipy.stats
import torch
from games import Game, inputs_of, layer_of
from synthetic import resampled
from tiny import fine_tuned, grid_of, pair_of, prepared, random_prompts, tiny_model

from rq4lens.analysis.analyse import analyse
from rq4lens.analysis.coverage.curves import (
    CrossFit,
    area,
    cross_fitted_curve,
    fewest_heads,
    half_splits,
)
from rq4lens.analysis.coverage.random_sets import cross_fitted_p_value, untestable_because
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.analysis.statistics.sign_flips import sign_flips
from rq4lens.analysis.structure.layers import compare_layers
from rq4lens.config import AnalysisEffort
from rq4lens.heads import HeadSet
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.maps.fitting import FitData, fit_maps, refit

N_NULLS = 200


def null_game(seed, mean=0.3, n_heads=10, n_prompts=24):
    """Heads that all have the same true effect: no ranking of them means anything."""
    noise = np.random.default_rng(seed).normal(size=(n_heads, n_prompts))
    return Game(mean + noise)


def lognormal(rng, size):
    """Right-skewed noise of mean 0 and standard deviation 1, as KL over prompts has it."""
    return (rng.lognormal(size=size) - np.exp(0.5)) / np.sqrt(np.e * (np.e - 1))


def is_uniform(p_values, n_draws):
    """Kolmogorov-Smirnov against the uniform distribution on the values a p-value can take."""
    # A p-value from n draws is uniform on 1/(n+1), ..., 1; spread it over its own step.
    jitter = np.random.default_rng(0).uniform(size=len(p_values)) / (n_draws + 1)
    return scipy.stats.kstest(np.asarray(p_values) - jitter, "uniform").pvalue > 0.01


SPREADS = {
    "equal": np.ones(16),
    "one noisy": np.array([10.0, *[0.1] * 15]),
    "two noisy": np.array([10.0, 10.0, *[0.1] * 14]),
}
NOISE = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lognormal,
    "skewed down": lambda rng, size: -lognormal(rng, size),
}


def crossed(game, n_splits, seed=0):
    """A game's heads, ranked on halves."""
    return CrossFit.of(layer_of(game, n_resamples=2, seed=seed), n_splits)


def p_value_of(single, seed, k):
    """The cross-fitted p-value of an additive game, whose average random set has k mean heads."""
    cross_fit = crossed(Game(single), 5, seed)
    return cross_fitted_p_value(cross_fit, k, k * single.mean(0)).value


@pytest.mark.parametrize(
    ("noise", "spread"),
    [
        *(("normal", spread) for spread in SPREADS),
        ("skewed", "equal"),
        ("skewed", "one noisy"),
        ("skewed down", "two noisy"),
    ],
)
def test_cross_fitted_p_values_of_null_heads_are_never_too_small(noise, spread):
    """Heads of equal means, however unequal or skewed: P(p <= x) is at most x, over 200 nulls."""
    p_values = []
    for seed in range(N_NULLS):
        values = NOISE[noise](np.random.default_rng(seed), (16, 24))
        p_values.append(p_value_of(0.3 + SPREADS[spread][:, None] * values, seed, 2))
    # The bound on the dependence of halves makes it conservative: fewer small values than uniform.
    small = np.where(np.array(p_values) <= 0.3, p_values, 1.0)
    assert scipy.stats.kstest(small, "uniform", alternative="greater").pvalue > 0.01
    assert np.mean(small <= 0.05) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / N_NULLS)


@pytest.mark.parametrize("k", [1, 2])
def test_two_real_heads_are_found(k):
    """Two of 16 heads with an effect of 0.8 standard deviations: most studies of 24 find them."""
    p_values = []
    for seed in range(100):
        single = np.random.default_rng(seed).normal(size=(16, 24))
        single[:2] += 0.8
        p_values.append(p_value_of(single, seed, k))
    assert np.mean(np.array(p_values) <= 0.05) > 0.6


def test_p_values_claim_no_more_than_groups_can_show():
    """With g groups in a half no p-value is below 2^-g, and under four groups there is none."""
    single = np.outer([5.0, *[1.0] * 7], 1 + 0.01 * np.arange(12))
    groups = [f"g{i // 2}" for i in range(12)]
    cross_fit = crossed(Game(single, groups=groups), 5)
    found = cross_fitted_p_value(cross_fit, 1, single.mean(0))
    assert found.value == pytest.approx(found.smallest) == 2.0**-3
    three = crossed(Game(single[:, :6], groups=groups[:6]), 5)
    assert "fewer than four groups" in untestable_because(three)


def test_cross_fitted_coverage_is_unbiased_where_plain_coverage_is_not():
    """Of heads that are all alike any k carry 100 k/H; only cross-fitting says so."""
    n_heads, n_studies, k = 10, 400, 3
    plain, out_of_half = [], []
    for seed in range(n_studies):
        game = null_game(seed, mean=1.0, n_prompts=30)
        first = half_splits(game.groups, 1, seed)[0]
        total = game.single.sum(0).mean()
        order = np.argsort(-game.single.mean(1))
        plain.append(100 * game.single[order[:k]].sum(0).mean() / total)
        # The additive game needs no measuring: the package's own numbers are compared below.
        of_first = np.argsort(-game.single[:, first].mean(1))[:k]
        of_second = np.argsort(-game.single[:, ~first].mean(1))[:k]
        out = np.where(first, game.single[of_second].sum(0), game.single[of_first].sum(0))
        out_of_half.append(100 * out.mean() / total)
        if seed < 20:
            ours = crossed(game, 1, seed).delta_nats[k]
            assert np.allclose(ours, out)
    truth, error = 100 * k / n_heads, np.std(out_of_half) / np.sqrt(n_studies)
    assert abs(np.mean(out_of_half) - truth) < 3 * error
    assert np.mean(plain) - truth > 10 * error


@pytest.mark.parametrize("grouped", [False, True])
def test_sign_flip_p_values_of_null_heads_are_uniform(grouped):
    """Over 200 seeded nulls of a skewless head, alone or in paraphrase groups, p is uniform."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(N_NULLS, 40))
    groups = tuple(f"g{i // (2 if grouped else 1)}" for i in range(40))
    if grouped:
        values = np.repeat(values[:, :20], 2, axis=1)
    flips = sign_flips(values, groups, 2000, seed=3)
    assert is_uniform(flips.p_value, 2000)


@pytest.fixture(scope="module")
def wrong_predictions():
    """The tiny pair on 24 prompts, and what 40 maps make of them that were fitted on wrong pairs.

    Returns:
        The experiment, its tuned ``z``, and the predictions ``[map prompt position head d_head]``.
    """
    base = tiny_model()
    pair = pair_of(base, fine_tuned(base), random_prompts(n_val=24))
    experiment = prepared(pair, fit_maps(pair, [1]))
    activations = PairActivations(pair)
    data, own = FitData.of(activations, 1), experiment.maps[1]
    z_base = activations.z("base", experiment.split, 1)
    predictions = [refit(own, data.unpaired(seed))(z_base) for seed in range(40)]
    return experiment, activations.z("tuned", experiment.split, 1), torch.stack(predictions)


@pytest.mark.parametrize("kind", ["maps of shuffled pairs", "activations of other prompts"])
def test_equally_wrong_sources_give_uniform_p_values(wrong_predictions, kind):
    """Raw and mapped drawn alike for each prompt, from maps of shuffled pairs or other prompts.

    The draw is made prompt by prompt: two *given* wrong maps do differ, one being the less wrong on
    all prompts, and enough prompts tell.
    """
    experiment, z_tuned, predictions = wrong_predictions
    n_prompts = len(experiment.groups)
    p_values = []
    for seed in range(N_NULLS):
        rng = np.random.default_rng(seed)

        def wrong(rng=rng):
            if kind == "activations of other prompts":
                return z_tuned[rng.integers(0, n_prompts, n_prompts)]
            return predictions[rng.integers(0, len(predictions), n_prompts), np.arange(n_prompts)]

        varied = experiment.with_sources({(1, "one"): wrong(), (1, "other"): wrong()})
        everything = [HeadSet.all(experiment.n_heads)]
        one, other = varied.measure(1, everything, 0.5, raw="one", mapped="other")
        delta_nats = one.kl_nats - other.kl_nats
        p_values.append(sign_flips(delta_nats, experiment.groups, 1000, seed).p_value[0])
    assert is_uniform(p_values, 1000)


def test_identical_models_have_no_p_value():
    """The same model twice: every effect is exactly 0, so nothing is tested or claimed."""
    base = tiny_model()
    pair = pair_of(base, base, random_prompts())
    maps = fit_maps(pair, [0, 1])
    experiment = prepared(pair, maps)
    grids = {layer: grid_of(pair, maps, layer, ks=(1,), experiment=experiment) for layer in (0, 1)}
    found = analyse(resampled(grids[1], 100), experiment, AnalysisEffort(n_random_sets=20))
    assert len(found.tests.tests) == 20
    for tests in (
        found.tests,
        compare_layers({layer: resampled(grid, 100) for layer, grid in grids.items()}).tests,
    ):
        assert {test.p_value for test in tests.tests} == {None}
        assert tests.n_tests == 0
    assert found.full.undefined_because is not None
    assert "Nothing is claimed" in " ".join(found.claims)


def test_max_t_keeps_the_family_wise_error():
    """With 20 correlated null heads, some corrected p is at most 0.05 in 5% +- 2.5 of studies."""
    rng = np.random.default_rng(2)
    false_alarms, uncorrected = [], []
    for _ in range(400):
        shared = rng.normal(size=(1, 30))
        flips = sign_flips(shared + rng.normal(size=(20, 30)), tuple(map(str, range(30))), 400)
        false_alarms.append(flips.p_max_t.min() <= 0.05)
        uncorrected.append(flips.p_value.min() <= 0.05)
    assert np.mean(false_alarms) == pytest.approx(0.05, abs=0.025)
    assert np.mean(uncorrected) > 0.2


def test_coverage_intervals_cover_at_their_nominal_rate():
    """In 2,000 simulated studies the interval of a head's coverage holds it 95% +- 2 points."""
    rng = np.random.default_rng(5)
    n_prompts, hits = 100, []
    bootstrap = Bootstrap(tuple(map(str, range(n_prompts))), 1000, 1)
    head = 1.0 + rng.normal(size=(2000, n_prompts))
    full = 2.0 + head - 1.0 + rng.normal(size=(2000, n_prompts))
    # Coverage of 50%: the head's mean effect is 1 and that of all heads is 2.
    for study in range(0, 2000, 500):
        some = slice(study, study + 500)
        values = np.concatenate([head[some], full[some]])
        ratios = bootstrap.estimate(values, lambda m: 100 * m[:, :500] / m[:, 500:])
        hits += [estimate.interval.contains(50.0) for estimate in ratios]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("noise", ["normal", "skewed"])
@pytest.mark.parametrize("strengths", [[1.0] * 10, [5.0, 4, 3, 2, 1.5, 1, 0.8, 0.5, 0.3, 0.1]])
def test_cross_fitted_intervals_hold_however_halves_depend(noise, strengths):
    """Rankings that are all chance or all firm: the mean true coverage of the choices is held."""
    strengths, hits = np.array(strengths), []
    for seed in range(100):
        values = NOISE[noise](np.random.default_rng(seed), (10, 40))
        game = Game(strengths[:, None] + (1.0 if np.ptp(strengths) == 0 else 0.3) * values)
        inputs = inputs_of(game, n_splits=5, seed=seed, n_resamples=200)
        curve = cross_fitted_curve("", inputs.cross_fit, inputs.layer)
        chosen = strengths[inputs.cross_fit.orders].cumsum(-1).mean((0, 1)) / strengths.sum()
        shares = np.concatenate([[0.0], chosen])[None]
        true_k90 = float(fewest_heads(shares - 1e-9)[0])
        hits.append(
            (
                curve.coverage_pct[3].interval.contains(100 * shares[0, 3]),
                curve.area_pct.interval.contains(100 * area(shares)[0]),
                curve.k90.value == true_k90
                if curve.k90.interval is None
                else curve.k90.interval.contains(true_k90),
            )
        )
    assert np.mean(hits, axis=0).min() >= 0.93


def test_skewed_values_take_many_prompts():
    """An interval of a lognormal mean holds it less often than it says, the less the fewer prompts.

    docs/analysis.md gives the rates.
    """
    rates = {}
    for n_prompts in (20, 320):
        values = np.random.default_rng(1).lognormal(size=(1000, n_prompts))
        bootstrap = Bootstrap(tuple(map(str, range(n_prompts))), 1000, 1)
        held = [each.interval.contains(np.exp(0.5)) for each in bootstrap.estimate(values)]
        rates[n_prompts] = np.mean(held)
    assert rates[20] == pytest.approx(0.86, abs=0.03)
    assert rates[320] == pytest.approx(0.93, abs=0.03)
