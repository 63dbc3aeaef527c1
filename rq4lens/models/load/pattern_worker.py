"""Match patterns against names, in a process that can be stopped; see ``patterns``.

Reads ``{"patterns": [...], "names": [...]}`` and prints a line for each pattern that is done.
"""

from __future__ import annotations

import json
import re
import sys


def main() -> None:
    """Try every pattern on every name."""
    asked = json.load(sys.stdin)
    for pattern in asked["patterns"]:
        try:
            compiled = re.compile(pattern)
            for name in asked["names"]:
                compiled.match(name)
            answer = "done"
        except (re.error, RecursionError, OverflowError, MemoryError) as problem:
            answer = f"wrong {problem}"
        sys.stdout.write(answer.replace("\n", " ") + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
