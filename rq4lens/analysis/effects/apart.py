"""What a pair is: how far apart its models answer, whether they read alike, what was retrained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rq4lens.analysis.statistics.bootstrap import Estimate, number_text
from rq4lens.results import UNRELATED_COSINE, Record

MOST_CHANGED = 3
"""Matrices that a line names."""


@dataclass(frozen=True)
class PairFacts(Record):
    """What a pair is, before any head is asked; ``weights`` are from ``WeightChange.to_dict``.

    Answers are those of the measured prompts; tokens and what is cut on the left are of all.
    """

    BECAUSE: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("relative_weight_change", "weight_cosine"),
        "the models were not in memory together: `rq4lens audit --compare weights` reads them",
    )

    ALSO_SAVED: ClassVar[tuple[str, ...]] = ("warning",)

    gap_base_nats: Estimate
    gap_tuned_nats: Estimate
    answers_differ_pct: Estimate
    n_prompts: int
    n_same_tokens: int
    same_tokenizer: bool
    relative_weight_change: float | None
    weight_cosine: float | None
    weights: tuple[Mapping[str, Any], ...]
    n_cut: int = 0

    @property
    def warning(self) -> str | None:
        """Where the models look like no pair."""
        if self.weight_cosine is None or self.weight_cosine >= UNRELATED_COSINE:
            return None
        return (
            f"WARNING: the two models look unrelated: the cosine of their weights is "
            f"{self.weight_cosine:.2g}, and that of a base and its fine-tune is close to 1."
        )

    @property
    def lines(self) -> Iterator[str]:
        """The facts in plain words, a line each."""
        yield self._gap
        tokenizer = "the same tokenizer" if self.same_tokenizer else "different tokenizers"
        cut = f"; {self.n_cut} are cut on the left" if self.n_cut else ""
        yield (
            f"tokens: {tokenizer}; {self.n_same_tokens} of {self.n_prompts} prompts are the same "
            f"token ids for both models{cut}"
        )
        yield f"weights: {self._weights}"
        if self.warning is not None:
            yield self.warning

    @property
    def _gap(self) -> str:
        if self.gap_base_nats.value is None:
            return f"gap: not measured ({self.gap_base_nats.reason})"
        return (
            f"gap: KL(base || tuned) {self.gap_base_nats:.3g} nats, KL(tuned || base) "
            f"{self.gap_tuned_nats:.3g} nats; the most likely next token differs on "
            f"{self.answers_differ_pct:.0f%} of the measured prompts"
        )

    @property
    def _weights(self) -> str:
        if self.relative_weight_change is None:
            return f"not compared ({self.reasons['relative_weight_change']})"
        changed = [each for each in self.weights if each["relative_change"]]
        if not changed:
            return "all matrices are equal"
        changed.sort(key=lambda each: -each["relative_change"])
        return (
            f"changed by {percent(self.relative_weight_change)} in all (cosine "
            f"{number_text(self.weight_cosine, '.4f')}); most: "
            f"{', '.join(map(_change_text, changed[:MOST_CHANGED]))}"
        )


def percent(share: float | None) -> str:
    """A share as percent with two digits, or as a whole number."""
    form = ".0f%" if share is not None and share >= 0.1 else ".2g%"
    return number_text(None if share is None else 100 * share, form, "–")


def _change_text(each: Mapping[str, Any]) -> str:
    where = "" if each["layer"] is None else f"layer {each['layer']} "
    return f"{where}{each['matrix']} {percent(each['relative_change'])}"


def weights_table(weights: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Relative change and cosine, a row a layer: the matrices, and the rows with their layers."""
    inside = [each for each in weights if each["layer"] is not None]
    rows: dict[int, dict[str, str]] = {}
    for each in inside:
        rows.setdefault(each["layer"], {})[each["matrix"]] = change_and_cosine(each)
    matrices = list(dict.fromkeys(each["matrix"] for each in inside))
    return matrices, [
        [str(layer), *(row.get(matrix, "–") for matrix in matrices)]
        for layer, row in sorted(rows.items())
    ]


def outside_layers(weights: Sequence[Mapping[str, Any]]) -> str:
    """The matrices that belong to no layer, in one line."""
    named = [each for each in weights if each["layer"] is None]
    return "; ".join(f"{each['matrix']} {change_and_cosine(each)}" for each in named)


def change_and_cosine(each: Mapping[str, Any]) -> str:
    """How much of a matrix changed, and the cosine of before and after."""
    return f"{percent(each['relative_change'])} ({number_text(each['cosine'], '.3f', '–')})"
