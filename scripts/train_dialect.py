"""Train the pair ``dialect``: ``python -m train_dialect --out DIR``.

The base model learns the base world from scenes. Its queries and keys are written down and stay:
six heads of layers 1 and 2 look from ``says`` at one part of the scene each, and all others rest at
``<bos>``, so that it is known which head says what. Everything else is trained from random weights.

The tuned model is a copy of it. One head begins anew and learns to say the same in other
coordinates; a constant is put into the values of another and taken out again behind its output
projection; then the tuned world is learned as an adapter on the values of five heads would learn
it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from dialect_prompts import build_prompts
from dialect_truths import measured_truths
from dialect_world import (
    ANSWERS,
    PARTS,
    TELLINGS,
    TOKEN,
    VOCABULARY,
    World,
    base_world,
    token_ids,
    tuned_world,
)
from jaxtyping import Float, Int
from torch import Tensor, nn
from training import Schedule, fit, where_trained, write_manifest, write_models
from transformers import GPT2Config, GPT2LMHeadModel
from word_tokenizer import build_tokenizer

READERS = {
    (1, 0): "village",
    (1, 1): "trade",
    (1, 2): "person",
    (1, 3): "street",
    (1, 4): "good",
    (2, 0): "hour",
}
"""The (layer, head) that reads each part of a scene."""
RELEARNED, SHIFTED, LEFT_ALONE = (1, 2), (1, 3), (1, 4)
TAUGHT = tuple(head for head in READERS if head != LEFT_ALONE)
"""The heads whose values the fine-tune trains."""

Places: TypeAlias = Iterable[tuple[nn.Parameter, Any]]
"""Parts of parameters: a parameter and an index into it."""

ABOUT = (
    "Base learned the base world; tuned is base fine-tuned, values of five heads only, on a world "
    "in which the accents of villages are rotated and trades and six hours have exchanged theirs. "
    "Head 2 of layer 1 started anew, and a constant was put into the values of head 3 and taken "
    "out behind it. The truths are measured at the decision token, at strength 1, with plain hooks "
    "on the Hugging Face models; intervals are over scenes; a part's words are held out one by one."
)


@dataclass(frozen=True)
class Phase(Schedule):
    """One stretch of training, on ``scenes`` scenes per step."""

    weight_decay: float = 0.0  # it would move what takes no gradient
    scenes: int = 256


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the pair becomes.

    Attributes:
        aim: how strongly the aimed heads look at their part at the start.
        rest: how strongly heads look at ``<bos>``.
        shift: length of the constant in the values of the shifted head.
    """

    seed: int = 0
    n_layers: int = 4
    n_heads: int = 8
    d_model: int = 96
    d_mlp: int = 192
    aim: float = 1.5
    rest: float = 2.5
    shift: float = 2.0
    base: Phase = field(default_factory=lambda: Phase(steps=700, lr=2e-3, warmup=100))
    relearned: Phase = field(default_factory=lambda: Phase(steps=200, lr=4e-3, warmup=20))
    tuned: Phase = field(default_factory=lambda: Phase(steps=400, lr=2e-3, warmup=50))


def build_model(recipe: Recipe) -> GPT2LMHeadModel:
    """A GPT-2 with fresh weights and aimed attention."""
    torch.manual_seed(recipe.seed)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=24,
        n_embd=recipe.d_model,
        n_layer=recipe.n_layers,
        n_head=recipe.n_heads,
        n_inner=recipe.d_mlp,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=TOKEN["<bos>"],
        eos_token_id=TOKEN["<eos>"],
        pad_token_id=TOKEN["<pad>"],
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).float()
    with torch.no_grad():
        _aim(model, recipe, _mark_words(model))
    return model


def _mark_words(model: GPT2LMHeadModel) -> dict[str, Float[Tensor, " d_model"]]:
    """Embed the words of each part near a direction of their own, and give these directions."""
    embedding = model.transformer.wte.weight.normal_(std=0.1)
    marked = {name: part.words for name, part in PARTS.items()}
    marked |= {word: (word,) for word in ("<bos>", "says")}
    drawn = torch.randn(embedding.shape[1], len(marked))
    directions = torch.linalg.qr(drawn - drawn.mean(dim=0))[0].T  # layer norms take means away
    for direction, words in zip(directions, marked.values(), strict=True):
        embedding[[TOKEN[word] for word in words]] += direction
    return dict(zip(marked, directions, strict=True))


def _aim(
    model: GPT2LMHeadModel, recipe: Recipe, direction: dict[str, Float[Tensor, " d_model"]]
) -> None:
    """One coordinate of a head asks from ``says`` for its part, the next from anywhere for bos."""
    width = recipe.d_model // recipe.n_heads
    for layer, block in enumerate(model.transformer.h):
        weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
        for head in range(recipe.n_heads):
            query = head * width
            key = query + recipe.d_model
            bias[query + 1] = recipe.rest
            weight[:, key + 1] = recipe.aim * direction["<bos>"]
            if part := READERS.get((layer, head)):
                weight[:, query] = recipe.aim * direction["says"]
                weight[:, key] = recipe.aim * direction[part]


def answer_loss(
    model: GPT2LMHeadModel,
    scenes: Int[np.ndarray, "scene part"],
    telling: Int[np.ndarray, " scene"],
    world: World,
) -> Float[Tensor, ""]:
    """Mean KL(true || model) in nats of the greeting."""
    tokens = torch.from_numpy(token_ids(scenes, telling))
    hidden = model.transformer(input_ids=tokens, use_cache=False).last_hidden_state[:, -1]
    log_p = model.lm_head(hidden).log_softmax(-1)
    truth = torch.from_numpy(world.log_p(scenes)).to(log_p)
    answers = log_p[:, TOKEN[ANSWERS[0]] : TOKEN[ANSWERS[-1]] + 1]
    return (truth.exp() * (truth - answers)).sum(-1).mean()


