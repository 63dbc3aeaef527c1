"""The position map: what each head of a layer carries at one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.effects.table import records
from rq4lens.analysis.records import ConditionRecord
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.errors import UserError
from rq4lens.results import GridResult, GridSettings, Shown, gaps_of

SUBJECT = "subject"
ALL_HEADS = "all heads"

Quantity = Literal["to_base", "to_tuned", "delta"]

OF_A_CELL = {"to_base": "to_base_pct", "to_tuned": "to_tuned_pct", "delta": "delta"}
"""What a cell of the map holds, and the fields of its record."""


@dataclass(frozen=True)
class MappedPosition:
    """One token of each prompt, or its subject, patched alone.

    Args:
        role: ``"-3"`` counted from the decision token, which is ``"-1"``, or ``"subject"``.
        texts: the text of the patched token of each prompt, as the tuned model reads it.
        n_train: train prompts that have this token; the maps are fitted on them.
        grid: what was measured there, on every prompt.
        records: the same with intervals, a record a condition.
    """

    role: str
    texts: tuple[str, ...]
    n_train: int
    grid: GridResult
    records: tuple[ConditionRecord, ...]

    @classmethod
    def of(cls, role: str, texts: Sequence[str], n_train: int, grid: GridResult) -> MappedPosition:
        """A position with its intervals."""
        return cls(role, tuple(texts), n_train, grid, records(grid))

    @cached_property
    def layer_and_heads(self) -> tuple[ConditionRecord, ...]:
        """The whole layer, then each head."""
        by_name = {each.cond: each for each in self.records}
        singles = (by_name[f"head{head}"] for head in range(self.grid.n_heads))
        return by_name["full"], *singles

    @property
    def usual_text(self) -> tuple[str, float]:
        """The token that most prompts have here, and the share of prompts that do."""
        text = max(dict.fromkeys(self.texts), key=self.texts.count)
        return text, self.texts.count(text) / len(self.texts)

    def per_prompt(self, quantity: Quantity) -> Float64[ndarray, "condition prompt"]:
        """The whole layer, then each head, on each prompt.

        Shares are those of the prompt's own gap in percent, NaN where it is within the noise floor;
        ``ΔKL`` is in nats.
        """
        conditions = (self.grid.full, *self.grid.singles)
        if quantity == "delta":
            return np.stack([each.delta_nats for each in conditions])
        gap, left = gaps_of(self.grid["none"], conditions, quantity)
        noise = self.grid.compared.noise_nats + self.grid.noise_floor_nats
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(gap > noise, 100 * (1 - left / gap), np.nan)


@dataclass(frozen=True)
class PositionMap(Shown):
    """Heads of a layer by token: each is patched there alone.

    >>> found = rq.position_map(run, 2, run.prompt_ids[:4], pair=pair)
    >>> found.roles
    ('-2', '-1')

    Args:
        positions: the subject, if there is one, then the last tokens up to the decision token.
    """

    positions: tuple[MappedPosition, ...]

    def __repr__(self) -> str:
        roles = ", ".join(self.roles)
        return f"<PositionMap of {self.settings.pair}, layer {self.settings.layer}, at {roles}>"

    def __getitem__(self, role: str | int) -> MappedPosition:
        """One of the positions, as ``"subject"`` or ``-2``."""
        found = {each.role: each for each in self.positions}
        if str(role) not in found:
            raise UserError(f"position {role!r} was not mapped: choose {', '.join(self.roles)}.")
        return found[str(role)]

    @property
    def roles(self) -> tuple[str, ...]:
        """What each position is, in order."""
        return tuple(each.role for each in self.positions)

    @property
    def grid(self) -> GridResult:
        """What was measured at the last position; all share prompts, layer and strength."""
        return self.positions[-1].grid

    @property
    def settings(self) -> GridSettings:
        """How the last position was measured."""
        return self.grid.settings

    @property
    def labels(self) -> tuple[str, ...]:
        """The whole layer and each head, as rows of the map are called."""
        return ALL_HEADS, *(self.grid.label(head) for head in range(self.grid.n_heads))

    def per_prompt(self, quantity: Quantity) -> Float64[ndarray, "position condition prompt"]:
        """A quantity of the whole layer and of each head, at each position on each prompt."""
        return np.stack([each.per_prompt(quantity) for each in self.positions])

    def row_of(self, prompt: str) -> int:
        """The place of a prompt among those that were measured."""
        if prompt not in self.grid.prompt_ids:
            some = ", ".join(self.grid.prompt_ids[:3])
            raise UserError(f"prompt {prompt!r} was not measured: choose one such as {some}.")
        return self.grid.prompt_ids.index(prompt)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for the whole layer and for each head, at each position."""
        return pd.DataFrame(
            {
                "position": position.role,
                "heads": label,
                **to_json({n: getattr(record, n) for n in OF_A_CELL.values()}),
            }
            for position in self.positions
            for label, record in zip(self.labels, position.layer_and_heads, strict=True)
        )
