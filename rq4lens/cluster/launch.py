"""Jobs and validations on Ray: workers load their models once and serve many tasks.

Ray is an extra; the file that imports it is imported when a cluster is asked for.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from rq4lens.cluster.many import LOCAL, LOOPBACK_SWITCH, Cluster, Division
from rq4lens.cluster.pieces import PIECES, Job, Request
from rq4lens.cluster.shards import Workbench, finish
from rq4lens.disk.files import made_directory, make_directory, refuse_no_file, write_json_atomic
from rq4lens.disk.run import JOB
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Clock, Stage, silent
from rq4lens.validation.suite import Validation, ValidationRequest, validation_text

R = TypeVar("R", Request, ValidationRequest)


def run_on_cluster(
    request: Request,
    directory: Path,
    cluster: Cluster,
    *,
    fresh: bool = False,
    stage: Stage = silent,
) -> str:
    """Measure a run or a sweep on a Ray cluster, and write its results.

    A worker or node that is lost costs only what it was measuring at that moment. Interrupted, the
    same call goes on where it stopped.

    Args:
        request: what is measured.
        directory: the run directory, on a file system that all nodes share.
        cluster: where.
        fresh: measure again what is there.
        stage: opens a stage of the work, for progress bars.

    Returns:
        What the console prints.

    Raises:
        UserError: if Ray is not installed, or the request does not fit the pair or the cluster.
    """
    pools = _with_ray(cluster)
    request, clock = _anywhere(request, cluster), Clock(stage)
    with pools.connected(cluster), made_directory(directory):
        shared, n_workers = directory.resolve(), pools.size_of(cluster)

        def arguments() -> tuple[Any, ...]:
            is_first = not (shared / JOB).exists()
            return request, shared, is_first, n_workers, cluster.division, fresh

        # One at first: it begins the job, and says how many pieces there are.
        with pools.workers(cluster, Worker, 1, arguments) as pool:
            with clock("load"):
                job, layers = pool.ask("job")
            left, pieces = job.missing(Store(directory / PIECES, fresh=fresh)), job.pieces()
            if left:
                pool.size = pools.size_of(cluster, len(left))
                with clock("maps"):
                    # All maps before any condition, so that every worker patches with the same.
                    pool.run("fit", layers)
                rows = sum(job.rows(pieces[place]) for place in left)
                with clock(f"pieces on {pool.size} workers", rows) as progress:
                    pool.run("measure", left, progress, lambda place: pieces[place].prompts)
            pool.shrink(1)
            with clock("results"):
                summary: str = pool.ask("finish")
        return summary + (f"{pool.lost} workers were lost on the way\n" if pool.lost else "")


def finish_on_cluster(
    requests: Mapping[Path, Request],
    cluster: Cluster,
    done: Callable[[Path], None],
    *,
    fresh: bool = False,
    stage: Stage = silent,
) -> None:
    """Measure several jobs on a Ray cluster, and write the results of each.

    Where there are at least as many jobs as workers, each worker does whole ones, so that a pair is
    loaded once; otherwise all workers share one job after the other.
    """
    pools = _with_ray(cluster)
    with pools.connected(cluster):
        size = pools.size_of(cluster, len(requests) + 1)
        if size > len(requests):
            for directory, request in requests.items():
                run_on_cluster(request, directory, cluster, fresh=fresh, stage=stage)
                done(directory)
            return
        directories = list(requests)
        for directory in directories:
            make_directory(directory)
        jobs = [(_anywhere(requests[each], cluster), each.resolve()) for each in directories]
        with (
            pools.workers(cluster, Finisher, size, lambda: (jobs, fresh)) as pool,
            stage(f"sweeps on {size} workers", len(jobs)) as progress,
        ):

            def finished(place: int) -> None:
                done(directories[place])
                if progress is not None:
                    progress(1)

            pool.run("finish", range(len(jobs)), finished)


def validate_on_cluster(
    request: ValidationRequest,
    directory: Path,
    cluster: Cluster,
    *,
    fresh: bool = False,
    stage: Stage = silent,
) -> Validation:
    """Judge ranking methods on planted pairs, each a task of its own.

    Args:
        request: what is validated.
        directory: where planted pairs are kept, on a file system that all nodes share.
        cluster: where.
        fresh: judge again what is kept.
        stage: opens a stage of the work, for progress bars.

    Returns:
        What each method found.

    Raises:
        UserError: as for :func:`run_on_cluster`.
    """
    pools, request = _with_ray(cluster), _anywhere(request, cluster)
    with pools.connected(cluster), made_directory(directory):
        size, shared = pools.size_of(cluster, request.n_planted), directory.resolve()
        with pools.workers(cluster, Planter, size, lambda: (request, shared, fresh)) as pool:
            with stage(f"planted pairs on {size} workers", request.n_planted) as progress:
                pool.run("judge", range(request.n_planted), progress)
            with stage("results", None):
                found: Validation = pool.ask("finish")
    return found


def kept_beside(out: Path) -> Path:
    """The folder in which planted pairs are kept, beside the file of the result."""
    return out.with_suffix(".pairs")


def run_validation(
    request: ValidationRequest,
    out: Path | None = None,
    cluster: Cluster | None = None,
    *,
    fresh: bool = False,
    stage: Stage = silent,
) -> str:
    """Validate ranking methods on the base model that a configuration names."""
    refuse_no_file(out)
    directory = None if out is None else kept_beside(out)
    if cluster is not None:
        if directory is None:
            raise UserError(
                "several processes need one folder to meet in: name a file in it with --out FILE."
            )
        validation = validate_on_cluster(request, directory, cluster, fresh=fresh, stage=stage)
    else:
        with stage("load", None):
            suite = request.suite()
        store = None if directory is None else Store(directory, fresh=fresh)
        with stage("validate", len(suite)) as progress:
            validation = suite.run(store, progress)
    if out is not None:
        write_json_atomic(out, validation.to_dict())
    return validation_text(validation)


def _with_ray(cluster: Cluster) -> Any:
    """The file that imports Ray, once the switches are set that Ray reads at its import."""
    if find_spec("ray") is None:
        raise UserError(
            "--cluster needs Ray, which is not installed: pip install 'rq4lens[cluster]'."
        )
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if cluster.address == LOCAL:
        os.environ[LOOPBACK_SWITCH] = "0"
    return import_module("rq4lens.cluster.pool")


def _anywhere(request: R, cluster: Cluster) -> R:
    """A request as a process in another folder understands it, on as many GPUs as it gets."""
    config = request.config
    changes: dict[str, Any] = {
        name: str(Path(value).resolve())
        for name in ("base", "tuned", "prompts")
        if (value := getattr(config.pair, name)) is not None and Path(value).exists()
    }
    if config.place.cache is not None:
        changes["cache"] = str(Path(config.place.cache).resolve())
    if (cluster.gpus_per_worker or 0) > 1 and config.place.device_map is None:
        changes["n_devices"] = int(cluster.gpus_per_worker or 1)
    return replace(request, config=config.updated(**changes)) if changes else request


# Workers


@dataclass
class Worker:
    """The work of one actor; the first one may begin the job, the others must find it begun."""

    request: Request
    directory: Path
    is_first: bool
    n_workers: int
    division: Division
    fresh: bool

    def open(self) -> None:
        """Load the pair and read its activations."""
        _require_seen(self.directory, self.is_first or (self.directory / JOB).is_file())
        self.bench = Workbench(self.request, self.directory, fresh=self.fresh)
        self._job = self.bench.begin(n_workers=self.n_workers, division=self.division)
        self._pieces = self._job.pieces()

    def job(self, _task: None) -> tuple[Job, tuple[int, ...]]:
        """The job and all of its layers."""
        return self._job, self.bench.layers

    def fit(self, layer: int) -> None:
        """Fit the map of a layer into the run directory."""
        self.bench.maps([layer])

    def measure(self, place: int) -> int:
        """Measure a piece, or find it done."""
        piece = self._pieces[place]
        measurer = self.bench.measurer(self.bench.layers, piece.prompts)
        self.bench.measure(piece, measurer)
        return self._job.rows(piece)

    def finish(self, _task: None) -> str:
        """Write the results."""
        self.bench.join()
        return finish(self.request, self.bench)


@dataclass
class Finisher:
    """The work of one actor that does whole jobs, each into a run directory."""

    jobs: list[tuple[Request, Path]]
    fresh: bool

    def open(self) -> None:
        """Nothing is loaded before a job is given out."""

    def finish(self, place: int) -> int:
        """Measure a job and write its results; what is there already is not measured again."""
        request, directory = self.jobs[place]
        _require_seen(directory, directory.is_dir())
        finish(request, Bench(request.config, directory, fresh=self.fresh))
        gc.collect()
        return place


@dataclass
class Planter:
    """The work of one actor that plants pairs and judges ranking methods on them."""

    request: ValidationRequest
    directory: Path
    fresh: bool

    def open(self) -> None:
        """Load the base model."""
        _require_seen(self.directory, self.directory.is_dir())
        self._suite = self.request.suite()

    def judge(self, place: int) -> int:
        """Plant a pair and judge the methods on it, or find it done."""
        self._suite.outcome(place, Store(self.directory, fresh=self.fresh))
        return 1

    def finish(self, _task: None) -> Validation:
        """What all planted pairs say together, from the folder."""
        return self._suite.run(Store(self.directory))


def _require_seen(directory: Path, is_seen: bool) -> None:
    """Refuse a node that does not see the folder in which all meet."""
    if not is_seen:
        raise UserError(
            f"node {socket.gethostname()!r} does not see {str(directory)!r}: name a folder with "
            "--out that lies on a file system which all nodes share."
        )
