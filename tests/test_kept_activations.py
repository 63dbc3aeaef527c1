"""Kept activations: a second run skips the base model, and never believes what is not its own."""

import json
import logging
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from pair_on_disk import write_pair
from safetensors.torch import load_file, save_file

from rq4lens.config import config_from
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.patch import patch_once
from rq4lens.jobs.rank import rank_layer
from rq4lens.jobs.run import run as run_job
from rq4lens.jobs.sweep import sweep_layers
from rq4lens.models import catalog
from rq4lens.models.load.checkpoint import locate
from rq4lens.models.load.fingerprint import files_digest
from rq4lens.patching import activations

pytestmark = pytest.mark.usefixtures("no_pages")


@pytest.fixture
def loads(monkeypatch):
    """The folders that models were loaded from, in order."""
    seen, load = [], catalog.load_hooked

    def watched(source, **options):
        seen.append(Path(source).name)
        return load(source, **options)

    monkeypatch.setattr(catalog, "load_hooked", watched)
    return seen


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A pair on disk whose first run has kept what it captured; tests work on copies."""
    folder = tmp_path_factory.mktemp("first")
    settings = write_pair(folder) | {"cache": str(folder / "cache"), "random_seeds": [0]}
    run_job(config_from(settings), folder / "run")
    return folder, settings


@pytest.fixture
def again(first, tmp_path):
    """The settings of another run of the pair, with its own copy of models and cache."""
    folder, settings = first
    for name in ("base", "tuned", "cache"):
        shutil.copytree(folder / name, tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("base", "tuned", "cache")}
    return settings | paths


def numbers(directory):
    return pd.read_parquet(directory / "per_prompt.parquet")


def run(settings, directory):
    """The main job; what it says of itself."""
    run_job(config_from(settings), directory)
    return json.loads((directory / "run.json").read_text())


def read(settings, *, fresh=False):
    """What a run reads before it measures anything: activations by side, split and layer."""
    config = config_from(settings)
    layers = [config.patching.layer, config.patching.control_layer]
    activations = Bench(config, fresh=fresh).capture(layers)
    wanted = [("base", "train"), ("base", "val"), ("tuned", "train")]
    return {(*each, layer): activations.z(*each, layer) for each in wanted for layer in layers}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, z in one.items():
        assert torch.equal(z, other[name]), name


# --- what is skipped


@pytest.mark.parametrize("keep_both", [True, False])
def test_a_repeated_run_never_loads_the_base_model(
    first, again, loads, tmp_path, caplog, keep_both
):
    """The same numbers to the bit, without the base model; the log and the provenance say so."""
    settings = again | {"keep_both": keep_both}
    known = run(settings, tmp_path / "second")
    assert known["base_loaded"] is True
    loads.clear()
    with caplog.at_level(logging.INFO, "rq4lens"):
        record = run(settings, tmp_path / "second")
    assert loads == ["tuned"]
    assert record["base_loaded"] is False
    assert "the base model was not loaded" in caplog.text
    pd.testing.assert_frame_equal(numbers(tmp_path / "second"), numbers(first[0] / "run"))
    assert record["models"]["base"] == known["models"]["base"]


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 0.5},
        {"k": [1]},
        {"map_kind": "mean_shift"},
        {"engine": "hooks"},
        {"batch_size": 3},
    ],
)
def test_what_changes_no_base_activation_needs_no_base_model(again, loads, changes):
    """Another strength, head set, map, engine or batch size uses what is kept."""
    read(again | changes)
    assert loads == ["tuned"]


def test_a_run_directory_keeps_its_own(again, loads, tmp_path):
    """Without a shared folder the run's own is used: an interrupted or repeated run skips too."""
    own = {name: value for name, value in again.items() if name != "cache"}
    run(own, tmp_path / "run")
    assert sorted(loads) == ["base", "tuned"]
    run(own, tmp_path / "run")
    assert sorted(loads) == ["base", "tuned", "tuned"]
    assert (tmp_path / "run" / "activations").is_dir()


def test_a_sweep_keeps_for_the_runs_after_it(again, loads, tmp_path):
    """What was captured of the layers of a sweep is not captured again."""
    cache = {"cache": str(tmp_path / "swept")}
    sweep_layers(config_from(again | cache), tmp_path / "sweep")
    assert sorted(loads) == ["base", "tuned"]
    for layer in (0, 2):
        read(again | cache | {"layer": layer, "control_layer": 1})
    assert sorted(loads) == ["base", "tuned", "tuned", "tuned"]


