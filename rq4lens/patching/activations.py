"""Capturing head activations ``z`` at the decision token, and behind it those of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from typing import SupportsIndex

import torch
from jaxtyping import Bool, Float, Int, Int64
from numpy import ndarray
from torch import Tensor

from rq4lens.config import refuse_two_places
from rq4lens.disk.store import NUMERICS_VERSION, NamedIngredients, Store
from rq4lens.errors import UserError
from rq4lens.models.load.devices import Placement
from rq4lens.models.load.fingerprint import arithmetic_libraries
from rq4lens.models.load.lens import HookedModel, HookedTransformer
from rq4lens.models.pair import SIDES, ModelPair, Side
from rq4lens.models.prompts.prompt_set import PaddingSide, TokenBatch, TokenizedPrompts
from rq4lens.patching.engines.layout import (
    Steps,
    fused,
    fusible,
    side_by_side,
    store_for_products,
)
from rq4lens.patching.passes import (
    Reader,
    forward_batch,
    forward_steps,
    precise_dtype,
    reader_at,
    unembed,
)
from rq4lens.patching.patch import Site

CaptureKey = tuple[Side, str, int | None]
"""Of which model and split, and at which layer; None stands for the next-token distributions."""


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
    found = capture(model, list(batches), layers)
    return {layer: found[layer] for layer in layers}


@torch.no_grad()
def capture(
    model: HookedModel, batches: Sequence[TokenBatch], wanted: Sequence[int | None]
) -> dict[int | None, Tensor]:
    """Activations of some layers; under None the next-token distribution at each compared token.

    It is 0 where an answer is shorter; without it the pass ends at the last of the layers.
    """
    cfg, n_prompts = model.cfg, sum(len(batch.rows) for batch in batches)
    layers = [layer for layer in wanted if layer is not None]
    shape = (n_prompts, batches[0].spots.shape[1], cfg.n_heads, cfg.d_head)
    captured: dict[int | None, Tensor] = {
        layer: torch.empty(shape, dtype=cfg.dtype) for layer in layers
    }
    to_the_end = None in wanted
    if to_the_end:
        ends_shape = (n_prompts, batches[0].longest_answer, cfg.d_vocab_out)
        captured[None] = torch.empty(ends_shape, dtype=precise_dtype(model))
    stop = cfg.n_layers if to_the_end else max(layers) + 1
    if len(batches) > 1 and isinstance(model, HookedTransformer):
        store_for_products(model.blocks[:stop])
    with fused(fusible(model), half_only=True):
        works = (_read(model, batch, layers, stop, to_the_end) for batch in batches)
        for batch, read, ends in side_by_side(works):
            for layer, z in read.items():
                captured[layer][batch.rows] = z.to("cpu")
            if to_the_end:
                logits = unembed(model, ends.to(Placement.of(model).exit))
                put_log_probs(captured[None], batch, logits)
    return captured


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
    model: HookedModel, batch: TokenBatch, layers: Sequence[int], stop: int, to_the_end: bool
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


def check_layers(layers: int | Iterable[int], n_layers: int) -> list[int]:
    """Layers as Python users name them, one or several, if the model has them."""
    several = list(layers) if isinstance(layers, Iterable) else [layers]
    if not several:
        raise UserError("no layer was named: name at least one.")
    for layer in several:
        if isinstance(layer, bool) or not isinstance(layer, SupportsIndex):
            raise UserError(f"{layer!r} is no layer: give its number, or several as [1, 2].")
        if not 0 <= layer < n_layers:
            raise UserError(
                f"layer {layer} does not exist: the models have layers 0 to {n_layers - 1}."
            )
    return several


def require_finite(whole: Sequence[bool], ids: Sequence[str], side: Side, dtype: str) -> None:
    """Refuse prompts on which a model's numbers overflow, by the first of them."""
    lost = [name for name, is_whole in zip(ids, whole, strict=True) if not is_whole]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"the {side} model computes numbers that are not finite as {dtype} on prompt "
            f"{lost[0]!r}{more}: load the models with --dtype bfloat16 or float32, or leave it out."
        )


Answer = tuple[int, ...]


def answers_of(pair: ModelPair, split: str, batch_size: int = 32) -> list[Answer]:
    """The answer to each prompt of a split, in tokens of the tuned model.

    It is the prompt's own, else the tuned model's most likely next tokens, one after the other; as
    many as are compared, or up to the end of the text.
    """
    n_tokens, read = pair.reading.answer_tokens, pair.tokens("tuned", split).decided()
    answers = [answer[:n_tokens] for answer in read.answers]
    open_ones = [row for row, answer in enumerate(answers) if not answer]
    if open_ones:
        end = pair.tuned.tokenizer.eos_token_id
        said = greedy(pair.use("tuned").model, read.some(open_ones), n_tokens, batch_size)
        for row, tokens in zip(open_ones, said.tolist(), strict=True):
            answers[row] = tuple(tokens[: tokens.index(end) + 1] if end in tokens else tokens)
    return answers


