"""The fast engines: exact against native hooks, whatever is batched, chunked, kept or short."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import (
    D_HEAD,
    LENGTHS,
    N_HEADS,
    N_LAYERS,
    VOCAB,
    all_kinds_of_interventions,
    heads,
    ragged_prompts,
    random_sources,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import ZOO, save, train_tokenizer
from torch.autograd import forward_ad

from rq4lens.config import Patching, Place
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.models.load.lens import TransformerBridge
from rq4lens.models.load.loading import load_hooked
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.activations import capture_z
from rq4lens.patching.engines import block_row, layout, memory
from rq4lens.patching.engines import row_engine as row_engine_module
from rq4lens.patching.engines.cached import CachedEngine
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.engines.layout import fused, fusible, store_for_products
from rq4lens.patching.engines.memory import RowBlock, RowBudget
from rq4lens.patching.engines.suffix import SuffixEngine
from rq4lens.patching.passes import forward_batch
from rq4lens.patching.patch import (
    Effects,
    OtherModel,
    Patch,
    Sources,
    effects_by_difference,
    next_token_effects,
)

TOLERANCE_NATS = 1e-5
FAST = pytest.mark.parametrize("engine", [SuffixEngine, CachedEngine])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def prompts() -> TokenizedPrompts:
    return ragged_prompts()


@pytest.fixture(scope="module")
def sources() -> Sources:
    return random_sources(len(LENGTHS))


@pytest.fixture(scope="module")
def reference(model: Any, prompts: TokenizedPrompts, sources: Sources) -> Effects:
    return HookEngine(model, prompts).effects(all_kinds_of_interventions(), sources)


def assert_same(found: Effects, expected: Effects) -> None:
    np.testing.assert_allclose(found.kl_nats, expected.kl_nats, atol=TOLERANCE_NATS)
    np.testing.assert_allclose(
        found.answer_logprob_change_nats, expected.answer_logprob_change_nats, atol=TOLERANCE_NATS
    )


@FAST
def test_the_fast_engine_equals_native_hooks(engine, model, prompts, sources, reference):
    """The numbers are those of one full forward pass per condition."""
    assert reference.kl_nats.min() > 1e-4, "the conditions must do something to be compared"
    assert_same(engine(model, prompts).effects(all_kinds_of_interventions(), sources), reference)


@FAST
@pytest.mark.parametrize("k_positions", [2, 3])
def test_several_patched_positions_equal_native_hooks(engine, k_positions, model, prompts):
    """With more than one patched position, later positions see the earlier patched ones."""
    sources = random_sources(len(prompts), k_positions)
    expected = HookEngine(model, prompts, Patching(k_positions=k_positions))
    found = engine(model, prompts, Patching(k_positions=k_positions))
    interventions = all_kinds_of_interventions()
    assert_same(found.effects(interventions, sources), expected.effects(interventions, sources))


def beside_and_written(n_prompts: int, shared: torch.Tensor | None) -> tuple[Any, ...]:
    """Another model's answers, sources with a `W_O` of their own, and patches of both."""
    draw = torch.Generator().manual_seed(5)
    n_tokens = VOCAB if shared is None else len(shared)
    other = OtherModel(torch.randn(n_prompts, 1, n_tokens, generator=draw).log_softmax(-1), shared)
    sources, W_O = random_sources(n_prompts), torch.randn(N_HEADS, D_HEAD, 32, generator=draw)
    sources.made["output"] = lambda layer: sources[layer, "raw"]
    sources.W_O["output"] = lambda _layer: W_O
    written = (Patch(0, HeadSet.all(N_HEADS), 1.0, "output"), Patch(2, heads(1), 0.5, "raw"))
    several = [(Patch(1, heads(0, 2), 0.4, "output"),), (Patch(3, heads(1), 1.0, "output"),)]
    return other, sources, [*all_kinds_of_interventions(), *several, written]


