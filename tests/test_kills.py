"""The demo, killed again and again: whatever was done stays done, and no byte comes out different.

Each child is a fork of one process that has run the demo once, so that everything is imported and
the unpatched models are computed, and runs the real command line: fifty deaths and fifty resumed
runs cost little more than what they fit, patch, derive and write.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from few_prompts import few_prompts
from pair_on_disk import QUIET

from rq4lens.jobs.verify import verify_run

pytestmark = [pytest.mark.fault, pytest.mark.slow]

KILLS, PARTS = 50, 5
"""Random moments at which the demo is killed, in parts that several workers can share."""

STEPS = ("before", "half", "written", "renamed", "anywhere")
"""Before, within or after a random write; or wherever a random share of its time has passed."""

NUMBERS = ("rq4_results.json", "per_prompt.parquet", "summary.txt")

# The full analysis and the pages are written from these numbers, after them.
COMMAND = ("run", "--pair", "etiquette", "--analysis", "grid", "--resamples", "100", "--prompts")

FORKS = """
import contextlib, gc, io, json, os, signal, sys, tempfile, threading, time
import torch
import rq4lens.jobs.bench
import rq4lens.jobs.run
from rq4lens.disk import files
from rq4lens.cli import main
from rq4lens.models.catalog import load_pair
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.models.prompts.prompt_set import TokenBatch, TokenizedPrompts
from rq4lens.patching import activations, experiment

torch.set_num_threads(1)
# What only reads is done once: the models, the prompts as both read them, and what the models
# compute of these unpatched. All that is fitted, patched, derived or written is done in each run.
pair = load_pair("etiquette", prompts=sys.argv[-1])
tokens = {(side, split): pair.tokens(side, split) for side in SIDES for split in ("train", "val")}
audit = pair.audit()
ModelPair.tokens = lambda self, side, split: tokens[side, split]
ModelPair.audit = lambda self: audit
rq4lens.jobs.bench.pair_from = lambda *_, cache=None: pair
rq4lens.jobs.run.write_pages = lambda *_: None

def what(value):
    if isinstance(value, TokenizedPrompts):
        return value.fingerprint
    if isinstance(value, TokenBatch):
        return tuple(each.numpy().tobytes() for each in (value.tokens, value.rows, value.spots))
    if isinstance(value, (list, tuple)):
        return tuple(map(what, value))
    return id(value) if isinstance(value, torch.nn.Module) else repr(value)

def once(place, name):
    function, known = getattr(place, name), {}

    def known_or_new(*arguments, **settings):
        key = what([*arguments, *settings.items()])
        if key not in known:
            known[key] = function(*arguments, **settings)
        return known[key]

    setattr(place, name, known_or_new)

once(rq4lens.jobs.run, "plan_memory")
once(activations, "capture")  # of a model, its prompts, and layers
once(experiment, "make_engine")  # of a model and its prompts, whose clean pass it keeps

def demo(arguments):
    sys.argv = ["rq4lens", *arguments]
    main()

