"""Any patched tokens, and answers of several: against one plain hooked pass a prompt."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import (
    N_HEADS,
    N_LAYERS,
    VOCAB,
    all_kinds_of_interventions,
    heads,
    ragged_prompts,
    random_sources,
    tiny_model,
)
from torch.distributions import Categorical, kl_divergence

from rq4lens.config import Patching
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.models.load.lens import z_site
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.activations import greedy
from rq4lens.patching.engines.cached import CachedEngine
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.engines.suffix import SuffixEngine
from rq4lens.patching.engines.windows import EngineOfWindows, by_window
from rq4lens.patching.patch import OtherModel, Patch, Sources
from rq4lens.results import OTHERS, OWN

TOLERANCE_NATS = 1e-5


def anywhere(prompts: TokenizedPrompts, n_answers: tuple[int, ...] = (1, 2, 3)) -> TokenizedPrompts:
    """Some tokens of each prompt are patched, and some last tokens of each are an answer's."""
    draw = random.Random(3)
    spots = tuple(
        tuple(sorted(draw.sample(range(len(read)), draw.randint(1, min(4, len(read))))))
        for read in prompts.token_ids
    )
    n_answer = tuple(n_answers[row % len(n_answers)] for row in range(len(prompts)))
    return replace(prompts, spots=spots, n_answer=n_answer)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def prompts() -> TokenizedPrompts:
    return anywhere(ragged_prompts()).placed()


@pytest.fixture(scope="module")
def sources(prompts) -> Sources:
    return random_sources(len(prompts), prompts.n_spots)


@pytest.fixture(scope="module")
def other(prompts) -> OtherModel:
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(len(prompts), prompts.longest_answer, VOCAB, generator=draw)
    return OtherModel((2 * logits).log_softmax(-1))


def answer_logits(model, prompts, row, patches=(), sources=None) -> torch.Tensor:
    """Logits at the compared tokens of one prompt by one plain pass; no code of the engines."""
    spots = [spot for spot in prompts.spots[row] if spot >= 0]

    def hook_of(patch):
        incoming = sources[patch.layer, patch.source][row, -len(spots) :]

        def write(z, hook):  # noqa: ARG001 - by the library
            for place, spot in enumerate(spots):
                for head in patch.heads:
                    clean = z[0, spot, head]
                    z[0, spot, head] = (1 - patch.alpha) * clean + patch.alpha * incoming[
                        place, head
                    ]
            return z

        return z_site(patch.layer), write

    tokens = torch.tensor([prompts.token_ids[row]])
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[hook_of(patch) for patch in patches])
    return logits[0, -prompts.n_answer[row] :].double()


def test_the_hooks_measure_whole_answers_at_any_tokens(model, prompts, sources, other):
    """Sums over the answer's tokens, each by its definition, of patches at the named tokens."""
    interventions = all_kinds_of_interventions()[::4]
    found = HookEngine(model, prompts).effects(interventions, sources, other=other)
    for row in range(len(prompts)):
        n_answer = prompts.n_answer[row]
        clean = answer_logits(model, prompts, row)
        theirs = other.log_probs[row, -n_answer:].double()
        for index, patches in enumerate(interventions):
            patched = answer_logits(model, prompts, row, patches, sources)
            p, q = (Categorical(logits=logits) for logits in (patched, clean))
            by_token = kl_divergence(p, q)
            answer = clean.argmax(-1)
            change = p.log_prob(answer) - q.log_prob(answer)
            left = kl_divergence(Categorical(logits=theirs), p)
            is_own = bool((patched.argmax(-1) == answer).all())
            is_theirs = bool((patched.argmax(-1) == theirs.argmax(-1)).all())
            expected = {
                "kl_nats": by_token.sum(),
                "answer_logprob_change_nats": change.sum(),
                "gap_left_nats": left.sum(),
                "answer_is": OWN * is_own + OTHERS * is_theirs,
            }
            for name, value in expected.items():
                assert getattr(found, name)[index, row] == pytest.approx(
                    float(value), abs=TOLERANCE_NATS
                )
            tokens = found.kl_by_token_nats[index, row]
            assert np.isnan(tokens[:-n_answer]).all()
            np.testing.assert_allclose(tokens[-n_answer:], by_token, atol=TOLERANCE_NATS)


