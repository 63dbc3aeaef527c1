"""Small pairs for tests: one whose numbers follow from a formula, and one that is like a real one.

The **micro** pair has no normalisation and no MLP, and its queries and keys are zero, so that every
token attends to all tokens up to itself with equal weight. Its weights are small integers, and
:class:`MicroFormula` works out its logits in plain numpy.

The **tiny** pair is a random decoder with everything real ones have: RMS norms, rotary embeddings,
a gated MLP and, where asked for, grouped-query attention.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rq4lens.config import Effort, Patching, Place
from rq4lens.disk.store import Store
from rq4lens.heads import Head
from rq4lens.models.load.lens import (
    HAS_HOOKED,
    HookedModel,
    HookedTransformer,
    HookedTransformerConfig,
    TransformerBridge,
    bridge_from,
    named_weights,
)
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import Prompt, PromptSet
from rq4lens.patching.experiment import prepare
from rq4lens.patching.grid import measure_grid
from rq4lens.patching.maps.map import put_map
from rq4lens.patching.measured import Measurer
from rq4lens.validation.planting import plant

WORDS = (
    *("apple", "bread", "cheese", "date", "elm", "fig"),
    *("grape", "hazel", "iris", "jasmine", "kale", "lemon"),
)
MICRO_HEADS, MICRO_LAYERS, MICRO_VOCAB = 2, 2, 5
TINY_HEADS, TINY_LAYERS, TINY_WIDTH = 4, 3, 8
MAIN, CONTROL, ALPHA = 1, 0, 0.3
"""Layers and strength that tests of the tiny pair patch at."""
FAST = "suffix" if HAS_HOOKED else "cached"
"""The fastest engine that the installed TransformerLens has models for."""
needs_hooked = pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has only bridges")


def word_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token per word, in the order given; no special token is added."""
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_prompts(
    words: Sequence[str] = WORDS, n_train: int = 48, n_val: int = 16, seed: int = 0
) -> PromptSet:
    """Prompts of different lengths without repeated texts; some paraphrases share a group."""
    rng = np.random.default_rng(seed)
    texts: dict[str, None] = {}
    while len(texts) < n_train + n_val:
        texts[" ".join(rng.choice(words, rng.integers(3, 10)))] = None
    splits = ["train"] * n_train + ["val"] * n_val
    return PromptSet(
        tuple(
            Prompt(
                f"p{index}", text, split, f"{split}{index // 2}" if 4 <= index % 12 < 8 else None
            )
            for index, (text, split) in enumerate(zip(texts, splits, strict=True))
        )
    )


def pair_of(
    base: HookedTransformer,
    tuned: HookedTransformer,
    prompts: PromptSet,
    words: Sequence[str] = WORDS,
    **settings,
) -> ModelPair:
    """Two models in memory as a pair."""
    members = [
        LoadedModel.wrap(model, word_tokenizer(words), source=source)
        for model, source in ((base, "base in memory"), (tuned, "tuned in memory"))
    ]
    return ModelPair(*members, prompts, name="tiny", **settings)


class MicroFormula:
    """The micro model in plain numpy: its weights, and its logits at the last token.

    Args:
        seed: seed of the integers in ``W_V``; everything else is the same in all micro models.
    """

    def __init__(self, seed: int) -> None:
        shared, own = np.random.default_rng(7), np.random.default_rng(seed)
        d_model, d_head = 4, 2
        self.W_E = shared.integers(-1, 2, (MICRO_VOCAB, d_model)).astype(float)
        self.W_pos = shared.integers(-1, 2, (10, d_model)) / 2
        self.W_O = shared.integers(-1, 2, (MICRO_LAYERS, MICRO_HEADS, d_head, d_model)) / 2
        self.b_O = shared.integers(-1, 2, (MICRO_LAYERS, d_model)) / 4
        self.W_U = shared.integers(-1, 2, (d_model, MICRO_VOCAB)).astype(float)
        self.b_U = shared.integers(-1, 2, MICRO_VOCAB) / 2
        self.W_V = own.integers(-1, 2, (MICRO_LAYERS, MICRO_HEADS, d_model, d_head)).astype(float)
        self.b_V = own.integers(-1, 2, (MICRO_LAYERS, MICRO_HEADS, d_head)) / 2

    def model(self) -> HookedTransformer:
        """The same weights in a HookedTransformer, in float64."""
        cfg = HookedTransformerConfig(
            n_layers=MICRO_LAYERS,
            d_model=4,
            n_ctx=10,
            d_head=2,
            n_heads=MICRO_HEADS,
            d_vocab=MICRO_VOCAB,
            attn_only=True,
            normalization_type=None,
            dtype=torch.float64,
            device="cpu",
        )
        model = HookedTransformer(cfg).eval()
        weights = {
            "embed.W_E": self.W_E,
            "pos_embed.W_pos": self.W_pos,
            "unembed.W_U": self.W_U,
            "unembed.b_U": self.b_U,
        }
        for layer in range(MICRO_LAYERS):
            for name in ("W_V", "b_V", "W_O", "b_O"):
                weights[f"blocks.{layer}.attn.{name}"] = getattr(self, name)[layer]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Whatever is not named is W_Q, W_K and their biases: attention is uniform.
                parameter.copy_(torch.as_tensor(weights.get(name, np.zeros(parameter.shape))))
        return model

    def z(self, tokens: Sequence[int], layer: int) -> np.ndarray:
        """``z`` of the last token, ``[head d_head]``: the mean value vector of all tokens."""
        return self._run(tokens, {})[1][layer][-1]

    def logits(self, tokens: Sequence[int], patched: dict[int, np.ndarray] | None = None):
        """Logits of the last token.

        Args:
            tokens: the prompt.
            patched: by layer, what stands for ``z`` ``[head d_head]`` of the last token.
        """
        return self._run(tokens, patched or {})[0][-1]

    def _run(self, tokens: Sequence[int], patched: dict[int, np.ndarray]):
        x = self.W_E[list(tokens)] + self.W_pos[: len(tokens)]
        seen = np.arange(1, len(tokens) + 1)[:, None, None]
        z = {}
        for layer in range(MICRO_LAYERS):
            v = np.einsum("pm,hmd->phd", x, self.W_V[layer]) + self.b_V[layer]
            z[layer] = v.cumsum(0) / seen
            if layer in patched:
                z[layer][-1] = patched[layer]
            x = x + np.einsum("phd,hdm->pm", z[layer], self.W_O[layer]) + self.b_O[layer]
        return x @ self.W_U + self.b_U, z


