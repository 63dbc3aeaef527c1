"""The wheel: it works where the repository is not, and holds what the package reads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rq4lens

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel was installed, without its dependencies."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheel", "site"))
    shutil.copytree(
        ROOT / "rq4lens", source / "rq4lens", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    install = ["install", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    return site


def _python(site: Path, cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_wheel_works_elsewhere_built_in_pair_included(installed, tmp_path):
    """A wheel that is installed elsewhere measures the built-in pair without the repository."""
    script = (
        "import rq4lens as rq\n"
        "assert rq.__file__.startswith({site!r}), rq.__file__\n"
        "pair = rq.load_pair('etiquette')\n"
        "few = rq.Patching(k=(1,), random_seeds=(0,))\n"
        "run = rq.run_grid(pair, rq.fit_maps(pair, [1]), layer=1, settings=few)\n"
        "print(len(run.conditions), run.ranking.top(1))\n"
    ).replace("{site!r}", repr(str(installed)))
    assert _python(installed, tmp_path, "-c", script).startswith("21 (")


def test_the_wheel_holds_every_file_that_the_package_reads(installed):
    """Presets, weights, prompts and the report's own files are in the wheel."""
    kinds = {".toml", ".safetensors", ".jsonl", ".json", ".jinja", ".css", ".js", ".typed", ".pyi"}

    def data(folder: Path) -> set[Path]:
        return {p.relative_to(folder) for p in folder.rglob("*") if p.suffix in kinds}

    assert data(installed / "rq4lens") == data(ROOT / "rq4lens")


def test_what_others_are_told_of_the_package_is_true():
    """The citation has its version, and the workflows test the Pythons that it names."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rq4lens.__version__
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    for job in ("tests", "package"):
        assert jobs[job]["strategy"]["matrix"]["python"] == named
    for form in (ROOT / ".github").rglob("*.yml"):
        assert isinstance(yaml.safe_load(form.read_text()), dict)
