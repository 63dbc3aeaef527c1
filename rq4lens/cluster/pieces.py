"""Units of work: a run or a sweep cut into pieces that any process can measure in any order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any, Literal, TypeVar

from rq4lens.cluster.many import Division
from rq4lens.config import RunConfig
from rq4lens.disk.store import content_key
from rq4lens.errors import UserError
from rq4lens.jobs.bench import plan_for
from rq4lens.models.pair import ModelPair
from rq4lens.patching.activations import check_layers
from rq4lens.patching.grid import GridPlan
from rq4lens.patching.measured import patches_of, recorded_together
from rq4lens.patching.patch import Patch, into_side
from rq4lens.results import EVERY, EVERY_LAYER

Command = Literal["run", "sweep"]
T = TypeVar("T")

_SHARE = re.compile(r"(\d{1,6})\s*/\s*(\d{1,6})", re.ASCII)


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Args:
        command: ``"run"`` for the main job of one layer, ``"sweep"`` for the grid of several.
        config: the pair and how to patch.
        layers: the layers of a sweep; None are all of them.
    """

    command: Command
    config: RunConfig
    layers: tuple[int, ...] | None = None

    def plans(self, pair: ModelPair) -> list[GridPlan]:
        """The grids that are measured, checked against the pair.

        Raises:
            UserError: if a layer or k does not fit the models, or a run names no layer.
        """
        if self.command == "run":
            return [plan_for(self.config, pair.n_layers, pair.n_heads)]
        layers = tuple(range(pair.n_layers)) if self.layers is None else self.layers
        check_layers(layers, pair.n_layers)
        return [
            GridPlan(pair.n_heads, self.config.patching.but(layer=layer, control_layer=None))
            for layer in inward(sorted(set(layers)))
        ]


@dataclass(frozen=True)
class Piece:
    """Patches that are measured together; a piece may be measured any number of times.

    Args:
        patches: the patches, all into one model.
        job: key of the job that the piece belongs to, empty while none is known.
        prompts: ids of the prompts that they are measured on; all measured prompts when empty.
    """

    patches: tuple[Patch, ...]
    job: str = ""
    prompts: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its layer, patches and prompts, short enough for a file name."""
        layer = self.patches[0].layer
        where = EVERY if layer == EVERY_LAYER else f"L{layer}"
        of = f"_of_{len(self.prompts)}_prompts" if self.prompts else ""
        return f"{where}_{len(self.patches)}_patches_{into_side(self.patches[0])}{of}"

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides what is measured, by name."""
        whole = {
            "job": self.job,
            "patches": [
                [each.layer, list(each.heads), float(each.alpha), each.source]
                for each in self.patches
            ],
        }
        return {**whole, "prompts": list(self.prompts)} if self.prompts else whole

    @property
    def whole(self) -> Piece:
        """The same patches on all measured prompts."""
        return replace(self, prompts=())

    @property
    def key(self) -> str:
        """Hash of its content."""
        return content_key(self.to_dict())

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose maps it needs."""
        layers = dict.fromkeys(each.layer for each in self.patches)
        return tuple(layer for layer in layers if layer != EVERY_LAYER)

    def describe(self) -> str:
        """The piece in a few words."""
        first, last = self.patches[0], self.patches[-1]
        where = "every layer" if first.layer == EVERY_LAYER else f"layer {first.layer}"
        on = f" on {len(self.prompts)} prompts from {self.prompts[0]!r}" if self.prompts else ""
        to = f" to {last.source} of {last.heads}" if last != first else ""
        return f"{where} of {into_side(first)} from {first.source} of {first.heads}{to}{on}"


def pieces_of(plans: Sequence[GridPlan], job: str = "") -> list[Piece]:
    """Every patch whose head set is known beforehand, in pieces; top-k sets are for the merge."""
    # A piece is a chunk that a single process measures together too, so that its numbers are the
    # same to the last digit wherever it is measured.
    pieces: list[Piece] = []
    seen: set[Patch] = set()
    for plan in plans:
        new = [patch for patch in patches_of(plan.fixed()) if patch not in seen]
        seen |= set(new)
        pieces += (Piece(tuple(chunk), job) for chunk in recorded_together(new))
    return pieces


def divided(pieces: Sequence[Piece], parts: Sequence[tuple[str, ...]]) -> list[Piece]:
    """Pieces that cover a part of the prompts each."""
    return [replace(piece, prompts=part) for part in parts for piece in pieces]


def inward(layers: Sequence[int]) -> list[int]:
    """Lowest and highest in turn, so that equal parts of the list cost about the same.

    A row patched at a layer runs through all layers above: low layers cost more.
    """
    in_turn = chain.from_iterable(zip(layers, reversed(layers), strict=True))
    return list(in_turn)[: len(layers)]


@dataclass(frozen=True)
class Share:
    """One part of a list of pieces, or of many lists end to end, which run from 0 to 1."""

    start: Fraction
    stop: Fraction

    @classmethod
    def of(cls, number: int, count: int) -> Share:
        """One of several shares of equal size, counted from 1."""
        return cls(Fraction(number - 1, count), Fraction(number, count))

    @classmethod
    def parse(cls, text: str) -> Share:
        """A share as a user writes it, ``"2/4"``."""
        match = _SHARE.fullmatch(text.strip())
        number, count = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= number <= count:
            raise UserError(
                f"--shard {text[:40]!r} is no share: write it as I/N with I from 1 to N, as '2/4'."
            )
        return cls.of(number, count)

    def __str__(self) -> str:
        return f"{int(self.stop * self.count)}/{self.count}"

    @property
    def count(self) -> int:
        """How many shares of its size it takes to cover everything."""
        return ceil(1 / (self.stop - self.start))

    def cut(self, whole: Sequence[T]) -> Sequence[T]:
        """This part of a sequence; the shares of a whole cover it without overlap."""
        return whole[int(self.start * len(whole)) : int(self.stop * len(whole))]

    def within(self, place: int, n_lists: int) -> Share | None:
        """Its part of one of several lists that stand end to end; None where it has none of it."""
        start = max(Fraction(0), self.start * n_lists - place)
        stop = min(Fraction(1), self.stop * n_lists - place)
        return Share(start, stop) if start < stop else None


WHOLE = Share(Fraction(0), Fraction(1))


@dataclass(frozen=True)
class Sharing:
    """How the work of a job is shared out.

    Args:
        share: which share is measured.
        division: whether prompts are divided too; the first share to come decides.
        part: the part of the pieces, where it is not simply the share.
        study: the directory of the study that the job belongs to, if it belongs to one.
    """

    share: Share
    division: Division = "auto"
    part: Share | None = None
    study: Path | None = None
