"""The estimate before loading: exact where it can be, and advice where it does not fit."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil

import pytest
import torch
from engine_cases import ragged_prompts, tiny_model
from loading_cases import edit_config
from pair_on_disk import write_pair

from rq4lens.config import Patching, Place, config_from
from rq4lens.errors import UserError
from rq4lens.jobs.bench import plan_for
from rq4lens.jobs.memory import MAIN, plan_memory, say_and_require, work_memory
from rq4lens.jobs.run import run as run_job
from rq4lens.models import catalog
from rq4lens.models.catalog import pair_from
from rq4lens.models.load import devices
from rq4lens.models.load.devices import Placement
from rq4lens.models.prompts.prompt_set import FIT_SPLIT
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.memory import bytes_per_row

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


def work_of(model, prompts, settings, max_bytes=None):
    """What a run with these settings takes beside the weights of a model."""
    config, cfg = config_from(settings), model.cfg
    plan = plan_for(config, cfg.n_layers, cfg.n_heads)
    placement = Placement.all_on(CPU, cfg.n_layers)
    return work_memory(config, plan, cfg, prompts, placement, n_train=5, max_bytes=max_bytes)


@pytest.mark.parametrize("k_positions", [1, 2])
@pytest.mark.parametrize("first_layer", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("max_bytes", [None, 60_000])
def test_what_a_clean_pass_keeps_is_known_before(k_positions, first_layer, batch_size, max_bytes):
    """Bytes kept by the engine, prompts of a pass and rows at once are those it then reports."""
    model, prompts = tiny_model(), ragged_prompts()
    settings = {"layer": first_layer, "k": [1], "k_positions": k_positions}
    work = work_of(model, prompts, {**settings, "batch_size": batch_size}, max_bytes)
    engine = make_engine(
        model, prompts, Patching(k_positions=k_positions), Place(batch_size=batch_size),
        first_layer=first_layer, max_bytes=max_bytes,
    )  # fmt: skip
    assert engine.name == "suffix"
    report = engine.memory_report
    assert work.kept == report["kept_bytes"]
    assert work.n_prompts_at_once == report["clean_pass"]["largest_chunk_rows"]
    assert work.n_rows_at_once == report["rows"]["max_rows"]
    assert work.in_rows == work.n_rows_at_once * report["rows"]["bytes_per_row"]


def test_native_hooks_need_whole_passes():
    """Through hooks nothing is kept, and every position of a batch has its logits."""
    model, prompts = tiny_model(), ragged_prompts()
    work = work_of(model, prompts, {"layer": 0, "k": [1], "batch_size": 2, "engine": "hooks"})
    longest = int(prompts.lengths.max())
    assert work.kept == 0
    assert work.in_rows == 2 * longest * bytes_per_row(model.cfg, longest, model.cfg.d_vocab)
    assert work.in_rows >= 2 * longest * model.cfg.d_vocab * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_activations_are_those_of_the_loaded_pair(settings, dtype):
    """The estimate's bytes are the bytes of both models and of everything captured."""
    config = config_from({**settings, "dtype": dtype})
    memory = plan_memory(config)
    pair = pair_from(config.pair, config.reading, config.place)
    for side in ("base", "tuned"):
        parameters = pair.member(side).model.parameters()
        assert memory.weights[side] == sum(each.nbytes for each in parameters)
    activations = PairActivations(pair)
    sites = (("base", FIT_SPLIT), ("base", "val"), ("tuned", FIT_SPLIT))
    read = [activations.z(*site, layer) for site in sites for layer in (0, 1)]
    assert memory.work.activations == sum(each.nbytes for each in read)
    # The base model keeps a clean pass of its own beside the tuned one's.
    work = memory.work
    at_once = max(work.in_pass, work.in_rows)
    assert memory.needed[MAIN] == (
        sum(memory.weights.values()) + at_once + 2 * work.kept + work.activations + work.fit
    )


