"""Both models of a pair, and what one clean pass of each leaves for head cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from rq4lens.analysis.card.inputs import CardInputs
from rq4lens.analysis.card.passes import DecisionStates, Readout, decision_states
from rq4lens.analysis.card.swaps import LOGITS_AT_ONCE, LogProbs, engine_of
from rq4lens.errors import UserError
from rq4lens.models.pair import SIDES, Side
from rq4lens.models.prompts.reading import decoded
from rq4lens.patching.patch import Engine


class Sides:
    """Both models, and what one clean pass of each left behind."""

    def __init__(self, inputs: CardInputs, layers: Sequence[int]) -> None:
        self.inputs, self.layers = inputs, layers
        self.tokens = {side: inputs.pair.tokens(side, inputs.split) for side in SIDES}
        self.aligned = self.tokens["base"].token_ids == self.tokens["tuned"].token_ids
        self._engines: dict[Side, Engine] = {}
        base = self._pass("base", None)
        tuned = self._pass("tuned", base.pattern if self.aligned else None)
        self.states = {"base": base, "tuned": tuned}

    def model(self, side: Side) -> HookedTransformer:
        """One of the models, the other one released if both do not fit."""
        if not self.inputs.pair.keep_both:
            self._engines = {at: each for at, each in self._engines.items() if at == side}
        model = self.inputs.pair.use(side).model
        if not isinstance(model, HookedTransformer):
            raise UserError(
                f"the {side} model is a {type(model).__name__}, whose norms and weights a card "
                "cannot read: load it with rq4lens.load_hooked."
            )
        return model

    def _pass(self, side: Side, attention: Mapping[int, Tensor] | None) -> DecisionStates:
        size = self.inputs.place.batch_size
        return decision_states(self.model(side), self.tokens[side], self.layers, size, attention)

    def engine(self, side: Side) -> Engine:
        """The engine of one model, made once while the model stays."""
        model = self.model(side)
        if side not in self._engines:
            place = self.inputs.place
            self._engines[side] = engine_of(model, self.tokens[side], place, min(self.layers))
        return self._engines[side]

    @cached_property
    def log_probs(self) -> dict[Side, LogProbs]:
        """Next-token log-probabilities of both models, on the CPU."""
        return {side: self._log_probs(side) for side in SIDES}

    @torch.no_grad()
    def _log_probs(self, side: Side) -> LogProbs:
        resid, model = self.states[side].resid, self.model(side)
        at_once = max(1, LOGITS_AT_ONCE // model.cfg.d_vocab_out)
        return torch.cat([Readout(model, some).log_probs().cpu() for some in resid.split(at_once)])

    @cached_property
    def one_vocabulary(self) -> bool:
        """Whether a token is the same in both models."""
        base, tuned = (self.inputs.pair.member(side).tokenizer for side in SIDES)
        sizes = {each.shape[-1] for each in self.log_probs.values()}
        return len(sizes) == 1 and (base is tuned or base.get_vocab() == tuned.get_vocab())

    def token(self, side: Side, index: int) -> str:
        """The text of a token."""
        return decoded(self.inputs.pair.member(side).tokenizer, index)

    @cached_property
    def texts(self) -> dict[Side, dict[int, str]]:
        """The texts of all tokens of the prompts."""
        return {
            side: {each: self.token(side, each) for row in read.token_ids for each in row}
            for side, read in self.tokens.items()
        }