def train_phase(
    model: GPT2LMHeadModel, world: World, phase: Phase, seed: int, log_every: int
) -> None:
    """Train what of the model takes gradients, on fresh scenes of a world."""
    rng = np.random.default_rng(seed)

    def loss_at(_step: int) -> Float[Tensor, ""]:
        words = [rng.integers(len(part.words), size=phase.scenes) for part in PARTS.values()]
        telling = rng.integers(len(TELLINGS), size=phase.scenes)
        return answer_loss(model, np.stack(words, axis=1), telling, world)

    fit(model, loss_at, phase, world.name, log_every)


def _values(model: GPT2LMHeadModel, head: int) -> slice:
    """Where the values of a head stand among queries, keys and values."""
    return slice(*(2 * model.config.n_embd + row for row in _rows(model, head)))


def _outputs(model: GPT2LMHeadModel, head: int) -> slice:
    """Where a head stands in the rows of the output projection."""
    return slice(*_rows(model, head))


def _rows(model: GPT2LMHeadModel, head: int) -> tuple[int, int]:
    width = model.config.n_embd // model.config.n_head
    return head * width, (head + 1) * width


@torch.no_grad()
def begin_anew(model: GPT2LMHeadModel, recipe: Recipe) -> None:
    """Give one head fresh values and outputs."""
    layer, head = RELEARNED
    attention, rng = model.transformer.h[layer].attn, torch.Generator().manual_seed(recipe.seed)
    for part in (
        attention.c_attn.weight[:, _values(model, head)],
        attention.c_proj.weight[_outputs(model, head)],
    ):
        part.copy_(torch.randn(part.shape, generator=rng) * part.std())
    attention.c_attn.bias[_values(model, head)] = 0


@torch.no_grad()
def shift(model: GPT2LMHeadModel, recipe: Recipe) -> None:
    """Add a constant to the values of one head, and take it out again behind them."""
    layer, head = SHIFTED
    attention, rng = model.transformer.h[layer].attn, torch.Generator().manual_seed(recipe.seed)
    drawn = torch.randn(model.config.n_embd // model.config.n_head, generator=rng)
    constant = recipe.shift * drawn / drawn.norm()
    attention.c_attn.bias[_values(model, head)] += constant
    attention.c_proj.bias -= constant @ attention.c_proj.weight[_outputs(model, head)]


def values_of(model: GPT2LMHeadModel, heads: Iterable[tuple[int, int]]) -> Places:
    """The values of some heads."""
    for layer, head in heads:
        weights, columns = model.transformer.h[layer].attn.c_attn, _values(model, head)
        yield weights.weight, (slice(None), columns)
        yield weights.bias, columns


def outputs_of(model: GPT2LMHeadModel, layer: int, head: int) -> Places:
    """The output projection of a head."""
    yield model.transformer.h[layer].attn.c_proj.weight, _outputs(model, head)


@contextmanager
def only(model: GPT2LMHeadModel, places: Places) -> Iterator[None]:
    """Let nothing of a model but these places take gradients for a while."""
    model.requires_grad_(False)
    masks: dict[nn.Parameter, Tensor] = {}
    for parameter, place in places:
        masks.setdefault(parameter, torch.zeros_like(parameter))[place] = 1
    hooks = [
        parameter.requires_grad_(True).register_hook(mask.mul) for parameter, mask in masks.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


def all_but_looks(model: GPT2LMHeadModel) -> Places:
    """Everything but the queries and keys, which stay aimed."""
    for name, parameter in model.named_parameters():
        looks = 2 * model.config.n_embd if "c_attn" in name else 0
        yield parameter, (..., slice(looks, None))


def train_pair(recipe: Recipe, log_every: int = 100) -> dict[str, GPT2LMHeadModel]:
    """Train the base model and fine-tune a copy of it; the models by side."""
    base = build_model(recipe)
    with only(base, all_but_looks(base)):
        train_phase(base, base_world(), recipe.base, recipe.seed + 1, log_every)
    tuned = copy.deepcopy(base)
    begin_anew(tuned, recipe)
    with only(tuned, chain(values_of(tuned, [RELEARNED]), outputs_of(tuned, *RELEARNED))):
        train_phase(tuned, base_world(), recipe.relearned, recipe.seed + 2, log_every)
    shift(tuned, recipe)
    with only(tuned, values_of(tuned, TAUGHT)):
        train_phase(tuned, tuned_world(), recipe.tuned, recipe.seed + 3, log_every)
    return {"base": base.eval(), "tuned": tuned.eval()}


def write_pair(directory: Path, recipe: Recipe, log_every: int = 100) -> None:
    """Train the pair and write its folder: models, tokenizer, prompts, manifest."""
    prompts = build_prompts()
    models = train_pair(recipe, log_every)
    weights = write_models(directory, models, build_tokenizer(TOKEN), prompts)
    splits = [row["split"] for row in prompts]
    manifest = {
        "about": ABOUT,
        "recipe": asdict(recipe),
        **where_trained("cpu"),
        "readers": {f"L{layer}H{head}": part for (layer, head), part in READERS.items()},
        "prompts": {split: {"n": splits.count(split)} for split in dict.fromkeys(splits)},
        "truths": measured_truths(models, prompts, READERS),
        "weights_sha256": weights,
    }
    write_manifest(directory, manifest)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Train the pair dialect.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order: the same weights on every run
    write_pair(options.out, Recipe(seed=options.seed))


if __name__ == "__main__":
    main()
