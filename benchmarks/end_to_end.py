"""The whole command beside a plain script: ``python benchmarks/end_to_end.py llama-8b``.

Makes two random Llamas as sharded safetensors, then times from outside, each in a process of its
own: a plain script that imports transformers and loads both models; ``rq4lens run --analysis
grid``; the same again in another folder with its cache; the full ``rq4lens run``; ``rq4lens sweep``
of every layer. The record is written after each of them, with ratios to the plain script and the
seconds by stage, and drawn at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RESULTS = Path(__file__).parent / "results"
ETIQUETTE = Path(str(files("rq4lens.models"))) / "builtin/etiquette"
RAM_DISK = Path("/dev/shm")
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 512,
    },
}
ADDED_TOKENS = 128
"""The fine-tune has a larger vocabulary, as the study's has."""
DRIFT = 0.1
"""How far the fine-tune's weights lie from the base's, in standard deviations of the base's."""
STORIES = 4
LAYER, CONTROL = 26, 24
CACHED = ["--cache", "cache"]
RUNS = {
    "grid": ["run", "--analysis", "grid", *CACHED, "--out", "grid"],
    "grid again": ["run", "--analysis", "grid", *CACHED, "--out", "again"],
    "full": ["run", "--out", "full"],
    "sweep": ["sweep", "--out", "sweep"],
    "one model at a time": ["run", "--analysis", "grid", "--no-keep-both", "--out", "sequential"],
}
DEFAULT_RUNS = ("grid", "grid again", "full", "sweep")
PLAIN = """
import sys, time
start = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM
print(f"rq4lens: import, {time.perf_counter() - start:.2f} s", file=sys.stderr)
device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
for side in ("base", "tuned"):
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(side, dtype=dtype, device_map=device)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    print(f"rq4lens: load {side}, {time.perf_counter() - start:.2f} s", file=sys.stderr)
"""
STAGE = re.compile(r"rq4lens: ([a-z ]+)(?:, [\d,]+ [a-z]+)?, ([\d.]+) s")


@dataclass(frozen=True)
class Bench:
    """Where the pair is, and how its models are loaded."""

    folder: Path
    shape: str
    device: str
    dtype: str
    n_prompts: tuple[int, int]

    def make(self) -> None:
        """Write models and prompts, unless they are there."""
        if (self.folder / "prompts.jsonl").exists():
            return
        import torch  # noqa: PLC0415 - seconds that a second call need not take

        make_pair(self.folder, SHAPES[self.shape], self.device, getattr(torch, self.dtype))
        make_prompts(self.folder / "prompts.jsonl", *self.n_prompts)

    @cached_property
    def checkpoint_bytes(self) -> int:
        """Size of both checkpoints."""
        return sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors"))

    def plain(self, limit_s: float) -> dict[str, Any]:
        """What the command is compared with."""
        return timed(["-c", PLAIN, self.device, self.dtype], self.folder, limit_s)

    def run(self, name: str, limit_s: float) -> dict[str, Any]:
        """One call of the command line."""
        settings = [*RUNS[name], "--base", "base", "--tuned", "tuned"]
        settings += ["--prompts", "prompts.jsonl", "--device", self.device, "--dtype", self.dtype]
        if settings[0] == "run":
            settings += ["--layer", str(LAYER), "--control-layer", str(CONTROL)]
        out = self.folder / settings[settings.index("--out") + 1]
        shutil.rmtree(out, ignore_errors=True)
        if name == "grid":
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
        found = timed(["-m", "rq4lens", *settings], self.folder, limit_s)
        found["command"] = "rq4lens " + " ".join(settings)
        if found["finished"] and (out / "run.json").exists():
            stated = json.loads((out / "run.json").read_text())
            found |= {key: stated[key] for key in ("peak_device_bytes", "noise_floor_nats")}
            found["engine"] = stated["engine"]["name"]
        return found


def timed(command: list[str], folder: Path, limit_s: float) -> dict[str, Any]:
    """A process, its seconds and those of the stages that it says on stderr; stopped at a limit."""
    start, log = time.perf_counter(), folder / "stderr.txt"
    with log.open("w") as said:
        try:
            subprocess.run(
                [sys.executable, *command], cwd=folder, check=True, stderr=said, timeout=limit_s
            )
            finished = True
        except subprocess.TimeoutExpired:
            finished = False
        except subprocess.CalledProcessError:
            print(log.read_text(), file=sys.stderr)
            raise
    wall = time.perf_counter() - start
    return {"finished": finished, "wall_seconds": wall, "stages_seconds": stages(log.read_text())}


def stages(said: str) -> dict[str, float]:
    """The seconds of each stage that stderr names."""
    return {name: float(seconds) for name, seconds in STAGE.findall(said)}


