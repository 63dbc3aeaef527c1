"""Interventions as rows: their order, their clean references, and the blend at each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rq4lens.errors import UserError
from rq4lens.models.load.devices import Placement
from rq4lens.patching.activations import z_site
from rq4lens.patching.patch import Intervention, Patch, Sources, blend


def entry_layer(intervention: Intervention, default: int) -> int:
    """The lowest layer an intervention patches; an empty intervention may enter anywhere."""
    return min((patch.layer for patch in intervention), default=default)


@dataclass(frozen=True)
class RowGroup:
    """Rows that enter at one layer: a clean reference first, then the interventions.

    Args:
        layer: where they enter.
        start: index of the reference among the rows.
        conditions: the interventions, by their place in the sorted list.
    """

    layer: int
    start: int
    conditions: slice

    @property
    def stop(self) -> int:
        """One past the group's last row."""
        return self.start + 1 + self.conditions.stop - self.conditions.start


@dataclass(frozen=True)
class LayerPatch:
    """All rows that one layer blends with one source.

    Args:
        rows: which rows.
        mask: their patched heads.
        alpha: their blend strengths.
    """

    rows: Int[Tensor, "condition"]
    mask: Bool[Tensor, "condition 1 head"]
    alpha: Float[Tensor, "condition 1"]


@dataclass(frozen=True)
class Rows:
    """Interventions sorted by the layer at which they leave the clean run.

    The rows of one layer start with a clean reference: it runs through the same products, of the
    same shapes and in the same precision, as the rows that are compared with it.

    Args:
        interventions: what each row patches; nothing for a reference.
        groups: the rows by entry layer, lowest first.
        placement: where each layer's blends happen.
    """

    interventions: tuple[Intervention, ...]
    groups: tuple[RowGroup, ...]
    placement: Placement

    @classmethod
    def arrange(
        cls,
        interventions: Sequence[Intervention],
        conditions: slice,
        placement: Placement,
    ) -> Rows:
        """The rows of some of the interventions."""
        last = len(placement.layers) - 1
        rows: list[Intervention] = []
        groups: list[RowGroup] = []
        at = conditions.start
        chosen = interventions[conditions]
        for layer, members in groupby(chosen, key=lambda each: entry_layer(each, last)):
            start = len(rows)
            rows += [(), *members]
            groups.append(RowGroup(layer, start, slice(at, at + len(rows) - start - 1)))
            at = groups[-1].conditions.stop
        return cls(tuple(rows), tuple(groups), placement)

    def only(self, group: RowGroup) -> Rows:
        """The rows of one group."""
        chosen = self.interventions[group.start : group.stop]
        return Rows(chosen, (RowGroup(group.layer, 0, group.conditions),), self.placement)

    def entering(self, layer: int) -> int:
        """How many rows enter at a layer."""
        return sum(group.stop - group.start for group in self.groups if group.layer == layer)

    @cached_property
    def patches(self) -> dict[tuple[int, str], LayerPatch]:
        """The blends, by layer and source."""
        found: dict[tuple[int, str], list[tuple[int, Patch]]] = {}
        for row, intervention in enumerate(self.interventions):
            for patch in intervention:
                found.setdefault((patch.layer, patch.source), []).append((row, patch))
        return {
            key: self._layer_patch(members, self.placement.layers[key[0]])
            for key, members in found.items()
        }

    @staticmethod
    def _layer_patch(members: list[tuple[int, Patch]], device: torch.device) -> LayerPatch:
        rows = torch.tensor([row for row, _ in members])
        mask = torch.tensor([patch.heads.mask for _, patch in members], dtype=torch.bool)
        alpha = torch.tensor([patch.alpha for _, patch in members], dtype=torch.float64)
        alpha = rearrange(alpha, "condition -> condition 1")
        mask = rearrange(mask, "condition head -> condition 1 head")
        # A blocking copy would wait until the device has worked off everything that is queued.
        return LayerPatch(*(tensor.to(device, non_blocking=True) for tensor in (rows, mask, alpha)))

    def blend_into(
        self,
        z: Float[Tensor, "prompt condition position head d_head"],
        layer: int,
        sources: Mapping[tuple[int, str], Float[Tensor, "prompt position head d_head"]],
    ) -> None:
        """Blend what this layer's rows are patched with into their ``z``, in place."""
        for (patched_layer, source), patch in self.patches.items():
            if patched_layer == layer:
                current = z[:, patch.rows]
                incoming = rearrange(
                    sources[layer, source],
                    "prompt position head d_head -> prompt 1 position head d_head",
                )
                z[:, patch.rows] = blend(
                    current, incoming.expand_as(current), patch.mask, patch.alpha
                )


def used_sources(
    interventions: Sequence[Intervention], sources: Sources
) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """The sources that some intervention names, by layer and name."""
    keys = {(patch.layer, patch.source) for group in interventions for patch in group}
    return ((key, sources[key]) for key in sorted(keys))


def check_source(key: tuple[int, str], source: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a source that does not fit the site it is patched into.

    Raises:
        UserError: if the shapes differ.
    """
    if tuple(source.shape) != shape:
        layer, name = key
        raise UserError(
            f"cannot patch source {name!r} into {z_site(layer)}: the site has shape {shape} "
            f"[prompt position head d_head], the source {tuple(source.shape)}; capture it on the "
            "same prompts of a model of this shape."
        )
