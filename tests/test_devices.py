"""Where blocks go: shared out evenly or by free memory, named, placed, and refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from loading_cases import TOKENS, refusal
from model_zoo import ZOO
from transformer_lens.utilities.multi_gpu import get_device_for_block_index

from rq4lens.config import Place
from rq4lens.errors import UserError
from rq4lens.models.load import devices
from rq4lens.models.load.checkpoint import locate
from rq4lens.models.load.conversion import hooked_from
from rq4lens.models.load.devices import (
    Devices,
    ModelBytes,
    Placement,
    choose_threads,
    chosen_devices,
    place_blocks,
    usable_cores,
)
from rq4lens.models.load.huggingface import device_map_of, load_hugging_face, skeleton_of
from rq4lens.models.load.lens import HookedTransformer
from rq4lens.models.load.loading import load_hooked

pytest_plugins = ("loading_cases",)

GPUS = ("cuda:0", "cuda:1", "cuda:2", "cuda:3")


@pytest.fixture
def threads(monkeypatch):
    """What torch's number of threads is set to."""
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    return chosen


@pytest.mark.parametrize(("load", "small"), [(0.2, 7), (2.6, 4), (30.0, 1)])
def test_a_small_model_gets_the_idle_cores_and_a_large_one_all(threads, monkeypatch, load, small):
    """Unless the environment says how many."""
    monkeypatch.setattr(devices, "usable_cores", lambda: 7)
    monkeypatch.setattr(devices.psutil, "cpu_percent", lambda **_: [100 * load, 0.0])
    for n_bytes in (10**6, 10**10):
        choose_threads(n_bytes)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    choose_threads(10**10)
    assert threads == [small, 7]


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), (None, 6)]
)
def test_cores_are_those_that_the_process_may_use(monkeypatch, tmp_path, quota, cores):
    """Eight allowed by affinity, six of them physical, and what the container's quota leaves."""
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(devices.psutil, "cpu_count", lambda logical: 12 if logical else 6)
    monkeypatch.setattr(devices, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert usable_cores() == cores


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine that says it has four GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(GPUS))
    monkeypatch.setattr(devices, "resolve_device", lambda device: device)


def named(placement):
    """The device of each block by name."""
    return tuple(map(str, placement.layers))


def sizes(n_blocks, before=0, after=0):
    return ModelBytes(before, (10,) * n_blocks, after)


@pytest.mark.parametrize(("n_blocks", "n_gpus"), itertools.product((1, 2, 3, 7, 32), (1, 2, 3, 4)))
def test_even_blocks_are_where_transformer_lens_looks(n_blocks, n_gpus):
    """GPUs in a row are shared out as TransformerLens' own forward pass expects."""
    if n_gpus > n_blocks:
        with pytest.raises(UserError, match=f"cannot be spread over {n_gpus} devices"):
            place_blocks(Devices(GPUS[:n_gpus]), sizes(n_blocks), [1] * n_gpus)
        return
    placed = place_blocks(Devices(GPUS[:n_gpus]), sizes(n_blocks), [1] * n_gpus)
    assert placed.n_devices_of_formula == n_gpus
    cfg = type("Cfg", (), {"device": "cuda:0", "n_devices": n_gpus, "n_layers": n_blocks})
    formula = [str(get_device_for_block_index(index, cfg)) for index in range(n_blocks)]
    assert list(named(placed)) == formula


def test_gpus_in_any_order_are_used_in_that_order():
    """Named devices take as many blocks each, in the order in which they are named."""
    placed = place_blocks(Devices(("cuda:3", "cuda:1")), sizes(4), [1, 1])
    assert named(placed) == ("cuda:3", "cuda:3", "cuda:1", "cuda:1")
    assert placed.n_devices_of_formula == 1
    assert (placed.entry, placed.exit) == (torch.device("cuda:3"), torch.device("cuda:1"))


