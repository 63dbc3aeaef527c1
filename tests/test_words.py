"""One noun, one meaning, one home: the list of docs/method.md and the classes of the package."""

import ast
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rq4lens"
ROW = re.compile(r"^\| ([a-z ]+) \| [^|]+ \| `(\w+)` \| `([\w/]+\.py)` \|$", re.MULTILINE)
WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z][a-z0-9]*|[A-Z]+")


class Noun(NamedTuple):
    """A row of the list."""

    noun: str
    name: str
    file: str


def nouns():
    """The nouns of the method page, with their classes and files."""
    return [Noun(*row) for row in ROW.findall((ROOT / "docs" / "method.md").read_text("utf-8"))]


def public_classes():
    """Every public class of the package, with its file."""
    return [
        (node.name, str(path.relative_to(PACKAGE)))
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]


def last_word(name):
    """The noun that a class is called by: the last word of its name."""
    return WORD.findall(name)[-1].lower()


def test_the_list_is_read():
    """An empty list would pass everything."""
    assert {"pair", "run", "head set", "estimate"} <= {each.noun for each in nouns()}


def test_every_noun_has_one_meaning_and_its_home():
    """No noun and no class stands twice in the list, and each class is where it says."""
    listed = nouns()
    for column in ("noun", "name"):
        counted = Counter(getattr(each, column) for each in listed)
        assert [what for what, n in counted.items() if n > 1] == []
    assert {(each.name, each.file) for each in listed} - set(public_classes()) == set()


def test_no_noun_has_a_second_class():
    """A class whose name ends in a listed noun is the one of the list."""
    listed = nouns()
    taken = {each.noun for each in listed}
    known = {each.name for each in listed}
    second = [(name, file) for name, file in public_classes() if last_word(name) in taken]
    assert [each for each in second if each[0] not in known] == []


def test_no_two_public_classes_share_a_name():
    """A name means one thing in the whole package."""
    counted = Counter(name for name, _ in public_classes())
    assert [name for name, n in counted.items() if n > 1] == []


def test_a_study_is_a_study_file():
    """The job of `rq4lens run` is a run; what is called a study is in the room of study files."""
    named = [(name, file) for name, file in public_classes() if "Study" in WORD.findall(name)]
    assert [each for each in named if not each[1].startswith("studies/")] == []
