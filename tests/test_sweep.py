"""The sweep over layers, its files, and rankings as a job."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from explained import check_explained
from pair_on_disk import write_pair

from rq4lens.analysis.saved import read_layers
from rq4lens.analysis.statistics.bootstrap import Estimate, Interval
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.config import config_from
from rq4lens.disk.run import LAYERS
from rq4lens.errors import UserError
from rq4lens.jobs.pages import draw_run, write_report_of
from rq4lens.jobs.rank import rank_layer
from rq4lens.jobs.run import run as run_job
from rq4lens.jobs.sweep import WORTH_PCT, choose_layers, parse_layers, sweep_layers


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    settings = write_pair(tmp_path_factory.mktemp("pair"))
    return config_from({**settings, "k": [1, 2], "resamples": 200, "seed": 3})


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sweep")
    return directory, sweep_layers(config, directory)


def test_sweep_agrees_with_a_run_of_each_layer(config, swept, tmp_path):
    """A layer's grid in a sweep holds the numbers of a run of that layer alone."""
    _, sweep = swept
    run = run_job(config.updated(analysis="grid"), tmp_path / "run")
    of_sweep = sweep.grids[run.grid.settings.layer]
    for cond in ("full", "head0", "top2", "rand2_s1"):
        np.testing.assert_allclose(
            of_sweep[cond].kl_mapped_nats, run.grid[cond].kl_mapped_nats, atol=1e-6
        )


def test_saved_sweep_reads_back_as_it_was(swept):
    """Every prompt's own numbers and the proposal survive the files."""
    directory, sweep = swept
    saved = read_layers(directory)
    assert saved.choice == sweep.choice
    assert to_json(saved.comparison) == to_json(sweep.comparison)
    for layer, grid in sweep.grids.items():
        assert saved.grids[layer].settings == grid.settings
        for cond, result in grid.conditions.items():
            np.testing.assert_array_equal(saved.grids[layer][cond].kl_raw_nats, result.kl_raw_nats)


def test_a_damaged_sweep_is_one_sentence(swept, tmp_path):
    """A sweep whose files do not fit together is refused with the fix."""
    directory, _ = swept
    record = json.loads((directory / LAYERS).read_text())
    record["settings"]["7"] = record["settings"]["0"]
    (tmp_path / LAYERS).write_text(json.dumps(record))
    with pytest.raises(UserError, match="sweep again"):
        read_layers(tmp_path)


def test_a_directory_without_a_sweep_has_no_layers(tmp_path):
    """A run directory in which nothing was swept holds no layers, and that is no error."""
    assert read_layers(tmp_path) is None


def test_report_and_figures_take_the_layers_that_lie_beside_the_run(config, tmp_path):
    """A sweep into a run directory puts the layers into its report and figures."""
    run_job(config.updated(analysis="grid"), tmp_path)
    draw_run(tmp_path, tmp_path / "before", static=False)
    sweep_layers(config, tmp_path)
    draw_run(tmp_path, tmp_path / "after", static=False)
    new = {p.name for p in (tmp_path / "after").iterdir()} - {
        p.name for p in (tmp_path / "before").iterdir()
    }
    assert new == {"layers.html", "layers_ranking.html", "layers_coverage.html"}
    assert "layers" in write_report_of(tmp_path).read_text(encoding="utf-8")


def test_layers_of_another_alpha_stay_out_of_a_run(config, tmp_path):
    """Layers measured in another way are not shown beside the run."""
    run_job(config.updated(analysis="grid"), tmp_path)
    sweep_layers(config.updated(alpha=0.5), tmp_path)
    draw_run(tmp_path, tmp_path / "out", static=False)
    assert not (tmp_path / "out" / "layers.html").exists()


def around(value, half_width):
    """An estimate with a symmetric interval."""
    return Estimate(value, Interval(value - half_width, value + half_width))


def compared(swept, *layers, gap_undefined_because=None):
    """A comparison of layers of which each undoes so much, and does so much damage."""
    comparison = swept[1].comparison
    rows = tuple(
        replace(
            comparison.rows[0],
            layer=layer,
            to_base_pct=around(undone, half_width),
            KL_raw=Estimate(raw),
            drop_pct=around(80.0, 5.0),
        )
        for layer, (undone, half_width, raw) in enumerate(layers)
    )
    gap = replace(comparison.gap, undefined_because=gap_undefined_because)
    return replace(comparison, rows=rows, gap=gap)


def test_choice_is_the_layer_that_undoes_most_and_the_damaged_one_that_undoes_less(swept):
    """Main undoes most; control is damaged most among those whose interval lies below main's."""
    layers = [(30.0, 3.0, 0.05), (27.0, 3.0, 0.9), (2.0, 1.0, 0.03), (3.0, 1.0, 0.01)]
    choice = choose_layers(compared(swept, *layers))
    assert (choice.main, choice.control) == (0, 2)
    assert len(choice.reasons) == 2


def test_a_layer_whose_map_takes_little_back_is_named(swept):
    """A damage that stays is a finding, wherever the layer stands."""
    comparison = compared(swept, (30.0, 3.0, 0.05), (2.0, 1.0, 0.03))
    kept, lost = comparison.rows
    lost = replace(lost, drop_pct=around(20.0, 10.0))
    choice = choose_layers(replace(comparison, rows=(kept, lost)))
    assert [reason.startswith("layer 1: ") for reason in choice.reasons] == [False, False, True]