@FAST
@pytest.mark.parametrize("shared", [None, torch.arange(3, 40)], ids=["all tokens", "shared tokens"])
def test_the_other_model_and_its_outputs_equal_native_hooks(engine, shared, model, prompts):
    """The gap left, whose the answer is, heads written by another `W_O`, and every layer."""
    other, sources, interventions = beside_and_written(len(prompts), shared)
    hooks, fast = HookEngine(model, prompts), engine(model, prompts, first_layer=2)
    for expected, found in (
        (each.effects(interventions, sources, other=other) for each in (hooks, fast)),
        (each.every_layer("raw", sources, other) for each in (hooks, fast)),
    ):
        assert len(expected.measures) == 4
        for one, two in zip(expected.rows, found.rows, strict=True):
            np.testing.assert_allclose(two, one, atol=TOLERANCE_NATS)
    assert torch.allclose(hooks.clean_log_probs(), fast.clean_log_probs(), atol=TOLERANCE_NATS)
    assert torch.allclose(hooks.clean_z(0), fast.clean_z(0), atol=TOLERANCE_NATS)


def test_rows_go_through_the_models_own_submodules(model, prompts, sources):
    """Every norm, MLP and the unembedding is called for them, and is afterwards as it was."""
    engine = SuffixEngine(model, prompts)
    engine.clean_batches(0)
    called: set[str] = set()
    parts = [f"blocks.{i}.{part}" for i in range(N_LAYERS) for part in ("ln1", "ln2", "mlp")][1:]
    parts += ["ln_final", "unembed"]  # the first block's ln1 was called in the clean pass
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda *_, name=name: called.add(name)  # type: ignore[misc]
        )
        for name in parts
    ]
    engine.effects([(Patch(0, heads(1), 0.3, "raw"),)], sources)
    for handle in handles:
        handle.remove()
    assert called == set(parts)
    assert not any("forward" in vars(module) for module in model.modules())


def test_norms_inside_norms_contexts_are_left_as_they_were(model):
    """A clean pass may start within the rows of an engine; the outer one puts everything back."""
    with fused(fusible(model)), fused(fusible(model.blocks)):
        assert "forward" in vars(model.ln_final)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_derivative_does_not_go_through_a_fused_norm(monkeypatch):
    """Forward-mode derivatives are those of the library's own norm: a fused kernel's are in float32
    on a GPU, whatever the rows are in.
    """
    model = tiny_model(torch.bfloat16)
    norm = model.ln_final
    rows = torch.randn(3, model.cfg.d_model, dtype=torch.bfloat16)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(rows, torch.ones_like(rows))
        expected = forward_ad.unpack_dual(norm(dual))
        monkeypatch.setattr(layout.functional, "rms_norm", None)
        with fused([norm]):
            found = forward_ad.unpack_dual(norm(dual))
    assert torch.equal(found.primal, expected.primal)
    assert torch.equal(found.tangent, expected.tangent)
    assert found.tangent.dtype == torch.bfloat16


def test_the_other_direction_of_the_divergence_equals_native_hooks(model, prompts, sources):
    """KL(clean || patched) is a setting of every engine and means the same in each."""
    interventions = all_kinds_of_interventions()[:6]
    expected = HookEngine(model, prompts, Patching(kl_direction="clean||patched"))
    found = SuffixEngine(model, prompts, Patching(kl_direction="clean||patched"))
    assert_same(found.effects(interventions, sources), expected.effects(interventions, sources))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("engine", "floor"), [(SuffixEngine, 0), (CachedEngine, TOLERANCE_NATS)])
