"""What the engine benchmarks run on: the pair, its prompts, and the conditions of the main job."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformer_lens.utilities.multi_gpu import get_device_for_block_index

from rq4lens.heads import HeadSet
from rq4lens.models.load.lens import HookedTransformer, HookedTransformerConfig
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.patch import Intervention, Patch

ALPHA = 0.3
KINDS = ("raw", "mapped")

GPT2_SMALL = {
    "n_layers": 12,
    "d_model": 768,
    "d_head": 64,
    "n_heads": 12,
    "d_mlp": 3072,
    "d_vocab": 50257,
    "n_ctx": 1024,
    "act_fn": "gelu_new",
    "normalization_type": "LN",
}
LLAMA_8B = {
    "n_layers": 32,
    "d_model": 4096,
    "d_head": 128,
    "n_heads": 32,
    "n_key_value_heads": 8,
    "d_mlp": 14336,
    "d_vocab": 128256,
    "n_ctx": 8192,
    "act_fn": "silu",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "rotary_base": 500000.0,
    "rotary_adjacent_pairs": False,
}
LLAMA_70B = LLAMA_8B | {"n_layers": 80, "d_model": 8192, "n_heads": 64, "d_mlp": 28672}
TINY = LLAMA_8B | {
    "n_layers": 4,
    "d_model": 64,
    "d_head": 16,
    "n_heads": 8,
    "n_key_value_heads": 2,
    "d_mlp": 96,
    "d_vocab": 300,
}
"""Tries the scripts out."""


@dataclass(frozen=True)
class Case:
    """A pair of models in memory and the prompts that are measured on it.

    Args:
        name: what the case is called in the tables.
        base: the base model.
        tuned: the tuned model.
        prompts: the prompts.
        layer: the main layer.
        batch_size: prompts per clean forward pass.
    """

    name: str
    base: HookedTransformer
    tuned: HookedTransformer
    prompts: TokenizedPrompts
    layer: int
    batch_size: int

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.tuned.parameters()).device

    def describe(self) -> str:
        """The case in one line."""
        cfg, lengths = self.tuned.cfg, sorted(set(self.prompts.lengths.tolist()))
        tokens = " to ".join(str(n) for n in dict.fromkeys([lengths[0], lengths[-1]]))
        dtype = str(cfg.dtype).removeprefix("torch.")
        return (
            f"{cfg.n_layers} layers, {cfg.n_heads} heads, d_model {cfg.d_model}, vocabulary "
            f"{cfg.d_vocab}, {dtype}; {len(self.prompts)} prompts x {tokens} tokens; "
            f"layer {self.layer}"
        )

    def shortened(self, n_prompts: int, n_tokens: int | None = None) -> Case:
        """The same models on fewer or shorter prompts."""
        ids = self.prompts.ids[:n_prompts]
        tokens = tuple(row[:n_tokens] for row in self.prompts.token_ids[:n_prompts])
        return replace(self, prompts=TokenizedPrompts(ids, tokens), batch_size=n_prompts)


def random_model(
    seed: int, device: str, dtype: torch.dtype, shape: dict[str, Any], n_devices: int = 1
) -> HookedTransformer:
    """A model of the given shape with random weights, made where it will be used."""
    cfg = HookedTransformerConfig(
        **shape, dtype=dtype, device=device, n_devices=n_devices, init_weights=False
    )
    with init_empty_weights():
        model = HookedTransformer(cfg, move_to_device=False)
    last = cfg.n_layers - 1
    before, after = dict.fromkeys(("embed", "pos_embed"), 0), {"ln_final": last, "unembed": last}
    parts = before | {f"blocks.{layer}": layer for layer in range(cfg.n_layers)} | after
    for number, (name, layer) in enumerate(parts.items()):
        if hasattr(model, name.split(".", maxsplit=1)[0]):
            draw = torch.Generator(get_device_for_block_index(layer, cfg))
            _fill(model.get_submodule(name), draw.manual_seed(1000 * seed + number), dtype)
    return model.eval()


def _fill(part: torch.nn.Module, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Give a part of a model its weights, on the generator's device."""
    for module in part.modules():
        for name, weight in module.named_parameters(recurse=False):
            made = torch.empty(weight.shape, dtype=dtype, device=generator.device)
            if name == "w":
                made.fill_(1)
            elif name.lstrip("_").startswith("b"):
                made.zero_()
            else:
                made.normal_(0, 0.02, generator=generator)
            setattr(module, name, torch.nn.Parameter(made))
    part.to(generator.device)  # tables of rotations and masks


def random_tokens(n_prompts: int, n_tokens: int, vocabulary: int) -> TokenizedPrompts:
    """Prompts of random tokens."""
    draw = random.Random(0)
    rows = (tuple(draw.randrange(vocabulary) for _ in range(n_tokens)) for _ in range(n_prompts))
    return TokenizedPrompts(tuple(f"p{i}" for i in range(n_prompts)), tuple(rows))


def random_case(
    name: str, shape: dict[str, Any], n_prompts: int, n_tokens: int, layer: int
) -> Callable[[str, torch.dtype], Case]:
    """A random pair of a given shape, to be made on a device."""

    def make(device: str, dtype: torch.dtype) -> Case:
        base, tuned = (random_model(seed, device, dtype, shape) for seed in (1, 2))
        prompts = random_tokens(n_prompts, n_tokens, shape["d_vocab"])
        return Case(name, base, tuned, prompts, layer, n_prompts)

    return make


def builtin_case(device: str, dtype: torch.dtype) -> Case:
    """The built-in pair on its validation prompts."""
    from rq4lens.config import Place  # noqa: PLC0415
    from rq4lens.models.catalog import load_pair  # noqa: PLC0415 - random pairs need no loading

    name = str(dtype).removeprefix("torch.")
    pair = load_pair("etiquette", place=Place(device=device, dtype=name))
    models = (pair.use("base").model, pair.use("tuned").model)
    return Case("built-in pair", *models, pair.tokens("tuned", "val"), 1, 32)


CASES: dict[str, Callable[[str, torch.dtype], Case]] = {
    "builtin": builtin_case,
    "gpt2-small": random_case("GPT-2-small shape", GPT2_SMALL, 16, 64, 8),
    "llama-8b": random_case("Llama-3.1-8B shape", LLAMA_8B, 150, 96, 26),
    "tiny": random_case("tiny", TINY, 8, 24, 2),
}
"""Every case by its name on the command line; ``tiny`` only tries the scripts out."""


def grid_conditions(layer: int, n_heads: int) -> list[Intervention]:
    """The main job's patches at one layer: all, each, the top k and random k heads; both kinds."""
    everything = tuple(range(n_heads))
    sizes = (1, 2, 4, 8)
    sets = [everything, *((head,) for head in everything), *(everything[:k] for k in sizes)]
    sets += [tuple(random.Random(seed).sample(everything, k)) for k in sizes for seed in range(3)]
    return [
        (Patch(layer, HeadSet.of(heads, n_heads), ALPHA, kind),) for kind in KINDS for heads in sets
    ]


def single_heads(layers: range, n_heads: int) -> list[Intervention]:
    """Every head of some layers by itself; both kinds."""
    return [
        (Patch(layer, HeadSet.of((head,), n_heads), ALPHA, kind),)
        for layer in layers
        for head in range(n_heads)
        for kind in KINDS
    ]


def command_line() -> str:
    """How this script was started, without where its record goes."""
    script, *arguments = sys.argv
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    return " ".join(["python", f"benchmarks/{Path(script).name}", *arguments])
