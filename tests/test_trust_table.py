"""The page about trust lists what the tests show, and only that."""

import re

import pytest
from trust_table import KINDS, PAGE, ROOT


def listed(kind: str) -> set[tuple[str, str]]:
    """File and name of the tests in a table of the page."""
    table = PAGE.read_text().split(f"<!-- {kind}: begin -->")[1].split(f"<!-- {kind}: end -->")[0]
    return set(re.findall(r"`(test_\w+\.py)::(test_\w+)` \|$", table, re.MULTILINE))


@pytest.mark.parametrize("kind", KINDS, ids="of {}".format)
def test_every_marked_test_is_listed(kind, request):
    """A fault or hostile input that a test shows is in the table: run tests/trust_table.py."""
    marked = {
        (item.path.name, item.function.__name__)
        for item in request.session.items
        if item.get_closest_marker(kind) is not None
    }
    assert marked <= listed(kind)


@pytest.mark.parametrize("kind", KINDS, ids="of {}".format)
def test_every_listed_test_exists(kind):
    """No row outlives its test."""
    for file, name in listed(kind):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text()
