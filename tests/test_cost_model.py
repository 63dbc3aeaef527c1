"""The cost model beside what was measured: records of the engine's benchmarks, files, memory."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import stored_map, tiny_model

from rq4lens.disk.store import Store
from rq4lens.models.load.lens import TransformerBridgeConfig
from rq4lens.studies.cost_model import (
    KINDS,
    Machine,
    Measured,
    Work,
    block_weights,
    busy_share,
    map_bytes,
    pass_flops,
    row_flops,
    store_bytes,
)

RECORDS = Path(__file__).parent.parent / "benchmarks" / "results"


def shape_of(n_layers, n_heads, n_key_value_heads, d_model, d_head, d_mlp, gated_mlp, d_vocab):
    """The configuration of a model of this shape."""
    return TransformerBridgeConfig(
        n_layers=n_layers,
        n_heads=n_heads,
        n_key_value_heads=n_key_value_heads,
        d_model=d_model,
        d_head=d_head,
        d_mlp=d_mlp,
        gated_mlp=gated_mlp,
        d_vocab=d_vocab,
        n_ctx=128,
        act_fn="silu",
    )


SHAPES = {
    "builtin": shape_of(6, 16, None, 128, 8, 512, False, 75),
    "gpt2-small": shape_of(12, 12, None, 768, 64, 3072, False, 50257),
    "llama-8b": shape_of(32, 32, 8, 4096, 128, 14336, True, 128256),
}
LLAMA_70B = shape_of(80, 64, 8, 8192, 128, 28672, True, 128256)
TOLERANCE = 0.3
CASES = [name for name in SHAPES if (RECORDS / f"{name}.json").exists()]


def setting(record):
    """Prompts, tokens of the longest, and main layer of a record."""
    found = re.search(r"(\d+) prompts x (?:\d+ to )?(\d+) tokens;.* layer (\d+)", record["what"])
    return tuple(map(int, found.groups()))


def measured_points(shape, record):
    """The growth curves of a record, which are the probe that the constants come from."""
    prompts, tokens, layer = setting(record)
    for point in record["growth"]:
        axis, value = point["axis"], point["value"]
        heads = value if axis.startswith("heads") else shape.n_heads
        n_layers = value if axis.startswith("layers") else None
        layers = range(shape.n_layers - value, shape.n_layers) if n_layers else [layer]
        work = Work(
            value if axis == "prompts" else prompts,
            value if axis.startswith("tokens") else tokens,
            KINDS * heads,
            layers,
        )
        yield Measured(work, point["clean_pass_seconds"], point["rows_seconds"])


def calibrated(name):
    record, shape = json.loads((RECORDS / f"{name}.json").read_text()), SHAPES[name]
    return record, shape, Machine.calibrated(shape, list(measured_points(shape, record)))


def test_there_are_records_to_hold_the_model_against():
    """Without a measured record the tests below would say nothing."""
    assert CASES


@pytest.mark.parametrize("name", CASES)
def test_the_grid_is_predicted_within_thirty_percent(name):
    """From two loaded models to the numbers of the main grid; its time is in no probe point."""
    record, shape, machine = calibrated(name)
    prompts, tokens, layer = setting(record)
    work = Work(prompts, tokens, record["grid"]["n_conditions"], [layer])
    assert machine.seconds(shape, work) == pytest.approx(record["grid"]["seconds"], rel=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_atlas_is_predicted_within_thirty_percent(name):
    """All heads of all layers beyond the clean pass; its time is in no probe point."""
    record, shape, machine = calibrated(name)
    prompts, tokens, _ = setting(record)
    atlas = Work(prompts, tokens, KINDS * shape.n_heads, range(shape.n_layers))
    predicted = machine.rows_seconds(shape, atlas)
    assert predicted == pytest.approx(record["scan"]["seconds"], rel=TOLERANCE)


def test_a_pair_of_70b_over_two_gpus_is_predicted_from_the_8b_within_thirty_percent():
    """Constants are a machine's: those of one shape predict another, spread over two GPUs."""
    _, _, machine = calibrated("llama-8b")
    record = json.loads((RECORDS / "spread-llama-70b.json").read_text())
    prompts, tokens, layer = setting(record)
    work = Work(prompts, tokens, record["n_conditions"], [layer])
    predicted = machine.seconds(LLAMA_70B, work, n_devices=2)
    assert predicted == pytest.approx(record["grid_seconds"], rel=TOLERANCE)


@pytest.mark.parametrize(("n_devices", "share"), [(1, 1), (2, 7 / 12), (4, 15 / 48)])
def test_batches_take_turns_on_the_devices(n_devices, share):
    """Three batches for each device; only the first and the last turns leave some idle."""
    assert busy_share(n_devices) == pytest.approx(share)


