"""Shares of a job by any scheduler: one process per share, and one merge at the end."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from rq4lens.cluster.many import Division, Share, Sharing, divides_prompts
from rq4lens.cluster.pieces import PIECES, Job, Piece, Request, divided, kind_of_device, read_job
from rq4lens.disk.run import JOB
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Progress, Stage, silent
from rq4lens.jobs.run import run_on
from rq4lens.jobs.sweep import sweep_on
from rq4lens.patching.engines.memory import prompt_parts
from rq4lens.patching.measured import Measurer

log = logging.getLogger(__name__)

MAX_NAMED = 6
"""Missing pieces that an error sentence names."""


class Workbench(Bench):
    """A bench at which pieces of a job are measured; others may work in its directory, too."""

    job: Job

    def __init__(
        self, request: Request, directory: Path, *, fresh: bool = False, stage: Stage = silent
    ) -> None:
        super().__init__(request.config, directory, fresh=fresh, stage=stage)
        self.request = request
        with self.clock("load"):
            plans = request.plans(self.pair)
        self.layers = tuple(dict.fromkeys(layer for plan in plans for layer in plan.layers))

    @cached_property
    def marks(self) -> Store:
        """The pieces that are done."""
        return Store(self.run_directory / PIECES)

    def begin(
        self, n_shards: int = 1, n_workers: int | None = None, division: Division = "auto"
    ) -> Job:
        """The job of the directory, begun here or by another process."""
        self.capture(self.layers)  # both models are known now, loaded once each
        job = Job.of(self.request, self.pair, n_shards)
        prompts = self.pair.tokens("tuned", self.config.patching.split)
        rows = prompt_parts(self.pair.use("tuned").model, prompts, self.config.place)
        parts = tuple(tuple(prompts.ids[row] for row in part) for part in rows)
        if divides_prompts(division, len(job.wholes()), n_workers or n_shards, len(parts)):
            job = replace(job, prompt_parts=parts)
        self.job = job.join(self.run_directory)
        parts = self.job.prompt_parts
        if parts and sorted(each for part in parts for each in part) != sorted(prompts.ids):
            raise UserError(
                f"{str(self.run_directory / JOB)!r} is damaged (its parts do not hold each prompt "
                "once): delete it and run one share again."
            )
        return self.job

    def measure(self, piece: Piece, measurer: Measurer, progress: Progress | None = None) -> None:
        """Measure a piece, or find it done; it is marked when its last number is on disk."""
        if not piece.prompts or measurer.are_recorded(piece.patches):
            measurer.record(piece.patches, progress)
            self.marks.put(piece.whole, {})
        else:
            self.marks.put(piece, measurer.part(piece.patches, progress))
            self._join(piece.whole, measurer)

    def join(self) -> None:
        """Join what lies there in parts of the prompts and was not joined when the last one came.

        Two processes that finish the last two parts at once, on a file system that is slow to show
        one what the other wrote, can both leave it.
        """
        for whole in self.job.unjoined(self.marks):
            if len(self._parts(whole)) == len(self.job.prompt_parts) > 0:
                self._join(whole, self.measurer(self.layers, self.job.prompt_parts[0]))

    def _parts(self, whole: Piece) -> dict[Piece, Any]:
        """The parts of a piece that are there."""
        marks = {part: self.marks.get(part) for part in divided([whole], self.job.prompt_parts)}
        return {part: mark for part, mark in marks.items() if mark is not None}

    def _join(self, whole: Piece, measurer: Measurer) -> None:
        parts = self._parts(whole)
        if len(parts) < len(self.job.prompt_parts):
            return
        foreign = measurer.join(whole.patches, list(parts.values()))
        for piece in (list(parts)[place] for place in foreign):
            log.warning("%s was made with another map: to be measured again", piece.label)
            self.marks.path(piece).unlink(missing_ok=True)
        if not foreign:
            self.marks.put(whole, {})


def run_shard(
    request: Request,
    directory: Path,
    sharing: Sharing,
    *,
    fresh: bool = False,
    stage: Stage = silent,
) -> str:
    """Measure one share of a job into a shared run directory.

    Shares may run in any order, several at a time, and again after they were killed.

    Args:
        request: what is measured.
        directory: the run directory that all shares have in common.
        sharing: which share, and how the work is divided.
        fresh: measure again what is there.
        stage: opens a stage of the work, for progress bars.

    Returns:
        What the console prints.

    Raises:
        UserError: if the request does not fit the pair, or the directory holds another job.
    """
    bench = Workbench(request, directory, fresh=fresh, stage=stage)
    share, mine = sharing.share, sharing.part or sharing.share
    job = bench.begin(share.count, mine.count, sharing.division)
    every = job.pieces()
    places, pieces = mine.cut(range(len(every))), mine.cut(every)
    missing = set(places if fresh else job.missing(bench.marks))
    left = [every[place] for place in places if place in missing]
    if left:
        with bench.clock("pieces", sum(map(job.rows, left))) as progress:
            for prompts, together in groupby(left, key=lambda piece: piece.prompts):
                # The layers of the whole share, done or not: a kill changes no product.
                own = [piece for piece in pieces if piece.prompts == prompts]
                layers = [layer for piece in own for layer in piece.layers]
                # All layers at once need no map, but an experiment has one.
                measurer = bench.measurer(layers or bench.layers[:1], prompts)
                for piece in together:
                    bench.measure(piece, measurer, progress)
    n_missing = len(job.missing(bench.marks))
    state = f"{n_missing} of {len(every)} pieces of the job are still missing"
    if not n_missing:
        state = f"all {len(every)} pieces are there: rq4lens merge {sharing.study or directory}"
    return (
        f"share {share}: {len(left)} pieces measured, "
        f"{len(pieces) - len(left)} were there already; {state}\n"
    )


def merge_job(
    directory: Path,
    *,
    place: int = 0,
    n_lists: int = 1,
    trust_remote_code: bool = False,
    stage: Stage = silent,
) -> str:
    """Check that all pieces of a job are there, and write its results as a single process does.

    Args:
        directory: the run directory of the shares.
        place: the job's place among several that were shared out end to end.
        n_lists: how many these are.
        trust_remote_code: let a checkpoint run its own code.
        stage: opens a stage of the work, for progress bars.

    Returns:
        What the console prints.

    Raises:
        UserError: if pieces are missing; the sentence names them.
    """
    job = read_job(directory, trust_remote_code=trust_remote_code)
    _refuse_incomplete(job, directory, place, n_lists)
    if job.unjoined(Store(directory / PIECES)):
        bench = Workbench(job.request, directory, stage=stage)
        bench.begin()
        bench.join()
        _refuse_incomplete(job, directory, place, n_lists)
    return finish(job.request, Bench(job.request.config, directory, stage=stage))


def finish(request: Request, bench: Bench) -> str:
    """Write a request's results at a bench, which takes from its directory what is measured."""
    if request.command == "run":
        return run_on(bench).summary
    return sweep_on(bench, request.layers).summary


def _refuse_incomplete(job: Job, directory: Path, place: int, n_lists: int) -> None:
    pieces, missing = job.pieces(), job.missing(Store(directory / PIECES))
    if missing:
        named = "; ".join(pieces[each].describe() for each in missing[:MAX_NAMED])
        more = f"; and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
        # The shares that hold the missing pieces, as the first process divided them.
        shares = [Share.of(number, job.n_shards) for number in range(1, job.n_shards + 1)]
        parts = {str(share): share.within(place, n_lists) for share in shares}
        again = [
            name
            for name, part in parts.items()
            if part is not None and set(part.cut(range(len(pieces)))) & set(missing)
        ]
        raise UserError(
            f"{len(missing)} of {len(pieces)} pieces are missing in {str(directory)!r} "
            f"({named}{more}): run --shard {', '.join(again)} again; what is finished is not "
            "measured twice."
        )
    wanted = job.identity["device"]
    if kind_of_device(job.request.config.place.device) != wanted:
        raise UserError(
            f"the shares were measured on {wanted}, which rounds differently from what is here: "
            f"merge on a machine with {wanted}."
        )
