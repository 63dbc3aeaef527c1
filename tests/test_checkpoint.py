"""Checkpoints: found on disk or on the hub, or refused in one sentence that names the fix."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from huggingface_hub import errors as hub
from loading_cases import edit_config, refusal, same_weights
from model_zoo import (
    ZOO,
    save,
)

from rq4lens.config import Place
from rq4lens.errors import UserError
from rq4lens.models.load import checkpoint, loading
from rq4lens.models.load import size as memory
from rq4lens.models.load.architectures import ARCHITECTURES
from rq4lens.models.load.checkpoint import locate
from rq4lens.models.load.conversion import hooked_skeleton
from rq4lens.models.load.devices import ModelBytes
from rq4lens.models.load.loading import load_hooked
from rq4lens.models.load.size import estimate_memory, model_size

pytest_plugins = ("loading_cases",)


@pytest.fixture
def hub_raises(monkeypatch):
    """Let every fetch from the hub fail in a given way."""

    def set_error(error):
        def fetch(*_args, **_options):
            raise error

        monkeypatch.setattr(checkpoint, "snapshot_download", fetch)

    return set_error


def test_a_hub_id_is_a_folder_with_a_commit(folders, tmp_path, monkeypatch):
    """A hub id loads what its snapshot holds and records the exact commit; only safetensors, and
    only files of the top folder, are asked for.
    """
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = Path(shutil.copytree(folders("qwen2"), tmp_path / "snapshots" / commit))
    asked = []

    def fetch(source, *, revision, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        assert (source, revision, ignore_patterns) == ("org/tuned", "v2", ["*/*"])
        return str(snapshot)

    monkeypatch.setattr(checkpoint, "snapshot_download", fetch)
    loaded = load_hooked("org/tuned", revision="v2")
    assert (loaded.source, loaded.revision) == ("org/tuned", commit)
    assert same_weights(loaded, load_hooked(folders("qwen2")))
    assert {name for name in asked if "safetensors" in name} == {"model.safetensors"}
    assert not [name for name in asked if name.endswith((".bin", ".pt", ".pth"))]


class _Response:
    status_code = 403
    headers = MappingProxyType({})
    request = None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub.GatedRepoError("no", response=_Response()), "is gated"),
        (hub.RepositoryNotFoundError("no", response=_Response()), "neither a folder here nor"),
        (hub.RevisionNotFoundError("no", response=_Response()), "has no revision 'v9'"),
        (hub.LocalEntryNotFoundError("no"), "the hub could not be reached"),
        (hub.OfflineModeIsEnabled("no"), "the hub could not be reached"),
        (ConnectionError("no"), "the hub could not be reached"),
        (hub.HFValidationError("no"), "well-formed hub id"),
    ],
)
def test_the_hub_says_no(hub_raises, error, said):
    """A gated or missing repository, a missing revision, no network, a malformed id: one
    sentence each, with what to do.
    """
    hub_raises(error)
    sentence = refusal("meta-llama/Llama-3.1-8B-Instruct", revision="v9")
    assert said in sentence
    assert sentence.startswith("meta-llama/Llama-3.1-8B-Instruct ")


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "a/b/c", Path("missing")])
def test_a_wrong_path_is_refused(path):
    """What can only be meant as a path is never looked up on the hub."""
    assert f"There is no folder {path}" in refusal(path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, llama):
    """A folder without a configuration, or with a broken one, is named with the fix."""
    assert "has no config.json" in refusal(tmp_path)
    (llama / "config.json").write_text("{")
    assert "not valid JSON" in refusal(llama)


def test_an_unsupported_architecture_is_refused(llama):
    """An architecture without conversion is named together with every one that loads."""
    edit_config(llama, architectures=["MambaForCausalLM"], model_type="mamba")
    sentence = refusal(llama)
    assert "MambaForCausalLM" in sentence
    assert all(name in sentence for name in ARCHITECTURES)


def test_a_quantized_checkpoint_is_refused(llama):
    """A quantized checkpoint is refused by the name of its method."""
    edit_config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantized with gptq" in refusal(llama)


def test_a_pickled_checkpoint_is_refused(llama):
    """A checkpoint of pickled weights alone is refused, unread."""
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"would run code")
    assert "pytorch_model.bin, which is not safetensors" in refusal(llama)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "model.safetensors.index.json"])
def test_a_folder_saved_into_twice_is_refused(llama, other):
    """The weights that are read may be the older ones; both files are named."""
    (llama / other).write_bytes(b"{}")
    said = refusal(llama)
    assert "model.safetensors and" in said
    assert other in said


def test_missing_parts_are_refused(llama, tmp_path, tokenizer):
    """A missing shard, missing weights and a missing tokenizer are named."""
    sharded = save(ZOO["llama"].make(), tokenizer, tmp_path / "sharded", max_shard_size="40KB")
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(sharded)
    headless = save(ZOO["llama"].make().model, tokenizer, tmp_path / "headless")
    edit_config(headless, architectures=["LlamaForCausalLM"])
    said = refusal(headless)
    assert f"model.safetensors of {headless} lacks 1 weights" in said
    assert "lm_head.weight" in said
    for file in llama.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refusal(llama)


def test_weights_of_another_shape_are_refused(llama):
    """Weights that do not have the shapes of their configuration are refused."""
    edit_config(llama, intermediate_size=64)
    assert "[32, 48], and config.json asks for [32, 64]" in refusal(llama)


def test_code_of_a_checkpoint_does_not_run_unasked(llama, tmp_path):
    """Code that a checkpoint brings along is not run, and the result says so."""
    mark = tmp_path / "ran"
    (llama / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\n")
    edit_config(llama, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Config"})
    loaded = load_hooked(llama)
    assert loaded.trust_remote_code is False
    assert not mark.exists()
    edit_config(llama, model_type="unheard-of")
    assert "trust_remote_code=True" in refusal(llama)
    assert not mark.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_size_is_that_of_the_loaded_model(folders, name, dtype):
    """Before a weight is read, its bytes are known exactly, part by part, tied weights twice."""
    size = model_size(locate(folders(name), with_weights=False), dtype=dtype)
    place = Place(device="cpu", dtype=str(dtype).removeprefix("torch."))
    loaded = load_hooked(folders(name), place=place, check_logits=False).model
    assert size.weights == ModelBytes.of(loaded)
    assert size.weights.total == sum(parameter.nbytes for parameter in loaded.parameters())
    assert estimate_memory(size).fits


def test_the_size_of_a_hub_id_fetches_no_weights(llama, monkeypatch):
    """The size of a hub id comes from its small files; without network it is refused."""
    expected = model_size(locate(llama, with_weights=False)).weights
    for file in llama.glob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *_a, **_o: str(llama))
    assert model_size(locate("org/tuned", with_weights=False)).weights == expected

    def unreachable(*_args, **_options):
        raise ConnectionError("no network")

    monkeypatch.setattr(checkpoint, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="could not be reached"):
        model_size(locate("org/tuned", with_weights=False))


def test_a_size_is_counted_once(folders, monkeypatch):
    """The plan of a run, its pair and the load of its model share one count of the bytes."""
    counted = []

    def skeleton(cfg):
        counted.append(cfg)
        return hooked_skeleton(cfg)

    monkeypatch.setattr(memory, "hooked_skeleton", skeleton)
    monkeypatch.setattr(memory, "_MEASURED", {})
    sizes = [model_size(locate(folders("llama"), with_weights=False)) for _ in range(3)]
    load_hooked(folders("llama"), check_logits=False)
    assert len(counted) == 1
    assert sizes[0] == sizes[2]
    halves = model_size(locate(folders("llama"), with_weights=False), dtype=torch.bfloat16)
    assert halves.weights != sizes[0].weights


def test_what_cannot_fit_is_not_started(folders, monkeypatch):
    """A checkpoint larger than the free memory is refused before it is read, with advice."""
    needed = model_size(locate(folders("llama3"), with_weights=False)).weights.total
    monkeypatch.setattr(memory, "free_bytes", lambda *_: needed - 1)
    monkeypatch.setattr(loading, "load_hugging_face", lambda *_args, **_options: pytest.fail())
    assert "load it as bfloat16" in refusal(folders("llama3"))
    monkeypatch.setattr(memory, "free_bytes", lambda *_: needed // 4)
    assert "bfloat16" not in refusal(folders("llama3"))