@torch.no_grad()
def greedy(
    model: HookedModel, prompts: TokenizedPrompts, n_tokens: int, batch_size: int
) -> Int[Tensor, "prompt token"]:
    """The model's most likely next tokens, one after the other."""
    said = torch.empty(len(prompts), n_tokens, dtype=torch.long)
    grown = prompts
    for place in range(n_tokens):
        for batch in grown.batches(batch_size):
            logits = forward_batch(model, batch)
            last = logits[torch.arange(len(logits)), batch.lengths - 1]
            said[batch.rows, place] = last.argmax(-1).cpu()
        new = said[:, : place + 1].tolist()
        both = zip(prompts.token_ids, new, strict=True)
        grown = TokenizedPrompts(prompts.ids, tuple((*read, *tokens) for read, tokens in both))
    return said


def in_tokens_of(
    pair: ModelPair, side: Side, split: str, answers: Sequence[Answer]
) -> Sequence[Answer]:
    """Answers to the prompts of a split in tokens of the tuned model, in those of a model."""
    of_base, of_tuned = (pair.shared_tokens[each] for each in SIDES)
    if side == "tuned" or of_tuned is None or of_base is None:
        return answers
    base = dict(zip(of_tuned.tolist(), of_base.tolist(), strict=True))
    for name, answer in zip(pair.prompts.split(split).ids, answers, strict=True):
        missing = [token for token in answer if token not in base]
        if missing:
            text = pair.tuned.tokenizer.decode(missing[:1])
            raise UserError(
                f"the answer to prompt {name!r} has the token {text!r}, which the base model "
                "lacks: give an answer that both models can say, or compare one token with "
                "--answer-tokens 1."
            )
    return [tuple(base[token] for token in answer) for answer in answers]


@dataclass(eq=False, repr=False)
class PairActivations:
    """Activations z of both models at the decision token, each captured once.

    Activations of the base model are looked up in the store, if there is one, before it is loaded;
    the kind of device is named because each rounds in its own way.
    """

    pair: ModelPair
    _: KW_ONLY
    k_positions: int = 1
    batch_size: int = 32
    store: Store | None = None
    device: str = "cpu"
    _read: dict[tuple[Side, str], TokenizedPrompts] = field(default_factory=dict)
    _captured: dict[CaptureKey, Tensor] = field(default_factory=dict)
    _on_disk: set[CaptureKey] = field(default_factory=set)

    def __post_init__(self) -> None:
        refuse_two_places(self.pair.reading, self.k_positions)

    def beside(self, pair: ModelPair) -> PairActivations:
        """Activations of a pair of the same base model and prompts.

        Base's are there already, unless it reads answers that the other model gives.
        """
        alike = self.pair.reading.answer_tokens == 1
        of_base = {
            key: found for key, found in self._captured.items() if alike and key[0] == "base"
        }
        return PairActivations(
            pair, k_positions=self.k_positions, batch_size=self.batch_size, _captured=of_base
        )

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
        wanted: list[CaptureKey] = [(side, split, layer) for layer in layers]
        if to_the_end:
            wanted.append((side, split, None))
        if side == "base":
            for key in wanted:
                self._look_up(key)
        missing = [key[2] for key in wanted if key not in self._captured]
        if not missing:
            return
        model, prompts = self.pair.use(side).model, self.prompts(side, split)
        if layers:
            check_layers(layers, model.cfg.n_layers)
        found = capture(model, list(prompts.batches(self.batch_size)), missing)
        for layer, tensor in found.items():
            if layer is not None:
                whole = tensor.flatten(1).isfinite().all(1).tolist()
                require_finite(whole, prompts.ids, side, self.pair.member(side).card.dtype)
            self._captured[side, split, layer] = tensor

    def log_probs(self, side: Side, split: str) -> Float[Tensor, "prompt answer vocab"]:
        """The clean next-token distribution at each compared token."""
        self.capture(side, split, (), to_the_end=True)
        return self._captured[side, split, None]

    def z(self, side: Side, split: str, layer: int) -> Site:
        """Activations of one layer; captured now if they are not there yet."""
        self.capture(side, split, [layer])
        return self._captured[side, split, layer]

    def keep(self) -> None:
        """Store what was captured of the base model, for runs that need not load it any more."""
        for key, tensor in self._captured.items():
            side, split, layer = key
            if side == "base" and self.store is not None and key not in self._on_disk:
                name = "log_probs" if layer is None else "z"
                self.store.put_tensors(self._ingredients(split, layer), {name: tensor})
                self._on_disk.add(key)

    def _look_up(self, key: CaptureKey) -> None:
        _, split, layer = key
        if self.store is None or key in self._captured:
            return
        found = self.store.get_tensors(self._ingredients(split, layer))
        if found is None:
            return
        (tensor,) = found.values()
        if layer is None and tensor.ndim == 2:  # an older record, of one token each
            tensor = tensor[:, None]
        self._captured[key] = tensor
        self._on_disk.add(key)

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
