"""Commands and options for many processes; the command line takes them from here."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from rq4lens.cluster.many import Many
from rq4lens.config import RunConfig
from rq4lens.errors import UserError
from rq4lens.screen.options import DIRECTORY, MANY
from rq4lens.screen.terminal import kept_when_stopped, output, watched

_many = partial(typer.Option, rich_help_panel=MANY)

Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh", help="Measure anew, and replace what is there.", rich_help_panel=DIRECTORY
    ),
]
Shard = Annotated[
    str | None,
    _many("--shard", metavar="I/N", help="Measure one of N shares; then `rq4lens merge`."),
]
OnCluster = Annotated[
    str | None,
    _many("--cluster", metavar="local|auto|ADDRESS", help="Measure on a Ray cluster."),
]
Workers = Annotated[int | None, _many(metavar="N", help="With --cluster: workers; as many as fit.")]
GpusPerWorker = Annotated[
    float | None, _many(metavar="X", help="With --cluster: GPUs of each worker, also 0.5.")
]
Divide = Annotated[
    str,
    _many(metavar="auto|conditions|prompts", help="Pieces of conditions, or of prompts as well."),
]


def study(
    file: Annotated[
        Path, typer.Argument(metavar="STUDY.toml", help="Pairs, layers, alphas, maps.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Study directory; runs/NAME.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it takes, from a short probe.")
    ] = False,
    fresh: Fresh = False,
    shard: Shard = None,
    cluster: OnCluster = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    divide: Divide = "auto",
) -> None:
    """Sweep several pairs, strengths and map kinds.

    They are compared in one report.
    """
    from rq4lens.studies.cost_model import plan_text  # noqa: PLC0415
    from rq4lens.studies.file import read_study  # noqa: PLC0415 - keeps --help fast
    from rq4lens.studies.job import run_study_file  # noqa: PLC0415

    many, wanted = Many(shard, cluster, workers, gpus_per_worker, divide), read_study(file)
    if plan:
        output.print(plan_text(wanted, stage=watched), end="")
        return
    directory = out or Path("runs") / file.stem
    with kept_when_stopped(directory):
        said = run_study_file(wanted, directory, many, fresh=fresh, stage=watched)
    output.print(said, end="")
    output.print(f"written to {directory}")


def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of the shares.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let a checkpoint run its own code.")
    ] = False,
) -> None:
    """Put together what shares of a job measured.

    Says which shares of the run, sweep or study are missing, if any are.
    """
    from rq4lens.studies.job import merge as merged  # noqa: PLC0415 - keeps --help fast

    output.print(merged(run, trust_remote_code=trust_remote_code, stage=watched), end="")
    output.print(f"written to {run}")


def by_many(
    command: Literal["run", "sweep"],
    config: RunConfig,
    layers: list[int] | None,
    out: Path | None,
    many: Many,
    fresh: bool,
) -> None:
    """Measure a share, or everything on a cluster, and print what became of it."""
    from rq4lens.cluster.launch import run_on_cluster  # noqa: PLC0415 - keeps --help fast
    from rq4lens.cluster.pieces import Request  # noqa: PLC0415
    from rq4lens.cluster.shards import run_shard  # noqa: PLC0415

    if out is None:
        raise UserError("several processes need one folder to meet in: name it with --out DIR.")
    request = Request(command, config, None if layers is None else tuple(layers))
    with kept_when_stopped(out):
        if many.shard is not None:
            said = run_shard(request, out, many.sharing, fresh=fresh, stage=watched)
        else:
            said = run_on_cluster(request, out, many.where, fresh=fresh, stage=watched)
    output.print(said, end="")
    output.print(f"written to {out}")
