"""How far apart the weights of the two models are, matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from rq4lens.models.load.lens import named_weights
from rq4lens.models.pair import ModelPair


class WeightChange(NamedTuple):
    """How one matrix differs between the models.

    Args:
        name: its name, as ``blocks.0.attn.W_Q``.
        relative_change: ``|W_tuned - W_base| / |W_base|``, Frobenius norms.
        cosine: cosine between the two, read as vectors.
        squares: the sums that several matrices add up: ``|W_base|²``, ``|W_tuned|²`` and their
            inner product.
    """

    name: str
    relative_change: float | None
    cosine: float | None
    squares: tuple[float, float, float]


@torch.no_grad()
def weight_changes(pair: ModelPair) -> Iterator[WeightChange]:
    """Every matrix that both models have in the same shape; biases and norms are no matrices."""
    tuned = dict(named_weights(pair.tuned.model))
    for name, base in named_weights(pair.base.model):
        other = tuned.get(name)
        if other is None or other.shape != base.shape or base.dim() < 2 or ".b_" in name:
            continue
        a, b = base.float(), other.to(base.device).float()
        own, its, both = float((a * a).sum()), float((b * b).sum()), float((a * b).sum())
        change = float((b - a).norm()) / own**0.5 if own > 0 else None
        cosine = both / (own * its) ** 0.5 if own * its > 0 else None
        yield WeightChange(name, change, cosine, (own, its, both))


def weight_cosine(pair: ModelPair) -> float | None:
    """Cosine of all matrices together; None where the models are not both in memory."""
    if not (pair.keep_both and pair.base.is_loaded and pair.tuned.is_loaded):
        return None
    own, its, both = (
        sum(each) for each in zip(*(w.squares for w in weight_changes(pair)), strict=True)
    )
    return both / (own * its) ** 0.5 if own * its > 0 else None
