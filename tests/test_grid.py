"""The grid of the main job: which conditions there are, and that each is what its name says."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import ALPHA, CONTROL, MAIN, TINY_HEADS, grid_of, prepared

from rq4lens.config import Patching
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.grid import GridPlan, measure_condition
from rq4lens.patching.maps.fitting import fit_maps


def columns(condition):
    return np.stack([condition.kl_raw_nats, condition.kl_mapped_nats])


def test_the_conditions_and_their_order(tiny_grid):
    """Full, every head, top-k and random-k by k, the control layer, and the two checks.

    As many heads as the layer has are `full`, once.
    """
    assert list(tiny_grid.conditions) == [
        *("full", "head0", "head1", "head2", "head3"),
        *("top1", "rand1_s0", "rand1_s1", "rand1_s2"),
        *("top2", "rand2_s0", "rand2_s1", "rand2_s2"),
        *("ctrl_full", "none", "self"),
    ]
    for name, condition in tiny_grid.conditions.items():
        assert condition.cond == name
        assert condition.alpha == ALPHA
        assert condition.layer == (CONTROL if name == "ctrl_full" else MAIN)


def test_each_condition_patches_the_heads_of_its_name(tiny_grid):
    """One head for `head{h}`, k heads for `top{k}` and `rand{k}`, all for `full` and controls."""
    for name, condition in tiny_grid.conditions.items():
        if name.startswith("head"):
            assert condition.heads.indices == (int(name[4:]),)
        elif name.startswith(("top", "rand")):
            assert len(condition.heads) == int(name.split("_")[0].lstrip("toprand"))
        else:
            assert str(condition.heads) == ("NONE" if name == "none" else "ALL")


def test_equal_head_sets_have_equal_numbers(tiny_grid):
    """A head set is measured once, whatever names it goes by."""
    by_heads = {}
    for name, condition in tiny_grid.conditions.items():
        if name not in {"ctrl_full", "self"}:
            first = by_heads.setdefault(condition.heads, condition)
            assert np.array_equal(columns(condition), columns(first))
    assert len(by_heads) < len(tiny_grid.conditions) - 2


def test_the_checks_read_zero_and_are_the_noise_floor(tiny_grid):
    """`none` and `self` leave every prompt's distribution as it was; the floor is their largest."""
    for name in ("none", "self"):
        np.testing.assert_allclose(columns(tiny_grid[name]), 0, atol=1e-12)
    floor = max(abs(columns(tiny_grid[name]).mean(1)).max() for name in ("none", "self"))
    assert tiny_grid.noise_floor_nats == floor


class Noisy:
    """An engine whose clean reference is off: by 1e-7 without heads, by 3e-7 for self-patches."""

    name = "noisy"
    fallback_reason = None
    memory_report = None

    def __init__(self, engine):
        self.engine = engine

    def clean_z(self, layer):
        """As the exact engine reads it."""
        return self.engine.clean_z(layer)

    def clean_log_probs(self):
        """As the exact engine reads them."""
        return self.engine.clean_log_probs()

    def every_layer(self, source, sources, other=None):
        """The exact effects: no check is made of all layers at once."""
        return self.engine.every_layer(source, sources, other)

    def effects(self, interventions, sources, progress=None, other=None):
        """The exact effects with the noise on top."""
        exact = self.engine.effects(interventions, sources, progress, other)
        noise = [[3e-7 if p.source == "self" else 1e-7 * (not p.heads)] for (p,) in interventions]
        return replace(exact, kl_nats=exact.kl_nats + np.array(noise))


def test_the_noise_floor_is_the_larger_of_both_checks(tiny_pair, tiny_maps, monkeypatch):
    """What patching nothing leaves is reported, whichever of the two ways shows more of it."""
    exact = prepared(tiny_pair, tiny_maps)
    monkeypatch.setitem(exact.ends._engines, "tuned", Noisy(exact.engine))
    grid = grid_of(tiny_pair, tiny_maps, MAIN, alpha=ALPHA, ks=(1,), experiment=exact)
    assert grid.noise_floor_nats == pytest.approx(3e-7)
    assert grid["none"].KL_raw == pytest.approx(1e-7)


