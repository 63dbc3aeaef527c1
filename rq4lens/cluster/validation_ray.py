"""A validation on a Ray cluster: workers load the base model once and plant many pairs."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ray

from rq4lens.cluster.many import Cluster
from rq4lens.cluster.pool import Pool
from rq4lens.cluster.ray_job import anywhere, connected, gpus_of, not_shared, size_of
from rq4lens.disk.files import made_directory
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.progress import Stage, silent
from rq4lens.validation.request import ValidationRequest
from rq4lens.validation.results import Validation
from rq4lens.validation.suite import Suite


class Planter:
    """The work of one actor.

    Args:
        request: what is validated.
        directory: where planted pairs are kept, on a file system that all nodes share.
        fresh: judge again what is kept.
    """

    def __init__(self, request: ValidationRequest, directory: str, fresh: bool) -> None:
        self.request = request
        self.directory = Path(directory)
        self.fresh = fresh

    def open(self) -> None:
        """Load the base model.

        Raises:
            UserError: if this node does not see the folder, or the request does not fit the model.
        """
        if not self.directory.is_dir():
            raise UserError(not_shared(str(self.directory)))
        _ = self._suite

    @cached_property
    def _suite(self) -> Suite:
        return self.request.suite()

    def judge(self, place: int) -> int:
        """Plant a pair and judge the methods on it, or find it done."""
        self._suite.outcome(place, Store(self.directory, fresh=self.fresh))
        return 1

    def finish(self, _task: None = None) -> Validation:
        """What all planted pairs say together, from the folder."""
        return self._suite.run(Store(self.directory))


def validate(
    request: ValidationRequest,
    directory: Path,
    cluster: Cluster,
    *,
    fresh: bool = False,
    stage: Stage = silent,
) -> Validation:
    """Judge all planted pairs; see :func:`rq4lens.cluster.launch.validate_on_cluster`."""
    request = replace(request, config=anywhere(request.config, cluster))
    with connected(cluster), made_directory(directory):
        size, actor = size_of(cluster, request.n_planted), ray.remote(Planter)

        def start() -> Any:
            return actor.options(
                num_cpus=cluster.cpus_per_worker, num_gpus=gpus_of(cluster), max_restarts=0
            ).remote(request, str(directory.resolve()), fresh)

        pool = Pool(start, size)
        found: list[Validation] = []
        try:
            with stage(f"planted pairs on {size} workers", request.n_planted) as progress:
                pool.run("judge", range(request.n_planted), progress or (lambda _: None))
            with stage("results", None):
                pool.run("finish", [None], found.append)
        finally:
            pool.close()
    return found[0]
