"""The table "does the claim survive", on planted pairs and on numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from games import layer_of, noisy_game
from tiny import TINY_HEADS, grid_of, pair_of, prepared, random_prompts, tiny_model

from rq4lens.analysis.coverage.table import CoverageInputs, coverage
from rq4lens.analysis.effects.layer import MeasuredLayer
from rq4lens.analysis.rankings.exact import rank_by_delta
from rq4lens.analysis.statistics.bootstrap import CONSTANT, Bootstrap
from rq4lens.analysis.structure.controls import (
    MEAN_ONLY,
    ROTATED,
    SHUFFLED,
    TUNED_MEAN,
    WRONG_LAYER,
    ControlInputs,
    control_sources,
    grid_controls,
    measured_controls,
    paired,
    random_controls,
    random_rotations,
    rotated,
    unpaired,
)
from rq4lens.heads import Head
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.maps.fitting import FitData, fit_maps, refit
from rq4lens.validation.planting import plant

LAYER, CONTROL = 1, 0


@pytest.fixture(scope="module")
def planted():
    """All heads of the main layer rotated, none of the control layer: the claim is true."""
    base = tiny_model()
    heads = [Head(LAYER, head) for head in range(TINY_HEADS)]
    pair = pair_of(base, plant(base, rotated=heads).tuned, random_prompts(n_train=96, n_val=24))
    maps = fit_maps(pair, [LAYER, CONTROL])
    activations = PairActivations(pair)
    return prepared(pair, maps), activations


@pytest.fixture(scope="module")
def table(planted):
    experiment, activations = planted
    grid = grid_of(experiment.pair, experiment.maps, LAYER, CONTROL, experiment=experiment, ks=(1,))
    layer = replace(MeasuredLayer.of_grid(grid, experiment), bootstrap=Bootstrap(grid.groups, 500))
    inputs = ControlInputs(layer, experiment, activations, CONTROL, neutral=experiment)
    rows = [*grid_controls(grid, layer.bootstrap), *measured_controls(inputs)]
    return {row.name: row for row in rows}


def test_a_true_claim_survives_what_breaks_the_map(table):
    """Planted rotations: no other layer, map, direction or mean repairs as much."""
    for name in ("control layer", "self", SHUFFLED, WRONG_LAYER, ROTATED, MEAN_ONLY):
        assert table[name].survives is True, name
        assert table[name].difference.interval.low > 0


def test_the_same_prompts_as_neutral_ones_do_not_survive(table):
    """Prompts that are disturbed just as much show that the effect is not specific."""
    neutral = table["neutral prompts"]
    assert neutral.survives is False
    assert neutral.value.value == pytest.approx(neutral.reference.value)
    assert neutral.share_pct.value == pytest.approx(100)


def test_patching_into_itself_is_the_null_row(table):
    """The self-patch leaves nothing, so all of the raw effect is the patch's own."""
    assert table["self"].value.value == pytest.approx(0, abs=1e-6)
    assert table["self"].unit == "KL_raw, nats"


def test_identical_models_survive_nothing():
    """Without any change there is nothing to claim: no control gets a verdict of survival."""
    base = tiny_model()
    pair = pair_of(base, base, random_prompts())
    maps = fit_maps(pair, [LAYER, CONTROL])
    grid = grid_of(pair, maps, LAYER, CONTROL, ks=(1,))
    for row in grid_controls(grid, Bootstrap(grid.groups, 200)):
        assert row.survives is not True


def test_paired_control_is_a_paired_difference():
    """The difference keeps the pairing of prompts: a constant gap has no spread to judge by."""
    value = np.random.default_rng(0).normal(size=20)
    bootstrap = Bootstrap(tuple(map(str, range(20))), 200)
    control = paired("c", "?", value, value + 1.0, bootstrap)
    assert control.difference.value == pytest.approx(1)
    assert control.reason == CONSTANT
    noisy = paired("c", "?", value, value + np.linspace(0.5, 1.5, 20), bootstrap)
    assert noisy.survives is True
    assert paired("c", "?", value, -noisy.difference.value * value, bootstrap).survives is False


