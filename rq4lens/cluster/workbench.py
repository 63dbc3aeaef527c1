"""One process's part: the pair loaded once, and pieces measured into a shared run directory."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rq4lens.cluster.job import PIECES, Job
from rq4lens.cluster.many import Division, divides_prompts
from rq4lens.cluster.pieces import Piece, Request, divided
from rq4lens.disk.run import JOB
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Progress, Stage, silent
from rq4lens.patching.engines.memory import prompt_parts
from rq4lens.patching.measured import Measurer

log = logging.getLogger(__name__)


class Workbench(Bench):
    """A bench that serves many pieces of a job; other processes may work in its directory too."""

    def __init__(
        self, request: Request, directory: Path, *, fresh: bool = False, stage: Stage = silent
    ) -> None:
        super().__init__(request.config, directory, fresh=fresh, stage=stage)
        self.request = request
        with self.clock("load"):
            self.plans = request.plans(self.pair)

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer of the request."""
        return tuple(dict.fromkeys(layer for plan in self.plans for layer in plan.layers))

    def join_job(
        self, n_shards: int = 1, n_workers: int | None = None, division: Division = "auto"
    ) -> Job:
        """The job, agreed with whoever works in the directory too."""
        self.capture(self.layers)  # both models are known now, loaded once each
        job = Job.of(self.request, self.pair, n_shards)
        parts = self._prompt_parts()
        if divides_prompts(division, len(job.wholes()), n_workers or n_shards, len(parts)):
            job = replace(job, prompt_parts=parts)
        return self._checked(job.join(self.run_directory))

    def _checked(self, job: Job) -> Job:
        ids = sorted(self.pair.tokens("tuned", self.config.patching.split).ids)
        if job.prompt_parts and sorted(each for part in job.prompt_parts for each in part) != ids:
            raise UserError(
                f"{str(self.run_directory / JOB)!r} is damaged (its parts do not hold each prompt "
                "once): delete it and run one share again."
            )
        return job

    def _prompt_parts(self) -> tuple[tuple[str, ...], ...]:
        prompts = self.pair.tokens("tuned", self.config.patching.split)
        parts = prompt_parts(self.pair.use("tuned").model, prompts, self.config.place)
        return tuple(tuple(prompts.ids[row] for row in part) for part in parts)

    @cached_property
    def marks(self) -> Store:
        """The pieces that are done."""
        return Store(self.run_directory / PIECES)

    def measure(
        self, piece: Piece, job: Job, measurer: Measurer, progress: Progress | None = None
    ) -> None:
        """Measure a piece, or find it done; it is marked when its last number is on disk."""
        started = time.perf_counter()
        part: dict[str, Any] = {}
        if not piece.prompts or measurer.are_recorded(piece.patches):
            measurer.record(piece.patches, progress)
            piece = piece.whole
        else:
            part = measurer.part(piece.patches, progress)
        seconds = round(time.perf_counter() - started, 4)
        self.marks.put(piece, {"rows": job.rows(piece), "seconds": seconds, **part})
        if piece.prompts:
            self._join(piece.whole, job, measurer)

    def join(self, job: Job) -> None:
        """Join what lies there in parts of the prompts and was not joined when the last one came.

        Two processes that finish the last two parts at once, on a file system that is slow to show
        one what the other wrote, can both leave it.
        """
        for whole in self._checked(job).unjoined(self.marks):
            if all(self.marks.get(each) is not None for each in divided([whole], job.prompt_parts)):
                self._join(whole, job, self.measurer(self.layers, job.prompt_parts[0]))

    def _join(self, whole: Piece, job: Job, measurer: Measurer) -> None:
        pieces = divided([whole], job.prompt_parts)
        parts = [part for piece in pieces if (part := self.marks.get(piece)) is not None]
        if len(parts) < len(pieces):
            return
        foreign = measurer.join(whole.patches, parts)
        for place in foreign:
            log.warning("%s was made with another map: to be measured again", pieces[place].label)
            self.marks.path(pieces[place]).unlink(missing_ok=True)
        if not foreign:
            seconds = round(sum(part["seconds"] for part in parts), 4)
            self.marks.put(whole, {"rows": job.rows(whole), "seconds": seconds})
