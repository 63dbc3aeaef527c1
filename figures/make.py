"""Draw every figure of this folder again, from the built-in pair and the benchmark's record.

Runs the main job and a sweep over all layers in a temporary folder, then writes HTML, and PNG and
SVG where there is a Chrome or Chromium. The same versions give the same files, byte for byte.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import rq4lens as rq
from rq4lens.analysis.structure.layers import compare_layers
from rq4lens.config import preset
from rq4lens.patching.grid import run_sweep

PAIR = "etiquette"
HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"


def main(out: Path = HERE) -> None:
    """Measure, draw, and say what could not be drawn.

    Args:
        out: where the figures go.
    """
    # Sums in one order: more threads may add the same numbers in another.
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        run = rq.run(preset(PAIR), Path(folder))
    pair = rq.load_pair(PAIR)
    every_layer = rq.prepare(pair, rq.fit_maps(pair, range(pair.n_layers)))
    layers = run_sweep(every_layer, run.grid.settings.patching)
    drawn = rq.figures.run_figures(
        run.grid,
        run.analysis,
        layers=layers,
        comparison=compare_layers(layers, every_layer),
        provenance=run.run,
    )
    sys.path.append(str(BENCHMARKS))
    from cost import engine_cost, whole_run  # noqa: PLC0415 (benchmarks are scripts, not a package)

    drawn["engine_cost"] = engine_cost(record_of("llama-8b"))
    drawn["whole_run"] = whole_run(record_of("end-to-end-llama-8b"))
    for sentence in rq.figures.write_figures(drawn, out, title=f"Figures of the pair {PAIR}"):
        print(sentence)
    print(f"{len(drawn)} figures in {out}")


def record_of(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
