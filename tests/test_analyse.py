"""The whole analysis of a run: complete, strict, honest about what is missing, and in words."""

import json
from dataclasses import replace

import numpy as np
import pytest
from games import Game, noisy_game
from synthetic import resampled
from tiny import TINY_HEADS, grid_of, prepared

from rq4lens.analysis.analyse import PARTS, Beside, analyse
from rq4lens.analysis.claims import decisive_row
from rq4lens.analysis.rankings.agreement import INDEX_NOTE
from rq4lens.analysis.rankings.methods import METHODS
from rq4lens.analysis.records import Analysis
from rq4lens.analysis.statistics.bootstrap import Estimate, Interval, exact
from rq4lens.analysis.structure.controls import QUESTIONS
from rq4lens.analysis.structure.layers import compare_layers
from rq4lens.config import AnalysisEffort
from rq4lens.errors import UserError
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.results import TRANSFERS

ROW = {
    *("k", "ranking", "heads", "coverage_pct", "coverage_pct_ci95", "cross_fitted_coverage_pct"),
    *("optimism_pct", "p_value", "p_value_min", "n_subsets"),
}


def analysed(game, ks=(1, 2), measure=True, progress=None, **effort) -> Analysis:
    return analyse(
        resampled(game.grid(ks=ks), 200),
        game if measure else None,
        AnalysisEffort(n_random_sets=60, n_splits=2, **effort),
        progress=progress,
    )


@pytest.fixture(scope="module")
def of_pair(tiny_pair, tiny_maps):
    """The whole analysis of the tiny pair, with every method and control."""
    experiment = prepared(tiny_pair, tiny_maps)
    grid = grid_of(tiny_pair, tiny_maps, 1, 0, 0.3, ks=(1, 2, 4), experiment=experiment)
    beside = Beside(neutral=experiment)
    effort = AnalysisEffort(n_random_sets=50)
    return analyse(resampled(grid, 300), experiment, effort, beside=beside)


def test_analysis_of_a_pair_has_every_part(of_pair):
    """All methods ran, whatever stands in has its row, and every part was timed."""
    assert [row.method for row in of_pair.methods] == list(METHODS)
    assert all(row.reason is None for row in of_pair.methods)
    assert {curve.ranking for curve in of_pair.curves} >= {"delta (cross-fitted)", "best subset"}
    assert set(of_pair.seconds) == set(PARTS)
    assert of_pair.alignment is not None
    kinds = {agreement.kind for agreement in of_pair.agreement}
    assert kinds == {"metric", "fold", "map_kind", "alpha"}
    assert {each.name for each in of_pair.stand_ins} == set(QUESTIONS)
    assert of_pair.control_layer.layer == 0
    assert len(of_pair.ladders) == 2  # at full strength and at the run's own
    for ladder in (*of_pair.ladders, of_pair.neutral):
        assert {f"head{head}" for head in range(TINY_HEADS)} < {row.name for row in ladder.rows}
        assert ladder.rows[-1].name == "full"
    assert [each.direction for each in of_pair.directions] == list(TRANSFERS)
    assert len(of_pair.kinds.heads) == TINY_HEADS


def test_no_pair_of_noise_is_beside_what_was_given_none(of_pair):
    """What was not measured is None, with its reason."""
    assert of_pair.noise is None
    assert of_pair.to_dict()["noise_reason"]


def test_transfer_is_the_same_wherever_it_stands(of_pair):
    """The layer, its tables in both directions and the sweep over alphas at 1 agree."""
    for found, heads in zip(
        of_pair.directions,
        (of_pair.transfer.heads_to_base_pct, of_pair.transfer.heads_to_tuned_pct),
        strict=True,
    ):
        (head,) = found.coverage[0].heads
        assert found.coverage[0].coverage_pct.value == pytest.approx(heads[head].value)
    at_one = next(point for point in of_pair.alphas if point.alpha == 1.0)
    assert at_one.to_base_pct.value == pytest.approx(of_pair.transfer.to_base_pct.value)


