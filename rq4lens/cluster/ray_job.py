"""A run or a sweep on a Ray cluster: workers load the pair once and serve many pieces."""

from __future__ import annotations

import gc
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray

from rq4lens.cluster.job import PIECES, Job
from rq4lens.cluster.many import AUTO, LOCAL, LOOPBACK, LOOPBACK_SWITCH, Cluster, Division
from rq4lens.cluster.pieces import Request
from rq4lens.cluster.pool import Pool
from rq4lens.cluster.shards import finish
from rq4lens.cluster.workbench import Workbench
from rq4lens.config import RunConfig
from rq4lens.disk.files import made_directory, make_directory
from rq4lens.disk.run import JOB
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Clock, Stage, silent

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


class Worker:
    """The work of one actor.

    Args:
        request: what is measured.
        directory: the run directory, on a file system that all nodes share.
        is_first: whether it may begin the job; the others must find it begun.
        n_workers: how many there will be at most.
        division: how the first one divides the job.
        fresh: measure again what is there.
    """

    def __init__(
        self,
        request: Request,
        directory: str,
        is_first: bool,
        n_workers: int,
        division: Division,
        fresh: bool,
    ) -> None:
        self.request = request
        self.directory = Path(directory)
        self.is_first = is_first
        self.n_workers = n_workers
        self.division = division
        self.fresh = fresh
        self._bench: Workbench | None = None

    def open(self) -> None:
        """Load the pair and read its activations.

        Raises:
            UserError: if this node does not see the run directory, or the request does not fit.
        """
        if not self.is_first and not (self.directory / JOB).is_file():
            raise UserError(not_shared(str(self.directory)))
        self._bench = Workbench(self.request, self.directory, fresh=self.fresh)
        self._job = self._bench.join_job(n_workers=self.n_workers, division=self.division)
        self._pieces = self._job.pieces()

    @property
    def bench(self) -> Workbench:
        """The loaded pair."""
        if self._bench is None:
            self.open()
        assert self._bench is not None
        return self._bench

    def job(self, _task: None = None) -> tuple[Job, tuple[int, ...]]:
        """The job and all of its layers."""
        return self._job, self.bench.layers

    def fit(self, layer: int) -> int:
        """Fit the map of a layer into the run directory."""
        self.bench.maps([layer])
        return layer

    def measure(self, place: int) -> int:
        """Measure a piece, or find it done."""
        piece = self._pieces[place]
        experiment = self.bench.experiment(self.bench.layers, piece.prompts)
        self.bench.measure(piece, self._job, experiment)
        return self._job.rows(piece)

    def finish(self, request: Request) -> str:
        """Write the results, with the settings that were asked for rather than this worker's."""
        self.bench.join(self._job)
        self.bench.config = request.config
        return finish(request, self.bench)


class Finisher:
    """The work of one actor that does whole jobs.

    Args:
        jobs: what is measured, and the run directory.
        fresh: measure again what is there.
    """

    def __init__(self, jobs: list[tuple[Request, str]], fresh: bool) -> None:
        self.jobs = jobs
        self.fresh = fresh

    def open(self) -> None:
        """Nothing is loaded before a job is given out."""

    def finish(self, place: int) -> int:
        """Measure a job and write its results; what is there already is not measured again.

        Raises:
            UserError: if this node does not see the run directory, or the job cannot be done.
        """
        request, directory = self.jobs[place]
        if not Path(directory).is_dir():
            raise UserError(not_shared(directory))
        finish(request, Bench(request.config, Path(directory), fresh=self.fresh))
        gc.collect()
        return place


def run_all(
    requests: Mapping[Path, Request],
    cluster: Cluster,
    done: Callable[[Path], None],
    *,
    division: Division = "auto",
    fresh: bool = False,
    stage: Stage = silent,
) -> None:
    """Measure several jobs; see :func:`rq4lens.cluster.launch.finish_on_cluster`."""
    with connected(cluster):
        size = size_of(cluster, len(requests) + 1)
        if size > len(requests):
            for directory, request in requests.items():
                run(request, directory, cluster, division=division, fresh=fresh, stage=stage)
                done(directory)
        else:
            _finish_all(requests, cluster, size, done, fresh=fresh, stage=stage)


