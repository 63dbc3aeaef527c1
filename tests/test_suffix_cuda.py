"""The suffix engine on a GPU; skipped where there is none."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from engine_cases import all_kinds_of_interventions, ragged_prompts, random_sources, tiny_model
from tiny import fine_tuned, half_precision, pair_of, prepared, random_prompts
from tiny import tiny_model as normalised_model

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.compared import rank_heads
from rq4lens.analysis.rankings.methods import METHODS
from rq4lens.config import Patching
from rq4lens.patching import passes, patch
from rq4lens.patching.engines.block_row import kernel_covers, row_z, row_z_by_kernel
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.clean_pass import each_tensor
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.patch import summed_by_tensors

if torch.cuda.is_available():
    from rq4lens.patching.engines.kernels import summed_by_kernel

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


@pytest.mark.parametrize("max_bytes", [None, 150_000])
@pytest.mark.parametrize("k_positions", [1, 2])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_the_engine_equals_native_hooks_on_a_gpu(fields, k_positions, max_bytes):
    """Also when the kept keys and values lie in main memory because the budget is small."""
    model, prompts = tiny_model(device="cuda", **fields), ragged_prompts()
    sources = random_sources(len(prompts), k_positions)
    interventions = all_kinds_of_interventions()
    engine = make_engine(model, prompts, Patching(k_positions=k_positions), max_bytes=max_bytes)
    assert engine.name == "suffix", engine.fallback_reason
    assert engine.memory_report["kept_on_device"] is (max_bytes is None)
    native = HookEngine(model, prompts, Patching(k_positions=k_positions))
    expected = native.effects(interventions, sources).kl_nats
    found = engine.effects(interventions, sources).kl_nats
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_full_gpu_halves_the_chunk():
    """A real out-of-memory error is caught and the numbers do not change."""
    model, prompts = tiny_model(device="cuda", d_vocab=50_000), ragged_prompts()
    sources, interventions = random_sources(len(prompts)), all_kinds_of_interventions() * 20
    expected = make_engine(model, prompts).effects(interventions, sources).kl_nats
    engine = make_engine(model, prompts, max_bytes=2**40)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(120e6 / total)
    try:
        found = engine.effects(interventions, sources).kl_nats
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert engine.memory_report["rows"]["n_out_of_memory"] > 0


@pytest.mark.parametrize("tilted", [True, False])
@pytest.mark.parametrize("n_vocab", [50, 4096, 10_007])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_sums_what_the_definition_says(dtype, n_vocab, tilted):
    """Against the same sums in float64, for vocabularies that end inside a block and at its end."""
    draw = torch.Generator("cuda").manual_seed(0)
    clean = torch.randn(3, 1, n_vocab, generator=draw, device="cuda").to(dtype)
    patched = clean + 0.1 * torch.randn(3, 5, n_vocab, generator=draw, device="cuda").to(dtype)
    clean = clean.float()
    shared = (clean.softmax(-1), clean.argmax(-1, keepdim=True))
    found = summed_by_kernel(patched, clean, *shared, tilted=tilted)
    q = shared[0].double()
    expected = summed_by_tensors(patched.double(), clean.double(), q, shared[1], tilted=tilted)
    assert found[2] is expected[2] is None
    for sums, exact in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(sums.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_others", [50, 52])
def test_a_kernel_that_is_built_ahead_is_built_once(n_others, monkeypatch):
    """Whoever comes while it is built waits; the engine finds what it asks for."""
    tried = []
    monkeypatch.setattr(patch, "_BUILT", {})
    monkeypatch.setattr(patch, "_succeeds", lambda what, _trial: tried.append(what) or True)
    patch.build_ahead("cuda", torch.float32, (50, n_others), "patched||clean")
    alike = n_others == 50
    here = torch.zeros(0, device="cuda").device
    for _ in range(3):
        assert patch._kernel_works(here, torch.float32, torch.float32, 50, (True, alike))
        assert alike or patch._kernel_works(here, torch.float32, torch.float32, 50, (False, True))
    assert len(tried) == (1 if alike else 2)


def test_a_logit_of_minus_infinity_is_not_summed_silently():
    """The sums are not finite then, and the engine takes the slower definition."""
    clean = torch.zeros(1, 1, 60, device="cuda")
    clean[..., 3] = -torch.inf
    shared = (clean.softmax(-1), clean.argmax(-1, keepdim=True))
    _, moment, _ = summed_by_kernel(clean.expand(1, 2, 60), clean, *shared, tilted=True)
    assert not moment.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scan_by_the_kernel_gives_the_same_numbers(dtype, monkeypatch):
    """Also in half precision, where both ways sum in float32."""
    model, prompts = tiny_model(dtype, device="cuda", d_vocab=5000), ragged_prompts()
    sources, interventions = random_sources(len(prompts)), all_kinds_of_interventions()
    engine = make_engine(model, prompts)
    found = engine.effects(interventions, sources).kl_nats
    monkeypatch.setattr(patch, "_kernel_works", lambda *_: False)
    expected = engine.effects(interventions, sources).kl_nats
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


KERNEL_VARIANTS = {
    name: VARIANTS[name] for name in ("rotary, grouped, gated", "sliding window")
} | {"learned positions": {"positional_embedding_type": "standard", "n_key_value_heads": None}}


@pytest.mark.parametrize("n_positions", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", KERNEL_VARIANTS.values(), ids=KERNEL_VARIANTS)
def test_rows_attend_by_the_kernel_as_with_plain_tensors(fields, dtype, n_positions):
    """Against float64, and no further from it than plain tensors of the same format are."""
    model = tiny_model(dtype, device="cuda", d_head=16, **fields)
    assert kernel_covers(model.cfg)
    # More rows than a program takes, and more keys than it reads at once.
    prompts = ragged_prompts((9, 50, 23)).placed(n_positions)
    engine = make_engine(model, prompts, first_layer=0)
    clean = engine.clean_batches(0)[0]
    draw = torch.Generator("cuda").manual_seed(0)
    for layer, block in enumerate(model.blocks):
        shared = clean.layers[layer].earlier
        shape = (3, 70, n_positions, model.cfg.d_model)
        resid = torch.randn(shape, generator=draw, device="cuda").to(dtype)
        by_kernel = row_z_by_kernel(block, resid, shared)
        plain = row_z(block, resid, shared)
        precise = copy.deepcopy(block).double()
        in_double = each_tensor(
            shared, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor
        )
        exact = row_z(precise, resid.double(), in_double)
        errors = [float((z - exact).abs().max().detach()) for z in (by_kernel, plain)]
        assert by_kernel.dtype == dtype
        assert errors[0] <= 1.5 * errors[1]
        assert errors[1] < 0.05 * float(exact.abs().max().detach())


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": torch.float32},
        {"d_head": 8},
        {"d_head": 24},
        {"positional_embedding_type": "alibi", "n_key_value_heads": None},
        {"attn_scores_soft_cap": 30.0},
    ],
)
def test_what_the_attention_kernel_does_not_cover_goes_by_plain_tensors(fields):
    """Such a model is measured all the same."""
    model = tiny_model(**({"dtype": torch.bfloat16, "d_head": 16, "device": "cuda"} | fields))
    prompts = ragged_prompts()
    engine = make_engine(model, prompts, Patching(k_positions=3))
    sources = random_sources(len(prompts), 3, d_head=model.cfg.d_head)
    assert np.isfinite(engine.effects(all_kinds_of_interventions(), sources).kl_nats).all()
    assert engine._row_z is row_z


@pytest.mark.parametrize("d_head", [16, 64])
def test_rows_of_several_positions_attend_by_the_kernel(d_head):
    """An engine takes it where it covers the model, and stays as near to native hooks as they are
    to themselves in float32.
    """
    made = [
        tiny_model(dtype, device="cuda", d_head=d_head) for dtype in (torch.bfloat16, torch.float32)
    ]
    made[1].load_state_dict(made[0].state_dict())
    prompts, settings = ragged_prompts(), Patching(k_positions=3)
    sources, interventions = random_sources(len(prompts), 3, d_head), all_kinds_of_interventions()
    engine = make_engine(made[0], prompts, settings)
    found = engine.effects(interventions, sources).kl_nats
    assert engine._row_z is row_z_by_kernel
    native, exact = (
        HookEngine(model, prompts, settings).effects(interventions, sources).kl_nats
        for model in made
    )
    assert np.abs(found - exact).mean() <= 1.5 * np.abs(native - exact).mean()


def test_logits_in_parts_are_those_of_one_product(monkeypatch):
    """A product that would be too large is made in parts, also where they are not equal."""
    model = tiny_model(device="cuda")
    rows = torch.randn(5, 7, model.cfg.d_model, device="cuda")
    with torch.no_grad():
        expected = passes.unembed(model, rows)
        monkeypatch.setattr(passes, "LARGEST_PRODUCT", 11 * model.cfg.d_vocab_out)
        found = passes.unembed(model, rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ranks_a_half_precision_model(method):
    """Derivatives too go through half-precision modules on a GPU."""
    base = half_precision(normalised_model()).to("cuda")
    pair = pair_of(
        base, half_precision(fine_tuned(normalised_model())).to("cuda"), random_prompts()
    )
    measured = MeasuredSets.of(prepared(pair, fit_maps(pair, [1])), 1, 0.3)
    assert sorted(rank_heads(method, measured).heads) == list(range(measured.n_heads))
