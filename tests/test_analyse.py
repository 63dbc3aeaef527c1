"""The whole analysis of a run: complete, strict, honest about what is missing, and in words."""

import json
from dataclasses import replace

import numpy as np
import pytest
from games import Game, noisy_game
from synthetic import resampled
from tiny import grid_of, prepared

from rq4lens.analysis.analyse import PARTS, analyse
from rq4lens.analysis.claims import amount_of, claims, decisive_row, spread_of
from rq4lens.analysis.rankings.agreement import INDEX_NOTE
from rq4lens.analysis.rankings.methods import METHODS
from rq4lens.analysis.result import Analysis
from rq4lens.analysis.statistics.bootstrap import LEVEL, Estimate, Interval, exact
from rq4lens.analysis.structure.layers import compare_layers
from rq4lens.config import AnalysisEffort
from rq4lens.errors import UserError
from rq4lens.patching.maps.fitting import fit_maps

TAU = "Kendall's tau with their order by ΔKL is"

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
    return analyse(
        resampled(grid, 300), experiment, AnalysisEffort(n_random_sets=50), neutral=experiment
    )


def test_analysis_of_a_pair_has_every_part(of_pair):
    """All methods ran, every control has its row, and every part was timed."""
    assert [row.method for row in of_pair.methods] == list(METHODS)
    assert all(row.reason is None for row in of_pair.methods)
    assert {curve.ranking for curve in of_pair.curves} >= {"delta (cross-fitted)", "best subset"}
    assert set(of_pair.seconds) == set(PARTS)
    assert of_pair.alignment is not None
    kinds = {agreement.kind for agreement in of_pair.agreement}
    assert kinds == {"metric", "fold", "map_kind", "alpha"}
    assert {"control layer", "shuffled pairs", "neutral prompts"} <= {
        control.name for control in of_pair.controls
    }


def test_analysis_file_is_strict_json_with_the_documented_rows(of_pair):
    """``analysis.json`` has the documented keys and no number that is not finite."""
    record = of_pair.to_dict()
    json.dumps(record, allow_nan=False)
    assert set(record["coverage"][0]) >= ROW
    assert {"areas", "concentration", "controls", "agreement", "claims"} <= set(record)
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


def test_claims_follow_the_numbers():
    """A few heads, many heads and no effect each read differently."""
    few = " ".join(analysed(noisy_game([5.0, 4.9, *[0.1] * 10], 40)).claims)
    assert "The top 2 of 12 heads by delta (L1H0, L1H1) carry most of it" in few
    assert "a few heads carry it" in few
    assert "the top 2 are better" in few
    even = " ".join(analysed(noisy_game(np.ones(12), 40, noise=0.3)).claims)
    assert "carry only part of it" in even
    assert "spread over many heads" in even
    assert "the top 2 are not clearly better" in even
    null = " ".join(analysed(noisy_game(np.zeros(12), 40)).claims)
    assert "Coverage is undefined" in null
    assert "carry" not in null


@pytest.mark.parametrize(
    ("strengths", "said"),
    [
        ([-5.0, -4.9, *[-0.1] * 10], "2 of 12 heads do 90."),
        ([0.2, *[0.1] * 5, -9.0], "1 of 7 heads does 10"),
    ],
)
def test_claims_of_harm_name_those_that_do_it(strengths, said):
    """Of a harmful map the ranking's first heads do least; the best sets say who does most."""
    found = analysed(noisy_game(strengths, 40))
    harmful = " ".join(found.claims)
    assert "makes the raw patch worse" in harmful
    assert "does not say which heads carry the harm" in harmful
    assert said in harmful
    assert "spread over" not in harmful
    assert "Random sets" not in harmful
    random = [control for control in found.controls if control.name.startswith("random heads")]
    assert {control.survives for control in random} == {None}


def test_most_is_said_only_where_the_interval_says_so():
    """A share above one half whose interval holds one half is given as its interval."""
    shares = {"most": (51.0, 90.0), "between 45% and 75%": (45.0, 75.0), "only part": (20.0, 49.0)}
    for said, ends in shares.items():
        share = Estimate(sum(ends) / 2, Interval(*ends, LEVEL, "bca"))
        assert amount_of(share) == said
    assert amount_of(Estimate(60.0)) == "an uncertain share"


