"""Progress on a terminal; silence everywhere else."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Names of files, pairs and prompts are printed as they are: nothing in them is markup, and no line
# is broken where the output is not a terminal but a file of no width.
errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
output = Console(highlight=False, markup=False, soft_wrap=True)


@contextmanager
def watched(name: str, rows: int | None = None) -> Iterator[Callable[[int], None] | None]:
    """Show a stage of the work while it lasts: a bar where its rows are counted, else a spinner."""
    if not errors.is_terminal:
        yield None
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    if rows is not None:
        columns[2:] = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")]
        columns += [TimeRemainingColumn()]
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(name, total=rows, rate="")

        def report(finished: int) -> None:
            speed = progress.tasks[task].speed
            # Few and large pieces of work have no rate worth reading.
            rate = "" if speed is None or speed < 1 else f"{speed:,.0f} rows/s"
            progress.update(task, advance=finished, rate=rate)

        yield report if rows is not None else None


@contextmanager
def kept_when_stopped(directory: Path | None) -> Iterator[None]:
    """Let Ctrl-C end a job in one sentence that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "nothing is kept without --out"
        if directory is not None:
            again = shlex.join(["rq4lens", *(each for each in sys.argv[1:] if each != "--fresh")])
            kept = f"what is finished is kept in {directory}; go on with: {again}"
        errors.print(f"stopped; {kept}")
        raise typer.Exit(130) from None
