"""Shares of a job by any scheduler: one process per share, and one merge at the end."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from rq4lens.cluster.job import PIECES, Job, kind_of_device, read_job
from rq4lens.cluster.pieces import Request, Shard, Sharing
from rq4lens.cluster.workbench import Workbench
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Stage, silent
from rq4lens.jobs.run import run_on
from rq4lens.jobs.sweep import sweep_on

MAX_NAMED = 6
"""Missing pieces that an error sentence names."""


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
    shard, mine = sharing.shard, sharing.share
    job = bench.join_job(shard.count, mine.n_like_it, sharing.division)
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
                    bench.measure(piece, job, measurer, progress)
    n_missing = len(job.missing(bench.marks))
    state = f"{n_missing} of {len(every)} pieces of the job are still missing"
    if not n_missing:
        state = f"all {len(every)} pieces are there: rq4lens merge {sharing.study or directory}"
    return (
        f"share {shard.number}/{shard.count}: {len(left)} pieces measured, "
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
        Workbench(job.request, directory, stage=stage).join(job)
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
        raise UserError(
            f"{len(missing)} of {len(pieces)} pieces are missing in {str(directory)!r} "
            f"({named}{more}): run --shard {_shards_of(job, missing, place, n_lists)} again; what "
            "is finished is not measured twice."
        )
    wanted = job.identity["device"]
    if kind_of_device(job.request.config.place.device) != wanted:
        raise UserError(
            f"the shares were measured on {wanted}, which rounds differently from what is here: "
            f"merge on a machine with {wanted}."
        )


def _shards_of(job: Job, missing: list[int], place: int, n_lists: int) -> str:
    """The shares that hold the missing pieces, as the first process divided them."""
    places, held = range(len(job.pieces())), []
    for number in range(1, job.n_shards + 1):
        part = Shard(number, job.n_shards).share.within(place, n_lists)
        if part is not None and set(part.cut(places)) & set(missing):
            held.append(f"{number}/{job.n_shards}")
    return ", ".join(held)
