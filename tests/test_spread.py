"""Models whose layers lie on several devices; most is skipped where there are not two GPUs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_cases import N_LAYERS, all_kinds_of_interventions, ragged_prompts, random_sources
from engine_cases import tiny_model as rotary_model
from tiny import fine_tuned, pair_of, prepared, random_prompts, tiny_model

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.methods import METHODS, rank_heads
from rq4lens.config import Patching
from rq4lens.models.load.devices import Placement
from rq4lens.patching.activations import capture_z
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.layout import side_by_side
from rq4lens.patching.engines.memory import MemoryPlan, stored_bytes_per_prompt
from rq4lens.patching.maps.fitting import fit_maps

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def spread(model):
    """The lower half on the first GPU, the upper half on the second."""
    model.cfg.device, model.cfg.n_devices = "cuda", 2
    for layer, block in enumerate(model.blocks):
        block.to(f"cuda:{2 * layer // model.cfg.n_layers}")
    for name, module in model.named_children():
        if name != "blocks":
            module.to("cuda:1" if name in {"ln_final", "unembed"} else "cuda:0")
    return model


@pytest.fixture(autouse=True)
def _exact_products():
    """TF32 would round the products of both placements, each in its own order."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@TWO_GPUS
@pytest.mark.parametrize("k_positions", [1, 2])
@pytest.mark.parametrize("max_bytes", [None, 150_000])
def test_two_gpus_give_the_numbers_of_one_device(k_positions, max_bytes):
    """The suffix engine follows the rows from GPU to GPU, wherever what it keeps is kept."""
    prompts, sources = ragged_prompts(), random_sources(6, k_positions)
    interventions = all_kinds_of_interventions()
    settings = {"settings": Patching(k_positions=k_positions), "max_bytes": max_bytes}
    expected = make_engine(rotary_model(), prompts, **settings).effects(interventions, sources)
    engine = make_engine(spread(rotary_model()), prompts, **settings)
    assert engine.name == "suffix", engine.fallback_reason
    found = engine.effects(interventions, sources)
    np.testing.assert_allclose(found.kl_nats, expected.kl_nats, rtol=1e-4, atol=1e-5)


@TWO_GPUS
def test_captured_activations_are_those_of_one_device():
    """Every batch's activations end up with its own prompts, though several are under way."""
    prompts, layers = ragged_prompts(), list(range(N_LAYERS))
    expected = capture_z(rotary_model(), prompts, layers, batch_size=1)
    found = capture_z(spread(rotary_model()), prompts, layers, batch_size=1)
    for layer in layers:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-5)


@TWO_GPUS
@pytest.mark.parametrize("method", METHODS)
def test_every_method_ranks_a_model_on_two_gpus(method):
    """Gradients and forward-mode derivatives cross from GPU to GPU too."""
    prompts = random_prompts()
    pair = pair_of(tiny_model(), fine_tuned(tiny_model()), prompts)
    apart = pair_of(spread(tiny_model()), spread(fine_tuned(tiny_model())), prompts)
    scores = []
    for each in (pair, apart):
        measured = MeasuredSets.of(prepared(each, fit_maps(each, [1])), 1, 0.3)
        scores.append(rank_heads(method, measured).scores)
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-2, atol=1e-5)


def test_a_placement_names_each_device_once_in_the_order_of_the_layers():
    """What is on the fullest device decides how much is kept there."""
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    placement = Placement((first, first, second), second)
    assert placement.devices == (first, second)
    assert placement.largest_share == 2 / 3
    assert Placement.all_on(first, 3).largest_share == 1


def test_each_device_keeps_its_own_layers():
    """A model on two devices keeps half of the keys on each."""
    cfg, prompts = rotary_model().cfg, ragged_prompts([9] * 40)
    cpu, other = torch.device("cpu"), torch.device("meta")
    alone = MemoryPlan.of(cfg, prompts, Placement.all_on(cpu, 4), max_bytes=2**30)
    halves = Placement((cpu, cpu, other, other), other)
    both = MemoryPlan.of(cfg, prompts, halves, max_bytes=2**30)
    saved = alone.passes.bytes_per_row - both.passes.bytes_per_row
    assert saved == stored_bytes_per_prompt(cfg, 9) // 2


@pytest.mark.parametrize("n_works", [0, 1, 2, 5])
def test_works_follow_one_another_from_device_to_device(n_works):
    """Each ends with its own result; the next one begins while the last is on the second device."""
    devices = [torch.device("cuda", index) for index in (0, 0, 1, 1)]
    told: list[tuple[int, int]] = []

    def work(number):
        for step, device in enumerate(devices):
            yield device
            told.append((number, step))
        return number

    assert list(side_by_side(work(number) for number in range(n_works))) == list(range(n_works))
    assert sorted(told) == [(number, step) for number in range(n_works) for step in range(4)]
    for number in range(n_works - 1):
        begun = told.index((number + 1, 0))
        assert told.index((number, 2)) < begun < told.index((number, 3))


def test_works_on_one_device_come_one_after_the_other():
    """Memory is that of a single batch there."""
    told: list[int] = []

    def work(number):
        for _ in range(3):
            yield torch.device("cpu")
            told.append(number)

    list(side_by_side(work(number) for number in range(3)))
    assert told == sorted(told)
