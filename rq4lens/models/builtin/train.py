"""Train the pair in the box: ``python -m rq4lens.models.builtin.train --out DIR``.

The base model learns the base world from stories; the tuned model is a copy of it, fine-tuned on
stories of the tuned world with only its attention weights free, as an adapter on attention would
do. Both are written as ordinary Hugging Face folders, with the prompts and a manifest beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rq4lens.models.builtin.stories import (
    ANSWERS,
    REMARKED,
    TOKEN,
    VOCABULARY,
    draw_custom_stories,
    draw_home_stories,
    draw_introductions,
)
from rq4lens.models.builtin.world import COUNTRIES, ITEMS, PEOPLE, World

FIRST_CAST = 3  # a model that meets three people again and again finds out who comes from where
EAGER_STEPS = 3  # CUDA graphs are captured after a few ordinary steps


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        steps: number of optimiser steps.
        lr: peak learning rate, after a linear warm-up and before a cosine decay to 0.
        custom_stories: stories about customs per step.
        home_stories: stories about homes per step.
        warmup: steps of the warm-up.
        weight_decay: decoupled weight decay.
        trained: a parameter is trained if its name contains this; "" trains all.
        cast_from: step at which the cast of people starts to grow from three.
        cast_every: steps from one new person to the next; 0 shows all people from the start.
    """

    steps: int
    lr: float
    custom_stories: int = 192
    home_stories: int = 96
    warmup: int = 200
    weight_decay: float = 0.01
    trained: str = ""
    cast_from: int = 0
    cast_every: int = 0

    def cast(self, step: int) -> int:
        """How many of the people may appear at a step."""
        if not self.cast_every:
            return len(PEOPLE)
        joined = max(0, 1 + (step - self.cast_from) // self.cast_every)
        return min(FIRST_CAST + joined, len(PEOPLE))

    def lr_at(self, step: int) -> float:
        """Linear warm-up to ``lr``, then half a cosine down to 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the pair becomes, but for the device."""

    seed: int = 0
    n_layers: int = 6
    n_heads: int = 16
    d_model: int = 128
    d_mlp: int = 256
    init_std: float = 0.09
    rope_theta: float = 1e6
    base: Phase = field(
        default_factory=lambda: Phase(steps=6000, lr=2e-3, cast_from=1000, cast_every=250)
    )
    tuned: Phase = field(
        default_factory=lambda: Phase(steps=1500, lr=1e-3, warmup=100, trained="self_attn")
    )


@dataclass(frozen=True)
class Batch:
    """What one step sees: two kinds of stories, and the truth about the customs asked for.

    Attributes:
        customs: stories about customs, without what follows the last question.
        homes: stories about homes, likewise.
        truth: the distribution of each answer in ``customs``.
        remarked: the country token of each remark in ``homes``.
    """

    customs: Int[Tensor, "story pos"]
    homes: Int[Tensor, "story pos"]
    truth: Float[Tensor, "story question item"]
    remarked: Int[Tensor, "story remark"]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(t.to(device) for t in vars(self).values()))

    def copy_(self, other: Batch) -> None:
        """Overwrite the tensors in place, as a captured graph asks for."""
        for mine, new in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(new)