def fullest(blocks, size, free):
    """The largest share of its free memory that a device gives, and None if the order is broken."""
    used = [0.0] * len(free)
    used[blocks[0]] += size.before
    used[blocks[-1]] += size.after
    for block, index in zip(size.blocks, blocks, strict=True):
        used[index] += block
    return max(each / room for each, room in zip(used, free, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_free_memory_is_used_as_evenly_as_can_be(seed):
    """No other placement in order leaves the fullest device emptier; every one was tried."""
    draw = torch.Generator().manual_seed(seed)
    blocks = tuple(torch.randint(1, 9, (7,), generator=draw).tolist())
    before, after, *free = torch.randint(3, 40, (5,), generator=draw).tolist()
    size = ModelBytes(before, blocks, after)
    placed = place_blocks(Devices(GPUS[:3], by_free_memory=True), size, free)
    chosen = [GPUS.index(name) for name in named(placed)]
    others = (
        each
        for each in itertools.combinations_with_replacement(range(3), len(blocks))
        if each[0] == 0
    )
    best = min(fullest(each, size, free) for each in others)
    assert fullest(chosen, size, free) == pytest.approx(best)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_weight_of_hugging_face_has_a_device(folders, name):
    """The map names each weight once: of block i where block i goes, tied weights together."""
    skeleton = skeleton_of(locate(folders(name)))
    n_blocks = skeleton.config.get_text_config().num_hidden_layers
    placed = Placement.in_order(tuple(f"cuda:{index}" for index in range(n_blocks)))
    found = device_map_of(skeleton, placed)
    for weight, _ in skeleton.named_parameters(remove_duplicate=False):
        (own,) = {device for path, device in found.items() if f"{weight}.".startswith(f"{path}.")}
        numbers = [int(part) for part in weight.split(".") if part.isdigit()]
        if numbers:
            assert own == f"cuda:{numbers[0]}"
        else:
            assert own in {str(placed.entry), str(placed.exit)}
    heads = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    tied = heads[0].weight is heads[1].weight
    names = {id(module): path for path, module in skeleton.named_modules()}
    ends = [
        next(d for path, d in found.items() if f"{names[id(head)]}.".startswith(f"{path}."))
        for head in heads
    ]
    assert ends == [str(placed.entry), str(placed.entry) if tied else str(placed.exit)]


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma2", "phi3", "mixtral", "gpt-neo"])
def test_blocks_are_placed_while_loading(folders, name):
    """Read block by block to named devices, the model is the one that is read as a whole."""
    checkpoint = locate(folders(name))
    skeleton = skeleton_of(checkpoint)
    here = Placement.in_order(("cpu",) * skeleton.config.get_text_config().num_hidden_layers)
    by_name = load_hugging_face(
        checkpoint, dtype=torch.float32, device_map=device_map_of(skeleton, here)
    )
    model = hooked_from(by_name, type(by_name).__name__, dtype=torch.float32, placement=here)
    whole = load_hooked(folders(name)).model
    assert Placement.of(model) == here
    with torch.no_grad():
        assert torch.equal(model(TOKENS, padding_side="right"), whole(TOKENS, padding_side="right"))


def test_a_block_brings_its_input_to_its_own_device(folders):
    """Of a placement that TransformerLens has no formula for, each block fetches what it reads."""
    checkpoint = locate(folders("llama3"))
    hf = load_hugging_face(checkpoint, dtype=torch.float32)
    placed = Placement.in_order(("cpu", "cpu", "meta"))
    model = hooked_from(hf, "LlamaForCausalLM", dtype=torch.float32, placement=placed)
    assert type(model) is HookedTransformer
    assert Placement.of(model) == placed
    assert model.cfg.n_devices == 1
    assert model.embed.W_E.device.type == "cpu"
    assert model.unembed.W_U.device.type == model.ln_final.w.device.type == "meta"
    logits, cache = model.run_with_cache(TOKENS, padding_side="right")
    assert cache["blocks.1.hook_resid_post"].device.type == "cpu"
    assert logits.device.type == cache["blocks.2.attn.hook_z"].device.type == "meta"
    assert logits.shape == (*TOKENS.shape, model.cfg.d_vocab)


def test_alibi_is_not_spread(folders):
    """An architecture that keeps something on one device is refused in one sentence."""
    hf = load_hugging_face(locate(folders("bloom")), dtype=torch.float32)
    with pytest.raises(UserError, match="cannot be spread over cpu, meta, because"):
        hooked_from(
            hf,
            "BloomForCausalLM",
            dtype=torch.float32,
            placement=Placement.in_order(("cpu", "cpu", "meta")),
        )


@pytest.mark.parametrize(
    ("asked", "names", "by_memory"),
    [
        ({"device": "cpu"}, ("cpu",), False),
        ({"device": "cuda"}, ("cuda",), False),
        ({"device": "cuda:2", "n_devices": 2}, ("cuda:2", "cuda:3"), False),
        ({"device": "auto", "device_map": "auto"}, GPUS, True),
        ({"device": "cuda", "device_map": " cuda:3, cuda:0"}, ("cuda:3", "cuda:0"), False),
        ({"device": "auto", "device_map": "cuda:1"}, ("cuda:1",), False),
    ],
)
@pytest.mark.usefixtures("four_gpus")
def test_the_devices_that_were_asked_for(asked, names, by_memory):
    """One device, some in a row, some by name, or all of them."""
    assert chosen_devices(Place(**asked)) == Devices(names, by_memory)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device_map": "cuda:0,cuda:7"}, "names 'cuda:7', which is not there .*cuda:3"),
        ({"device_map": "cuda:0,cuda:0"}, "names 'cuda:0' twice"),
        ({"device_map": "cuda:0,"}, "names '', which is not there"),
        ({"device_map": "balanced"}, "names 'balanced'"),
        ({"device_map": "cuda:0,cpu"}, "names 'cpu'"),
        ({"device_map": "auto", "n_devices": 2}, "n_devices=2 and device_map='auto' both say"),
        ({"device_map": "auto", "device": "cpu"}, "device 'cpu' and device_map='auto' both say"),
        ({"device_map": "cuda:0", "device": "cuda:1"}, "device 'cuda:1' and device_map='cuda:0'"),
    ],
)
@pytest.mark.usefixtures("four_gpus")
def test_devices_that_do_not_go_together_are_refused(settings, said):
    """The sentence names what was asked for, and what this machine has."""
    with pytest.raises(UserError, match=said):
        chosen_devices(Place(**settings))