write, rename = files._write_synced, os.replace
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def die_at_a_write(moment, step):
    done = 0

    def die_if_due(name):
        nonlocal done
        if step == name:
            done += 1
            if done == moment:
                die()

    def half_written(path, data):
        die_if_due("before")
        if step == "half" and done + 1 == moment:
            path.write_bytes(data[: len(data) // 2])
        die_if_due("half")
        write(path, data)
        die_if_due("written")

    def renamed(source, target):
        rename(source, target)
        die_if_due("renamed")

    files._write_synced, os.replace = half_written, renamed

def die_after(cpu_seconds):
    def wait():
        end = time.process_time() + cpu_seconds
        while time.process_time() < end:
            time.sleep(0.001)
        die()

    threading.Thread(target=wait, daemon=True).start()

def child(arguments, moment, step):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if step == "anywhere":
        die_after(moment)
    elif step is not None:
        die_at_a_write(moment, step)
    demo(arguments)

quiet = contextlib.redirect_stdout(io.StringIO())
with tempfile.TemporaryDirectory() as folder, quiet, contextlib.suppress(SystemExit):
    demo([*sys.argv[1:], "--out", folder])
gc.freeze()  # a child need not look through what was there before it

for line in sys.stdin:
    start = sum(os.times()[2:4])
    pid = os.fork()
    if pid == 0:
        try:
            child(*json.loads(line))
        except SystemExit as ended:
            os._exit(ended.code or 0)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([code, sum(os.times()[2:4]) - start]), flush=True)
"""


@dataclass(frozen=True)
class Forks:
    """A warm process that runs the command line in a fork of itself, once per request."""

    process: subprocess.Popen
    command: tuple[str, ...]

    def run(self, folder: Path, moment: float = 0, step: str | None = None) -> tuple[int, float]:
        """Run the demo there, and let it die; returns how it ended and its CPU seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = json.dumps([[*self.command, "--out", str(folder)], moment, step])
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        code, cpu_seconds = json.loads(self.process.stdout.readline())
        return code, cpu_seconds


@contextmanager
def forks(command: tuple[str, ...]) -> Iterator[Forks]:
    """The warm process, for as long as it is needed."""
    pipe, environment = subprocess.PIPE, {**QUIET, "TMPDIR": str(Path(command[-1]).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", FORKS, *command],
        env=environment,
        stdin=pipe,
        stdout=pipe,
        text=True,
    ) as process:
        yield Forks(process, command)
        process.stdin.close()


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Iterator[Forks]:
    """The demo on fewer prompts: no fewer files are written, and none is written otherwise."""
    prompts = few_prompts(tmp_path_factory.mktemp("prompts"), train=80, val=12)
    with forks((*COMMAND, str(prompts))) as running:
        yield running


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to."""

    numbers: dict[str, bytes]
    n_records: int
    cpu_seconds: float


@pytest.fixture(scope="module")
def undisturbed(warm, tmp_path_factory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("demo")
    code, cpu_seconds = warm.run(folder)
    assert code == 0
    return Undisturbed(numbers(folder), records_in(folder), cpu_seconds)


def numbers(folder: Path) -> dict[str, bytes]:
    """The bytes of everything the demo says about its pair."""
    names = [*NUMBERS, *(path.name for path in folder.glob("single_head_*.json"))]
    return {name: (folder / name).read_bytes() for name in names}


def counters(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())["store"]


def records_in(folder: Path) -> int:
    return len(list((folder / "conditions").glob("*.json")))


@pytest.mark.parametrize("part", range(PARTS))
def test_the_demo_killed_at_a_random_moment_goes_on_to_the_very_same_bytes(
    part, warm, undisturbed, tmp_path, record_property
):
    """The demo, killed at a random write or anywhere: the resumed run is byte-identical.

    Finished conditions are not measured again: what was stored before the kill counts as reused.
    """
    draw = random.Random(part)
    # As many writes as conditions, maps, kept activations and results make together.
    n_writes = undisturbed.n_records + 8
    for n in range(KILLS // PARTS):
        folder, step = tmp_path / f"run{n}", STEPS[n % len(STEPS)]
        moment = (
            draw.uniform(0, undisturbed.cpu_seconds)
            if step == "anywhere"
            else draw.randint(1, n_writes)
        )
        killed(warm, folder, moment, step)
        kept = records_in(folder)
        assert warm.run(folder)[0] == 0
        assert numbers(folder) == undisturbed.numbers
        assert counters(folder)["reused"] == kept
        assert counters(folder)["computed"] == undisturbed.n_records - kept
        assert counters(folder)["set_aside"] == []
        assert not list(folder.rglob("*.tmp"))
    assert verify_run(folder, sample=0).passed
    record_property("kills", KILLS // PARTS)


def killed(warm: Forks, folder: Path, moment: float, step: str) -> None:
    """Run the demo there and see it die; a run that was over before its time dies sooner."""
    while (code := warm.run(folder, moment, step)[0]) == 0:
        assert step == "anywhere", (step, moment)
        shutil.rmtree(folder)
        moment /= 2
    assert code == -signal.SIGKILL, (step, moment)
