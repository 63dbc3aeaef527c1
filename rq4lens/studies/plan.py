"""What a study will take, before it is run: pieces, model loads, seconds from a probe, disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rq4lens.cluster.pieces import pieces_of
from rq4lens.config import Place, RunConfig
from rq4lens.heads import HeadSet
from rq4lens.jobs.progress import Stage, silent
from rq4lens.models.catalog import pair_from
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import FIT_SPLIT, TokenizedPrompts
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.patch import RAW, Patch, Sources
from rq4lens.studies.cost_model import KINDS, Machine, Measured, Shape, Work, map_bytes, store_bytes
from rq4lens.studies.file import Cell, StudyPlan

PROBE_PROMPTS = 64
"""Prompts of the largest probe point, where there are as many."""


@dataclass(frozen=True)
class Probe:
    """What a short measurement said about a model on this machine; ``seconds`` is what it took."""

    shape: Shape
    machine: Machine
    load_seconds: float
    n_tokens: int
    seconds: float


class CellCost(NamedTuple):
    """What one cell will take, from loading both models to the numbers."""

    pieces: int
    seconds: float
    disk_bytes: int


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
    shape = Shape.of(model.cfg)
    machine = Machine.calibrated(shape, list(_points(model, prompts, shape, config)))
    n_tokens = int(prompts.lengths.float().mean())
    return Probe(shape, machine, load_seconds, n_tokens, time.perf_counter() - started)


def _points(
    model: Any, prompts: TokenizedPrompts, shape: Shape, config: RunConfig
) -> Iterator[Measured]:
    """Few and many prompts, one and all heads, the top and the middle layer."""
    top, middle = shape.n_layers - 1, shape.n_layers // 2
    many = min(PROBE_PROMPTS, len(prompts))
    few = max(1, many // 8)
    place = Place(batch_size=config.place.batch_size)
    _point(model, prompts.some(range(few)), top, 1, place)  # the first time also loads kernels
    for n_prompts in (few, many):
        for layer, n_heads in ((top, shape.n_heads), (middle, 1), (middle, shape.n_heads)):
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
    work = Work.grid(len(prompts), n_tokens, n_heads, [layer])
    return Measured(work, passed - started, finished - passed)


def estimate(cell: Cell, pair: ModelPair, probed: Probe) -> CellCost:
    """What a cell will take, from the probe of a model of the same shape."""
    config, shape = cell.request.config, probed.shape
    plans = cell.request.plans(pair)
    layers = [plan.layer for plan in plans]
    n_prompts = len(pair.prompts.split(config.patching.split))
    n_train = len(pair.prompts.split(FIT_SPLIT))
    pieces = pieces_of(plans)
    # The best head is measured among the single ones; larger top-k sets are measured besides.
    n_top = 2 * KINDS * sum(k > 1 for k in plans[0].ks)
    n_patches = sum(len(piece.patches) for piece in pieces) + n_top * len(layers)
    work = Work.grid(n_prompts, probed.n_tokens, n_patches // len(layers), layers)
    seconds = probed.machine.seconds(shape, work, n_train) + 2 * probed.load_seconds
    n_sites = (n_prompts + n_train) * len(layers) * config.patching.k_positions
    disk_bytes = (
        store_bytes(n_patches, n_prompts)
        + map_bytes(shape, len(layers), config.patching.map_scope)
        + n_sites * shape.width * shape.bytes_per_number
    )
    return CellCost(len(pieces), seconds, disk_bytes)