def test_a_run_records_the_estimate_beside_what_was_used(settings, tmp_path, caplog):
    """run.json holds both, the kept bytes agree, and a run that fits says one line."""
    with caplog.at_level(logging.INFO, "rq4lens"):
        run_job(config_from(settings), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["memory_estimate"]["work_kept"] == record["engine"]["memory"]["kept_bytes"]
    assert record["memory_estimate"]["fits"] is True
    said = [each.getMessage() for each in caplog.records if "memory:" in each.getMessage()]
    assert len(said) == 1
    assert "\n" not in said[0]


def with_free(monkeypatch, n_bytes):
    """A machine with so much free memory."""
    for module in ("jobs.memory", "models.load.size", "models.catalog"):
        monkeypatch.setattr(f"rq4lens.{module}.free_bytes", lambda *_: n_bytes)


def test_what_does_not_fit_is_a_table_with_advice(settings, monkeypatch, caplog):
    """Above what is free, the log names every part and the options that help."""
    config = config_from({**settings, "keep_both": True})
    needed = plan_memory(config).needed[MAIN]
    with_free(monkeypatch, needed - 1)
    memory = plan_memory(config)
    say_and_require(memory)  # it may be tried: work is cut in halves when memory runs out
    for said in ("weights of base", "clean pass, kept", "rows, ", "--dtype bfloat16",
                 "--no-keep-both", "this does not fit in what is free (main memory)"):  # fmt: skip
        assert said in caplog.text
    with_free(monkeypatch, needed)
    assert plan_memory(config).fits
    assert not plan_memory(config).advice


def test_advice_is_only_what_would_help(settings, monkeypatch):
    """Half precision is not advised twice, nor one model at a time where that is done already."""
    with_free(monkeypatch, 1000)
    small = plan_memory(config_from({**settings, "dtype": "bfloat16"}))
    assert small.keep_both is False
    text = "\n".join(small.advice)
    assert "bfloat16" not in text
    assert "--no-keep-both" not in text
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert "--n-devices 4 or --device-map auto" in "\n".join(small.advice)
    waiting = dataclasses.replace(small.work, in_pass=10**6, in_rows=1, n_prompts_at_once=8)
    assert "--batch-size 4" in "\n".join(dataclasses.replace(small, work=waiting).advice)


def test_what_cannot_start_is_refused_before_a_weight_is_read(settings, monkeypatch, tmp_path):
    """A single model with one prompt that is too large: one sentence, nothing written."""
    config = config_from({**settings, "keep_both": False})
    memory = plan_memory(config)
    largest = max(memory.largest_model.values())
    monkeypatch.setattr(catalog, "load_hooked", pytest.fail)
    with_free(monkeypatch, largest + memory.work.smallest - 1)
    with pytest.raises(UserError, match=r"do not fit in the .* free on main memory: --dtype bf"):
        run_job(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_are_checked_before_a_weight_is_read(settings, monkeypatch):
    """A missing or a wrong layer is said from the configuration files alone."""
    monkeypatch.setattr(catalog, "load_hooked", pytest.fail)
    with pytest.raises(UserError, match=r"no layer is named .* from 0 to 2"):
        plan_memory(config_from({**settings, "layer": None}))
    with pytest.raises(UserError, match="layer 7 does not exist"):
        plan_memory(config_from({**settings, "layer": 7}))


def test_a_spread_model_is_counted_on_each_device(settings, monkeypatch):
    """Each GPU holds its own blocks of both models; embeddings first, unembedding last."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with_free(monkeypatch, 10**9)
    config = config_from({**settings, "device": "cuda", "device_map": "cuda:1,cuda:0"})
    monkeypatch.setattr(devices, "resolve_device", lambda device: device)
    memory = plan_memory(config)
    assert set(memory.needed) == {"cuda:1", "cuda:0", MAIN}
    parts = catalog.size_of(config.pair, "tuned", config.place).weights
    lower = parts.before + sum(parts.blocks[:2])
    assert memory.largest_model == {"cuda:1": lower, "cuda:0": parts.total - lower}
    assert memory.held == {place: 2 * n for place, n in memory.largest_model.items()}
    assert memory.devices == ("cuda:1", "cuda:0")


def test_a_full_analysis_holds_one_more_tuned_model(settings):
    """The noise pair's tuned model lies beside the two of the pair."""
    grid, full = (
        plan_memory(config_from({**settings, "keep_both": True, "analysis": effort}))
        for effort in ("grid", "full")
    )
    assert full.held[MAIN] - grid.held[MAIN] == full.weights["tuned"]


def test_models_of_other_heads_are_refused_before_a_weight_is_read(settings, monkeypatch, tmp_path):
    """Head counts that differ are said as such, whatever else does not fit because of them."""
    other = shutil.copytree(settings["tuned"], tmp_path / "other")
    edit_config(other, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
    monkeypatch.setattr(catalog, "load_hooked", pytest.fail)
    with pytest.raises(UserError, match="n_heads is 8 in the base and 4 in the tuned model"):
        run_job(config_from({**settings, "tuned": str(other), "k": [8]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