@pytest.mark.parametrize("undone", [(0.5 * WORTH_PCT, 0.1), (2 * WORTH_PCT, 1.5 * WORTH_PCT)])
def test_no_main_layer_where_none_is_worth_it(swept, undone):
    """The whole interval must lie above the line, or no layer is proposed, and this is said."""
    choice = choose_layers(compared(swept, (*undone, 0.5)))
    assert (choice.main, choice.control) == (None, None)
    assert choice.reasons[0].startswith("no layer is proposed: ")


def test_no_layer_is_proposed_where_there_is_no_gap(swept):
    """A share of a gap that is not there says nothing."""
    choice = choose_layers(
        compared(swept, (30.0, 3.0, 0.05), gap_undefined_because="the models answer alike")
    )
    assert (choice.main, choice.control) == (None, None)
    assert choice.reasons == ("no layer is proposed: the models answer alike",)


@pytest.mark.parametrize(("text", "layers"), [("0-2", [0, 1, 2]), ("5,1", [5, 1]), ("all", None)])
def test_layers_are_written_like_heads(text, layers):
    """Layers are numbers and ranges, or ALL."""
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1-b", "-3", "1,,2", "5-2", "²", "1-99999"])
def test_words_are_no_layers(text):
    """Anything else is refused with the grammar."""
    with pytest.raises(UserError, match="20-31"):
        parse_layers(text)


def test_rank_writes_a_file_per_method_and_compares_them(config, tmp_path):
    """Each ranking is written with its heads, and the printed table with its intervals."""
    job = rank_layer(config, ["delta", "kl_raw", "delta", "greedy_forward"], out=tmp_path)
    names = ["ranking_delta", "ranking_kl_raw", "ranking_greedy_forward", "rank_table"]
    assert [path.name.split("_L")[0] for path in job.files] == names
    rows = json.loads(job.files[0].read_text())
    assert [row["head"] for row in rows] == list(job.rankings[0].heads)
    record = json.loads(job.files[-1].read_text())
    check_explained(record)
    itself, raw, greedy = record["table"]
    assert itself["agreement"] is None
    low, high = raw["agreement"]["kendall_ci95"]
    assert low <= raw["agreement"]["kendall"] <= high
    assert greedy["agreement"]["kendall_ci95"] is None
    assert "greedy_forward ranks from the prompts" in greedy["agreement"]["kendall_reason"]
    assert raw["coverage_pct"]["2"] == pytest.approx(job.rows[1].coverage_pct[2].value)


def test_tables_are_not_cut(config):
    """Every method's best heads and every size stand in full, however many columns there are."""
    job = rank_layer(config.updated(k=[1, 2, 3, 4]), ["ALL"])
    assert "…" not in job.summary
    assert "best heads" in job.summary
    for ranking in job.rankings:
        line = next(row for row in job.summary.splitlines() if row.startswith(ranking.method))
        assert line.endswith(",".join(map(str, ranking.top(4))))


def test_gradient_methods_take_their_settings(config):
    """The scalar and the points on the path reach the methods that know them, and no other."""
    methods = ["delta", "attribution", "integrated_gradients"]
    job = rank_layer(config, methods, target="logit_difference", ig_steps=3)
    assert [dict(ranking.settings) for ranking in job.rankings] == [
        {},
        {"target": "logit_difference", "steps": 0},
        {"target": "logit_difference", "steps": 3},
    ]


@pytest.mark.parametrize(
    ("methods", "settings", "sentence"),
    [
        (["grad_act"], {"target": "answer"}, "choose answer_logprob or logit_difference"),
        (["delta"], {"target": "answer_logprob"}, "add one of grad_act, attribution"),
        (["attribution"], {"ig_steps": 4}, "add the method integrated_gradients"),
        (["integrated_gradients"], {"ig_steps": 0}, "take at least 1 point"),
        (["delta"], {"files": [Path("old/delta.json")]}, "two rankings would be called 'delta'"),
    ],
)
def test_settings_without_a_use_are_refused(config, methods, settings, sentence):
    """A setting that nothing would follow, or a name that two rankings share, is an error."""
    with pytest.raises(UserError, match=sentence):
        rank_layer(config, methods, **settings)


def test_a_sweep_says_what_its_tests_are_corrected_for(swept):
    """The family of tests is all heads of all layers, in the text and in the file."""
    directory, sweep = swept
    tests = sweep.comparison.tests
    said = " ".join(sweep.summary.split())
    n_heads, n_layers = sweep.comparison.delta.shape[1], len(sweep.grids)
    assert len(tests.tests) == n_heads * n_layers
    assert f"all {len(tests.tests)} tests of this sweep ({tests.family})" in said
    record = json.loads((directory / LAYERS).read_text())["comparison"]
    assert record["tests"]["p_holm_min"] == tests.p_holm_min
    check_explained(record)


def test_rank_compares_a_ranking_from_a_file(config, tmp_path):
    """A ranking read from a file stands in the table like any other."""
    exact = rank_layer(config, ["delta"]).rankings[0]
    path = tmp_path / "attr_L1_attn.json"
    path.write_text(json.dumps([{"head": h, "score": -s} for h, s in enumerate(exact.by_head)]))
    job = rank_layer(config, [], files=[path])
    assert job.rankings[0].method == "attr_L1_attn"
    assert job.rows[0].agreement.kendall.value == -1
    assert job.rows[0].agreement.kendall.interval is not None


def test_unknown_method_is_named_with_the_known_ones(config):
    """A ranking method that does not exist is refused with the list."""
    with pytest.raises(UserError, match="shapley"):
        rank_layer(config, ["magic"])
