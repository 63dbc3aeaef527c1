"""What the suffix engine costs: ``python benchmarks/engine.py gpt2-small``.

Everything is measured in one process, one after the other, and printed as ratios: to two plain
clean forward passes (the unavoidable input), and to the usual ways of computing the same numbers,
which are timed on a sample and extrapolated. The record goes to ``benchmarks/results/`` as JSON;
``python benchmarks/tables.py`` turns all records into ``benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import others
import torch
from benchmark_cases import CASES, KINDS, Case, command_line, grid_conditions, single_heads
from growth import growth

import rq4lens as rq
from rq4lens.config import Place
from rq4lens.patching.activations import capture_z
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.patch import Engine, Sources

RESULTS = Path(__file__).parent / "results"


def timer(device: torch.device, repeats: int) -> others.Timer:
    """Median seconds of a call, with all of its work on the device finished."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def seconds(call: Callable[[], object]) -> float:
        taken = []
        for _ in range(repeats):
            wait()
            start = time.perf_counter()
            call()
            wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    return seconds


def stages(case: Case, max_bytes: int | None, wait: others.Timer) -> dict[str, float]:
    """The main grid from two models to numbers, maps given; seconds by stage."""
    made: dict[str, Any] = {}

    def capture() -> None:
        z = capture_z(case.base, case.prompts, [case.layer], batch_size=case.batch_size)
        made["sources"] = Sources({(case.layer, kind): z[case.layer] for kind in KINDS})

    def clean_pass() -> None:
        made["engine"] = engine_of(case, case.layer, max_bytes)

    def rows() -> None:
        made["effects"] = made["engine"].effects(
            grid_conditions(case.layer, case.tuned.cfg.n_heads), made["sources"]
        )

    return {stage.__name__: wait(stage) for stage in (capture, clean_pass, rows)}


def engine_of(case: Case, first_layer: int, max_bytes: int | None) -> Engine:
    """The engine, its clean pass made and checked."""
    return make_engine(
        case.tuned,
        case.prompts,
        place=Place(batch_size=case.batch_size),
        first_layer=first_layer,
        max_bytes=max_bytes,
    )


def grid(case: Case, repeats: int, max_bytes: int | None) -> dict[str, Any]:
    """Seconds of the main grid: each stage's median, and the whole of the first time."""
    once = timer(case.device, 1)
    runs = [stages(case, max_bytes, once) for _ in range(repeats)]
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {
        "n_conditions": len(grid_conditions(case.layer, case.tuned.cfg.n_heads)),
        "stages_seconds": median,
        "seconds": statistics.median(sum(run.values()) for run in runs),
        "first_seconds": sum(runs[0].values()),
    }


def scan(case: Case, repeats: int, max_bytes: int | None, peak: float) -> dict[str, Any]:
    """Seconds beyond the clean passes of all heads of all layers, and the arithmetic floor."""
    cfg = case.tuned.cfg
    sources = noise_sources(case, range(cfg.n_layers))
    engine = engine_of(case, 0, max_bytes)
    conditions = single_heads(range(cfg.n_layers), cfg.n_heads)
    once = timer(case.device, 1)
    runs = [once(lambda: engine.effects(conditions, sources)) for _ in range(repeats)]
    floor = sum(2 * weights_above(case, c[0].layer) for c in conditions) * len(case.prompts) / peak
    return {
        "n_conditions": len(conditions),
        "seconds": statistics.median(runs),
        "first_seconds": runs[0],
        "floor_seconds": floor,
        "memory": engine.memory_report,
    }


def noise_sources(case: Case, layers: range) -> Sources:
    """Random activations under both names."""
    cfg = case.tuned.cfg
    generator = torch.Generator().manual_seed(3)
    shape = (len(case.prompts), 1, cfg.n_heads, cfg.d_head)
    return Sources(
        {
            (layer, kind): torch.randn(shape, generator=generator).to(cfg.dtype)
            for layer in layers
            for kind in KINDS
        }
    )


