"""Capturing head activations ``z`` at the decision token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, SupportsIndex

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rq4lens.config import refuse_two_places
from rq4lens.disk.store import NUMERICS_VERSION, Store
from rq4lens.errors import UserError
from rq4lens.models.load.devices import Placement, copied_once
from rq4lens.models.load.fingerprint import arithmetic_libraries
from rq4lens.models.load.lens import (
    HookedModel,
    HookedTransformer,
    HookPoint,
    apply_softcap,
    z_site,
)
from rq4lens.models.pair import ModelPair, Side
from rq4lens.models.prompts.prompt_set import PaddingSide, TokenBatch, TokenizedPrompts
from rq4lens.patching.engines.layout import Steps, fused_norms, side_by_side, store_for_products
from rq4lens.patching.keys import NamedIngredients

Reader = Callable[[Tensor], None]
"""Takes the activations that pass a hook point."""


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
    is named so that TransformerLens does not derive a mask from the tokenizer's own setting. After
    its last block a bridge does not stop: it ends with logits.
    """
    if stop_at_layer == model.cfg.n_layers and not isinstance(model, HookedTransformer):
        stop_at_layer = None
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


def unembed(
    model: HookedModel, resid: Float[Tensor, "prompt *row d_model"]
) -> Float[Tensor, "prompt *row vocab"]:
    """Logits of the residual stream after the last block; a bridge's pass ends with them."""
    if not isinstance(model, HookedTransformer):
        return resid
    if model.cfg.normalization_type is not None:
        with fused_norms(model.ln_final):
            resid = model.ln_final(resid)
    return apply_softcap(model.unembed(resid), model.cfg.output_logits_soft_cap)


def precise_dtype(model: HookedModel) -> torch.dtype:
    """The number format of a model's probabilities: float32, or its own if that is more precise."""
    return torch.promote_types(torch.float32, model.cfg.dtype)


class Captured(NamedTuple):
    """What one pass over prompts gives.

    ``log_probs`` is the next-token distribution at the decision token; None unless the pass went
    to its end.
    """

    z: dict[int, Float[Tensor, "prompt position head d_head"]]
    log_probs: Float[Tensor, "prompt vocab"] | None


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
    batches = prompts.batches(batch_size, padding_side)
    return capture(model, batches, len(prompts), layers, k_positions).z


@torch.no_grad()
def capture(
    model: HookedModel,
    batches: Iterable[TokenBatch],
    n_prompts: int,
    layers: Sequence[int],
    k_positions: int,
    *,
    to_the_end: bool = False,
) -> Captured:
    """Activations of some layers, and the next-token distribution if the pass goes to the end."""
    cfg = model.cfg
    shape = (n_prompts, k_positions, cfg.n_heads, cfg.d_head)
    captured = {layer: torch.empty(shape, dtype=cfg.dtype) for layer in layers}
    log_probs = None
    if to_the_end:
        log_probs = torch.empty(n_prompts, cfg.d_vocab_out, dtype=precise_dtype(model))
    stop = cfg.n_layers if to_the_end else max(layers) + 1
    batches = list(batches)
    if len(batches) > 1 and isinstance(model, HookedTransformer):
        store_for_products(model.blocks[:stop])
    with fused_norms(model, half_only=True):
        works = (_read(model, batch, layers, k_positions, stop, to_the_end) for batch in batches)
        for rows, read, ends in side_by_side(works):
            for layer, z in read.items():
                captured[layer][rows] = z.to("cpu")
            if log_probs is not None:
                logits = unembed(model, ends.to(Placement.of(model).exit))
                log_probs[rows] = logits.double().log_softmax(-1).to(log_probs).cpu()
    return Captured(captured, log_probs)


def _read(
    model: HookedModel,
    batch: TokenBatch,
    layers: Sequence[int],
    k_positions: int,
    stop: int,
    to_the_end: bool,
) -> Steps[tuple[Tensor, dict[int, Tensor], Tensor]]:
    """Which prompts a batch has, their activations by layer, and where their last block ended."""
    at = reader_at(patched_positions(batch, k_positions))
    read: dict[int, Tensor] = {}
    ends = torch.empty(0)

    def reader(layer: int) -> Reader:
        def note(z: Tensor) -> None:
            read[layer] = at(z)
            if layer == stop - 1 and not to_the_end:
                raise _LastOneRead

        return note

    with suppress(_LastOneRead):
        readers = {layer: reader(layer) for layer in layers}
        resid = yield from forward_steps(model, batch, stop, readers)
        ends = at(resid)[:, -1]
    return batch.rows, read, ends


class _LastOneRead(Exception):  # noqa: N818 - the expected end of a pass, not an error
    """Ends a forward pass: what follows the last captured site would be computed for nothing."""


