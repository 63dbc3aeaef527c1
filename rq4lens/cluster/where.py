"""Where a job runs: a Ray cluster, as the user names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rq4lens.errors import UserError

LOCAL = "local"
AUTO = "auto"
LOOPBACK = "127.0.0.1"
LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's own switch for a machine that is no part of a cluster. Where it is off, Ray's servers bind
to the loopback address; elsewhere they replace 127.0.0.1 by an address that others can reach."""


@dataclass(frozen=True)
class Cluster:
    """Where to run, and with how many workers.

    Args:
        address: ``"local"`` starts Ray on this machine alone; ``"auto"`` finds the cluster that
            this machine belongs to; anything else is a cluster's address.
        workers: how many workers; as many as fit when left out.
        gpus_per_worker: GPUs of each worker, also a part of one; by default one where there are
            any. With several, the layers of a model are spread over them.
        cpus_per_worker: processor cores, and threads, of each worker.

    Raises:
        UserError: if a number does not make sense.
    """

    address: str = LOCAL
    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: int = 1

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UserError(f"{self.workers} workers measure nothing: ask for at least 1.")
        gpus = self.gpus_per_worker or 0.0
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise UserError(
                f"--gpus-per-worker {gpus:g} cannot be had: ask for a part of one GPU, such as "
                "0.5, or for 1, 2, 3, ..."
            )


def environment(cluster: Cluster) -> Mapping[str, str]:
    """Environment variables that Ray reads once, when it is imported."""
    values = {"RAY_USAGE_STATS_ENABLED": "0"}
    return {**values, LOOPBACK_SWITCH: "0"} if cluster.address == LOCAL else values
