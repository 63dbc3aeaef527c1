"""What a grid, an atlas or a study takes, from the shape of the model and a short probe."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from rq4lens.cluster.pieces import kind_of_device, pieces_of
from rq4lens.config import Place, RunConfig
from rq4lens.heads import HeadSet
from rq4lens.jobs.progress import Stage, silent
from rq4lens.models.catalog import pair_from
from rq4lens.models.load.lens import ModelConfig
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import FIT_SPLIT, TokenizedPrompts
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.suffix import BATCHES_PER_DEVICE
from rq4lens.patching.patch import RAW, Patch, Sources
from rq4lens.studies.file import Cell, StudyPlan

KINDS = 2
"""Each head set is patched raw and mapped."""

RECORD_BYTES = 1900
RECORD_BYTES_PER_PROMPT = 44
"""A stored condition: its ingredients, and two numbers of some 21 characters for each prompt."""

MAP_JSON_BYTES_PER_HEAD = 400

PROBE_PROMPTS = 64
"""Prompts of the largest probe point, where there are as many."""


def width(cfg: ModelConfig) -> int:
    """Width of all heads of a layer side by side."""
    return cfg.n_heads * cfg.d_head


def mlp_weights(cfg: ModelConfig) -> int:
    """Weights of one layer's MLP; a gated one has three matrices, not two."""
    return (3 if cfg.gated_mlp else 2) * cfg.d_model * (cfg.d_mlp or 0)


