"""Study files: read, planned, measured whole or in shares, and compared in one report."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pandas as pd
import pytest
from pair_on_disk import write_pair

from rq4lens.analysis.records import CellRow
from rq4lens.analysis.statistics.bootstrap import Estimate, Interval, undefined
from rq4lens.analysis.structure.layers import COMPARED, METRICS
from rq4lens.cli import main
from rq4lens.cluster.many import Many
from rq4lens.config import read_config
from rq4lens.errors import UserError
from rq4lens.figures.layers import study_layers
from rq4lens.jobs.run import run as run_job
from rq4lens.patching.engines.row_engine import RowEngine
from rq4lens.studies.cost_model import Machine, plan_text
from rq4lens.studies.file import read_study
from rq4lens.studies.job import merge, run_study_file
from rq4lens.studies.report import REPORT, ROWS

START = """
name = "strengths & <maps>"
layers = "1-2"
alphas = [0.3, 0.6]
map_kinds = ["procrustes_scaled", "mean_shift"]

[settings]
resamples = 100
device = "cpu"
k = [1, 2]

"""


# All ways of running compute in the same way.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pair_table(tmp_path_factory):
    pair = write_pair(tmp_path_factory.mktemp("pair"))
    lines = [f"{key} = {json.dumps(pair[key])}" for key in ("base", "tuned", "prompts")]
    return "\n".join(["[[pairs]]", 'name = "on disk"', *lines])


@pytest.fixture(scope="module")
def study(pair_table, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "study.toml"
    path.write_text(START + pair_table)
    return read_study(path)


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    return directory, run_study_file(study, directory)


def written(text, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return path


def test_cells_are_all_combinations_pair_by_pair(study):
    """Each pair at each strength through each map kind, with the settings of all pairs."""
    assert [cell.name for cell in study.cells] == [
        *("on_disk_a0.3_procrustes_scaled", "on_disk_a0.3_mean_shift"),
        *("on_disk_a0.6_procrustes_scaled", "on_disk_a0.6_mean_shift"),
    ]
    for cell in study.cells:
        assert cell.request.layers == (1, 2)
        assert cell.request.config.patching.k == (1, 2)
        assert cell.request.config.effort.resamples == 100


def test_a_pair_of_the_package_brings_its_settings(tmp_path):
    """What the preset says holds unless the study says otherwise; layers may be the pair's own."""
    text = '[settings]\nbatch_size = 7\n[[pairs]]\npair = "etiquette"\nlayers = "3"\nseed = 5\n'
    (cell,) = read_study(written(text, tmp_path)).cells
    assert cell.pair == "etiquette"
    assert cell.request.layers == (3,)
    assert (cell.request.config.place.batch_size, cell.request.config.effort.seed) == (7, 5)


@pytest.mark.parametrize(
    ("text", "ranked"),
    [
        ("", "delta"),
        ('metrics = ["KL_raw", "drop_pct", "delta"]', "drop_pct"),
        ('metrics = ["KL_raw"]', "delta"),
        ('metrics = ["drop_pct"]\n[settings]\nrank_by = "delta"', "delta"),
    ],
)
def test_the_first_metric_that_can_rank_heads_ranks_them(text, ranked, tmp_path):
    """Unless the settings say otherwise; KL of one kind alone ranks none."""
    (cell,) = read_study(written(f'{text}\n[[pairs]]\npair = "etiquette"', tmp_path)).cells
    assert cell.request.config.patching.rank_by == ranked


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('alpha = [0.3]\n[[pairs]]\npair = "etiquette"', "did you mean 'alphas'"),
        ('[settings]\nbatchsize = 3\n[[pairs]]\npair = "etiquette"', "did you mean 'batch_size'"),
        ('[settings]\nlayer = 3\n[[pairs]]\npair = "etiquette"', "unknown key 'layer'"),
        ('[[pairs]]\npair = "etiquette"\nsplitt = "val"', "did you mean 'split'"),
        ('alphas = [2.0]\n[[pairs]]\npair = "etiquette"', "alphas"),
        ('metrics = ["dleta"]\n[[pairs]]\npair = "etiquette"', "'dleta': did you mean 'delta'?"),
        (
            'metrics = ["x"]\n[[pairs]]\npair = "etiquette"',
            "allowed are to_base_pct, to_tuned",
        ),
        ('metrics = ["delta", "delta"]\n[[pairs]]\npair = "etiquette"', "'delta' twice"),
        ('metrics = []\n[[pairs]]\npair = "etiquette"', "metrics"),
        ('metrics = "delta"\n[[pairs]]\npair = "etiquette"', "metrics"),
        ('alphas = []\n[[pairs]]\npair = "etiquette"', "alphas"),
        ('map_kinds = ["magic"]\n[[pairs]]\npair = "etiquette"', "map_kind = 'magic'"),
        ('layers = "9-2"\n[[pairs]]\npair = "etiquette"', "20-31"),
        ('name = "nothing"', "pairs"),
        ('[[pairs]]\nbase = "b"', "has no name"),
        ('[[pairs]]\npair = "etiquette"\n[[pairs]]\npair = "etiquette"', "twice"),
        ("pairs = 3", "pairs"),
        ("[[pairs]", "cannot be read as TOML"),
    ],
)
def test_anything_else_is_one_sentence(text, sentence, tmp_path):
    """Unknown keys are named with the nearest valid one, values with what they mean."""
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_study(written(text, tmp_path))


