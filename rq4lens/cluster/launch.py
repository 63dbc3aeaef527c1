"""The way to Ray, which is an extra and is imported only when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rq4lens.cluster.many import Cluster, Division, Many, environment
from rq4lens.cluster.pieces import Request, Shard
from rq4lens.cluster.shards import run_shard
from rq4lens.errors import UserError
from rq4lens.jobs.progress import Stage, silent
from rq4lens.validation.suite import Validation, ValidationRequest


def measure_shared(
    many: Many, request: Request, directory: Path, *, fresh: bool = False, stage: Stage = silent
) -> str:
    """Measure one share, or everything on a cluster, as the command line asked for it."""
    shared: dict[str, Any] = {"division": many.division, "fresh": fresh, "stage": stage}
    if many.shard is not None:
        return run_shard(request, directory, Shard.parse(many.shard), **shared)
    return run_on_cluster(request, directory, many.where, **shared)


def run_on_cluster(
    request: Request,
    directory: Path,
    cluster: Cluster,
    *,
    division: Division = "auto",
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
        division: whether prompts are divided too, if the job is not begun yet.
        fresh: measure again what is there.
        stage: opens a stage of the work, for progress bars.

    Returns:
        What the console prints.

    Raises:
        UserError: if Ray is not installed, or the request does not fit the pair or the cluster.
    """
    run = _with_ray(cluster, "ray_job").run
    return run(request, directory, cluster, division=division, fresh=fresh, stage=stage)


def finish_on_cluster(
    requests: Mapping[Path, Request],
    cluster: Cluster,
    done: Callable[[Path], None],
    *,
    division: Division = "auto",
    fresh: bool = False,
    stage: Stage = silent,
) -> None:
    """Measure several jobs on a Ray cluster, and write the results of each.

    Where there are at least as many jobs as workers, each worker does whole ones, so that a pair is
    loaded once; otherwise all workers share one job after the other.

    Raises:
        UserError: as for :func:`run_on_cluster`.
    """
    run_all = _with_ray(cluster, "ray_job").run_all
    run_all(requests, cluster, done, division=division, fresh=fresh, stage=stage)


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
    validate = _with_ray(cluster, "validation_ray").validate
    validation: Validation = validate(request, directory, cluster, fresh=fresh, stage=stage)
    return validation


def _with_ray(cluster: Cluster, module: str) -> Any:
    """A module that imports Ray, once Ray's switches are set."""
    if find_spec("ray") is None:
        raise UserError(
            "--cluster needs Ray, which is not installed: pip install 'rq4lens[cluster]'."
        )
    os.environ.update(environment(cluster))
    return import_module(f"rq4lens.cluster.{module}")