@pytest.mark.parametrize("name", CASES)
def test_the_typical_point_of_the_growth_curves_is_met_within_thirty_percent(name):
    """Along heads, layers, prompts and tokens, clean pass and rows alike."""
    record, shape, machine = calibrated(name)
    points = list(measured_points(shape, record))
    passes = [machine.pass_seconds(shape, p.work) / p.pass_seconds - 1 for p in points]
    rows = [machine.rows_seconds(shape, p.work) / p.rows_seconds - 1 for p in points]
    assert np.median(np.abs(passes)) < TOLERANCE
    assert np.median(np.abs(rows)) < TOLERANCE


def test_constants_come_back_from_points_that_they_made():
    """A machine that follows the model exactly is found again."""
    truth, shape = Machine(0.1, 2e-15, 3e-4, 1.5e-15, 1e-11), SHAPES["llama-8b"]
    works = [
        Work(prompts, tokens, conditions, range(low, 32))
        for prompts, tokens, conditions, low in
        [(150, 96, 64, 31), (150, 96, 64, 0), (10, 96, 64, 26), (150, 12, 2, 26), (20, 24, 8, 16)]
    ]  # fmt: skip
    points = [
        Measured(work, truth.pass_seconds(shape, work), truth.rows_seconds(shape, work))
        for work in works
    ]
    found = Machine.calibrated(shape, points)
    for name, value in vars(truth).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6)


def test_operations_grow_as_the_formulas_say():
    """Rows are linear in the blocks above; a pass is linear in prompts and layers."""
    shape = SHAPES["gpt2-small"]
    steps = [row_flops(shape, layer, 64) - row_flops(shape, layer + 1, 64) for layer in range(11)]
    assert steps == pytest.approx([steps[0]] * 11)
    assert pass_flops(shape, 20, 64, 6) == pytest.approx(pass_flops(shape, 10, 64))
    assert pass_flops(shape, 10, 1000) > 10 * pass_flops(shape, 10, 100)


def weights_of(shape):
    """All weights of a model, embedding and unembedding included."""
    return shape.n_layers * block_weights(shape) + 2 * shape.d_model * shape.d_vocab


def test_a_model_of_eight_billion_has_as_many_weights():
    """8.03e9 of them."""
    assert weights_of(SHAPES["llama-8b"]) == pytest.approx(8.03e9, rel=0.01)


def test_the_shape_is_read_from_a_model():
    """Its weights are those of the model, biases, norms and positions aside."""
    model = tiny_model()
    weights = sum(w.numel() for w in model.parameters() if w.ndim > 1)
    assert weights_of(model.cfg) == pytest.approx(weights, rel=0.02)


class Ingredients:
    """As large as those of a condition."""

    label = "L20_heads12_a0.3_mapped"

    def to_dict(self):
        """Fingerprints by name."""
        return {f"ingredient {number}": "0" * 64 for number in range(18)}


@pytest.mark.parametrize("n_prompts", [150, 1000])
def test_the_store_is_as_large_as_predicted(tmp_path, n_prompts):
    """A condition of so many prompts, within 30%."""
    rng = np.random.default_rng(0)
    payload = {name: rng.lognormal(-8, 2, n_prompts).tolist()
               for name in ("kl_nats", "answer_logprob_change_nats")}  # fmt: skip
    path = Store(tmp_path).put(Ingredients(), payload)
    assert store_bytes(1, n_prompts) == pytest.approx(path.stat().st_size, rel=TOLERANCE)


def test_maps_are_as_large_as_predicted(tiny_maps, tiny_pair, tmp_path):
    """The tensors of a layer's map, and its JSON file, within a factor of two where both are small.

    At real widths the tensors are nearly everything: 32 heads of width 128 are 2 MB.
    """
    fitted, *_ = tiny_maps.values()
    stored_map(tmp_path, fitted)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size / 2 < map_bytes(tiny_pair.tuned.model.cfg, 1) < size * 2
    llama = SHAPES["llama-8b"]
    assert map_bytes(llama, 1) == pytest.approx(4 * 32 * 128 * 128, rel=0.02)


def test_more_of_anything_never_costs_less():
    """Layers, prompts, tokens and conditions each add seconds."""
    machine, shape = Machine(0.1, 2e-15, 3e-4, 1.5e-15, 1e-11), SHAPES["gpt2-small"]
    start = Work(20, 50, 60, [8])
    more = [
        Work(40, 50, 60, [8]), Work(20, 90, 60, [8]), Work(20, 50, 90, [8]),
        Work(20, 50, 60, [7, 8]),
    ]  # fmt: skip
    assert all(machine.seconds(shape, each) > machine.seconds(shape, start) for each in more)
    deeper = replace(shape, n_layers=24)
    assert machine.seconds(deeper, start) > machine.seconds(shape, start)