def test_unpaired_control_takes_both_spreads():
    """The variance of the difference of two independent means is the sum of both variances."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(5, 1, size=(1, 40)), rng.normal(2, 2, size=(1, 60))
    first = Bootstrap(tuple(map(str, range(40))), 20_000, 0).resampled(one)
    second = Bootstrap(tuple(map(str, range(60))), 20_000, 1).resampled(other)
    control = unpaired("c", "?", second, first)
    half_width = 1.96 * np.sqrt(one.var() / 40 + other.var() / 60)
    assert control.difference.value == pytest.approx(one.mean() - other.mean())
    assert control.difference.interval.high - control.difference.value == pytest.approx(
        half_width, rel=0.05
    )
    assert control.survives is True


def test_grid_without_control_layer_says_so():
    """The row stays in the table, without a verdict and with the reason."""
    grid = noisy_game([1.0, 2.0], 10).grid(ks=(1,))
    without = {name: c for name, c in grid.conditions.items() if name != "ctrl_full"}
    bare = type(grid)(grid.settings, grid.prompt_ids, grid.groups, without, 0.0)
    row = grid_controls(bare, Bootstrap(bare.groups, 50))[0]
    assert row.survives is None
    assert "no control layer" in row.reason


@pytest.mark.parametrize(
    ("effects", "survives"), [(np.arange(12.0) ** 2, True), (np.full(12, 5.0), False)]
)
def test_random_heads_are_judged_on_other_prompts(effects, survives):
    """Heads that differ reliably beat random heads; equal heads do not."""
    game = noisy_game(effects, 40, noise=0.5, seed=3)
    layer = layer_of(game, (4, 12), n_resamples=200)
    ranking = rank_by_delta(layer.measured)
    inputs = CoverageInputs(layer, ranking, (4, 12), {}, n_random_sets=100)
    rows = random_controls(coverage(inputs).rows, 12, layer.full)
    assert [row.name for row in rows] == ["random heads, k=4"]
    assert rows[0].survives is survives


def test_rotation_control_keeps_the_distance_from_the_mean(planted):
    """Norm-matched: every prediction stays as far from the tuned mean as the map put it."""
    experiment, activations = planted
    z = experiment.sources[LAYER, "mapped"]
    centre = FitData.of(activations, LAYER).y.mean(0).to(z)
    turned = rotated(z, centre, random_rotations(*z.shape[2:], 0))
    assert torch.allclose((turned - centre).norm(dim=-1), (z - centre).norm(dim=-1), atol=1e-5)
    assert not torch.allclose(turned, z, atol=1e-2)


def test_random_rotations_are_orthogonal():
    """Each head has an orthogonal matrix of its own; in one dimension that is a sign."""
    turns = random_rotations(3, 5, 0)
    assert np.allclose(turns @ turns.swapaxes(1, 2), np.eye(5))
    assert not np.allclose(turns[0], turns[1])
    assert set(np.abs(random_rotations(4, 1, 0)).ravel()) == {1.0}


def test_mean_only_control_moves_the_mean(planted):
    """Its prediction is the base activation plus the difference of the train means."""
    experiment, activations = planted
    sources = control_sources(experiment, LAYER, CONTROL, activations, 0)
    data = FitData.of(activations, LAYER)
    shift = (data.y.mean(0) - data.x.mean(0)).float()
    base = experiment.sources[LAYER, "raw"]
    assert torch.allclose(sources[MEAN_ONLY], base + shift, atol=1e-5)


def test_tuned_mean_control_knows_no_prompt(planted):
    """It is the mean tuned activation of the train prompts, on every prompt."""
    experiment, activations = planted
    source = control_sources(experiment, LAYER, CONTROL, activations, 0)[TUNED_MEAN]
    mean = activations.z("tuned", "train", LAYER).mean(0)
    assert torch.allclose(source, mean.expand_as(source), atol=1e-5)


def test_refitting_on_the_same_rows_is_the_same_map(planted):
    """A control map differs from the real one by its rows alone."""
    experiment, activations = planted
    own = experiment.maps[LAYER]
    again = refit(own, FitData.of(activations, LAYER))
    assert torch.allclose(again.weight, own.weight, atol=1e-5)
    assert torch.allclose(again.bias, own.bias, atol=1e-5)


def test_unpaired_rows_hold_the_same_activations(planted):
    """Shuffling keeps every tuned row and breaks which base row stands beside it."""
    data = FitData.of(planted[1], LAYER)
    shuffled = data.unpaired(0)
    assert torch.equal(shuffled.x, data.x)
    assert not torch.equal(shuffled.y, data.y)
    assert torch.allclose(shuffled.y.sum(0), data.y.sum(0))
