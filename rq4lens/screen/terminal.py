"""What a terminal shows: text, tables, progress, warnings of one line, no traceback of its own."""

from __future__ import annotations

import io
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, JustifyMethod, OverflowMethod, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

USUAL_WIDTH = 80


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)
    if console.width < 1:  # COLUMNS=0
        console.width = USUAL_WIDTH
    return console


# Names of files, pairs and prompts are printed as they are: nothing in them is markup, and no line
# is broken where the output is not a terminal but a file of no width.
errors = _console(stderr=True)
output = _console()


class _Lines(logging.Handler):
    """Log records on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if record.levelno >= logging.WARNING:
            said = f"rq4lens: warning: {said.removeprefix('WARNING: ')}"
        errors.print(said)


def show_log(verbose: bool) -> None:
    """Print warnings as ``rq4lens: warning: ...``, and what is reused or computed if asked for."""
    logging.basicConfig(level=logging.WARNING, handlers=[_Lines()])
    logging.getLogger("rq4lens").setLevel(logging.INFO if verbose else logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # for those who change the code
    warnings.showwarning = _log_warning


def _log_warning(message: Warning | str, *_where: Any, **_rest: Any) -> None:
    logging.getLogger("py.warnings").warning("%s", " ".join(str(message).split()))


def replace_unprintable() -> None:
    """Let what the encoding of stdout does not hold be replaced, instead of ending the work."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def output_problem(probe: str = "") -> str | None:
    """Why stdout takes nothing more, as on a full disk; None if it does. It is then let go."""
    try:
        if sys.stdout is not None:
            sys.stdout.write(probe)
            sys.stdout.flush()
    except OSError as problem:
        # The interpreter would try once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return problem.strerror or type(problem).__name__
    return None


def say(text: str, *written: Path) -> None:
    """Print a text of whole lines, and which files or folders were written."""
    output.print(text, end="")
    for path in written:
        output.print(f"written to {path}")


def show(parts: Sequence[RenderableType], **columns: int) -> None:
    """Print sentences and tables as wide as the terminal; as plain text where there is none."""
    if output.is_terminal:
        for part in parts:
            output.print(part, soft_wrap=False)
    else:
        output.print(text_of(parts, **columns), end="")


WIDTH = 100
"""Columns after which sentences are broken."""

UNCUT = 10_000


def text_of(parts: Sequence[RenderableType], *, sentences: int = WIDTH, tables: int = UNCUT) -> str:
    """Sentences and tables, each of so many columns at most, as plain text."""
    text = io.StringIO()
    # In a notebook rich would display the text, or colour it, instead of writing it as it is.
    console = Console(file=text, width=UNCUT, force_jupyter=False, color_system=None)
    for part in parts:
        console.print(part, width=sentences if isinstance(part, Text) else tables)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def table_of(
    names: Sequence[str],
    rows: Iterable[Sequence[RenderableType]] = (),
    caption: str | None = None,
    *,
    others: JustifyMethod = "right",
    no_wrap: bool = False,
    fold: bool = False,
) -> Table:
    """A table without lines; all columns but the first are aligned alike."""
    table = Table(box=None, pad_edge=False, header_style="bold", caption=caption)
    table.caption_justify = "left"
    overflow: OverflowMethod = "fold" if fold else "ellipsis"
    for place, name in enumerate(names):
        justify: JustifyMethod = others if place else "left"
        table.add_column(name, justify=justify, no_wrap=no_wrap, overflow=overflow)
    for row in rows:
        table.add_row(*row)
    return table


def printable(text: str) -> str:
    """Text of one line on any terminal: line breaks and control characters are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


UNITS = {"analysis": "parts", "cards": "cards", "validate": "pairs"}
"""What is counted in the stages that do not count rows."""


@contextmanager
def watched(name: str, rows: int | None = None) -> Iterator[Callable[[int], None] | None]:
    """Show a stage of the work while it lasts: a bar where its rows are counted, else a spinner.

    Without a terminal it is one line when it is done; what fails is one sentence then, too.
    """
    unit = UNITS.get(name, "rows")
    if not errors.is_terminal:
        started = time.perf_counter()
        yield None
        seconds = time.perf_counter() - started
        errors.print(
            f"rq4lens: {name}{'' if rows is None else f', {rows:,} {unit}'}, {seconds:.1f} s"
        )
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
            rate = "" if speed is None or speed < 1 else f"{speed:,.0f} {unit}/s"
            progress.update(task, advance=finished, rate=rate)

        yield report if rows is not None else None


def starting() -> AbstractContextManager[Any]:
    """Show that imports take their time; without a terminal nothing stands before an error."""
    return watched("start") if errors.is_terminal else nullcontext()


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
