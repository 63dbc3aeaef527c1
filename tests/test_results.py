"""Records: what follows from a condition's own numbers, and the order of heads."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import resampled, synthetic_grid, synthetic_settings
from tiny import MAIN, prepared

from rq4lens.analysis.analyse import analyse
from rq4lens.analysis.structure.layers import compare_layers
from rq4lens.errors import UserError
from rq4lens.heads import Head, HeadSet
from rq4lens.results import (
    SHOWN_ROWS,
    ConditionResult,
    GridSettings,
    HeadRanking,
    rank_conditions,
)
from rq4lens.validation.planting import plant


def condition(raw, mapped, cond="head0", head=0):
    raw, mapped = np.array(raw, dtype=float), np.array(mapped, dtype=float)
    return ConditionResult(cond, 1, HeadSet.of([head], 4), 0.3, raw, mapped, -raw, -mapped)


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


@pytest.mark.parametrize(("rank_by", "best"), [("delta", 0), ("drop_pct", 1)])
def test_single_heads_are_ranked_by_the_chosen_score(rank_by, best):
    """A large effect repaired by a half, and a small one repaired whole."""
    singles = [
        condition([4.0, 4.0], [2.0, 2.0], "head0", 0),
        condition([1.0, 1.0], [0.0, 0.0], "head1", 1),
        condition([0.0, 0.0], [0.0, 0.0], "head2", 2),
    ]
    ranking = rank_conditions(singles, rank_by)
    assert ranking.heads[0] == best
    assert ranking.heads[-1] == 2
    assert (ranking.share_of is None) == (rank_by == "delta")


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


def test_what_stands_last_in_a_cell_is_short(tiny_pair, tiny_maps, tiny_grid):
    """Pair, maps, grid and analysis say what they are in a line."""
    shown = {
        repr(each)
        for each in (tiny_pair, tiny_maps[MAIN], tiny_grid, analyse(resampled(tiny_grid, 100)))
    }
    assert len(shown) == 4
    assert max(map(len, shown)) < 120
    assert f"layer {MAIN} of 3, alpha 0.3" in repr(tiny_grid)


@pytest.fixture(scope="module")
def results(tiny_pair, tiny_maps, tiny_grid):
    """Whatever a user may leave at the end of a cell, by name."""
    experiment, analysis = prepared(tiny_pair, tiny_maps), analyse(resampled(tiny_grid, 100))
    return {
        "prompts": tiny_pair.prompts,
        "tokens": tiny_pair.tokens("base", "val"),
        "member": tiny_pair.base,
        "loaded": tiny_pair.base.loaded,
        "experiment": experiment,
        "effects": experiment.measure(MAIN, "0,2", 0.3)[0],
        "planted": plant(tiny_pair.base.model, rotated=[Head(1, 0)]),
        "condition": tiny_grid.full,
        "grid": tiny_grid,
        "ranking": tiny_grid.ranking,
        "analysis": analysis,
        "kinds": analysis.kinds,
        "tests": analysis.tests,
        "stability": analysis.stability,
        "audit": tiny_pair.audit(),
        "layers": compare_layers({MAIN: resampled(tiny_grid, 100)}),
    }


def test_no_result_prints_pages(results):
    """Everything that can stand last in a cell is a line or two, and no address in memory."""
    for name, each in results.items():
        limit = 1_000 if name in {"planted", "loaded"} else 130
        assert len(repr(each)) <= limit, name
        assert " object at 0x" not in repr(each)


@pytest.mark.parametrize(
    ("name", "n_rows"),
    [
        ("grid", lambda each: len(each.conditions)),
        ("condition", lambda each: len(each.raw.kl_nats)),
        ("ranking", lambda each: each.n_heads),
        ("analysis", lambda each: len(each.coverage)),
        ("kinds", lambda each: len(each.heads)),
        ("tests", lambda each: len(each.tests)),
        ("stability", lambda each: len(each.heads)),
        ("audit", lambda each: len(each.prompts)),
        ("layers", lambda each: len(each.rows)),
    ],
)
def test_results_are_tables(results, name, n_rows):
    """A row for each of their records; a notebook shows as many, and no reasons beside them."""
    result = results[name]
    table = result.to_dataframe()
    assert len(table) == n_rows(result)
    html = result._repr_html_()
    assert html.count("<tr") == min(len(table), SHOWN_ROWS) + 1 + (len(table) > SHOWN_ROWS)
    assert "_reason" not in html


def test_a_table_holds_the_numbers_of_its_records(results):
    """The ranking's scores, and the layers' estimates with both ends of their intervals."""
    ranking, layers = results["ranking"], results["layers"]
    table = ranking.to_dataframe()
    assert [Head.parse(head).index for head in table["head"]] == list(ranking.heads)
    assert tuple(table[ranking.method]) == ranking.scores
    (row,) = layers.to_dataframe().to_dict("records")
    delta = layers.rows[0].delta
    assert row["delta"] == delta.value
    assert row["delta_ci95"] == [delta.interval.low, delta.interval.high]
