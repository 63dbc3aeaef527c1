"""Studies: every cell measured, by one process or many, and one report that compares them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rq4lens.cluster.launch import finish_on_cluster
from rq4lens.cluster.many import WHOLE, Many
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
from rq4lens.patching.keys import NamedIngredients
from rq4lens.studies.file import STUDY, Cell, StudyPlan, read_study
from rq4lens.studies.report import write_study_report

FINISHED = "finished"


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
    cells = _Cells(directory, fresh)
    left = {cell.directory(directory): cell for cell in plan.cells if not cells.has(cell)}
    if many.cluster is not None and left:
        requests = {own: cell.request for own, cell in left.items()}
        finish_on_cluster(
            requests, many.where, lambda own: cells.mark(left[own]), fresh=fresh, stage=stage
        )
    else:
        for place, cell in enumerate(left.values(), start=1):
            cells.finish(cell, _named(f"{place}/{len(left)} {cell.name}", stage))
    return write_study_report(plan, directory)


class _Cells:
    """The finished cells of a study's directory."""

    def __init__(self, directory: Path, fresh: bool = False) -> None:
        self.directory = directory
        self.fresh = fresh
        self._marks = Store(directory / FINISHED, fresh)

    def has(self, cell: Cell) -> bool:
        marked = self._marks.get(self._finished(cell)) is not None
        return marked and (cell.directory(self.directory) / LAYERS).is_file()

    def mark(self, cell: Cell) -> None:
        self._marks.put(self._finished(cell), {})

    def finish(self, cell: Cell, stage: Stage) -> None:
        request, own = cell.request, cell.directory(self.directory)
        finish(request, Bench(request.config, own, fresh=self.fresh, stage=stage))
        self.mark(cell)

    @staticmethod
    def _finished(cell: Cell) -> NamedIngredients:
        """Everything that decides what a cell measures."""
        request = cell.request
        config = request.config.model_dump(mode="json", exclude={"about"})
        layers = None if request.layers is None else list(request.layers)
        return NamedIngredients(cell.name, {"config": config, "layers": layers})


def _named(name: str, stage: Stage) -> Stage:
    """Stages that say which cell they are of."""
    return lambda what, rows: stage(f"{name}: {what}", rows)


def _run_share(plan: StudyPlan, directory: Path, many: Many, *, fresh: bool, stage: Stage) -> str:
    """A share of a study is a stretch of its cells end to end: few of them, so few models.

    A cell that lies in it as a whole is finished here, and leaves nothing to merge.
    """
    share, cells, said = many.sharing.share, _Cells(directory, fresh), []
    for place, cell in enumerate(plan.cells):
        part = share.within(place, len(plan.cells))
        if part is None:
            continue
        if part == WHOLE:
            if not cells.has(cell):
                cells.finish(cell, stage)
            said.append(f"{cell.name}: finished\n")
            continue
        sharing = replace(many.sharing, part=part, study=directory)
        own = cell.directory(directory)
        done = run_shard(cell.request, own, sharing, fresh=fresh, stage=stage)
        said.append(f"{cell.name}: {done}")
    return "".join(said) or f"share {share} has nothing to measure\n"


def merge(directory: Path, *, trust_remote_code: bool = False, stage: Stage = silent) -> str:
    """Merge the shares of a run, of a sweep or of a study, whichever the directory holds."""
    if not (directory / STUDY).is_file():
        return merge_job(directory, trust_remote_code=trust_remote_code, stage=stage)
    plan, cells = read_study(directory / STUDY), _Cells(directory)
    for place, cell in enumerate(plan.cells):
        if cells.has(cell):
            continue
        own = cell.directory(directory)
        if not (own / JOB).is_file():
            raise UserError(f"{cell.name!r} was not begun: run the share that holds it again.")
        merge_job(
            own,
            place=place,
            n_lists=len(plan.cells),
            trust_remote_code=trust_remote_code,
            stage=stage,
        )
        cells.mark(cell)
    return write_study_report(plan, directory)


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
        write_json_atomic(own / CELL, {"config": cell.request.config.flat()})
