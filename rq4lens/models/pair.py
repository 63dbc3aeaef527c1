"""A pair: a base model and its fine-tune, checked to be comparable head by head."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rq4lens.config import SIDES, Reading, Side
from rq4lens.errors import UserError
from rq4lens.models.load.lens import HOOKED, Backend, HookedModel, ModelConfig, backend_of
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.prompts.audit import Audit, audit_prompts
from rq4lens.models.prompts.prompt_set import Prompt, PromptSet, TokenizedPrompts
from rq4lens.models.prompts.reading import (
    ReadingLimits,
    needs_matching,
    require_matched,
    tokenize,
    unreadable,
)
from rq4lens.models.weights import WeightChange, changes_in_memory

Given: TypeAlias = "HookedModel | LoadedModel | PairMember"
"""What a pair takes as one of its models."""

Shape: TypeAlias = "ModelCard | ModelConfig"
"""What says how many layers and heads a model has, and how wide these are."""


@dataclass(frozen=True)
class ModelCard:
    """What has to be known of a model after it was released.

    Args:
        source: folder or hub id.
        revision: revision of a hub id.
        architecture: name of the architecture in the checkpoint.
        dtype: number format of the weights.
        n_layers: number of layers.
        n_heads: heads per layer.
        n_key_value_heads: heads per layer that have keys and values of their own; the others share
            them.
        d_head: width of a head's activation.
        d_vocab: size of the vocabulary.
        n_ctx: how many tokens the model reads at most.
        trust_remote_code: whether code from the checkpoint ran.
        weights_fingerprint: hash of the weights.
        config_fingerprint: hash of everything else that decides the model's function.
        tokenizer_fingerprint: hash of the vocabulary and the special tokens.
        logit_check_max_abs_diff: largest logit difference to the Hugging Face model at load time.
        adapter_base: folder or hub id of the base model of an adapter; None for a whole model.
        backend: ``"hooked"`` for a HookedTransformer, ``"bridge"`` for a TransformerBridge.
    """

    source: str
    revision: str | None
    architecture: str
    dtype: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_vocab: int
    n_ctx: int
    trust_remote_code: bool
    weights_fingerprint: str
    config_fingerprint: str
    tokenizer_fingerprint: str
    logit_check_max_abs_diff: float | None
    adapter_base: str | None = None
    backend: Backend = "hooked"

    @classmethod
    def of(cls, loaded: LoadedModel) -> ModelCard:
        """The card of a loaded model."""
        cfg = loaded.model.cfg
        origin = ("source", "revision", "architecture", "trust_remote_code", "adapter_base")
        shape = ("n_layers", "n_heads", "d_head", "d_vocab", "n_ctx")
        return cls(
            **{name: getattr(loaded, name) for name in (*origin, "logit_check_max_abs_diff")},
            **{name: getattr(cfg, name) for name in shape},
            n_key_value_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
            dtype=str(cfg.dtype).removeprefix("torch."),
            weights_fingerprint=loaded.fingerprint,
            config_fingerprint=config_fingerprint(loaded.model),
            tokenizer_fingerprint=tokenizer_fingerprint(loaded.tokenizer),
            backend=backend_of(loaded.model),
        )

    def to_dict(self) -> dict[str, Any]:
        """The card as plain JSON values."""
        return asdict(self)


class PairMember:
    """One model of a pair, loaded when it is first used and released on request.

    >>> pair.base
    <PairMember 'etiquette/base (built in)'>

    Args:
        load: loads the model.
        load_tokenizer: loads its tokenizer alone; left out, the tokenizer comes with the model.
        find_card: the model's card, if it was loaded before and its card was kept.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        load_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
        find_card: Callable[[], ModelCard | None] | None = None,
    ) -> None:
        if isinstance(load, HOOKED):
            raise UserError(
                f"PairMember takes a function that loads a model, not a {type(load).__name__}: "
                "write rq.PairMember.of(model), or rq.ModelPair(base_model, tuned_model, prompts)."
            )
        self._load = load
        self._load_tokenizer = load_tokenizer
        self._find_card = find_card
        self._loaded: LoadedModel | None = None
        self.was_loaded = False
        """Whether the weights were ever loaded."""

    def __repr__(self) -> str:
        return f"<PairMember {self.card.source!r}>" if self.known else "<PairMember, not loaded>"

    @classmethod
    def of(cls, model: Given, tokenizer: PreTrainedTokenizerBase | None = None) -> PairMember:
        """A member that is in memory already.

        Args:
            model: a ``HookedTransformer`` or ``TransformerBridge`` with its weights as they were
                trained, or one that :func:`rq4lens.load_hooked` loaded.
            tokenizer: its tokenizer; ``model.tokenizer`` if left out.

        Raises:
            UserError: if it is no such model, its weights were processed, or it has no tokenizer.
        """
        if isinstance(model, HOOKED):
            given = model.tokenizer if tokenizer is None else tokenizer
            if given is None:
                raise UserError(
                    f"this {type(model).__name__} has no tokenizer: give one with tokenizer=..., "
                    "or set model.tokenizer."
                )
            model = LoadedModel.wrap(model, given)
        if isinstance(model, PairMember):
            return model
        if not isinstance(model, LoadedModel):
            raise UserError(
                f"a {type(model).__name__} is no model of a pair: give a HookedTransformer or a "
                "TransformerBridge; folders and hub ids are loaded by rq.load_pair(base=..., "
                "tuned=..., prompts=...)."
            )
        # Its weights may be others than its files' by now.
        loaded = replace(model, files=None)
        return cls(lambda: loaded)

    @property
    def loaded(self) -> LoadedModel:
        """The loaded model; loads it if need be."""
        if self._loaded is None:
            self._loaded = self._load()
            self.was_loaded = True
        return self._loaded

    @property
    def model(self) -> HookedModel:
        """The model."""
        return self.loaded.model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer; it stays after a release, and needs no weights."""
        if self._loaded is None and self._load_tokenizer is not None:
            return self._load_tokenizer()
        return self.loaded.tokenizer

    @cached_property
    def card(self) -> ModelCard:
        """What is known of the model; stays after a release, and may have been kept from before."""
        found = None if self._loaded or self._find_card is None else self._find_card()
        return found or ModelCard.of(self.loaded)

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory now."""
        return self._loaded is not None

    @property
    def known(self) -> bool:
        """Whether the model's card is there without loading it."""
        return "card" in vars(self) or self._loaded is not None

    def release(self) -> None:
        """Let go of the weights; the next use loads them again."""
        if self._loaded is None:
            return
        _ = self.card
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class ModelPair:
    """A base model, its fine-tune, and the prompts they are compared on.

    >>> import rq4lens as rq
    >>> shipped = rq.load_pair("etiquette")
    >>> base_model, tuned_model = shipped.base.model, shipped.tuned.model
    >>> prompts = [
    ...     {"id": each.id, "text": each.text, "split": each.split} for each in shipped.prompts
    ... ]
    >>> rq.ModelPair(base_model, tuned_model, prompts, name="mine")
    <ModelPair mine: 768 train, 320 val, 160 neutral prompts>

    Args:
        base: the base model: a ``HookedTransformer``, a ``TransformerBridge``, or a
            :class:`PairMember`.
        tuned: the fine-tune, likewise.
        prompts: the prompts with their splits ``train`` and ``val``, as :meth:`PromptSet.of` takes
            them: dicts, a DataFrame, a file or a dataset.
        name: name of the pair in results.
        tokenizer: the tokenizer of models that have none of their own.
        reading: how the prompts are read: where they are decided and how long they may be.
        keep_both: False releases each model before the other is used.

    Attributes:
        excluded: prompts that were left out because the models do not read them alike.

    Raises:
        UserError: if one is no such model, the models differ in layers, heads or head width, or the
            prompts are none.
    """

    def __init__(
        self,
        base: Given,
        tuned: Given,
        prompts: Any,
        *,
        name: str = "in memory",
        tokenizer: PreTrainedTokenizerBase | None = None,
        reading: Reading | None = None,
        keep_both: bool = True,
    ) -> None:
        self.name = name
        self.base = PairMember.of(base, tokenizer)
        self.tuned = PairMember.of(tuned, tokenizer)
        self.reading = reading or Reading()
        self.keep_both = keep_both
        every = PromptSet.of(prompts).labelled(self.reading.group_by, self.reading.hold_out)
        self.prompts = prompts_left(every, self.members, self.reading)
        self.excluded: tuple[Prompt, ...] = every.without(self.prompts.ids).prompts
        self._tokens: dict[tuple[Side, str], TokenizedPrompts] = {}
        self._weight_changes: tuple[WeightChange, ...] = ()
        if keep_both:
            self.check_shapes()

    def __repr__(self) -> str:
        splits = ", ".join(
            f"{len(self.prompts.split(name))} {name}" for name in self.prompts.splits
        )
        return f"<ModelPair {self.name}: {splits} prompts>"

    @property
    def members(self) -> dict[Side, PairMember]:
        """Both models."""
        return {"base": self.base, "tuned": self.tuned}

    def member(self, side: Side) -> PairMember:
        """The base or the tuned model."""
        return self.members[side]

    def use(self, side: Side) -> PairMember:
        """The base or the tuned model, ready; the other one is released unless both may stay.

        Raises:
            UserError: if the models turn out to differ in layers, heads or head width.
        """
        other = self.member("tuned" if side == "base" else "base")
        if not self.keep_both:
            other.release()
            if other.known:
                self.check_shapes()
        return self.member(side)

    def tokens(self, side: Side, split: str) -> TokenizedPrompts:
        """The prompts of a split as one of the models reads them, cut at the decision token.

        They are read once. Patched tokens of the one model are those of the other, one by one.

        Raises:
            UserError: if no prompt has this split, or one is longer than the model's context, has a
                token that the model does not know, or patched tokens or an answer that the models
                split differently.
        """
        if (side, split) in self._tokens:
            return self._tokens[side, split]
        prompts, member = self.prompts.split(split), self.member(side)
        if not member.known:
            self.use(side)  # makes room for it
        other: Side = "tuned" if side == "base" else "base"
        tokens = self._tokens.get((other, split))
        is_first = tokens is None
        if tokens is None or self.member(other).tokenizer is not member.tokenizer:
            tokens = tokenize(prompts, member.tokenizer, self.reading)
        if is_first and needs_matching(self.reading):  # it reads both
            require_matched(prompts, self.base.tokenizer, self.tuned.tokenizer, self.reading)
        _refuse_unreadable(tokens, member.card, side)
        self._tokens[side, split] = tokens
        return tokens

    @cached_property
    def shared_tokens(self) -> Mapping[Side, Int[Tensor, "shared"] | None]:
        """The ids of the tokens that both models have, by their string, in each of them.

        None where all tokens are shared, in the same order.

        Raises:
            UserError: if there is none.
        """
        sizes = [self.member(side).card.d_vocab for side in SIDES]
        if self.same_tokenizer and sizes[0] == sizes[1]:
            return dict.fromkeys(SIDES)
        base, tuned = (self.member(side).tokenizer.get_vocab() for side in SIDES)
        tokens = sorted(base.keys() & tuned.keys())
        ids = np.array([[vocab[token] for token in tokens] for vocab in (base, tuned)], dtype=int)
        ids = ids[:, (ids < np.array(sizes)[:, None]).all(0)]
        if not ids.size:
            raise UserError("the vocabularies of the models have no token in common.")
        return dict(zip(SIDES, torch.from_numpy(ids), strict=True))

    def audit(self) -> Audit:
        """Whether both models read the prompts alike, those that were left out included."""
        prompts = PromptSet((*self.prompts.prompts, *self.excluded))
        tokenizers = {side: member.tokenizer for side, member in self.members.items()}
        audit = audit_prompts(prompts, tokenizers, self.reading)
        return replace(audit, excluded=tuple(prompt.id for prompt in self.excluded))

    @property
    def weight_changes(self) -> tuple[WeightChange, ...]:
        """How each matrix differs; none where the models were never in memory together."""
        both = self.keep_both and self.base.is_loaded and self.tuned.is_loaded
        if both and not self._weight_changes:
            self._weight_changes = changes_in_memory(self.base.model, self.tuned.model)
        return self._weight_changes

    @cached_property
    def same_tokenizer(self) -> bool:
        """Whether each token is the same id in both models."""
        base, tuned = (member.tokenizer for member in self.members.values())
        return base is tuned or base.get_vocab() == tuned.get_vocab()

    @property
    def n_heads(self) -> int:
        """Heads per layer."""
        return self._either_card.n_heads

    @property
    def n_layers(self) -> int:
        """Layers of each model."""
        return self._either_card.n_layers

    @property
    def _either_card(self) -> ModelCard:
        # Shapes agree, so a model that is known already saves loading the other for a number.
        return self.tuned.card if self.tuned.known and not self.base.known else self.base.card

    def check_shapes(self) -> None:
        """Refuse models whose heads cannot be compared one by one.

        Raises:
            UserError: if they differ in layers, heads or head width.
        """
        tuned = self.tuned.card  # loads it while the files of a known base are read
        require_same_heads(self.base.card, tuned)


