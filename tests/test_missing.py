"""Whatever is null in a record has its reason beside it, however degenerate the run."""

import json
import re
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
from explained import check_explained, unexplained
from games import GRADIENT_METHODS, Game, measured, noisy_game
from synthetic import resampled
from test_analyse import analysed
from tiny import grid_of, prepared

from rq4lens import figures
from rq4lens.analysis.analyse import analyse
from rq4lens.analysis.effects.table import ranking_rows, records
from rq4lens.analysis.rankings.compared import rank_heads
from rq4lens.analysis.rankings.file import ranking_file_rows
from rq4lens.analysis.rankings.methods import METHODS
from rq4lens.analysis.records import Analysis, RandomSets
from rq4lens.analysis.statistics.plain import from_json, to_json
from rq4lens.analysis.structure.layers import compare_layers
from rq4lens.config import AnalysisEffort

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


def test_a_record_keeps_the_reasons_of_what_is_none():
    """A reason can be given before it is known whether the field is None; null has one."""
    why = {"mean_pct": "no effect", "p_value": "too few"}
    found = RandomSets(1, 1, True, (0.0,), (), None, {}, {}, p_value=0.5, reasons=why)
    assert found.reasons == {"mean_pct": "no effect"}
    record = to_json(found)
    assert record["mean_pct_reason"] == "no effect"
    assert "p_value_reason" not in record
    assert to_json(replace(found, mean_pct=3.0)).get("mean_pct_reason") is None


def same(one, other):
    """Whether two records are equal; arrays are compared number by number."""
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, field.name), getattr(other, field.name))
            for field in fields(one)
            if field.compare
        )
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def read_again(kind, record):
    """A record through the text of a file."""
    return from_json(kind, json.loads(json.dumps(to_json(record), allow_nan=False)))


@pytest.mark.parametrize("measure", [True, False])
@CASES
def test_analyses_are_read_back_as_they_were(game, measure):
    """`from_json(to_json)` is the identity, and what was read gives the same file again."""
    ks = tuple(sorted({1, game.n_heads}))
    for found in (
        analysed(game, ks=ks, measure=measure),
        compare_layers({1: resampled(game.grid(ks=(1,)), 100)}, game if measure else None),
    ):
        again = read_again(type(found), found)
        assert same(again, found)
        assert to_json(again) == to_json(found)


def test_what_is_no_analysis_is_not_read():
    """A key that is missing and a value of another type are refused, wherever they stand."""
    record = to_json(analysed(DEGENERATE["one prompt"], ks=(1,)))
    for broken in (
        [],
        {},
        {**record, "claims": "text"},
        {**record, "full": {**record["full"], "noise_floor_nats": "0"}},
        {**record, "coverage": [{**record["coverage"][0], "k": 1.5}]},
        {**record, "seconds": {"coverage": True}},
    ):
        with pytest.raises((ValueError, KeyError, TypeError)):
            from_json(Analysis, broken)


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
    check_explained(to_json(records(resampled(grid, 100))))
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


def test_what_was_not_measured_says_what_it_needs(tiny_pair, tiny_maps):
    """A full analysis lacks prompts and models, and a grid alone the full analysis."""
    experiment = prepared(tiny_pair, tiny_maps)
    grid = resampled(grid_of(tiny_pair, tiny_maps, 1, ks=(1,), experiment=experiment), 100)
    effort = AnalysisEffort(n_random_sets=20, n_splits=1, methods=("delta",), alphas=(0.3,))
    said = {}
    for measurer in (experiment, None):
        analysis = analyse(grid, measurer, effort)
        page = figures.report_page(figures.Report(grid, analysis, provenance={}))
        said[measurer is None] = re.search(r"Not measured: [^<]*", page)[0]
        assert analysis.reasons == read_again(Analysis, analysis.to_dict()).reasons
    assert "the pair has no neutral prompts" in said[False]
    assert "--analysis full" not in said[False]
    assert "only the grid was given" in said[True]
    assert "--analysis full" in said[True]
