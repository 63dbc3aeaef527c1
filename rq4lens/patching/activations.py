"""Capturing head activations ``z`` at the decision token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from rq4lens.disk.store import NUMERICS_VERSION, Store
from rq4lens.errors import UserError
from rq4lens.models.load.devices import copied_once
from rq4lens.models.load.fingerprint import arithmetic_libraries
from rq4lens.models.load.loading import HookedModel
from rq4lens.models.pair import ModelPair, Side
from rq4lens.models.prompts.prompt_set import PaddingSide, TokenBatch, TokenizedPrompts
from rq4lens.patching.engines.layout import Steps, fused_norms, side_by_side, store_for_products
from rq4lens.patching.keys import NamedIngredients

Reader = Callable[[Tensor], None]
"""Takes the activations that pass a hook point."""


def z_site(layer: int) -> str:
    """Name of the hook point of head activations, ``blocks.{layer}.attn.hook_z``."""
    return f"blocks.{layer}.attn.hook_z"


def patched_positions(batch: TokenBatch, k_positions: int) -> Int[Tensor, "prompt position"]:
    """Indices of the last ``k_positions`` tokens of each padded row, the decision token last."""
    shortest = int(batch.lengths.min())
    if not 1 <= k_positions <= shortest:
        raise UserError(
            f"k_positions {k_positions} does not fit: the shortest prompt has {shortest} tokens; "
            f"choose a number from 1 to {shortest}."
        )
    steps = torch.arange(1 - k_positions, 1)
    return einops.rearrange(batch.decision, "prompt -> prompt 1") + steps


def reader_at(positions: Int[Tensor, "prompt position"]) -> Callable[[Tensor], Tensor]:
    """A function that reads those positions of activations, on whichever device they are."""
    prompts = copied_once(torch.arange(len(positions))[:, None])
    positions_on = copied_once(positions)
    return lambda value: value[prompts(value.device), positions_on(value.device)]


def forward_batch(
    model: HookedModel, batch: TokenBatch, stop_at_layer: int | None = None
) -> Tensor:
    """One forward pass over a padded batch.

    Right padding needs no mask: a causal model's earlier positions cannot see it. The padding side
    is named so that TransformerLens does not derive a mask from the tokenizer's own setting.
    """
    left = batch.padding_side == "left"
    return model(
        batch.tokens.to(device_of(model)),
        attention_mask=batch.attention_mask.to(device_of(model)) if left else None,
        padding_side=batch.padding_side,
        stop_at_layer=stop_at_layer,
    )


def forward_steps(
    model: HookedModel, batch: TokenBatch, stop_at_layer: int, readers: Mapping[int, Reader]
) -> Steps[Tensor]:
    """:func:`forward_batch`, stopping before each block if the model is spread over devices."""
    devices = [next(block.parameters()).device for block in model.blocks]
    if len(set(devices)) == 1 or batch.padding_side == "left":
        yield device_of(model)
        # TransformerLens passes the hook point by its name.
        hooks = [
            (z_site(layer), lambda z, hook, read=read: read(z))  # noqa: ARG005
            for layer, read in readers.items()
        ]
        with model.hooks(fwd_hooks=hooks):
            return forward_batch(model, batch, stop_at_layer)
    resid = forward_batch(model, batch, stop_at_layer=0)
    for layer, block in enumerate(model.blocks[:stop_at_layer]):
        yield devices[layer]
        # A hook is there while its own batch is computed: another one may be under way.
        with reading(block.attn.hook_z, readers.get(layer)):
            resid = block(resid.to(devices[layer]))
    return resid


@contextmanager
def reading(point: HookPoint, read: Reader | None) -> Iterator[None]:
    """Give what passes a hook point to a reader.

    By a hook of torch's own on the one point: setting and lifting those of TransformerLens visits
    every point of the model, which takes longer than a GPU takes for the block.
    """
    if read is None:
        yield
        return
    with point.register_forward_hook(lambda _point, _inputs, value: read(value)):
        yield


def device_of(model: HookedModel) -> torch.device:
    """The device that the model's input goes to."""
    return next(model.parameters()).device


