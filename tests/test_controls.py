"""What else could explain the effect: stand-ins for the map, and the control layer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import TINY_HEADS, grid_of, pair_of, prepared, random_prompts, tiny_model

from rq4lens.analysis.claims import control_reading
from rq4lens.analysis.effects.measured import MeasuredLayer, MeasuredSets
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.analysis.structure.controls import (
    NOTHING_CHANGED,
    QUESTIONS,
    ROTATED,
    SHUFFLED,
    WRONG_LAYER,
    control_layer,
    random_rotations,
    rotated,
    stand_in_sources,
    stand_ins,
)
from rq4lens.analysis.structure.layers import alpha_sweep
from rq4lens.config import Effort, Patching
from rq4lens.heads import Head
from rq4lens.patching import noise
from rq4lens.patching.grid import measure_grid
from rq4lens.patching.maps.fitting import FitData, fit_maps, refit
from rq4lens.validation.planting import plant

LAYER, CONTROL = 1, 0
CHANGED = (1, 2)


@pytest.fixture(scope="module")
def planted():
    """Two heads of the main layer turned, none of the control layer: the map knows them."""
    base = tiny_model()
    tuned = plant(base, turned=[Head(LAYER, head) for head in CHANGED]).tuned
    pair = pair_of(base, tuned, random_prompts(n_train=96, n_val=24))
    maps = fit_maps(pair, [LAYER, CONTROL])
    return prepared(pair, maps)


def stand_ins_of(planted, heads=CHANGED, control=CONTROL, n_resamples=50):
    measured = MeasuredSets.of(planted, LAYER, 1.0)
    return stand_ins(measured, control, heads, Bootstrap(planted.groups, n_resamples))


@pytest.fixture(scope="module")
def table(planted):
    return {each.name: each for each in stand_ins_of(planted, n_resamples=500)}


def test_no_stand_in_does_what_a_true_map_does(table):
    """Neither shuffled pairs nor another layer nor random directions: all fall clearly behind."""
    assert set(table) == {SHUFFLED, WRONG_LAYER, ROTATED}
    for each in table.values():
        assert each.heads == CHANGED
        assert each.behind_nats.interval.low > 0
        assert each.recovered_pct.value < 50


def test_shuffled_pairs_know_no_more_than_a_constant(table):
    """A map that was fitted on prompts that do not belong together recovers about nothing."""
    assert table[SHUFFLED].recovered_pct.value == pytest.approx(0, abs=20)


def test_shuffled_pairs_repair_a_share_of_what_the_map_repairs_at_each_strength(planted):
    """Of the raw patch's damage, what they take back, over what the map takes back."""
    experiment = planted
    source = stand_in_sources(experiment, LAYER, None, 0)[SHUFFLED]
    settings = Patching(layer=LAYER, k=(1,), random_seeds=(0,))
    grid = measure_grid(experiment, settings, Effort(resamples=200))
    layer = MeasuredLayer.of_grid(grid, experiment)
    points, _ = alpha_sweep(layer, (0.1, 1.0), source)
    for point in points:
        measured = MeasuredSets.of(experiment, LAYER, point.alpha).also({SHUFFLED: source})
        damage = measured.of_source(SHUFFLED, [measured.everything]).mean()
        share = 100 * (point.KL_raw.value - damage) / point.delta.value
        assert point.shuffled_pct.value == pytest.approx(share)


def test_stand_ins_leave_the_heads_that_did_not_change_alone(planted, table):
    """They are charged for the changed heads only: the whole layer loses more."""
    whole = stand_ins_of(planted, tuple(range(TINY_HEADS)))
    found = {each.name: each for each in whole}
    assert found[ROTATED].damage.value > table[ROTATED].damage.value


def test_where_no_head_changed_nothing_stands_in(planted):
    """Every question is there, with the reason why it is not asked."""
    found = stand_ins_of(planted, ())
    assert {each.name for each in found} == set(QUESTIONS)
    for each in found:
        assert each.damage.value is None
        assert each.reason == NOTHING_CHANGED


