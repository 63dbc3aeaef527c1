"""A stranger's model folder: it loads as what it says, or is refused in one clear sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
from pathlib import Path

import datasets
import pytest
import torch
from loading_cases import edit_config, hugging_face, refusal, same_weights
from model_zoo import ZOO, save
from pair_on_disk import without_stages
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rq4lens.cli import main
from rq4lens.errors import UserError
from rq4lens.models.load.checkpoint import locate
from rq4lens.models.load.loading import load_hooked, load_own_tokenizer
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.models.prompts.record import Message, Prompt
from rq4lens.models.prompts.rendering import render

pytest_plugins = ("loading_cases",)
pytestmark = pytest.mark.hostile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def no_hang():
    """A folder may be refused late, but never keeps a test waiting."""

    def too_late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(folder, said, read=load_hooked) -> None:
    """Check the sentence of a refusal; it prints on any terminal and has a sane length."""
    if read is load_hooked:
        sentence = refusal(folder)
    else:
        with pytest.raises(UserError) as caught:
            read(folder)
        sentence = str(caught.value)
    assert sentence.isprintable(), "the sentence would act on the terminal"
    assert len(sentence) < 1500
    assert said in sentence, sentence


# config.json


def text_of_config(text):
    """Replace config.json by another text."""

    def change(folder: Path) -> None:
        data = text if isinstance(text, bytes) else text.encode()
        (folder / "config.json").write_bytes(data)

    return change


def config(**changes):
    """Change entries of config.json; those set to ... are taken out."""
    return lambda folder: edit_config(folder, **changes)


def instead_of(name, make):
    """Put something that is no file where a file should be."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

