"""Several processes for one command, as the command line asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rq4lens.cluster.division import Division, checked_division
from rq4lens.cluster.where import LOCAL, Cluster
from rq4lens.errors import UserError
from rq4lens.stages import Stage, silent

if TYPE_CHECKING:  # the rest imports torch, which the command line's help must not wait for
    from rq4lens.cluster.pieces import Request


@dataclass(frozen=True)
class Many:
    """How the work is shared out, if at all.

    Args:
        shard: one share, as ``"2/4"``.
        cluster: ``"local"``, ``"auto"`` or the address of a Ray cluster.
        workers: workers of the cluster.
        gpus_per_worker: GPUs of each.
        divide: ``"conditions"``, ``"prompts"`` or ``"auto"``.

    Raises:
        UserError: if the settings contradict each other.
    """

    shard: str | None = None
    cluster: str | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None
    divide: str = "auto"

    def __post_init__(self) -> None:
        if self.shard is not None and self.cluster is not None:
            raise UserError(
                "--shard and --cluster are two ways of the same: give one of them; a cluster "
                "shares the work out by itself."
            )
        if self.cluster is None and (self.workers, self.gpus_per_worker) != (None, None):
            raise UserError(
                "--workers and --gpus-per-worker are of a cluster: give --cluster local too."
            )
        if checked_division(self.divide) != "auto" and not self.asked:
            raise UserError(
                "--divide says how work is shared out: give --shard I/N or --cluster local too."
            )

    @property
    def asked(self) -> bool:
        """Whether the work is shared out at all."""
        return self.shard is not None or self.cluster is not None

    @property
    def division(self) -> Division:
        """What was asked for of the prompts."""
        return checked_division(self.divide)

    @property
    def where(self) -> Cluster:
        """The cluster that was asked for; this machine if none was."""
        return Cluster(self.cluster or LOCAL, self.workers, self.gpus_per_worker)

    def measure(
        self, request: Request, directory: Path, *, fresh: bool = False, stage: Stage = silent
    ) -> str:
        """Measure one share, or everything on a cluster.

        Args:
            request: what is measured.
            directory: the run directory.
            fresh: measure again what is there.
            stage: opens a stage of the work, for progress bars.

        Returns:
            What the console prints.
        """
        from rq4lens.cluster.launch import run_on_cluster  # noqa: PLC0415 - see above
        from rq4lens.cluster.pieces import Shard  # noqa: PLC0415
        from rq4lens.cluster.shards import run_shard  # noqa: PLC0415

        if self.shard is not None:
            shard = Shard.parse(self.shard)
            return run_shard(
                request, directory, shard, division=self.division, fresh=fresh, stage=stage
            )
        return run_on_cluster(
            request, directory, self.where, division=self.division, fresh=fresh, stage=stage
        )