def test_no_patch_reads_zero(engine, floor, dtype, prompts):
    """With alpha 0, no head, no patch or a self-patch, nothing changes: to the bit by suffix.

    The cached engine's rows are sequences of a batch, and a processor's threads may divide the
    products of a batch so that equal rows round differently.
    """
    half = engine(tiny_model(dtype), prompts)
    everything = HeadSet.all(N_HEADS)
    own = {(layer, "self"): half.clean_z(layer) for layer in range(N_LAYERS)}
    sources = Sources({**own, **random_sources(len(prompts))})
    nothing = [
        kind
        for layer in range(N_LAYERS)
        for kind in (
            (Patch(layer, everything, 0.0, "raw"),),
            (Patch(layer, HeadSet.none(N_HEADS), 1.0, "raw"),),
            (Patch(layer, everything, 0.3, "self"),),
            (Patch(layer, everything, 1.0, "self"),),
        )
    ]
    effects = half.effects([(), *nothing], sources)
    assert abs(effects.kl_nats).max() <= floor
    assert abs(effects.answer_logprob_change_nats).max() <= floor


def test_half_precision_agrees_with_float32_within_its_noise(prompts, sources):
    """bf16 rounds; effects that stand well above its noise keep their size."""
    interventions = [(Patch(1, HeadSet.all(N_HEADS), 1.0, "raw"),)]
    exact = SuffixEngine(tiny_model(), prompts).effects(interventions, sources)
    rounded = SuffixEngine(tiny_model(torch.bfloat16), prompts).effects(interventions, sources)
    np.testing.assert_allclose(rounded.kl_nats, exact.kl_nats, rtol=0.1)


@pytest.mark.parametrize("direction", ["patched||clean", "clean||patched"])
@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-6, 5), shift=st.floats(-20, 20), seed=st.integers(0, 9999))
def test_effects_by_difference_equal_the_definition(direction, scale, shift, seed):
    """The rearranged sums are the divergence and the change of log-probability, small or large."""
    draw = torch.Generator().manual_seed(seed)
    clean = 3 * torch.randn(5, 1, 40, generator=draw)
    patched = clean + shift + scale * torch.randn(5, 3, 40, generator=draw)
    found = torch.stack(effects_by_difference(patched, clean, direction))
    exact = torch.stack(next_token_effects(patched.double(), clean.double(), direction))
    # The logits' own rounding: a common shift costs digits before any engine sees them.
    tolerance = 1e-6 * (abs(shift) + scale)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=tolerance)


def test_small_effects_keep_their_digits_in_float32():
    """A divergence of 1e-9 nats is told to a percent; float32 log-probabilities know 1e-7."""
    draw = torch.Generator().manual_seed(0)
    clean = 3 * torch.randn(1, 1, 1000, generator=draw)
    patched = clean + 1e-4 * torch.randn(1, 1, 1000, generator=draw)
    found, _ = effects_by_difference(patched, clean)
    exact, _ = next_token_effects(patched.double(), clean.double())
    assert 1e-9 < exact < 1e-8
    assert float(found) == pytest.approx(float(exact), rel=0.01)


@FAST
def test_tokens_of_probability_zero_are_measured(engine, prompts, sources):
    """A logit of minus infinity, as padded vocabularies have, does not turn numbers into NaN."""
    padded = tiny_model()
    padded.unembed.b_U.data[-3:] = -torch.inf
    interventions = all_kinds_of_interventions()
    found = engine(padded, prompts).effects(interventions, sources)
    assert np.isfinite(found.kl_nats).all()
    assert_same(found, HookEngine(padded, prompts).effects(interventions, sources))


@FAST
@settings(max_examples=12, deadline=None)
@given(
    batch_size=st.integers(1, 7),
    max_rows=st.integers(1, 200),
    order=st.permutations(range(len(LENGTHS))),
    chosen=st.lists(st.integers(0, 26), min_size=1, max_size=12),
)
def test_batching_chunking_and_order_change_no_number(
    engine, batch_size, max_rows, order, chosen, model, prompts, sources, reference
):
    """A number depends on its prompt and condition alone."""
    shuffled = TokenizedPrompts(
        tuple(prompts.ids[i] for i in order), tuple(prompts.token_ids[i] for i in order)
    )
    moved = Sources({key: source[list(order)] for key, source in sources.items()})
    interventions = [all_kinds_of_interventions()[i] for i in chosen]
    measuring = engine(model, shuffled, place=Place(batch_size=batch_size))
    measuring._memory.rows.max_rows = max_rows
    found = measuring.effects(interventions, moved)
    expected = Effects(
        reference.kl_nats[np.ix_(chosen, order)],
        reference.answer_logprob_change_nats[np.ix_(chosen, order)],
    )
    assert_same(found, expected)
    assert measuring.memory_report["rows"]["largest_chunk_rows"] <= max_rows