WRONG_CONFIGS = {
    "missing": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "empty": (text_of_config(""), "not valid JSON"),
    "cut off": (text_of_config('{"architectures": ["Llama'), "not valid JSON"),
    "not JSON": (text_of_config("hello"), "not valid JSON"),
    "UTF-16": (text_of_config('{"a": 1}'.encode("utf-16")), "not valid JSON"),
    "NaN": (config(rms_norm_eps=float("nan")), "not valid JSON"),
    "infinity": (config(rms_norm_eps=float("inf")), "not valid JSON"),
    "overflow": (text_of_config('{"rms_norm_eps": 1e999}'), "not valid JSON"),
    "deep lists": (text_of_config("[" * 100_000), "not valid JSON"),
    "deep objects": (text_of_config('{"a":' * 50_000), "not valid JSON"),
    "a number of 5000 digits": (text_of_config('{"a": ' + "9" * 5000 + "}"), "not valid JSON"),
    "a key twice": (text_of_config('{"vocab_size": 1, "vocab_size": 2}'), "'vocab_size' twice"),
    "a list": (text_of_config("[1, 2]"), "an object"),
    "null": (text_of_config("null"), "an object"),
    "a symlink to itself": (instead_of("config.json", lambda p: p.symlink_to(p)), "config.json"),
    "a pipe": (instead_of("config.json", os.mkfifo), "config.json"),
    "a directory": (instead_of("config.json", Path.mkdir), "config.json"),
    "a device": (
        instead_of("config.json", lambda p: p.symlink_to("/dev/zero")),
        "not a regular file",
    ),
    "an empty object": (text_of_config("{}"), "Architecture None"),
    "architectures as text": (config(architectures="LlamaForCausalLM"), "architectures"),
    "architectures of numbers": (config(architectures=[7]), "architectures"),
    "architectures of lists": (config(architectures=[["LlamaForCausalLM"]]), "architectures"),
    "unknown architecture": (config(architectures=["EvilForCausalLM"]), "EvilForCausalLM"),
    "hostile architecture": (config(architectures=["\u202e\x1b[31m" * 500]), "cannot be loaded"),
    "another model type": (config(model_type="gpt2"), "model_type"),
    "unknown model type": (config(model_type="evil"), "model_type"),
    "model type of another type": (config(model_type=["llama"]), "model_type"),
    "no hidden size": (config(hidden_size=None), "hidden_size"),
    "text for a size": (config(hidden_size="32"), "hidden_size"),
    "a list for a size": (config(hidden_size=[32]), "hidden_size"),
    "true for a size": (config(num_key_value_heads=True), "num_key_value_heads"),
    "half a head": (config(num_attention_heads=3.5), "num_attention_heads=3.5"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads=0"),
    "negative heads": (config(num_attention_heads=-4), "num_attention_heads=-4"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers=0"),
    "negative width": (config(hidden_size=-32), "hidden_size=-32"),
    "negative vocabulary": (config(vocab_size=-1), "vocab_size=-1"),
    "no context": (config(max_position_embeddings=0), "max_position_embeddings=0"),
    "heads that do not divide": (config(num_attention_heads=5, head_dim=None), "hidden size (32)"),
    "groups that do not divide": (config(num_key_value_heads=3), "k_proj.weight"),
    "more groups than heads": (config(num_key_value_heads=8), "k_proj.weight"),
    "head width of zero": (config(head_dim=0), "head_dim=0"),
    "a quintillion layers": (config(num_hidden_layers=10**18), "num_hidden_layers"),
    "a huge vocabulary": (config(vocab_size=2**31 - 1), "needs"),
    "a huge width": (config(hidden_size=2**30, head_dim=8), "needs"),
    "a huge context": (config(max_position_embeddings=2**62), "max_position_embeddings"),
    "a huge head": (config(head_dim=2**28), "needs"),
    "one layer too many": (config(num_hidden_layers=4), "model.layers.3"),
    "one layer too few": (config(num_hidden_layers=2), "model.layers.2"),
    "another head width": (config(head_dim=16), "k_proj.weight"),
    "an epsilon of text": (config(rms_norm_eps="small"), "rms_norm_eps"),
    "an unknown activation": (config(hidden_act="evil"), "activation function"),
    "an activation of another type": (config(hidden_act={"a": 1}), "cannot be read"),
    "rope as text": (config(rope_parameters="default"), "cannot be read"),
    "an unknown rope": (config(rope_parameters=LINEAR | {"rope_type": "evil"}), "rope_type"),
    "rope without its factor": (
        config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        "factor",
    ),
    "rope with a factor of zero": (config(rope_parameters=LINEAR | {"factor": 0.0}), "factor"),
    "rope with base zero": (config(rope_parameters=LINEAR | {"rope_theta": 0}), "rope_theta"),
    "an unknown type of weights": (config(dtype="evil", torch_dtype="evil"), "cannot be read"),
    "packed weights": (config(quantization_config={"bits": 4}), "quantized"),
    "packed weights of another type": (config(quantization_config=[4]), "quantized"),
    "layer types of another length": (config(layer_types=["evil"]), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS.keys())
def test_a_wrong_configuration_is_refused_in_one_sentence(llama, change, said):
    """No configuration shows a traceback or loads as another model."""
    change(llama)
    refused(llama, said)


def test_code_that_a_folder_brings_along_needs_permission(llama, tmp_path):
    """``auto_map`` of configuration or tokenizer is not run, wherever it stands."""
    mark = tmp_path / "ran"
    (llama / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    edit_config(llama, model_type="evil", auto_map={"AutoConfig": "own.Config"})
    refused(llama, "trust_remote_code=True")
    edit_config(llama, model_type="evil", auto_map="own.Config")
    refused(llama, "auto_map")
    edit_config(llama, model_type="llama", auto_map=...)
    edit_json(
        llama / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["own.Slow", "own.Fast"]},
    )
    refused(llama, "trust_remote_code=True", lambda folder: load_own_tokenizer(locate(folder)))
    assert not mark.exists()


# Weights


def edit_json(path: Path, **changes) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def weights(edit):
    """Change the tensors of the weight file."""

    def change(folder: Path) -> None:
        path = folder / WEIGHTS
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def raw(edit):
    """Change the bytes of the weight file."""
    return lambda folder: (folder / WEIGHTS).write_bytes(edit((folder / WEIGHTS).read_bytes()))


def header(edit):
    """Change the header of the weight file, which stays as long as its own length says."""

    def change(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        values = json.loads(data[8 : 8 + length])
        edit(values)
        text = json.dumps(values).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return raw(change)


Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def set_value(name, value):
    def edit(tensors):
        tensors[name].view(-1)[0] = value

    return weights(edit)


WRONG_WEIGHTS = {
    "empty": (raw(lambda _: b""), WEIGHTS),
    "cut in the length": (raw(lambda data: data[:5]), WEIGHTS),
    "cut in the header": (raw(lambda data: data[:40]), WEIGHTS),
    "cut in the tensors": (raw(lambda data: data[:-4]), WEIGHTS),
    "more bytes than tensors": (raw(lambda data: data + bytes(8)), WEIGHTS),
    "an endless header": (raw(lambda data: struct.pack("<Q", 2**63) + data[8:]), WEIGHTS),
    "a header of the whole file": (
        raw(lambda data: struct.pack("<Q", len(data)) + data[8:]),
        WEIGHTS,
    ),
    "a header that is no JSON": (raw(lambda _: struct.pack("<Q", 8) + b"hello..."), WEIGHTS),
    "a deep header": (raw(lambda _: struct.pack("<Q", 90_000) + b"[" * 90_000), WEIGHTS),
    "a pickle": (raw(lambda _: b"\x80\x04cos\nsystem\n(S'true'\ntR."), WEIGHTS),
    "a zip": (raw(lambda _: b"PK\x03\x04" + bytes(100)), WEIGHTS),
    "a Git LFS pointer": (raw(lambda _: b"version https://git-lfs.github.com/spec/v1\n"), WEIGHTS),
    "overlapping tensors": (
        header(lambda values: values[Q].update(data_offsets=[0, 4096])),
        WEIGHTS,
    ),
    "a tensor behind the end": (
        header(lambda values: values[Q].update(data_offsets=[2**40, 2**40 + 4096])),
        WEIGHTS,
    ),
    "a negative shape": (header(lambda values: values[Q].update(shape=[-32, -32])), WEIGHTS),
    "a shape that overflows": (header(lambda values: values[Q].update(shape=[2**62, 8])), WEIGHTS),
    "an unknown type": (header(lambda values: values[Q].update(dtype="EVIL")), WEIGHTS),
    "integers": (weights(lambda t: t.update({Q: t[Q].int()})), "I32"),
    "bytes": (weights(lambda t: t.update({Q: t[Q].to(torch.uint8)})), "U8"),
    "unscaled float8": (weights(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})), "F8_E4M3"),
    "complex numbers": (weights(lambda t: t.update({Q: t[Q].to(torch.complex64)})), "C64"),
    "another shape": (weights(lambda t: t.update({Q: t[Q][:16].clone()})), "[32, 32]"),
    "a transposed shape": (
        weights(lambda t: t.update({Q: t[Q].reshape(16, 64).clone()})),
        "[32, 32]",
    ),
    "a flat shape": (weights(lambda t: t.update({Q: t[Q].flatten()})), "[32, 32]"),
    "a missing tensor": (weights(lambda t: t.pop(Q)), Q),
    "a missing norm": (weights(lambda t: t.pop(NORM)), NORM),
    "a renamed tensor": (weights(lambda t: t.update({"evil": t.pop(Q)})), Q),
    "no tensor": (weights(dict.clear), "lacks"),
    "an extra tensor": (weights(lambda t: t.update(evil=torch.ones(3))), "evil"),
    "a bias that the configuration denies": (
        weights(lambda t: t.update({Q.replace("weight", "bias"): torch.ones(32)})),
        "q_proj.bias",
    ),
    "NaN": (set_value(Q, torch.nan), f"not finite, in {Q}"),
    "infinity": (set_value(NORM, torch.inf), f"not finite, in {NORM}"),
    "a token that is infinite": (
        set_value("model.embed_tokens.weight", -torch.inf),
        "not finite, in model.embed_tokens.weight",
    ),
    "a directory": (instead_of(WEIGHTS, Path.mkdir), WEIGHTS),
    "a pipe": (instead_of(WEIGHTS, os.mkfifo), WEIGHTS),
    "a symlink to itself": (instead_of(WEIGHTS, lambda path: path.symlink_to(path)), WEIGHTS),
    "a device": (instead_of(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), WEIGHTS),
    "nothing": (instead_of(WEIGHTS, lambda _: None), WEIGHTS),
    **{
        f"only {name}": (
            instead_of(WEIGHTS, lambda p, name=name: p.with_name(name).write_bytes(b"\x80\x04N.")),
            "not safetensors",
        )
        for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "model.gguf", "tf_model.h5")
    },
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS.keys())
def test_wrong_weights_are_refused_in_one_sentence(llama, change, said):
    """Header, type, shape, completeness and finiteness are checked, and a pickle is never read."""
    change(llama)
    refused(llama, said)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt-oss"])
@pytest.mark.parametrize(
    "damage", [lambda t: t[..., :-1].clone(), lambda _: None], ids=["cut", "missing"]
)
def test_a_damaged_expert_is_refused(folders, tmp_path, name, damage):
    """Experts that are joined while they are read are all there, and of one shape."""
    folder = Path(shutil.copytree(folders(name), tmp_path / name))

    def edit(tensors):
        key = next(
            key for key in tensors if ("experts" in key and "down_proj" in key) or ".w2" in key
        )
        changed = damage(tensors.pop(key))
        if changed is not None:
            tensors[key] = changed

    weights(edit)(folder)
    refused(folder, "")


def test_numbers_that_are_not_finite_are_refused_without_the_logit_check(llama):
    """Who switches the logit check off is still not given an infinite model."""
    set_value("model.embed_tokens.weight", torch.inf)(llama)
    with pytest.raises(UserError, match="not finite"):
        load_hooked(llama, check_logits=False)


def test_what_old_checkpoints_carry_along_is_no_extra_weight(folders, tmp_path):
    """Rotary frequencies and causal masks of early checkpoints do not stand in the way."""
    for name, extra in (
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ("gpt2", {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}),
        ("pythia", {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}),
        ("pythia", {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4).to(torch.uint8)}),
    ):
        folder = Path(shutil.copytree(folders(name), tmp_path / "-".join([name, *extra])))
        weights(lambda t, extra=extra: t.update(extra))(folder)
        assert same_weights(load_hooked(folder), load_hooked(folders(name)))


