"""Choosing the engine: the fastest one that is shown to be exact for the model at hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rq4lens.config import Patching, Place
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.models.load.lens import HookedModel, backend_of
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.engines.cached import CachedEngine
from rq4lens.patching.engines.clean_pass import CleanBatch, shortest_and_longest
from rq4lens.patching.engines.hooks import HookEngine, patched_heads
from rq4lens.patching.engines.row_engine import RowEngine
from rq4lens.patching.engines.suffix import SuffixEngine
from rq4lens.patching.engines.windows import by_window
from rq4lens.patching.passes import device_of, forward_batch
from rq4lens.patching.patch import Engine, Intervention, Patch, Sources

logger = logging.getLogger("rq4lens")

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Difference of the logits to those of native hooks that is put down to rounding.

It is the length of the difference relative to the length of the (centred) logits. In half precision
two orders of the same sums drift apart by several percent over the depth of a large model; an
engine that leaves something out is off by much more.
"""

FASTEST_FIRST: dict[str, type[RowEngine]] = {"suffix": SuffixEngine, "cached": CachedEngine}


def make_engine(
    model: HookedModel,
    prompts: TokenizedPrompts,
    settings: Patching | None = None,
    place: Place | None = None,
    *,
    first_layer: int = 0,
    max_bytes: int | None = None,
) -> Engine:
    """The engine that was asked for, or the fastest that is exact for this model.

    An engine is used only if it covers the model's architecture and agrees with the native hooks on
    two of the prompts; otherwise the next one is tried: suffix, cached, hooks. Which one it became
    and why is logged once and stands in ``name`` and ``fallback_reason``.
    """
    settings, place = settings or Patching(), place or Place()

    def make(some: TokenizedPrompts) -> Engine:
        return _fastest(model, some, settings, place, first_layer=first_layer, max_bytes=max_bytes)

    placed = prompts.placed(settings.k_positions)
    engine = make(placed) if place.engine == "hooks" else by_window(placed, make)
    if engine.fallback_reason:
        # On a bridge the cached engine is the one that is meant.
        as_meant = engine.name == "cached" and backend_of(model) == "bridge"
        level = logging.INFO if as_meant else logging.WARNING
        logger.log(level, "%s; using engine %s", engine.fallback_reason, engine.name)
    return engine


def _fastest(
    model: HookedModel,
    prompts: TokenizedPrompts,
    settings: Patching,
    place: Place,
    **memory: Any,
) -> Engine:
    order = [*FASTEST_FIRST, "hooks"]
    reasons: list[str] = []
    engine: Engine = HookEngine(model, prompts, settings, place)
    for name in order[order.index(place.engine) : -1]:
        kind = FASTEST_FIRST[name]
        make = partial(kind, model, prompts, settings, place, **memory)
        found = kind.not_covered(model) or _checked(make)
        if isinstance(found, RowEngine):
            engine = found
            break
        reasons.append(f"engine {name} is not used because {found}")
    engine.fallback_reason = "; ".join(reasons) or None
    return engine


def _checked(make: Callable[[], RowEngine]) -> RowEngine | str:
    """The engine, or why it is not to be used."""
    try:
        engine = make()
        difference = difference_to_hooks(engine)
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as problem:
        # Whatever goes wrong in an unforeseen architecture, the native hooks still measure it.
        return f"it fails on this model ({type(problem).__name__}: {problem})"
    tolerance = TOLERANCE.get(engine.model.cfg.dtype, 0.0)
    if backend_of(engine.model) == "bridge":
        # Hugging Face's norms and rotary angles are in float32 whatever the type of the weights.
        tolerance = max(tolerance, TOLERANCE[torch.float32])
    if difference <= tolerance:
        return engine
    return (
        f"its logits differ from those of native hooks by {difference:.2g} of their size "
        f"(allowed: {tolerance:g})"
    )


@torch.no_grad()
def difference_to_hooks(engine: RowEngine) -> float:
    """How far an engine is from the native hook path, on two of its own prompts.

    They are the shortest and the longest of a batch, so that padding and windows matter, and every
    head of the lowest layer is half replaced by noise, so that all that follows is far from the
    clean run.
    """
    layer, model = engine.first_layer, engine.model
    clean = engine.clean_batches(layer)[-1]
    ends = shortest_and_longest(len(clean.rows))
    z = engine.window.gather(clean.layers[layer].z[ends], clean.rows[ends])
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    # Nothing is fetched from the device before the end: the clean pass is still under way there.
    size = z.float().std(unbiased=False).to(z.dtype)
    noise = noise.to(z.device, z.dtype, non_blocking=True) * size
    sources = Sources({(layer, "noise"): noise})
    intervention = (Patch(layer, HeadSet.all(model.cfg.n_heads), 0.5, "noise"),)
    fast = engine.logits_of(clean, ends, [intervention], sources)[:, 0].double()
    native = _native_logits(engine, clean, intervention, sources).double()
    scale = (native - native.mean(-1, keepdim=True)).norm(dim=-1)
    relative = float(((fast - native).norm(dim=-1) / scale).max())
    return relative if relative == relative else float("inf")  # noqa: PLR0124 - NaN


def _native_logits(
    engine: RowEngine, clean: CleanBatch, intervention: Intervention, sources: Sources
) -> Float[Tensor, "token vocab"]:
    """Logits at the compared tokens of a batch's two ends by a pass through native hooks."""
    some = engine.prompts.some(clean.rows[shortest_and_longest(len(clean.rows))].tolist())
    batch = next(some.batches(len(some)))
    with patched_heads(engine.model, intervention, sources, batch):
        if clean.entering is None:
            logits = forward_batch(engine.model, batch)
        else:
            resid = clean.entering.to(device_of(engine.model))
            logits = engine.model(resid, start_at_layer=engine.first_layer, padding_side="right")
    return logits[torch.arange(len(logits))[:, None], batch.compared.at].flatten(0, 1)