def test_analysis_file_is_strict_json_with_the_documented_rows(of_pair):
    """``analysis.json`` has the documented keys and no number that is not finite."""
    record = of_pair.to_dict()
    json.dumps(record, allow_nan=False)
    assert set(record["coverage"][0]) >= ROW
    assert {"areas", "concentration", "ladders", "kinds", "stand_ins", "claims"} <= set(record)
    assert {"ranking", "area_pct", "cpr", "cmd", "k90"} <= set(record["areas"][0])


def test_the_runs_own_ranking_comes_first(of_pair):
    """The first ranking and the first curve are those of the coverage table."""
    assert of_pair.rankings[0].method == of_pair.curves[0].ranking == "delta"
    assert of_pair.coverage[0].heads == of_pair.rankings[0].heads[:1]


def test_table_and_curve_tell_the_same_numbers(of_pair):
    """Coverage of the top k is the same in the table, the curve and the methods' rows."""
    own = of_pair.curves[0]
    by_method = next(row for row in of_pair.methods if row.method == "delta")
    for row in of_pair.coverage:
        assert row.coverage_pct.value == pytest.approx(own.coverage_pct[row.k].value)
        assert row.coverage_pct.value == pytest.approx(by_method.coverage_pct[row.k].value)


def test_finding_is_checked_against_another_metric():
    """The table also has coverage by the answer's log-probability; here both metrics are one."""
    found = analysed(noisy_game([3.0, 2.0, 1.0], 30), ks=(1, 3))
    for row in found.coverage:
        assert row.answer_coverage_pct.value == pytest.approx(row.coverage_pct.value)
    metric = next(agreement for agreement in found.agreement if agreement.kind == "metric")
    assert metric.kendall.value == pytest.approx(1)
    null = analysed(noisy_game([0.0, 0.0], 20), ks=(1,), measure=False).coverage[0]
    assert "answer's repair" in null.answer_coverage_pct.reason


def test_rankings_of_two_halves_and_of_two_seeds_are_compared():
    """Heads that differ clearly are ranked alike by any half and any permutations."""
    strengths = [2.0**-head for head in range(14)]
    found = analysed(noisy_game(strengths, 40, noise=0.0), methods=["shapley"])
    by_kind = {agreement.kind: agreement for agreement in found.agreement}
    assert by_kind["fold"].kendall.value == pytest.approx(1)
    assert by_kind["seed"].kendall.value == pytest.approx(1)
    assert (by_kind["seed"].first, by_kind["seed"].second) == (
        "shapley, one half of the orders",
        "shapley, the other half",
    )


def test_halves_of_noise_disagree():
    """Where heads differ by noise alone, one half's ranking says little about the other's."""
    found = analysed(noisy_game([0.0] * 12, 60), methods=["shapley"])
    fold = next(agreement for agreement in found.agreement if agreement.kind == "fold")
    assert abs(fold.spearman.value) < 0.9
    assert fold.spearman.interval.low < 0.7


def test_progress_counts_every_part():
    """The caller hears of each part once."""
    heard = []
    analysed(noisy_game([1.0, 2.0], 10), progress=heard.append)
    assert heard == [1] * len(PARTS)


@pytest.mark.parametrize("measure", [True, False])
def test_no_sizes_to_report_is_no_error(measure):
    """A grid without top-k and random-k conditions has an empty coverage table."""
    found = analysed(noisy_game([1.0, 2.0, 0.5], 12), ks=(), measure=measure)
    assert found.coverage == ()
    assert [sets.k for sets in found.random] == ([1, 2, 3] if measure else [])
    assert found.settings.effort.random_ks == tuple(sets.k for sets in found.random)


def test_sizes_of_random_sets_can_be_chosen():
    """Random sets come at the grid's sizes and those asked for; Shapley values do not need more."""
    game = noisy_game(np.arange(14.0), 6)
    found = analysed(game, ks=(2,), random_ks=(5,), methods=["shapley"])
    assert [sets.k for sets in found.random] == [2, 5]
    assert len(found.rankings) == 2
    everywhere = analysed(game, ks=(2,), methods=["shapley"])
    assert [sets.k for sets in everywhere.random] == list(range(1, 15))
    assert everywhere.settings.effort.random_ks == tuple(range(1, 15))


