"""Shares of a run and of a sweep, killed and repeated, end in the bytes of a single process."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pair_on_disk import QUIET, without_stages, write_config, write_pair

from rq4lens.cli import main
from rq4lens.cluster.many import Share, Sharing
from rq4lens.cluster.pieces import PIECES, Job, Request, read_job
from rq4lens.cluster.shards import merge_job, run_shard
from rq4lens.config import config_from
from rq4lens.disk.run import JOB
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.run import run as run_job
from rq4lens.jobs.sweep import sweep_layers
from rq4lens.patching.engines.row_engine import RowEngine

# Shares and the single process compute in the same way: with one thread each.
pytestmark = pytest.mark.usefixtures("one_thread", "no_pages")

RESULTS = {
    "run": ("rq4_results.json", "per_prompt.parquet", "summary.txt", "analysis.json"),
    "sweep": ("layers.json", "layers_per_prompt.parquet"),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A pair whose grid has several pieces per layer."""
    pair = write_pair(tmp_path_factory.mktemp("pair"))
    return pair | {"k": [1, 2, 3, 4], "random_seeds": list(range(16))}


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory, one_thread):  # noqa: ARG001 - for its order
    """The directories of a run and of a sweep by a single process."""
    config = config_from(settings)
    folders = {name: tmp_path_factory.mktemp(name) for name in RESULTS}
    run_job(config, folders["run"])
    sweep_layers(config, folders["sweep"])
    return folders


def results(folder: Path, command_name: str) -> dict[str, bytes]:
    found = {name: (folder / name).read_bytes() for name in RESULTS[command_name]}
    if "analysis.json" in found:
        analysis = json.loads(found["analysis.json"])
        del analysis["seconds"]  # the one thing in it that no two runs share
        found["analysis.json"] = json.dumps(analysis).encode()
    return found


COMPARED = 1
"""The record of how well the two models can be compared, which the merge makes."""

# Each share is a process of its own, forked from one that has everything imported.
SHARES = """
import os, signal, sys
from pathlib import Path
import torch
from rq4lens.cluster.many import Share, Sharing
from rq4lens.cluster.pieces import Request
from rq4lens.cluster.shards import run_shard
from rq4lens.config import read_config
from rq4lens.disk.store import Store

torch.set_num_threads(1)

def share(text, writes):
    write, done = Store._write, 0

    def write_or_die(self, path, record):
        nonlocal done
        done += 1
        if done == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, path, record)

    Store._write = write_or_die
    request = Request(command, read_config(Path(config)))
    run_shard(request, Path(folder), Sharing(Share.parse(text), divide))

for line in sys.stdin:
    config, command, folder, divide, shares = line.rstrip().split("\t")
    children = []
    for each in shares.split():
        text, _, writes = each.partition(":")
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr
            share(text, int(writes or 0))
            os._exit(0)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(*ends, flush=True)
"""


@pytest.fixture(scope="module")
def run_shares():
    """Runs shares as ``I/N`` or ``I/N:W`` (killed at write W), those of one call at once."""
    server = subprocess.Popen(
        [sys.executable, "-c", SHARES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=QUIET,
        text=True,
    )

    def run(config: Path, command_name: str, folder: Path, divide: str, shares: str) -> str:
        print(config, command_name, folder, divide, shares, sep="\t", file=server.stdin, flush=True)
        return server.stdout.readline().strip()

    yield run
    server.communicate()
    assert server.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "divide", "killed"),
    [
        ("run", "conditions", "4/4:20"),
        ("run", "prompts", "4/4:3"),
        ("sweep", "conditions", "4/4:40"),
        ("sweep", "prompts", "4/4:6"),
    ],
)
def test_shares_in_any_order_killed_and_repeated_are_the_single_process(
    name, divide, killed, settings, alone, run_shares, tmp_path
):
    """Four shares, shuffled, two at a time, one of them twice and one killed half-way: same bytes.

    So it is with pieces of the conditions and with pieces of the prompts. Before the killed share
    is run again the merge says which one is missing; after the merge nothing was measured that the
    shares had measured already.
    """
    config, folder = write_config(settings, tmp_path / "c.toml"), tmp_path / "shared"
    todo = {f"3/4 {killed}": f"0 {-signal.SIGKILL}", "1/4": "0", "3/4 2/4": "0 0"}
    for shares, ended in todo.items():
        assert run_shares(config, name, folder, divide, shares) == ended
    assert len(read_job(folder).prompt_parts) == {"conditions": 0, "prompts": 3}[divide]
    with pytest.raises(UserError, match=r"run --shard 4/4 again"):
        merge_job(folder)
    assert run_shares(config, name, folder, divide, "4/4") == "0"
    kept = len(list((folder / "conditions").iterdir()))
    merge_job(folder)
    assert results(folder, name) == results(alone[name], name)
    every = len(list((alone[name] / "conditions").iterdir()))
    assert len(list((folder / "conditions").iterdir())) == every
    n_top = 4 * len(settings["k"]) * len(read_job(folder).layers)
    assert every - n_top - COMPARED <= kept <= every


