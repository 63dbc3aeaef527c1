"""Faults: whatever happens to a run, no number is lost or wrong, and it goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pair_on_disk import command, write_config, write_pair

from rq4lens.config import config_from, read_config
from rq4lens.disk import files
from rq4lens.errors import UserError
from rq4lens.jobs.run import run as run_job
from rq4lens.jobs.verify import verify_run
from rq4lens.patching.engines.row_engine import RowEngine
from rq4lens.patching.measured import Measurer

# Resumed and undisturbed runs compute in the same way: with one thread, as the children do.
pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("one_thread")]

NUMBERS = ("rq4_results.json", "per_prompt.parquet", "summary.txt")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def undisturbed(pair, one_thread, tmp_path_factory) -> Path:  # noqa: ARG001 - for its order
    folder = tmp_path_factory.mktemp("undisturbed")
    run_job(config_from(pair), folder)
    return folder


def numbers(folder: Path) -> dict[str, bytes]:
    """The bytes of everything a run says about the pair."""
    names = [*NUMBERS, *(path.name for path in folder.glob("single_head_*.json"))]
    analysis = json.loads((folder / "analysis.json").read_text())
    del analysis["seconds"]  # no two runs share their timings
    for row in analysis["methods"]:
        del row["seconds"]
    return {name: (folder / name).read_bytes() for name in names} | {
        "analysis.json": json.dumps(analysis).encode()
    }


def counters(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())["store"]


def records_in(folder: Path) -> int:
    return len(list((folder / "conditions").glob("*.json")))


def test_a_finished_run_measures_nothing_again(pair, undisturbed, tmp_path, monkeypatch):
    """Running a finished run again asks no engine for any effect, and writes the same bytes."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    monkeypatch.setattr(RowEngine, "effects", refuses_to_measure)
    run_job(config_from(pair), folder)
    assert numbers(folder) == numbers(undisturbed)
    assert counters(folder)["computed"] == 0
    assert counters(folder)["reused"] == records_in(undisturbed)


def refuses_to_measure(*_arguments, **_settings):
    raise AssertionError("a finished condition was measured again")


@pytest.mark.usefixtures("no_pages")
def test_fresh_measures_everything_again(pair, undisturbed, tmp_path):
    """`--fresh` uses nothing that is there, and comes to the same bytes."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    run_job(config_from(pair), folder, fresh=True)
    assert numbers(folder) == numbers(undisturbed)
    assert counters(folder)["reused"] == 0


# What lies in the directory


def every_record(folder: Path) -> list[Path]:
    return sorted((folder / "conditions").glob("*.json"))


def truncate_some(folder: Path) -> None:
    for path in every_record(folder)[::3]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_all(folder: Path) -> None:
    for path in every_record(folder):
        path.write_bytes(b"")


def one_file_for_all(folder: Path) -> None:
    content = every_record(folder)[0].read_bytes()
    for path in every_record(folder):
        path.write_bytes(content)


def damage_maps(folder: Path) -> None:
    for path in (folder / "maps").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x42")


def stale_results(folder: Path) -> None:
    for path in folder.glob("*.json"):
        path.write_text("[]")


def leftovers(folder: Path) -> None:
    for number in range(20):
        (folder / "conditions" / f".{number:032x}.tmp").write_bytes(b"{" * number)


def of_a_killed_process() -> str:
    """The name of a temporary file whose owner is gone."""
    child = subprocess.Popen(["true"])
    child.wait()
    return f".{files._machine()}-{child.pid}-{'0' * 32}.tmp"


@pytest.mark.usefixtures("no_pages")
def test_what_killed_writes_left_is_gone_after_the_run_that_resumes(pair, undisturbed, tmp_path):
    """What killed writes left in a run directory is gone after the run that resumes."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        (place / of_a_killed_process()).write_text("half a fi")
    assert len(list(folder.rglob("*.tmp"))) > 3
    run_job(config_from(pair), folder)
    assert not list(folder.rglob("*.tmp"))


def newer_foreign_files(folder: Path) -> None:
    for path in every_record(folder):
        path.with_name(f"newer_{path.name}").write_text('{"payload": {"kl_nats": [9]}}')


