"""Regular expressions of a stranger, tried where they can be stopped before they are used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rq4lens.errors import UserError
from rq4lens.files import short_reason, short_value

MAX_SECONDS = 10.0
"""For all patterns and names together; honest ones take hundredths."""

WORKER = Path(__file__).with_name("pattern_worker.py")
PLAIN = re.compile(r"[\w.-]*")
"""What is a name and no pattern; it is not tried."""


def require_quick(patterns: Mapping[str, str], names: Sequence[str], source: str) -> None:
    """Refuse patterns that are broken, or that some name would keep busy for ever.

    Args:
        patterns: Regular expressions by what the error calls them.
        names: What they will be matched against.
        source: Where they come from, for the error.

    Raises:
        UserError: One of them is broken, or takes too long.
    """
    tried = {what: text for what, text in patterns.items() if not PLAIN.fullmatch(text)}
    answers = _try(list(tried.values()), names) if tried else []
    for number, (what, text) in enumerate(tried.items()):
        answer = answers[number] if number < len(answers) else "wrong it takes too long"
        if answer != "done":
            raise UserError(
                f"{what} of {source} has the pattern {short_value(text)}, which cannot be matched "
                f"({short_reason(ValueError(answer.removeprefix('wrong ')))}); write the names of "
                "the modules as a list."
            )


def _try(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    asked = json.dumps({"patterns": patterns, "names": names})
    command = [sys.executable, "-I", "-S", str(WORKER)]
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=MAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as late:
        return _lines(late.stdout)
    return _lines(done.stdout)


def _lines(output: str | bytes | None) -> list[str]:
    text = output.decode() if isinstance(output, bytes) else output or ""
    return text.splitlines()