@torch.no_grad()
def capture_z(
    model: HookedModel,
    prompts: TokenizedPrompts,
    layers: Sequence[int],
    *,
    k_positions: int = 1,
    batch_size: int = 32,
    padding_side: PaddingSide = "right",
) -> dict[int, Float[Tensor, "prompt position head d_head"]]:
    """Activations ``z`` of every head at the patched positions.

    The forward pass ends where the last of them has been read.
    """
    check_layers(layers, model.cfg.n_layers)
    cfg = model.cfg
    shape = (len(prompts), k_positions, cfg.n_heads, cfg.d_head)
    captured = {layer: torch.empty(shape, dtype=cfg.dtype) for layer in layers}
    if len(prompts) > batch_size and isinstance(model, HookedTransformer):
        store_for_products(model.blocks[: max(layers) + 1])
    batches = prompts.batches(batch_size, padding_side)
    with fused_norms(model, half_only=True):
        for rows, read in side_by_side(_read(model, b, layers, k_positions) for b in batches):
            for layer, z in read.items():
                captured[layer][rows] = z.to("cpu")
    return captured


def _read(
    model: HookedModel, batch: TokenBatch, layers: Sequence[int], k_positions: int
) -> Steps[tuple[Tensor, dict[int, Tensor]]]:
    """Which prompts a batch has, and their activations by layer."""
    at = reader_at(patched_positions(batch, k_positions))
    read: dict[int, Tensor] = {}

    def reader(layer: int) -> Reader:
        def note(z: Tensor) -> None:
            read[layer] = at(z)
            if layer == max(layers):
                raise _LastOneRead

        return note

    with suppress(_LastOneRead):
        readers = {layer: reader(layer) for layer in layers}
        yield from forward_steps(model, batch, max(layers) + 1, readers)
    return batch.rows, read


class _LastOneRead(Exception):  # noqa: N818 - the expected end of a pass, not an error
    """Ends a forward pass: what follows the last captured site would be computed for nothing."""


def check_layers(layers: Sequence[int], n_layers: int) -> None:
    """Refuse layers that the model does not have."""
    if not layers:
        raise UserError("no layer was named: name at least one.")
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise UserError(
                f"layer {layer} does not exist: the models have layers 0 to {n_layers - 1}."
            )


class PairActivations:
    """Activations z of both models at the decision token, each captured once.

    Activations of the base model are looked up in the store, if there is one, before it is loaded;
    the kind of device is named because each rounds in its own way.
    """

    def __init__(
        self,
        pair: ModelPair,
        *,
        k_positions: int = 1,
        batch_size: int = 32,
        store: Store | None = None,
        device: str = "cpu",
    ) -> None:
        self.pair = pair
        self.k_positions = k_positions
        self.batch_size = batch_size
        self.store = store
        self.device = device
        self._captured: dict[tuple[Side, str, int], Tensor] = {}
        self._on_disk: set[tuple[str, int]] = set()

    def capture(self, side: Side, split: str, layers: Sequence[int]) -> None:
        """Capture what is missing of these layers in one pass."""
        if side == "base":
            self._look_up(split, layers)
        missing = [layer for layer in layers if (side, split, layer) not in self._captured]
        if missing:
            captured = capture_z(
                self.pair.use(side).model,
                self.pair.tokens(side, split),
                missing,
                k_positions=self.k_positions,
                batch_size=self.batch_size,
            )
            self._captured |= {(side, split, layer): z for layer, z in captured.items()}

    def z(self, side: Side, split: str, layer: int) -> Float[Tensor, "prompt position head d_head"]:
        """Activations of one layer; captured now if they are not there yet."""
        self.capture(side, split, [layer])
        return self._captured[side, split, layer]

    def keep(self) -> None:
        """Store what was captured of the base model, for runs that need not load it any more."""
        for (side, split, layer), z in self._captured.items():
            if self.store is not None and side == "base" and (split, layer) not in self._on_disk:
                self.store.put_tensors(self._ingredients(split, layer), {"z": z})
                self._on_disk.add((split, layer))

    def _look_up(self, split: str, layers: Sequence[int]) -> None:
        for layer in layers:
            if self.store is None or ("base", split, layer) in self._captured:
                continue
            found = self.store.get_tensors(self._ingredients(split, layer))
            if found is not None:
                self._captured["base", split, layer] = found["z"]
                self._on_disk.add((split, layer))

    def _ingredients(self, split: str, layer: int) -> NamedIngredients:
        """Everything that can change activations of one layer; batch size and padding cannot."""
        card = self.pair.base.card
        values = {
            "weights": card.weights_fingerprint,
            "config": card.config_fingerprint,
            "tokens": self.pair.token_fingerprint("base", split),
            "layer": layer,
            "k_positions": self.k_positions,
            "dtype": card.dtype,
            "device": self.device,
            "libraries": arithmetic_libraries(),
            "numerics_version": NUMERICS_VERSION,
        }
        return NamedIngredients(f"z_L{layer}", values)
