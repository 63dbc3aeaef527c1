"""Which devices a model goes to: one, some in a row, GPUs by name, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from rq4lens.errors import UserError

AUTO = "auto"
"""The device map that uses every GPU, each by what is free on it."""


@dataclass(frozen=True)
class Devices:
    """The devices of a model, in the order of its layers.

    Args:
        names: as ``("cuda:0", "cuda:1")``; a single one for most models.
        by_free_memory: whether blocks are shared out by what is free; evenly otherwise.
    """

    names: tuple[str, ...]
    by_free_memory: bool = False

    @property
    def spread(self) -> bool:
        """Whether there is more than one."""
        return len(self.names) > 1

    def __str__(self) -> str:
        return ", ".join(self.names)


def chosen_devices(
    device: str = "cpu", n_devices: int = 1, device_map: str | Sequence[str] | None = None
) -> Devices:
    """The devices that were asked for, checked to be there.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``; with several devices the first.
        n_devices: over how many GPUs the layers are spread evenly, counted from the named one.
        device_map: instead of both: ``"auto"`` for every GPU, shared out by free memory, or GPUs by
            name, as ``"cuda:0,cuda:2"``, shared out evenly in this order.

    Returns:
        The devices.

    Raises:
        UserError: one does not exist, or the three do not go together.
    """
    if device_map is None:
        return _counted(device, n_devices)
    if n_devices != 1 or device not in {"cuda", AUTO}:
        other = f"n_devices={n_devices}" if n_devices != 1 else f"device {device!r}"
        raise UserError(
            f"{other} and device_map={_shown(device_map)} both say where the layers go; "
            "leave one of them out."
        )
    if device_map == AUTO:
        if not torch.cuda.device_count():
            raise UserError(
                "device_map='auto' spreads a model over the GPUs of this machine, and it has none; "
                "leave it out, or use device='cpu'."
            )
        every = tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        return Devices(every, by_free_memory=True)
    names = device_map.split(",") if isinstance(device_map, str) else device_map
    return Devices(_gpus([name.strip() for name in names], device_map))


def _shown(device_map: str | Sequence[str]) -> str:
    return repr(device_map if isinstance(device_map, str) else ",".join(device_map))


def _gpus(names: Sequence[str], device_map: str | Sequence[str]) -> tuple[str, ...]:
    n_gpus = torch.cuda.device_count()
    there = [f"cuda:{index}" for index in range(n_gpus)]
    for name in names:
        if name not in there:
            have = f"has {', '.join(there)}" if there else "has no GPU"
            raise UserError(
                f"device_map={_shown(device_map)} names {name!r}, which is not there (this machine "
                f"{have}); write 'auto', or GPUs that exist as 'cuda:0,cuda:1'."
            )
        if names.count(name) > 1:
            raise UserError(
                f"device_map={_shown(device_map)} names {name!r} twice; name each GPU once, in the "
                "order of the layers."
            )
    return tuple(names)


def _counted(device: str, n_devices: int) -> Devices:
    n_gpus = torch.cuda.device_count()
    try:
        chip = torch.device(device)
    except RuntimeError:
        raise UserError(
            f"device {device!r} is unknown; allowed are 'cpu', 'cuda', 'cuda:1' and so on, 'mps'."
        ) from None
    first = chip.index or 0
    if chip.type == "cuda" and first + n_devices > n_gpus:
        raise UserError(
            f"device {device!r} with n_devices={n_devices} asks for GPUs that are not there "
            f"(this machine has {n_gpus}); use fewer, or device='cpu'."
        )
    if chip.type != "cuda" and n_devices != 1:
        raise UserError(
            f"n_devices={n_devices} spreads a model over GPUs, and device is {device!r}; "
            "use device='cuda', or n_devices=1."
        )
    if n_devices == 1:
        return Devices((device,))
    return Devices(tuple(f"cuda:{index}" for index in range(first, first + n_devices)))


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
