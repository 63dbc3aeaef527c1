"""Which block of a model goes to which device, and how its input gets there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from rq4lens.errors import UserError
from rq4lens.models.devices import Devices
from rq4lens.models.placement import Placement

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
    """Let a block bring what it is given to its own device before it computes.

    Args:
        block: a block of a model that is spread over devices; it may be moved later on.
    """

    def bring(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        here = next(module.parameters()).device
        return tuple(_at(here, each) for each in args), {
            name: _at(here, each) for name, each in kwargs.items()
        }

    block.register_forward_pre_hook(bring, with_kwargs=True)


def _at(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
