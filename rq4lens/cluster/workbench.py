"""One process's part: the pair loaded once, and pieces measured into a shared run directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from rq4lens.cluster.jobs import PIECES, Job
from rq4lens.cluster.pieces import Piece, Request
from rq4lens.models.catalog import pair_from_config
from rq4lens.models.pair import ModelPair
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.conditions import Recorder
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.fitting import fit_maps
from rq4lens.preparation import cache_of, capture, keep_base, prepare_experiment
from rq4lens.run_directory import CONDITIONS, MAPS
from rq4lens.stages import Advance, Clock, Stage, silent
from rq4lens.store import Store


class Workbench:
    """A pair that is loaded once and serves many pieces.

    Args:
        request: what is to be measured.
        directory: the run directory; other processes may work in it too.
        fresh: measure again what is there.
        stage: opens a stage of the work, for progress bars.

    Raises:
        UserError: if the request does not fit the pair, or something cannot be read.
    """

    def __init__(
        self, request: Request, directory: Path, *, fresh: bool = False, stage: Stage = silent
    ) -> None:
        self.request = request
        self.directory = directory
        self.fresh = fresh
        self.clock = Clock(stage)
        with self.clock("load"):
            self._cache = cache_of(request.config, directory)
            kept_in = None if fresh else self._cache
            self.pair: ModelPair = pair_from_config(request.config, kept_in=kept_in)
            self.plans = request.plans(self.pair)
        self._experiments: dict[tuple[int, ...], Experiment] = {}

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

    def job(self, n_shards: int = 1) -> Job:
        """The job, agreed with whoever works in the directory too.

        Args:
            n_shards: into how many shares it is divided.

        Raises:
            UserError: if the directory holds another job.
        """
        _ = self.activations  # both models are known now, loaded once each
        job = Job.of(self.request, self.pair, n_shards)
        job.join(self.directory)
        return job

    def fit(self, layers: Sequence[int]) -> None:
        """Fit the maps of some layers into the directory, or find them there."""
        config = self.request.config
        fit_maps(
            self.pair,
            layers,
            config.map_kind,
            scope=config.map_scope,
            seed=config.seed,
            activations=self.activations,
            directory=self.directory / MAPS,
        )

    def prepare(self, layers: Sequence[int]) -> Experiment:
        """Make some layers ready to be measured; what was prepared last is kept."""
        wanted = tuple(sorted(set(layers)))
        if wanted not in self._experiments:
            self._experiments = {
                wanted: prepare_experiment(
                    self.request.config,
                    self.activations,
                    wanted,
                    self.clock,
                    maps_directory=self.directory / MAPS,
                    fresh=self.fresh,
                )
            }
        return self._experiments[wanted]

    @cached_property
    def marks(self) -> Store:
        """The pieces that are done."""
        return Store(self.directory / PIECES)

    @cached_property
    def conditions(self) -> Store:
        """The measured conditions."""
        return Store(self.directory / CONDITIONS, fresh=self.fresh)

    def measure(self, piece: Piece, experiment: Experiment, advance: Advance | None = None) -> None:
        """Measure a piece, or find it done; it is marked when the last condition is on disk.

        Args:
            piece: the piece.
            experiment: an experiment with its layers.
            advance: called with the number of rows (prompt x patch) just finished.
        """
        started = time.perf_counter()
        recorder = Recorder(experiment, piece.alpha, self.conditions, advance)
        recorder.measure(piece.conditions)
        rows = len(piece.patches) * len(experiment.prompts)
        seconds = round(time.perf_counter() - started, 4)
        self.marks.put(piece, {"rows": rows, "seconds": seconds})
