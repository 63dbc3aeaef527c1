"""What a model will take in memory, worked out from its configuration before a weight is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from rq4lens.errors import UserError
from rq4lens.models.load.adapters import base_of, vocabulary_of
from rq4lens.models.load.checkpoint import Checkpoint, explained
from rq4lens.models.load.conversion import USUAL, hooked_config, hooked_skeleton
from rq4lens.models.load.devices import (
    Devices,
    ModelBytes,
    Placement,
    free_bytes,
    n_bytes,
    place_blocks,
)
from rq4lens.models.load.huggingface import (
    blocks_of,
    loadable_architecture,
    read_hf_config,
    skeleton_of,
)
from rq4lens.models.load.lens import (
    Backend,
    ModelConfig,
    build_bridge_config_from_hf,
    chosen_backend,
)


@dataclass(frozen=True)
class ModelSize:
    """A model that was not loaded; ``weights`` are exactly those of the loaded one."""

    source: str
    architecture: str
    cfg: ModelConfig
    weights: ModelBytes


_MEASURED: dict[str, ModelBytes] = {}
"""Bytes by configuration: the plan of a run and both loads ask for the same."""


def model_size(
    asked: Checkpoint, dtype: torch.dtype = torch.float32, backend: Backend | None = None
) -> ModelSize:
    """The size of a checkpoint's model, from its small files; an adapter's when it is merged."""
    backend = chosen_backend(backend)
    base = base_of(asked) if asked.is_adapter else asked
    architecture, hf_config = loadable_architecture(base, backend), read_hf_config(base)
    if asked.is_adapter and (asked.with_weights or asked.revision is None):
        text = hf_config.get_text_config()
        text.vocab_size = vocabulary_of(asked) or text.vocab_size
    if backend == "bridge":
        with explained(f"TransformerLens has no bridge for this {architecture}", USUAL):
            cfg = build_bridge_config_from_hf(hf_config, architecture, architecture, dtype)
    else:
        cfg = hooked_config(hf_config, architecture, dtype=dtype, device="meta")
    key = json.dumps([backend, cfg.to_dict()], sort_keys=True, default=str)
    if key not in _MEASURED and backend == "hooked":
        _MEASURED[key] = ModelBytes.of(hooked_skeleton(cfg))
    elif key not in _MEASURED:
        _MEASURED[key] = _bridge_bytes(skeleton_of(base, hf_config, dtype))
    return ModelSize(asked.source, architecture, cfg, _MEASURED[key])


def _bridge_bytes(skeleton: Any) -> ModelBytes:
    """Bytes of a Hugging Face model's weights; an output embedding of its own comes last."""
    with explained("this model has no list of blocks", USUAL):
        _, layers = blocks_of(skeleton)
    tied = skeleton.get_output_embeddings().weight is skeleton.get_input_embeddings().weight
    after = 0 if tied else n_bytes(skeleton.get_output_embeddings())
    blocks = tuple(map(n_bytes, layers))
    return ModelBytes(n_bytes(skeleton) - sum(blocks) - after, blocks, after)


@dataclass(frozen=True)
class MemoryEstimate:
    """Which block of a model goes where, and the bytes that are free on each device."""

    size: ModelSize
    placement: Placement
    free: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether the weights alone fit, on each device."""
        held = self.size.weights.on(self.placement)
        return all(n_bytes <= self.free[device] for device, n_bytes in held.items())

    def require_fit(self) -> None:
        """Refuse weights that alone are larger than the free memory."""
        if self.fits:
            return
        dtype, needed, free = self.size.cfg.dtype, self.size.weights.total, sum(self.free.values())
        halves = dtype.itemsize > 2 and needed * 2 <= free * dtype.itemsize
        raise UserError(
            f"{self.size.source} needs {gigabytes(needed)} as {str(dtype).removeprefix('torch.')} "
            f"on {', '.join(self.free)}, where {gigabytes(free)} are free; "
            f"{'load it as bfloat16' if halves else 'use a device with more memory'}, or spread it "
            "over more GPUs with n_devices or device_map."
        )


def estimate_memory(size: ModelSize, devices: Devices | None = None) -> MemoryEstimate:
    """A model's weights against the free memory of its devices."""
    devices = devices or Devices(("cpu",))
    free = {str(torch.device(name)): free_bytes(name) for name in devices.names}
    return MemoryEstimate(size, place_blocks(devices, size.weights, list(free.values())), free)


def gigabytes(n_bytes: int) -> str:
    """Bytes as a person reads them; few of them in MB."""
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.3g} MB"
