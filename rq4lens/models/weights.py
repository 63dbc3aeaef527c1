"""How the weights of two models differ, matrix by matrix: in memory, or in their files alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, float64

from rq4lens.models.load.checkpoint import Checkpoint, stored_values
from rq4lens.models.load.lens import HookedModel, named_weights

LAYER = re.compile(r"(?:^|\.)(\d+)\.")
BIAS = re.compile(r"\._?b_")
"""Biases by head have two axes, too; grouped keys and values are named with a line before them."""


class WeightChange(NamedTuple):
    """How one matrix differs between the models; all experts of a layer are one matrix."""

    layer: int | None
    """None outside all layers."""
    matrix: str
    """Its name in the layer, as ``attn.W_Q``."""
    squares: tuple[float, ...]
    """The sums that several matrices add up: ``|W_base|²``, ``|W_tuned|²``, their inner product and
    ``|W_tuned - W_base|²``."""

    @property
    def relative_change(self) -> float | None:
        """``|W_tuned - W_base| / |W_base|``, Frobenius norms; None where base's is 0."""
        own, _, _, changed = self.squares
        return (changed / own) ** 0.5 if own > 0 else None

    @property
    def cosine(self) -> float | None:
        """The cosine between the two, read as vectors; None where one of them is 0."""
        own, its, both, _ = self.squares
        return both / (own * its) ** 0.5 if own * its > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """The change as plain JSON values."""
        numbers = {"relative_change": self.relative_change, "cosine": self.cosine}
        return {"layer": self.layer, "matrix": self.matrix, **numbers}


def changes_in_memory(base: HookedModel, tuned: HookedModel) -> tuple[WeightChange, ...]:
    """Every matrix that both models have in the same shape, under TransformerLens' names."""
    others = dict(named_weights(tuned))
    return _changes(
        (name, weight.detach(), others[name].detach().to(weight.device))
        for name, weight in named_weights(base)
        if name in others and not BIAS.search(name)
    )


def changes_in_files(base: Checkpoint, tuned: Checkpoint) -> tuple[WeightChange, ...]:
    """The same from the files of two checkpoints, under their names; no model is built."""
    return _changes(
        (name, stored_values(name, base), stored_values(name, tuned))
        for name in base.tensors
        if name in tuned.tensors and len(base.tensors[name].shape) > 1
    )


def together(changes: Iterable[WeightChange]) -> WeightChange | None:
    """All of some matrices as one; None if there is none."""
    squares = [each.squares for each in changes]
    return WeightChange(None, "all", _sum(squares)) if squares else None


def _changes(matrices: Iterable[tuple[str, Tensor, Tensor]]) -> tuple[WeightChange, ...]:
    found: dict[tuple[int | None, str], list[tuple[float, ...]]] = {}
    for name, base, tuned in matrices:
        if base.shape == tuned.shape and base.dim() > 1:  # biases and norms are no matrices
            found.setdefault(_place(name), []).append(tuple(_squares(base.float(), tuned.float())))
    return tuple(WeightChange(*place, _sum(squares)) for place, squares in found.items())


def _squares(base: Tensor, tuned: Tensor) -> Iterator[float]:
    for one, other in ((base, base), (tuned, tuned), (base, tuned)):
        yield float((one * other).sum(dtype=float64))
    yield float((tuned - base).square_().sum(dtype=float64))


def _sum(squares: list[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(np.sum(squares, axis=0).tolist())


def _place(name: str) -> tuple[int | None, str]:
    """The layer of a matrix and its name there; numbers of experts are left out."""
    layer, short = LAYER.search(name), name.removesuffix(".weight")
    if layer is None:
        return None, short
    return int(layer[1]), re.sub(r"\.\d+(?=\.|$)", "", short[layer.end() :]).replace("._W", ".W")
