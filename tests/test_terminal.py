"""Progress: seen on a terminal, a line a stage elsewhere, and gone when the work is done."""

import logging
import os
import re
import subprocess
import sys
import warnings
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from rich.console import Console

from rq4lens import cli
from rq4lens.errors import UserError
from rq4lens.screen import terminal


@pytest.fixture
def console(monkeypatch):
    """Stands for a terminal that shows what is printed on stderr."""

    def make(is_terminal):
        text = StringIO()
        monkeypatch.setattr(
            terminal, "errors", Console(file=text, force_terminal=is_terminal, width=100)
        )
        return text

    return make


def test_a_log_has_one_line_a_stage(console):
    """In a pipe or a log there is no bar, and nothing that would draw one: a stage is one line."""
    text = console(False)
    with terminal.watched("load") as progress:
        assert progress is None
    with terminal.watched("grid", 12_800):
        pass
    first, second = text.getvalue().splitlines()
    assert re.fullmatch(r"rq4lens: load, \d+\.\d s", first)
    assert re.fullmatch(r"rq4lens: grid, 12,800 rows, \d+\.\d s", second)


def test_a_stage_that_fails_leaves_its_sentence_alone(console):
    """What is said of it is the one sentence that names the fault."""
    text = console(False)
    with pytest.raises(UserError), terminal.watched("load"):
        raise UserError("no such model.")
    assert text.getvalue() == ""


def test_a_terminal_sees_the_work_go_on(console):
    """The name of the stage and how many of its rows are done."""
    text = console(True)
    with terminal.watched("grid", 10) as progress:
        progress(4)
        progress(6)
    assert "grid" in text.getvalue()
    assert "10/10" in text.getvalue()


def test_a_stage_without_rows_has_a_spinner(console):
    """Nothing is counted, so nothing is to be called."""
    text = console(True)
    with terminal.watched("load") as progress:
        assert progress is None
    assert "load" in text.getvalue()


def test_an_exception_passes_through(console):
    """The bar goes away and the exception arrives."""
    console(True)
    with pytest.raises(KeyboardInterrupt), terminal.watched("grid", 10):
        raise KeyboardInterrupt


# --- what is printed, wherever it goes


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_an_encoding_does_not_hold_is_replaced(monkeypatch, encoding):
    """A log without Greek letters is no reason to end with a traceback."""
    text = TextIOWrapper(BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", text)
    monkeypatch.setattr(cli, "app", lambda **_: terminal.output.print("ΔKL 0.1"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert text.buffer.getvalue() == b"?KL 0.1\n"


def pairs(redirected, **environment):
    """The exit code and stderr of `rq4lens pairs` behind a redirection."""
    line = f"{sys.executable} -m rq4lens pairs {redirected}"
    return subprocess.run(
        ["sh", "-c", line],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_output_that_takes_nothing_is_one_sentence():
    """A full disk behind stdout is said in a sentence, a closed stdout not at all."""
    full = pairs(">/dev/full", PYTHONUNBUFFERED="1")
    assert full.returncode == 1
    (sentence,) = full.stderr.splitlines()
    assert "cannot print the result (No space left on device)" in sentence
    assert pairs(">&-").stderr == ""


def test_a_terminal_without_columns_is_of_usual_width():
    """COLUMNS=0 is what some terminals say before they know."""
    usual = pairs("", COLUMNS="80").stdout
    assert pairs("", COLUMNS="0").stdout == usual != ""


def test_a_folder_that_cannot_be_used_is_one_sentence(monkeypatch, capsys):
    """The cache of a compiler, for instance, may be set to a place that is not open."""

    def fail(**_):
        raise PermissionError(13, "Permission denied", "/cache")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "rq4lens: cannot use '/cache' (Permission denied)" in capsys.readouterr().err


def test_a_warning_is_one_line(monkeypatch, capsys):
    """No path, no source line; those for developers of libraries are silent."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    with warnings.catch_warnings():
        terminal.show_log(verbose=False)
        warnings.warn("few\n  prompts", stacklevel=1)
        warnings.warn("it will change", FutureWarning, stacklevel=1)
        logging.getLogger("rq4lens.x").warning("WARNING: only 3")
        logging.getLogger("rq4lens.x").info("found again")
    assert capsys.readouterr().err.splitlines() == [
        "rq4lens: warning: few prompts",
        "rq4lens: warning: only 3",
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_imports_are_shown_to_a_person_alone(console, is_terminal):
    """In a log an error sentence stands first, and alone."""
    text = console(is_terminal)
    with terminal.starting():
        pass
    assert ("start" in text.getvalue()) is is_terminal
