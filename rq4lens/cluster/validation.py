"""A validation from settings to files; its planted pairs are kept, so that it can go on."""

from __future__ import annotations

from pathlib import Path

from rq4lens.cluster.launch import validate_on_cluster
from rq4lens.cluster.many import Cluster
from rq4lens.disk.files import refuse_no_file, write_json_atomic
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.progress import Stage, silent
from rq4lens.validation.suite import ValidationRequest, validation_text


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