# Shards


@pytest.fixture(scope="session")
def sharded_folder(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("sharded") / "llama"
    return save(ZOO["llama"].make(), tokenizer, root, max_shard_size="40KB")


@pytest.fixture
def sharded(sharded_folder, tmp_path):
    """A copy of the Llama folder in shards, which a test may damage."""
    return Path(shutil.copytree(sharded_folder, tmp_path / "sharded"))


def index(edit):
    """Change the map from tensors to shards."""

    def change(folder: Path) -> None:
        values = json.loads((folder / INDEX).read_text())
        edit(values["weight_map"])
        (folder / INDEX).write_text(json.dumps(values))

    return change


def text_of_index(text):
    return lambda folder: (folder / INDEX).write_text(text)


def points_to(place):
    """Name another place for the first tensor's shard."""
    return index(lambda weight_map: weight_map.update({next(iter(weight_map)): place}))


def first_shard_as(name):
    """Move the first shard out of the folder, and name it there."""

    def change(folder: Path) -> None:
        shard = sorted(folder.glob("model-*"))[0]
        shard.rename(folder / name)
        index(lambda m: m.update({k: str(name) for k, file in m.items() if file == shard.name}))(
            folder
        )

    return change


def tensor_in_two_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*"))[:2]
    tensors, doubled = load_file(second), load_file(first)
    name = next(iter(doubled))
    save_file(tensors | {name: doubled[name] + 1}, second, metadata={"format": "pt"})


def repeated_key(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    name, shard = next(iter(json.loads(text)["weight_map"].items()))
    entry = f'"{name}": "{shard}"'
    (folder / INDEX).write_text(text.replace(entry, f"{entry}, {entry}"))


WRONG_INDEXES = {
    "not JSON": (text_of_index("{"), "not valid JSON"),
    "a list": (text_of_index("[]"), "an object"),
    "no map": (text_of_index("{}"), "weight_map"),
    "an empty map": (text_of_index('{"weight_map": {}}'), "weight_map"),
    "a map that is a list": (text_of_index('{"weight_map": ["a"]}'), "weight_map"),
    "a number for a shard": (points_to(7), "weight_map"),
    "a list for a shard": (points_to(["a"]), "weight_map"),
    "a folder above": (points_to("../evil.safetensors"), "../evil.safetensors"),
    "a shard that lies above": (first_shard_as("../evil.safetensors"), "../evil.safetensors"),
    "a folder below": (points_to("below/evil.safetensors"), "below/evil.safetensors"),
    "an absolute path": (points_to("/etc/passwd"), "/etc/passwd"),
    "a Windows path": (points_to("..\\evil.safetensors"), "evil.safetensors"),
    "a dot": (points_to("."), "weight_map"),
    "nothing": (points_to(""), "weight_map"),
    "a NUL": (points_to("a\0.safetensors"), "weight_map"),
    "an endless name": (points_to("x" * 5000 + ".safetensors"), "weight_map"),
    "hostile letters": (points_to("\u202e\x1b[31m.safetensors"), "weight_map"),
    "a pickle": (points_to("pytorch_model.bin"), "pytorch_model.bin"),
    "a missing shard": (points_to("model-00009-of-00009.safetensors"), "model-00009-of-00009"),
    "a tensor listed twice": (repeated_key, "twice"),
    "a tensor in two shards": (tensor_in_two_shards, "both"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG_INDEXES.values(), ids=WRONG_INDEXES.keys())
def test_a_wrong_index_is_refused_in_one_sentence(sharded, change, said):
    """No file outside the folder is read, and no tensor stands in two shards."""
    change(sharded)
    refused(sharded, said)


def test_an_index_of_shards_loads_as_the_one_file(sharded, folders):
    """Undamaged, the shards are the same model; links to them, as in the hub's cache, too."""
    assert same_weights(load_hooked(sharded), load_hooked(folders("llama")))
    for shard in sharded.glob("model-*.safetensors"):
        moved = shard.rename(sharded.parent / shard.name)
        shard.symlink_to(moved)
    assert same_weights(load_hooked(sharded), load_hooked(folders("llama")))


# Paths


def self_link(path: Path) -> Path:
    path.symlink_to(path)
    return path


ODD_SOURCES = {
    "a folder that links to itself": self_link,
    "a file": lambda path: path.write_text("x") and path,
    "a NUL": lambda path: f"{path}\0x",
    "a NUL in a hub id": lambda _path: "org/na\0me",
    "an endless name": lambda path: path.with_name("x" * 5000),
    "an endless hub id": lambda _path: "x" * 5000,
    "an unknown home": lambda _path: "~nobody-of-this-name/model",
    "nothing": lambda _path: "",
    "hostile letters": lambda path: path.with_name("\u202e\x1b[31m"),
    "an address": lambda _path: "https://example.org/model",
    "a device": lambda _path: "/dev/zero",
    "half a character": lambda path: f"{path}\ud800",
}


@pytest.mark.parametrize("make", ODD_SOURCES.values(), ids=ODD_SOURCES.keys())
def test_what_is_no_folder_is_refused_in_one_sentence(tmp_path, monkeypatch, make):
    """Whatever is given for a folder: no traceback, and nothing is looked up that is no hub id."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(make(tmp_path / "model"), "")


# Adapters


@pytest.fixture(scope="session")
def adapter_folder(folders, tmp_path_factory):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(hugging_face(folders("llama")), settings)
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(adapter_folder, tmp_path):
    """A copy of a LoRA adapter on the Llama folder, which a test may damage."""
    return Path(shutil.copytree(adapter_folder, tmp_path / "adapter"))


def lora(**changes):
    """Change entries of adapter_config.json; those set to ... are taken out."""
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


def adapter_weights(edit):
    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def first(tensors, part):
    return next(name for name in tensors if part in name)


def adapter_raw(data):
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(data)


def base_is_itself(folder: Path) -> None:
    lora(base_model_name_or_path=str(folder))(folder)


WRONG_ADAPTERS = {
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "an object"),
    "deep lists": (
        lambda f: (f / "adapter_config.json").write_text("[" * 100_000),
        "not valid JSON",
    ),
    "no base": (lora(base_model_name_or_path=...), "names no base model"),
    "an empty base": (lora(base_model_name_or_path=""), "names no base model"),
    "a base of another type": (lora(base_model_name_or_path=["a"]), "base_model_name_or_path"),
    "a missing base": (lora(base_model_name_or_path="/no/such/base"), "There is no folder"),
    "a base with a NUL": (lora(base_model_name_or_path="/a\0b"), "The base model of the adapter"),
    "a base that is the adapter": (base_is_itself, "itself an adapter"),
    "a revision of another type": (lora(revision=7), "revision"),
    "no type": (lora(peft_type=...), "peft_type"),
    "unknown type": (lora(peft_type="EVIL"), "peft_type"),
    "type of another type": (lora(peft_type=["LORA"]), "peft_type"),
    "a type that fetches adapters": (lora(peft_type="XLORA"), "XLORA"),
    "unknown task": (lora(task_type="EVIL"), "cannot be merged"),
    "rank 0": (lora(r=0), "r=0"),
    "negative rank": (lora(r=-2), "r=-2"),
    "half a rank": (lora(r=2.5), "r=2.5"),
    "rank as text": (lora(r="2"), "r='2'"),
    "another rank": (lora(r=3), "cannot be merged"),
    "alpha as text": (lora(lora_alpha="much"), "cannot be merged"),
    "no target": (lora(target_modules=[]), "cannot be merged"),
    "unknown target": (lora(target_modules=["evil_proj"]), "cannot be merged"),
    "targets of numbers": (lora(target_modules=[7]), "target_modules"),
    "a number for targets": (lora(target_modules=7), "target_modules"),
    "a broken pattern": (lora(target_modules="("), "target_modules"),
    "a broken exclusion": (lora(exclude_modules="["), "exclude_modules"),
    "a broken rank pattern": (lora(rank_pattern={"(": 2}), "rank_pattern"),
    "layers twice": (lora(layer_replication=[[0, 3], [0, 10**6]]), "layer_replication"),
    "code by name": (lora(megatron_config={"a": 1}, megatron_core="evil"), "megatron"),
    "another layer": (lora(layers_to_transform=[0]), "cannot be merged"),
    "empty weights": (adapter_raw(b""), "adapter_model.safetensors"),
    "weights cut off": (adapter_raw(struct.pack("<Q", 2**62)), "adapter_model.safetensors"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "lacks the weight file"),
    "a missing tensor": (adapter_weights(lambda t: t.pop(first(t, "lora_B"))), "lora_B"),
    "an extra tensor": (adapter_weights(lambda t: t.update(evil=torch.ones(2))), "evil"),
    "another shape": (
        adapter_weights(lambda t: t.update({first(t, "lora_A"): torch.ones(2, 31)})),
        "cannot be merged",
    ),
    "integers": (
        adapter_weights(lambda t: t.update({first(t, "lora_A"): torch.ones(2, 32).int()})),
        "I32",
    ),
    "NaN": (
        adapter_weights(lambda t: t.update({first(t, "lora_B"): torch.full((32, 2), torch.nan)})),
        "not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG_ADAPTERS.values(), ids=WRONG_ADAPTERS.keys())
def test_a_wrong_adapter_is_refused_in_one_sentence(adapter, change, said):
    """An adapter is merged whole, into the base it names, or not at all."""
    change(adapter)
    refused(adapter, said)


@pytest.mark.parametrize(
    "target",
    [r".*\.self_attn\.(q|v)_proj", r"(?:.*?(?:self_attn|attention).*?(?:q_proj|v_proj)).*?"],
    ids=["written by hand", "written by a trainer"],
)
def test_a_harmless_pattern_is_obeyed(adapter, adapter_folder, target):
    """The patterns that trainers write name the same modules as a list does."""
    lora(target_modules=target)(adapter)
    assert same_weights(load_hooked(adapter), load_hooked(adapter_folder))


# Tokenizers


def tokenizer_text(text):
    return lambda folder: (folder / "tokenizer.json").write_text(text)


def tokenizer_json(edit):
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        values = json.loads(path.read_text())
        edit(values)
        path.write_text(json.dumps(values))

    return change


def tokenizer_config(**changes):
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def add_token(**changes):
    token = {
        "id": 320, "content": "<evil>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
    return tokenizer_json(lambda values: values["added_tokens"].append(token | changes))


def renumbered(values):
    values["model"]["vocab"] = {k: n + 10_000 for k, n in values["model"]["vocab"].items()}


WRONG_TOKENIZERS = {
    "missing": (no_tokenizer, "has no tokenizer"),
    "empty": (tokenizer_text(""), "cannot be read"),
    "not JSON": (tokenizer_text("{"), "cannot be read"),
    "a list": (tokenizer_text("[]"), "cannot be read"),
    "an empty object": (tokenizer_text("{}"), "cannot be read"),
    "deep lists": (tokenizer_text("[" * 100_000), "cannot be read"),
    "no model": (tokenizer_json(lambda values: values.pop("model")), "cannot be read"),
    "an unknown model": (
        tokenizer_json(lambda values: values["model"].update(type="Evil")),
        "cannot be read",
    ),
    "merges of unknown tokens": (
        tokenizer_json(lambda values: values["model"].update(merges=[["evil", "tokens"]])),
        "cannot be read",
    ),
    "a negative token": (add_token(id=-1), "cannot be read"),
    "text for a token": (add_token(id="x"), "cannot be read"),
    "tokens that the model has not": (tokenizer_json(renumbered), "vocabulary"),
    "no tokens at all": (
        tokenizer_json(lambda v: v.update(model=v["model"] | {"vocab": {}, "merges": []},
                                          added_tokens=[], post_processor=None)),
        "",
    ),
    "a pre-tokenizer that does not compile": (
        tokenizer_json(
            lambda values: values.update(
                pre_tokenizer={
                    "type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                    "invert": False,
                }
            )
        ),
        "cannot be read",
    ),
    "settings that are no JSON": (
        lambda f: (f / "tokenizer_config.json").write_text("{"),
        "cannot be read",
    ),
    "settings that are a list": (
        lambda f: (f / "tokenizer_config.json").write_text("[]"),
        "cannot be read",
    ),
    "deep settings": (
        lambda f: (f / "tokenizer_config.json").write_text("[" * 100_000),
        "cannot be read",
    ),
    "a class of another type": (tokenizer_config(tokenizer_class=7), "cannot be read"),
    "a number for a special token": (tokenizer_config(bos_token=7), "cannot be read"),
    "a list for a special token": (tokenizer_config(eos_token=["a"]), "cannot be read"),
    "an object for a special token": (tokenizer_config(eos_token={"a": 1}), "cannot be read"),
    "a link to itself": (
        instead_of("tokenizer_config.json", lambda path: path.symlink_to(path)),
        "tokenizer_config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG_TOKENIZERS.values(), ids=WRONG_TOKENIZERS.keys())
def test_a_wrong_tokenizer_is_refused_in_one_sentence(llama, change, said):
    """A tokenizer that cannot be read, or that is not the model's, stops the load."""
    change(llama)
    refused(llama, said)


BOUNDARY = {"type": "Split", "behavior": "Isolated", "invert": False}


def test_a_splitting_pattern_without_end_does_not_hang(llama):
    """A pre-tokenizer whose pattern backtracks for ever is stopped by its library, or refused."""
    backtracking = BOUNDARY | {"pattern": {"Regex": r"(([A-Za-z ]+)+)+!$"}}
    tokenizer_json(lambda values: values.update(pre_tokenizer=backtracking))(llama)
    try:
        load_hooked(llama)
    except UserError as refused_so:
        assert str(refused_so).isprintable()


HOSTILE_TOKENS = ("\u202e\x1b[31m", "<script>", "</s>" * 1000, "{{ 7 * 7 }}", "\0", "../../etc")


@pytest.mark.parametrize("content", HOSTILE_TOKENS, ids=range(len(HOSTILE_TOKENS)))
def test_hostile_special_tokens_are_tokens(llama, content):
    """A special token is a string of the vocabulary, whatever it says."""
    add_token(content=content, id=319 + 1)(llama)
    edit_json(llama / "tokenizer_config.json", pad_token=content)
    tokenizer = load_own_tokenizer(locate(llama))
    assert tokenizer.pad_token == content
    assert tokenizer.convert_tokens_to_ids(content) == 320


# Data sets


def dataset(edit):
    """A saved data set of two rows, with a file of it changed."""

    def make(folder: Path) -> None:
        rows = {"id": ["a", "b"], "text": ["x", "y"], "split": ["train", "val"]}
        datasets.Dataset.from_dict(rows).save_to_disk(folder, max_shard_size="1GB")
        edit(folder)

    return make


def arrow_cut(folder: Path) -> None:
    path = next(folder.glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:100])


def data_file(name):
    return dataset(lambda f: edit_json(f / "state.json", _data_files=[{"filename": name}]))


WRONG_DATASETS = {
    "an empty folder": Path.mkdir,
    "no state": dataset(lambda f: (f / "state.json").unlink()),
    "state that is no JSON": dataset(lambda f: (f / "state.json").write_text("{")),
    "deep state": dataset(lambda f: (f / "state.json").write_text("[" * 100_000)),
    "state that is a list": dataset(lambda f: (f / "state.json").write_text("[]")),
    "information that is a list": dataset(lambda f: (f / "dataset_info.json").write_text("[]")),
    "unknown features": dataset(
        lambda f: edit_json(f / "dataset_info.json", features={"id": {"_type": "Evil"}})
    ),
    "rows cut off": dataset(arrow_cut),
    "rows that are a pickle": dataset(
        lambda f: next(f.glob("*.arrow")).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    ),
    "rows elsewhere": data_file("../../etc/passwd"),
    "rows of a number": data_file(7),
    "rows of a link to itself": dataset(
        instead_of("state.json", lambda path: path.symlink_to(path))
    ),
    "splits that are no list": lambda f: f.mkdir() or (f / "dataset_dict.json").write_text("7"),
    "splits elsewhere": lambda f: (
        f.mkdir() or (f / "dataset_dict.json").write_text('{"splits": ["../../etc"]}')
    ),
}


@pytest.mark.parametrize("make", WRONG_DATASETS.values(), ids=WRONG_DATASETS.keys())
def test_a_wrong_data_set_is_refused_in_one_sentence(tmp_path, make):
    """A stranger's saved data set is prompts or one sentence; none of these is prompts."""
    make(tmp_path / "data")
    refused(tmp_path / "data", "", PromptSet.of)


# Chat templates

CHAT = Prompt("p1", "hello", "val", messages=(Message("user", "hello"),))


def with_template(llama, template):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = template
    return tokenizer


HOSTILE_TEMPLATES = {
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a range beyond the sandbox": "{% for _ in range(999999999) %}{% endfor %}",
    "the class of a message": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "the class by a filter": "{{ (messages | attr('__class__')).__mro__ }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__'] }}",
    "globals of the cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].environ }}",
    "the format of attributes": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "the format of a map": "{{ '{x.__init__.__globals__}'.format_map({'x': cycler}) }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "a parent": "{% extends '/etc/passwd' %}",
    "a changed message": "{{ messages.append(1) }}{{ messages.clear() }}",
    "a broken template": "{% for %}",
    "a deep template": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "its own exception": "{{ raise_exception('\u202e\x1b[31m no') }}",
    "no text": 7,
    "an unnamed choice": {"evil": "x"},
}  # fmt: skip


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES.values(), ids=HOSTILE_TEMPLATES.keys())
def test_a_hostile_template_is_refused_in_one_sentence(folders, template):
    """A template reaches nothing but the messages; one that fails is said with its prompt."""
    tokenizer = with_template(folders("llama"), template)
    refused(CHAT, "chat template", lambda prompt: render(prompt, tokenizer))


# The command line


@pytest.mark.parametrize(
    "change",
    [
        WRONG_CONFIGS["deep lists"], WRONG_CONFIGS["no layers"], WRONG_WEIGHTS["NaN"],
        WRONG_WEIGHTS["cut in the header"], WRONG_TOKENIZERS["a list for a special token"],
        WRONG_TOKENIZERS["empty"], WRONG_WEIGHTS["only pytorch_model.bin"],
        WRONG_CONFIGS["half a head"],
    ],
    ids=range(8),
)  # fmt: skip
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_the_command_line_says_one_sentence_and_writes_nothing(
    folders, llama, tmp_path, monkeypatch, capsys, change, side
):
    """Exit code 2, one sentence on stderr, no run directory."""
    change[0](llama)
    pair = {"base": folders("llama"), "tuned": folders("llama")} | {side: llama}
    assert change[1] in command_refused(pair, tmp_path, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def test_a_token_that_the_model_does_not_know_is_refused(
    folders, llama, tmp_path, monkeypatch, capsys
):
    """A tokenizer with more tokens than the model is no fault until a prompt has one of them."""
    add_token(content="text 3")(llama)
    pair = {"base": folders("llama"), "tuned": llama}
    assert "'3' has token 320" in command_refused(pair, tmp_path, monkeypatch, capsys)


def command_refused(pair, tmp_path, monkeypatch, capsys) -> str:
    """What the main job says of a pair that it refuses."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": f"{n}", "text": f"text {n}", "split": ("train", "val")[n % 2]} for n in range(8)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "run"
    command = ["rq4lens", "run", "--base", pair["base"], "--tuned", pair["tuned"], "--prompts"]
    command += [
        prompts,
        "--layer",
        1,
        "--k",
        "1",
        "--control-layer",
        2,
        "--device",
        "cpu",
        "--out",
        out,
    ]
    monkeypatch.setattr(sys, "argv", [str(each) for each in command])
    with pytest.raises(SystemExit) as ended:
        main()
    said = without_stages(capsys.readouterr().err)
    assert ended.value.code == 2
    assert said.count("rq4lens: ") == 1
    assert "Traceback" not in said
    return " ".join(said.split())
