"""Studies: every cell measured, by one process or many, and one report that compares them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rq4lens.cluster.launch import finish_on_cluster
from rq4lens.cluster.many import Many
from rq4lens.cluster.pieces import WHOLE, Shard
from rq4lens.cluster.shards import finish, merge_job, run_shard
from rq4lens.disk.files import (
    make_directory,
    read_regular_file,
    remove_leftovers,
    write_json_atomic,
    write_text_atomic,
)
from rq4lens.disk.run import CELL, JOB, LAYERS
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Stage, silent
from rq4lens.studies.file import STUDY, Cell, StudyPlan, read_study
from rq4lens.studies.report import write_study_report

FINISHED = "finished"


@dataclass(frozen=True)
class _Finished:
    """Says that a cell's results were written.

    Args:
        cell: the cell.
    """

    cell: Cell

    @property
    def label(self) -> str:
        """The cell's name."""
        return self.cell.name

    def to_dict(self) -> dict[str, Any]:
        """What the cell measured."""
        request = self.cell.request
        return {
            "config": request.config.model_dump(mode="json", exclude={"about"}),
            "layers": None if request.layers is None else list(request.layers),
        }


def run_study_file(
    plan: StudyPlan,
    directory: Path,
    many: Many | None = None,
    *,
    fresh: bool = False,
    stage: Stage = silent,
) -> str:
    """Measure a study and write its report.

    Finished cells are not measured again. One share of many leaves the report to ``merge``.

    Args:
        plan: the study.
        directory: the study's directory.
        many: how the work is shared out; one process does it all when left out.
        fresh: measure everything again.
        stage: opens a stage of the work, for progress bars.

    Returns:
        What the console prints.

    Raises:
        UserError: if the directory holds another study, or a cell cannot be measured.
    """
    many = many or Many()
    _join(plan, directory)
    if many.shard is not None:
        return _run_share(plan, directory, many, fresh=fresh, stage=stage)
    marks = Store(directory / FINISHED, fresh=fresh)
    left = {
        own: cell
        for cell in plan.cells
        if not _is_finished(cell, own := cell.directory(directory), marks)
    }

    def done(own: Path) -> None:
        marks.put(_Finished(left[own]), {})

    if many.cluster is not None and left:
        requests = {own: cell.request for own, cell in left.items()}
        finish_on_cluster(
            requests, many.where, done, division=many.division, fresh=fresh, stage=stage
        )
    else:
        for place, (own, cell) in enumerate(left.items(), start=1):
            named = _named(f"{place}/{len(left)} {cell.name}", stage)
            finish(cell.request, Bench(cell.request.config, own, fresh=fresh, stage=named))
            done(own)
    return write_study_report(plan, directory)


def _is_finished(cell: Cell, directory: Path, marks: Store) -> bool:
    return marks.get(_Finished(cell)) is not None and (directory / LAYERS).is_file()


def _named(name: str, stage: Stage) -> Stage:
    """Stages that say which cell they are of."""

    def open_stage(what: str, rows: int | None) -> Any:
        return stage(f"{name}: {what}", rows)

    return open_stage


def _run_share(plan: StudyPlan, directory: Path, many: Many, *, fresh: bool, stage: Stage) -> str:
    """A share of a study is a stretch of its cells end to end: few of them, so few models.

    A cell that lies in it as a whole is finished here, and leaves nothing to merge.
    """
    shard = Shard.parse(many.shard or "")
    marks, said = Store(directory / FINISHED, fresh=fresh), []
    for place, cell in enumerate(plan.cells):
        part = shard.share.within(place, len(plan.cells))
        if part is None:
            continue
        own = cell.directory(directory)
        if part == WHOLE:
            if not _is_finished(cell, own, marks):
                finish(cell.request, Bench(cell.request.config, own, fresh=fresh, stage=stage))
                marks.put(_Finished(cell), {})
            said.append(f"{cell.name}: finished\n")
            continue
        told = run_shard(
            cell.request,
            own,
            shard,
            share=part,
            study=directory,
            division=many.division,
            fresh=fresh,
            stage=stage,
        )
        said.append(f"{cell.name}: {told}")
    return "".join(said) or f"share {shard.number}/{shard.count} has nothing to measure\n"


def merge_study(directory: Path, *, trust_remote_code: bool = False, stage: Stage = silent) -> str:
    """Check that all pieces of all cells are there, write each cell's results, and the report.

    Raises:
        UserError: if pieces are missing; the sentence names the first cell that lacks some.
    """
    plan = read_study(directory / STUDY)
    marks = Store(directory / FINISHED)
    for place, cell in enumerate(plan.cells):
        own = cell.directory(directory)
        if _is_finished(cell, own, marks):
            continue
        if not (own / JOB).is_file():
            raise UserError(f"{cell.name!r} was not begun: run the share that holds it again.")
        merge_job(
            own,
            place=place,
            n_lists=len(plan.cells),
            trust_remote_code=trust_remote_code,
            stage=stage,
        )
        marks.put(_Finished(cell), {})
    return write_study_report(plan, directory)


def merge(directory: Path, *, trust_remote_code: bool = False, stage: Stage = silent) -> str:
    """Merge the shares of a run, of a sweep or of a study, whichever the directory holds.

    Raises:
        UserError: if pieces are missing.
    """
    merged = merge_study if (directory / STUDY).is_file() else merge_job
    return merged(directory, trust_remote_code=trust_remote_code, stage=stage)


def _join(plan: StudyPlan, directory: Path) -> None:
    """Keep the study's file beside its results; another study is refused."""
    remove_leftovers(directory)
    path = directory / STUDY
    if not path.exists():
        make_directory(directory)
        write_text_atomic(path, plan.text)
    elif {cell.name for cell in read_study(path).cells} - {cell.name for cell in plan.cells}:
        raise UserError(
            f"{str(directory)!r} holds another study: choose another --out, or delete it."
        )
    elif read_regular_file(path) != plan.text:
        write_text_atomic(path, plan.text)  # cells were added or settings changed
    for cell in plan.cells:
        own = cell.directory(directory)
        make_directory(own)
        settings = cell.request.config.flat()
        write_json_atomic(own / CELL, {"config": settings})