@FAST
def test_clean_activations_are_those_of_a_plain_forward_pass(engine, model, prompts):
    """tuned_z is what native hooks read, whichever layer the clean pass was started for."""
    captured = capture_z(model, prompts, range(N_LAYERS), k_positions=2)
    measuring = engine(model, prompts, Patching(k_positions=2), first_layer=2)
    for layer in (2, 3, 0, 1):
        torch.testing.assert_close(measuring.clean_z(layer), captured[layer])


def test_a_patch_below_the_first_layer_is_served_too(model, prompts, sources, reference):
    """first_layer saves memory; it never changes what can be asked or what is answered."""
    measuring = SuffixEngine(model, prompts, first_layer=3)
    kept = measuring.memory_report["kept_bytes"]
    assert_same(measuring.effects(all_kinds_of_interventions(), sources), reference)
    assert measuring.memory_report["kept_bytes"] > kept


def test_no_hook_stays_behind(model, prompts, sources):
    """Engines read and patch through hooks that are gone when they are done."""
    CachedEngine(model, prompts).effects(all_kinds_of_interventions(), sources)
    SuffixEngine(model, prompts).effects(all_kinds_of_interventions(), sources)
    assert all(not point.fwd_hooks for point in model.hook_dict.values())


def test_progress_counts_every_row_once(model, prompts, sources):
    """The rows told to a progress bar add up to prompts x interventions."""
    told: list[int] = []
    measuring = SuffixEngine(model, prompts, place=Place(batch_size=4))
    measuring._memory.rows.max_rows = 7
    measuring.effects(all_kinds_of_interventions(), sources, told.append)
    assert sum(told) == len(prompts) * len(all_kinds_of_interventions())


def test_nothing_asked_is_nothing_measured(model, prompts, sources):
    """No intervention gives an empty table of the right width."""
    assert SuffixEngine(model, prompts).effects([], sources).kl_nats.shape == (0, len(prompts))


def test_weights_stored_anew_compute_the_same_bits(prompts):
    """Reordering weights in memory changes neither their values nor one bit of the logits."""
    untouched, stored = tiny_model(), tiny_model()
    store_for_products((*stored.blocks, stored.unembed))
    batch = next(prompts.batches(len(prompts)))
    with torch.no_grad():
        assert torch.equal(forward_batch(untouched, batch), forward_batch(stored, batch))
    before = dict(untouched.named_parameters())
    assert all(torch.equal(before[name], now) for name, now in stored.named_parameters())


# Memory


def out_of_memory_above(
    limit: int, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, n_rows: Callable
) -> list[int]:
    """Let a function fail like a full GPU when it is given more rows than the limit."""
    original, calls = getattr(module, name), []

    def limited(*args: Any, **kwargs: Any) -> Any:
        calls.append(n_rows(*args))
        if calls[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, limited)
    return calls


def test_running_out_of_memory_halves_the_chunk_and_keeps_what_is_done(
    monkeypatch, model, prompts, sources, reference
):
    """Only the chunk that failed is divided; the record says how far it had to go."""
    calls = out_of_memory_above(
        20,
        monkeypatch,
        row_engine_module,
        "effects_by_difference",
        lambda logits, *_, **__: logits.shape[:2].numel(),
    )
    measuring = SuffixEngine(model, prompts)
    assert_same(measuring.effects(all_kinds_of_interventions(), sources), reference)
    report = measuring.memory_report["rows"]
    assert report["n_out_of_memory"] >= 1
    assert report["max_rows"] < len(prompts) * len(all_kinds_of_interventions())
    assert max(calls) > 20


