"""The main grid on a pair that fits no single GPU: ``python benchmarks/spread.py llama-70b``.

The layers of each model are spread over the GPUs, and the two models are never there together: base
is made, run and let go, then tuned. Weights are random and made on the GPUs. The record has the
seconds of each stage, the peak memory of each GPU, the ratio to two plain clean forward passes, and
the distance to native hooks on some of the conditions.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from atlas import Atlas
from benchmark_cases import (
    KINDS,
    LLAMA_8B,
    LLAMA_70B,
    TINY,
    command_line,
    grid_conditions,
    random_model,
    random_tokens,
)
from engine import RESULTS, timer

from rq4lens.config import Place
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.activations import capture_z
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.passes import forward_batch
from rq4lens.patching.patch import Sources

PROMPTS_OF_A_BATCH = 32
"""Of a plain forward pass and a capture: the whole set at once would need another GPU's memory."""

CASES = {
    "llama-70b": (Atlas(LLAMA_70B, 150, 96), 65),
    "llama-8b": (Atlas(LLAMA_8B, 150, 96), 26),
    "tiny": (Atlas(TINY, 8, 24), 2),
}
"""Shape and prompts, and the main layer."""


class Stages:
    """Seconds and peak memory of one stage after another."""

    def __init__(self, device: str, n_gpus: int) -> None:
        self.gpus = range(n_gpus) if device == "cuda" else range(0)
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, list[int]] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """Do the work of a stage, to its end on every device."""
        made: list[Any] = []

        def whole() -> None:
            made.append(work())
            self._wait()

        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        self._wait()
        self.seconds[name] = timer(torch.device("cpu"), 1)(whole)
        self.peak_bytes[name] = [torch.cuda.max_memory_allocated(gpu) for gpu in self.gpus]
        print(f"{name}: {self.seconds[name]:.2f} s", flush=True)
        return made[0]

    def _wait(self) -> None:
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)


@torch.no_grad()
def plain_pass(model: Any, prompts: TokenizedPrompts) -> None:
    """A clean forward pass over all prompts, as TransformerLens runs it."""
    for batch in prompts.batches(PROMPTS_OF_A_BATCH):
        forward_batch(model, batch)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Base, then tuned: every stage twice where the first time loads kernels."""
    (shape, n_prompts, n_tokens), layer = CASES[asked.case]
    stages = Stages(asked.device, asked.gpus)
    dtype = getattr(torch, asked.dtype)
    prompts = random_tokens(n_prompts, n_tokens, shape["d_vocab"])
    budget = int(asked.max_gigabytes * 2**30) if asked.max_gigabytes else None

    def make(seed: int) -> Any:
        return random_model(seed, asked.device, dtype, shape, asked.gpus)

    model = stages("base: making", lambda: make(1))
    stages("base: first plain pass", lambda: plain_pass(model, prompts))
    stages("base: plain pass", lambda: plain_pass(model, prompts))
    z = stages(
        "base: capture",
        lambda: capture_z(model, prompts, [layer], batch_size=PROMPTS_OF_A_BATCH)[layer],
    )
    del model
    gc.collect()
    model = stages("tuned: making", lambda: make(2))
    stages("tuned: plain pass", lambda: plain_pass(model, prompts))
    sources = Sources({(layer, kind): z for kind in KINDS})
    conditions = grid_conditions(layer, shape["n_heads"])

    def engine() -> Any:
        return make_engine(
            model,
            prompts,
            place=Place(batch_size=len(prompts)),
            first_layer=layer,
            max_bytes=budget,
        )

    stages("tuned: first clean pass", engine)
    fast = stages("tuned: clean pass", engine)
    stages("tuned: first rows", lambda: fast.effects(conditions, sources))
    found = stages("tuned: rows", lambda: fast.effects([*conditions, ()], sources)).kl_nats
    sample = [0, len(conditions) // 2]
    hooks = HookEngine(model, prompts, place=Place(batch_size=PROMPTS_OF_A_BATCH))
    expected = stages(
        "tuned: three passes by hooks",
        lambda: hooks.effects([conditions[i] for i in sample], sources),
    ).kl_nats
    seconds = stages.seconds
    grid = seconds["base: capture"] + seconds["tuned: clean pass"] + seconds["tuned: rows"]
    plain = seconds["base: plain pass"] + seconds["tuned: plain pass"]
    hooked = seconds["tuned: three passes by hooks"] / 3
    return {
        "engine": fast.name,
        "fallback_reason": fast.fallback_reason,
        "n_conditions": len(conditions),
        "stages_seconds": seconds,
        "stages_peak_bytes": stages.peak_bytes,
        "weights_bytes": sum(weight.nbytes for weight in model.parameters()),
        "plain_forwards_seconds": plain,
        "grid_seconds": grid,
        "ratio_to_plain_forwards": grid / plain,
        "times_faster_than_hooks": hooked * len(conditions) / grid,
        "memory": fast.memory_report,
        "none_kl_nats": float(found[-1].max()),
        "full_kl_nats": float(found[0].mean()),
        "full_kl_nats_by_hooks": float(expected[0].mean()),
        "largest_kl_difference_nats": float(abs(found[sample] - expected).max()),
    }


def main() -> None:
    """Measure, write the record, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--gpus", type=int, default=2, help="over how many the layers are spread")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-gigabytes", type=float, help="memory budget of the engine, each GPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    (_, n_prompts, n_tokens), layer = CASES[asked.case]
    hardware = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    record = {
        "case": f"{asked.case} over {asked.gpus} GPUs",
        "what": f"{n_prompts} prompts x {n_tokens} tokens; {asked.dtype}; layer {layer}; base and "
        "tuned one after the other",
        "command": command_line(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{asked.gpus} x {hardware}",
        "versions": {each: version(each) for each in ("torch", "transformer-lens")},
        **measure(asked),
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / f"spread-{asked.case}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
