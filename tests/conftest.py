"""How tests are run: in which order, where they write, and by which processes."""

import os
import shutil
from pathlib import Path

import counts
from counts import pytest_terminal_summary  # noqa: F401 - a hook

MEMORY, ENOUGH_BYTES = Path("/dev/shm"), 4 * 2**30
"""Where files are in memory, and how much room the temporary files of all tests have there.

Runs sync every file that they write, which takes a disk longer than small models to be measured.
"""

if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ENOUGH_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

LONGEST_FIRST = (
    *("test_validate", "test_faults", "test_printouts", "test_ray", "test_examples"),
    *("test_notebooks", "test_kills", "test_report_browser", "test_shards"),
    *("test_honest_selection", "test_folder_runs", "test_dialect", "test_hostile_fuzz"),
    *("test_finished", "test_study_file", "test_study", "test_verify", "test_claims"),
    *("test_backends", "test_transfer", "test_builtin", "test_architectures"),
)
"""Files that keep a worker busy for long: begun late, one of them would be waited for."""


def pytest_configure(config):
    """Load what tests share, except into the process that only hands them out to workers."""
    counts.pytest_configure(config)
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared")


def pytest_collection_modifyitems(config, items):
    """Workers take whole files, in this order, so that each fixture is made in one of them."""
    if hasattr(config, "workerinput"):
        place = {name: number for number, name in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: place.get(item.path.stem, len(place)))