def weights_above(case: Case, layer: int) -> int:
    """Weights that a row patched at a layer is multiplied with: 2 operations each."""
    model = case.tuned
    block = model.blocks[layer]
    above = [w for b in model.blocks[layer + 1 :] for w in b.parameters()]
    own = [*block.mlp.parameters(), block.attn.W_O]
    return sum(w.numel() for w in (*above, *own, model.unembed.W_U) if w.ndim > 1)


def agreement(case: Case, sources: Sources) -> dict[str, float]:
    """What the engine's numbers are worth here: its noise floor and its distance to hooks."""
    every = grid_conditions(case.layer, case.tuned.cfg.n_heads)
    engine = make_engine(case.tuned, case.prompts, first_layer=case.layer)
    found = engine.effects([*every, ()], sources).kl_nats
    native = HookEngine(case.tuned, case.prompts, place=Place(batch_size=case.batch_size))
    sample = [*range(4), len(every) - 1]
    expected = native.effects([every[i] for i in sample], sources).kl_nats
    return {
        "none_kl_nats": float(found[-1].max()),
        "full_kl_nats": float(found[0].mean()),
        "full_kl_nats_by_hooks": float(expected[0].mean()),
        "largest_kl_difference_nats": float(abs(found[sample] - expected).max()),
    }


def demo_compute(seconds: others.Timer) -> float:
    """Seconds of fitting the maps and running the main grid of the built-in pair, once loaded."""
    pair = rq.load_pair("etiquette")
    pair.use("base"), pair.use("tuned")
    return seconds(
        lambda: rq.run_grid(pair, rq.fit_maps(pair, layers=[1, 2]), layer=1, control_layer=2)
    )


def measure(case: Case, repeats: int, max_bytes: int | None) -> dict[str, Any]:
    """Everything about one case, plain passes first: the engine re-orders weights in memory."""
    once, median = timer(case.device, 1), timer(case.device, repeats)
    sources = noise_sources(case, range(case.layer, case.layer + 1))
    others.plain_forwards(case, once)  # the first pass also loads kernels
    record: dict[str, Any] = {"plain_forwards_seconds": others.plain_forwards(case, median)}
    record["hooks_seconds_per_condition"] = others.hooks_per_condition(case, sources, once)
    record["library_seconds_per_condition"] = others.library_per_condition(case, once)
    record["attribution_of_one_layer_seconds"] = others.attribution_of_one_layer(case, once)
    if case.name == "built-in pair":
        record["demo_compute_seconds"] = demo_compute(once)
    record["peak_flops"] = others.peak_flops(case, median)
    weights = torch.cuda.memory_allocated() if case.device.type == "cuda" else 0
    if weights:
        torch.cuda.reset_peak_memory_stats()
    record["grid"] = grid(case, repeats, max_bytes)
    record["scan"] = scan(case, repeats, max_bytes, record["peak_flops"])
    if weights:
        record["peak_bytes_beyond_weights"] = torch.cuda.max_memory_allocated() - weights
    record["agreement"] = agreement(case, sources)
    return record


def main() -> None:
    """Measure one case, write the record, print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-gigabytes", type=float, help="memory budget of the engine")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU")
    parser.add_argument("--no-growth", action="store_true", help="skip the growth curves")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    max_bytes = int(asked.max_gigabytes * 2**30) if asked.max_gigabytes else None
    # First, while nothing else is in the device's memory.
    process_seconds = others.process_per_condition(
        asked.case, asked.device, asked.dtype, timer(torch.device("cpu"), 1)
    )
    case = CASES[asked.case](asked.device, getattr(torch, asked.dtype))
    record = {
        "case": case.name,
        "what": case.describe(),
        "command": command_line(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": others.device_name(case),
        "versions": {name: version(name) for name in ("torch", "transformer-lens")},
        "process_seconds_per_condition": process_seconds,
        **measure(case, asked.repeats, max_bytes),
    }
    if not asked.no_growth:
        record["growth"] = growth(case, timer(case.device, 1))
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / f"{asked.case}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "growth"}, indent=1))


if __name__ == "__main__":
    main()
