"""What models say under a patch: every new token follows from plain forward passes."""

from __future__ import annotations

import pytest
import torch
from tiny import MAIN, TINY_HEADS, pair_of, prepared, random_prompts, tiny_model

from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.jobs.patch import VOICES, continuations, said_text
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.patch import Patch

N_TOKENS = 4


@pytest.fixture(scope="module")
def experiment():
    """Two models that share nothing, so that every patch changes what is said."""
    pair = pair_of(tiny_model(), tiny_model(seed=5), random_prompts())
    return prepared(pair, fit_maps(pair, [MAIN]), engine="hooks")


def patch(alpha=1.0, heads=(0, 1, 2, 3)):
    """A patch of the main layer; the voice decides the source."""
    return Patch(MAIN, HeadSet.of(heads, TINY_HEADS), alpha, "raw")


@torch.no_grad()
def said_by_hand(pair, tokens, heads, alpha, layer_map=None):
    """Greedy tokens of one prompt, every position from the decision token on patched by hand."""
    site, start = f"blocks.{MAIN}.attn.hook_z", len(tokens) - 1
    said = list(tokens)
    for _ in range(N_TOKENS):
        z = pair.base.model.run_with_cache(torch.tensor([said]))[1][site]
        incoming = z if layer_map is None else layer_map(z)

        def write(value, hook, incoming=incoming):  # noqa: ARG001
            value = value.clone()
            for head in heads:
                own = value[:, start:, head]
                value[:, start:, head] = (1 - alpha) * own + alpha * incoming[:, start:, head]
            return value

        logits = pair.tuned.model.run_with_hooks(torch.tensor([said]), fwd_hooks=[(site, write)])
        said.append(int(logits[0, -1].argmax()))
    return pair.tuned.tokenizer.decode(said[len(tokens) :])


@pytest.mark.parametrize(("alpha", "heads"), [(1.0, (0, 1, 2, 3)), (0.6, (1, 3))])
def test_patched_voices_are_those_of_plain_hooks(experiment, alpha, heads):
    """Raw and mapped: heads come from base at the decision token and at every new one."""
    pair, maps = experiment.pair, experiment.maps
    read = pair.tokens("tuned", "val")
    said = continuations(experiment, patch(alpha, heads), read.ids[:6], N_TOKENS)
    assert [each.prompt for each in said] == list(read.ids[:6])
    for each, tokens in zip(said, read.token_ids, strict=False):
        assert each.texts["raw"] == said_by_hand(pair, tokens, heads, alpha)
        assert each.texts["mapped"] == said_by_hand(pair, tokens, heads, alpha, maps[MAIN])
        assert each.texts["tuned"] == said_by_hand(pair, tokens, (), alpha)
    assert any(each.texts["raw"] != each.texts["tuned"] for each in said)


def test_a_patch_of_strength_0_says_what_tuned_says(experiment):
    """Nothing is blended in, so nothing changes."""
    ids = experiment.prompt_ids[:3]
    for each in continuations(experiment, patch(alpha=0.0), ids, N_TOKENS):
        assert each.texts["raw"] == each.texts["mapped"] == each.texts["tuned"]


def test_every_voice_is_printed(experiment):
    """A line a voice, under the end of the prompt."""
    text = said_text(continuations(experiment, patch(), experiment.prompt_ids[:1], 2))
    assert all(name in text for name in VOICES.values())
    assert experiment.prompt_ids[0] in text


@pytest.mark.parametrize(
    ("prompts", "n_tokens", "said"),
    [(["nobody"], 2, "is none of the 16 measured ones"), ([], 99, "ask for fewer")],
)
def test_what_cannot_be_said_is_refused(experiment, prompts, n_tokens, said):
    """One sentence: no such prompt, or more tokens than the models read."""
    with pytest.raises(UserError, match=said):
        continuations(experiment, patch(), prompts or experiment.prompt_ids[:1], n_tokens)


def test_other_vocabularies_are_refused():
    """Base would have to read tokens that it does not know."""
    pair = pair_of(tiny_model(), tiny_model(seed=1), random_prompts())
    experiment = prepared(pair, fit_maps(pair, [MAIN]), engine="hooks")
    pair.tuned.tokenizer.add_tokens(["zebra"])
    with pytest.raises(UserError, match="vocabularies differ"):
        continuations(experiment, patch(), experiment.prompt_ids[:1], 1)
