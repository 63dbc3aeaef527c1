"""Progress: seen on a terminal, silent everywhere else, and gone when the work is done."""

from io import StringIO

import pytest
from rich.console import Console

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


def test_nothing_is_shown_where_nobody_watches(console):
    """In a pipe or a log there is no bar, and nothing that would draw one."""
    text = console(False)
    with terminal.watched("grid", 10) as progress:
        assert progress is None
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
