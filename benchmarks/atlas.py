"""Every head of every layer on several GPUs: ``python benchmarks/atlas.py llama-8b --gpus 1,2``.

One process per GPU holds the tuned model and measures its share of the prompts, from the clean pass
to the numbers; nothing passes between them. The models are made once, before anything is timed, and
the same processes then measure the whole atlas with 1 GPU, with 2, and so on, so that the ratio of
the rates is of one run. Activations to blend in are random: they cost what real ones cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as mp
from benchmark_cases import GPT2_SMALL, KINDS, LLAMA_8B, TINY, random_model, random_tokens
from benchmark_cases import single_heads as heads_of

from rq4lens.config import Place
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.patch import Sources

RESULTS = Path(__file__).parent / "results"


class Atlas(NamedTuple):
    """What is measured.

    Args:
        shape: the model's shape.
        n_prompts: prompts of the atlas.
        n_tokens: tokens of each prompt.
    """

    shape: dict[str, Any]
    n_prompts: int
    n_tokens: int

    @property
    def n_conditions(self) -> int:
        """Every head of every layer, raw and mapped."""
        return self.shape["n_layers"] * self.shape["n_heads"] * len(KINDS)


ATLASES = {
    "llama-8b": Atlas(LLAMA_8B, 150, 96),
    "gpt2-small": Atlas(GPT2_SMALL, 16, 64),
    "tiny": Atlas(TINY, 8, 24),
}


class Round(NamedTuple):
    """One measurement of the whole atlas by some of the processes.

    Args:
        n_workers: how many of them.
        timed: False for the round that loads kernels.
    """

    n_workers: int
    timed: bool


def share(n_prompts: int, worker: int, n_workers: int) -> slice:
    """The prompts of one worker: shares of nearly equal size that cover all."""
    edges = [n_prompts * part // n_workers for part in range(n_workers + 1)]
    return [slice(*ends) for ends in pairwise(edges)][worker]


def worker(
    number: int, asked: argparse.Namespace, rounds: list[Round], barrier: Any, results: Any
) -> None:
    """Make the model, then measure this worker's share in every round it takes part in."""
    atlas = ATLASES[asked.case]
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device = f"cuda:{number}" if asked.device == "cuda" else asked.device
    if asked.device == "cuda":
        torch.cuda.set_device(number)
    model = random_model(2, device, getattr(torch, asked.dtype), atlas.shape)
    prompts = random_tokens(atlas.n_prompts, atlas.n_tokens, atlas.shape["d_vocab"])
    for index, each in enumerate(rounds):
        barrier.wait()
        if number < each.n_workers:
            mine = share(atlas.n_prompts, number, each.n_workers)
            if asked.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            numbers, seconds = measure(model, prompts, mine)
            peak = torch.cuda.max_memory_allocated() if asked.device == "cuda" else 0
            results.put((index, number, seconds, peak, numbers))
        barrier.wait()


def measure(model: Any, prompts: TokenizedPrompts, mine: slice) -> tuple[np.ndarray, float]:
    """Effects of every head of every layer on some of the prompts, and the seconds it took."""
    cfg = model.cfg
    sources = noise(model, len(prompts), mine)
    some = TokenizedPrompts(prompts.ids[mine], prompts.token_ids[mine])
    started = time.perf_counter()
    engine = make_engine(model, some, place=Place(batch_size=len(some)))
    effects = engine.effects(heads_of(range(cfg.n_layers), cfg.n_heads), sources)
    return effects.kl_nats, time.perf_counter() - started


def noise(model: Any, n_prompts: int, mine: slice) -> Sources:
    """Random activations; a prompt has the same ones in whatever share it is."""
    cfg = model.cfg
    z = torch.randn(
        (n_prompts, 1, cfg.n_heads, cfg.d_head), generator=torch.Generator().manual_seed(3)
    ).to(cfg.dtype)[mine]
    return Sources({(layer, kind): z for layer in range(cfg.n_layers) for kind in KINDS})


def plan(counts: list[int], repeats: int) -> list[Round]:
    """A warm round for each number of workers, then the timed ones in turn."""
    warm = [Round(count, timed=False) for count in counts]
    return [*warm, *(Round(count, timed=True) for _ in range(repeats) for count in counts)]