@pytest.mark.parametrize(
    "job",
    [lambda config: rank_layer(config, ["delta"]), lambda config: patch_once(config, "0,1")],
    ids=["rank", "patch"],
)
def test_a_ranking_and_a_single_patch_share_the_folder(again, tmp_path, job, monkeypatch):
    """`--cache` serves them as it serves a run: what one job captured, no other captures again."""
    read = []

    def capturing(*arguments, **settings):
        read.append(arguments[2])
        return capture(*arguments, **settings)

    capture = activations.capture
    monkeypatch.setattr(activations, "capture", capturing)
    job(config_from(again))
    of_tuned = list(read)
    for _ in range(2):
        job(config_from(again | {"cache": str(tmp_path / "new")}))
    # Base is read once more, for the new folder: train, and all layers of val to the end.
    assert len(read) == 3 * len(of_tuned) + 2


# --- what is not believed


def move_a_weight(settings):
    path = Path(settings["base"]) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.01
    save_file(tensors, path, metadata={"format": "pt"})


def change_the_config(settings):
    path = Path(settings["base"]) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))


def change_the_prompts(settings):
    path = Path(settings["cache"]).with_name("other.jsonl")
    path.write_text(Path(settings["prompts"]).read_text().replace("apple", "plum"))
    settings["prompts"] = str(path)


@pytest.mark.parametrize(
    "change",
    [
        move_a_weight,
        change_the_config,
        change_the_prompts,
        lambda settings: settings.update(dtype="float64"),
        lambda settings: settings.update(k_positions=2),
        lambda settings: settings.update(layer=2),
        lambda settings: settings.update(decision_rule="last_content", max_tokens=3),
    ],
    ids=["weight", "config", "prompts", "dtype", "k_positions", "layer", "reading"],
)
def test_another_base_activation_is_captured(again, loads, change):
    """Whatever changes an activation loads the model, and gives what a fresh run captures."""
    change(again)
    found = read(again)
    assert sorted(loads) == ["base", "tuned"]
    assert_same(found, read(again, fresh=True))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, Path.unlink])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_file_is_set_aside_and_captured_again(again, loads, damage, suffix):
    """One damaged file among the others: the same activations, and a whole file in its place."""
    damaged = sorted(Path(again["cache"]).glob(f"z_L1_*{suffix}"))[0]
    whole, before = damaged.read_bytes(), read(again)
    loads.clear()
    damage(damaged)
    assert_same(read(again), before)
    assert sorted(loads) == ["base", "tuned"]
    assert damaged.with_name(f"{damaged.name}.damaged").exists() == (damage is not Path.unlink)
    assert damaged.read_bytes() == whole
    loads.clear()
    assert_same(read(again), before)
    assert loads == ["tuned"]


def test_a_damaged_card_is_set_aside(again, loads):
    """Without its card the base model is loaded, and the card written again."""
    (card,) = Path(again["cache"]).glob("card_*.json")
    truncate(card)
    read(again)
    assert sorted(loads) == ["base", "tuned"]
    assert card.exists()


def test_a_fresh_run_uses_nothing(again, loads):
    """`--fresh` loads and captures everything."""
    read(again, fresh=True)
    assert sorted(loads) == ["base", "tuned"]


# --- the fingerprint of a checkpoint


def test_a_fingerprint_is_of_the_files(again, tmp_path):
    """The same for a copy elsewhere; another for a changed weight, tokenizer or configuration."""
    base = Path(again["base"])
    copied = Path(shutil.copytree(base, tmp_path / "copy"))
    prints = [files_digest(locate(base)).result()]
    assert files_digest(locate(copied)).result() == prints[0]
    for name in ("tokenizer.json", "config.json"):
        (copied / name).write_text((copied / name).read_text() + " ")
        prints.append(files_digest(locate(copied)).result())
    move_a_weight({"base": copied})
    prints.append(files_digest(locate(copied)).result())
    assert len(set(prints)) == len(prints)


def test_kept_activations_are_those_of_the_model(first):
    """What lies in the folder is what the base model gives at the main and control layer."""
    folder, settings = first
    pair = catalog.load_pair(**{name: settings[name] for name in ("base", "tuned", "prompts")})
    files = [load_file(path) for path in sorted((folder / "cache").glob("*.safetensors"))]
    kept = [file["z"] for file in files if "z" in file]
    assert len(kept) == 2 + pair.n_layers  # train at the two layers, val at all of them
    ends = [len(file["log_probs"]) for file in files if "z" not in file]
    assert ends == [len(pair.prompts.split("val"))]
    sizes = {len(pair.prompts.split(name)) for name in ("train", "val")}
    assert {len(z) for z in kept} == sizes
    assert all(z.shape[1:] == (1, 8, 8) and z.dtype == torch.float32 for z in kept)
