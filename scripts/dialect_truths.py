"""What is so of the pair ``dialect``, measured with plain hooks on the Hugging Face models.

All at the decision token, in nats, at strength 1: how far apart the models are, how much of it
layers and heads carry, and how much of what a head tells is there when its activation comes from
elsewhere. Nothing here uses the engines, maps or statistics of the package: they are judged by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from dialect_world import TOKEN
from jaxtyping import Float, Int
from scipy.linalg import orthogonal_procrustes
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

Z = Float[np.ndarray, "prompt head d_head"]
Rows = Float[np.ndarray, "prompt d_head"]
LogP = Float[np.ndarray, "prompt token"]
PerPrompt = Float[np.ndarray, " prompt"]
Heads = Mapping[int, Sequence[int]]
"""Heads by layer."""
ByLayer = Mapping[int, Z]

N_RESAMPLES = 2000


@dataclass(frozen=True)
class Reading:
    """A model on prompts of one length: what its heads and its answer are at the last token."""

    model: GPT2LMHeadModel
    tokens: Int[Tensor, "prompt pos"]

    @cached_property
    def z(self) -> ByLayer:
        """Activations of the heads by layer."""
        kept: dict[int, Z] = {}

        def keep(layer: int, _module: nn.Module, inputs: tuple[Tensor]) -> None:
            heads = inputs[0][:, -1].unflatten(-1, (self.model.config.n_head, -1))
            kept[layer] = heads.double().numpy()

        layers = range(self.model.config.n_layer)
        with _hooked(
            [self.projection(i).register_forward_pre_hook(partial(keep, i)) for i in layers]
        ):
            self._answer()
        return kept

    @cached_property
    def log_p(self) -> LogP:
        """The answers."""
        return self._answer()

    def projection(self, layer: int) -> nn.Module:
        """The output projection of a layer's heads; its input is z, the heads side by side."""
        return self.model.transformer.h[layer].attn.c_proj

    def output(self, layer: int, head: int) -> Float[np.ndarray, "prompt d_model"]:
        """What a head adds to the residual stream."""
        width = self.z[layer].shape[-1]
        weight = self.projection(layer).weight.detach().double().numpy()
        return self.z[layer][:, head] @ weight[head * width : (head + 1) * width]

    def with_heads(self, heads: Heads, z: ByLayer) -> LogP:
        """The answers when these heads have other activations."""

        def put(layer: int, _module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            own = inputs[0].clone().unflatten(-1, z[layer].shape[1:])
            which = list(heads[layer])
            own[:, -1, which] = torch.from_numpy(z[layer][:, which]).to(own)
            return (own.flatten(-2),)

        return self._answered(
            [self.projection(i).register_forward_pre_hook(partial(put, i)) for i in heads]
        )

    def with_added(self, layer: int, added: Float[np.ndarray, "prompt d_model"]) -> LogP:
        """The answers when something is added behind the heads of a layer."""

        def add(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
            output = output.clone()
            output[:, -1] += torch.from_numpy(added).to(output)
            return output

        return self._answered([self.projection(layer).register_forward_hook(add)])

    def _answered(self, hooks: list[Any]) -> LogP:
        with _hooked(hooks):
            return self._answer()

    @torch.no_grad()
    def _answer(self) -> LogP:
        return self.model(self.tokens).logits[:, -1].double().log_softmax(-1).numpy()


@contextmanager
def _hooked(hooks: Sequence[Any]) -> Iterator[None]:
    """Take hooks away again."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kl(p: LogP, q: LogP) -> PerPrompt:
    """KL(p || q)."""
    return (np.exp(p) * (p - q)).sum(-1)


def scaled_rotation(x: Rows, y: Rows) -> Callable[[Rows], Rows]:
    """The closest rotation and scale from x to y.

    Source: Schönemann and Carroll, Psychometrika 35 (1970).
    """
    centred = x - x.mean(0)
    rotation, nuclear_norm = orthogonal_procrustes(centred, y - y.mean(0))
    matrix = rotation * nuclear_norm / max(float((centred**2).sum()), 1e-30)
    return lambda other: (other - x.mean(0)) @ matrix + y.mean(0)


@dataclass(frozen=True)
class Both:
    """Base and tuned on the prompts of one split."""

    rows: Sequence[Mapping[str, Any]]
    base: Reading
    tuned: Reading

    @classmethod
    def of(
        cls, models: Mapping[str, GPT2LMHeadModel], prompts: Sequence[Mapping[str, Any]], split: str
    ) -> Both:
        """Read the prompts of a split."""
        rows = [row for row in prompts if row["split"] == split]
        tokens = torch.tensor([[TOKEN[w] for w in ["<bos>", *r["text"].split()]] for r in rows])
        return cls(rows, *(Reading(models[side], tokens) for side in ("base", "tuned")))

    @cached_property
    def gaps(self) -> tuple[float, float]:
        """KL(base || tuned) and KL(tuned || base)."""
        base, tuned = self.base.log_p, self.tuned.log_p
        return float(kl(base, tuned).mean()), float(kl(tuned, base).mean())

    def transfer_pct(self, heads: Heads) -> dict[str, float]:
        """How far these heads take tuned to base, and base to tuned."""
        to_base = kl(self.base.log_p, self.tuned.with_heads(heads, self.base.z)).mean()
        to_tuned = kl(self.tuned.log_p, self.base.with_heads(heads, self.tuned.z)).mean()
        shares = {"to_base": to_base / self.gaps[0], "to_tuned": to_tuned / self.gaps[1]}
        return {name: round(100 * (1 - float(share)), 2) for name, share in shares.items()}

    def damage(self, layer: int, head: int, x: Rows) -> PerPrompt:
        """KL(tuned with x at a head || tuned)."""
        z = {layer: self.tuned.z[layer].copy()}
        z[layer][:, head] = x
        return kl(self.tuned.with_heads({layer: [head]}, z), self.tuned.log_p)


@dataclass(frozen=True)
class Ladder:
    """What may stand in for one head of the tuned model."""

    train: Both
    layer: int
    head: int

    def z(self, both: Both) -> tuple[Rows, Rows]:
        """The head in base and in tuned."""
        return both.base.z[self.layer][:, self.head], both.tuned.z[self.layer][:, self.head]

    def damages(self, both: Both) -> dict[str, PerPrompt]:
        """The damage of each source on some prompts."""
        (x, y), (z_base, _) = self.z(self.train), self.z(both)
        sources = {
            "constant": np.broadcast_to(y.mean(0), z_base.shape),
            "raw": z_base,
            "shifted": z_base - x.mean(0) + y.mean(0),
            "mapped": scaled_rotation(x, y)(z_base),
        }
        damages = {name: both.damage(self.layer, self.head, z) for name, z in sources.items()}
        place = self.layer, self.head
        moved = both.base.output(*place) - both.tuned.output(*place)
        damages["output"] = kl(both.tuned.with_added(self.layer, moved), both.tuned.log_p)
        return damages

    def held_out(self, both: Both, part: str) -> PerPrompt:
        """The damage of maps that were fitted without the word that each prompt has of a part."""
        x, y = self.z(self.train)
        mapped = self.z(both)[0].copy()
        seen, asked = (np.array([row["meta"][part] for row in b.rows]) for b in (self.train, both))
        for word in set(asked):
            rows, others = asked == word, seen != word
            mapped[rows] = scaled_rotation(x[others], y[others])(mapped[rows])
        return both.damage(self.layer, self.head, mapped)


def _interval(part: PerPrompt, whole: PerPrompt, groups: Sequence[str]) -> list[float]:
    """95% bootstrap interval of 100 (1 - part / whole), over groups."""
    names, which = np.unique(groups, return_inverse=True)
    sums = np.stack([np.bincount(which, each) for each in (part, whole)])
    rng = np.random.default_rng(0)
    parts, wholes = sums[:, rng.integers(len(names), size=(N_RESAMPLES, len(names)))].sum(-1)
    return [round(float(x), 1) for x in np.quantile(100 * (1 - parts / wholes), [0.025, 0.975])]


def _wiped(both: Both, train: Both, layer: int) -> float:
    """The damage of a constant at all heads of a layer."""
    z = {layer: np.broadcast_to(train.tuned.z[layer].mean(0), both.tuned.z[layer].shape)}
    heads = {layer: range(both.tuned.model.config.n_head)}
    return float(kl(both.tuned.with_heads(heads, z), both.tuned.log_p).mean())


def head_truth(ladder: Ladder, val: Both, neutral: Both, part: str | None) -> dict[str, Any]:
    """What is so of one head; held-out words are of the part that it reads."""
    damages = ladder.damages(val)
    if part is not None:
        damages["held_out"] = ladder.held_out(val, part)
    constant, groups = damages["constant"], [row["group"] for row in val.rows]
    sources = [name for name in damages if name != "constant"]
    truth: dict[str, Any] = {
        "reads": part,
        "transfer_pct": val.transfer_pct({ladder.layer: [ladder.head]}),
        "damage_nats": _means(damages),
        "neutral_damage_nats": _means(ladder.damages(neutral)),
    }
    if part is not None:
        truth["recovered_pct"] = {
            name: round(100 * (1 - float(damages[name].mean() / constant.mean())), 1)
            for name in sources
        }
        truth["recovered_pct_ci95"] = {
            name: _interval(damages[name], constant, groups) for name in sources
        }
    return truth


def _means(damages: Mapping[str, PerPrompt]) -> dict[str, float]:
    return {name: round(float(each.mean()), 6) for name, each in damages.items()}


def measured_truths(
    models: Mapping[str, GPT2LMHeadModel],
    prompts: Sequence[Mapping[str, Any]],
    readers: Mapping[tuple[int, int], str],
) -> dict[str, Any]:
    """What is so of the pair, for its manifest."""
    train, val, neutral = (Both.of(models, prompts, split) for split in ("train", "val", "neutral"))
    config = models["base"].config
    heads, layers = range(config.n_head), range(config.n_layer)
    return {
        "gap_nats": _sides(val.gaps),
        "neutral_gap_nats": _sides(neutral.gaps),
        "layers": {
            f"L{layer}": val.transfer_pct({layer: heads})
            | {"constant_nats": round(_wiped(val, train, layer), 6)}
            for layer in layers
        },
        "every_layer": val.transfer_pct(dict.fromkeys(layers, heads)),
        "heads": {
            f"L{i}H{h}": head_truth(Ladder(train, i, h), val, neutral, readers.get((i, h)))
            for i in sorted({layer for layer, _ in readers})
            for h in heads
        },
    }


def _sides(gaps: tuple[float, float]) -> dict[str, float]:
    return {side: round(gap, 6) for side, gap in zip(("base", "tuned"), gaps, strict=True)}
