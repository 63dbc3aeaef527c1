"""Records: what follows from a condition's own numbers, and the order of heads."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import resampled, synthetic_grid, synthetic_settings
from synthetic_analysis import curve
from tiny import MAIN

from rq4lens.analysis.analyse import analyse
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.jobs.verify import Check, Verification
from rq4lens.results import (
    ConditionResult,
    GridSettings,
    HeadRanking,
    PatchRow,
    Transfer,
    rank_conditions,
)


def row(kl_nats, gap_left_nats=None):
    kl_nats = np.array(kl_nats, dtype=float)
    left = None if gap_left_nats is None else np.array(gap_left_nats, dtype=float)
    return PatchRow(kl_nats, -kl_nats, left)


def condition(raw, mapped, cond="head0", head=0, left=None):
    """`left` is what is left of the gap, of the patched tuned and of the patched base model."""
    transfer = left and Transfer(*(row(raw, [each] * len(raw)) for each in left))
    heads = HeadSet.of([head], 4)
    return ConditionResult(cond, 1, heads, 0.3, row(raw), row(mapped), transfer)


def test_the_quantities_are_the_definitions():
    """Means over prompts; `ΔKL = KL_raw - KL_mapped`; `drop_pct = 100 ΔKL / KL_raw`."""
    one = condition([1.0, 3.0], [1.0, 0.0])
    assert (one.KL_raw, one.KL_mapped, one.delta, one.drop_pct) == (2.0, 0.5, 1.5, 75.0)
    assert one.delta_nats.tolist() == [0.0, 3.0]


def test_a_map_that_harms_has_a_negative_drop():
    """Nothing is clipped."""
    assert condition([1.0], [3.0]).drop_pct == -200


def test_the_drop_of_nothing_is_undefined():
    """A raw patch that changes nothing has no share to speak of, whatever the map does."""
    assert condition([0.0, 0.0], [0.0, 0.0]).drop_pct is None
    assert condition([0.0], [1.0]).drop_pct is None


scores = st.lists(st.none() | st.integers(-3, 3).map(float), min_size=1, max_size=12)


@given(scores)
def test_a_ranking_is_best_first(values):
    """Scores descend, ties break by head index, undefined scores come last; no head is lost."""
    ranking = HeadRanking.from_scores(values, method="x", layer=0, alpha=None)
    assert sorted(ranking.heads) == list(range(len(values)))
    assert [values[head] for head in ranking.heads] == list(ranking.scores)
    for one, other in zip(ranking.heads, ranking.heads[1:], strict=False):
        if values[one] is None:
            assert values[other] is None
            assert one < other
        elif values[other] is not None:
            assert (-values[one], one) < (-values[other], other)


def test_ranks_and_prefixes_agree():
    """`top(k)` are the heads of rank 1 to k; errors follow their heads."""
    ranking = HeadRanking.from_scores(
        [0.1, 0.3, None, 0.2],
        method="x",
        layer=5,
        alpha=0.3,
        standard_errors=[0.01, 0.03, None, 0.02],
    )
    assert ranking.heads == (1, 3, 0, 2)
    assert ranking.standard_errors == (0.03, 0.02, 0.01, None)
    for k in range(5):
        assert ranking.top(k) == ranking.heads[:k]
        assert ranking.top_set(k) == HeadSet.of(ranking.heads[:k], 4)
    assert [ranking.rank_of(head) for head in ranking.heads] == [1, 2, 3, 4]


SINGLES = [
    condition([0.0, 0.0], [0.0, 0.0], "none", left=(2.0, 8.0)),
    condition([4.0, 4.0], [2.0, 2.0], "head0", 0, left=(1.5, 5.0)),
    condition([1.0, 1.0], [0.0, 0.0], "head1", 1, left=(1.0, 6.0)),
    condition([5.0, 5.0], [5.0, 5.0], "head2", 2, left=(0.5, 9.0)),
]
"""Head 0: a large effect, repaired by a half; 1: a small one, repaired whole; 2: no repair."""


@pytest.mark.parametrize(
    ("rank_by", "heads", "scores"),
    [
        ("delta", (0, 1, 2), (2, 1, 0)),
        ("drop_pct", (1, 0, 2), (100, 50, 0)),
        ("kl_raw", (2, 0, 1), (5, 4, 1)),
        ("to_base", (2, 1, 0), (75, 50, 25)),
        ("to_tuned", (0, 1, 2), (37.5, 25, -12.5)),
    ],
)
def test_single_heads_are_ranked_by_the_chosen_score(rank_by, heads, scores):
    """Each score is its definition; transfer is at full strength whatever alpha the grid has."""
    ranking = rank_conditions({each.cond: each for each in SINGLES}, 3, rank_by)
    assert ranking.heads == heads
    assert ranking.scores == pytest.approx(scores)
    assert (ranking.share_of is None) == (rank_by in {"delta", "kl_raw"})
    assert ranking.alpha == (1.0 if rank_by.startswith("to_") else 0.3)


def test_a_ranking_by_transfer_needs_it_measured():
    """The sentence names the condition and what can be ranked by instead."""
    plain = {each.cond: replace(each, transfer=None) for each in SINGLES}
    with pytest.raises(UserError, match="transfer of none was not measured: rank by delta or kl_r"):
        rank_conditions(plain, 3, "to_base")


def test_a_grid_knows_its_conditions():
    """Conditions are looked up by name; a wrong name lists those that there are."""
    grid = synthetic_grid(n_heads=4, ks=(1, 2))
    assert grid.full is grid["full"]
    assert grid.control is grid["ctrl_full"]
    assert [single.cond for single in grid.singles] == [f"head{h}" for h in range(4)]
    assert grid.label(3) == "L26H3"
    with pytest.raises(UserError, match=r"no condition 'top3': it has full, head0"):
        grid["top3"]


def test_a_grid_without_control_has_none():
    """The control condition is there only when a control layer was measured."""
    assert synthetic_grid(n_heads=4, ks=(1,), control_layer=None).control is None


@pytest.mark.parametrize("control_layer", [24, None])
def test_settings_survive_json(control_layer):
    """`from_dict(to_dict)` is the identity, through text."""
    settings = synthetic_settings(control_layer=control_layer)
    text = json.dumps(settings.to_dict(), allow_nan=False)
    assert GridSettings.from_dict(json.loads(text)) == settings


def test_a_grid_shows_itself_as_a_table(tiny_grid):
    """One row a condition, in the order of the grid, with the means that the conditions have."""
    table = tiny_grid.to_dataframe()
    assert list(table["cond"]) == list(tiny_grid.conditions)
    for row in table.itertuples():
        condition = tiny_grid[row.cond]
        assert (row.KL_raw, row.KL_mapped, row.delta) == (
            condition.KL_raw,
            condition.KL_mapped,
            condition.delta,
        )
    assert tiny_grid._repr_html_().count("<tr") == len(table) + 1


def test_every_table_is_a_dataframe(tiny_pair, tiny_maps, tiny_grid):
    """What has rows has them in pandas too, by the names of its records."""
    of_map, of_curve = (
        each.to_dataframe() for each in (tiny_maps[MAIN], curve("delta", tiny_grid, 1.0))
    )
    assert list(of_map["head"]) == list(range(tiny_pair.n_heads))
    assert of_map["fitted_r2"][2] == tiny_maps[MAIN].diagnostics[2].fitted.r2
    assert list(of_curve["k"]) == list(range(tiny_pair.n_heads + 1))
    assert of_curve["coverage_pct"].iloc[-1] == 100
    assert of_curve["heads"].iloc[2] == list(tiny_grid.ranking.top(2))
    checks = Verification(Path("runs/x"), (Check("table", True, "it holds"),))
    assert checks.to_dataframe().to_dict("list") == {
        "name": ["table"],
        "passed": [True],
        "said": ["it holds"],
    }


def test_what_stands_last_in_a_cell_is_short(tiny_pair, tiny_maps, tiny_grid):
    """Pair, maps, grid and analysis say what they are in a line."""
    shown = {
        repr(each)
        for each in (tiny_pair, tiny_maps[MAIN], tiny_grid, analyse(resampled(tiny_grid, 100)))
    }
    assert len(shown) == 4
    assert max(map(len, shown)) < 120
    assert f"layer {MAIN} of 3, alpha 0.3" in repr(tiny_grid)
