"""A tiny base model, its fine-tune and their prompts as ordinary files, and runs of them."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from model_zoo import CORPUS, random_model, save, train_tokenizer
from tiny import random_prompts
from transformers import LlamaConfig

ROOT = Path(__file__).parent.parent
LAYER, CONTROL = 1, 0
QUIET = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of the processes that tests start."""


def write_pair(folder: Path) -> dict[str, Any]:
    """Write the pair; returns the settings of a run of it."""
    words = " ".join(random_prompts().texts)
    tokenizer = train_tokenizer((*CORPUS, words))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=128,
    )
    base = random_model(config)
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "self_attn" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save(base, tokenizer, folder / "base")
    save(tuned, tokenizer, folder / "tuned")
    rows = [{"id": p.id, "text": p.text, "split": p.split, "group": p.group}
            for p in random_prompts(n_train=40, n_val=12).prompts]  # fmt: skip
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "pair": "on disk",
        "base": str(folder / "base"),
        "tuned": str(folder / "tuned"),
        "prompts": str(folder / "prompts.jsonl"),
        "layer": LAYER,
        "control_layer": CONTROL,
        "k": [1, 2, 4],
        "random_seeds": [0, 1],
        "resamples": 200,
        "analysis": "grid",
        "device": "cpu",
        "batch_size": 4,
    }


def write_config(settings: dict[str, Any], path: Path) -> Path:
    """The settings as a TOML file."""
    path.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items()))
    return path


def command(*arguments: str | Path, **options: Any) -> subprocess.Popen:
    """Start `rq4lens` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from rq4lens.cli import main; main()", *map(str, arguments)],
        env=QUIET,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


STAGE = re.compile(r"rq4lens: [\w ]+(, [\d,]+ [a-z]+)?, \d+\.\d s\n")


def without_stages(err):
    """What a command says on stderr besides the stages that it finished."""
    return "".join(line for line in err.splitlines(keepends=True) if not STAGE.fullmatch(line))
