"""The main job on the pair in the box: its files, and that running it again changes no number."""

import json
import random
import shutil
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
from few_prompts import few_prompts
from pair_on_disk import write_pair
from tiny import FAST

from rq4lens.analysis.saved import read_run
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.config import config_from, preset, read_config
from rq4lens.disk.run import HEADS, ranking_file
from rq4lens.disk.store import read_record
from rq4lens.errors import UserError
from rq4lens.jobs.patch import patch_once
from rq4lens.jobs.run import run as run_job
from rq4lens.models.load.lens import HAS_HOOKED
from rq4lens.patching.maps.map import load_map


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The preset of the pair in the box, on fewer of its prompts and with the short analysis."""
    path = few_prompts(tmp_path_factory.mktemp("prompts"))
    return preset("etiquette").updated(
        prompts=str(path), analysis="grid", resamples=300, device="cpu"
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "demo"
    return run_job(config, directory)


def numbers(directory):
    """Every number of a run that says something about the pair."""
    table = pd.read_parquet(directory / "per_prompt.parquet")
    return table, json.loads((directory / "rq4_results.json").read_text())


def assert_same_numbers(directory, other):
    """The same rows with the same numbers, to 1e-6."""
    (table, rows), (other_table, other_rows) = numbers(directory), numbers(other)
    pd.testing.assert_frame_equal(table, other_table, atol=1e-6, rtol=0)
    assert [row["cond"] for row in rows] == [row["cond"] for row in other_rows]
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row["heads"] == other_row["heads"]
        for name in ("KL_raw_mean", "KL_mapped_mean", "delta"):
            assert row[name] == pytest.approx(other_row[name], abs=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_full_analysis_and_its_cards_work_in_half_precision(dtype, tmp_path):
    """No part of it mixes number formats: here every part runs, on the format of the models."""
    settings = write_pair(tmp_path) | {"analysis": "full", "dtype": dtype}
    run = run_job(config_from(settings), tmp_path / "run")
    assert run.run["models"]["base"]["dtype"] == dtype
    assert run.analysis.kinds
    # A bridge has no cards, and says so.
    made = list((tmp_path / "run" / HEADS).glob("*.json"))
    assert bool(made) == HAS_HOOKED
    assert (run.run["cards_reason"] is None) == HAS_HOOKED


# --- what a run leaves


def test_the_run_directory_has_the_documented_files(config, finished):
    """Results, ranking, conditions, per-prompt table, analysis, maps, summary, run, pages."""
    names = {path.name for path in finished.directory.iterdir()}
    assert names >= {
        *("rq4_results.json", ranking_file(config.patching.layer, 0.3), "conditions"),
        *("per_prompt.parquet", "analysis.json", "maps", "summary.txt", "run.json", "figures"),
        "report.html",
    }
    assert {path.name for path in (finished.directory / "figures").iterdir()} == {
        *("ranking.html", "coverage.html"),
    }
    kept = sorted(path.suffix for path in (finished.directory / "maps").iterdir())
    assert kept == [".json", ".json", ".safetensors", ".safetensors"]


def test_every_json_file_is_strict(finished):
    """No NaN or infinity stands in any of them."""
    paths = list(finished.directory.rglob("*.json"))
    assert len(paths) > 50
    for path in paths:
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_what_was_written_is_what_was_measured(finished):
    """Reading the directory gives the grid that the run returned."""
    saved = read_run(finished.directory)
    assert saved.records == finished.records
    assert to_json(saved.analysis) == json.loads((finished.directory / "analysis.json").read_text())
    assert to_json(saved.analysis) == to_json(finished.analysis)
    assert saved.grid.settings == finished.grid.settings
    for name, condition in finished.grid.conditions.items():
        assert np.array_equal(saved.grid[name].kl_raw_nats, condition.kl_raw_nats)
        assert np.array_equal(saved.grid[name].kl_mapped_nats, condition.kl_mapped_nats)
    assert (finished.directory / "summary.txt").read_text() == finished.summary


def test_the_random_sets_are_the_documented_ones(finished):
    """`sorted(random.Random(seed).sample(range(H), k))` for each k and seed of the preset."""
    for k in (1, 2, 4, 8):
        for seed in (0, 1, 2):
            heads = sorted(random.Random(seed).sample(range(16), k))
            assert list(finished.grid[f"rand{k}_s{seed}"].heads) == heads


def test_the_provenance_says_everything(config, finished):
    """Configuration, versions, fingerprints of models, prompts and maps, noise floor, timings."""
    run = json.loads((finished.directory / "run.json").read_text())
    assert run["config"]["pair"] == "etiquette"
    assert run["settings"]["split"] == "val"
    assert run["noise_floor_nats"] == finished.grid.noise_floor_nats
    assert {len(run["models"][side]["weights_fingerprint"]) for side in ("base", "tuned")} == {64}
    assert run["models"]["base"] != run["models"]["tuned"]
    assert run["prompts"]["splits"] == {"train": 160, "val": 24}
    for layer in (config.patching.layer, config.patching.control_layer):
        record = run["maps"][str(layer)]
        (path,) = (finished.directory / "maps").glob(f"*L{layer}*.safetensors")
        assert record["fingerprint"] == load_map(path).fingerprint
        assert len(record["diagnostics"]) == 16
    assert run["libraries"]["torch"]
    assert run["engine"]["name"] == FAST
    assert set(run["timings_seconds"]) >= {"load", "capture", "maps", "grid", "analysis"}


# --- running again


@pytest.mark.usefixtures("no_pages")
def test_running_again_elsewhere_gives_the_same_numbers(finished, tmp_path):
    """Deleted or moved output is made again, from the `run.json` that it left.

    The configuration that the finished run recorded is all that the second run is given.
    """
    config = read_config(finished.directory / "run.json")
    run_job(config, tmp_path / "again")
    assert_same_numbers(finished.directory, tmp_path / "again")


class Stopped(KeyboardInterrupt):
    """What Ctrl-C raises."""


def stopping_after(rows):
    """A stage that is interrupted once so many rows of the grid are done."""

    @contextmanager
    def stage(name, total=None):  # noqa: ARG001
        done = 0

        def progress(finished):
            nonlocal done
            done += finished
            if name == "grid" and done > rows:
                raise Stopped

        yield progress

    return stage


@pytest.mark.usefixtures("no_pages")
def test_an_interrupted_run_goes_on(config, finished, tmp_path):
    """What was finished before the interruption is not measured again; the numbers are the same."""
    directory = tmp_path / "run"
    with pytest.raises(Stopped):
        run_job(config, directory, stage=stopping_after(24 * 40))
    kept = len(list((directory / "conditions").glob("*.json")))
    assert 0 < kept < len(list((finished.directory / "conditions").glob("*.json")))
    assert not (directory / "run.json").exists()
    with pytest.raises(UserError, match="holds no finished run"):
        read_run(directory)
    run_job(config, directory)
    store = json.loads((directory / "run.json").read_text())["store"]
    assert store["reused"] == kept
    assert_same_numbers(finished.directory, directory)


@pytest.mark.usefixtures("no_pages")
def test_a_finished_run_is_not_measured_again(config, finished, tmp_path):
    """Running into a finished directory reuses every condition; `fresh` reuses none."""
    directory = shutil.copytree(finished.directory, tmp_path / "run")
    run_job(config, directory)
    store = json.loads((directory / "run.json").read_text())["store"]
    assert (store["computed"], store["set_aside"]) == (0, [])
    assert_same_numbers(finished.directory, directory)
    run_job(config, directory, fresh=True)
    store = json.loads((directory / "run.json").read_text())["store"]
    assert store["reused"] == 0
    assert_same_numbers(finished.directory, directory)


@pytest.mark.usefixtures("no_pages")
def test_another_alpha_in_the_same_folder_takes_nothing_over(config, finished, tmp_path):
    """A finished run is replaced only if that is asked for, and with the new run's own numbers."""
    directory = shutil.copytree(finished.directory, tmp_path / "run")
    before = (directory / "run.json").read_bytes()
    said = r"holds a finished run of other settings \(alpha 0.3 there, 0.6 here\): name another"
    with pytest.raises(UserError, match=said):
        run_job(config.updated(alpha=0.6), directory)
    assert (directory / "run.json").read_bytes() == before
    # A fresh run uses nothing of the folder, so nothing is lost unasked.
    again = config.updated(alpha=0.5)
    assert run_job(again, directory, fresh=True).grid.settings.patching.alpha == 0.5
    other = run_job(config.updated(alpha=0.6), directory, replace=True)
    store = json.loads((directory / "run.json").read_text())["store"]
    records = [read_record(path) for path in (finished.directory / "conditions").glob("*.json")]
    sources = [each.ingredients.get("patch", {}).get("source") for each in records]
    # What heads carry at strength 1, how the models compare and their weights differ know none.
    assert store["reused"] <= sum(source in {"base", "tuned"} for source in sources) + 2
    assert other.grid.full.KL_raw > 1.5 * finished.grid.full.KL_raw
    assert [path.name for path in directory.glob("single_head_*")] == [ranking_file(1, 0.6)]