def make_pair(folder: Path, shape: dict[str, Any], device: str, dtype: Any) -> None:
    """Write base and tuned model, each with its tokenizer."""
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415
    from transformers.initialization import no_init_weights  # noqa: PLC0415

    torch.set_default_dtype(dtype)
    with torch.device(device), no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    for side in ("base", "tuned"):
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight.fill_(1.0)  # norms
                    continue
                noise = torch.empty_like(weight).normal_(std=0.02, generator=generator)
                if side == "base":
                    weight.copy_(noise)
                else:
                    weight.add_(noise, alpha=DRIFT)
        if side == "tuned":
            model.resize_token_embeddings(shape["vocab_size"] + ADDED_TOKENS, mean_resizing=False)
        model.save_pretrained(folder / side, max_shard_size="5GB")
        write_tokenizer(folder, side, model.config.vocab_size)
    del model
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def write_tokenizer(folder: Path, side: str, n_tokens: int) -> None:
    """The built-in pair's tokenizer, with a name for each further row of the embeddings."""
    shutil.copy(ETIQUETTE / side / "tokenizer_config.json", folder / side)
    written = json.loads((ETIQUETTE / side / "tokenizer.json").read_text())
    vocab = written["model"]["vocab"]
    taken = {*vocab.values(), *(token["id"] for token in written["added_tokens"])}
    vocab |= {f"[row {at}]": at for at in range(n_tokens) if at not in taken}
    (folder / side / "tokenizer.json").write_text(json.dumps(written))


def make_prompts(path: Path, n_train: int, n_val: int) -> None:
    """Prompts of a realistic length: several of the built-in stories in a row."""
    stories = [json.loads(line)["text"] for line in (ETIQUETTE / "prompts.jsonl").open()]
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(n_train + n_val):
            text = " ".join(draw.sample(stories, STORIES))
            split = "train" if i < n_train else "val"
            file.write(json.dumps({"id": f"p{i}", "text": text, "split": split}) + "\n")


def with_ratios(record: dict[str, Any]) -> dict[str, Any]:
    """The record with each run's time as a multiple of the plain script's."""
    plain = record["plain"]["wall_seconds"]
    runs = {
        name: each | {"ratio_to_plain": round(each["wall_seconds"] / plain, 2)}
        for name, each in record["runs"].items()
    }
    return record | {"runs": runs}


@contextmanager
def place_for(folder: Path | None, n_bytes: float) -> Iterator[Path]:
    """The folder that was named, or one that goes again: in memory, if there is room."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    in_memory = RAM_DISK.is_dir() and shutil.disk_usage(RAM_DISK).free > n_bytes
    with TemporaryDirectory(dir=RAM_DISK if in_memory else None) as name:
        yield Path(name)


def described(bench: Bench) -> dict[str, Any]:
    """What is measured, on what."""
    import torch  # noqa: PLC0415

    cuda = bench.device.startswith("cuda")
    n_train, n_val = bench.n_prompts
    return {
        "what": f"a pair of the shape {bench.shape}, {bench.dtype}, "
        f"{bench.checkpoint_bytes / 1e9:.3g} GB of sharded safetensors in memory; {n_train} train "
        f"and {n_val} validation prompts; each line one process, start-up included",
        "command": f"python benchmarks/end_to_end.py {bench.shape} --device {bench.device} "
        f"--dtype {bench.dtype}",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": torch.cuda.get_device_name() if cuda else "CPU",
        "versions": {name: version(name) for name in ("torch", "transformer-lens")},
    }


def measure(bench: Bench, runs: list[str], out: Path, limit_s: float) -> dict[str, Any]:
    """Time everything, one after the other; what is done is kept whatever comes next."""
    end = time.perf_counter() + limit_s
    start = time.perf_counter()
    bench.make()
    record = described(bench) | {"making_seconds": time.perf_counter() - start, "runs": {}}
    for name in ["plain", *runs]:
        left_s = end - time.perf_counter()
        if left_s <= 0:
            break
        if name == "plain":
            record["plain"] = bench.plain(left_s)
        else:
            record["runs"][name] = bench.run(name, left_s)
        record = with_ratios(record)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(name, json.dumps(record["runs"].get(name, record["plain"])), flush=True)
    return record


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, help="where the models are kept for another call")
    parser.add_argument("--prompts", type=int, nargs=2, default=(300, 150), help="train and val")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=DEFAULT_RUNS)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure, write and draw."""
    asked = arguments()
    out = asked.out / f"end-to-end-{asked.shape}.json"
    n_bytes = 40e9 if asked.shape == "llama-8b" else 1e8
    with place_for(asked.folder, n_bytes) as folder:
        bench = Bench(
            folder.resolve(), asked.shape, asked.device, asked.dtype, tuple(asked.prompts)
        )
        record = measure(bench, list(asked.runs), out, asked.limit)
    from cost import whole_run  # noqa: PLC0415 - plotly, after everything is timed

    whole_run(record).write_html(out.with_suffix(".html"), include_plotlyjs="cdn")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