def test_no_row_is_called_most_on_its_point_alone():
    """The paragraph moves on to the first size whose whole interval lies above one half."""
    game = noisy_game([1.1, 0.9, *[0.1] * 8], 12, noise=1.0, seed=3)
    found = analysed(game, ks=(1, 2, 4))
    vague = replace(
        found.coverage[1],
        cross_fitted_coverage_pct=Estimate(60.0, Interval(40.0, 80.0, LEVEL, "bca")),
    )
    firm = replace(
        found.coverage[2],
        cross_fitted_coverage_pct=Estimate(80.0, Interval(60.0, 99.0, LEVEL, "bca")),
    )
    told = replace(found, coverage=(vague, firm))
    assert decisive_row(told) is firm
    assert "carry between 40% and 80% of it" in " ".join(claims(replace(found, coverage=(vague,))))


def test_a_layer_with_one_head_has_nothing_to_spread():
    """All lies on its one head, so nothing is said about few or many."""
    only = " ".join(analysed(noisy_game([1.0], 30), ks=(1,)).claims)
    assert "repairs part" in only
    assert "spread" not in only
    assert "90%" not in only


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


def test_claims_name_controls_that_fail():
    """A control without survival is named; one without a verdict is listed apart."""
    found = analysed(noisy_game([3.0, 2.0, 1.0], 30))
    first = found.controls[0]
    failed = replace(found, controls=(replace(first, survives=False), *found.controls[1:]))
    assert "does not survive: control layer" in " ".join(claims(failed))
    untested = replace(found, controls=(replace(first, survives=None),))
    assert "controls" not in " ".join(claims(untested)).replace("survives", "")


def test_claims_make_no_range_of_a_few_random_sets():
    """Three draws have no 95% of theirs; all sets of a size, or many draws, do."""
    game = noisy_game([5.0, 4.9, *[0.1] * 10], 40)
    few, many = (" ".join(analysed(game, measure=each).claims) for each in (False, True))
    assert "The 3 random sets of 2 cover" in few
    assert "(95% between" not in few
    assert "Random sets of 2 cover" in many
    assert "(95% between" in many


def test_claims_count_idle_heads_apart():
    """Heads that differ from zero by next to nothing count, and are said to be idle."""
    game = noisy_game([3.0, 2.0, *[1e-6] * 4], 30, noise=0.0)
    raw = np.outer([4.0, 3.0, *[2e-6] * 4], np.ones(30)) * np.linspace(0.9, 1.1, 30)
    said = " ".join(analysed(Game(game.single * np.linspace(0.8, 1.2, 30), raw=raw)).claims)
    assert "6 of 6 heads by themselves differ from zero" in said
    assert "2 of these are not idle" in said
    assert "all 30 tests (6 heads x 1 layer x 5 alphas)" in said


def test_claims_name_a_metric_that_ranks_otherwise():
    """A second metric is mentioned where its order of the heads has nothing to do with ΔKL's."""
    found = analysed(noisy_game([3.0, 2.0, 1.0], 30))
    assert "rank otherwise" not in " ".join(found.claims)
    metric = found.agreement[0]
    for estimate in (Estimate(-0.13, Interval(-0.17, 0.27, LEVEL, "percentile")), exact(-1.0)):
        other = replace(metric, kendall=estimate)
        said = " ".join(claims(replace(found, agreement=(other, *found.agreement[1:]))))
        assert f"answer log-probability the heads rank otherwise: {TAU} {estimate:.3g}" in said


def test_claims_name_every_control_that_comes_close():
    """One control is the closest; several above 80% are all named with their shares."""
    found = analysed(noisy_game([3.0, 2.0, 1.0], 30))
    shares = {"shuffled pairs": 89.7, "tuned mean": 88.0, "random rotation": 79.9}
    rows = {
        name: replace(found.controls[0], name=name, survives=True, share_pct=exact(share))
        for name, share in shares.items()
    }
    said = " ".join(claims(replace(found, controls=tuple(rows.values()))))
    assert "2 come close to its repair: shuffled pairs 89.7% [89.7, 89.7], tuned mean 88.0%" in said
    assert "random rotation" not in said
    alone = " ".join(claims(replace(found, controls=(rows["random rotation"],))))
    assert "random rotation comes closest: 79.9%" in alone


def test_words_for_spread():
    """The words follow 90% of the effect first and the area second."""
    assert spread_of(1, 2, 72.0) == "one head carries it"
    assert spread_of(2, 16, 90.0) == "a few heads carry it"
    assert "many carry the rest" in spread_of(8, 16, 80.0)
    assert "spread over many" in spread_of(15, 16, 55.0)


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
