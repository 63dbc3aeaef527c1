"""The records of a grid, the ranking file, and the rule that decides when coverage exists."""

import json
from dataclasses import replace

import numpy as np
import pytest
from games import Game, noisy_game
from synthetic import resampled

from rq4lens.analysis.effects.table import (
    bootstrap_of,
    full_effect,
    ranking_rows,
    records,
)
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.heads import HeadSet
from rq4lens.patching.patch import BASE, Patch

FIELDS = [
    *("layer", "hook", "cond", "alpha", "heads", "head_mask", "split", "k_positions", "n"),
    *("KL_raw_mean", "KL_mapped_mean", "delta", "drop_pct", "coverage_pct", "raw_coverage_pct"),
    *("to_base_pct", "to_tuned_pct", "gap_base_nats", "gap_tuned_nats"),
]


def by_cond(grid, **kwargs):
    return {record["cond"]: record for record in to_json(records(resampled(grid, 400), **kwargs))}


def test_records_have_the_fields_of_the_results_file():
    """Every condition gives one record with the documented fields and a pair per number."""
    grid = noisy_game([1.0, 0.5, 0.0], 30).grid()
    rows = to_json(records(resampled(grid, 100)))
    assert [row["cond"] for row in rows] == [*grid.conditions, "every_layer"]
    for row in rows:
        assert set(FIELDS) <= set(row)
        assert {f"{name}_ci95" for name in FIELDS[9:]} <= set(row)
    json.dumps(rows, allow_nan=False)


def test_numbers_are_the_definitions():
    """ΔKL, drop and coverage are those of the method page, worked out by hand."""
    game = Game([[3.0, 1.0], [1.0, 1.0]], raw=[[4.0, 4.0], [2.0, 6.0]])
    row = by_cond(game.grid(ks=(1,)))["head0"]
    assert row["KL_raw_mean"] == pytest.approx(4.0)
    assert row["KL_mapped_mean"] == pytest.approx(2.0)
    assert row["delta"] == pytest.approx(2.0)
    assert row["drop_pct"] == pytest.approx(50.0)
    assert row["coverage_pct"] == pytest.approx(100 * 2 / 3)


def test_full_covers_all_and_none_covers_nothing():
    """coverage(ALL) = 100 exactly and coverage(NONE) = 0."""
    rows = by_cond(noisy_game([1.0, 0.5], 20).grid(ks=(1,)))
    assert rows["full"]["coverage_pct"] == 100
    assert rows["full"]["coverage_pct_ci95"] == [100.0, 100.0]
    assert rows["none"]["coverage_pct"] == 0


def test_control_layer_is_measured_against_the_main_layer():
    """The control layer's coverage has the main layer's full effect as denominator."""
    rows = by_cond(noisy_game([1.0, 0.5], 20).grid(ks=(1,)))
    assert rows["ctrl_full"]["coverage_pct"] == pytest.approx(50.0)


def test_raw_coverage_is_the_share_of_the_raw_damage():
    """``100 KL_raw(S) / KL_raw(ALL)``, whatever the map does; ALL is 100 exactly and NONE is 0."""
    game = Game([[3.0, 1.0], [0.0, 0.0]], raw=[[6.0, 4.0], [1.0, 4.0]])
    rows = by_cond(game.grid(ks=(1,)))
    assert rows["head0"]["raw_coverage_pct"] == pytest.approx(100 * 5 / 7.5)
    assert rows["head1"]["raw_coverage_pct"] == pytest.approx(100 * 2.5 / 7.5)
    assert rows["head1"]["coverage_pct"] == 0
    assert rows["full"]["raw_coverage_pct"] == 100
    assert rows["full"]["raw_coverage_pct_ci95"] == [100.0, 100.0]
    assert rows["none"]["raw_coverage_pct"] == 0


def test_raw_coverage_of_noise_is_undefined():
    """Where the raw patch of all heads does no more than rounding, it has no share."""
    grid = Game([[1.0, 1.0], [1.0, 1.0]]).grid(ks=(1,))
    floor = replace(grid, noise_floor_nats=grid.full.KL_raw)
    for row in to_json(records(resampled(floor, 100))):
        assert row["raw_coverage_pct"] is None
        assert row["raw_coverage_pct_reason"]


def test_coverage_is_never_clipped():
    """A head that beats the full patch covers more than 100, a harmful one less than 0."""
    rows = by_cond(noisy_game([3.0, -1.0], 40).grid(ks=(1,)))
    assert rows["head0"]["coverage_pct"] > 100
    assert rows["head1"]["coverage_pct"] < 0


def test_nothing_happens_without_a_raw_effect():
    """A condition that changes nothing has no drop, with the reason."""
    row = by_cond(noisy_game([1.0, 0.5], 20).grid(ks=(1,)))["none"]
    assert row["drop_pct"] is None
    assert row["drop_pct_ci95"] is None
    assert "KL_raw" in row["drop_pct_reason"]


