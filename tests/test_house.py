"""The habits of the house: small, each idea in one file, settings in one object."""

import ast
import importlib
import inspect
from collections import Counter
from pathlib import Path

import pytest

import rq4lens.config
from rq4lens.config import Settings

PACKAGE = Path(rq4lens.config.__file__).parent

MOST_LINES = 34_580
MOST_FILES = 153
FEWEST_LINES_OF_A_FILE = 60
MOST_FILES_OF_A_FOLDER = 12
MOST_PARAMETERS = 6

SMALL_WITH_REASON = {
    "__init__.py": "the public names, which stand in its stub",
    "__main__.py": "`python -m rq4lens`",
    "jobs/progress.py": "what every job reports to, without importing a job",
}
"""Files below the usual length, and why each is a file."""

ON_THE_COMMAND_LINE = {"cli.py", "screen/options.py"}
"""Parameters of these functions are options of commands."""

KERNELS = {"patching/engines/kernels.py"}
"""A kernel takes pointers and strides one by one."""


def files():
    """Every file of the package, by its path from there."""
    return {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def n_lines(path):
    return path.read_text(encoding="utf-8").count("\n")


def functions():
    """Every function of the package, nested ones and methods included, with its file."""
    for name, path in files().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, node


def settings_names():
    """The parts of a configuration, and every other class of settings."""
    found, left = {"RunConfig"}, [Settings]
    for name, path in files().items():
        if "(Settings)" in path.read_text(encoding="utf-8"):
            module = ".".join(("rq4lens", *Path(name).with_suffix("").parts))
            importlib.import_module(module)
    while left:
        kind = left.pop()
        found.add(kind.__name__)
        left += kind.__subclasses__()
    return found


def parameters(node):
    """The parameters of a function that are not its receiver."""
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [each for each in named if each.arg not in {"self", "cls"}]


def is_settings(parameter, names):
    """Whether a parameter is one settings object, or None in its place."""
    if parameter.annotation is None:
        return False
    inside = {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(parameter.annotation)
        if isinstance(node, ast.Name | ast.Attribute)
    }
    return bool(inside & names)


def test_the_package_is_small():
    """A heavier house needs a reason, and a change of this number."""
    total = sum(map(n_lines, files().values()))
    assert total <= MOST_LINES
    n_files = len(files())
    assert n_files <= MOST_FILES


def test_no_file_is_a_splinter():
    """A file is an idea. One that is shorter than an idea is named here with its reason."""
    short = {
        name
        for name, path in files().items()
        if n_lines(path) < FEWEST_LINES_OF_A_FILE and not name.endswith("/__init__.py")
    }
    assert short - set(SMALL_WITH_REASON) == set()


def test_a_reason_is_for_a_file_that_is_there_and_small():
    """A reason that no file needs any more goes."""
    there = {name for name, path in files().items() if n_lines(path) < FEWEST_LINES_OF_A_FILE}
    assert set(SMALL_WITH_REASON) - there == set()


def test_no_folder_is_a_crowd():
    """More than a dozen files at one level are two rooms; an `__init__` of one line is no file."""
    counts = Counter(str(Path(name).parent) for name, path in files().items() if n_lines(path) > 1)
    assert {name: n for name, n in counts.items() if n > MOST_FILES_OF_A_FOLDER} == {}


def test_functions_take_few_things_beside_settings_objects():
    """Six parameters, and what decides how it is done in objects beside them."""
    names = settings_names()
    crowded = []
    for file, node in functions():
        if file in ON_THE_COMMAND_LINE | KERNELS:
            continue
        given = parameters(node)
        beside = sum(is_settings(each, names) for each in given)
        if len(given) - beside > MOST_PARAMETERS:
            crowded.append(f"{file}:{node.name} has {len(given)} parameters")
    assert crowded == []


def test_settings_are_named():
    """Whatever a function hands on has a name and a type; `**settings: Any` has neither."""
    found = [
        f"{file}:{node.name} takes **{node.args.kwarg.arg}"
        for file, node in functions()
        if file not in ON_THE_COMMAND_LINE
        and node.args.kwarg is not None
        and node.args.kwarg.annotation is not None
        and ast.unparse(node.args.kwarg.annotation) == "Any"
        and node.args.kwarg.arg in {"settings", "options", "kwargs"}
    ]
    assert found == []


@pytest.mark.parametrize("part", ["Patching", "Place", "Reading", "Effort", "RunConfig"])
def test_parts_are_known_as_settings(part):
    """The rule above sees the parts of the configuration."""
    assert part in settings_names()
    assert inspect.isclass(getattr(rq4lens.config, part))