def test_the_settings_say_how_it_was_made(tiny_pair, tiny_maps):
    """Everything that could be set otherwise stands in the result."""
    grid = grid_of(
        tiny_pair,
        tiny_maps,
        MAIN,
        None,
        0.5,
        ks=(3,),
        random_seeds=(7,),
        rank_by="drop_pct",
        seed=4,
        split="train",
        engine="hooks",
        raw_baseline="moments",
        kl_direction="clean||patched",
    )
    settings = grid.settings
    assert (settings.layer, settings.patching.control_layer, settings.patching.alpha) == (
        MAIN,
        None,
        0.5,
    )
    assert (settings.patching.k, settings.patching.random_seeds, settings.patching.rank_by) == (
        (3,),
        (7,),
        "drop_pct",
    )
    assert (settings.patching.split, settings.engine, settings.effort.seed) == ("train", "hooks", 4)
    assert (settings.patching.raw_baseline, settings.patching.kl_direction) == (
        "moments",
        "clean||patched",
    )
    assert (settings.patching.map_kind, settings.patching.map_scope) == (
        "procrustes_scaled",
        "head",
    )
    assert (settings.n_heads, settings.n_layers, settings.patching.k_positions) == (
        TINY_HEADS,
        3,
        1,
    )
    assert (settings.base, settings.tuned) == ("base in memory", "tuned in memory")
    assert grid.prompt_ids == tiny_pair.prompts.split("train").ids
    assert grid.groups == tiny_pair.prompts.split("train").groups
    assert grid.control is None
    assert "ctrl_full" not in grid.conditions


def test_top_sets_follow_the_chosen_score(tiny_pair, tiny_maps):
    """`rank_by` decides which heads `top{k}` holds."""
    for rank_by in ("delta", "drop_pct"):
        grid = grid_of(tiny_pair, tiny_maps, MAIN, alpha=ALPHA, ks=(1, 2), rank_by=rank_by)
        scores = [getattr(single, rank_by) for single in grid.singles]
        order = sorted(range(TINY_HEADS), key=lambda head: -scores[head])
        assert grid.ranking.heads == tuple(order)
        assert set(grid["top2"].heads) == set(order[:2])


def test_the_moments_baseline_changes_the_raw_column_alone(tiny_pair, tiny_maps, tiny_grid):
    """Raw is then the base activation matched in mean and spread; mapped stays what it was."""
    grid = grid_of(tiny_pair, tiny_maps, MAIN, CONTROL, ALPHA, ks=(1, 2, 4), raw_baseline="moments")
    for single, before in zip(grid.singles, tiny_grid.singles, strict=True):
        np.testing.assert_allclose(single.kl_mapped_nats, before.kl_mapped_nats, atol=1e-12)
        assert np.abs(single.kl_raw_nats - before.kl_raw_nats).max() > 1e-5
    moments = fit_maps(tiny_pair, [MAIN], "moments")
    as_map = grid_of(tiny_pair, moments, MAIN, alpha=ALPHA, ks=(1,))
    np.testing.assert_allclose(grid.full.kl_raw_nats, as_map.full.kl_mapped_nats, atol=1e-12)


def test_a_stored_grid_is_the_same_grid(tiny_pair, tiny_maps, tiny_grid, tmp_path):
    """From an empty, a full and a half-empty store come the very same numbers."""

    def run(store):
        return grid_of(tiny_pair, tiny_maps, MAIN, CONTROL, ALPHA, ks=(1, 2, 4), store=store)

    stored = [run(Store(tmp_path))]
    paths = sorted(tmp_path.glob("*.json"))
    stored.append(run(Store(tmp_path)))
    for path in paths[::2]:
        path.unlink()
    half = Store(tmp_path)
    stored.append(run(half))
    assert half.counters.computed == len(paths[::2])
    for grid in stored:
        for name, condition in grid.conditions.items():
            assert np.array_equal(columns(condition), columns(tiny_grid[name]))


