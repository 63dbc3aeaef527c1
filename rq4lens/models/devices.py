"""Which devices a model goes to, and which of its blocks goes where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rq4lens.errors import UserError

AUTO = "auto"
"""The device map that uses every GPU, each by what is free on it."""

SEARCH_STEPS = 60
"""Halvings of the fullest device's share; more would not change a float."""


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


@dataclass(frozen=True)
class ModelBytes:
    """Where a model's weights are: its blocks, and what stands before and after them.

    Args:
        before: of the embeddings.
        blocks: of each block.
        after: of the final norm and the unembedding.
    """

    before: int
    blocks: tuple[int, ...]
    after: int


@dataclass(frozen=True)
class Placement:
    """The device of each block; embeddings go with the first one, the unembedding with the last.

    Args:
        blocks: a device for each block, those of one device in a row.
    """

    blocks: tuple[str, ...]

    @property
    def first(self) -> str:
        """The device that the tokens go to."""
        return self.blocks[0]

    @property
    def last(self) -> str:
        """The device that the logits come from."""
        return self.blocks[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """Every device once, in the order of the layers."""
        return tuple(dict.fromkeys(self.blocks))

    @property
    def n_devices_of_formula(self) -> int:
        """``n_devices`` with which TransformerLens itself finds each block, or 1.

        Its forward pass brings the residual stream to GPU ``first + i * n_devices // n_layers``
        before block ``i``; any other placement costs one copy more wherever the device changes.
        """
        return len(self.names) if self.blocks == _by_formula(self.names, len(self.blocks)) else 1


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


def place_blocks(devices: Devices, size: ModelBytes, free_bytes: Sequence[int]) -> Placement:
    """Give each block a device.

    Args:
        devices: the devices.
        size: what each part of the model takes.
        free_bytes: what is free on each device.

    Returns:
        The placement: even by number of blocks, or such that the fullest device is as empty as it
        can be, in parts of what was free on it.

    Raises:
        UserError: there are more devices than blocks.
    """
    n_blocks = len(size.blocks)
    if len(devices.names) > n_blocks and not devices.by_free_memory:
        raise UserError(
            f"the model has {n_blocks} layers, which cannot be spread over "
            f"{len(devices.names)} devices; name at most {n_blocks}."
        )
    if not devices.by_free_memory:
        return Placement(
            tuple(devices.names[i * len(devices.names) // n_blocks] for i in range(n_blocks))
        )
    low, high = 0.0, _share_of_one(size, free_bytes)
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _filled(size, free_bytes, middle) else (middle, high)
    return Placement(tuple(devices.names[i] for i in _filled(size, free_bytes, high) or ()))


def _share_of_one(size: ModelBytes, free_bytes: Sequence[int]) -> float:
    """The share at which the first device holds everything: always enough."""
    return (1 + size.before + sum(size.blocks) + size.after) / max(1, free_bytes[0])


def _filled(size: ModelBytes, free_bytes: Sequence[int], share: float) -> tuple[int, ...] | None:
    """Fill device after device up to a share of what is free; None if something is left over."""
    own, here, used = [], 0, size.before
    for index, block in enumerate(size.blocks):
        needed = block + (size.after if index == len(size.blocks) - 1 else 0)
        while used + needed > share * max(1, free_bytes[here]):
            # Tokens go where the first block is, so that one starts on the first device.
            if here + 1 == len(free_bytes) or index == 0:
                return None
            here, used = here + 1, 0
        used += needed
        own.append(here)
    return tuple(own)


def _by_formula(names: Sequence[str], n_blocks: int) -> tuple[str, ...]:
    """What ``transformer_lens.utilities.multi_gpu.get_device_for_block_index`` answers."""
    chip = torch.device(names[0])
    if chip.type == "cpu" or len(names) == 1:
        return (names[0],) * n_blocks
    first = chip.index or 0
    return tuple(f"{chip.type}:{first + i * len(names) // n_blocks}" for i in range(n_blocks))


def device_of_block(block: nn.Module) -> torch.device:
    """The device that a block computes on."""
    return next(block.parameters()).device


def placement_of(model: Any) -> Placement:
    """Where the blocks of a loaded model are."""
    return Placement(tuple(str(device_of_block(block)) for block in model.blocks))


def bring_inputs(block: nn.Module) -> None:
    """Let a block bring what it is given to its own device before it computes.

    Args:
        block: a block of a model that is spread over devices; it may be moved later on.
    """

    def bring(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        here = device_of_block(module)
        return tuple(_at(here, each) for each in args), {
            name: _at(here, each) for name, each in kwargs.items()
        }

    block.register_forward_pre_hook(bring, with_kwargs=True)


def _at(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