def test_running_out_of_memory_in_the_clean_pass_halves_the_batch(
    monkeypatch, model, prompts, sources, reference
):
    """The clean pass shrinks its batches in the same way."""
    measuring = SuffixEngine(model, prompts)
    out_of_memory_above(
        2, monkeypatch, SuffixEngine, "_clean_pass", lambda _, batch, *__: len(batch.rows)
    )
    assert_same(measuring.effects(all_kinds_of_interventions(), sources), reference)
    assert measuring.memory_report["clean_pass"]["n_out_of_memory"] > 0
    assert measuring.memory_report["clean_pass"]["largest_chunk_rows"] <= 2


def test_a_single_row_that_does_not_fit_says_what_to_change(monkeypatch, model, prompts, sources):
    """At one row nothing is left to divide: the error names the remedies."""
    out_of_memory_above(
        0,
        monkeypatch,
        row_engine_module,
        "effects_by_difference",
        lambda logits, *_, **__: len(logits),
    )
    with pytest.raises(UserError, match=r"shorter prompts, .*bfloat16, or a device with more"):
        SuffixEngine(model, prompts).effects(all_kinds_of_interventions(), sources)


@settings(deadline=None)
@given(
    n_prompts=st.integers(1, 40),
    n_conditions=st.integers(1, 40),
    max_rows=st.integers(1, 300),
    together=st.booleans(),
)
def test_pieces_cover_every_row_once_and_none_is_too_large(
    n_prompts, n_conditions, max_rows, together
):
    """Chunking is a partition within the budget; conditions stay together where that is asked."""
    seen = np.zeros((n_prompts, n_conditions), dtype=int)

    def work(block: RowBlock) -> None:
        assert block.n_rows <= max_rows
        assert not together or n_conditions > max_rows or block.conditions == every
        seen[block.prompts, block.conditions] += 1

    every = slice(0, n_conditions)
    budget = RowBudget(budget_bytes=max_rows, bytes_per_row=1)
    budget.run(RowBlock(slice(0, n_prompts), every, together), work)
    assert (seen == 1).all()


def test_a_budget_smaller_than_the_clean_pass_keeps_it_in_main_memory(
    monkeypatch, model, prompts, sources, reference
):
    """Kept keys and values that would take more than half of the device are moved when needed."""
    monkeypatch.setattr(memory, "is_main_memory", lambda device: False)  # noqa: ARG005
    small = SuffixEngine(model, prompts, max_bytes=100_000)
    large = SuffixEngine(model, prompts, max_bytes=100_000_000)
    assert not small.memory_report["kept_on_device"]
    assert large.memory_report["kept_on_device"]
    assert_same(small.effects(all_kinds_of_interventions(), sources), reference)


# Choosing an engine


def test_the_suffix_engine_is_the_default(model, prompts):
    """Nothing falls back where the fast engine is exact."""
    engine = make_engine(model, prompts)
    assert (engine.name, engine.fallback_reason) == ("suffix", None)


@pytest.mark.parametrize(
    ("fields", "expected", "reason"),
    [
        ({"use_attention_sinks": True}, "cached", "attention sinks"),
        ({"use_attn_in": True, "n_key_value_heads": None}, "cached", "inputs of their own"),
        ({"use_dynamic_ntk_rope": True, "train_seq_length": 16}, "hooks", "length of the batch"),
        ({"use_logn_attn": True, "train_seq_length": 16}, "cached", "logarithm of their position"),
        ({"positional_embedding_type": "shortformer"}, "cached", "embedding is shortformer"),
    ],
)
def test_what_is_not_covered_falls_back_to_exact_numbers(
    fields, expected, reason, prompts, sources, caplog
):
    """The engine changes, said once in the log and kept for the record; the numbers do not."""
    odd = tiny_model(**fields)
    with caplog.at_level(logging.WARNING, logger="rq4lens"):
        engine = make_engine(odd, prompts)
    assert engine.name == expected
    assert engine.fallback_reason is not None
    assert reason in engine.fallback_reason
    assert [record.message for record in caplog.records] == [
        f"{engine.fallback_reason}; using engine {expected}"
    ]
    interventions = all_kinds_of_interventions()
    found = engine.effects(interventions, sources)
    assert_same(found, HookEngine(odd, prompts).effects(interventions, sources))