def test_a_map_needs_gpus(folders, monkeypatch):
    """On a machine without any, the sentence says so, whatever the map."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "it has none" in refusal(folders("llama"), place=Place(device_map="auto"))
    assert "this machine has no GPU" in refusal(
        folders("llama"), place=Place(device_map="cuda:0,cuda:1")
    )


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_two
@pytest.mark.parametrize("device_map", ["auto", "cuda:0,cuda:1", "cuda:1,cuda:0"])
@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma2", "phi3", "mixtral"])
def test_a_model_over_two_gpus_is_one_model(folders, name, device_map):
    """Whatever the map, the logits are those of one GPU, with padding on either side."""
    spread = load_hooked(folders(name), place=Place(device_map=device_map)).model
    one = load_hooked(folders(name), place=Place(device="cuda")).model
    devices = {str(parameter.device) for parameter in spread.parameters()}
    assert devices == {"cuda:0", "cuda:1"}
    found = Placement.of(spread)
    assert spread.embed.W_E.device == found.entry
    assert spread.unembed.W_U.device == found.exit
    if device_map != "auto":
        assert ",".join(map(str, found.devices)) == device_map
    padded = torch.ones_like(TOKENS)
    padded[0, :5] = 0
    for options in ({"padding_side": "right"}, {"padding_side": "left", "attention_mask": padded}):
        with torch.no_grad():
            gap = spread(TOKENS, **options).cpu() - one(TOKENS, **options).cpu()
        assert float(gap.abs().max()) < 1e-4


@needs_two
def test_weights_are_read_to_their_devices(folders):
    """No GPU ever holds much more than its own part of a model that is spread."""
    whole = sum(
        parameter.nbytes
        for parameter in load_hugging_face(
            locate(folders("llama3")), dtype=torch.float32
        ).parameters()
    )
    torch.cuda.empty_cache()
    for index in (0, 1):
        torch.cuda.reset_peak_memory_stats(index)
    before = [torch.cuda.memory_allocated(index) for index in (0, 1)]
    place = Place(device_map="cuda:0,cuda:1")
    model = load_hooked(folders("llama3"), place=place, check_logits=False).model
    for index in (0, 1):
        own = sum(
            tensor.nbytes
            for tensor in (*model.parameters(), *model.buffers())
            if tensor.device.index == index
        )
        peak = torch.cuda.max_memory_allocated(index) - before[index]
        assert peak < own + whole / 2
