"""The notebooks: they run, they are what their scripts say, and they use what is public."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jupytext
import nbformat
import pandas as pd
import pytest

import rq4lens as rq
from rq4lens.models import catalog
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.validation.scenarios import SCENARIOS

SCRIPTS = sorted((Path(__file__).parent.parent / "notebooks").glob("[0-9]*.py"))
LARGEST_BYTES = 1_500_000
FEW = {"train": 160, "val": 32, "neutral": 16}
"""Prompts of the built-in pair that are enough to run a notebook; its outputs are of all."""

each_notebook = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def notebook_of(script: Path) -> nbformat.NotebookNode:
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def code_cells(script: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook_of(script).cells if cell.cell_type == "code"]


def dotted(node: ast.AST) -> list[str]:
    """``rq.figures.head_plane`` as its names; empty for anything that is no plain dotted name."""
    if isinstance(node, ast.Name):
        return [node.id]
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else []
    return [*inner, node.attr] if inner else []


def test_the_eight_notebooks_are_there():
    """Quickstart, ranking, coverage, layers, own pair, planted truth, one head, answers."""
    assert [script.name[0] for script in SCRIPTS] == list("12345678")


@each_notebook
def test_notebook_and_script_are_one(script):
    """Cell by cell the notebook holds what its script holds."""
    of_script = [(cell.cell_type, cell.source) for cell in jupytext.read(script).cells]
    assert [(cell.cell_type, cell.source) for cell in notebook_of(script).cells] == of_script


@each_notebook
def test_a_notebook_is_short_and_says_what_one_will_see(script):
    """A title and what one will see come first; there are fewer than 15 code cells."""
    assert 0 < len(code_cells(script)) < 15
    first = notebook_of(script).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "You will see" in first.source


@each_notebook
def test_the_first_cell_installs_the_package_on_colab_alone(script, tmp_path, monkeypatch):
    """Elsewhere it starts nothing; on Colab it installs this package by its name."""
    started = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: started.append(command))
    first = tmp_path / "first.py"
    first.write_text(code_cells(script)[0].source)
    runpy.run_path(str(first))
    assert started == []
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    runpy.run_path(str(first))
    assert started[0][1:4] == ["-m", "pip", "install"]
    assert "rq4lens" in started[0]


@each_notebook
def test_outputs_are_committed_whole(script):
    """Every cell was run once, in order, without an error or a warning, and shows a picture."""
    cells = code_cells(script)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "stream",
        "execute_result",
        "display_data",
    }
    assert {output.name for output in outputs if output.output_type == "stream"} <= {"stdout"}
    shown = {kind for output in outputs for kind in output.get("data", {})}
    assert "image/png" in shown
    assert shown <= {"image/png", "text/plain", "text/html"}


@each_notebook
def test_a_notebook_is_small_and_names_no_machine(script):
    """It loads on a code host, and no path of the machine that ran it stands in its outputs."""
    assert script.with_suffix(".ipynb").stat().st_size < LARGEST_BYTES
    texts = [
        str(output.get("text", "")) + str({k: v for k, v in output.get("data", {}).items()
                                           if k != "image/png"})
        for cell in code_cells(script) for output in cell.outputs
    ]  # fmt: skip
    for place in ("tmp", "home", "root", "site-packages"):
        assert not any(f"/{place}/" in text for text in texts)


@each_notebook
def test_a_notebook_uses_only_what_is_public(script):
    """It imports `rq4lens as rq` and nothing below; every name it takes from there is exported."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    imported = [
        (alias.name, alias.asname)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if "rq4lens" in f"{getattr(node, 'module', '')}.{alias.name}"
    ]
    assert imported == [("rq4lens", "rq")]
    taken = [name for node in ast.walk(tree) if (name := dotted(node))[:1] == ["rq"]]
    for _, first, *rest in (name for name in taken if len(name) > 1):
        assert first in rq.__all__
        if rest and first in ("figures", "validate"):
            assert not rest[0].startswith("_")
            assert hasattr(getattr(rq, first), rest[0])


@pytest.fixture
def few_prompts(monkeypatch):
    """The built-in pair with the first prompts of each split, and planted pairs of some kinds."""
    every = catalog.prompts_of

    def few(source):
        prompts = every(source)
        if not catalog.is_builtin(source):
            return prompts
        return PromptSet(tuple(p for s, n in FEW.items() for p in prompts.split(s).prompts[:n]))

    def one_of_some(base, prompts, settings):
        return validate(base, prompts, replace(settings, pairs=1, scenarios=SCENARIOS[::3]))

    monkeypatch.setattr(catalog, "prompts_of", few)
    validate = rq.validate
    monkeypatch.setattr(rq, "validate", one_of_some)


@each_notebook
@pytest.mark.usefixtures("few_prompts", "tokenized_once")
def test_a_notebook_runs(script, tmp_path, monkeypatch):
    """Every notebook runs from start to end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pd.option_context("display.max_colwidth", 50):
        runpy.run_path(str(script))