def test_a_missing_study_file_is_one_sentence(tmp_path):
    """It is named."""
    with pytest.raises(UserError, match="does not exist"):
        read_study(tmp_path / "nothing.toml")


def test_the_report_compares_all_cells_and_layers(study, finished):
    """Its numbers stand in a file too; the console shows a row per sweep."""
    directory, said = finished
    record = json.loads((directory / ROWS).read_text(), parse_constant=pytest.fail)
    names = [cell.name for cell in study.cells]
    assert [cell["cell"] for cell in record["cells"]] == names
    assert [(row["cell"], row["layer"]) for row in record["layers"]] == [
        (name, layer) for name in names for layer in (1, 2)
    ]
    for name in names:
        assert name in said
        assert (directory / "cells" / name / "layers.json").exists()


def test_the_report_says_what_layers_carry_of_the_gap(finished):
    """Both directions with their intervals, and the gap of each pair, as the saved prompts say."""
    directory, said = finished
    assert {"gap (nats)", "to_base(ALL)", "to_tuned(ALL)"} <= set(re.split(r"  +", said))
    record = json.loads((directory / ROWS).read_text())
    for cell, rows in zip(record["cells"], batched(record["layers"], 2), strict=True):
        table = pd.read_parquet(directory / "cells" / cell["cell"] / "layers_per_prompt.parquet")
        left = table.pivot_table("gap_left", ["layer", "cond"], "kind")
        for row in rows:
            for name, kind, gap in (
                ("to_base_pct", "into_tuned", "gap_base_nats"),
                ("to_tuned_pct", "into_base", "gap_tuned_nats"),
            ):
                whole = left[kind][row["layer"], "none"]
                assert cell[gap] == pytest.approx(whole)
                part = left[kind][row["layer"], "full"]
                assert row[name] == pytest.approx(100 * (1 - part / whole))
                low, high = row[f"{name}_ci95"]
                assert low < row[name] < high
    page = (directory / REPORT).read_text(encoding="utf-8")
    for heading in ("gap (nats)", "to_base", "to_tuned"):
        assert re.search(f"<th[^>]*>(<span[^>]*>)?{re.escape(heading)}<", page)
    gap = re.search(r"<td[^>]*>([\d.]+) \[", page)[1]
    n_decimals = len(gap.partition(".")[2])
    assert float(gap) == round(record["cells"][0]["gap_base_nats"], n_decimals)