def _finish_all(
    requests: Mapping[Path, Request],
    cluster: Cluster,
    size: int,
    done: Callable[[Path], None],
    *,
    fresh: bool,
    stage: Stage,
) -> None:
    directories, actor = list(requests), ray.remote(Finisher)
    for directory in directories:
        make_directory(directory)
    jobs = [(_anywhere(requests[each], cluster), str(each.resolve())) for each in directories]

    def start() -> Any:
        return actor.options(
            num_cpus=cluster.cpus_per_worker, num_gpus=gpus_of(cluster), max_restarts=0
        ).remote(jobs, fresh)

    pool = Pool(start, size)
    try:
        with stage(f"sweeps on {size} workers", len(jobs)) as progress:

            def finished(place: int) -> None:
                done(directories[place])
                if progress is not None:
                    progress(1)

            pool.run("finish", range(len(jobs)), finished)
    finally:
        pool.close()


def not_shared(directory: str) -> str:
    """The sentence for a node that does not see the folder in which all meet."""
    return (
        f"node {socket.gethostname()!r} does not see {directory!r}: name a folder with --out that "
        "lies on a file system which all nodes share."
    )


def run(
    request: Request,
    directory: Path,
    cluster: Cluster,
    *,
    division: Division = "auto",
    fresh: bool = False,
    stage: Stage = silent,
) -> str:
    """Measure a job and write its results; see :func:`rq4lens.cluster.launch.run_on_cluster`."""
    request = _anywhere(request, cluster)
    with connected(cluster), made_directory(directory):
        pool = _pool(request, directory.resolve(), cluster, division, fresh)
        try:
            return _run(request, directory, cluster, pool, Clock(stage), fresh)
        finally:
            pool.close()


def _run(
    request: Request, directory: Path, cluster: Cluster, pool: Pool, clock: Clock, fresh: bool
) -> str:
    jobs: list[tuple[Job, tuple[int, ...]]] = []
    with clock("load"):
        pool.run("job", [None], jobs.append)
    job, layers = jobs[0]
    marks = Store(directory / PIECES, fresh=fresh)
    left, pieces = job.missing(marks), job.pieces()
    if left:
        pool.size = size_of(cluster, len(left))
        with clock("maps"):
            # All maps before any condition, so that every worker patches with the same ones.
            pool.run("fit", layers)
        rows = sum(job.rows(pieces[place]) for place in left)
        with clock(f"pieces on {pool.size} workers", rows) as progress:
            pool.run(
                "measure", left, progress or (lambda _: None), lambda place: pieces[place].prompts
            )
    pool.shrink(1)
    summaries: list[str] = []
    with clock("results"):
        pool.run("finish", [request], summaries.append)
    lost = f"{pool.lost} workers were lost on the way\n" if pool.lost else ""
    return summaries[0] + lost


def _pool(
    request: Request, directory: Path, cluster: Cluster, division: Division, fresh: bool
) -> Pool:
    actor, n_workers = ray.remote(Worker), size_of(cluster)

    def start() -> Any:
        return actor.options(
            num_cpus=cluster.cpus_per_worker, num_gpus=gpus_of(cluster), max_restarts=0
        ).remote(
            request, str(directory), not (directory / JOB).exists(), n_workers, division, fresh
        )

    # One at first: it begins the job, and says how many pieces there are.
    return Pool(start, 1)


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """A connection to Ray; one that is there already is used and left as it is.

    Raises:
        UserError: if there is no cluster at the address.
    """
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
    """Ask whether anything listens at ``host:port``, where Ray itself would try for minutes.

    Raises:
        OSError: if nothing does.
        ValueError: if this is no address.
    """
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


def _anywhere(request: Request, cluster: Cluster) -> Request:
    return replace(request, config=anywhere(request.config, cluster))


def anywhere(config: RunConfig, cluster: Cluster) -> RunConfig:
    """The settings as a process in another folder understands them, on as many GPUs as it gets."""
    changes: dict[str, Any] = {
        name: str(Path(value).resolve())
        for name in ("base", "tuned", "prompts")
        if (value := getattr(config.pair, name)) is not None and Path(value).exists()
    }
    if config.place.cache is not None:
        changes["cache"] = str(Path(config.place.cache).resolve())
    if (cluster.gpus_per_worker or 0) > 1 and config.place.device_map is None:
        changes["n_devices"] = int(cluster.gpus_per_worker or 1)
    return config.updated(**changes) if changes else config
