"""A grid that no model computed: seeded numbers with a known shape, for tests of drawings."""

import random
from dataclasses import replace

import numpy as np

from rq4lens.config import Effort
from rq4lens.heads import HeadSet
from rq4lens.results import ConditionResult, GridResult, GridSettings, PatchRow, Transfer

LAYER, CONTROL = 26, 24

CARRIED_TO_TUNED = 0.7
"""What heads carry to the tuned model, as a share of what they carry to base."""


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


def half_gap(gap: np.ndarray, carried: float, jitter: np.ndarray) -> PatchRow:
    """A model patched at full strength: what is left of the gap, and whose its answer is."""
    differ = np.arange(len(gap)) % 10 < 8
    answer = np.where(differ, 2.0 if carried > 0.6 else 1.0, 3.0)
    effect = carried * gap
    return PatchRow(0.9 * effect, -2 * effect, gap * (1 - carried * jitter), answer)


def synthetic_grid(seed: int = 0, n_prompts: int = 150, **changes) -> GridResult:
    """A grid of the main job: effects of heads add up, prompts scatter."""
    settings = synthetic_settings(**changes)
    raw, mapped = head_strengths(settings.n_heads, seed + 1000 * settings.layer)
    rng = np.random.default_rng(seed)
    weight = rng.gamma(2.0, 0.5, (settings.n_heads, n_prompts))
    gap = 0.7 * rng.gamma(4.0, 0.25, n_prompts)
    shares = 0.8 * raw / raw.sum()
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
            raw=PatchRow(kl_raw, -2 * kl_raw),
            mapped=PatchRow(kl_mapped, -2 * kl_mapped),
            transfer=None if cond == "self" else swapped(scale * float(shares[chosen].sum())),
        )

    def swapped(carried: float) -> Transfer:
        jitter = 1 + 0.1 * np.sin(np.arange(n_prompts))
        into_base = half_gap(1.1 * gap, CARRIED_TO_TUNED * carried, jitter)
        return Transfer(half_gap(gap, carried, jitter), into_base)

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
        every_layer=swapped(0.9),
        provenance={"seed": seed},
    )
