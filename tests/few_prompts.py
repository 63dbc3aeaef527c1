"""The pair in the box on fewer of its prompts, for tests that are not about how many there are."""

import json
from importlib.resources import files
from pathlib import Path


def few_prompts(folder: Path, train: int = 160, val: int = 24, neutral: int = 0) -> Path:
    """Write the first prompts of each split; returns the file."""
    source = files("rq4lens.models").joinpath("builtin/etiquette/prompts.jsonl")
    left, lines = {"train": train, "val": val, "neutral": neutral}, []
    for line in source.read_text(encoding="utf-8").splitlines():
        split = json.loads(line)["split"]
        left[split] -= 1
        if left[split] >= 0:
            lines.append(line)
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
