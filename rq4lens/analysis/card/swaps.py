"""What a model says when one of its heads comes from the other model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from numpy import ndarray
from torch import Tensor

from rq4lens.analysis.card.fragment import token_text
from rq4lens.analysis.card.passes import LOGITS_AT_ONCE, Readout
from rq4lens.heads import HeadSet
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.reading import decoded
from rq4lens.patching.engines.hooks import HookEngine, patched_heads
from rq4lens.patching.engines.row_engine import RowEngine
from rq4lens.patching.engines.windows import EngineOfWindows
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.passes import forward_batch
from rq4lens.patching.patch import (
    BASE,
    Engine,
    Intervention,
    Patch,
    Sources,
    divergence_terms,
)

N_LIKELY = 5
"""Next tokens that a card shows."""

OTHER = "the other model"

LogProbs = Float[Tensor, "prompt vocab"]


@dataclass(frozen=True)
class TopTokens:
    """The tokens with the largest numbers of every row, and these numbers."""

    tokens: Int[ndarray, "*rows token"]
    numbers: Float[ndarray, "*rows token"]

    @classmethod
    def of(cls, numbers: Float[Tensor, "*rows vocab"], n: int) -> TopTokens:
        """They are looked for where the numbers are, which may be a GPU."""
        found = numbers.topk(min(n, numbers.shape[-1]), dim=-1)
        return cls(found.indices.cpu().numpy(), found.values.float().cpu().numpy())

    def __getitem__(self, row: Any) -> TopTokens:
        """Those of some rows."""
        return TopTokens(self.tokens[row], self.numbers[row])


@dataclass(frozen=True)
class Swapped:
    """A model with the other one's activation at one head at a time; row 0 is the clean model.

    ``kl_nats`` is the divergence from the other model's distribution, None where vocabularies
    differ; by it a row is nearer to the other model than row 0 or not. ``noise_nats`` is what the
    clean row is apart from a whole forward pass, which rounds otherwise.
    """

    kl_nats: Float64[ndarray, "row prompt"] | None
    noise_nats: float
    likeliest: TopTokens


@torch.no_grad()
def next_tokens(
    experiment: Experiment, layer: int, base: Float[Tensor, "prompt answer vocab"]
) -> dict[str, dict[str, list[list[Any]]]]:
    """The likeliest next tokens of every prompt, and their probabilities.

    Of base, of tuned, and of tuned with base's activations in all heads of a layer, at strength 1.
    """
    engine, everything = experiment.engine, HeadSet.all(experiment.n_heads)
    sources = Sources({(layer, BASE): experiment.sources[layer, BASE]})
    decision = torch.arange(len(base)), experiment.prompts.is_compared.int().argmax(-1)
    tuned = engine.clean_log_probs()[decision]
    patched = torch.empty_like(tuned)
    for rows, logits in _patched_logits(engine, [(Patch(layer, everything, 1.0, BASE),)], sources):
        patched[rows] = logits[:, 0].double().log_softmax(-1).to(patched)
    found = {"base": base[decision], "tuned": tuned, "patched": patched}
    texts = {name: _texts(experiment.pair, name, each) for name, each in found.items()}
    return {
        name: {model: each[row] for model, each in texts.items()}
        for row, name in enumerate(experiment.prompt_ids)
    }


def _texts(pair: ModelPair, name: str, log_probs: LogProbs) -> list[list[list[Any]]]:
    tokenizer = pair.member("base" if name == "base" else "tuned").tokenizer
    found = TopTokens.of(log_probs, N_LIKELY)
    return [
        [
            [token_text(decoded(tokenizer, token)), round(p, 6)]
            for token, p in zip(*row, strict=True)
        ]
        for row in zip(found.tokens.tolist(), np.exp(found.numbers).tolist(), strict=True)
    ]


@torch.no_grad()
def swapped(
    engine: Engine,
    layer: int,
    heads: Sequence[int],
    z_other: Float[Tensor, "prompt head d_head"],
    own: Readout,
    target: Readout | None,
) -> Swapped:
    """Put each head's activation of the other model into this one, by itself, at strength 1.

    ``own`` and ``target`` are the clean ends of this model and of the other one.
    """
    n_heads = z_other.shape[1]
    sets = [HeadSet.none(n_heads), *(HeadSet.of([head], n_heads) for head in heads)]
    interventions = [(Patch(layer, each, 1.0, OTHER),) for each in sets]
    sources = Sources({(layer, OTHER): z_other[:, None]})
    rows, noise, kl, tokens, log_p = [], [], [], [], []
    for at, logits in _patched_logits(engine, interventions, sources):
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        clean = own.of_prompts(at).log_probs()
        noise.append(divergence(clean.to(log_probs), log_probs[:, 0]))
        if target is not None:
            wanted = target.of_prompts(at).log_probs()
            kl.append(divergence(wanted.to(log_probs)[:, None], log_probs))
        some = TopTokens.of(log_probs, N_LIKELY)
        rows.append(at)
        tokens.append(some.tokens)
        log_p.append(some.numbers)
    back = torch.cat(rows).argsort().numpy()
    return Swapped(
        np.concatenate(kl)[back].T if kl else None,
        float(np.abs(np.concatenate(noise)).mean()),
        TopTokens(np.concatenate(tokens), np.exp(np.concatenate(log_p)))[back],
    )


def divergence(
    target: Float[Tensor, "*#rows vocab"], log_probs: Float[Tensor, "*rows vocab"]
) -> Float64[ndarray, "*rows"]:
    """``KL(target ‖ distribution)`` in nats, from log-probabilities."""
    return divergence_terms(target, log_probs).sum(-1).double().cpu().numpy()


def _patched_logits(
    engine: Engine, interventions: Sequence[Intervention], sources: Sources
) -> Iterator[tuple[Int[Tensor, "prompt"], Float[Tensor, "prompt condition vocab"]]]:
    """Logits at the decision token of every intervention, a few prompts at a time."""
    if isinstance(engine, EngineOfWindows):
        for places, each in engine.engines.items():
            every = torch.tensor(places)
            theirs = Sources({key: source[every] for key, source in sources.items()})
            for rows, logits in _patched_logits(each, interventions, theirs):
                yield every[rows], logits
        return
    assert isinstance(engine, RowEngine | HookEngine)
    n_vocab = engine.model.cfg.d_vocab_out
    at_once = max(1, LOGITS_AT_ONCE // (len(interventions) * n_vocab))
    if isinstance(engine, HookEngine):
        yield from _by_hooks(engine, interventions, sources, at_once)
        return
    layer = interventions[0][0].layer
    for clean in engine.clean_batches(layer):
        here = clean.to(engine.placement)
        for start in range(0, len(clean.rows), at_once):
            some = slice(start, start + at_once)
            rows = clean.rows[some]
            incoming = {key: source[rows] for key, source in sources.items()}
            logits = engine.logits_of(here, some, interventions, incoming)
            yield rows, logits[:: engine.window.n_answer]


def _by_hooks(
    engine: HookEngine, interventions: Sequence[Intervention], sources: Sources, at_once: int
) -> Iterator[tuple[Int[Tensor, "prompt"], Float[Tensor, "prompt condition vocab"]]]:
    for batch in engine.prompts.batches(min(at_once, engine.batch_size)):
        logits = []
        for intervention in interventions:
            with patched_heads(engine.model, intervention, sources, batch):
                every = forward_batch(engine.model, batch)
            logits.append(every[torch.arange(len(every)), batch.decision])
        yield batch.rows, torch.stack(logits, dim=1)