def test_without_a_control_layer_its_map_does_not_stand_in(planted):
    """And the row says why."""
    found = stand_ins_of(planted, control=None)
    (missing,) = [each for each in found if each.reason]
    assert missing.name == WRONG_LAYER
    assert "no control layer" in missing.reason


@pytest.fixture(scope="module")
def grid(planted):
    return grid_of(planted.pair, planted.maps, LAYER, CONTROL, experiment=planted, ks=(1,))


def test_the_control_layer_stands_beside_the_main_one_prompt_by_prompt(grid):
    """`ΔKL` and `to_base` of the main layer less those of the control layer, paired."""
    found = control_layer(grid)
    assert found.layer == CONTROL
    assert found.less_nats.value == pytest.approx(grid.full.delta - grid.control.delta)
    gap, own, its = (
        each.transfer.left_nats("to_base").mean()
        for each in (grid["none"], grid.full, grid.control)
    )
    assert found.less_to_base_pct.value == pytest.approx(100 * (its - own) / gap)
    assert "less there" in control_reading(found.layer, found.less_nats)


def test_a_control_layer_of_the_very_same_effect_is_not_different(grid):
    """The difference is 0 on every prompt, and specificity is not claimed."""
    same = replace(grid.full, cond="ctrl_full", layer=CONTROL)
    twice = replace(grid, conditions={**grid.conditions, "ctrl_full": same})
    found = control_layer(twice)
    assert found.less_nats.value == 0
    assert "less there" not in control_reading(found.layer, found.less_nats)


def test_a_grid_without_a_control_layer_has_none(grid):
    """None, not a row of nothing."""
    without = {name: each for name, each in grid.conditions.items() if name != "ctrl_full"}
    bare = replace(grid, conditions=without)
    assert control_layer(bare) is None


def test_rotation_control_keeps_the_distance_from_the_mean(planted):
    """Norm-matched: every prediction stays as far from the tuned mean as the map put it."""
    experiment, activations = planted, planted.ends.activations
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


def test_refitting_on_the_same_rows_is_the_same_map(planted):
    """A control map differs from the real one by its rows alone."""
    experiment, activations = planted, planted.ends.activations
    own = experiment.maps[LAYER]
    again = refit(own, FitData.of(activations, LAYER))
    assert torch.allclose(again.weight, own.weight, atol=1e-5)
    assert torch.allclose(again.bias, own.bias, atol=1e-5)


def test_unpaired_rows_hold_the_same_activations(planted):
    """Shuffling keeps every tuned row and breaks which base row stands beside it."""
    data = FitData.of(planted.ends.activations, LAYER)
    shuffled = data.unpaired(0)
    assert torch.equal(shuffled.x, data.x)
    assert not torch.equal(shuffled.y, data.y)
    assert torch.allclose(shuffled.y.sum(0), data.y.sum(0))


@pytest.mark.parametrize("at_once", [2**26, 40])
def test_a_noise_pair_keeps_every_entry_of_the_change(planted, monkeypatch, at_once):
    """Of each matrix the entries of the change are the same, in another order; also in parts."""
    monkeypatch.setattr(noise, "MOST_AT_ONCE", at_once)
    pair = planted.pair
    noisy = noise.noise_pair(pair, seed=1)
    models = [member.model for member in (pair.base, pair.tuned, noisy.tuned)]
    base, tuned, shuffled = (dict(model.named_parameters()) for model in models)
    moved = 0
    for name, start in base.items():
        change, other = (each[name].double() - start for each in (tuned, shuffled))
        assert torch.allclose(change.flatten().sort()[0], other.flatten().sort()[0], atol=1e-6)
        moved += int(not torch.allclose(change, other, atol=1e-6))
    assert moved


def test_a_noise_pair_is_known_by_what_it_was_made_of(planted):
    """The same models and seed are the same pair; another seed is another."""
    pair = planted.pair
    pairs = [pair, *(noise.noise_pair(pair, seed) for seed in (1, 1, 2))]
    own, first, again, other = (each.tuned.card.weights_fingerprint for each in pairs)
    assert first == again
    assert len({own, first, other}) == 3