@pytest.mark.parametrize("kind", [SuffixEngine, CachedEngine])
def test_fast_engines_equal_the_hooks_at_any_tokens(model, prompts, sources, other, kind):
    """Prompts of several windows, patched at some of their tokens, compared at one or more."""
    engine = by_window(prompts, lambda some: kind(model, some, first_layer=2))
    assert isinstance(engine, EngineOfWindows)
    hooks = HookEngine(model, prompts)
    interventions = all_kinds_of_interventions()
    for expected, found in (
        (each.effects(interventions, sources, other=other) for each in (hooks, engine)),
        (each.every_layer("raw", sources, other) for each in (hooks, engine)),
    ):
        np.testing.assert_allclose(found.rows, expected.rows, atol=TOLERANCE_NATS)
        assert found.kl_nats.max() > 0.1
    for layer in range(N_LAYERS):
        torch.testing.assert_close(engine.clean_z(layer), hooks.clean_z(layer))
    torch.testing.assert_close(engine.clean_log_probs(), hooks.clean_log_probs())


@pytest.mark.parametrize("kind", [SuffixEngine, CachedEngine])
def test_a_whole_window_of_an_answer_is_one_engine(model, kind):
    """Answers of one length, patched where they are compared, equal the hooks; all layers too."""
    prompts = replace(ragged_prompts(), n_answer=(3,) * 6).placed()
    assert prompts.spots[1] == (14, 15, 16)
    sources = random_sources(6, 3)
    engine = by_window(prompts, lambda some: kind(model, some))
    assert isinstance(engine, kind)
    hooks = HookEngine(model, prompts)
    for one, two in (
        (each.effects(all_kinds_of_interventions(), sources) for each in (engine, hooks)),
        (each.every_layer("mapped", sources) for each in (engine, hooks)),
    ):
        np.testing.assert_allclose(one.rows, two.rows, atol=TOLERANCE_NATS)


@pytest.mark.parametrize("k_positions", [1, 3])
def test_the_last_tokens_named_are_the_last_tokens(model, k_positions):
    """Spots that are written out give the numbers of `k_positions`, to the bit."""
    plain = ragged_prompts()
    named = tuple(tuple(range(len(read) - k_positions, len(read))) for read in plain.token_ids)
    sources, interventions = random_sources(6, k_positions), all_kinds_of_interventions()
    settings = Patching(k_positions=k_positions)
    expected = make_engine(model, plain, settings).effects(interventions, sources)
    written = replace(plain, spots=named, n_answer=(1,) * 6)
    found = make_engine(model, written).effects(interventions, sources)
    np.testing.assert_array_equal(found.rows, expected.rows)


def test_a_token_that_is_not_patched_stays(model, prompts, sources):
    """A patch of nothing does nothing, wherever it stands and whatever is compared."""
    engine = make_engine(model, prompts)
    nothing = (Patch(1, HeadSet.none(N_HEADS), 1.0, "raw"),)
    still = (Patch(1, heads(0, 1), 0.0, "raw"),)
    effects = engine.effects([nothing, still], sources)
    assert effects.kl_nats.max() <= 1e-12
    assert np.nanmax(effects.kl_by_token_nats) <= 1e-12


def test_an_answer_ends_where_its_prompt_says(model):
    """Behind a decision token the answer's tokens but the last are read, and all are patched."""
    plain = ragged_prompts()
    said = greedy(model, plain, 3, batch_size=4)
    grown = plain.continued([tuple(each)[: 1 + row % 3] for row, each in enumerate(said.tolist())])
    for row, read in enumerate(plain.token_ids):
        n_answer = 1 + row % 3
        logits = model(torch.tensor([[*read, *said[row].tolist()]]))[0, len(read) - 1 : -1]
        assert logits.argmax(-1).tolist() == said[row].tolist()
        assert grown.token_ids[row] == (*read, *said[row, : n_answer - 1].tolist())
        first, last = len(read) - 1, len(grown.token_ids[row])
        there = [spot for spot in grown.placed().spots[row] if spot >= 0]
        assert there == list(range(first, last))
    assert grown.decided() == replace(plain, answers=grown.answers)
    assert grown.fingerprint != plain.fingerprint


def test_more_tokens_than_a_prompt_has_are_refused(model):
    """The shortest prompt, without its answer, decides."""
    prompts = replace(ragged_prompts(), n_answer=(2,) * 6)
    assert prompts.placed(2).n_spots == 3
    with pytest.raises(UserError, match="k_positions 3 does not fit: the shortest prompt has 2"):
        make_engine(model, prompts, Patching(k_positions=3))