DAMAGED_DIRECTORIES = {
    "records cut": truncate_some,
    "records empty": empty_all,
    "one record under every name": one_file_for_all,
    "maps damaged": damage_maps,
    "results of something else": stale_results,
    "leftovers of killed writes": leftovers,
    "newer foreign files": newer_foreign_files,
    "conditions gone": lambda folder: shutil.rmtree(folder / "conditions"),
    "maps gone": lambda folder: shutil.rmtree(folder / "maps"),
    "run.json gone": lambda folder: (folder / "run.json").unlink(),
}


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("damage", DAMAGED_DIRECTORIES.values(), ids=DAMAGED_DIRECTORIES.keys())
def test_whatever_lies_in_the_directory_the_numbers_are_the_same(
    pair, undisturbed, tmp_path, damage
):
    """Damaged, stale and foreign files are set aside or ignored; the run ends in the same bytes."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    damage(folder)
    run_job(config_from(pair), folder)
    assert numbers(folder) == numbers(undisturbed)
    if foreign := list((folder / "conditions").glob("newer_*")):
        for path in foreign[1:]:
            path.unlink()
        assert not verify_run(folder, sample=0).passed  # what does not belong there is said
        foreign[0].unlink()
    assert verify_run(folder, sample=0).passed


@pytest.mark.usefixtures("no_pages")
def test_results_of_another_pair_in_the_same_directory_are_not_used(pair, undisturbed, tmp_path):
    """The trap of reporting one model's numbers as another's: a swapped pair shares no record."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    swapped = pair | {"base": pair["tuned"], "tuned": pair["base"]}
    run_job(config_from(swapped), folder, replace=True)
    assert counters(folder)["reused"] == 0
    alone = tmp_path / "alone"
    run_job(config_from(swapped), alone)
    assert numbers(folder) == numbers(alone)
    assert numbers(folder) != numbers(undisturbed)


CHANGES = {
    "alpha": {"alpha": 0.4},
    "map kind": {"map_kind": "ridge"},
    "map scope": {"map_scope": "layer"},
    "raw baseline": {"raw_baseline": "moments"},
    "direction": {"kl_direction": "clean||patched"},
    "positions": {"k_positions": 2},
    "number format": {"dtype": "float64"},
    "layer": {"layer": 2},
}


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_setting_never_meets_old_numbers(pair, undisturbed, tmp_path, change):
    """A run with another setting in an old directory equals the same run in an empty one.

    To the last bit where nothing is shared; within rounding where a condition is the same in both
    (an unchanged control layer), because it was measured among other conditions there.
    """
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    here = run_job(config_from(pair | change), folder, replace=True).grid.conditions
    alone = run_job(config_from(pair | change), tmp_path / "alone").grid.conditions
    assert list(here) == list(alone)
    allowed = 1e-6 if counters(folder)["reused"] else 0
    for cond, condition in here.items():
        np.testing.assert_allclose(condition.kl_raw_nats, alone[cond].kl_raw_nats, 0, allowed)
        np.testing.assert_allclose(condition.kl_mapped_nats, alone[cond].kl_mapped_nats, 0, allowed)
    assert verify_run(folder, sample=0).passed


@pytest.mark.usefixtures("no_pages")
def test_other_train_prompts_never_meet_old_numbers(pair, undisturbed, tmp_path):
    """Maps and matched baselines follow the train prompts: changing these changes both."""
    moments = pair | {"raw_baseline": "moments"}
    folder = tmp_path / "run"
    run_job(config_from(moments), folder)
    lines = Path(pair["prompts"]).read_text().splitlines()
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(lines[8:]))
    run_job(config_from(moments | {"prompts": str(fewer)}), folder, replace=True)
    run_job(config_from(moments | {"prompts": str(fewer)}), tmp_path / "alone")
    assert numbers(folder) == numbers(tmp_path / "alone")
    assert undisturbed.exists()


