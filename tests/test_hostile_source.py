"""The package cannot run code that a file brings along: its syntax trees say so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("rq4lens", "tests", "benchmarks", "figures", "notebooks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
    "diskcache", "jsonpickle", "commands",
}  # fmt: skip
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.save", "torch.hub.load", "os.system", "os.popen", "np.load", "numpy.load",
    "pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load",
    "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
}  # fmt: skip


def offences(source: str) -> list[str]:
    """What a source has that could run a stranger's code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [n.name for n in node.names if n.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in FORBIDDEN_MODULES:
                found.append(node.module)
            found += [
                f"{node.module}.{n.name}"
                for n in node.names
                if f"{node.module}.{n.name}" in FORBIDDEN_CALLS
            ]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_BUILTINS | FORBIDDEN_CALLS or name.endswith(".read_pickle"):
                found.append(name)
            found += [f"{name}(shell)" for k in node.keywords if k.arg == "shell"]
            found += [f"{name}(allow_pickle)" for k in node.keywords if k.arg == "allow_pickle"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_run_what_a_file_brings(path):
    """No pickle, torch.load, eval, exec or shell string anywhere, by the syntax tree."""
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from dill import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "__import__('os')",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import pandas as pd\npd.read_pickle('x')",
        "def f():\n    import marshal",
    ],
)
def test_the_search_itself_finds_what_it_looks_for(source):
    """Each forbidden construct is found where it stands."""
    assert offences(source)


def test_switching_a_model_to_evaluation_is_no_offence():
    """`model.eval()` is a method, not the built-in."""
    assert offences("model.eval()\nre.compile('x')\ntorch.compile(model)") == []


def test_weights_are_read_from_safetensors_alone():
    """Checkpoints are asked for as safetensors: a pickled one is refused by the library."""
    source = (ROOT / "rq4lens" / "models" / "load" / "huggingface.py").read_text(encoding="utf-8")
    loads = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and "from_pretrained" in ast.unparse(node.func)
        and "Model" in ast.unparse(node.func)
    ]  # fmt: skip
    assert loads
    for load in loads:
        assert any(k.arg == "use_safetensors" and k.value.value is True for k in load.keywords)
