"""One condition in a process of its own, the way a study without an engine runs hundreds of them.

``engine.py`` times the whole of it: both models are made, base is read at the layer, and the tuned
model runs clean and patched through a native hook.
"""

from __future__ import annotations

import argparse

import torch
from benchmark_cases import CASES, grid_conditions

from rq4lens.config import Place
from rq4lens.patching.activations import capture_z
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.patch import MAPPED, RAW, Sources


def main() -> None:
    """Measure the condition and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    case = CASES[asked.case](asked.device, getattr(torch, asked.dtype))
    z = capture_z(case.base, case.prompts, [case.layer], batch_size=case.batch_size)[case.layer]
    sources = Sources({(case.layer, kind): z for kind in (RAW, MAPPED)})
    engine = HookEngine(case.tuned, case.prompts, place=Place(batch_size=case.batch_size))
    condition = grid_conditions(case.layer, case.tuned.cfg.n_heads)[1]
    print(engine.effects([condition], sources).kl_nats.mean())


if __name__ == "__main__":
    main()