# Disks, memory, signals, clocks


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize(
    ("after", "problem"),
    [(0, 28), (1, 28), (20, 28), (39, 28), (7, 5), (12, 122)],
    ids=["at once", "first map", "half-way", "at the end", "disk broken", "quota"],
)
def test_a_full_disk_stops_with_one_sentence_and_loses_nothing(
    pair, undisturbed, tmp_path, monkeypatch, after, problem
):
    """The run says which file could not be written; with room again it ends in the same bytes."""
    folder = tmp_path / "run"
    synced = os.fsync
    calls = iter(range(10**9))

    def full(descriptor):
        if next(calls) >= after:
            raise OSError(problem, os.strerror(problem))
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=f"cannot write .*{os.strerror(problem)}"):
            run_job(config_from(pair), folder)
    assert not (folder / "run.json").exists()
    assert not list(folder.rglob("*.tmp"))
    run_job(config_from(pair), folder)
    assert numbers(folder) == numbers(undisturbed)


def test_a_really_full_disk_is_survived(pair, undisturbed, tmp_path):
    """The same on a file system of 160 kB, where mounting one is allowed."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with pytest.raises(UserError, match="No space left on device"):
            run_job(config_from(pair), small / "run")
        kept = records_in(small / "run")
        shutil.copytree(small / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert kept > 0
    run_job(config_from(pair), tmp_path / "run")
    assert counters(tmp_path / "run")["reused"] == kept
    assert numbers(tmp_path / "run") == numbers(undisturbed)


def test_a_read_only_directory_is_said(pair, tmp_path, monkeypatch):
    """Nothing can be written: one sentence, before anything is measured."""
    folder = tmp_path / "run"

    def refused(*_arguments, **_settings):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refused)
    monkeypatch.setattr(RowEngine, "effects", refuses_to_measure)
    with pytest.raises(UserError, match=r"cannot make the directory .*Read-only"):
        run_job(config_from(pair), folder)


def test_a_finished_run_on_a_read_only_disk_is_verified(undisturbed, monkeypatch):
    """Checking a run writes nothing."""

    def refused(*_arguments, **_settings):
        raise AssertionError("verify wrote something")

    for name in ("_write_synced", "set_aside", "remove_leftovers"):
        monkeypatch.setattr(files, name, refused)
    assert verify_run(undisturbed, sample=2).passed


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("at", [0, 1])
def test_out_of_memory_at_any_batch_keeps_what_is_done(
    pair, undisturbed, tmp_path, monkeypatch, at
):
    """Memory runs out in the middle of the grid; the next attempt goes on from there."""
    folder = tmp_path / "run"
    measure = Measurer._recorded
    calls = iter(range(1, 10**9))

    def exhausted(self, patches, progress, put):
        if next(calls) > at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(self, patches, progress, put)

    with monkeypatch.context() as patch:
        patch.setattr(Measurer, "_recorded", exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            run_job(config_from(pair), folder)
    kept = records_in(folder)
    assert (kept > 0) == (at > 0)
    run_job(config_from(pair), folder)
    assert counters(folder)["reused"] == kept
    assert numbers(folder) == numbers(undisturbed)


@pytest.fixture(scope="module")
def analysed(pair, one_thread, tmp_path_factory) -> Path:  # noqa: ARG001 - for its order
    """A run with its full analysis, that nothing happened to."""
    folder = tmp_path_factory.mktemp("analysed")
    run_job(config_from(pair | {"analysis": "full"}), folder)
    return folder


def chunks_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "measured").glob("*")}


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("at", [1, 5, 12])
def test_an_interrupted_analysis_goes_on_where_it_stopped(
    pair, analysed, tmp_path, monkeypatch, at
):
    """No finished chunk of head sets is measured again, and the same bytes come out."""
    config, folder = config_from(pair | {"analysis": "full"}), tmp_path / "run"
    measure, measured = Measurer._measured, []

    def watched(self, patches, progress):
        if stops and len(chunks_in(folder)) == 2 * at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        measured.append((self.experiment.split, *patches))
        return measure(self, patches, progress)

    monkeypatch.setattr(Measurer, "_measured", watched)
    stops = True
    with pytest.raises(torch.OutOfMemoryError):
        run_job(config, folder)
    kept = chunks_in(folder)
    stops = False
    run_job(config, folder)
    assert len(measured) == len(set(measured))
    assert kept.items() <= chunks_in(folder).items()
    assert chunks_in(folder) == chunks_in(analysed)
    assert numbers(folder) == numbers(analysed)


@pytest.mark.usefixtures("no_pages")
def test_damaged_head_sets_are_measured_again(pair, analysed, tmp_path):
    """A file of an analysis that was cut, emptied or exchanged is set aside; no number changes."""
    folder = shutil.copytree(analysed, tmp_path / "run")
    paths = sorted((folder / "measured").glob("*.safetensors"))
    paths[0].write_bytes(paths[0].read_bytes()[:-9])
    paths[1].write_bytes(b"")
    paths[2].write_bytes(paths[3].read_bytes())
    paths[4].with_suffix(".json").unlink()
    run_job(config_from(pair | {"analysis": "full"}), folder)
    assert numbers(folder) == numbers(analysed)
    assert len(list((folder / "measured").glob("*.damaged"))) == 3


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_jumping_clock_changes_no_number(pair, undisturbed, tmp_path, monkeypatch, jump):
    """No result is looked up or believed by its age."""
    true_time = time.time
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: true_time() + jump * (next(ticks) % 2))
    run_job(config_from(pair), tmp_path / "run")
    assert numbers(tmp_path / "run") == numbers(undisturbed)


@pytest.mark.usefixtures("no_pages")
def test_a_moved_run_directory_is_resumed(pair, undisturbed, tmp_path):
    """A run directory can be moved, even half finished, and goes on where it is."""
    moved = shutil.copytree(undisturbed, tmp_path / "far" / "away")
    for path in every_record(moved)[::2]:
        path.unlink()
    (moved / "run.json").unlink()
    run_job(config_from(pair), moved)
    assert numbers(moved) == numbers(undisturbed)
    assert counters(moved)["reused"] == records_in(undisturbed) // 2


@pytest.mark.slow
@pytest.mark.usefixtures("no_pages")
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(pair, undisturbed, tmp_path):
    """A clean stop: no traceback, exit code 130, the command to go on with, no half file."""
    config = write_config(pair, tmp_path / "c.toml")
    folder = tmp_path / "run"
    process = command("run", config, "--out", folder)
    wait_for(lambda: records_in(folder) > 0, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run was faster than the signal")
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"go on with: rq4lens run {config} --out {folder}" in said
    assert not list(folder.rglob("*.tmp"))
    run_job(config_from(pair), folder)
    assert numbers(folder) == numbers(undisturbed)


def wait_for(condition, process, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.slow
def test_two_processes_on_one_directory_and_one_of_them_killed(pair, undisturbed, tmp_path):
    """Both may work there at once; when one dies, the other ends in the same bytes."""
    config = write_config(pair, tmp_path / "c.toml")
    folder = tmp_path / "run"
    first, second = (command("run", config, "--out", folder) for _ in range(2))
    wait_for(lambda: records_in(folder) > 3, first)
    first.kill()
    first.communicate()
    _, said = second.communicate(timeout=120)
    assert second.returncode == 0, said
    assert numbers(folder) == numbers(undisturbed)
    assert verify_run(folder, sample=0).passed


# Determinism


@pytest.mark.usefixtures("no_pages")
def test_the_same_run_twice_is_the_same_bytes(pair, undisturbed, tmp_path):
    """Same seed, same machine: identical tables, whatever random numbers were drawn before."""
    torch.manual_seed(12345)
    run_job(config_from(pair), tmp_path / "run")
    assert numbers(tmp_path / "run") == numbers(undisturbed)


@pytest.mark.usefixtures("no_pages")
def test_repeating_a_run_from_its_own_record_is_the_same_bytes(pair, undisturbed, tmp_path):
    """`rq4lens run RUN/run.json` repeats the run."""
    again = read_config(undisturbed / "run.json")
    assert again == config_from(pair)
    run_job(again, tmp_path / "run")
    assert numbers(tmp_path / "run") == numbers(undisturbed)


@pytest.mark.usefixtures("no_pages")
def test_the_numerics_version_makes_old_records_unused(pair, undisturbed, tmp_path, monkeypatch):
    """After a change of the arithmetic nothing old is reused."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    on = Measurer.on.func
    another = property(lambda self: on(self) | {"numerics_version": "another"})
    monkeypatch.setattr(Measurer, "on", another)
    run_job(config_from(pair), folder)
    assert counters(folder)["reused"] == 0