def kl_nats(patched_logits: np.ndarray, clean_logits: np.ndarray) -> float:
    """``KL(p_patched || p_clean)`` of two rows of logits."""
    p, q = (np.exp(x) / np.exp(x).sum() for x in (patched_logits, clean_logits))
    return float((p * np.log(p / q)).sum())


def tiny_model(
    seed: int = 0, n_key_value_heads: int | None = None, dtype: torch.dtype = torch.float32
) -> HookedModel:
    """A random decoder, wide enough that every part of it matters."""
    if not HAS_HOOKED:
        return tiny_bridge(seed, n_key_value_heads, dtype)
    cfg = HookedTransformerConfig(
        n_layers=TINY_LAYERS,
        d_model=32,
        n_ctx=16,
        d_head=TINY_WIDTH,
        n_heads=TINY_HEADS,
        n_key_value_heads=n_key_value_heads,
        d_mlp=48,
        d_vocab=len(WORDS),
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=TINY_WIDTH,
        dtype=dtype,
        device="cpu",
    )
    model = HookedTransformer(cfg).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(".w"):  # norms keep their gain of 1
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_bridge(
    seed: int = 0, n_key_value_heads: int | None = None, dtype: torch.dtype = torch.float32
) -> TransformerBridge:
    """The same decoder as a bridge around a Llama."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=TINY_LAYERS,
        num_attention_heads=TINY_HEADS,
        num_key_value_heads=n_key_value_heads,
        max_position_embeddings=16,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return bridge_from(model.eval(), "LlamaForCausalLM", torch.arange(4)[None])


def rotated_bridge(base: TransformerBridge, layer: int, heads: Sequence[int]) -> TransformerBridge:
    """A copy with value spaces rotated, which changes activations and no logit."""
    tuned = copy.deepcopy(base)
    weights = dict(named_weights(tuned))
    W_V, W_O = (weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "vo")
    for head in heads:
        generator = torch.Generator().manual_seed(head)
        square = torch.randn(TINY_WIDTH, TINY_WIDTH, generator=generator, dtype=W_V.dtype)
        rotation = torch.linalg.qr(square)[0]
        own = slice(head * TINY_WIDTH, (head + 1) * TINY_WIDTH)
        with torch.no_grad():
            W_V[own], W_O[:, own] = rotation.T @ W_V[own], W_O[:, own] @ rotation
    return tuned


def fine_tuned(base: HookedModel, size: float = 0.1, seed: int = 1) -> HookedModel:
    """A copy whose attention weights moved a little, with two heads of layer 1 rotated besides.

    The rotations are what a map can explain, so that the map of layer 1 has an effect to speak of.
    """
    if HAS_HOOKED:
        tuned = plant(base, rotated=[Head(1, 2), Head(1, 3)]).tuned
    else:
        tuned = rotated_bridge(base, 1, [2, 3])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".attn." in name or ".self_attn." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * parameter.std() * noise)
    return tuned


def half_precision(model: HookedTransformer) -> HookedTransformer:
    """The model in bfloat16, in place."""
    model.cfg.dtype = torch.bfloat16
    return model.to(torch.bfloat16)


def prepared(pair, maps, *, engine="suffix", batch_size=32, activations=None, **patching):
    """An experiment, its settings by name."""
    place = Place(engine=engine, batch_size=batch_size)
    return prepare(pair, maps, Patching(**patching), place, activations=activations)


def grid_of(pair, maps, layer, control_layer=None, alpha=0.3, *, ks=(1, 2, 4, 8), **settings):
    """The main job's grid, its settings by name; ``experiment`` and ``store`` are used if given."""
    effort = Effort(seed=settings.pop("seed", 0))
    names = ("experiment", "store", "progress", "activations")
    experiment, store, progress, activations = (settings.pop(name, None) for name in names)
    place = Place(
        **{name: settings.pop(name) for name in ("engine", "batch_size") if name in settings}
    )
    patching = Patching(layer=layer, control_layer=control_layer, alpha=alpha, k=ks, **settings)
    experiment = experiment or prepare(pair, maps, patching, place, activations=activations)
    return measure_grid(Measurer(experiment, store), patching, effort, progress)


class Address:
    """What a map is stored under that no recipe made."""

    label = "map"

    def __init__(self, layer_map):
        self.layer_map = layer_map

    def to_dict(self):
        """Its own ingredients."""
        return dict(self.layer_map.ingredients)


def stored_map(folder, layer_map):
    """The record of a map that lies in a folder, its tensors beside it."""
    return put_map(Store(folder), Address(layer_map), layer_map)
