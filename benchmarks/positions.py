"""What more patched tokens and longer answers cost: ``python benchmarks/positions.py gpt2-small``.

One model of random weights; the conditions of the main job at one layer, as rows of one clean pass.
Patched are the last 1, 2, 4 or 8 tokens; or the decision token and the answer behind it, of so many
tokens; or one token alone, so far from the end, as the position map does. Each is given relative to
the decision token alone. Seconds on a CPU are those of the processor. The record goes to
``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmark_cases import (
    GPT2_SMALL,
    KINDS,
    LLAMA_8B,
    TINY,
    command_line,
    grid_conditions,
    random_model,
    random_tokens,
)
from engine import RESULTS, timer

from rq4lens.config import Place
from rq4lens.models.load.lens import HookedTransformer
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.patch import Engine, Sources

CASES = {
    "gpt2-small": (GPT2_SMALL, 16, 64, 8),
    "llama-8b": (LLAMA_8B, 150, 96, 26),
    "tiny": (TINY, 8, 24, 2),
}
"""Shape, number and length of prompts, layer."""

SIZES = (1, 2, 4, 8)
LOAD_SECONDS = 1.0


def last(prompts: TokenizedPrompts, n: int) -> TokenizedPrompts:
    """The last so many tokens are patched."""
    return prompts.placed(n)


def answers(prompts: TokenizedPrompts, n: int) -> TokenizedPrompts:
    """An answer of so many tokens is patched and compared; the first ones of the prompt serve."""
    return prompts.continued([tokens[:n] for tokens in prompts.token_ids]).placed()


def alone(prompts: TokenizedPrompts, n: int) -> TokenizedPrompts:
    """One token is patched, so far from the end."""
    return replace(prompts, spots=tuple((len(tokens) - n,) for tokens in prompts.token_ids))


AXES: dict[str, Callable[[TokenizedPrompts, int], TokenizedPrompts]] = {
    "last positions": last,
    "answer tokens": answers,
    "one position, counted from the end": alone,
}


Seconds = Callable[[Callable[[], object]], float]


def seconds_of(device: torch.device, repeats: int) -> Seconds:
    """Median seconds of a call; of the processor where it does all of the work.

    A GPU lowers its clock under load that lasts, so every call is timed under such load.
    """
    if device.type == "cuda":
        timed = timer(device, repeats)

        def under_load(call: Callable[[], object]) -> float:
            end = time.perf_counter() + LOAD_SECONDS
            while time.perf_counter() < end:
                timed(call)
            return timed(call)

        return under_load

    def seconds(call: Callable[[], object]) -> float:
        taken = []
        for _ in range(repeats):
            start = time.process_time()
            call()
            taken.append(time.process_time() - start)
        return statistics.median(taken)

    return seconds


def point(
    model: HookedTransformer, prompts: TokenizedPrompts, layer: int, seconds: Seconds
) -> dict[str, Any]:
    """The engine, and seconds of its clean pass and of the rows."""
    cfg, n_prompts = model.cfg, len(prompts)
    conditions = grid_conditions(layer, cfg.n_heads)
    draw = torch.Generator().manual_seed(0)
    size = (n_prompts, prompts.n_spots, cfg.n_heads, cfg.d_head)
    z = (0.02 * torch.randn(size, generator=draw)).to(cfg.dtype)
    sources = Sources({(layer, kind): z for kind in KINDS})

    def engine() -> Engine:
        return make_engine(model, prompts, place=Place(batch_size=n_prompts), first_layer=layer)

    fast = engine()
    fast.effects(conditions, sources)  # loads kernels
    return {
        "engine": fast.name,
        "clean_pass_seconds": seconds(engine),
        "rows_seconds": seconds(lambda: fast.effects(conditions, sources)),
    }


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Each size along each axis."""
    shape, n_prompts, n_tokens, layer = CASES[asked.case]
    model = random_model(2, asked.device, getattr(torch, asked.dtype), shape)
    prompts = random_tokens(n_prompts, n_tokens, shape["d_vocab"])
    seconds = seconds_of(torch.device(asked.device), asked.repeats)
    points = []
    for axis, placed in AXES.items():
        for size in SIZES:
            found = point(model, placed(prompts, size), layer, seconds)
            points.append({"axis": axis, "size": size, **found})
            print(points[-1], flush=True)
    return points


def main() -> None:
    """Measure, write the record, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--device", default="cpu", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    _, n_prompts, n_tokens, layer = CASES[asked.case]
    hardware = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    record = {
        "case": asked.case,
        "what": f"{n_prompts} prompts x {n_tokens} tokens; {asked.dtype}; layer {layer}",
        "command": command_line(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware if asked.device == "cuda" else f"{hardware}, {asked.threads} threads",
        "versions": {each: version(each) for each in ("torch", "transformer-lens")},
        "points": measure(asked),
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / f"positions-{asked.case}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
