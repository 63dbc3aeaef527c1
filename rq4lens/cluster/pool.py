"""Ray: a connection to a cluster, and workers that come and go.

This is the only file that imports Ray. Tasks of a worker that is lost are given out again.
"""

from __future__ import annotations

import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from rq4lens.cluster.many import AUTO, LOCAL, LOOPBACK, LOOPBACK_SWITCH, Cluster
from rq4lens.errors import UserError

CONNECT_SECONDS = 10.0

LOCAL_OBJECT_STORE_BYTES = 100 * 2**20
"""Results travel through the run directory, so that next to nothing is kept by Ray."""

MAX_LOSSES = 3
"""Workers that one task, or starting alone, may cost before it is given up."""

PATIENCE_SECONDS = 900.0
"""How long nothing may be at work before the wait for free machines ends."""

_LOOK_EVERY_SECONDS = 1.0


class Pool:
    """A number of workers, actors that ``open``, kept up as long as the cluster has room."""

    def __init__(self, start: Callable[[], ActorHandle], size: int) -> None:
        self.size = size
        self.lost = 0
        self._start = start
        self._opening: dict[Any, ActorHandle] = {}
        self._idle: list[ActorHandle] = []
        self._busy: dict[Any, tuple[ActorHandle, Any]] = {}
        self._ready: dict[ActorHandle, Hashable] = {}
        self._losses: Counter[Hashable] = Counter()

    def run(
        self,
        method: str,
        tasks: Iterable[Any],
        done: Callable[[Any], object] | None = None,
        needs: Callable[[Any], Hashable] = lambda _: None,
    ) -> None:
        """Have every task done once, by whichever worker is free."""
        left, worked = deque(tasks), time.monotonic()
        while left or self._busy:
            self._hire(len(left) + len(self._busy))
            while left and self._idle:
                worker = self._idle.pop()
                task = self._take(worker, left, needs)
                self._busy[getattr(worker, method).remote(task)] = (worker, task)
            if self._busy:
                worked = time.monotonic()
            self._refuse_to_wait_forever(time.monotonic() - worked)
            for reference in self._finished():
                if reference in self._opening:
                    self._opened(reference)
                else:
                    self._collect(reference, left, done)

    def ask(self, method: str, task: Any = None) -> Any:
        """What one worker says of one task."""
        said: list[Any] = []
        self.run(method, [task], said.append)
        return said[0]

    def _take(self, worker: ActorHandle, left: deque[Any], needs: Callable[[Any], Hashable]) -> Any:
        """The task that suits a worker best: what it has ready, else what nobody else has."""
        others = {needs(task) for _, task in self._busy.values()}

        def cost(task: Any) -> int:
            need = needs(task)
            return 0 if self._ready.get(worker) == need else 2 if need in others else 1

        task = min(left, key=cost)
        left.remove(task)
        self._ready[worker] = needs(task)
        return task

    def close(self) -> None:
        """Let all workers go, whatever they are doing."""
        workers = [*self._opening.values(), *self._idle, *(each for each, _ in self._busy.values())]
        for worker in workers:
            with suppress(RayError):
                ray.kill(worker)
        self._opening, self._idle, self._busy = {}, [], {}

    def shrink(self, size: int) -> None:
        """Go on with fewer workers; called when none is busy."""
        self.size = size
        while len(self._idle) > size:
            ray.kill(self._idle.pop())

    def _hire(self, wanted: int) -> None:
        there = len(self._opening) + len(self._idle) + len(self._busy)
        for _ in range(there, min(self.size, wanted)):
            worker = self._start()
            self._opening[worker.open.remote()] = worker

    def _finished(self) -> list[Any]:
        references = [*self._busy, *self._opening]
        if not references:
            return []
        ready, _ = ray.wait(references, num_returns=1, timeout=_LOOK_EVERY_SECONDS)
        return list(ready)

    def _opened(self, reference: Any) -> None:
        worker = self._opening.pop(reference)
        try:
            _result(reference)
        except RayActorError:
            self._count_loss("starting")
        else:
            self._idle.append(worker)

    def _collect(
        self, reference: Any, left: deque[Any], done: Callable[[Any], object] | None
    ) -> None:
        worker, task = self._busy.pop(reference)
        try:
            result = _result(reference)
        except RayActorError:
            # Whatever the worker had finished is in the store; the rest is measured elsewhere.
            self._count_loss(task)
            left.appendleft(task)
        else:
            self._idle.append(worker)
            if done is not None:
                done(result)

    def _count_loss(self, what: Hashable) -> None:
        self.lost += 1
        self._losses[what] += 1
        if self._losses[what] >= MAX_LOSSES * (self.size if what == "starting" else 1):
            raise UserError(
                f"{self._losses[what]} workers were lost at the same place ({what}): they may run "
                "out of memory; give each more with --gpus-per-worker, or use a smaller dtype. "
                "What is finished is kept."
            )

    def _refuse_to_wait_forever(self, idle_seconds: float) -> None:
        if idle_seconds > PATIENCE_SECONDS:
            raise UserError(
                f"no worker could be started for {idle_seconds:.0f} s: the cluster offers "
                f"{dict(ray.available_resources())}; ask for less with --gpus-per-worker or "
                "--workers, or add machines. What is finished is kept."
            )


def _result(reference: Any) -> Any:
    """What a worker gave back; what it refused is raised here in its own words."""
    try:
        return ray.get(reference)
    except RayTaskError as problem:  # its text is the worker's traceback
        if isinstance(problem.cause, UserError):
            raise UserError(str(problem.cause)) from None
        raise


@contextmanager
def workers(
    cluster: Cluster, kind: type, size: int, arguments: Callable[[], tuple[Any, ...]]
) -> Iterator[Pool]:
    """A pool of actors of a class; all are let go at the end."""
    actor: Any = ray.remote(kind).options(num_cpus=1, num_gpus=gpus_of(cluster), max_restarts=0)
    pool = Pool(lambda: actor.remote(*arguments()), size)
    try:
        yield pool
    finally:
        pool.close()


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
    fitting = have.get("GPU", 0) / gpus if gpus else have.get("CPU", 1)
    return max(1, min(int(fitting), n_pieces))


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