@pytest.mark.parametrize(
    ("delta_nats", "noise_floor_nats", "reason"),
    [
        ([-1.0, 1.0, -2.0, 2.1, 0.3], 0.0, "reaches 0"),
        ([1.0, 1.1, 0.9, 1.2], 2.0, "noise floor"),
        ([-1.0, -1.1, -0.9, -1.2], 2.0, "noise floor"),
        ([0.0, 0.0, 0.0], 0.0, "noise floor"),
        ([1.0], 0.0, "only one group"),
    ],
)
def test_coverage_is_undefined_when_the_full_effect_cannot_be_told_from_zero(
    delta_nats, noise_floor_nats, reason
):
    """An interval that reaches 0, a noise floor above the effect, or a lone prompt: no coverage."""
    groups = tuple(f"p{i}" for i in range(len(delta_nats)))
    full = full_effect(np.array(delta_nats), noise_floor_nats, Bootstrap(groups, 500))
    assert full.undefined_because is not None
    assert reason in full.undefined_because


@pytest.mark.parametrize("delta_nats", [[1.0, 1.2, 0.9, 1.1], [-1.0, -1.2, -0.9], [0.5, 0.5]])
def test_a_full_effect_away_from_zero_is_a_denominator(delta_nats):
    """Clearly positive, clearly negative and equal on all prompts: coverage is defined."""
    groups = tuple(f"p{i}" for i in range(len(delta_nats)))
    full = full_effect(np.array(delta_nats), 1e-6, Bootstrap(groups, 500))
    assert full.undefined_because is None


@pytest.mark.parametrize(
    "game",
    [
        Game(np.ones((3, 1))),
        Game(np.zeros((3, 5))),
        Game(np.full((3, 5), 0.1)),
        noisy_game([-1.0, -0.5, 0.1], 25),
        noisy_game([0.0, 0.0, 0.0], 25),
    ],
    ids=["one prompt", "no effect", "constant", "negative", "null"],
)
def test_records_are_strict_json_whatever_happens(game):
    """Degenerate grids give nulls with reasons, never NaN."""
    rows = to_json(records(resampled(game.grid(ks=(1, 3)), 300)))
    json.dumps(rows, allow_nan=False)
    for row in rows:
        for name in ("drop_pct", "coverage_pct"):
            assert (row[name] is not None) or row[f"{name}_reason"]


def test_records_do_not_depend_on_what_else_was_measured():
    """Resamples are shared, so a condition's interval is the same in a smaller grid."""
    game = noisy_game([1.0, 0.5, 0.2], 30)
    small, large = by_cond(game.grid(ks=(1,))), by_cond(game.grid(ks=(1, 2)))
    assert small["head1"]["delta_ci95"] == pytest.approx(large["head1"]["delta_ci95"])


def test_ranking_rows_are_best_first_with_ties_by_index():
    """The ranking file lists heads by descending ΔKL; equal heads keep their index order."""
    grid = Game([[1.0, 1.1], [2.0, 2.2], [1.0, 1.1]]).grid(ks=(1,))
    rows = ranking_rows(grid)
    assert [row["head"] for row in rows] == [1, 0, 2]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    own = {"head", "rank", "delta", "drop_pct", "KL_raw", "KL_mapped"}
    assert set(rows[0]) == own | {"to_base_pct", "to_tuned_pct"}


def test_ranking_can_follow_the_relative_drop():
    """Ranked by drop_pct, a small head that the map explains wholly comes before a large one."""
    grid = Game([[1.0], [2.0]], raw=[[1.0], [8.0]]).grid(ks=(1,), rank_by="drop_pct")
    assert [row["head"] for row in ranking_rows(grid)] == [0, 1]


def test_transfer_is_the_share_of_the_gap_that_is_closed():
    """`100 (1 - KL left / gap)` of ratios of means, both ways; the gap stands in every record."""
    game = Game([[3.0, 1.0], [1.0, 2.0]])
    left = game.effects([Patch(1, HeadSet.of([0], 2), 1.0, BASE)]).gap_left_nats.mean()
    gap_nats = game.gap_nats.mean()
    for row in (by_cond(game.grid(ks=(1,)))["head0"], ranking_rows(game.grid(ks=(1,)))[0]):
        for direction in ("to_base_pct", "to_tuned_pct"):
            assert row[direction] == pytest.approx(100 * (1 - left / gap_nats))
            assert 0 < row[direction] < 100
    for row in by_cond(game.grid(ks=(1,))).values():
        assert row["gap_base_nats"] == pytest.approx(gap_nats)


def test_nothing_carries_nothing_and_the_self_patch_is_no_swap():
    """Transfer of `none` is 0 by definition; `self` has none, with its reason."""
    rows = by_cond(noisy_game([1.0, 0.5], 20).grid(ks=(1,)))
    assert rows["none"]["to_base_pct"] == rows["none"]["to_tuned_pct"] == 0
    assert rows["self"]["to_base_pct"] is None
    assert "not swapped" in rows["self"]["to_base_pct_reason"]


def test_a_gap_that_the_models_do_not_have_carries_nothing():
    """Models that answer alike have no share of a gap, and the reason says so."""
    game = Game(np.zeros((2, 6)))
    (row, *_) = ranking_rows(game.grid(ks=(1,)))
    for each in (row, by_cond(game.grid(ks=(1,)))["full"]):
        assert each["to_base_pct"] is None
        assert "answer alike" in each["to_base_pct_reason"]


def test_bootstrap_of_a_grid_resamples_its_groups():
    """The resampling plan has the grid's groups."""
    game = noisy_game([1.0], 4, groups=["a", "a", "b", "b"])
    assert bootstrap_of(game.grid(ks=(1,))).n_groups == 2