# --- one condition


@pytest.mark.parametrize("engine", ["suffix", "hooks"])
def test_patch_once_is_the_same_condition(config, finished, tmp_path, engine):
    """One head set measured by itself has the numbers it has in the grid, by either engine."""
    heads = ",".join(map(str, finished.grid["top4"].heads))
    single = patch_once(config.updated(engine=engine), heads, tmp_path / "one.json")
    (expected,) = [row for row in finished.records if row.cond == "top4"]
    for name in ("KL_raw_mean", "KL_mapped_mean", "delta", "coverage_pct"):
        found, wanted = (getattr(record, name).value for record in (single.record, expected))
        assert found == pytest.approx(wanted, abs=1e-3 if name == "coverage_pct" else 1e-6)
    assert json.loads((tmp_path / "one.json").read_text()) == to_json(single.record)


# --- what cannot be run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer": None}, "no layer is named for pair 'etiquette': give one from 0 to 5"),
        ({"layer": 6}, "layer 6 does not exist"),
        ({"layer": 1, "control_layer": 1}, "layer 1 cannot be its own control"),
        ({"k": [17]}, "k 17 does not fit"),
        ({"split": "test"}, "no prompt has split 'test'"),
        ({"k_positions": 60}, "k_positions 60 does not fit"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(config, tmp_path, changes, said):
    """One sentence, and no folder is made."""
    with pytest.raises(UserError, match=said):
        run_job(config.updated(**changes), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_pair_without_prompts_is_said(tmp_path):
    """The sentence says which option is missing."""
    with pytest.raises(UserError, match="needs your prompts"):
        run_job(config_from({"base": "a", "tuned": "b", "layer": 1}), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
