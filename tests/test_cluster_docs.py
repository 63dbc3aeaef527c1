"""Scripts, study files and commands of the documentation are ones that work."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from rq4lens.analysis.structure.layers import COMPARED, METRICS
from rq4lens.cli import app
from rq4lens.studies.file import read_study

PAGE = Path(__file__).parent.parent / "docs" / "cluster.md"


def blocks(language):
    """The code blocks of the page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text("utf-8"), re.S | re.M)


def lines():
    """Every command of the package on the page, continued lines joined."""
    text = "\n".join([*blocks("sh"), *blocks("bash")]).replace("\\\n", " ")
    return re.findall(r"^\s*rq4lens (.+)$", text, re.M)


@pytest.mark.parametrize("script", blocks("bash"))
def test_scripts_are_valid_bash(script):
    """`bash -n` reads each script without a complaint, and each stops at its first error."""
    read = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")
    assert "set -euo pipefail" in script


def test_there_is_a_script_for_each_scheduler():
    """An array of shares, and Ray inside an allocation."""
    array, inside = blocks("bash")
    assert "SLURM_ARRAY_TASK_ID" in array
    assert "ray start --head" in inside


def run_script(script, folder, **environment):
    """Run a script with stand-ins for everything that it starts; returns what it started."""
    (folder / "bin").mkdir()
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    stand_ins = {
        "scontrol": 'printf "a\\nb\\nc\\n"',
        "sleep": "true",
        "rq4lens": 'echo "rq4lens $*" >> log',
        "srun": 'echo "$*" >> log; case "$*" in *hostname*) echo "10.0.0.1 fe80::1";; esac',
    }
    for name, text in stand_ins.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-c", f"{script}\nwait"],
        cwd=folder,
        env={"PATH": path, **environment},
        check=True,
        timeout=30,
    )
    return (folder / "log").read_text().splitlines()


def test_the_array_script_runs_its_share(tmp_path):
    """Task 3 of 8 measures share 3/8."""
    ids = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_CPUS_PER_TASK": "4"}
    started = run_script(blocks("bash")[0], tmp_path, **ids)
    assert started == ["rq4lens sweep my.toml --out runs/sweep --shard 3/8"]


def test_the_ray_script_starts_a_head_and_a_worker_on_each_other_node(tmp_path):
    """With all processors of a node, one task a node, and the command at the head's address."""
    slurm = {"SLURM_JOB_NODELIST": "a,b,c", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64"}
    started = run_script(blocks("bash")[1], tmp_path, **slurm)
    (head,) = [line for line in started if "--head" in line]
    (others,) = [line for line in started if "ray start --address" in line]
    assert head.startswith("--nodes=1 --ntasks=1 --cpus-per-task=64 --nodelist=a ray start --head")
    assert "--node-ip-address=10.0.0.1 --port=20007" in head
    assert others.startswith("--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=64")
    assert "--exclude=a ray start --address=10.0.0.1:20007" in others
    (own,) = [line for line in started if "--cluster" in line]
    assert own.startswith("--overlap --nodes=1 --ntasks=1 --nodelist=a rq4lens sweep my.toml")
    assert own.endswith("--cluster 10.0.0.1:20007")


def test_study_files_can_be_read(tmp_path):
    """The example has two pairs, two strengths and two map kinds."""
    (text,) = blocks("toml")
    path = tmp_path / "study.toml"
    path.write_text(text)
    cells = read_study(path).cells
    assert len(cells) == 8
    assert cells[0].request.layers is None
    assert cells[-1].request.layers == tuple(range(20, 32))


def test_metrics_of_the_page_are_those_that_exist():
    """The table names each once, and says which are the default."""
    text = PAGE.read_text("utf-8")
    rows = re.findall(r"^\| (`.+`) \|.*\|$", text[text.index("| metric |") :], re.M)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == list(METRICS)
    assert list(METRICS)[: len(COMPARED)] == list(COMPARED)


@pytest.mark.parametrize("line", lines())
def test_commands_and_their_options_exist(line):
    """Nothing is documented that the command line does not take."""
    name, *arguments = line.partition(" #")[0].split()
    known = get_command(app).commands[name].params
    options = {option for each in known for option in each.opts}
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in options, line