@pytest.fixture(scope="module")
def shared(settings, tmp_path_factory):
    """A run directory in which one of two shares is done."""
    folder = tmp_path_factory.mktemp("shared")
    run_shard(Request("run", config_from(settings)), folder, Sharing(Share.of(1, 2)))
    return folder


def test_a_finished_share_measures_nothing_again(settings, shared, monkeypatch):
    """Running it again asks no engine for any effect, and says what is still missing."""

    def refuse(*_arguments, **_settings):
        raise AssertionError("a finished piece was measured again")

    monkeypatch.setattr(RowEngine, "effects", refuse)
    said = run_shard(Request("run", config_from(settings)), shared, Sharing(Share.of(1, 2)))
    assert "0 pieces measured" in said
    assert "still missing" in said


def test_missing_pieces_are_named(shared):
    """The sentence names their layer, conditions and prompts, and the shares to run again."""
    n = len(read_job(shared).pieces())
    piece = r"layer 1 of tuned from raw of [\d,-]+ to \w+ of [\w,-]+ on 4 prompts from 'p\d+'"
    said = rf"{n - n // 2} of {n} .*{piece}.*--shard 2/2 again"
    with pytest.raises(UserError, match=said):
        merge_job(shared)


@pytest.fixture(scope="module")
def divided(settings, tmp_path_factory):
    """A run directory whose pieces, of four prompts each, are all done."""
    folder = tmp_path_factory.mktemp("divided")
    run_shard(Request("run", config_from(settings)), folder, Sharing(Share.of(1, 1), "prompts"))
    return folder


def copied(folder: Path, tmp_path: Path) -> tuple[Path, Job, Store]:
    """The directory of shares again, its job, and its marks."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    return copy, read_job(copy), Store(copy / PIECES)


def test_a_lost_part_of_the_prompts_is_measured_again(settings, divided, alone, tmp_path):
    """Without one part, the merge says whose prompts are missing; measured again, nothing is."""
    folder, job, marks = copied(divided, tmp_path)
    lost, n = job.pieces()[7], len(job.pieces())
    for path in (marks.path(lost), marks.path(lost.whole), *(folder / "conditions").iterdir()):
        path.unlink()
    with pytest.raises(UserError, match=rf"1 of {n} .*on 4 prompts from '{lost.prompts[0]}'"):
        merge_job(folder)
    said = run_shard(Request("run", config_from(settings)), folder, Sharing(Share.of(1, 1)))
    assert said.startswith(f"share 1/1: 1 pieces measured, {n - 1} were there already")
    merge_job(folder)
    assert results(folder, "run") == results(alone["run"], "run")


def test_parts_are_the_batches_of_every_engine(settings, tmp_path):
    """Through plain hooks and at two positions, joined parts are a single process's bytes too."""
    config = config_from({**settings, "random_seeds": [0], "engine": "hooks", "k_positions": 2})
    request = Request("sweep", config, (1,))
    sweep_layers(config, tmp_path / "alone", [1])
    for shard in (Share.of(2, 2), Share.of(1, 2)):
        run_shard(request, tmp_path / "shared", Sharing(shard, "prompts"))
    merge_job(tmp_path / "shared")
    assert results(tmp_path / "shared", "sweep") == results(tmp_path / "alone", "sweep")


def test_parts_that_nobody_joined_are_joined_by_the_merge(divided, alone, tmp_path):
    """Two shares that end at once can each miss the other's last part: nothing is lost by it."""
    folder, job, marks = copied(divided, tmp_path)
    before = {path.name: path.read_bytes() for path in (folder / "conditions").iterdir()}
    for path in (*map(marks.path, job.wholes()), *(folder / "conditions").iterdir()):
        path.unlink()
    merge_job(folder)
    computed = json.loads((folder / "run.json").read_text())["store"]["computed"]
    assert computed <= 4 * len(job.request.config.patching.k) + COMPARED
    after = {path.name: path.read_bytes() for path in (folder / "conditions").iterdir()}
    assert {name: after[name] for name in before} == before
    assert results(folder, "run") == results(alone["run"], "run")


