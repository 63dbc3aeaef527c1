"""The suffix engine on a GPU; skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_cases import all_kinds_of_interventions, ragged_prompts, random_sources, tiny_model

from rq4lens.patching.engines import make_engine
from rq4lens.patching.hooks import HookEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

VARIANTS = {
    "rotary, grouped, gated": {},
    "learned positions, LayerNorm": {
        "positional_embedding_type": "standard",
        "normalization_type": "LN",
        "n_key_value_heads": None,
        "gated_mlp": False,
    },
    "alibi": {"positional_embedding_type": "alibi", "n_key_value_heads": None},
    "sliding window": {
        "use_local_attn": True,
        "window_size": 5,
        "attn_types": ["local", "global"] * 2,
    },
}


@pytest.fixture(autouse=True)
def _exact_products():
    """TF32 would round the products of both engines, each in its own order."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("max_bytes", [None, 300_000])
@pytest.mark.parametrize("k_positions", [1, 2])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_the_engine_equals_native_hooks_on_a_gpu(fields, k_positions, max_bytes):
    """Also when the kept keys and values lie in main memory because the budget is small."""
    model, prompts = tiny_model(device="cuda", **fields), ragged_prompts()
    sources = random_sources(len(prompts), k_positions)
    interventions = all_kinds_of_interventions()
    engine = make_engine(model, prompts, k_positions=k_positions, max_bytes=max_bytes)
    assert engine.name == "suffix", engine.fallback_reason
    assert engine.memory_report["kept_on_device"] is (max_bytes is None)
    native = HookEngine(model, prompts, k_positions=k_positions)
    expected = native.effects(interventions, sources).kl_nats
    np.testing.assert_allclose(engine.effects(interventions, sources).kl_nats, expected, atol=1e-5)


def test_a_full_gpu_halves_the_chunk():
    """A real out-of-memory error is caught and the numbers do not change."""
    model, prompts = tiny_model(device="cuda", d_vocab=50_000), ragged_prompts()
    sources, interventions = random_sources(len(prompts)), all_kinds_of_interventions() * 20
    expected = make_engine(model, prompts).effects(interventions, sources).kl_nats
    engine = make_engine(model, prompts, max_bytes=2**40)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(600e6 / total)
    try:
        found = engine.effects(interventions, sources).kl_nats
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert engine.memory_report["rows"]["n_out_of_memory"] > 0
