"""Prompts in parts that a single process carries through the clean model together."""

from __future__ import annotations

import torch
from transformer_lens import HookedTransformer

from rq4lens.config import EngineName
from rq4lens.models.load.devices import Placement
from rq4lens.models.load.loading import HookedModel
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.engines.memory import MemoryPlan, even_parts


def prompt_parts(
    model: HookedModel, prompts: TokenizedPrompts, engine: EngineName, batch_size: int
) -> list[tuple[int, ...]]:
    """The batches of the clean pass. Nothing passes between them, but rounding depends on them.

    An engine that is given one part alone therefore repeats the very products of an engine that is
    given all prompts.
    """
    order = torch.argsort(prompts.lengths, stable=True)
    if engine == "hooks" or not isinstance(model, HookedTransformer):
        return [tuple(rows.tolist()) for rows in order.split(batch_size)]
    memory = MemoryPlan.of(model.cfg, prompts, Placement.of(model), batch_size=batch_size)
    parts = even_parts(slice(0, len(prompts)), memory.passes.max_rows)
    return [tuple(order[part].tolist()) for part in parts]
