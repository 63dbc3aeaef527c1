"""A grid that no model computed: seeded numbers with a known shape, for tests of drawings."""

import random
from dataclasses import replace

import numpy as np

from rq4lens.config import Effort
from rq4lens.heads import HeadSet
from rq4lens.results import ConditionResult, GridResult, GridSettings

LAYER, CONTROL = 26, 24


def synthetic_settings(**changes) -> GridSettings:
    values = {
        "pair": "llama-8b medical",
        "base": "meta-llama/Llama-3.1-8B-Instruct",
        "tuned": "runs/medical-finetune",
        "layer": LAYER,
        "control_layer": CONTROL,
        "alpha": 0.3,
        "ks": (1, 2, 4, 8),
        "random_seeds": (0, 1, 2),
        "rank_by": "delta",
        "map_kind": "procrustes_scaled",
        "map_scope": "head",
        "split": "val",
        "k_positions": 1,
        "n_layers": 32,
        "n_heads": 32,
        "kl_direction": "patched||clean",
        "raw_baseline": "identity",
        "decision_rule": "last_token",
        "dtype": "bfloat16",
        "seed": 0,
        "engine": "suffix",
    }
    return GridSettings.from_dict({**values, **changes})


def resampled(grid: GridResult, resamples: int, seed: int = 0) -> GridResult:
    """The grid with fewer bootstrap resamples."""
    effort = Effort(resamples=resamples, seed=seed)
    return replace(grid, settings=replace(grid.settings, effort=effort))


def head_strengths(n_heads: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean KL_raw and KL_mapped of each head: most idle, some explained by a map, some not."""
    rng = np.random.default_rng(seed)
    raw = 2e-4 * rng.lognormal(size=n_heads)
    left = rng.uniform(0.5, 1.2, n_heads)
    changed = rng.permutation(n_heads)[: max(3, n_heads // 4)]
    raw[changed] = 8e-3 * rng.lognormal(sigma=0.6, size=len(changed))
    left[changed] = np.where(np.arange(len(changed)) % 3 < 2, 0.15, 0.8)
    return raw, raw * left


def synthetic_grid(seed: int = 0, n_prompts: int = 150, **changes) -> GridResult:
    """A grid of the main job: effects of heads add up, prompts scatter."""
    settings = synthetic_settings(**changes)
    raw, mapped = head_strengths(settings.n_heads, seed + 1000 * settings.layer)
    rng = np.random.default_rng(seed)
    weight = rng.gamma(2.0, 0.5, (settings.n_heads, n_prompts))
    conditions = {}

    def add(cond: str, layer: int, heads: HeadSet, scale: float = 1.0) -> None:
        chosen = list(heads)
        jitter = rng.lognormal(sigma=0.2, size=n_prompts)
        kl_raw = scale * (raw[chosen] @ weight[chosen]) * jitter
        jitter *= rng.lognormal(sigma=0.3, size=n_prompts)
        kl_mapped = scale * (mapped[chosen] @ weight[chosen]) * jitter
        conditions[cond] = ConditionResult(
            cond,
            layer,
            heads,
            settings.patching.alpha,
            kl_raw,
            kl_mapped,
            -2 * kl_raw,
            -2 * kl_mapped,
        )

    n = settings.n_heads
    add("full", settings.layer, HeadSet.all(n))
    for head in range(n):
        add(f"head{head}", settings.layer, HeadSet.of([head], n))
    order = sorted(range(n), key=lambda head: -conditions[f"head{head}"].delta)
    for k in settings.patching.k:
        add(f"top{k}", settings.layer, HeadSet.of(order[:k], n))
    for k in settings.patching.k:
        for s in settings.patching.random_seeds:
            chosen = sorted(random.Random(s).sample(range(n), k))
            add(f"rand{k}_s{s}", settings.layer, HeadSet.of(chosen, n))
    if settings.patching.control_layer is not None:
        add("ctrl_full", settings.patching.control_layer, HeadSet.all(n), 0.3)
    add("none", settings.layer, HeadSet.none(n))
    add("self", settings.layer, HeadSet.all(n), 0.0)
    return GridResult(
        settings=settings,
        prompt_ids=tuple(f"p{i:03d}" for i in range(n_prompts)),
        groups=tuple(f"g{i // 3}" for i in range(n_prompts)),
        conditions=conditions,
        noise_floor_nats=1e-6,
        provenance={"seed": seed},
    )
