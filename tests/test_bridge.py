"""Models that are loaded already: a HookedTransformer and a TransformerBridge."""

from __future__ import annotations

import pytest
import torch
from loading_cases import TOKENS, TOLERANCE, same_weights
from model_zoo import ZOO
from tiny import needs_hooked

from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.models.load.lens import HAS_HOOKED, TransformerBridge
from rq4lens.models.load.loading import LoadedModel, load_hooked
from rq4lens.models.pair import ModelCard
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.patch import Patch, Sources

pytest_plugins = ("loading_cases",)


SITE = "blocks.1.attn.hook_z"


def test_wrapping_is_the_model_itself(folders):
    """An already loaded model is accepted without a copy, with a fingerprint of its weights."""
    loaded = load_hooked(folders("pythia"))
    wrapped = LoadedModel.wrap(loaded.model, loaded.tokenizer)
    assert wrapped.model is loaded.model
    assert same_weights(wrapped, loaded)
    assert wrapped.architecture == "GPTNeoXForCausalLM"
    assert wrapped.logit_check_max_abs_diff is None


def read_and_patch(model):
    """Z of one layer, and the logits after head 2 is silenced at the last position."""
    seen = []

    def silence(z, hook):  # noqa: ARG001
        seen.append(z.detach().clone())
        z = z.clone()
        z[:, -1, 2] = 0.0
        return z

    with torch.no_grad():
        return model.run_with_hooks(TOKENS, fwd_hooks=[(SITE, silence)]), seen[0]


@needs_hooked
@pytest.mark.parametrize("name", ZOO)
def test_a_bridge_answers_to_the_same_hooks(folders, name):
    """A TransformerBridge of the same folder has the same z at the same name and shape, and the
    same logits when a head is patched there.
    """
    bridge = TransformerBridge.boot_transformers(str(folders(name)), device="cpu")
    wrapped = LoadedModel.wrap(bridge, bridge.tokenizer)
    of_bridge, z_bridge = read_and_patch(wrapped.model)
    of_hooked, z_hooked = read_and_patch(load_hooked(folders(name)).model)
    assert z_bridge.shape == z_hooked.shape
    assert float((z_bridge - z_hooked).abs().max()) < TOLERANCE
    assert float((of_bridge - of_hooked).abs().max()) < TOLERANCE
    assert len(wrapped.fingerprint) == 64


@needs_hooked
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma2"])
def test_bridges_are_measured_like_hooked_transformers(folders, name, padding_side):
    """The engine that is chosen for a bridge gives the effects of the HookedTransformer's native
    hooks, and so do the bridge's, whichever side the prompts are padded on.
    """
    prompts = TokenizedPrompts(
        ids=("a", "b", "c"),
        token_ids=tuple(tuple(TOKENS[0, :n].tolist()) for n in (5, 11, 8)),
    )
    bridge = TransformerBridge.boot_transformers(str(folders(name)), device="cpu")
    wrapped = LoadedModel.wrap(bridge, bridge.tokenizer)
    model = load_hooked(folders(name)).model
    noise = torch.randn(3, 1, 4, model.cfg.d_head, generator=torch.Generator().manual_seed(5))
    sources = Sources({(1, "raw"): noise})
    patches = [(Patch(1, HeadSet.of(heads, 4), 0.7, "raw"),) for heads in ([0], [1, 3])]
    chosen = make_engine(wrapped.model, prompts)
    assert chosen.name == "cached"
    of_chosen, of_bridge, of_hooked = (
        engine.effects(patches, sources).kl_nats
        for engine in (
            chosen,
            HookEngine(wrapped.model, prompts, padding_side=padding_side),
            HookEngine(model, prompts),
        )
    )
    assert of_hooked.min() > 0
    assert abs(of_bridge - of_hooked).max() < 1e-5
    assert abs(of_chosen - of_hooked).max() < 1e-5
    assert ModelCard.of(wrapped).n_heads == ModelCard.of(load_hooked(folders(name))).n_heads


def test_processed_weights_are_refused(folders):
    """Weights that were folded or centred on load are refused, in both kinds of model."""
    loaded = load_hooked(folders("gpt2"))
    if HAS_HOOKED:
        loaded.model.process_weights_()
        with pytest.raises(UserError, match="processed on load"):
            LoadedModel.wrap(loaded.model, loaded.tokenizer)
    bridge = TransformerBridge.boot_transformers(str(folders("gpt2")), device="cpu")
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(UserError, match="processed on load"):
        LoadedModel.wrap(bridge, loaded.tokenizer)
