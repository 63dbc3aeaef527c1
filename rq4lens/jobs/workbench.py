"""One process's part: the pair loaded once, and pieces measured into a shared run directory."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rq4lens.cluster.job import PIECES, Job
from rq4lens.cluster.many import Division, divides_prompts
from rq4lens.cluster.pieces import Piece, Request, divided
from rq4lens.disk.files import remove_leftovers
from rq4lens.disk.run import CONDITIONS, JOB, MAPS, refuse_foreign
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.preparation import cache_of, capture, keep_base, maps_of, prepare_experiment
from rq4lens.jobs.progress import Advance, Clock, Stage, silent
from rq4lens.models.catalog import pair_from_config
from rq4lens.models.pair import ModelPair
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.engines.prompt_parts import prompt_parts
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.measured import Recorder

log = logging.getLogger(__name__)


class Workbench:
    """A pair that is loaded once and serves many pieces.

    Args:
        request: what is to be measured.
        directory: the run directory; other processes may work in it too.
        fresh: measure again what is there.
        stage: opens a stage of the work, for progress bars.

    Raises:
        UserError: if the request does not fit the pair, the directory holds other files, or
            something cannot be read.
    """

    def __init__(
        self, request: Request, directory: Path, *, fresh: bool = False, stage: Stage = silent
    ) -> None:
        refuse_foreign(directory)
        remove_leftovers(directory)
        self.request = request
        self.directory = directory
        self.fresh = fresh
        self.clock = Clock(stage)
        with self.clock("load"):
            self._cache = cache_of(request.config, directory)
            kept_in = None if fresh else self._cache
            self.pair: ModelPair = pair_from_config(request.config, kept_in=kept_in)
            self.plans = request.plans(self.pair)
        self._experiments: dict[tuple[Any, ...], Experiment] = {}
        self._fitted: set[int] = set()

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer of the request."""
        return tuple(dict.fromkeys(layer for plan in self.plans for layer in plan.layers))

    @cached_property
    def activations(self) -> PairActivations:
        """What both models' forward passes give."""
        config = self.request.config
        captured = capture(
            config, self.pair, self.layers, self.clock, cache=self._cache, fresh=self.fresh
        )
        keep_base(config, self.pair, captured, self._cache)
        return captured

    def join_job(
        self, n_shards: int = 1, n_workers: int | None = None, division: Division = "auto"
    ) -> Job:
        """The job, agreed with whoever works in the directory too.

        Raises:
            UserError: if the directory holds another job.
        """
        _ = self.activations  # both models are known now, loaded once each
        job = Job.of(self.request, self.pair, n_shards)
        parts = self._prompt_parts()
        if divides_prompts(division, len(job.wholes()), n_workers or n_shards, len(parts)):
            job = replace(job, prompt_parts=parts)
        return self._checked(job.join(self.directory))

    def _checked(self, job: Job) -> Job:
        ids = sorted(self.pair.tokens("tuned", self.request.config.split).ids)
        if job.prompt_parts and sorted(each for part in job.prompt_parts for each in part) != ids:
            raise UserError(
                f"{str(self.directory / JOB)!r} is damaged (its parts do not hold each prompt "
                "once): delete it and run one share again."
            )
        return job

    def _prompt_parts(self) -> tuple[tuple[str, ...], ...]:
        config = self.request.config
        prompts = self.pair.tokens("tuned", config.split)
        model = self.pair.use("tuned").model
        parts = prompt_parts(model, prompts, config.engine, config.batch_size)
        return tuple(tuple(prompts.ids[row] for row in part) for part in parts)

    def fit(self, layers: Sequence[int]) -> None:
        """Fit the maps of some layers into the directory, or find them there."""
        maps_of(self.request.config, self.activations, layers, Store(self.directory / MAPS))

    def prepare(self, layers: Sequence[int], prompts: Sequence[str] = ()) -> Experiment:
        """Make some layers ready to be measured; what was prepared last is kept."""
        wanted = tuple(sorted(set(layers)))
        place = (wanted, tuple(prompts))
        if place not in self._experiments:
            self._experiments = {}  # lets the memory of the one before go first
            self._experiments[place] = prepare_experiment(
                self.request.config,
                self.activations,
                wanted,
                self.clock,
                store=Store(
                    self.directory / MAPS,
                    fresh=self.fresh and not self._fitted.issuperset(wanted),
                ),
                rows=self._rows_of(prompts) if prompts else None,
            )
            self._fitted.update(wanted)
        return self._experiments[place]

    def _rows_of(self, prompts: Sequence[str]) -> list[int]:
        ids = self.pair.tokens("tuned", self.request.config.split).ids
        places = {each: place for place, each in enumerate(ids)}
        return [places[each] for each in prompts]

    @cached_property
    def marks(self) -> Store:
        """The pieces that are done."""
        return Store(self.directory / PIECES)

    @cached_property
    def conditions(self) -> Store:
        """The measured conditions."""
        return Store(self.directory / CONDITIONS, fresh=self.fresh)

    def measure(
        self, piece: Piece, job: Job, experiment: Experiment, advance: Advance | None = None
    ) -> None:
        """Measure a piece, or find it done; it is marked when its last number is on disk."""
        started = time.perf_counter()
        recorder = Recorder(experiment, piece.alpha, self.conditions, advance)
        part: dict[str, Any] = {}
        if not piece.prompts or recorder.is_stored(piece.conditions):
            recorder.measure(piece.conditions)
            piece = piece.whole
        else:
            part = recorder.measure_part(piece.conditions)
        seconds = round(time.perf_counter() - started, 4)
        self.marks.put(piece, {"rows": job.rows(piece), "seconds": seconds, **part})
        if piece.prompts:
            self._join(piece.whole, job, recorder)

    def join(self, job: Job) -> None:
        """Join what lies there in parts of the prompts and was not joined when the last one came.

        Two processes that finish the last two parts at once, on a file system that is slow to show
        one what the other wrote, can both leave it.
        """
        for whole in self._checked(job).unjoined(self.marks):
            if all(self.marks.get(each) is not None for each in divided([whole], job.prompt_parts)):
                experiment = self.prepare(self.layers, job.prompt_parts[0])
                self._join(whole, job, Recorder(experiment, whole.alpha, self.conditions))

    def _join(self, whole: Piece, job: Job, recorder: Recorder) -> None:
        pieces = divided([whole], job.prompt_parts)
        parts = [part for piece in pieces if (part := self.marks.get(piece)) is not None]
        if len(parts) < len(pieces):
            return
        foreign = recorder.join(whole.conditions, parts)
        for place in foreign:
            log.warning("%s was made with another map: to be measured again", pieces[place].label)
            self.marks.path(pieces[place]).unlink(missing_ok=True)
        if not foreign:
            seconds = round(sum(part["seconds"] for part in parts), 4)
            self.marks.put(whole, {"rows": job.rows(whole), "seconds": seconds})
