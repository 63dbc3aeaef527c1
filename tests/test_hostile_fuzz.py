"""Damaged input of every kind: each reader returns a value or raises UserError."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARE = os.environ.get("RQ4LENS_FUZZ_SHARE", "1")
SEED = os.environ.get("RQ4LENS_FUZZ_SEED", "0")


@pytest.mark.slow
def test_a_hundred_thousand_damaged_inputs_end_in_a_value_or_a_user_error(
    record_property, tmp_path
):
    """No reader raises anything but UserError, outside pytest's own shape checks.

    ``RQ4LENS_FUZZ_SHARE=50 RQ4LENS_FUZZ_SEED=1`` feeds five million others.
    """
    done = subprocess.run(
        [sys.executable, "tests/fuzz_readers.py", SHARE, SEED],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    total = int(re.search(r"^total: (\d+) inputs$", done.stdout, re.MULTILINE)[1])
    assert total >= 100_000 * float(SHARE)
    record_property("fuzz_inputs", total)
