"""The last tokens of prompts: those from the first patched or compared one on are run anew.

A patch changes nothing before its first token, so keys and values of the tokens before it serve
every condition. Prompts that need more or fewer of these tokens are measured apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.patch import (
    Effects,
    Engine,
    Intervention,
    OtherModel,
    Progress,
    Sources,
    n_measures,
)


@dataclass(frozen=True)
class Window:
    """The tokens at the end of each prompt that a row consists of; equally many of each prompt.

    Args:
        n_positions: how many they are.
        n_answer: at how many of them, the last ones, distributions are compared.
        at: places of the patched tokens in the window.
        there: which of these a prompt has.
    """

    n_positions: int
    n_answer: int
    at: Int[Tensor, "prompt spot"]
    there: Bool[Tensor, "prompt spot"]

    @classmethod
    def of(cls, prompts: TokenizedPrompts) -> Window:
        """The window of prompts that all need the same."""
        (size,) = set(prompts.windows)
        n_positions, n_answer = size
        spots = torch.tensor(prompts.spots)
        first = prompts.lengths[:, None] - n_positions
        return cls(n_positions, n_answer, (spots - first).clamp(min=0), spots >= 0)

    @property
    def is_patched_whole(self) -> bool:
        """Whether every token of the window is patched, in order."""
        return self.at.shape[1] == self.n_positions and bool(self.there.all())

    @property
    def patched(self) -> Bool[Tensor, "prompt position"] | None:
        """Which tokens of the window are patched; None where all are."""
        if self.is_patched_whole:
            return None
        patched = torch.zeros(len(self.at), self.n_positions, dtype=torch.bool)
        prompt, spot = self.there.nonzero(as_tuple=True)
        patched[prompt, self.at[prompt, spot]] = True
        return patched

    def spread(
        self, source: Float[Tensor, "prompt every_spot *site"], rows: Int[Tensor, "prompt"]
    ) -> Float[Tensor, "prompt position *site"]:
        """What some prompts have at their patched tokens, where these stand in the window."""
        if self.is_patched_whole:
            return source
        at, there = self.at[rows], self.there[rows]
        prompt, spot = there.nonzero(as_tuple=True)
        spread = source.new_zeros(len(source), self.n_positions, *source.shape[2:])
        spread[prompt, at[prompt, spot]] = source[prompt, spot]
        return spread

    def gather(
        self, window: Float[Tensor, "prompt position *site"], rows: Int[Tensor, "prompt"]
    ) -> Float[Tensor, "prompt spot *site"]:
        """What some prompts have at their patched tokens; the reverse of :meth:`spread`."""
        if self.is_patched_whole:
            return window
        at, there = (each[rows].to(window.device) for each in (self.at, self.there))
        found = window[torch.arange(len(window), device=window.device)[:, None], at]
        return found.masked_fill(~there.reshape(*there.shape, *(1,) * (found.ndim - 2)), 0)


def by_window(prompts: TokenizedPrompts, make: Callable[[TokenizedPrompts], Engine]) -> Engine:
    """One engine for prompts that need the same window, else an engine for each window."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row, size in enumerate(prompts.windows):
        rows.setdefault(size, []).append(row)
    if len(rows) == 1:
        return make(prompts)
    return EngineOfWindows(
        prompts, {tuple(each): make(prompts.some(each)) for each in rows.values()}
    )


class EngineOfWindows:
    """Measures prompts of several windows, each by the engine of its own.

    Args:
        prompts: all prompts.
        engines: the engines by the places of their prompts.
    """

    def __init__(
        self, prompts: TokenizedPrompts, engines: Mapping[tuple[int, ...], Engine]
    ) -> None:
        self.prompts = prompts
        self.engines = engines
        self.name = " and ".join(dict.fromkeys(each.name for each in engines.values()))
        reasons = dict.fromkeys(each.fallback_reason for each in engines.values())
        self.fallback_reason: str | None = "; ".join(filter(None, reasons)) or None

    @property
    def memory_report(self) -> dict[str, Any]:
        """What memory was asked for and used, for the record of a run."""
        return {"windows": [engine.memory_report for engine in self.engines.values()]}

    def clean_z(self, layer: int) -> Float[Tensor, "prompt position head d_head"]:
        """Clean activations at the patched tokens of a layer."""
        return self._joined(lambda engine: engine.clean_z(layer))

    def clean_log_probs(self) -> Float[Tensor, "prompt answer vocab"]:
        """The clean model's next-token distribution at each compared token; else 0."""
        return self._joined(lambda engine: engine.clean_log_probs(), self.prompts.longest_answer)

    def every_layer(
        self, source: str, sources: Sources, other: OtherModel | None = None
    ) -> Effects:
        """Effect of a source in place of every head of every layer."""
        return self._measured(
            1,
            other,
            lambda engine, rows, to: engine.every_layer(source, sources.of_prompts(rows), to),
        )

    def effects(
        self,
        interventions: Sequence[Intervention],
        sources: Sources,
        progress: Progress | None = None,
        other: OtherModel | None = None,
    ) -> Effects:
        """Effect of each intervention on each prompt, and how far it takes the model to another."""
        return self._measured(
            len(interventions),
            other,
            lambda engine, rows, to: engine.effects(
                interventions, sources.of_prompts(rows), progress, to
            ),
        )

    def _joined(self, read: Callable[[Engine], Tensor], width: int | None = None) -> Tensor:
        """What the engines read, by prompt; of shorter answers the last places."""
        found = {rows: read(engine) for rows, engine in self.engines.items()}
        first = next(iter(found.values()))
        shape = (len(self.prompts), width or first.shape[1], *first.shape[2:])
        joined = first.new_zeros(shape)
        for rows, each in found.items():
            joined[list(rows), -each.shape[1] :] = each
        return joined

    def _measured(
        self,
        n_conditions: int,
        other: OtherModel | None,
        measure: Callable[[Engine, list[int], OtherModel | None], Effects],
    ) -> Effects:
        n_answer = self.prompts.longest_answer
        n_rows = n_measures(n_answer, other)
        found = np.full((n_rows, n_conditions, len(self.prompts)), np.nan)
        n_whole = n_measures(1, other)
        for rows, engine in self.engines.items():
            effects = measure(engine, list(rows), other and other.of_prompts(list(rows)))
            values = effects.rows
            found[:n_whole, :, list(rows)] = values[:n_whole]
            if n_answer > 1:
                by_token = values[n_whole:] if len(values) > n_whole else values[:1]
                found[n_rows - len(by_token) :, :, list(rows)] = by_token
        return Effects.of(found, n_answer)