@pytest.mark.parametrize(
    "change", ["alpha", "map", "direction", "split", "baseline", "positions", "nothing"]
)
def test_a_store_serves_its_own_experiment_alone(tiny_pair, tiny_maps, tmp_path, change):
    """Another alpha, map, direction, split or baseline takes nothing that it could not be.

    Raw and self patches pass through no map, so they are kept when the map changes.
    """
    grid_of(tiny_pair, tiny_maps, MAIN, alpha=ALPHA, ks=(1,), store=Store(tmp_path))
    settings = {
        "direction": {"kl_direction": "clean||patched"},
        "split": {"split": "train"},
        "baseline": {"raw_baseline": "moments"},
    }.get(change, {})
    maps = fit_maps(tiny_pair, [MAIN], "ridge") if change == "map" else tiny_maps
    if change == "positions":
        activations = PairActivations(tiny_pair, k_positions=2)
        maps = fit_maps(tiny_pair, [MAIN], activations=activations)
        settings = {"activations": activations}
    store = Store(tmp_path)
    alpha = 0.4 if change == "alpha" else ALPHA
    grid = grid_of(tiny_pair, maps, MAIN, alpha=alpha, ks=(1,), store=store, **settings)
    fresh = grid_of(tiny_pair, maps, MAIN, alpha=alpha, ks=(1,), **settings)
    for name, condition in grid.conditions.items():
        np.testing.assert_allclose(columns(condition), columns(fresh[name]), atol=1e-9)
    if change == "nothing":
        assert store.counters.computed == 0
    elif change in {"map", "alpha"}:  # swaps are at full strength, and need no map
        assert store.counters.reused > 0
        assert store.counters.computed > 0
    else:
        assert store.counters.reused == 0


def test_one_condition_is_what_it_is_in_the_grid(tiny_pair, tiny_maps, tiny_grid):
    """`patch` measures one head set with the whole layer and the checks beside it."""
    experiment = prepared(tiny_pair, tiny_maps)
    grid = measure_condition(
        experiment, Patching(layer=MAIN, alpha=ALPHA), HeadSet.of([2, 1], TINY_HEADS)
    )
    assert list(grid.conditions) == ["patch", "full", "none", "self"]
    np.testing.assert_allclose(columns(grid["patch"]), columns(tiny_grid["rand2_s1"]), atol=1e-9)
    np.testing.assert_allclose(columns(grid.full), columns(tiny_grid.full), atol=1e-9)
    assert tiny_grid["rand2_s1"].heads.indices == (1, 2)


def test_progress_counts_no_row_twice(tiny_pair, tiny_maps):
    """Rows reported are prompts times the different patches of the grid.

    Raw and mapped, both models with the other's activations, the self-patch, and all layers at once
    in both directions.
    """
    counted = []
    grid = grid_of(
        tiny_pair, tiny_maps, MAIN, alpha=ALPHA, ks=(1,), random_seeds=(0,), progress=counted.append
    )
    different = {condition.heads for condition in grid.conditions.values()}
    assert sum(counted) == (4 * len(different) + 1 + 2) * grid.n_prompts


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"control_layer": MAIN}, "layer 1 cannot be its own control"),
        ({"k": (0,)}, "k 0 does not fit: a layer has 4 heads; choose 1 to 4"),
        ({"k": (5,)}, "k 5 does not fit"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(changes, said):
    """The sentence names the value and what is allowed."""
    settings = Patching(layer=MAIN, control_layer=CONTROL, k=(1, 2), random_seeds=(0,))
    with pytest.raises(UserError, match=said):
        GridPlan(TINY_HEADS, settings.but(**changes))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"layer": 2, "ks": (1,)}, r"layer 2 has no map: maps are fitted for \[0, 1\]"),
        ({"layer": MAIN, "control_layer": 2, "ks": (1,)}, "layer 2 has no map"),
        ({"layer": MAIN, "alpha": 1.5, "ks": (1,)}, "alpha = '1.5' is not allowed"),
        ({"layer": MAIN, "split": "test", "ks": (1,)}, "no prompt has split 'test'"),
        ({"layer": MAIN}, "k 8 does not fit"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(tiny_pair, tiny_maps, arguments, said):
    """A layer without map, a strength, split or size that does not exist: one sentence."""
    with pytest.raises(UserError, match=said):
        grid_of(tiny_pair, tiny_maps, **arguments)