def prompts_left(
    prompts: PromptSet, members: Mapping[Side, PairMember], reading: Reading
) -> PromptSet:
    """The prompts that are compared: some may be left out as misaligned."""
    if not reading.exclude_misaligned:
        return prompts
    tokenizers = {side: member.tokenizer for side, member in members.items()}
    aligned = prompts.without(audit_prompts(prompts, tokenizers, reading).misaligned)
    if not len(aligned):
        raise UserError(
            f"none of the {len(prompts)} prompts is read alike by both models: see why with "
            "`rq4lens audit`, or choose another decision rule."
        )
    return aligned


def require_same_heads(base: Shape, tuned: Shape) -> None:
    """Refuse models whose heads cannot be compared one by one."""
    for what in ("n_layers", "n_heads", "d_head"):
        of_base, of_tuned = getattr(base, what), getattr(tuned, what)
        if of_base != of_tuned:
            raise UserError(
                f"the models cannot be compared head by head: {what} is {of_base} in the base "
                f"and {of_tuned} in the tuned model; give a model and its own fine-tune."
            )


def _refuse_unreadable(prompts: TokenizedPrompts, card: ModelCard, side: Side) -> None:
    reads = ReadingLimits(card.n_ctx, card.d_vocab)
    for name, tokens in zip(prompts.ids, prompts.token_ids, strict=True):
        if (why := unreadable(tokens, side, reads)) is not None:
            raise UserError(f"prompt {name!r} {why}.")
    for name, answer, foil in zip(prompts.ids, prompts.answers, prompts.foils, strict=True):
        if (highest := max((*answer, *foil), default=0)) >= card.d_vocab:
            raise UserError(
                f"the answer or foil of prompt {name!r} has token {highest}, but the vocabulary of "
                f"the {side} model has {card.d_vocab}: give another."
            )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a tokenizer's vocabulary, special tokens and chat template."""
    content = [
        sorted(tokenizer.get_vocab().items()),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def config_fingerprint(model: HookedModel) -> str:
    """Hash of a model's configuration, whatever device it is on and wherever it came from."""
    elsewhere = {"device", "n_devices", "tokenizer_name", "model_name", "seed", "init_weights"}
    values = {k: str(value) for k, value in model.cfg.to_dict().items() if k not in elsewhere}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