def batched(rows, size):
    """Rows a few at a time."""
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def test_other_metrics_of_a_finished_study_are_only_reported(
    study, finished, tmp_path, monkeypatch
):
    """They are compared without measuring anything, and are what the saved prompts say."""
    monkeypatch.setattr(RowEngine, "effects", lambda *_: pytest.fail("measured again"))
    directory = shutil.copytree(finished[0], tmp_path / "study")
    text = study.text.replace("alphas", 'metrics = ["answer_logprob", "KL_raw"]\nalphas')
    other = read_study(written(text, tmp_path))
    said = run_study_file(other, directory)
    assert "answer(ALL)" in said
    record = json.loads((directory / ROWS).read_text(), parse_constant=pytest.fail)
    assert record["metrics"] == ["answer_logprob", "KL_raw"]
    before = json.loads((finished[0] / ROWS).read_text())
    cell, rows = record["cells"][0], record["layers"][:2]
    table = pd.read_parquet(directory / "cells" / cell["cell"] / "layers_per_prompt.parquet")
    means = table.pivot_table("answer_logprob_change", ["layer", "cond"], "kind")
    repair = means["mapped"] - means["raw"]
    for row, old in zip(rows, before["layers"], strict=False):
        assert row["answer_logprob"] == pytest.approx(repair[row["layer"], "full"])
        assert row["answer_logprob_ci95"][0] < row["answer_logprob"] < row["answer_logprob_ci95"][1]
        assert row["KL_raw"] == old["KL_raw"]
        assert "delta" not in row
    single = repair[repair.index.get_level_values("cond").str.startswith("head")]
    layer, cond = single.idxmax()
    assert cell["best"] == f"L{layer}H{cond.removeprefix('head')}"
    page = (directory / REPORT).read_text(encoding="utf-8")
    assert ">answer (nats)</th>" in page
    assert "KL_mapped</span>" not in page


def test_the_report_is_one_safe_file(finished):
    """Nothing is fetched, and the study's name is text wherever it stands."""
    directory, _ = finished
    page = (directory / REPORT).read_text(encoding="utf-8")
    assert not re.search(r"""<(script|link|img)[^>]*\b(src|href)=""", page)
    assert "<maps>" not in page.replace("\\u003cmaps\\u003e", "")
    assert "strengths &amp; &lt;maps&gt;" in page


def test_the_report_has_the_answer_first_and_the_rest_folded(study, finished):
    """A headline, a reason a sweep, tiles and a linked table; every layer is folded; no white."""
    page = (finished[0] / REPORT).read_text(encoding="utf-8")
    shown, folded = page[page.index("<main") :].split('<details class="part">', 1)
    assert "<h2" in shown
    assert shown.count("<li>") == len(study.cells)
    assert 0 < shown.count('class="tile"') <= 3
    for cell in study.cells:
        assert f'<a href="cells/{cell.name}/">{cell.name}</a>' in shown
    assert "Every layer" in folded
    assert ':root[data-colours="dark"]' in page
    assert "#fff" not in page.split("</style>")[0].split('[data-colours="dark"]')[1].lower()


def test_a_finished_study_measures_nothing_again(study, finished, monkeypatch):
    """Running it again writes the same report without an engine."""

    def refuse(*_arguments, **_settings):
        raise AssertionError("a finished cell was measured again")

    monkeypatch.setattr(RowEngine, "effects", refuse)
    directory, said = finished
    before = (directory / ROWS).read_bytes()
    assert run_study_file(study, directory) == said
    assert (directory / ROWS).read_bytes() == before


def test_shares_of_a_study_merge_into_the_same_report(study, finished, tmp_path):
    """Three shares of four sweeps, out of order; what is missing before the last one is said."""
    for shard in ("3/3", "1/3"):
        run_study_file(study, tmp_path, Many(shard=shard))
    first = study.cells[0].directory(tmp_path)
    assert (first / "layers.json").exists(), "a sweep that a share holds as a whole is finished"
    with pytest.raises(UserError, match=r"--shard 2/3 again"):
        merge(tmp_path)
    run_study_file(study, tmp_path, Many(shard="2/3"))
    assert merge(tmp_path) == finished[1]
    assert (tmp_path / ROWS).read_bytes() == (finished[0] / ROWS).read_bytes()


def test_a_sweep_that_no_share_began_is_named(study, tmp_path):
    """A merge says which one it is."""
    run_study_file(study, tmp_path, Many(shard="4/4"))
    with pytest.raises(UserError, match=r"'on_disk_a0.3_procrustes_scaled' was not begun"):
        merge(tmp_path)


def test_another_study_in_the_same_folder_is_refused(pair_table, finished, tmp_path):
    """Cells that would be left over say that the folder is another study's."""
    other = read_study(written("alphas = [0.9]\n" + pair_table, tmp_path))
    with pytest.raises(UserError, match="another study"):
        run_study_file(other, finished[0])


