"""Train the pair in the box: ``python -m train_etiquette --out DIR``.

The base model learns the base world from stories; the tuned model is a copy of it, fine-tuned on
stories of the tuned world with only its value and output projections free, as a low-rank adapter on
them would do. Both are written as ordinary Hugging Face folders, with the prompts and a manifest
beside them.

Two things make the binding of a person to a country learnable in minutes: stories grow from one
person to three (with three from the start, the loss stays for thousands of steps where a model
that ignores who is asked would be), and the loss compares with the true distribution of every
answer instead of one drawn item.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from etiquette_questions import SPLIT_SIZES, build_prompts
from etiquette_stories import (
    PEOPLE_PER_STORY,
    TOKEN,
    VOCABULARY,
    Stories,
    sample_stories,
)
from etiquette_world import ITEMS, World, base_world, true_distribution, tuned_world
from jaxtyping import Float
from torch import Tensor
from training import Schedule, fit, where_trained, write_manifest, write_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from word_tokenizer import build_tokenizer

ABOUT = (
    "Base learned the base world; tuned is base fine-tuned, value and output projections of the "
    "attention only, on a world in which five of twelve countries have exchanged their customs. "
    "KL is KL(true || model) at the decision token, the mean over the prompts of a split."
)
TOLERANCE = {
    "mean_kl_nats": 0.02,
    "main_layer": 1,
    "main_layer_delta_kl_factor": 2.0,
    "what": (
        "On a CPU the same libraries and threads give the same weights bit for bit. Sums on a GPU "
        "come in any order, and training amplifies that: on another run, device or library each "
        "model's mean KL to its own world stays within 0.02 nats of the value here, and the ΔKL "
        "of all heads of layer 1 within a factor of two. Another seed is another pair: the "
        "effect stays in layer 1, but more heads may share it."
    ),
}


@dataclass(frozen=True)
class Phase(Schedule):
    """One stretch of training.

    Attributes:
        stories: stories per step.
        growth: steps after which a story has one person more, up to the full number; 0 starts with
            the full number.
        trained: parts of parameter names that mark what is trained; "" trains all.
    """

    stories: int = 256
    growth: int = 0
    trained: tuple[str, ...] = ("",)

    def n_people(self, step: int) -> int:
        """People in the stories of a step."""
        return min(PEOPLE_PER_STORY, 1 + step // self.growth) if self.growth else PEOPLE_PER_STORY


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the pair becomes."""

    seed: int = 0
    n_layers: int = 6
    n_heads: int = 16
    d_model: int = 128
    d_mlp: int = 256
    base: Phase = field(default_factory=lambda: Phase(steps=1500, lr=2e-3, warmup=100, growth=250))
    tuned: Phase = field(
        default_factory=lambda: Phase(steps=500, lr=3e-4, warmup=50, trained=("v_proj", "o_proj"))
    )


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """A Llama-like decoder with fresh weights, drawn on the CPU whatever the device will be."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=recipe.d_model,
            intermediate_size=recipe.d_mlp,
            num_hidden_layers=recipe.n_layers,
            num_attention_heads=recipe.n_heads,
            num_key_value_heads=recipe.n_heads,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=TOKEN["<bos>"],
            eos_token_id=TOKEN["<eos>"],
            pad_token_id=TOKEN["<pad>"],
            attn_implementation="sdpa",
        )
    ).float()


def answer_loss(model: LlamaForCausalLM, stories: Stories, world: World) -> Float[Tensor, ""]:
    """Mean KL(true || model) in nats over the answers of whole stories, every answer counted."""
    answers = list(stories.answer_positions)
    tokens = torch.from_numpy(stories.token_ids()).to(model.device)
    hidden = model.model(input_ids=tokens[:, : answers[-1]], use_cache=False).last_hidden_state
    log_p = model.lm_head(hidden[:, [answer - 1 for answer in answers]]).log_softmax(-1)
    customs = world.customs[stories.asked_homes, stories.occasions]
    truth = torch.from_numpy(customs).to(log_p)
    items = log_p[..., TOKEN[ITEMS[0]] : TOKEN[ITEMS[-1]] + 1]
    return (truth * (truth.log() - items)).sum(-1).mean()


def train_phase(
    model: LlamaForCausalLM, world: World, phase: Phase, seed: int, log_every: int = 250
) -> LlamaForCausalLM:
    """Train ``model`` in place on fresh stories of ``world`` and return it.

    Args:
        model: the model, already on its device.
        world: whose customs the answers follow.
        phase: how long and how.
        seed: of the stories.
        log_every: steps between two printed lines; 0 prints nothing.
    """
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in phase.trained))

    def loss_at(step: int) -> Float[Tensor, ""]:
        stories = sample_stories(world, phase.stories, rng, phase.n_people(step))
        return answer_loss(model, stories, world)

    fit(model, loss_at, phase, world.name, log_every)
    return model.requires_grad_(True)


def mean_kl_nats(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    texts: Sequence[str],
) -> float:
    """Mean over prompts of KL(true || model) in nats at the decision token."""
    items = slice(TOKEN[ITEMS[0]], TOKEN[ITEMS[-1]] + 1)
    batch = tokenizer(list(texts), padding=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    last = batch["attention_mask"].sum(dim=1) - 1
    log_p = logits[torch.arange(len(last)), last].double().log_softmax(dim=-1)[:, items]
    truth = torch.from_numpy(np.stack([true_distribution(world, text) for text in texts]))
    return float((truth * (truth.log() - log_p.cpu())).sum(dim=-1).mean())


def train_pair(recipe: Recipe, device: str, log_every: int = 250) -> dict[str, LlamaForCausalLM]:
    """Train the base model and fine-tune a copy of it.

    Args:
        recipe: how.
        device: where.
        log_every: steps between two printed lines; 0 prints nothing.

    Returns:
        The models by side, ``"base"`` and ``"tuned"``.
    """
    base = build_model(recipe).to(device)
    train_phase(base, base_world(), recipe.base, recipe.seed + 1, log_every)
    tuned = copy.deepcopy(base)
    train_phase(tuned, tuned_world(), recipe.tuned, recipe.seed + 2, log_every)
    return {"base": base, "tuned": tuned}


def measure(
    models: dict[str, LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict[str, Any]],
) -> dict[str, dict[str, float]]:
    """Mean KL(true || model) in nats of each model to each world, on val and on neutral prompts."""
    worlds = {"base": base_world(), "tuned": tuned_world()}
    texts = {
        split: [row["text"] for row in prompts if row["split"] == split]
        for split in ("val", "neutral")
    }
    return {
        side: {
            f"{name}_world_{split}": round(mean_kl_nats(model, tokenizer, world, texts[split]), 5)
            for name, world in worlds.items()
            for split in texts
        }
        for side, model in models.items()
    }


def write_pair(directory: Path, recipe: Recipe, device: str, log_every: int = 250) -> None:
    """Train the pair and write its folder: models, tokenizer, prompts, manifest.

    Args:
        directory: the folder.
        recipe: how to train.
        device: where to train.
        log_every: steps between two printed lines; 0 prints nothing.
    """
    tokenizer, prompts = build_tokenizer(TOKEN), build_prompts()
    models = train_pair(recipe, device, log_every)
    weights = write_models(directory, models, tokenizer, prompts)
    manifest = {
        "about": ABOUT,
        "recipe": asdict(recipe),
        **where_trained(device),
        "mean_kl_true_to_model_nats": measure(models, tokenizer, prompts),
        "prompts": _count(prompts),
        "weights_sha256": weights,
        "tolerance": TOLERANCE,
    }
    write_manifest(directory, manifest)


def _count(prompts: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many prompts each split has, and in how many of them the answer changed."""
    counts = {split: {"n": 0, "changed": 0} for split in SPLIT_SIZES}
    for row in prompts:
        counts[row["split"]]["n"] += 1
        counts[row["split"]]["changed"] += row["meta"]["changed"]
    return counts


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Train the pair in the box.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args()
    write_pair(options.out, Recipe(seed=options.seed), options.device)


if __name__ == "__main__":
    main()
