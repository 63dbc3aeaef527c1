"""What a checkpoint will take in memory, read from the headers of its safetensors files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError

from rq4lens.errors import UserError
from rq4lens.models.checkpoint import Checkpoint, is_path, locate
from rq4lens.models.devices import Devices

ON_CPU = Devices(("cpu",))


@dataclass(frozen=True)
class MemoryEstimate:
    """Weights against free memory.

    Attributes:
        source: The checkpoint.
        weights_bytes: Bytes of its weights in the type they are loaded as.
        free_bytes: Bytes free on the device, over all of its chips that are used.
        device: Where they go.
        dtype: The type they are loaded as.
    """

    source: str
    weights_bytes: int
    free_bytes: int
    device: str
    dtype: torch.dtype

    @property
    def fits(self) -> bool:
        """Whether the weights alone fit."""
        return self.weights_bytes <= self.free_bytes

    @property
    def advice(self) -> str:
        """One sentence: what is needed, what there is, and what to do if it is too little."""
        need = (
            f"{self.source} needs {_gigabytes(self.weights_bytes)} as {_short(self.dtype)} on "
            f"{self.device}, where {_gigabytes(self.free_bytes)} are free"
        )
        return f"{need}." if self.fits else f"{need}; {self._remedy}."

    @property
    def _remedy(self) -> str:
        halves = self.dtype.itemsize > 2 and self.weights_bytes * 2 <= (
            self.free_bytes * self.dtype.itemsize
        )
        smaller = "load it as bfloat16" if halves else "use a device with more memory"
        return f"{smaller}, or spread it over more GPUs with n_devices"

    def require_fit(self) -> None:
        """Refuse to start what cannot end well.

        Raises:
            UserError: The weights alone are larger than the free memory.
        """
        if not self.fits:
            raise UserError(self.advice)


def estimate_memory(
    source: str | Path | Checkpoint,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    devices: Devices = ON_CPU,
) -> MemoryEstimate:
    """Bytes of a checkpoint's weights against the free memory, without loading or fetching them.

    Args:
        source: A Hugging Face folder, a hub id, or a checkpoint that is already located.
        revision: Commit, branch or tag of a hub id.
        dtype: Type the weights are loaded as.
        devices: Where they go.

    Returns:
        Both numbers, with advice when it will not fit.

    Raises:
        UserError: There is no such checkpoint, or it has no safetensors.
    """
    return MemoryEstimate(
        source=source.source if isinstance(source, Checkpoint) else str(source),
        weights_bytes=_n_weights(source, revision) * dtype.itemsize,
        free_bytes=sum(map(free_bytes, devices.names)),
        device=str(devices),
        dtype=dtype,
    )


def free_bytes(device: str) -> int:
    """Free memory of a device.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``.

    Returns:
        Bytes; for a device without memory of its own those of the machine.
    """
    if torch.device(device).type != "cuda":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0])


def _n_weights(source: str | Path | Checkpoint, revision: str | None) -> int:
    if isinstance(source, Checkpoint):
        return _count(source)
    if is_path(source) or Path(source).is_dir():
        return _count(locate(source))
    try:
        counts = get_safetensors_metadata(str(source), revision=revision).parameter_count
    except NotASafetensorsRepoError:
        raise UserError(f"{source} has no safetensors on the hub; only these are read.") from None
    except Exception:
        # Whatever keeps the hub from answering, it may have been fetched before; if not, locate
        # says what is wrong.
        return _count(locate(source, revision))
    return sum(counts.values())


def _count(checkpoint: Checkpoint) -> int:
    return sum(tensor.n_values for tensor in checkpoint.tensors.values())


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g} GB"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