def test_parts_of_different_maps_are_never_joined(divided, tmp_path):
    """A part that another machine measured with a map of its own is measured again."""
    folder, job, marks = copied(divided, tmp_path)
    piece = job.pieces()[0]
    part = marks.get(piece)
    marks.put(piece, {**part, "keys": ["0" * 64, *part["keys"][1:]]})
    marks.path(piece.whole).unlink()
    with pytest.raises(UserError, match=f"1 of {len(job.pieces())} pieces are missing"):
        merge_job(folder)
    assert marks.get(piece) is None


def test_a_job_whose_parts_lack_a_prompt_is_one_sentence(settings, divided, tmp_path):
    """A prompt that nobody would measure is no prompt that may be left out."""
    folder, _, _ = copied(divided, tmp_path)
    record = json.loads((folder / JOB).read_text())
    del record["prompt_parts"][0][0]
    (folder / JOB).write_text(json.dumps(record))
    with pytest.raises(UserError, match="do not hold each prompt once"):
        run_shard(Request("run", config_from(settings)), folder, Sharing(Share.of(1, 1)))


def test_shares_of_another_job_are_refused(settings, shared):
    """Another alpha, or other prompts, would mix two results: the sentence names the difference."""
    second = Sharing(Share.of(2, 2))
    with pytest.raises(UserError, match=r"another job \(alpha differ\)"):
        run_shard(Request("run", config_from({**settings, "alpha": 0.7})), shared, second)
    with pytest.raises(UserError, match="command"):
        run_shard(Request("sweep", config_from(settings)), shared, second)


def test_a_lost_condition_is_measured_by_the_merge(settings, alone, tmp_path):
    """Marks are no results: a condition that was lost after its piece was done is made again."""
    request = Request("run", config_from(settings))
    run_shard(request, tmp_path, Sharing(Share.of(1, 1)))
    lost = sorted((tmp_path / "conditions").iterdir())[::7]
    for path in lost:
        path.unlink()
    merge_job(tmp_path)
    assert results(tmp_path, "run") == results(alone["run"], "run")
    assert json.loads((tmp_path / "run.json").read_text())["store"]["computed"] >= len(lost)


def test_merging_a_folder_without_shares_is_one_sentence(tmp_path):
    """It says which commands write shares."""
    with pytest.raises(UserError, match="holds no shares"):
        merge_job(tmp_path)


def test_a_damaged_job_is_one_sentence(shared, tmp_path):
    """It says how to go on."""
    shutil.copytree(shared / PIECES, tmp_path / PIECES)
    record = json.loads((shared / JOB).read_text())
    del record["n_heads"]
    (tmp_path / JOB).write_text(json.dumps(record))
    with pytest.raises(UserError, match="run one share again"):
        merge_job(tmp_path)


def test_a_job_file_cannot_let_code_run(shared):
    """Whether a checkpoint may run its own code is decided on the command line alone."""
    path = shared / JOB
    before = path.read_text()
    record = json.loads(before)
    record["config"]["trust_remote_code"] = True
    path.write_text(json.dumps(record))
    assert read_job(shared).request.config.pair.trust_remote_code is False
    path.write_text(before)


def test_numbers_of_another_kind_of_device_are_not_mixed(settings, tmp_path, monkeypatch):
    """Shares measured on a GPU are merged on one: elsewhere all would be measured again."""
    run_shard(Request("run", config_from(settings)), tmp_path, Sharing(Share.of(1, 1)))
    monkeypatch.setattr("rq4lens.cluster.shards.kind_of_device", lambda _: "cuda")
    with pytest.raises(UserError, match="merge on a machine with cpu"):
        merge_job(tmp_path)


def said_by(arguments, monkeypatch, capsys):
    """Exit code and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["rq4lens", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, without_stages(capsys.readouterr().err)


def test_missing_shares_end_the_command_with_code_2(shared, monkeypatch, capsys):
    """`rq4lens merge` says what is missing in one sentence on stderr."""
    code, said = said_by(["merge", shared], monkeypatch, capsys)
    assert code == 2
    assert said.startswith("rq4lens: ")
    assert "pieces are missing" in said


def test_shares_need_a_folder_to_meet_in(settings, tmp_path, monkeypatch, capsys):
    """`sweep --shard` without `--out` is refused before anything is loaded."""
    config = write_config(settings, tmp_path / "c.toml")
    code, said = said_by(["sweep", config, "--shard", "1/2"], monkeypatch, capsys)
    assert code == 2
    assert "--out DIR" in said
