"""Counts what a test run showed: faults survived, hostile inputs answered, inputs fuzzed."""

from __future__ import annotations

from collections import Counter

COUNTED = {
    "fault": "a crash, full disk or other fault that no number may change with",
    "hostile": "an input that means harm, or is merely broken",
}

PROPERTIES = ("kills", "fuzz_inputs")
"""Numbers that tests report of themselves."""


def pytest_configure(config):
    """Make the two markers known."""
    for name, meaning in COUNTED.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_terminal_summary(terminalreporter):
    """Print the counts of this run, whether or not it used several workers."""
    passed = terminalreporter.stats.get("passed", [])
    counts = Counter(name for report in passed for name in COUNTED if name in report.keywords)
    for report in passed:
        counts.update({name: n for name, n in report.user_properties if name in PROPERTIES})
    if counts:
        terminalreporter.write_line(
            f"trust: {counts['fault']} faults, {counts['kills']} kills, "
            f"{counts['hostile']} hostile inputs, {counts['fuzz_inputs']:,} fuzz inputs "
            "without an unhandled exception"
        )
