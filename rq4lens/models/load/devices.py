"""Which devices a model goes to, which block to which of them, and how its input gets there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from rq4lens.config import Place
from rq4lens.errors import UserError
from rq4lens.models.load.lens import HookedModel, HookedTransformer

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time in a period, and the period, as Linux states them."""

WATCHED_SECONDS = 0.1

SMALL_MODEL_BYTES = 2e8
"""Up to this many bytes of weights, threads wait for each other longer than they work: beside
another busy process several are many times slower than one."""


def choose_threads(weight_bytes: int) -> None:
    """A thread of torch for each core, for a small model only for those that nobody works on.

    ``OMP_NUM_THREADS`` decides first.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = usable_cores()
        busy = busy_cores() if weight_bytes <= SMALL_MODEL_BYTES else 0
        torch.set_num_threads(max(1, cores - busy))


def busy_cores() -> int:
    """Cores that other processes work on now; a load average would count what has ended, too."""
    busy: list[float] = psutil.cpu_percent(interval=WATCHED_SECONDS, percpu=True)
    return round(sum(busy) / 100)


def usable_cores() -> int:
    """Physical cores that this process may use, by its affinity and the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = [allowed or 1, psutil.cpu_count(logical=False) or 1]
    with suppress(OSError, ValueError):  # no such file, or "max": there is no quota
        quota, period = map(int, CPU_QUOTA.read_text(encoding="ascii").split())
        cores.append(max(1, quota // period))
    return min(cores)


@dataclass(frozen=True)
class Placement:
    """The device of each layer, and the one where the logits come out.

    Kernels of different devices run side by side: while one device works on the upper layers of
    some rows, the next rows can pass through the lower layers on another, as long as nobody waits
    for a number.
    """

    layers: tuple[torch.device, ...]
    exit: torch.device

    @classmethod
    def of(cls, model: HookedModel) -> Placement:
        """Where the weights of a model are."""
        layers = tuple(next(block.parameters()).device for block in model.blocks)
        return cls(layers, next(model.unembed.parameters()).device)

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

    Blocks are shared out evenly, or by what is free on each device.
    """

    names: tuple[str, ...]
    by_free_memory: bool = False

    def __str__(self) -> str:
        return ", ".join(self.names)


def resolve_device(device: str) -> str:
    """``"auto"`` becomes ``"cuda"`` where there is one, and ``"cpu"`` elsewhere."""
    if device == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # a number comes back: it computes there
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0].split(". ")[0]
        if "Expected one of" in reason:  # torch goes on with every kind of device it ever knew
            reason = "there is no such kind"
        raise UserError(
            f"device {device!r} cannot be used here ({reason}): give cpu, cuda, cuda:1 and so on, "
            "mps, or auto."
        ) from None
    return device


def chosen_devices(place: Place) -> Devices:
    """The devices that each model goes to, checked to be there."""
    every = tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    if place.device_map is not None:
        return _mapped(place, every)
    device, n_devices = resolve_device(place.device), place.n_devices
    if n_devices == 1:
        return Devices((device,))
    first = torch.device(device).index or 0
    if torch.device(device).type != "cuda":
        raise UserError(
            f"n_devices={n_devices} spreads a model over GPUs, and device is {device!r}; "
            "use device='cuda', or n_devices=1."
        )
    if first + n_devices > len(every):
        raise UserError(
            f"device {device!r} with n_devices={n_devices} asks for GPUs that are not there "
            f"(this machine has {len(every)}); use fewer, or device='cpu'."
        )
    return Devices(every[first : first + n_devices])


def _mapped(place: Place, every: tuple[str, ...]) -> Devices:
    """Those that a device map names, of every GPU of this machine."""
    shown = f"device_map={place.device_map!r}"
    if place.n_devices != 1 or place.device not in {"cuda", AUTO}:
        one = place.n_devices == 1
        other = f"device {place.device!r}" if one else f"n_devices={place.n_devices}"
        raise UserError(f"{other} and {shown} both say where the layers go; leave one of them out.")
    if place.device_map == AUTO:
        if not every:
            raise UserError(
                f"{shown} spreads a model over the GPUs of this machine, and it has none; leave it "
                "out, or use device='cpu'."
            )
        return Devices(every, by_free_memory=True)
    names = tuple(name.strip() for name in str(place.device_map).split(","))
    for name in names:
        if name not in every:
            have = f"has {', '.join(every)}" if every else "has no GPU"
            raise UserError(
                f"{shown} names {name!r}, which is not there (this machine {have}); write 'auto', "
                "or GPUs that exist as 'cuda:0,cuda:1'."
            )
        if names.count(name) > 1:
            raise UserError(
                f"{shown} names {name!r} twice; name each GPU once, in the order of the layers."
            )
    return Devices(names)


def free_bytes(device: str) -> int:
    """Free memory of a device."""
    if torch.device(device).type != "cuda":
        return int(psutil.virtual_memory().available)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + reusable)


def has_room_for(model: nn.Module) -> bool:
    """Whether another such model fits beside it, on the same devices."""
    needed: Counter[str] = Counter()
    for parameter in model.parameters():
        needed[str(parameter.device)] += parameter.numel() * parameter.element_size()
    return all(n_bytes <= free_bytes(device) for device, n_bytes in needed.items())


AT_THE_EXIT = ("ln_final", "unembed")
"""What is with the last block."""


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model's weights: before its blocks, in each of them, and after them."""

    before: int
    blocks: tuple[int, ...]
    after: int

    @classmethod
    def of(cls, model: HookedTransformer) -> ModelBytes:
        """Of a model, with or without memory for its weights."""
        blocks = tuple(map(n_bytes, model.blocks))
        after = sum(n_bytes(getattr(model, name)) for name in AT_THE_EXIT)
        return cls(n_bytes(model) - sum(blocks) - after, blocks, after)

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


def n_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights, each counted once."""
    return sum(parameter.nbytes for parameter in module.parameters())


def place_blocks(devices: Devices, size: ModelBytes, free_bytes: Sequence[int]) -> Placement:
    """Give each block a device.

    By free memory, the fullest device is as empty as the order of the layers allows; accelerate's
    own placement fills one device after the other, or shares out evenly whatever is free.
    """
    n_blocks, n_devices = len(size.blocks), len(devices.names)
    if devices.by_free_memory:
        low, high = 0.0, (1 + size.total) / max(1, free_bytes[0])  # all of it on the first device
        for _ in range(60):  # more halvings would not change a float
            middle = (low + high) / 2
            low, high = (low, middle) if _filled(size, free_bytes, middle) else (middle, high)
        places = _filled(size, free_bytes, high)
    elif n_devices > n_blocks:
        raise UserError(
            f"the model has {n_blocks} layers, which cannot be spread over {n_devices} devices; "
            f"name at most {n_blocks}."
        )
    else:
        places = [i * n_devices // n_blocks for i in range(n_blocks)]
    return Placement.in_order([devices.names[i] for i in places])


def _filled(size: ModelBytes, free_bytes: Sequence[int], share: float) -> list[int]:
    """Fill device after device up to a share of what is free; empty if something is left over."""
    places: list[int] = []
    here, used = 0, size.before
    for index, block in enumerate(size.blocks):
        needed = block + (size.after if index == len(size.blocks) - 1 else 0)
        while used + needed > share * max(1, free_bytes[here]):
            # Tokens go where the first block is, so that one starts on the first device.
            if here + 1 == len(free_bytes) or index == 0:
                return []
            here, used = here + 1, 0
        used += needed
        places.append(here)
    return places


def bring_inputs(block: nn.Module) -> None:
    """Let a block bring what it is given to its own device before it computes."""

    def bring(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return send_to_device((args, kwargs), next(module.parameters()).device)

    block.register_forward_pre_hook(bring, with_kwargs=True)