def test_the_plan_counts_and_estimates_without_writing(study, tmp_path, monkeypatch, capsys):
    """Sweeps, pieces, model loads, seconds and disk; nothing is written."""
    monkeypatch.chdir(tmp_path)
    text = plan_text(study)
    # A layer has 8 heads, up to 3 pairs of heads, all and none: thrice into the tuned model, once
    # into base, 32 to a piece. All layers at once are a piece of either model.
    n_pieces = 4 * (2 * (2 + 1) + 2)
    assert f"4 sweeps of 1 pairs, {n_pieces} pieces, 8 model loads" in text
    assert re.search(r"about [\d,]+ device-seconds", text)
    assert re.search(r"about [\d.]+ MiB", text)
    assert f"compared by {', '.join(COMPARED)}; single heads ranked by delta" in text
    assert list(tmp_path.iterdir()) == []
    path = written(study.text, tmp_path)
    monkeypatch.setattr(sys, "argv", ["rq4lens", "study", str(path), "--plan"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"{n_pieces} pieces" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


def test_the_planned_disk_is_enough_and_not_twice_too_much(study, finished):
    """Conditions, maps and activations of the finished study; zeros take less than planned."""
    planned = float(re.search(r"about ([\d.,]+) MiB", plan_text(study))[1]) * 2**20
    files = [
        path
        for folder in ("conditions", "maps", "activations")
        for path in (finished[0] / "cells").glob(f"*/{folder}/*")
    ]
    assert 1 <= planned / sum(path.stat().st_size for path in files) <= 1.5


def test_the_estimate_follows_the_machine(study, monkeypatch):
    """Ten times slower constants give about ten times the seconds, loading aside."""

    def seconds(factor):
        constants = (1e-2, 1e-9, 1e-2, 1e-8, 1e-6)
        machine = Machine(*(factor * each for each in constants))
        monkeypatch.setattr(Machine, "calibrated", lambda *_: machine)
        return float(re.search(r"about ([\d,]+) dev", plan_text(study))[1].replace(",", ""))

    slow, fast = seconds(10_000), seconds(1000)
    assert slow == pytest.approx(10 * fast, rel=0.05)


def test_models_of_different_depth_are_shown_by_relative_depth():
    """The last layer of each lies at 1; of equal depth, layers keep their numbers."""

    def row(cell, layer, n_layers):
        ends = None if layer == 0 else Interval(0.05 * layer, 0.2 * layer)
        values = {"delta": Estimate(0.1 * layer, ends, None if ends else "it is 0")}
        values |= {"KL_raw": Estimate(0.2), "drop_pct": undefined("made up")}
        return CellRow(cell, layer, n_layers, values, None, None, False)

    metrics = [METRICS[name] for name in ("delta", "KL_raw", "drop_pct")]
    deep, flat = ([row(str(n), layer, n) for layer in range(n)] for n in (5, 3))
    figure = study_layers([*deep, *flat], ["setting"], metrics)
    assert [trace.x[-1] for trace in figure.data] == [1.0, 1.0]
    assert list(study_layers(deep, ["setting"], metrics).data[0].x) == [0, 1, 2, 3, 4]
    assert list(figure.data[1].error_y.array) == [None, pytest.approx(0.1), pytest.approx(0.2)]


def test_a_main_job_is_added_to_a_cell_by_its_own_settings(finished, tmp_path):
    """The settings of each cell lie in its folder, for `rq4lens run` to take them from there."""
    (own,) = (finished[0] / "cells").glob("*a0.6_mean_shift*")
    copy = shutil.copytree(own, tmp_path / "cell")
    config = read_config(copy / "cell.json").updated(layer=1, control_layer=2, analysis="grid")
    assert (config.patching.alpha, config.patching.map_kind) == (0.6, "mean_shift")
    store = json.loads((run_job(config, copy).directory / "run.json").read_text())["store"]
    assert store["reused"] > store["computed"]


def test_a_study_of_no_pairs_is_said(tmp_path):
    """The sentence names what is missing."""
    path = tmp_path / "study.toml"
    path.write_text('name = "empty"')
    with pytest.raises(UserError, match="pairs is missing"):
        read_study(path)
