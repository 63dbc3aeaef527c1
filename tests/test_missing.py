"""Whatever is null in a record has its reason beside it, however degenerate the run."""

import numpy as np
import pytest
from explained import check_explained, unexplained
from games import Game, measured, noisy_game
from synthetic import resampled
from test_analyse import analysed
from tiny import grid_of

from rq4lens.analysis.analyse import analyse
from rq4lens.analysis.effects.table import ranking_rows, records
from rq4lens.analysis.rankings.compared import rank_heads
from rq4lens.analysis.rankings.file import ranking_file_rows
from rq4lens.analysis.rankings.methods import GRADIENT_METHODS, METHODS
from rq4lens.analysis.statistics.plain import explained
from rq4lens.analysis.structure.layers import compare_layers

DEGENERATE = {
    "one prompt": Game(np.array([[2.0], [1.0]])),
    "nothing": Game(np.zeros((3, 6)), raw=np.zeros((3, 6))),
    "a dead head": Game(np.outer([0.0, 1.0], np.ones(6)), raw=np.outer([0.0, 2.0], np.ones(6))),
    "constant": Game(np.ones((3, 6))),
    "no effect": noisy_game([0.0, 0.0, 0.0], 12),
    "harmful": noisy_game([-2.0, -1.0, 0.1], 12),
    "one head": noisy_game([1.0], 8),
    "one group": noisy_game([1.0, 2.0], 6, groups=["a"] * 6),
    "two prompts": noisy_game([1.0, 2.0], 2),
}
CASES = pytest.mark.parametrize("game", DEGENERATE.values(), ids=DEGENERATE)


def test_the_check_finds_nulls_at_any_depth():
    """A reason covers its own field or its row, and nothing below them."""
    record = {"a": [{"b": None, "b_reason": "why"}, {"c": None}], "d": {"e": [1, None]}}
    assert list(unexplained(record)) == [".a[1].c", ".d.e[1]"]
    assert list(unexplained({"reason": "why", "x": None, "rows": [{"y": None}]})) == [".rows[0].y"]


def test_a_reason_that_is_there_stays():
    """Reasons are added beside unexplained nulls alone, those in lists included."""
    record = {
        "a": None,
        "a_ci95": None,
        "a_reason": "known",
        "b": 1,
        "c": [[1, None]],
        "note": None,
    }
    assert explained(record, str.upper) == {**record, "c_reason": "C"}


@pytest.mark.parametrize("measure", [True, False])
@CASES
def test_analyses_explain_their_nulls(game, measure):
    """One prompt, one head, ties, no effect, a harmful map, no models: nulls with reasons."""
    ks = tuple(sorted({1, game.n_heads}))
    record = analysed(game, ks=ks, measure=measure).to_dict()
    check_explained(record)
    assert record["claims"]
    for row in record["coverage"]:
        assert row["coverage_pct"] is not None or row["coverage_pct_reason"]


@CASES
def test_tables_and_rankings_explain_their_nulls(game):
    """So do the table of conditions and the ranking files of every method."""
    grid = game.grid(ks=(1,))
    check_explained(records(resampled(grid, 100)))
    check_explained(ranking_rows(grid))
    for method in METHODS:
        if method not in GRADIENT_METHODS:
            check_explained(ranking_file_rows(rank_heads(method, measured(game))))


@CASES
def test_layers_explain_their_nulls(game):
    """So do layers side by side, with and without their own curves."""
    for experiment in (None, game):
        found = compare_layers({1: resampled(game.grid(ks=(1,)), 100)}, experiment)
        check_explained(found.to_dict())


def test_a_run_without_control_layer_explains_its_nulls(tiny_pair, tiny_maps):
    """Its settings and its controls say that there is none."""
    grid = grid_of(tiny_pair, tiny_maps, 1, ks=(1,))
    record = analyse(resampled(grid, 100)).to_dict()
    check_explained(record)
    assert record["settings"]["control_layer_reason"] == "the run has no control layer"
