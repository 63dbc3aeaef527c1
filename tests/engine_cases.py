"""Small models, ragged prompts and interventions for the tests of the engines."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch

from rq4lens.heads import HeadSet
from rq4lens.models.load.lens import HookedTransformer, HookedTransformerConfig
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.patch import Intervention, Patch, Sources

N_HEADS, D_HEAD, N_LAYERS, VOCAB = 4, 8, 4, 50
LENGTHS = (3, 17, 9, 30, 6, 9)


def tiny_model(dtype: torch.dtype = torch.float32, **fields: Any) -> HookedTransformer:
    """Rotary, grouped and gated, with weights wide enough that every part matters."""
    chosen = {
        "n_layers": N_LAYERS,
        "d_model": 32,
        "n_ctx": 64,
        "d_head": D_HEAD,
        "n_heads": N_HEADS,
        "n_key_value_heads": 2,
        "d_vocab": VOCAB,
        "d_mlp": 48,
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "initializer_range": 0.3,
        "seed": 0,
        "device": "cpu",
        "dtype": dtype,
    }
    return HookedTransformer(HookedTransformerConfig(**(chosen | fields))).eval()


def ragged_prompts(lengths: Iterable[int] = LENGTHS, seed: int = 0) -> TokenizedPrompts:
    """Random tokens; lengths differ, so that padding, windows and positions matter."""
    draw = random.Random(seed)
    tokens = tuple(tuple(draw.randrange(VOCAB) for _ in range(n)) for n in lengths)
    return TokenizedPrompts(tuple(f"p{i}" for i in range(len(tokens))), tokens)


def random_sources(n_prompts: int, k_positions: int = 1, d_head: int = D_HEAD) -> Sources:
    """Noise of the size of real activations, under two names at every layer."""
    generator = torch.Generator().manual_seed(1)
    shape = (n_prompts, k_positions, N_HEADS, d_head)
    return Sources(
        {
            (layer, name): torch.randn(shape, generator=generator)
            for layer in range(N_LAYERS)
            for name in ("raw", "mapped")
        }
    )


def heads(*indices: int) -> HeadSet:
    """A head set of the tiny model."""
    return HeadSet.of(indices, N_HEADS)


def all_kinds_of_interventions(n_layers: int = N_LAYERS) -> list[Intervention]:
    """Every layer, several head sets, strengths and sources, and patches of several layers."""
    one_layer: list[Intervention] = [
        (Patch(layer, chosen, alpha, source),)
        for layer in range(n_layers)
        for chosen in (heads(0), heads(1, 3), HeadSet.all(N_HEADS))
        for alpha, source in ((0.3, "raw"), (1.0, "mapped"))
    ]
    several: list[Intervention] = [
        (Patch(0, heads(1), 0.5, "raw"), Patch(n_layers - 1, heads(0, 2), 0.3, "mapped")),
        (Patch(0, heads(2), 1.0, "mapped"), Patch(1, HeadSet.all(N_HEADS), 0.3, "mapped")),
        tuple(Patch(layer, heads(layer % N_HEADS), 0.7, "raw") for layer in range(n_layers)),
    ]
    return one_layer + several
