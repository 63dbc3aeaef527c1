"""Which devices a model goes to, which block to which of them, and how its input gets there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from rq4lens.errors import UserError


@dataclass(frozen=True)
class Placement:
    """The device of each layer.

    Kernels of different devices run side by side: while one device works on the upper layers of
    some rows, the next rows can pass through the lower layers on another, as long as nobody waits
    for a number.

    Args:
        layers: where each block is.
        exit: where the logits come out.
    """

    layers: tuple[torch.device, ...]
    exit: torch.device

    @classmethod
    def of(cls, model: HookedTransformer) -> Placement:
        """Where the weights of a model are."""
        layers = tuple(next(block.parameters()).device for block in model.blocks)
        return cls(layers, model.unembed.W_U.device)

    @classmethod
    def all_on(cls, device: torch.device, n_layers: int) -> Placement:
        """Everything on one device."""
        return cls((device,) * n_layers, device)

    @classmethod
    def in_order(cls, layers: Sequence[str | torch.device]) -> Placement:
        """Blocks on these devices, the logits from the last of them."""
        devices = tuple(map(torch.device, layers))
        return cls(devices, devices[-1])

    @property
    def entry(self) -> torch.device:
        """The device that tokens go to: embeddings are with the first block."""
        return self.layers[0]

    @property
    def n_devices_of_formula(self) -> int:
        """``n_devices`` with which TransformerLens itself finds each block, or 1.

        Its forward pass brings the residual stream to GPU ``first + i * n_devices // n_layers``
        before block ``i`` (``utilities.multi_gpu.get_device_for_block_index``); any other placement
        costs one copy more wherever the device changes.
        """
        first, n_layers, n_devices = self.entry.index or 0, len(self.layers), len(self.devices)
        by_formula = (first + i * n_devices // n_layers for i in range(n_layers))
        found = [(self.entry.type, device.index or 0) for device in self.layers]
        return n_devices if found == [(self.entry.type, index) for index in by_formula] else 1

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices, in the order in which a forward pass visits them."""
        return tuple(dict.fromkeys((*self.layers, self.exit)))

    @property
    def largest_share(self) -> float:
        """Share of the layers that are on the fullest device."""
        return max(Counter(self.layers).values()) / len(self.layers)


def copied_once(tensor: Tensor) -> Callable[[torch.device], Tensor]:
    """The tensor on any device; each gets its copy when it is first asked for."""

    @cache
    def on(device: torch.device) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return on


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
    if device == AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
    """Free memory of a device."""
    if torch.device(device).type != "cuda":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0])


AT_THE_EXIT = ("ln_final", "unembed")
"""What is with the last block."""

SEARCH_STEPS = 60
"""Halvings of the fullest device's share; more would not change a float."""


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

    @classmethod
    def of(cls, model: HookedTransformer) -> ModelBytes:
        """Of a model, with or without memory for its weights."""
        blocks = tuple(map(_n_bytes, model.blocks))
        after = sum(_n_bytes(getattr(model, name)) for name in AT_THE_EXIT)
        return cls(_n_bytes(model) - sum(blocks) - after, blocks, after)

    @property
    def total(self) -> int:
        """Of all weights."""
        return self.before + sum(self.blocks) + self.after

    def on(self, placement: Placement) -> dict[str, int]:
        """How many of them each device of a placement holds."""
        held = dict.fromkeys(map(str, placement.devices), 0)
        for device, n_bytes in zip(placement.layers, self.blocks, strict=True):
            held[str(device)] += n_bytes
        held[str(placement.entry)] += self.before
        held[str(placement.exit)] += self.after
        return held


def _n_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def place_blocks(devices: Devices, size: ModelBytes, free_bytes: Sequence[int]) -> Placement:
    """Give each block a device.

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
        return Placement.in_order(
            [devices.names[i * len(devices.names) // n_blocks] for i in range(n_blocks)]
        )
    low, high = 0.0, _share_of_one(size, free_bytes)
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _filled(size, free_bytes, middle) else (middle, high)
    return Placement.in_order([devices.names[i] for i in _filled(size, free_bytes, high) or ()])


def _share_of_one(size: ModelBytes, free_bytes: Sequence[int]) -> float:
    """The share at which the first device holds everything: always enough."""
    return (1 + size.total) / max(1, free_bytes[0])


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


def bring_inputs(block: nn.Module) -> None:
    """Let a block bring what it is given to its own device before it computes."""

    def bring(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        here = next(module.parameters()).device
        return tuple(_at(here, each) for each in args), {
            name: _at(here, each) for name, each in kwargs.items()
        }

    block.register_forward_pre_hook(bring, with_kwargs=True)


def _at(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