@pytest.mark.parametrize("k", [0, 4])
def test_a_size_that_no_random_set_has_is_refused(k):
    """Only sizes from 1 to H exist; the sentence says so."""
    with pytest.raises(UserError, match=f"random sets of {k} heads .* give sizes from 1 to 3"):
        analysed(noisy_game([1.0, 2.0, 0.5], 12), random_ks=(k,))


def test_shapley_values_use_the_random_sets_that_are_measured():
    """With random sets of every size no head set is measured for Shapley values alone."""
    with_values, without = (noisy_game(np.arange(14.0), 6) for _ in range(2))
    found = analysed(with_values, methods=["shapley"])
    analysed(without, methods=[])
    assert found.rankings[1].settings["n_permutations"] == 60
    # The curve along the new ranking is all that is new.
    assert with_values.n_measured - without.n_measured < 14


@pytest.mark.parametrize("random_ks", [(1, 2), range(1, 12)])
def test_what_one_part_measured_no_other_part_measures(random_ks):
    """Coverage, directions, methods, agreements, alphas and the grid ask for each patch once."""
    game = Game(np.random.default_rng(0).exponential(size=(11, 12)))
    asked, measure = [], game.effects

    def noting(patches, progress=None):
        asked.extend(patches)
        return measure(patches, progress)

    game.effects = noting
    grid = resampled(game.grid(), 100)
    of_grid, asked[:] = set(asked), []
    analyse(grid, game, AnalysisEffort(n_random_sets=60, random_ks=list(random_ks)))
    assert len(asked) > 500
    assert len(set(asked)) == len(asked)
    assert not of_grid.intersection(asked)


def test_analysis_repeats_itself(tiny_pair, tiny_maps):
    """The same grid, experiment and seed give the same analysis, timings aside."""
    experiment = prepared(tiny_pair, tiny_maps)
    grid = grid_of(tiny_pair, tiny_maps, 1, 0, 0.3, ks=(2,), experiment=experiment)
    effort, records = AnalysisEffort(n_random_sets=20, methods=["shapley"]), []
    for _ in range(2):
        found = analyse(resampled(grid, 100), experiment, effort)
        records.append(found.to_dict() | {"seconds": None, "methods": None})
    assert records[0] == records[1]


def test_grid_alone_is_enough_for_its_own_numbers():
    """Without an experiment the analysis holds what the grid supports and says what is missing."""
    found = analysed(noisy_game([1.0, 2.0, 3.0], 20), measure=False)
    assert found.curves == ()
    assert found.interactions is None
    assert "only the grid" in found.coverage[0].reason
    assert len(found.tests.tests) == 3
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_the_study_says_follows_the_numbers():
    """A few heads, many heads and no effect each read differently."""

    def said(strengths, noise):
        return analysed(noisy_game(strengths, 40, noise=noise), methods=[]).study_claims

    few = " ".join(said([5.0, 4.9, *[0.1] * 10], 0.1))
    assert "the top 2 heads by delta (L1H0, L1H1) cover" in few
    assert "clearly less" in few
    assert "not clearly less" not in few
    even = " ".join(said(np.ones(12), 0.3))
    assert "not clearly less" in even
    (null,) = said(np.zeros(12), 0.1)
    assert "no share of the map's repair is claimed" in null


def test_no_row_decides_on_its_point_alone():
    """The first size whose whole interval lies above one half; the largest if none does."""
    rows = analysed(noisy_game([1.1, 0.9, *[0.1] * 8], 12), ks=(2, 4)).coverage
    vague, firm = (
        replace(row, cross_fitted_coverage_pct=Estimate(share, Interval(*ends)))
        for row, share, ends in zip(rows, (60.0, 80.0), ((40.0, 80.0), (60.0, 99.0)), strict=True)
    )
    assert decisive_row((vague, firm), 100.0) is firm
    assert decisive_row((vague,), 100.0) is vague
    assert decisive_row((vague, firm), 70.0) is vague
    assert decisive_row((), 100.0) is None