def draw_batch(world: World, phase: Phase, step: int, rng: np.random.Generator) -> Batch:
    """Fresh stories for one step."""
    cast = phase.cast(step)
    customs = draw_custom_stories(world, draw_introductions(phase.custom_stories, rng, cast), rng)
    homes = draw_home_stories(draw_introductions(phase.home_stories, rng, cast), rng).token_ids()
    return Batch(
        torch.from_numpy(customs.token_ids()[:, : ANSWERS[-1]]),
        torch.from_numpy(homes[:, : REMARKED[-1]]),
        torch.from_numpy(customs.truth).float(),
        torch.from_numpy(homes[:, REMARKED]),
    )


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """A Llama-like decoder with fresh weights, drawn on the CPU whatever the device will be."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=recipe.init_std,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=TOKEN["<bos>"],
        eos_token_id=TOKEN["<eos>"],
        pad_token_id=TOKEN["<pad>"],
    )
    return LlamaForCausalLM(config).float()


def log_probs_at(
    model: LlamaForCausalLM, tokens: Int[Tensor, "story pos"], answers: tuple[int, ...]
) -> Float[Tensor, "story question vocab"]:
    """Log-probabilities of the tokens at ``answers``, each predicted from the token before."""
    n_pos = tokens.shape[1]
    # A ready-made mask: transformers would look into the data for packed sequences, which
    # waits for the device at every step.
    ahead = torch.full((n_pos, n_pos), -torch.inf, device=tokens.device).triu(1)
    hidden = model.model(
        input_ids=tokens, attention_mask=ahead[None, None], use_cache=False
    ).last_hidden_state
    asked = torch.stack([hidden[:, position - 1] for position in answers], dim=1)
    return model.lm_head(asked).log_softmax(dim=-1)


def loss_nats(model: LlamaForCausalLM, batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy of the customs against their true distribution, plus that of the homes.

    The expected loss over drawn answers has the same gradient as the mean and less noise.
    """
    first, last = TOKEN[ITEMS[0]], TOKEN[ITEMS[-1]] + 1
    items = log_probs_at(model, batch.customs, ANSWERS)[..., first:last]
    countries = log_probs_at(model, batch.homes, REMARKED)
    homes = countries.gather(-1, batch.remarked[..., None])
    return -(batch.truth * items).sum(dim=-1).mean() - homes.mean()


def train_phase(
    model: LlamaForCausalLM,
    world: World,
    phase: Phase,
    seed: int,
    report: Callable[[int, float], None] | None = None,
) -> LlamaForCausalLM:
    """Train ``model`` in place on fresh stories of ``world`` and return it.

    Args:
        model: the model, on the device that is to do the work.
        world: whose customs the answers follow.
        phase: how long and how.
        seed: of the stories.
        report: called now and then with the step and the loss in nats.
    """
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(phase.trained in name)
    step_of = _Step(model, phase)
    for step in range(phase.steps):
        loss = step_of(step, draw_batch(world, phase, step, rng))
        if report is not None and step % 250 == 0:
            report(step, float(loss))
    return model.requires_grad_(True)


class _Step:
    """One optimiser step; on a GPU it is captured once and then replayed."""

    def __init__(self, model: LlamaForCausalLM, phase: Phase) -> None:
        self.model, self.phase = model, phase
        self.free = [p for p in model.parameters() if p.requires_grad]
        self.on_gpu = model.device.type == "cuda"
        self.lr = torch.zeros((), device=model.device)
        self.optimiser = torch.optim.AdamW(
            self.free,
            lr=self.lr,
            betas=(0.9, 0.98),
            weight_decay=phase.weight_decay,
            fused=True,
            capturable=self.on_gpu,
        )
        self.side_stream = torch.cuda.Stream() if self.on_gpu else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: Batch | None = None
        self.loss = torch.zeros((), device=model.device)

    def __call__(self, step: int, batch: Batch) -> Float[Tensor, ""]:
        self.lr.fill_(self.phase.lr_at(step))
        if self.batch is None:
            self.batch = batch.to(self.model.device)
        else:
            self.batch.copy_(batch)
        if not self.on_gpu:
            self._compute()
        elif step < EAGER_STEPS:
            self._compute_aside()
        else:
            self._replay()
        return self.loss

    def _compute(self) -> None:
        assert self.batch is not None
        self.optimiser.zero_grad(set_to_none=True)
        loss = loss_nats(self.model, self.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.free, 1.0)
        self.optimiser.step()
        self.loss.copy_(loss.detach())

    def _compute_aside(self) -> None:
        """Run on a side stream, as capturing asks of the steps before it."""
        self.side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side_stream):
            self._compute()
        torch.cuda.current_stream().wait_stream(self.side_stream)

    def _replay(self) -> None:
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._compute()
        self.graph.replay()
