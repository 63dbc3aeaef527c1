"""Several processes for one command, and how its work is divided between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

from rq4lens.errors import UserError

Division = Literal["auto", "conditions", "prompts"]

T = TypeVar("T")

LOCAL = "local"
AUTO = "auto"
LOOPBACK = "127.0.0.1"
LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's own switch for a machine that is no part of a cluster. Where it is off, Ray's servers bind
to the loopback address; elsewhere they replace 127.0.0.1 by an address that others can reach."""


@dataclass(frozen=True)
class Cluster:
    """Where to run, and with how many workers: as many as fit when left out.

    The address ``"local"`` starts Ray on this machine alone, ``"auto"`` finds the cluster that this
    machine belongs to. A worker has one GPU where there are any, unless more or a part are asked
    for; the layers of a model are spread over several. A job that is begun keeps its division.
    """

    address: str = LOCAL
    workers: int | None = None
    gpus_per_worker: float | None = None
    division: Division = "auto"

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UserError(f"{self.workers} workers measure nothing: ask for at least 1.")
        gpus = self.gpus_per_worker or 0.0
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise UserError(
                f"--gpus-per-worker {gpus:g} cannot be had: ask for a part of one GPU, such as "
                "0.5, or for 1, 2, 3, ..."
            )


FEW_PIECES = 16
"""Pieces of conditions per worker below which the clean pass is felt.

A piece of 32 patches of a middle layer costs about as much as 32 tokens in half of the layers; the
clean pass of a prompt of T tokens, which every worker makes unless prompts are divided, about T
tokens in all of them. With T = 96 that is the work of six pieces. On a GPU a piece is 256 patches:
the grid of one layer has too few of them for several workers, and prompts are divided earlier.
"""


def divides_prompts(division: Division, n_pieces: int, n_workers: int, n_parts: int) -> bool:
    """Whether the prompts of a job are divided too."""
    if division == "auto":
        return n_parts > 1 and n_workers > 1 and n_pieces < FEW_PIECES * n_workers
    return division == "prompts" and n_parts > 1


_SHARE = re.compile(r"(\d{1,6})\s*/\s*(\d{1,6})", re.ASCII)


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
    """How the work of a job is shared out: the first share to come decides its division.

    ``part`` is the part of the pieces where it is not simply the share, and ``study`` the directory
    of the study that the job belongs to, if it belongs to one.
    """

    share: Share
    division: Division = "auto"
    part: Share | None = None
    study: Path | None = None


@dataclass(frozen=True)
class Many:
    """How the work is shared out, if at all, as the command line asks for it."""

    shard: str | None = None
    cluster: str | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None
    divide: str = "auto"

    def __post_init__(self) -> None:
        if self.shard is not None and self.cluster is not None:
            raise UserError(
                "--shard and --cluster are two ways of the same: give one of them; a cluster "
                "shares the work out by itself."
            )
        if self.cluster is None and (self.workers, self.gpus_per_worker) != (None, None):
            raise UserError(
                "--workers and --gpus-per-worker are of a cluster: give --cluster local too."
            )
        if self.divide not in get_args(Division):
            raise UserError(
                f"--divide {self.divide[:40]!r} does not exist: choose "
                f"{', '.join(get_args(Division))}."
            )
        if self.divide != "auto" and not self.asked:
            raise UserError(
                "--divide says how work is shared out: give --shard I/N or --cluster local too."
            )

    @property
    def asked(self) -> bool:
        """Whether the work is shared out at all."""
        return self.shard is not None or self.cluster is not None

    @property
    def sharing(self) -> Sharing:
        """The share that was asked for; all of it if none was."""
        return Sharing(Share.parse(self.shard or "1/1"), cast(Division, self.divide))

    @property
    def where(self) -> Cluster:
        """The cluster that was asked for; this machine if none was."""
        address, division = self.cluster or LOCAL, cast(Division, self.divide)
        return Cluster(address, self.workers, self.gpus_per_worker, division=division)
