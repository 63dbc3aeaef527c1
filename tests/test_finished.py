"""A run that another folder holds already: it is copied, but only if it is the same and whole."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from pair_on_disk import write_config, write_pair

from rq4lens.config import read_config
from rq4lens.jobs import finished
from rq4lens.jobs.run import run
from rq4lens.models import catalog

no_pages = pytest.mark.usefixtures("no_pages")


@dataclass
class Shared:
    """A finished run with a shared cache, and how many models were loaded since."""

    folder: Path
    settings: dict
    loads: list

    def run(self, name, **changes):
        """Run the same with some changes in a folder of that name; how many models it loaded."""
        self.loads.clear()
        path = write_config(self.settings | changes, self.folder / "run.toml")
        run(read_config(path), self.folder / name)
        return len(self.loads)

    def files(self, name):
        """All files of a run and what is in them."""
        root = self.folder / name
        return {
            path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()
        }


@pytest.fixture
def shared(tmp_path, monkeypatch):
    load, loads = catalog.load_hooked, []
    monkeypatch.setattr(catalog, "load_hooked", lambda *a, **k: loads.append(a) or load(*a, **k))
    monkeypatch.setattr(finished, "SETTLED_NS", 0)
    settings = write_pair(tmp_path) | {"cache": str(tmp_path / "cache"), "k": [1], "resamples": 100}
    shared = Shared(tmp_path, settings, loads)
    assert shared.run("first") == 2
    return shared


def test_the_same_run_is_copied_without_loading_a_model(shared):
    assert shared.run("again") == 0
    assert shared.files("again") == shared.files("first")


@no_pages
def test_without_a_shared_cache_nothing_is_copied(shared):
    del shared.settings["cache"]
    assert shared.run("again") == 2


def one_bit_of_a_weight(shared):
    path = sorted((shared.folder / "tuned").glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def a_word_of_a_prompt(shared):
    path = shared.folder / "prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1]["text"] += " " + rows[0]["text"].split()[0]
    path.write_text("\n".join(map(json.dumps, rows)))


def a_file_of_the_first_run(shared):
    path = shared.folder / "first/rq4_results.json"
    path.write_bytes(path.read_bytes()[:-1])


def the_first_run_is_gone(shared):
    (shared.folder / "first").rename(shared.folder / "elsewhere")


@no_pages
@pytest.mark.parametrize(
    "change",
    [one_bit_of_a_weight, a_word_of_a_prompt, a_file_of_the_first_run, the_first_run_is_gone],
)
def test_whatever_changed_since_is_measured(shared, change):
    change(shared)
    assert shared.run("again") > 0


@no_pages
@pytest.mark.parametrize(
    "changes", [{"alpha": 0.5}, {"seed": 1}, {"resamples": 110}, {"batch_size": 5}]
)
def test_another_setting_is_another_run(shared, changes):
    assert shared.run("again", **changes) > 0


@no_pages
def test_another_code_is_another_run(shared, monkeypatch):
    monkeypatch.setattr(finished, "_code", lambda: "edited")
    assert shared.run("again") > 0


@no_pages
def test_a_file_that_changed_a_moment_ago_is_not_trusted(shared, monkeypatch):
    """Its next change could come within the same tick of the clock."""
    monkeypatch.setattr(finished, "SETTLED_NS", 10**15)
    assert shared.run("again") > 0


@no_pages
def test_a_copy_that_was_interrupted_is_no_finished_run(shared, monkeypatch):
    write, written = finished.write_bytes_atomic, []

    def die_late(path, data):
        if len(written) > 4:
            raise KeyboardInterrupt
        written.append(path)
        write(path, data)

    monkeypatch.setattr(finished, "write_bytes_atomic", die_late)
    with pytest.raises(KeyboardInterrupt):
        shared.run("again")
    assert not (shared.folder / "again/run.json").exists()
    monkeypatch.undo()
    run(read_config(shared.folder / "run.toml"), shared.folder / "again")
    results = [shared.files(name)[Path("rq4_results.json")] for name in ("first", "again")]
    assert results[0] == results[1]
