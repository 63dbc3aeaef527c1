"""Scripts, study files and commands of the documentation are ones that work."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from rq4lens.cli import app
from rq4lens.cluster.study_file import read_study

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


def test_study_files_can_be_read(tmp_path):
    """The example has two pairs, two strengths and two map kinds."""
    (text,) = blocks("toml")
    path = tmp_path / "study.toml"
    path.write_text(text)
    cells = read_study(path).cells
    assert len(cells) == 8
    assert cells[0].request.layers is None
    assert cells[-1].request.layers == tuple(range(20, 32))


@pytest.mark.parametrize("line", lines())
def test_commands_and_their_options_exist(line):
    """Nothing is documented that the command line does not take."""
    name, *arguments = line.partition(" #")[0].split()
    known = get_command(app).commands[name].params
    options = {option for each in known for option in each.opts}
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in options, line
