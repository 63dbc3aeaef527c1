"""Parity: the fast engines against native hooks on a tiny random model of each architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import all_kinds_of_interventions, ragged_prompts, random_sources
from jaxtyping import Float
from model_zoo import ZOO, save, train_tokenizer
from test_positions import anywhere
from torch import Tensor

from rq4lens.config import Patching, Place
from rq4lens.models.load.lens import HAS_HOOKED, Backend, HookedModel
from rq4lens.models.load.loading import load_hooked
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.hooks import HookEngine, patched_heads
from rq4lens.patching.passes import forward_batch
from rq4lens.patching.patch import Intervention, Sources

TOLERANCE = 1e-4
"""Largest logit difference in float32, relative to the largest logit."""

BACKENDS = ("hooked", "bridge") if HAS_HOOKED else ("bridge",)
LEFT_BY_SUFFIX = {"gpt-oss"}
"""Architectures that the suffix engine leaves to the cached one; every other converted one runs on
it, and every bridge on the cached one."""


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Backend], HookedModel]:
    """Loads an architecture of the zoo the way a user's folder is loaded."""
    tokenizer = train_tokenizer()

    def loaded(name: str, backend: Backend) -> HookedModel:
        folder: Path = save(ZOO[name].make(), tokenizer, tmp_path_factory.mktemp(name))
        place = Place(device="cpu", backend=backend)
        return load_hooked(folder, place=place, check_logits=False).model

    return loaded


def native_logits(
    model: HookedModel,
    prompts: TokenizedPrompts,
    interventions: list[Intervention],
    sources: Sources,
    k_positions: int,
) -> Float[Tensor, "condition prompt vocab"]:
    """Logits at the decision token, one full forward pass per intervention."""
    batch = next(prompts.placed(k_positions).batches(len(prompts)))
    logits = torch.empty(len(interventions), len(prompts), model.cfg.d_vocab_out)
    for index, intervention in enumerate(interventions):
        with patched_heads(model, intervention, sources, batch), torch.no_grad():
            every = forward_batch(model, batch)
        logits[index, batch.rows] = every[torch.arange(len(every)), batch.decision]
    return logits


@pytest.mark.parametrize("k_positions", [1, 3])
@pytest.mark.parametrize("architecture", ZOO)
@pytest.mark.parametrize("backend", BACKENDS)
def test_patched_logits_equal_native_hooks(backend, architecture, k_positions, load):
    """Every architecture: the engine's patched logits are those of a full forward pass."""
    model, prompts = load(architecture, backend), ragged_prompts()
    sources = random_sources(len(prompts), k_positions, model.cfg.d_head)
    interventions = sorted(
        all_kinds_of_interventions(model.cfg.n_layers),
        key=lambda patches: min(patch.layer for patch in patches),
    )
    engine = make_engine(model, prompts, Patching(k_positions=k_positions))
    left = backend == "bridge" or architecture in LEFT_BY_SUFFIX
    assert engine.name == ("cached" if left else "suffix"), engine.fallback_reason
    expected = native_logits(model, prompts, interventions, sources, k_positions)
    clean = native_logits(model, prompts, [()], sources, k_positions)
    scale = expected.abs().max()
    assert (expected - clean).abs().amax(-1).min() > 100 * TOLERANCE, "a condition does nothing"
    found = torch.empty_like(expected)
    for batch in engine.clean_batches(0):
        here = {
            key: source[batch.rows]
            for key, source in sources.items()
            if key[0] < model.cfg.n_layers
        }
        logits = engine.logits_of(batch, slice(0, len(batch.rows)), interventions, here)
        found[:, batch.rows] = logits.transpose(0, 1)
    assert (found - expected).abs().max() / scale <= TOLERANCE


@pytest.mark.parametrize("architecture", ZOO)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_tokens_and_answers_equal_native_hooks(backend, architecture, load):
    """Every architecture: patched at some tokens of each prompt, compared at one or more."""
    model, prompts = load(architecture, backend), anywhere(ragged_prompts()).placed()
    sources = random_sources(len(prompts), prompts.n_spots, model.cfg.d_head)
    interventions = all_kinds_of_interventions(model.cfg.n_layers)[1::3]
    engine = make_engine(model, prompts)
    left = backend == "bridge" or architecture in LEFT_BY_SUFFIX
    assert engine.name == ("cached" if left else "suffix"), engine.fallback_reason
    expected = HookEngine(model, prompts).effects(interventions, sources)
    found = engine.effects(interventions, sources)
    scale = max(1, np.nanmax(expected.kl_nats))
    np.testing.assert_allclose(found.rows, expected.rows, atol=1e-5 * scale)
