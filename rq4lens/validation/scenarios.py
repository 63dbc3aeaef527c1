"""What is planted in the pairs of a validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rq4lens.models.builtin.plant import ChangeKind, WeightName
from rq4lens.validation.choosing import Among


@dataclass(frozen=True)
class Scenario:
    """What is done to the heads of one layer.

    Args:
        name: its name.
        planted: how many value heads are changed in which way; each is one head, or the group that
            shares it.
        sought: the kind of change that a ranking should put first.
        weights: which weights of a rewired head get new content.
        among: ``"all"`` draws layer and heads from all, ``"mattering"`` from those that matter to
            the base model: see :mod:`rq4lens.validation.choosing`.
    """

    name: str
    planted: Mapping[ChangeKind, int]
    sought: ChangeKind
    weights: tuple[WeightName, ...] = ("W_Q", "W_K")
    among: Among = "all"


SCENARIOS = (
    Scenario("rotated", {"rotated": 3}, "rotated"),
    Scenario("scaled", {"scaled": 3}, "scaled"),
    Scenario("shifted", {"shifted": 3}, "shifted"),
    # A head that does nothing cannot be told to be rewired, whatever is planted in it.
    Scenario("rewired attention", {"rewired": 3}, "rewired", ("W_Q", "W_K"), "mattering"),
    Scenario("rewired values", {"rewired": 3}, "rewired", ("W_V", "W_O"), "mattering"),
    Scenario("rotated beside rewired", {"rotated": 3, "rewired": 2}, "rotated"),
)