def test_no_measured_set_lies_above_the_best():
    """Sets that other methods measure count too: the envelope is above every curve."""
    rng = np.random.default_rng(1)
    pairs = np.triu(rng.normal(size=(18, 18)), 1)
    single = 2 + rng.normal(size=(18, 1)) + rng.normal(0, 0.1, (18, 12))
    found = analysed(Game(single, pairs=pairs + pairs.T), ks=(1, 8), random_ks=[1])
    *others, best = found.curves
    assert best.ranking == "best subset"
    assert len(others) > 5
    for curve in others:
        for upper, lower in zip(best.coverage_pct, curve.coverage_pct, strict=True):
            assert upper.value >= lower.value - 1e-9
    for row in found.coverage:
        assert row.best_coverage_pct == best.coverage_pct[row.k].value


def test_numbers_in_sentences():
    """Percent stands at the number, other units behind it, and the interval in brackets."""
    assert f"{Estimate(12.345, Interval(10.0, 15.0)):.1f%}" == "12.3% [10.0, 15.0]"
    assert f"{Estimate(0.00012345):.3g nats}" == "0.000123 nats"
    assert f"{exact(3.0):.0f heads}" == "3 heads [3, 3]"
    assert f"{exact(-0.5):.3g}" == "-0.5 [-0.5, -0.5]"
    assert f"{Estimate(None, None, 'why'):.1f%}" == "undefined"


@pytest.fixture(scope="module")
def layer_grids(tiny_pair):
    """The grids of all layers of the tiny pair on one experiment."""
    maps = fit_maps(tiny_pair, [0, 1, 2])
    experiment = prepared(tiny_pair, maps)
    grids = {
        layer: grid_of(tiny_pair, maps, layer, ks=(1,), experiment=experiment)
        for layer in (0, 1, 2)
    }
    return grids, experiment


def test_layers_are_ranked_together(layer_grids):
    """The planted rotations of layer 1 are the best heads of all layers; the matrices agree."""
    grids, experiment = layer_grids
    found = compare_layers(
        {layer: resampled(grid, 200) for layer, grid in grids.items()}, experiment
    )
    assert {ranked.head.label for ranked in found.ranking[:2]} == {"L1H2", "L1H3"}
    assert found.delta == pytest.approx(found.KL_raw - found.KL_mapped)
    assert found.delta[1, 2] == pytest.approx(grids[1].single(2).delta)
    assert [ranked.rank for ranked in found.ranking] == list(range(1, 13))
    assert len(found.tests.tests) == 12
    json.dumps(found.to_dict(), allow_nan=False)


def test_layers_have_their_own_curves(layer_grids):
    """Every layer with a usable full effect has a curve that ends at 100."""
    grids, experiment = layer_grids
    for row in compare_layers(
        {layer: resampled(grid, 200) for layer, grid in grids.items()}, experiment
    ).rows:
        last = row.curve.coverage_pct[-1]
        assert (last.value == 100) == (row.full.undefined_because is None)
        assert row.delta.value == pytest.approx(row.KL_raw.value - row.KL_mapped.value)


def test_index_comparison_says_what_it_cannot_mean(layer_grids):
    """Rankings of two layers are compared index by index only with the note beside them."""
    found = compare_layers({layer: resampled(grid, 100) for layer, grid in layer_grids[0].items()})
    assert [(a.first, a.second) for a in found.by_index] == [
        ("layer 0", "layer 1"),
        ("layer 1", "layer 2"),
    ]
    assert all(agreement.note == INDEX_NOTE for agreement in found.by_index)
    assert found.rows[0].curve is None


def test_layers_of_different_sweeps_are_refused(layer_grids):
    """Other prompts, another alpha or a wrong key cannot be compared."""
    grids = layer_grids[0]
    with pytest.raises(UserError, match="no layer to compare"):
        compare_layers({})
    with pytest.raises(UserError, match="is one of layer 1"):
        compare_layers({0: grids[1]})
    settings = grids[1].settings
    stronger = replace(settings, patching=settings.patching.but(alpha=0.9))
    other = replace(grids[1], settings=stronger)
    with pytest.raises(UserError, match="another alpha"):
        compare_layers({0: grids[0], 1: other})
