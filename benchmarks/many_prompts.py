"""How a run grows with its prompts: ``python benchmarks/many_prompts.py --folder FOLDER``.

Runs ``rq4lens run`` on the models of the pair ``dialect`` with more and more val prompts, made of
the words of its own ones, from the folders to the end of the report, and keeps seconds by stage and
the peak memory. The record goes to ``benchmarks/results/``, and a drawing of the growth beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from rq4lens.figures import theme

RESULTS = Path(__file__).parent / "results"
DIALECT = Path(str(files("rq4lens.models"))) / "builtin/dialect"
SIZES = (1_250, 2_500, 5_000, 10_000, 20_000)
FIELDS = ("hour", "village", "trade", "person", "street", "good")
TEXT = "At {hour} in {village} the {trade} meets {person} in {street} with {good} and says"
SETTINGS = ("--layer", "1", "--control-layer", "3", "--k", "1,2,4")


def make_prompts(path: Path, n_val: int) -> None:
    """The pair's own train prompts, and this many different val prompts of its words."""
    own = [json.loads(line) for line in (DIALECT / "prompts.jsonl").open()]
    words = {field: sorted({each["meta"][field] for each in own}) for field in FIELDS}
    draw, texts = random.Random(0), dict[str, str]()
    while len(texts) < n_val:
        chosen = {field: draw.choice(words[field]) for field in FIELDS}
        texts[TEXT.format(**chosen)] = chosen["village"]
    made = [
        {"id": f"val-{i}", "text": text, "split": "val", "content": village}
        for i, (text, village) in enumerate(texts.items())
    ]
    kept = [each for each in own if each["split"] == "train"]
    path.write_text("".join(json.dumps(each) + "\n" for each in [*kept, *made]))


def run(folder: Path, n_val: int, analysis: str) -> dict[str, Any]:
    """One call of the command line, timed from outside."""
    prompts, out = folder / f"{n_val}.jsonl", folder / f"run-{n_val}-{analysis}"
    make_prompts(prompts, n_val)
    where = ["--base", DIALECT / "base", "--tuned", DIALECT / "tuned", "--prompts", prompts]
    command = [sys.executable, "-m", "rq4lens", "run", *where, "--out", out, *SETTINGS]
    start = time.perf_counter()
    process = subprocess.Popen([*map(str, command), "--analysis", analysis, "--fresh"])
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run on {n_val} prompts ended with status {status}")
    return {
        "n_val": n_val,
        "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": 1024 * used.ru_maxrss,
        "report_bytes": (out / "report.html").stat().st_size,
        "stages_seconds": json.loads((out / "run.json").read_text())["timings_seconds"],
    }


def drawing(record: dict[str, Any]) -> go.Figure:
    """Seconds and memory against the prompts; dotted: in proportion to the largest run."""
    runs = record["runs"]
    sizes = [each["n_val"] for each in runs]
    lines = {"CPU seconds": "cpu_seconds", "peak memory (MB)": "peak_bytes"}
    figure = go.Figure()
    for colour, (name, key) in zip((theme.BLUE, theme.ORANGE), lines.items(), strict=True):
        values = [each[key] / (1e6 if key.endswith("bytes") else 1) for each in runs]
        straight = [values[-1] * size / sizes[-1] for size in sizes]
        figure.add_scatter(x=sizes, y=values, name=name, line_color=colour)
        dots = {"color": colour, "dash": "dot"}
        figure.add_scatter(x=sizes, y=straight, line=dots, mode="lines", showlegend=False)
    figure.update_xaxes(title="val prompts", type="log", tickvals=sizes)
    figure.update_yaxes(type="log", dtick=1)
    return figure.update_layout(
        template=theme.template(),
        width=720,
        height=440,
        title="A run from folders to report; dotted: growth in proportion",
    )


def main() -> None:
    """Run every size, write the record and the drawing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where runs are written")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--analysis", default="full", choices=["full", "grid"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    record = {
        "what": f"the pair dialect, {asked.analysis} analysis, from two folders to the report",
        "command": f"python benchmarks/many_prompts.py --folder FOLDER --analysis {asked.analysis}",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"CPU, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in ("torch", "transformer-lens", "numpy")},
        "runs": [run(asked.folder, size, asked.analysis) for size in asked.sizes],
    }
    name = asked.out / f"many-prompts-{asked.analysis}"
    name.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    drawing(record).write_image(name.with_suffix(".svg"))


if __name__ == "__main__":
    main()
