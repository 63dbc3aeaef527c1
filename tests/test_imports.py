"""The rooms of the package: data flows one way, and so do imports."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rq4lens"

FOUNDATION = {"errors", "heads", "results", "config", "disk"}
"""Plain numbers, settings and files: they know nothing of models."""

MAY_IMPORT = {
    "figures": {"analysis"},
    "analysis": {"patching", "models"},
    "patching": {"models"},
    "models": set(),
    **{module: set() for module in FOUNDATION},
}
"""What each room may import beside itself and the foundation. What is not listed here, such as the
main job and the command line, sees all rooms and is seen by none."""


def modules():
    """Every module of the package by its dotted name; a package is the name of its folder."""
    return {
        ".".join(("rq4lens", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def named(path):
    """Every dotted name that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(path):
    """The modules of the package behind these names: the name itself, or what defines it."""
    known = modules()
    for name in named(path):
        if name in known:
            yield name
        elif name.rpartition(".")[0] in known:
            yield name.rpartition(".")[0]


def room(module):
    return module.split(".")[1] if "." in module else ""


def rooms_of(path):
    return {room(module) for module in imported(path)}


@pytest.mark.parametrize("module", [name for name in modules() if room(name) in MAY_IMPORT])
def test_imports_point_one_way(module):
    """Figures -> analysis -> patching -> models -> heads, results, errors; never back."""
    own = room(module)
    assert rooms_of(modules()[module]) <= {own} | FOUNDATION | MAY_IMPORT[own]


def test_the_rule_sees_imports():
    """The command line imports its own rooms, so an empty answer would be a broken test."""
    assert {"config", "errors", "jobs", "screen"} <= rooms_of(PACKAGE / "cli.py")
    assert rooms_of(PACKAGE / "patching" / "grid.py") == {
        *("config", "errors", "heads", "models", "patching", "results")
    }


def test_every_room_is_named():
    """A new folder has its place in the order before anything imports it."""
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    below = {*MAY_IMPORT} - {"errors", "heads", "results", "config"}
    assert folders == below | {"jobs", "screen", "studies", "cluster", "validation"}


def test_no_modules_import_each_other():
    """Modules can be put in an order in which each imports earlier ones alone."""
    graph = {
        module: set(imported(path)) - {module}
        for module, path in modules().items()
        if module != "rq4lens"  # its imports are for type checkers; its names are looked up late
    }
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("rq4lens.patching.grid") < order.index("rq4lens.jobs.run")


def test_figures_never_load_a_model():
    """Drawing a finished run needs its numbers alone."""
    figures = [path for name, path in modules().items() if room(name) == "figures"]
    for path in figures:
        roots = {name.split(".")[0] for name in named(path)}
        assert not roots & {"torch", "transformer_lens", "transformers", "safetensors"}, path


def test_drawing_loads_no_torch():
    """Looking at a finished run takes no model library, not even through other rooms."""
    code = "import sys, rq4lens.figures; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout == "False\n"


def test_a_run_loads_what_it_uses():
    """No compiler, no tracker, nothing that draws, no library of statistics for one function."""
    heavy = (
        "triton",
        "wandb",
        "plotly",
        "sklearn",
        "statsmodels",
        "scipy.stats",
        "torch._inductor.compile_fx",
    )
    code = f"import sys, rq4lens.jobs.run; print([each for each in {heavy} if each in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout == "[]\n"
