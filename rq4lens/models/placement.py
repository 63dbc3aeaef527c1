"""Where the parts of a model are: all on one device, or its layers in order over several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformer_lens import HookedTransformer


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
