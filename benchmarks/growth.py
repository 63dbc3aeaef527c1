"""How the engine's cost grows with heads, layers, prompts and prompt length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from benchmark_cases import KINDS, Case, single_heads

from rq4lens.config import Place
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.patch import Sources

Timer = Callable[[Callable[[], object]], float]


def growth(case: Case, seconds: Timer) -> list[dict[str, Any]]:
    """Seconds of the clean pass and of the rows along four axes, the others held fixed."""
    cfg, n_prompts = case.tuned.cfg, len(case.prompts)
    longest = int(case.prompts.lengths.max())
    top = cfg.n_layers
    points: list[dict[str, Any]] = []

    def point(axis: str, value: int, some: Case, layers: range, n_heads: int) -> None:
        chosen = [c for c in single_heads(layers, cfg.n_heads) if c[0].heads.indices[0] < n_heads]
        made: dict[str, Any] = {}

        def clean_pass() -> None:
            made["engine"] = make_engine(
                some.tuned,
                some.prompts,
                place=Place(batch_size=some.batch_size),
                first_layer=layers.start,
            )

        sources = _noise(some, layers)
        pass_seconds = seconds(clean_pass)
        rows_seconds = seconds(lambda: made["engine"].effects(chosen, sources))
        points.append(
            {
                "axis": axis,
                "value": value,
                "clean_pass_seconds": pass_seconds,
                "rows_seconds": rows_seconds,
                "n_rows": len(chosen) * len(some.prompts),
            }
        )

    one = range(case.layer, case.layer + 1)
    for n_heads in _doubling(cfg.n_heads):
        point("heads of one layer", n_heads, case, one, n_heads)
    for n_layers in _doubling(top):
        point("layers, from the top", n_layers, case, range(top - n_layers, top), cfg.n_heads)
    for n in _doubling(n_prompts):
        point("prompts", n, case.shortened(n), one, cfg.n_heads)
    for n_tokens in _doubling(longest, start=max(2, longest // 8)):
        point("tokens of a prompt", n_tokens, case.shortened(n_prompts, n_tokens), one, cfg.n_heads)
    return points


def _doubling(stop: int, start: int = 1) -> list[int]:
    values = []
    while start < stop:
        values.append(start)
        start *= 2
    return [*values, stop]


def _noise(case: Case, layers: range) -> Sources:
    cfg = case.tuned.cfg
    shape = (len(case.prompts), 1, cfg.n_heads, cfg.d_head)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(cfg.dtype)
    return Sources({(layer, kind): noise for layer in layers for kind in KINDS})
