"""Jobs and validations on Ray, which is an extra and is imported only when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rq4lens.cluster.many import LOCAL, LOOPBACK_SWITCH, Cluster
from rq4lens.cluster.pieces import Request
from rq4lens.disk.files import refuse_no_file, write_json_atomic
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.progress import Stage, silent
from rq4lens.validation.suite import Validation, ValidationRequest, validation_text


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
    return str(_with_ray(cluster).run(request, directory, cluster, fresh, stage))


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
    _with_ray(cluster).run_all(requests, cluster, done, fresh, stage)


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
    found: Validation = _with_ray(cluster).validate(request, directory, cluster, fresh, stage)
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
    """The module that imports Ray, once the switches are set that Ray reads at its import."""
    if find_spec("ray") is None:
        raise UserError(
            "--cluster needs Ray, which is not installed: pip install 'rq4lens[cluster]'."
        )
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if cluster.address == LOCAL:
        os.environ[LOOPBACK_SWITCH] = "0"
    return import_module("rq4lens.cluster.ray_job")
