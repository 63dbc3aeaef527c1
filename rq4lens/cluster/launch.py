"""The way to Ray, which is an extra and is imported only when it is asked for."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from rq4lens.cluster.pieces import Request
from rq4lens.cluster.where import Cluster, environment
from rq4lens.errors import UserError
from rq4lens.stages import Stage, silent


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
    if find_spec("ray") is None:
        raise UserError(
            "--cluster needs Ray, which is not installed: pip install 'rq4lens[cluster]'."
        )
    os.environ.update(environment(cluster))
    from rq4lens.cluster.ray_job import run  # noqa: PLC0415 - after Ray's switches are set

    return run(request, directory, cluster, fresh=fresh, stage=stage)
