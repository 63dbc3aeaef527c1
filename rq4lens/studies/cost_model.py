"""What a grid, an atlas or a study costs, from the shape of the model and a short probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from rq4lens.patching.engines.suffix import BATCHES_PER_DEVICE

KINDS = 2
"""Each head set is patched raw and mapped."""

RECORD_BYTES = 1900
RECORD_BYTES_PER_PROMPT = 44
"""A stored condition: its ingredients, and two numbers of some 21 characters for each prompt."""

MAP_JSON_BYTES_PER_HEAD = 400


@dataclass(frozen=True)
class Shape:
    """The shape of a model, in TransformerLens' words; a gated MLP has three matrices, not two."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    gated_mlp: bool
    d_vocab: int
    bytes_per_number: int = 4

    @classmethod
    def of(cls, cfg: Any) -> Shape:
        """The shape in a TransformerLens configuration."""
        names = ("n_layers", "n_heads", "d_model", "d_head", "gated_mlp", "d_vocab")
        return cls(
            **{name: getattr(cfg, name) for name in names},
            n_key_value_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_mlp=cfg.d_mlp or 0,
            bytes_per_number=cfg.dtype.itemsize,
        )

    @property
    def width(self) -> int:
        """Width of all heads of a layer side by side."""
        return self.n_heads * self.d_head

    @property
    def mlp_weights(self) -> int:
        """Weights of one layer's MLP."""
        return (3 if self.gated_mlp else 2) * self.d_model * self.d_mlp

    @property
    def block_weights(self) -> int:
        """Weights of one layer."""
        keys = self.n_key_value_heads * self.d_head
        return 2 * self.d_model * (self.width + keys) + self.mlp_weights


def pass_flops(shape: Shape, n_prompts: int, n_tokens: int, n_layers: int | None = None) -> float:
    """Operations of a forward pass through the first layers; the unembedding is one row's.

    Two per weight and token, and four per pair of positions and unit of the heads' width.
    """
    layers = shape.n_layers if n_layers is None else n_layers
    weights = 2.0 * n_tokens * shape.block_weights
    attention = 4.0 * shape.width * n_tokens**2
    return n_prompts * layers * (weights + attention)


def row_flops(shape: Shape, layer: int, n_tokens: int) -> float:
    """Operations of one row: a prompt under one condition, patched at a layer.

    The rest of the patched block, every block above, and one query over the prompt's keys in each;
    the unembedding is counted by its logits.
    """
    above = shape.n_layers - 1 - layer
    own = shape.d_model * shape.width + shape.mlp_weights
    return 2.0 * (own + above * shape.block_weights) + 4.0 * above * shape.width * n_tokens


def busy_share(n_devices: int) -> float:
    """Time of a pass over several devices, of the time on one.

    ``m`` batches on ``n`` devices take ``m + n - 1`` turns of ``1 / (m n)`` each.
    """
    n_batches = BATCHES_PER_DEVICE * n_devices
    return (n_batches + n_devices - 1) / (n_batches * n_devices)


@dataclass(frozen=True)
class Work:
    """What is measured of one pair: ``rows`` are layers and how many rows enter there."""

    n_prompts: int
    n_tokens: int
    rows: tuple[tuple[int, int], ...]

    @classmethod
    def grid(cls, n_prompts: int, n_tokens: int, n_conditions: int, layers: Sequence[int]) -> Work:
        """The same number of conditions (head sets times kinds) at each of some layers."""
        return cls(n_prompts, n_tokens, tuple((each, n_conditions * n_prompts) for each in layers))

    @classmethod
    def atlas(cls, shape: Shape, n_prompts: int, n_tokens: int) -> Work:
        """Every head of every layer, raw and mapped."""
        conditions = KINDS * shape.n_heads
        return cls.grid(n_prompts, n_tokens, conditions, range(shape.n_layers))

    def features(self, shape: Shape) -> tuple[float, float, float]:
        """What the seconds of the rows are made of: blocks visited, operations, logits."""
        lowest = min((layer for layer, _ in self.rows), default=shape.n_layers)
        flops = sum(count * row_flops(shape, layer, self.n_tokens) for layer, count in self.rows)
        n_rows = sum(count for _, count in self.rows)
        return float(shape.n_layers - lowest), flops, float(n_rows * shape.d_vocab)


@dataclass(frozen=True)
class Measured:
    """Seconds of some work on the machine at hand: its clean pass, and its rows."""

    work: Work
    pass_seconds: float
    rows_seconds: float


@dataclass(frozen=True)
class Machine:
    """What a machine takes for a model of some shape.

    A clean pass has its start, whatever its size, and its operations; rows have the blocks that
    they visit, whatever their number, their operations, and their logits.
    """

    start_seconds: float
    pass_flop_seconds: float
    block_seconds: float
    row_flop_seconds: float
    logit_seconds: float

    @classmethod
    def calibrated(cls, shape: Shape, points: Sequence[Measured]) -> Machine:
        """Constants, none negative, that miss the measured points least in relative terms."""
        passes = [
            (1.0, pass_flops(shape, point.work.n_prompts, point.work.n_tokens)) for point in points
        ]
        rows = [point.work.features(shape) for point in points]
        start, per_flop = _fit(passes, [point.pass_seconds for point in points])
        block, per_row_flop, logit = _fit(rows, [point.rows_seconds for point in points])
        return cls(start, per_flop, block, per_row_flop, logit)

    def pass_seconds(self, shape: Shape, work: Work) -> float:
        """Seconds of the tuned model's clean pass."""
        flops = pass_flops(shape, work.n_prompts, work.n_tokens)
        return self.start_seconds + self.pass_flop_seconds * flops

    def rows_seconds(self, shape: Shape, work: Work) -> float:
        """Seconds of the rows."""
        blocks, flops, logits = work.features(shape)
        return (
            self.block_seconds * blocks
            + self.row_flop_seconds * flops
            + self.logit_seconds * logits
        )

    def seconds(self, shape: Shape, work: Work, n_train: int = 0, n_devices: int = 1) -> float:
        """Seconds of a job from two loaded models to its numbers, fitting maps aside."""
        highest = max((layer for layer, _ in work.rows), default=0)
        # Activations are read up to the highest layer: of base on all prompts, of tuned on train.
        read = pass_flops(shape, work.n_prompts + 2 * n_train, work.n_tokens, highest + 1)
        passes = self.pass_flop_seconds * read + self.pass_seconds(shape, work)
        return passes * busy_share(n_devices) + self.rows_seconds(shape, work)


def _fit(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    relative = np.asarray(features, dtype=float) / np.asarray(seconds, dtype=float)[:, None]
    scale = relative.max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(relative / scale, np.ones(len(seconds)))
    return [float(value) for value in found / scale]


def store_bytes(n_patches: int, n_prompts: int) -> int:
    """Disk that the records of so many patches (a head set of one kind) take."""
    return n_patches * (RECORD_BYTES + RECORD_BYTES_PER_PROMPT * n_prompts)


def map_bytes(shape: Shape, n_layers: int, scope: str = "head") -> int:
    """Disk of the maps of some layers, which are kept in float32."""
    side = shape.d_head if scope == "head" else shape.width
    blocks = shape.n_heads if scope == "head" else 1
    json_bytes = MAP_JSON_BYTES_PER_HEAD * shape.n_heads
    return n_layers * (blocks * 4 * (side * side + side) + json_bytes)