def run(asked: argparse.Namespace, counts: list[int]) -> dict[str, Any]:
    """All rounds; wall seconds are taken between the barriers, by this process."""
    rounds, context = plan(counts, asked.repeats), mp.get_context("spawn")
    barrier, results = context.Barrier(max(counts) + 1), context.Queue()
    started = time.perf_counter()
    processes = [
        context.Process(target=worker, args=(number, asked, rounds, barrier, results), daemon=True)
        for number in range(max(counts))
    ]
    for process in processes:
        process.start()
    walls: list[float] = []
    found: list[Any] = []
    making = 0.0
    for index, each in enumerate(rounds):
        wait(barrier, processes)
        making = making or time.perf_counter() - started
        begun = time.perf_counter()
        found += [results.get(timeout=asked.limit_seconds) for _ in range(each.n_workers)]
        walls.append(time.perf_counter() - begun)
        wait(barrier, processes)
        print(f"round {index + 1} of {len(rounds)}: {each.n_workers} workers, {walls[-1]:.2f} s")
    for process in processes:
        process.join(timeout=60)
    return summary(asked, counts, rounds, walls, found) | {"making_seconds": making}


def wait(barrier: Any, processes: list[Any]) -> None:
    """Meet all workers, unless one of them died."""
    while True:
        dead = [process.exitcode for process in processes if process.exitcode]
        if dead:
            raise SystemExit(f"a worker died with exit code {dead[0]}; see above")
        if barrier.n_waiting == barrier.parties - 1:
            barrier.wait()
            return
        time.sleep(0.001)


def summary(
    asked: argparse.Namespace,
    counts: list[int],
    rounds: list[Round],
    walls: list[float],
    found: list[Any],
) -> dict[str, Any]:
    """Rates, their ratios to one worker's, and how far the numbers of the counts are apart."""
    atlas = ATLASES[asked.case]
    rows = atlas.n_conditions * atlas.n_prompts
    points = []
    for count in counts:
        timed = [i for i, each in enumerate(rounds) if each.timed and each.n_workers == count]
        seconds = statistics.median(walls[i] for i in timed)
        points.append(
            {
                "workers": count,
                "seconds": seconds,
                "rows_per_second": rows / seconds,
                "slowest_worker_seconds": max(f[2] for f in found if f[0] in timed),
                "peak_bytes_of_a_worker": max(f[3] for f in found if f[0] in timed),
            }
        )
    whole = [numbers_of(found, rounds, count) for count in counts]
    return {
        "n_conditions": atlas.n_conditions,
        "n_rows": rows,
        "points": points,
        "rate_ratio_to_first": [points[0]["seconds"] / point["seconds"] for point in points],
        "largest_kl_difference_nats": max(float(abs(each - whole[0]).max()) for each in whole),
        "largest_kl_nats": float(whole[0].max()),
    }


def numbers_of(found: list[Any], rounds: list[Round], count: int) -> np.ndarray:
    """The atlas as the last round with so many workers measured it."""
    last = max(i for i, each in enumerate(rounds) if each.n_workers == count)
    parts = sorted((f for f in found if f[0] == last), key=lambda part: part[1])
    return np.concatenate([part[4] for part in parts], axis=1)


def main() -> None:
    """Measure, write the record, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("case", choices=ATLASES)
    parser.add_argument("--gpus", default="1,2", help="numbers of GPUs (of processes on a CPU)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of torch in each process on a CPU")
    parser.add_argument("--limit-seconds", type=float, default=900, help="longest round")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    counts = sorted({int(part) for part in asked.gpus.split(",")})
    atlas = ATLASES[asked.case]
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    record = {
        "case": f"atlas of {asked.case}",
        "what": f"{atlas.n_conditions // 2} heads, raw and mapped; {atlas.n_prompts} prompts x "
        f"{atlas.n_tokens} tokens; {asked.dtype}; clean pass included, model making aside",
        "command": f"python benchmarks/atlas.py {asked.case} --gpus {asked.gpus} "
        f"--device {asked.device} --dtype {asked.dtype}",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": name,
        "versions": {each: version(each) for each in ("torch", "transformer-lens")},
        **run(asked, counts),
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / f"atlas-{asked.case}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