def block_weights(cfg: ModelConfig) -> int:
    """Weights of one layer."""
    keys = (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    return 2 * cfg.d_model * (width(cfg) + keys) + mlp_weights(cfg)


def pass_flops(
    cfg: ModelConfig, n_prompts: int, n_tokens: int, n_layers: int | None = None
) -> float:
    """Operations of a forward pass through the first layers; the unembedding is one row's.

    Two per weight and token, and four per pair of positions and unit of the heads' width.
    """
    layers = cfg.n_layers if n_layers is None else n_layers
    weights = 2.0 * n_tokens * block_weights(cfg)
    attention = 4.0 * width(cfg) * n_tokens**2
    return n_prompts * layers * (weights + attention)


def row_flops(cfg: ModelConfig, layer: int, n_tokens: int) -> float:
    """Operations of one row: a prompt under one condition, patched at a layer.

    The rest of the patched block, every block above, and one query over the prompt's keys in each;
    the unembedding is counted by its logits.
    """
    above = cfg.n_layers - 1 - layer
    own = cfg.d_model * width(cfg) + mlp_weights(cfg)
    return 2.0 * (own + above * block_weights(cfg)) + 4.0 * above * width(cfg) * n_tokens


def busy_share(n_devices: int) -> float:
    """Time of a pass over several devices, of the time on one.

    ``m`` batches on ``n`` devices take ``m + n - 1`` turns of ``1 / (m n)`` each.
    """
    n_batches = BATCHES_PER_DEVICE * n_devices
    return (n_batches + n_devices - 1) / (n_batches * n_devices)


@dataclass(frozen=True)
class Work:
    """What is measured of one pair: so many conditions (head sets times kinds) at each layer."""

    n_prompts: int
    n_tokens: int
    n_conditions: int
    layers: Sequence[int]

    def features(self, cfg: ModelConfig) -> tuple[float, float, float]:
        """What the seconds of the rows are made of: blocks visited, operations, logits."""
        visited, n_rows = cfg.n_layers - min(self.layers), self.n_conditions * self.n_prompts
        flops = n_rows * sum(row_flops(cfg, layer, self.n_tokens) for layer in self.layers)
        return float(visited), flops, float(n_rows * len(self.layers) * cfg.d_vocab)


@dataclass(frozen=True)
class Measured:
    """Seconds of some work on the machine at hand: its clean pass, and its rows."""

    work: Work
    pass_seconds: float
    rows_seconds: float


@dataclass(frozen=True)
class Machine:
    """What a machine takes for a model of some configuration.

    A clean pass has its start, whatever its size, and its operations; rows have the blocks that
    they visit, whatever their number, their operations, and their logits.
    """

    start_seconds: float
    pass_flop_seconds: float
    block_seconds: float
    row_flop_seconds: float
    logit_seconds: float

    @classmethod
    def calibrated(cls, cfg: ModelConfig, points: Sequence[Measured]) -> Machine:
        """Constants, none negative, that miss the measured points least in relative terms."""
        passes = [
            (1.0, pass_flops(cfg, point.work.n_prompts, point.work.n_tokens)) for point in points
        ]
        rows = [point.work.features(cfg) for point in points]
        start, per_flop = _fit(passes, [point.pass_seconds for point in points])
        block, per_row_flop, logit = _fit(rows, [point.rows_seconds for point in points])
        return cls(start, per_flop, block, per_row_flop, logit)

    def pass_seconds(self, cfg: ModelConfig, work: Work) -> float:
        """Seconds of the tuned model's clean pass."""
        flops = pass_flops(cfg, work.n_prompts, work.n_tokens)
        return self.start_seconds + self.pass_flop_seconds * flops

    def rows_seconds(self, cfg: ModelConfig, work: Work) -> float:
        """Seconds of the rows."""
        blocks, flops, logits = work.features(cfg)
        return (
            self.block_seconds * blocks
            + self.row_flop_seconds * flops
            + self.logit_seconds * logits
        )

    def seconds(self, cfg: ModelConfig, work: Work, n_train: int = 0, n_devices: int = 1) -> float:
        """Seconds of a job from two loaded models to its numbers, fitting maps aside."""
        # Activations are read up to the highest layer: of base on all prompts, of tuned on train.
        n_layers, n_prompts = max(work.layers) + 1, work.n_prompts + 2 * n_train
        read = pass_flops(cfg, n_prompts, work.n_tokens, n_layers)
        passes = self.pass_flop_seconds * read + self.pass_seconds(cfg, work)
        return passes * busy_share(n_devices) + self.rows_seconds(cfg, work)


def _fit(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    relative = np.asarray(features, dtype=float) / np.asarray(seconds, dtype=float)[:, None]
    scale = relative.max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(relative / scale, np.ones(len(seconds)))
    return [float(value) for value in found / scale]


def store_bytes(n_patches: int, n_prompts: int) -> int:
    """Disk that the records of so many patches (a head set of one kind) take."""
    return n_patches * (RECORD_BYTES + RECORD_BYTES_PER_PROMPT * n_prompts)


def map_bytes(cfg: ModelConfig, n_layers: int, scope: str = "head") -> int:
    """Disk of the maps of some layers, which are kept in float32."""
    side = cfg.d_head if scope == "head" else width(cfg)
    blocks = cfg.n_heads if scope == "head" else 1
    json_bytes = MAP_JSON_BYTES_PER_HEAD * cfg.n_heads
    return n_layers * (blocks * 4 * (side * side + side) + json_bytes)


# A probe, and a study


@dataclass(frozen=True)
class Probe:
    """What a short measurement said about a model on this machine; ``seconds`` is what it took."""

    cfg: ModelConfig
    machine: Machine
    load_seconds: float
    n_tokens: int
    seconds: float


def plan_text(plan: StudyPlan, *, stage: Stage = silent) -> str:
    """What a study will take; one pair per base model is loaded and probed, nothing is written."""
    probes: dict[str, Probe] = {}
    estimates = []
    for cell in plan.cells:
        config = cell.request.config
        pair = pair_from(config.pair, config.reading, config.place.but(keep_both=False))
        base = config.pair.base or config.pair.name
        source = f"{base} {config.pair.base_revision} {config.place.dtype}"
        if source not in probes:
            with stage(f"probe of {cell.pair}", None):
                probes[source] = probe(config, pair)
        estimates.append(estimate(cell, pair, probes[source]))
    n_pieces, seconds, n_bytes = map(sum, zip(*estimates, strict=True))
    took = sum(each.seconds for each in probes.values())
    rankings = sorted({cell.request.config.patching.rank_by for cell in plan.cells})
    return (
        f"{plan.name}: {len(plan.cells)} sweeps of {len({cell.pair for cell in plan.cells})} "
        f"pairs, {n_pieces} pieces, {2 * len(plan.cells)} model loads\n"
        f"about {seconds:,.0f} device-seconds in all on a device like this one (probed for "
        f"{took:.1f} s), fitting maps and resampling aside\n"
        f"about {n_bytes / 2**20:,.1f} MiB of conditions, maps and activations\n"
        f"compared by {', '.join(metric.name for metric in plan.metrics)}; single heads ranked by "
        f"{' and '.join(rankings)}\n"
    )


def probe(config: RunConfig, pair: ModelPair) -> Probe:
    """Load a pair's tuned model and time a few small measurements of it."""
    started = time.perf_counter()
    model: Any = pair.use("tuned").model
    load_seconds = time.perf_counter() - started
    prompts = pair.tokens("tuned", config.patching.split)
    machine = Machine.calibrated(model.cfg, list(_points(model, prompts, config)))
    n_tokens = int(prompts.lengths.float().mean())
    return Probe(model.cfg, machine, load_seconds, n_tokens, time.perf_counter() - started)


def _points(model: Any, prompts: TokenizedPrompts, config: RunConfig) -> Iterator[Measured]:
    """Few and many prompts, one and all heads, the top and the middle layer."""
    cfg = model.cfg
    top, middle = cfg.n_layers - 1, cfg.n_layers // 2
    many = min(PROBE_PROMPTS, len(prompts))
    few = max(1, many // 8)
    place = Place(batch_size=config.place.batch_size)
    _point(model, prompts.some(range(few)), top, 1, place)  # the first time also loads kernels
    for n_prompts in (few, many):
        for layer, n_heads in ((top, cfg.n_heads), (middle, 1), (middle, cfg.n_heads)):
            yield _point(model, prompts.some(range(n_prompts)), layer, n_heads, place)


def _point(
    model: Any, prompts: TokenizedPrompts, layer: int, n_heads: int, place: Place
) -> Measured:
    started = time.perf_counter()
    engine = make_engine(model, prompts, place=place, first_layer=layer)
    sources = Sources({(layer, RAW): torch.zeros_like(engine.clean_z(layer))})
    passed = time.perf_counter()
    heads = [HeadSet.of([head], model.cfg.n_heads) for head in range(n_heads)]
    engine.effects([(Patch(layer, each, 0.3, RAW),) for each in heads], sources)
    finished = time.perf_counter()
    n_tokens = int(prompts.lengths.float().mean())
    work = Work(len(prompts), n_tokens, n_heads, [layer])
    return Measured(work, passed - started, finished - passed)


def estimate(cell: Cell, pair: ModelPair, probed: Probe) -> tuple[int, float, int]:
    """Pieces, seconds and bytes of a cell, from the probe of a model of the same shape."""
    config, cfg = cell.request.config, probed.cfg
    plans = cell.request.plans(pair)
    layers = [plan.layer for plan in plans]
    n_prompts = len(pair.prompts.split(config.patching.split))
    n_train = len(pair.prompts.split(FIT_SPLIT))
    pieces = pieces_of(plans, kind_of_device(config.place.device))
    # The best head is measured among the single ones; larger top-k sets are measured besides.
    n_top = 2 * KINDS * sum(k > 1 for k in plans[0].ks)
    n_patches = sum(len(piece.patches) for piece in pieces) + n_top * len(layers)
    work = Work(n_prompts, probed.n_tokens, n_patches // len(layers), layers)
    seconds = probed.machine.seconds(cfg, work, n_train) + 2 * probed.load_seconds
    n_sites = (n_prompts + n_train) * len(layers) * config.patching.k_positions
    disk_bytes = (
        store_bytes(n_patches, n_prompts)
        + map_bytes(cfg, len(layers), config.patching.map_scope)
        + n_sites * width(cfg) * cfg.dtype.itemsize
    )
    return len(pieces), seconds, disk_bytes
