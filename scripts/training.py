"""What the trainings of the pairs in the box share: the loop, and the folder that they write."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Schedule:
    """How long one stretch of training goes on, and how fast.

    Attributes:
        steps: number of optimiser steps.
        lr: peak learning rate, after a linear warm-up and before a cosine decay to 0.
        warmup: steps of the warm-up.
        weight_decay: decoupled weight decay.
    """

    steps: int
    lr: float
    warmup: int
    weight_decay: float = 0.01


def learning_rate_factor(step: int, schedule: Schedule) -> float:
    """Linear warm-up to 1, then half a cosine down to 0."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(schedule.steps - schedule.warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


def fit(
    model: nn.Module,
    loss_at: Callable[[int], Float[Tensor, ""]],
    schedule: Schedule,
    name: str,
    log_every: int,
) -> None:
    """Train what of a model takes gradients; the loss is of a fresh batch at each step."""
    free = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        free, lr=schedule.lr, betas=(0.9, 0.98), weight_decay=schedule.weight_decay
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate_factor(step, schedule)
    )
    for step in range(schedule.steps):
        loss = loss_at(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(free, 1.0)
        optimiser.step()
        rate.step()
        if log_every and step % log_every == 0:
            print(name, step, f"{float(loss.detach()):.4f}", flush=True)


def write_models(
    directory: Path,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """Write models with their tokenizer, and the prompts; give the hash of each model's weights."""
    for side, model in models.items():
        model.save_pretrained(directory / side)
        tokenizer.save_pretrained(directory / side)
        (directory / side / "generation_config.json").unlink(missing_ok=True)
    lines = [json.dumps(row) + "\n" for row in prompts]
    (directory / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return {side: _sha256(directory / side / "model.safetensors") for side in models}


def where_trained(device: str) -> dict[str, Any]:
    """The device and the libraries of a training, for its manifest."""
    return {
        "trained_on": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "libraries": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write what is known of a pair beside it."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (directory / "manifest.json").write_text(text, encoding="utf-8")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