def test_an_engine_that_disagrees_with_native_hooks_is_not_used(monkeypatch, prompts):
    """Never a wrong number: a suffix engine that computes something else is found out."""
    gathered = block_row.gathered

    def without_own_value(pattern: Any, v: Any, shared: Any) -> Any:
        return gathered(pattern, torch.zeros_like(v), shared)

    monkeypatch.setattr(block_row, "gathered", without_own_value)
    engine = make_engine(tiny_model(), prompts)
    assert engine.name == "cached"
    assert "its logits differ from those of native hooks" in (engine.fallback_reason or "")


def test_an_engine_that_crashes_is_not_used(monkeypatch, prompts):
    """An unforeseen architecture is measured by native hooks instead of ending the run."""

    def crash(*_: Any) -> Any:
        raise RuntimeError("no such projection")

    monkeypatch.setattr(block_row, "_heads", crash)
    monkeypatch.setattr(CachedEngine, "_clean_pass", crash)
    engine = make_engine(tiny_model(), prompts)
    assert engine.name == "hooks"
    assert (engine.fallback_reason or "").count("RuntimeError: no such projection") == 2


def test_a_bridge_is_measured_through_its_own_cache(tmp_path, prompts, sources):
    """A TransformerBridge has hook_z too, but not the submodules that the suffix engine calls."""
    folder = save(ZOO["llama3"].make(), train_tokenizer(), tmp_path)
    hooked = load_hooked(folder, check_logits=False).model
    bridge = make_engine(TransformerBridge.boot_transformers(str(folder), device="cpu"), prompts)
    assert bridge.name == "cached"
    assert "it is a TransformerBridge, not a HookedTransformer" in (bridge.fallback_reason or "")
    interventions = all_kinds_of_interventions(hooked.cfg.n_layers)
    expected = make_engine(hooked, prompts).effects(interventions, sources)
    assert_same(bridge.effects(interventions, sources), expected)


@pytest.mark.parametrize("name", ["suffix", "cached", "hooks"])
def test_the_engine_that_is_preferred_is_used(name, model, prompts):
    """The preferred engine starts the chain."""
    assert make_engine(model, prompts, place=Place(engine=name)).name == name


# Bad input


@FAST
def test_a_source_of_another_shape_is_refused(engine, model, prompts):
    """The error names the site, both shapes and the fix."""
    wrong = random_sources(len(prompts) - 1)
    with pytest.raises(
        UserError,
        match=r"blocks\.1\.attn\.hook_z: the site has shape \(6, 1, 4, 8\).*\(5, 1, 4, 8\)",
    ):
        engine(model, prompts).effects([(Patch(1, heads(0), 0.3, "raw"),)], wrong)


@FAST
def test_a_layer_that_does_not_exist_is_refused(engine, model, prompts, sources):
    """The error names the layer and those that exist."""
    with pytest.raises(UserError, match="layer 9 does not exist: the models have layers 0 to 3"):
        engine(model, prompts).effects([(Patch(9, heads(0), 0.3, "raw"),)], sources)


@FAST
def test_more_positions_than_the_shortest_prompt_has_are_refused(engine, model, prompts):
    """The error names the length of the shortest prompt."""
    with pytest.raises(UserError, match="the shortest prompt has 3 tokens"):
        engine(model, prompts, Patching(k_positions=4)).clean_z(0)
