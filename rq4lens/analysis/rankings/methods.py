"""The registry of ranking methods, and what they can be told; it loads no method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rq4lens.errors import UserError

TARGETS = ("answer_logprob", "logit_difference")
"""The scalars that a gradient can follow."""

Orders = Sequence[Sequence[Sequence[int]]]
"""Pairs of orders of the heads; pairs are independent of each other."""

RankingMethod = Callable[..., Any]
"""From :class:`MeasuredSets`, to which it adds what it lacks, to a :class:`HeadRanking`."""


@dataclass(frozen=True)
class RankingSettings:
    """What ranking methods can be told; each reads the settings that it has a use for.

    ``target`` is the scalar that a gradient follows, ``orders`` are permutations to use in place of
    drawn ones, whose head sets may have been measured already.
    """

    target: str = "answer_logprob"
    ig_steps: int = 8
    seed: int = 0
    orders: Orders | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UserError(
                f"target {self.target!r} does not exist: choose {' or '.join(TARGETS)}."
            )
        if self.ig_steps < 1:
            raise UserError(
                f"ig_steps {self.ig_steps} is too few: take at least 1 point on the path."
            )


DEFAULTS = RankingSettings()


@dataclass(frozen=True)
class Method:
    """One ranking method: its module in this folder and its name there.

    It is imported when heads are ranked, so that the command line can list methods without loading
    a model library. It ``reads`` these fields of :class:`RankingSettings`; one that reads none
    takes, behind the measured sets, what is ``given`` here.
    """

    function: str
    reads: tuple[str, ...] = ()
    given: tuple[str, ...] = ()

    @property
    def rank(self) -> RankingMethod:
        """The method as a function of :class:`MeasuredSets` and :class:`RankingSettings`."""
        module, _, name = self.function.partition(".")
        function: RankingMethod = getattr(import_module(f"{__package__}.{module}"), name)
        if self.reads:
            return function
        return lambda measured, _settings: function(measured, *self.given)


METHODS: Mapping[str, Method] = {
    **{
        score: Method("exact.single_ranking", given=(score,))
        for score in ("delta", "drop_pct", "kl_raw", "to_base", "to_tuned")
    },
    "leave_one_out": Method("exact.rank_by_leave_one_out"),
    "greedy_forward": Method("exact.rank_greedy_forward"),
    "greedy_backward": Method("exact.rank_greedy_backward"),
    "shapley": Method("exact.rank_by_shapley", ("seed", "orders")),
    "grad_act": Method("gradients.rank_by_grad_act", ("target",)),
    "attribution": Method("gradients.rank_by_attribution", ("target",)),
    "integrated_gradients": Method(
        "gradients.rank_by_integrated_gradients", ("target", "ig_steps")
    ),
    "kl_curvature": Method("gradients.rank_by_kl_curvature"),
}
"""The ranking methods by name; the first ones are exact, the last four approximate."""


def method_of(name: str) -> Method:
    """A ranking method by its name; a sentence if it does not exist."""
    if name not in METHODS:
        raise UserError(
            f"ranking method {name!r} does not exist: choose one of {', '.join(METHODS)}."
        )
    return METHODS[name]


def methods_of(text: str) -> tuple[str, ...]:
    """Names of ranking methods as a user writes them, with commas between, or ``ALL``."""
    everything = text.strip().upper() == "ALL"
    return tuple(METHODS if everything else (name.strip() for name in text.split(",")))


def refuse_unread(given: Iterable[tuple[str, object]], methods: Sequence[str]) -> None:
    """Refuse settings, by name and value, that none of the chosen methods reads."""
    for setting, value in given:
        readers = [name for name, method in METHODS.items() if setting in method.reads]
        if not set(readers) & set(methods):
            raise UserError(
                f"{setting} {value!r} has no method to go to: add "
                f"{'the method ' if len(readers) == 1 else 'one of '}{', '.join(readers)}."
            )
