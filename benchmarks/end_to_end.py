"""The whole command on a pair of the study's size: ``python benchmarks/end_to_end.py llama-8b``.

Makes two random Llamas as sharded safetensors in a folder, runs ``rq4lens run`` on them as a user
would, once with both models in memory and once with one at a time, and keeps the wall time by stage
and the peak memory that ``run.json`` states. The record goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

RESULTS = Path(__file__).parent / "results"
ETIQUETTE = Path(str(files("rq4lens.models"))) / "builtin/etiquette"
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
STORIES, N_TRAIN, N_VAL = 4, 300, 150
LAYER, CONTROL = 26, 24


def make_pair(folder: Path, shape: dict[str, Any], device: str, dtype: torch.dtype) -> None:
    """Write base and tuned model, with the built-in pair's tokenizer."""
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    for side in ("base", "tuned"):
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.empty_like(weight).normal_(generator=generator)
                if weight.ndim > 1:
                    keep = 0.0 if side == "base" else 1.0
                    weight.mul_(keep).add_(noise, alpha=0.02 if side == "base" else 0.02 * DRIFT)
        if side == "tuned":
            model.resize_token_embeddings(shape["vocab_size"] + ADDED_TOKENS, mean_resizing=False)
        model.save_pretrained(folder / side, max_shard_size="5GB")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ETIQUETTE / side / name, folder / side / name)
    del model
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def make_prompts(path: Path) -> None:
    """Prompts of a realistic length: several of the built-in stories in a row."""
    stories = [json.loads(line)["text"] for line in (ETIQUETTE / "prompts.jsonl").open()]
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(N_TRAIN + N_VAL):
            text = " ".join(draw.sample(stories, STORIES))
            split = "train" if i < N_TRAIN else "val"
            file.write(json.dumps({"id": f"p{i}", "text": text, "split": split}) + "\n")


def run(folder: Path, name: str, settings: list[str]) -> dict[str, Any]:
    """One call of the command line, timed from outside."""
    command = ["run", "--base", "base", "--tuned", "tuned", "--prompts", "prompts.jsonl"]
    command += ["--layer", str(LAYER), "--control-layer", str(CONTROL), "--out", name, *settings]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rq4lens", *command], cwd=folder, check=True)
    wall = time.perf_counter() - start
    stated = json.loads((folder / name / "run.json").read_text())
    return {
        "command": "rq4lens " + " ".join(command),
        "wall_seconds": wall,
        "stages_seconds": stated["timings_seconds"],
        "peak_device_bytes": stated["peak_device_bytes"],
        "engine": stated["engine"]["name"],
        "noise_floor_nats": stated["noise_floor_nats"],
    }


def main() -> None:
    """Make the pair, run the command both ways, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, required=True, help="where the models are written")
    parser.add_argument("--analysis", default="full", choices=["full", "grid"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if not (asked.folder / "prompts.jsonl").exists():
        make_pair(asked.folder, SHAPES[asked.shape], asked.device, getattr(torch, asked.dtype))
        make_prompts(asked.folder / "prompts.jsonl")
    place = ["--device", asked.device, "--dtype", asked.dtype, "--analysis", asked.analysis]
    checkpoint = sum(path.stat().st_size for path in asked.folder.glob("*/*.safetensors"))
    cuda = asked.device.startswith("cuda")
    record = {
        "what": f"a pair of the shape {asked.shape}, {asked.dtype}, "
        f"{checkpoint / 1e9:.3g} GB of sharded safetensors; {N_TRAIN} train and {N_VAL} validation "
        f"prompts; {asked.analysis} analysis, report and figures",
        "command": f"python benchmarks/end_to_end.py {asked.shape} --device {asked.device} "
        f"--dtype {asked.dtype} --folder FOLDER --analysis {asked.analysis}",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": torch.cuda.get_device_name() if cuda else "CPU",
        "versions": {name: version(name) for name in ("torch", "transformer-lens")},
        "runs": {
            "both models resident": run(asked.folder, "resident", place),
            "one model at a time": run(asked.folder, "sequential", [*place, "--no-keep-both"]),
        },
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"end-to-end-{asked.shape}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
