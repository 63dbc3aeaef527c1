"""Work on a Ray cluster: workers load their models once and serve many tasks."""

from __future__ import annotations

import gc
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray

from rq4lens.cluster.job import PIECES, Job
from rq4lens.cluster.many import AUTO, LOCAL, LOOPBACK, LOOPBACK_SWITCH, Cluster, Division
from rq4lens.cluster.pieces import Request
from rq4lens.cluster.pool import Pool
from rq4lens.cluster.shards import finish
from rq4lens.cluster.workbench import Workbench
from rq4lens.disk.files import made_directory, make_directory
from rq4lens.disk.run import JOB
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Clock, Stage
from rq4lens.validation.suite import Validation, ValidationRequest

R = TypeVar("R", Request, ValidationRequest)

CONNECT_SECONDS = 10.0

LOCAL_OBJECT_STORE_BYTES = 100 * 2**20
"""Results travel through the run directory, so that next to nothing is kept by Ray."""


def gpus_of(cluster: Cluster) -> float:
    """GPUs of each worker: one where there are any, unless another number was asked for."""
    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def size_of(cluster: Cluster, n_pieces: int = sys.maxsize) -> int:
    """How many workers: no more than there are pieces, or than fit."""
    if cluster.workers is not None:
        return min(cluster.workers, n_pieces)
    have, gpus = ray.cluster_resources(), gpus_of(cluster)
    fitting = have.get("GPU", 0) / gpus if gpus else have.get("CPU", 1) / cluster.cpus_per_worker
    return max(1, min(int(fitting), n_pieces))


@dataclass
class Worker:
    """The work of one actor.

    Args:
        is_first: whether it may begin the job; the others must find it begun.
        n_workers: how many there will be at most.
    """

    request: Request
    directory: Path
    is_first: bool
    n_workers: int
    division: Division
    fresh: bool

    def open(self) -> None:
        """Load the pair and read its activations."""
        if not self.is_first and not (self.directory / JOB).is_file():
            raise UserError(not_shared(self.directory))
        self.bench = Workbench(self.request, self.directory, fresh=self.fresh)
        self._job = self.bench.join_job(n_workers=self.n_workers, division=self.division)
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
        self.bench.measure(piece, self._job, measurer)
        return self._job.rows(piece)

    def finish(self, request: Request) -> str:
        """Write the results, with the settings that were asked for rather than this worker's."""
        self.bench.join(self._job)
        self.bench.config = request.config
        return finish(request, self.bench)


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
        if not directory.is_dir():
            raise UserError(not_shared(directory))
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
        if not self.directory.is_dir():
            raise UserError(not_shared(self.directory))
        self._suite = self.request.suite()

    def judge(self, place: int) -> int:
        """Plant a pair and judge the methods on it, or find it done."""
        self._suite.outcome(place, Store(self.directory, fresh=self.fresh))
        return 1

    def finish(self, _task: None) -> Validation:
        """What all planted pairs say together, from the folder."""
        return self._suite.run(Store(self.directory))


def not_shared(directory: Path) -> str:
    """The sentence for a node that does not see the folder in which all meet."""
    return (
        f"node {socket.gethostname()!r} does not see {str(directory)!r}: name a folder with --out "
        "that lies on a file system which all nodes share."
    )


@contextmanager
def _workers(
    cluster: Cluster, kind: type, size: int, arguments: Callable[[], tuple[Any, ...]]
) -> Iterator[Pool]:
    """A pool of actors of a class; all are let go at the end."""
    actor: Any = ray.remote(kind).options(
        num_cpus=cluster.cpus_per_worker, num_gpus=gpus_of(cluster), max_restarts=0
    )
    pool = Pool(lambda: actor.remote(*arguments()), size)
    try:
        yield pool
    finally:
        pool.close()


