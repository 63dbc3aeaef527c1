"""Writes the tables of docs/trust.md from the tests: ``python tests/trust_table.py``."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "trust.md"
KINDS = ("fault", "hostile")
MAX_CASES = 14
"""Cases that a row names; the others are counted."""


class Collected:
    """What pytest collects, without running it."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keep the items."""
        self.items = session.items


def rows_of(items: list[pytest.Item], kind: str) -> list[str]:
    """One row per test with the marker: what it shows, its cases, its name."""
    cases: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker(kind) is not None:
            function = item.function
            law = re.sub(r"\s+", " ", (function.__doc__ or "").strip().split("\n\n")[0])
            key = (law, item.path.name, function.__name__)
            cases[key].append(item.callspec.id if hasattr(item, "callspec") else "")
    return [
        f"| {escaped(law)} | {len(ids)} | {escaped(named(ids))} | `{path}::{name}` |"
        for (law, path, name), ids in cases.items()
    ]


def named(ids: list[str]) -> str:
    """The cases by name, as far as their names say something."""
    telling = [name for name in ids if name and not re.fullmatch(r"[\w-]*?\d+(-\d+)?", name)]
    shown = "; ".join(telling[:MAX_CASES])
    return shown + (f"; and {len(ids) - MAX_CASES} more" if len(telling) > MAX_CASES else "")


def escaped(text: str) -> str:
    """Text as a table cell of Markdown, whatever it holds."""
    text = text.replace("``", "`").replace("|", "\\|").replace("<", "&lt;")
    return "".join(c if c.isprintable() else " " for c in text)


def tables(items: list[pytest.Item]) -> dict[str, str]:
    """The table of each kind."""
    head = "| what is survived, or answered | cases | among them | test |\n|---|---:|---|---|\n"
    return {kind: head + "\n".join(rows_of(items, kind)) for kind in KINDS}


def page(old: str, items: list[pytest.Item]) -> str:
    """The page with its tables written anew."""
    for kind, table in tables(items).items():
        start, end = f"<!-- {kind}: begin -->", f"<!-- {kind}: end -->"
        before, rest = old.split(start)
        old = f"{before}{start}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    return old


def main() -> None:
    """Collect and write."""
    collected = Collected()
    pytest.main(["--collect-only"], plugins=[collected])
    PAGE.write_text(page(PAGE.read_text(), collected.items))


if __name__ == "__main__":
    sys.exit(main())
