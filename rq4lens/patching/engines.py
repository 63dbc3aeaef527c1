"""Choosing an engine."""

from __future__ import annotations

from typing import Any, Literal

from transformer_lens import HookedTransformer

from rq4lens.models.prompts import TokenizedPrompts
from rq4lens.patching.hooks import HookEngine
from rq4lens.patching.patch import Engine

EngineChoice = Literal["suffix", "hooks"]


def make_engine(
    model: HookedTransformer,
    prompts: TokenizedPrompts,
    *,
    prefer: EngineChoice = "suffix",
    **settings: Any,
) -> Engine:
    """The engine that was asked for, or the fastest that is exact for this model."""
    return HookEngine(model, prompts, **settings)
