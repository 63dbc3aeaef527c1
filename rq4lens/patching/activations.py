"""Capturing head activations ``z`` at the decision token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int64
from numpy import ndarray
from torch import Tensor

from rq4lens.config import refuse_two_places
from rq4lens.disk.store import NUMERICS_VERSION, Store
from rq4lens.errors import UserError
from rq4lens.models.load.devices import Placement
from rq4lens.models.load.fingerprint import arithmetic_libraries
from rq4lens.models.load.lens import (
    HookedModel,
    HookedTransformer,
)
from rq4lens.models.pair import ModelPair, Side
from rq4lens.models.prompts.prompt_set import PaddingSide, TokenBatch, TokenizedPrompts
from rq4lens.patching.answers import answers_of, in_tokens_of
from rq4lens.patching.engines.layout import (
    Steps,
    fused_norms,
    norms_of,
    side_by_side,
    store_for_products,
)
from rq4lens.patching.keys import NamedIngredients
from rq4lens.patching.passes import Reader, forward_steps, precise_dtype, reader_at, unembed
from rq4lens.patching.patch import Site


class Captured(NamedTuple):
    """What one pass over prompts gives.

    ``log_probs`` is the next-token distribution at each compared token, 0 where an answer is
    shorter; None unless the pass went to its end.
    """

    z: dict[int, Site]
    log_probs: Float[Tensor, "prompt answer vocab"] | None


def capture_z(
    model: HookedModel,
    prompts: TokenizedPrompts,
    layers: Sequence[int],
    *,
    k_positions: int = 1,
    batch_size: int = 32,
    padding_side: PaddingSide = "right",
) -> dict[int, Site]:
    """Activations ``z`` of every head at the patched tokens; 0 where a prompt has fewer.

    The forward pass ends where the last of them has been read.
    """
    check_layers(layers, model.cfg.n_layers)
    batches = prompts.placed(k_positions).batches(batch_size, padding_side)
    return capture(model, list(batches), layers).z


@torch.no_grad()
def capture(
    model: HookedModel,
    batches: Sequence[TokenBatch],
    layers: Sequence[int],
    *,
    to_the_end: bool = False,
) -> Captured:
    """Activations of some layers, and the next-token distribution if the pass goes to the end."""
    cfg, n_prompts = model.cfg, sum(len(batch.rows) for batch in batches)
    shape = (n_prompts, batches[0].spots.shape[1], cfg.n_heads, cfg.d_head)
    captured = {layer: torch.empty(shape, dtype=cfg.dtype) for layer in layers}
    log_probs = None
    if to_the_end:
        ends_shape = (n_prompts, batches[0].longest_answer, cfg.d_vocab_out)
        log_probs = torch.empty(ends_shape, dtype=precise_dtype(model))
    stop = cfg.n_layers if to_the_end else max(layers) + 1
    if len(batches) > 1 and isinstance(model, HookedTransformer):
        store_for_products(model.blocks[:stop])
    with fused_norms(norms_of(model), half_only=True):
        works = (_read(model, batch, layers, stop, to_the_end) for batch in batches)
        for batch, read, ends in side_by_side(works):
            for layer, z in read.items():
                captured[layer][batch.rows] = z.to("cpu")
            if log_probs is not None:
                logits = unembed(model, ends.to(Placement.of(model).exit))
                put_log_probs(log_probs, batch, logits)
    return Captured(captured, log_probs)


def put_log_probs(
    into: Float[Tensor, "every_prompt answer vocab"],
    batch: TokenBatch,
    logits: Float[Tensor, "prompt answer vocab"],
) -> None:
    """Note the distributions of a batch, 0 where an answer is shorter."""
    there = batch.compared.there[..., None]
    found = logits.double().log_softmax(-1).to(into).cpu()
    into[batch.rows] = torch.where(there, found, 0)


def _read(
    model: HookedModel,
    batch: TokenBatch,
    layers: Sequence[int],
    stop: int,
    to_the_end: bool,
) -> Steps[tuple[TokenBatch, dict[int, Tensor], Tensor]]:
    """A batch, its activations by layer, and where the last block ended at compared tokens."""
    at = reader_at(batch.patched)
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
        ends = reader_at(batch.compared)(resid) if to_the_end else ends
    return batch, read, ends


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
        self._read: dict[tuple[Side, str], TokenizedPrompts] = {}
        self._captured: dict[tuple[Side, str, int], Tensor] = {}
        self._log_probs: dict[tuple[Side, str], Tensor] = {}
        self._on_disk: set[tuple[str, int | None]] = set()

    def beside(self, pair: ModelPair) -> PairActivations:
        """Activations of a pair of the same base model and prompts; base's are there already."""
        other = PairActivations(pair, k_positions=self.k_positions, batch_size=self.batch_size)
        other._captured = {key: z for key, z in self._captured.items() if key[0] == "base"}
        other._log_probs = {key: each for key, each in self._log_probs.items() if key[0] == "base"}
        return other

    def read(self, side: Side, split: str) -> TokenizedPrompts:
        """The prompts of a split as one of the models reads them, with what is compared."""
        tokens = self.pair.tokens(side, split)
        if self.pair.reading.answer_tokens == 1:
            return tokens
        if (side, split) not in self._read:
            answers = answers_of(self.pair, split, self.batch_size)
            own = in_tokens_of(self.pair, side, split, answers)
            self._read[side, split] = tokens.continued(own)
        return self._read[side, split]

    def prompts(self, side: Side, split: str) -> TokenizedPrompts:
        """The same with their patched tokens written out."""
        return self.read(side, split).placed(self.k_positions)

    def there(self, split: str) -> Bool[Tensor, "prompt position"]:
        """Which prompts have which of the patched tokens."""
        return torch.tensor(self.prompts("tuned", split).spots) >= 0

    def prompt_of_rows(self, split: str) -> Int64[ndarray, "row"]:
        """The prompt of each patched token, prompt by prompt."""
        return self.there(split).nonzero()[:, 0].numpy()

    def capture(
        self, side: Side, split: str, layers: Sequence[int], *, to_the_end: bool = False
    ) -> None:
        """Capture what is missing of these layers, and of the next-token distribution, at once."""
        if side == "base":
            self._look_up(split, [*layers, None] if to_the_end else layers)
        missing = [layer for layer in layers if (side, split, layer) not in self._captured]
        to_the_end = to_the_end and (side, split) not in self._log_probs
        if missing or to_the_end:
            model, prompts = self.pair.use(side).model, self.prompts(side, split)
            check_layers(layers, model.cfg.n_layers)
            batches = list(prompts.batches(self.batch_size))
            found = capture(model, batches, missing, to_the_end=to_the_end)
            for z in found.z.values():
                whole = z.flatten(1).isfinite().all(1).tolist()
                require_finite(whole, prompts.ids, side, self.pair.member(side).card.dtype)
            self._captured |= {(side, split, layer): z for layer, z in found.z.items()}
            if found.log_probs is not None:
                self._log_probs[side, split] = found.log_probs

    def log_probs(self, side: Side, split: str) -> Float[Tensor, "prompt answer vocab"]:
        """The clean next-token distribution at each compared token."""
        self.capture(side, split, (), to_the_end=True)
        return self._log_probs[side, split]

    def z(self, side: Side, split: str, layer: int) -> Site:
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
                log_probs = found["log_probs"]
                shape = (len(log_probs), -1, log_probs.shape[-1])
                self._log_probs["base", split] = log_probs.reshape(shape)
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
            "tokens": self.read("base", split).fingerprint,
            "layer": layer,
            "k_positions": self.k_positions,
            "dtype": card.dtype,
            "device": self.device,
            "libraries": arithmetic_libraries(),
            "numerics_version": NUMERICS_VERSION,
        }
        return NamedIngredients("log_probs" if layer is None else f"z_L{layer}", values)