def run_all(
    requests: Mapping[Path, Request],
    cluster: Cluster,
    done: Callable[[Path], None],
    fresh: bool,
    stage: Stage,
) -> None:
    """Measure several jobs; see :func:`rq4lens.cluster.launch.finish_on_cluster`."""
    with connected(cluster):
        size = size_of(cluster, len(requests) + 1)
        if size > len(requests):
            for directory, request in requests.items():
                run(request, directory, cluster, fresh, stage)
                done(directory)
            return
        directories = list(requests)
        for directory in directories:
            make_directory(directory)
        jobs = [(_anywhere(requests[each], cluster), each.resolve()) for each in directories]
        with (
            _workers(cluster, Finisher, size, lambda: (jobs, fresh)) as pool,
            stage(f"sweeps on {size} workers", len(jobs)) as progress,
        ):

            def finished(place: int) -> None:
                done(directories[place])
                if progress is not None:
                    progress(1)

            pool.run("finish", range(len(jobs)), finished)


def run(request: Request, directory: Path, cluster: Cluster, fresh: bool, stage: Stage) -> str:
    """Measure a job and write its results; see :func:`rq4lens.cluster.launch.run_on_cluster`."""
    request, clock = _anywhere(request, cluster), Clock(stage)
    with connected(cluster), made_directory(directory):
        shared, n_workers = directory.resolve(), size_of(cluster)

        def arguments() -> tuple[Any, ...]:
            is_first = not (shared / JOB).exists()
            return request, shared, is_first, n_workers, cluster.division, fresh

        # One at first: it begins the job, and says how many pieces there are.
        with _workers(cluster, Worker, 1, arguments) as pool:
            with clock("load"):
                job, layers = pool.ask("job")
            left, pieces = job.missing(Store(directory / PIECES, fresh=fresh)), job.pieces()
            if left:
                pool.size = size_of(cluster, len(left))
                with clock("maps"):
                    # All maps before any condition, so that every worker patches with the same.
                    pool.run("fit", layers)
                rows = sum(job.rows(pieces[place]) for place in left)
                with clock(f"pieces on {pool.size} workers", rows) as progress:
                    pool.run("measure", left, progress, lambda place: pieces[place].prompts)
            pool.shrink(1)
            with clock("results"):
                summary: str = pool.ask("finish", request)
        return summary + (f"{pool.lost} workers were lost on the way\n" if pool.lost else "")


def validate(
    request: ValidationRequest, directory: Path, cluster: Cluster, fresh: bool, stage: Stage
) -> Validation:
    """Judge all planted pairs; see :func:`rq4lens.cluster.launch.validate_on_cluster`."""
    request = _anywhere(request, cluster)
    with connected(cluster), made_directory(directory):
        size, shared = size_of(cluster, request.n_planted), directory.resolve()
        with _workers(cluster, Planter, size, lambda: (request, shared, fresh)) as pool:
            with stage(f"planted pairs on {size} workers", request.n_planted) as progress:
                pool.run("judge", range(request.n_planted), progress)
            with stage("results", None):
                found: Validation = pool.ask("finish")
    return found


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """A connection to Ray; one that is there already is used and left as it is."""
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if cluster.address == LOCAL:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                _node_ip_address=LOOPBACK,
                **quiet,
            )
        else:
            if cluster.address != AUTO:
                _require_listener(cluster.address)
            ray.init(address=cluster.address, **quiet)
    except (OSError, ValueError, RuntimeError) as problem:
        reason = str(problem).splitlines()[0]
        raise UserError(
            f"no Ray cluster answers at {cluster.address!r} ({reason}): start one with `ray start "
            "--head`, or run on this machine with --cluster local."
        ) from None
    try:
        if cluster.address == LOCAL:
            _require_loopback()
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Ask whether anything listens at ``host:port``, where Ray itself would try for minutes."""
    parts = urlsplit(address if "//" in address else f"//{address}")
    if parts.hostname is None or parts.port is None:
        raise ValueError("an address is HOST:PORT")
    socket.create_connection((parts.hostname, parts.port), timeout=CONNECT_SECONDS).close()


def _require_loopback() -> None:
    """Ray's ports run what they are sent: those of this machine alone listen to it alone."""
    addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
    if addresses != {LOOPBACK}:
        raise UserError(
            f"Ray listens at {', '.join(sorted(addresses))}, because it was imported before "
            f"rq4lens could ask it not to: set {LOOPBACK_SWITCH}=0 before Python starts."
        )


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
