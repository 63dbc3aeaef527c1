"""The metrics by which layers and pairs of a study are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rq4lens.analysis.other_rankings import answer_repair_nats
from rq4lens.analysis.statistics import Bootstrap
from rq4lens.heads import Head
from rq4lens.results import ConditionResult, GridResult, RankBy


@dataclass(frozen=True)
class Metric:
    """One number of a head set, on the mean over prompts.

    Args:
        name: its name in files.
        label: its symbol.
        unit: ``"nats"`` or ``"%"``.
        meaning: what it says, in a few words.
        of: its value under a condition; None where it is undefined.
        ranks: the setting ``rank_by`` that orders single heads by it, if there is one.
    """

    name: str
    label: str
    unit: str
    meaning: str
    of: Callable[[ConditionResult], float | None]
    ranks: RankBy | None = None

    @property
    def title(self) -> str:
        """Symbol and unit, for an axis."""
        return f"{self.label} of all heads ({self.unit})"

    def text(self, value: float) -> str:
        """A value as it is printed."""
        return f"{value:.1f}%" if self.unit == "%" else f"{value:.6f}"

    def of_layer(
        self, row: Mapping[str, Any], grid: GridResult, bootstrap: Bootstrap
    ) -> dict[str, Any]:
        """The value under a patch of all heads, its interval, and why one of them is undefined.

        Args:
            row: the layer's row of a saved comparison.
            grid: the layer's grid.
            bootstrap: the resamples of what the comparison does not hold.
        """
        if self.name in row:
            names = (self.name, f"{self.name}_ci95", f"{self.name}_reason")
            return {name: row[name] for name in names if name in row}
        (estimate,) = bootstrap.estimate(answer_repair_nats(grid.full)[None])
        return estimate.fields(self.name)

    def best_head(self, grids: Mapping[int, GridResult]) -> Head | None:
        """The single head of all layers with the largest value; ties go to the lower one."""
        found = [
            (value, Head(layer, head))
            for layer, grid in sorted(grids.items())
            for head, single in enumerate(grid.singles)
            if (value := self.of(single)) is not None
        ]
        return max(found, key=lambda each: each[0])[1] if found else None


METRICS: Mapping[str, Metric] = {
    each.name: each
    for each in (
        Metric("delta", "ΔKL", "nats", "raw minus mapped", lambda c: c.delta, "delta"),
        Metric("KL_raw", "KL_raw", "nats", "damage of the raw patch", lambda c: c.KL_raw),
        Metric("KL_mapped", "KL_mapped", "nats", "damage of the mapped one", lambda c: c.KL_mapped),
        Metric("drop_pct", "drop", "%", "100 ΔKL / KL_raw", lambda c: c.drop_pct, "drop_pct"),
        Metric(
            "answer_logprob",
            "answer",
            "nats",
            "log-probability of the tuned model's own answer that the map wins back",
            lambda c: float(answer_repair_nats(c).mean()),
        ),
    )
}
"""The metrics by name."""

COMPARED = ("delta", "KL_raw", "KL_mapped", "drop_pct")
"""What a study compares unless it says otherwise."""


def rank_by_of(names: Sequence[str]) -> RankBy | None:
    """The setting that orders single heads by the first of some metrics that can order them."""
    return next((ranks for name in names if (ranks := METRICS[name].ranks) is not None), None)