def checked_layers(layers: int | Sequence[int], n_layers: int) -> list[int]:
    """Layers as Python users name them, one or several, if the model has them."""
    several = list(layers) if isinstance(layers, Iterable) else [layers]
    check_layers(several, n_layers)
    return several


def check_layers(layers: Sequence[int], n_layers: int) -> None:
    """Refuse layers that the model does not have."""
    if not layers:
        raise UserError("no layer was named: name at least one.")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, SupportsIndex):
            raise UserError(f"{layer!r} is no layer: give its number, or several as [1, 2].")
        if not 0 <= layer < n_layers:
            raise UserError(
                f"layer {layer} does not exist: the models have layers 0 to {n_layers - 1}."
            )


def require_finite(whole: Sequence[bool], ids: Sequence[str], side: Side, dtype: str) -> None:
    """Refuse prompts on which a model's numbers overflow, by the first of them."""
    lost = [name for name, is_whole in zip(ids, whole, strict=True) if not is_whole]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"the {side} model computes numbers that are not finite as {dtype} on prompt "
            f"{lost[0]!r}{more}: load the models with --dtype bfloat16 or float32, or leave it out."
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
        refuse_two_places(pair.reading, k_positions)
        self.pair = pair
        self.k_positions = k_positions
        self.batch_size = batch_size
        self.store = store
        self.device = device
        self._captured: dict[tuple[Side, str, int], Tensor] = {}
        self._log_probs: dict[tuple[Side, str], Tensor] = {}
        self._on_disk: set[tuple[str, int | None]] = set()

    def beside(self, pair: ModelPair) -> PairActivations:
        """Activations of a pair of the same base model and prompts; base's are there already."""
        other = PairActivations(pair, k_positions=self.k_positions, batch_size=self.batch_size)
        other._captured = {key: z for key, z in self._captured.items() if key[0] == "base"}
        other._log_probs = {key: each for key, each in self._log_probs.items() if key[0] == "base"}
        return other

    def capture(
        self, side: Side, split: str, layers: Sequence[int], *, to_the_end: bool = False
    ) -> None:
        """Capture what is missing of these layers, and of the next-token distribution, at once."""
        if side == "base":
            self._look_up(split, [*layers, None] if to_the_end else layers)
        missing = [layer for layer in layers if (side, split, layer) not in self._captured]
        to_the_end = to_the_end and (side, split) not in self._log_probs
        if missing or to_the_end:
            model, prompts = self.pair.use(side).model, self.pair.tokens(side, split)
            check_layers(layers, model.cfg.n_layers)
            found = capture(
                model,
                prompts.batches(self.batch_size),
                len(prompts),
                missing,
                self.k_positions,
                to_the_end=to_the_end,
            )
            for z in found.z.values():
                whole = z.flatten(1).isfinite().all(1).tolist()
                require_finite(whole, prompts.ids, side, self.pair.member(side).card.dtype)
            self._captured |= {(side, split, layer): z for layer, z in found.z.items()}
            if found.log_probs is not None:
                self._log_probs[side, split] = found.log_probs

    def log_probs(self, side: Side, split: str) -> Float[Tensor, "prompt vocab"]:
        """The clean next-token distribution at the decision token."""
        self.capture(side, split, (), to_the_end=True)
        return self._log_probs[side, split]

    def z(self, side: Side, split: str, layer: int) -> Float[Tensor, "prompt position head d_head"]:
        """Activations of one layer; captured now if they are not there yet."""
        self.capture(side, split, [layer])
        return self._captured[side, split, layer]

    def keep(self) -> None:
        """Store what was captured of the base model, for runs that need not load it any more."""
        found: dict[tuple[str, int | None], dict[str, Tensor]] = {
            (split, layer): {"z": z}
            for (side, split, layer), z in self._captured.items()
            if side == "base"
        }
        for (side, split), log_probs in self._log_probs.items():
            if side == "base":
                found[split, None] = {"log_probs": log_probs}
        for place, tensors in found.items():
            if self.store is not None and place not in self._on_disk:
                self.store.put_tensors(self._ingredients(*place), tensors)
                self._on_disk.add(place)

    def _look_up(self, split: str, layers: Sequence[int | None]) -> None:
        for layer in layers:
            there = (layer is None and ("base", split) in self._log_probs) or (
                ("base", split, layer) in self._captured
            )
            if self.store is None or there:
                continue
            found = self.store.get_tensors(self._ingredients(split, layer))
            if found is None:
                continue
            if layer is None:
                self._log_probs["base", split] = found["log_probs"]
            else:
                self._captured["base", split, layer] = found["z"]
            self._on_disk.add((split, layer))

    def _ingredients(self, split: str, layer: int | None) -> NamedIngredients:
        """Everything that can change what is stored; batch size and padding cannot.

        ``layer`` is None for the next-token distribution.
        """
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
        return NamedIngredients("log_probs" if layer is None else f"z_L{layer}", values)
