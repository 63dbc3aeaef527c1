"""A head card: what one head reads, writes and decides, in base and in tuned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from numpy import ndarray
from torch import Tensor

from rq4lens.analysis.card.numbers import carried_by, map_facts, moved_pct, numbers_of
from rq4lens.analysis.card.passes import HeadWrites, Readout
from rq4lens.analysis.card.reads import (
    OTHER_TOKENS,
    PatternReader,
    distances,
    roles_of,
    text_shares,
)
from rq4lens.analysis.card.records import (
    Carried,
    Decision,
    HeadCard,
    HeadReads,
    Likely,
    NextTokens,
    Shifts,
    TokenShift,
    Writes,
)
from rq4lens.analysis.card.sides import CardInputs, Sides
from rq4lens.analysis.card.swaps import LOGITS_AT_ONCE, Swapped, divergence, swapped
from rq4lens.analysis.saved import Run
from rq4lens.analysis.statistics.bootstrap import Estimate, undefined
from rq4lens.errors import UserError
from rq4lens.heads import Head
from rq4lens.models.pair import SIDES, ModelPair, Side
from rq4lens.patching.maps.map import LayerMap
from rq4lens.results import GridResult

MOST_CARDS, MOST_PROMPTS = 24, 12
"""Cards of a page and prompts of a card, so that a page stays small."""

N_SHIFTS, N_SHIFTS_OF_PROMPT = 10, 5
"""Tokens that are named as raised and as lowered."""

OTHER_VOCABULARY = "the models have other vocabularies, so their answers are over other tokens"
NO_MAP = "no map of this layer was given"
NO_NUMBERS = "the single heads of this layer were not measured by a run that was given"


def head_card(
    of: Run | ModelPair,
    head: Head | str,
    *,
    grid: GridResult | None = None,
    maps: Mapping[int, LayerMap] | None = None,
    n_prompts: int = MOST_PROMPTS,
) -> HeadCard:
    """What one head reads, writes and decides, in base and in tuned.

    >>> rq.head_card(pair, "L1H0", grid=run, maps=maps, n_prompts=1).head.label
    'L1H0'

    Args:
        of: a finished run, whose models are loaded again, or a pair.
        head: the head, as ``"L1H0"``.
        grid: beside a pair: its measured grid, whose numbers the card then holds.
        maps: beside a pair: its maps by layer.
        n_prompts: how many prompts are shown.

    Returns:
        The card; a notebook shows it as a page.

    Raises:
        UserError: if the head does not exist, or a model cannot be loaded.
    """
    inputs = CardInputs.of_run(of) if isinstance(of, Run) else CardInputs(of, grid, maps=maps or {})
    head = Head.parse(head) if isinstance(head, str) else head
    return next(head_cards(inputs, [head], n_prompts))


def head_cards(
    inputs: CardInputs, heads: Sequence[Head], n_prompts: int = MOST_PROMPTS
) -> Iterator[HeadCard]:
    """Cards of many heads, layer by layer, from one clean pass of each model.

    Raises:
        UserError: if a head does not exist, or a model is no ``HookedTransformer``.
    """
    if n_prompts < 1:
        raise UserError(f"a card cannot show {n_prompts} prompts: ask for at least 1.")
    inputs.refuse_missing(heads)
    by_layer = {
        layer: [head.index for head in members]
        for layer, members in groupby(sorted(set(heads)), key=attrgetter("layer"))
    }
    sides = Sides(inputs, list(by_layer))
    for layer, indices in by_layer.items():
        yield from _Layer(sides, layer, indices, n_prompts).cards()


@dataclass(frozen=True)
class Extremes:
    """The tokens that logits raise and lower most, counted from the mean over the vocabulary.

    They are looked for where the logits are, which may be a GPU.
    """

    tokens: Int[ndarray, "*row end likely"]
    logits: Float[ndarray, "*row end likely"]

    @classmethod
    def of(cls, logits: Float[Tensor, "*row vocab"], n: int) -> Extremes:
        """Both ends of direct effects on the logits."""
        centred, n = logits - logits.mean(-1, keepdim=True), min(n, logits.shape[-1] // 2)
        ends = [centred.topk(n, largest=largest) for largest in (True, False)]
        return cls(
            torch.stack([end.indices for end in ends], dim=-2).cpu().numpy(),
            torch.stack([end.values for end in ends], dim=-2).cpu().numpy(),
        )

    def of_row(self, row: int) -> Extremes:
        """Those of one prompt."""
        return Extremes(self.tokens[row], self.logits[row])


@dataclass(frozen=True)
class _Model:
    """What the heads of a layer do in one model.

    ``outputs`` is ``z W_O``, ``elsewhere`` the same under the other model's attention; ``mean`` is
    the direct effect on the logits over all prompts, ``shown`` the ends of that on those that the
    card of each head shows.
    """

    reader: PatternReader
    outputs: Float[Tensor, "prompt head d_model"]
    elsewhere: Float[Tensor, "prompt head d_model"] | None
    mean: Float[Tensor, "head vocab"]
    shown: tuple[Extremes, ...]


class _Layer:
    """The cards of some heads of one layer."""

    def __init__(self, sides: Sides, layer: int, heads: Sequence[int], n_prompts: int) -> None:
        self.sides, self.layer, self.heads, self.n_prompts = sides, layer, heads, n_prompts
        self.inputs = sides.inputs

    def cards(self) -> Iterator[HeadCard]:
        """The cards in the order of the heads; all that needs tuned comes before base again."""
        _ = self.sides.one_vocabulary  # reads both models before they take turns
        swaps: dict[Side, Swapped] = {"tuned": self._swapped("tuned")}
        direct = self._direct_kl()
        chosen = [self._chosen(swaps["tuned"], place) for place in range(len(self.heads))]
        models: dict[Side, _Model] = {"tuned": self._model("tuned", chosen)}
        swaps["base"], models["base"] = self._swapped("base"), self._model("base", chosen)
        carried, reads, moved = (
            self._carried(swaps, direct),
            self._reads(models),
            self._moved(models),
        )
        for place, head in enumerate(self.heads):
            of_head = _OfHead(self, Head(self.layer, head), place, swaps, models)
            yield of_head.card(carried[place], reads[place], moved[place], chosen[place])

    def _swapped(self, side: Side) -> Swapped:
        """One model with the other one's heads."""
        other: Side = "base" if side == "tuned" else "tuned"
        target = self.sides.log_probs[other] if self.sides.one_vocabulary else None
        z = self.sides.states[other].z[self.layer]
        own = self.sides.log_probs[side]
        return swapped(self.sides.engine(side), self.layer, self.heads, z, own, target)

    @torch.no_grad()
    def _direct_kl(self) -> Float64[ndarray, "row prompt"] | None:
        """Divergence of base from tuned, clean and with base's heads while the rest is held."""
        if not self.sides.one_vocabulary:
            return None
        model, states = self.sides.model("tuned"), self.sides.states["tuned"]
        block = model.blocks[self.layer]
        tuned = HeadWrites.of(block, states.z[self.layer])
        base = HeadWrites.of(block, self.sides.states["base"].z[self.layer])
        changes = [tuned.change(head, base.each[:, head]) for head in self.heads]
        found = []
        for rows in torch.arange(len(states.resid)).split(LOGITS_AT_ONCE // model.cfg.d_vocab_out):
            readout = Readout(model, states.resid[rows])
            target = self.sides.log_probs["base"][rows].to(readout.resid.device)
            said = [readout.log_probs(), *(readout.log_probs(each[rows]) for each in changes)]
            found.append(np.stack([divergence(target, each) for each in said]))
        return np.concatenate(found, axis=1)

    @torch.no_grad()
    def _model(self, side: Side, chosen: Sequence[Sequence[_Chosen]]) -> _Model:
        model, states = self.sides.model(side), self.sides.states[side]
        block = model.blocks[self.layer]
        writes = HeadWrites.of(block, states.z[self.layer])
        readout, shown, mean = Readout(model, states.resid), [], []
        for head, rows in zip(self.heads, chosen, strict=True):
            added, at = writes.in_stream(head), [each.row for each in rows]
            mean.append(readout.mean_direct(added).cpu())
            direct = Readout(model, states.resid[at]).direct(added[at])
            shown.append(Extremes.of(direct, N_SHIFTS_OF_PROMPT))
        other = states.z_elsewhere.get(self.layer)
        reader = PatternReader.of(
            self.sides.tokens[side].token_ids,
            self.sides.texts(side),
            states.pattern[self.layer][:, self.heads],
            has_sinks=model.cfg.use_attention_sinks,
        )
        return _Model(
            reader,
            writes.each[:, self.heads].cpu(),
            None if other is None else HeadWrites.of(block, other).each[:, self.heads].cpu(),
            torch.stack(mean),
            tuple(shown),
        )

    def _carried(
        self, swaps: Mapping[Side, Swapped], direct: Float64[ndarray, "row prompt"] | None
    ) -> list[Carried]:
        if direct is None:
            return [Carried(*[undefined(OTHER_VOCABULARY)] * 3)] * len(self.heads)
        return carried_by(swaps["tuned"], swaps["base"], direct, self.inputs.bootstrap)

    def _reads(self, models: Mapping[Side, _Model]) -> list[HeadReads]:
        base, tuned, bootstrap = models["base"], models["tuned"], self.inputs.bootstrap
        apart = moved = [undefined(OTHER_TOKENS)] * len(self.heads)
        if tuned.elsewhere is not None:
            apart = distances(base.reader, tuned.reader, bootstrap)
            moved = moved_pct(tuned.outputs - tuned.elsewhere, base.outputs, bootstrap)
        roles = roles_of(base.reader, tuned.reader, bootstrap)
        return [
            HeadReads(roles[place], text_shares(base.reader, tuned.reader, place), *estimates)
            for place, estimates in enumerate(zip(apart, moved, strict=True))
        ]

    def _moved(self, models: Mapping[Side, _Model]) -> list[Estimate]:
        """How far the output of each head moves by writing otherwise."""
        base, elsewhere = models["base"].outputs, models["tuned"].elsewhere
        if elsewhere is None:
            return [undefined(OTHER_TOKENS)] * len(self.heads)
        return moved_pct(elsewhere - base, base, self.inputs.bootstrap)

    def _delta_nats(self, place: int) -> Float64[ndarray, "prompt"] | None:
        """``ΔKL`` of a head per prompt, if a run measured it."""
        grid = self.inputs.grid
        if grid is None or grid.settings.layer != self.layer:
            return None
        return grid.single(self.heads[place]).delta_nats

    def _chosen(self, swap: Swapped, place: int) -> list[_Chosen]:
        """The prompts of the largest transfer, then of the largest ``ΔKL``, then further ones."""
        closed = None if swap.kl_nats is None else swap.kl_nats[0] - swap.kl_nats[place + 1]
        delta = self._delta_nats(place)
        by_size = {
            name: np.argsort(-key, kind="stable").tolist()
            for name, key in (("transfer", closed), ("ΔKL", delta))
            if key is not None
        }
        orders = by_size or {"its place": list(range(len(self.sides.tokens["tuned"])))}
        share = -(-self.n_prompts // len(orders))
        picked = {row: name for name, order in orders.items() for row in order[:share]}
        name, order = next(iter(orders.items()))
        picked |= dict.fromkeys(order[:share], name)
        further = {row: name for row in order if row not in picked}
        return [
            _Chosen(row, by, _at(closed, row), _at(delta, row))
            for row, by in [*picked.items(), *further.items()][: self.n_prompts]
        ]


@dataclass(frozen=True)
class _Chosen:
    """A prompt that a card shows, by which quantity, and both of its quantities."""

    row: int
    by: str
    closed_nats: float | None
    delta_nats: float | None


def _at(values: Float64[ndarray, "prompt"] | None, row: int) -> float | None:
    return None if values is None else float(values[row])


@dataclass(frozen=True)
class _OfHead:
    """The parts of one head's card."""

    layer: _Layer
    head: Head
    place: int
    swaps: Mapping[Side, Swapped]
    models: Mapping[Side, _Model]

    def card(
        self, carried: Carried, reads: HeadReads, moved: Estimate, chosen: Sequence[_Chosen]
    ) -> HeadCard:
        inputs, head = self.layer.inputs, self.head
        layer_map = inputs.maps.get(head.layer)
        z_tuned = self.layer.sides.states["tuned"].z[head.layer][:, head.index]
        return HeadCard(
            head=head,
            pair=inputs.pair.name,
            split=inputs.split,
            n_prompts=len(self.layer.sides.tokens["tuned"]),
            carried=carried,
            numbers=numbers_of(inputs.grid, inputs.analysis, head),
            reads=reads,
            writes=self._writes(moved),
            map=None if layer_map is None else map_facts(layer_map, head.index, z_tuned),
            decides=tuple(self._decision(rank, each) for rank, each in enumerate(chosen)),
            reasons={"numbers": NO_NUMBERS, "map": NO_MAP},
        )

    def _writes(self, moved: Estimate) -> Writes:
        before, after = (self.models[side].mean[self.place] for side in SIDES)
        same = self.layer.sides.one_vocabulary
        return Writes(
            base=self._shifts("base", Extremes.of(before, N_SHIFTS)),
            tuned=self._shifts("tuned", Extremes.of(after, N_SHIFTS)),
            change=self._shifts("tuned", Extremes.of(after - before, N_SHIFTS)) if same else None,
            output_change_pct=moved,
            reasons={"change": OTHER_VOCABULARY},
        )

    def _decision(self, rank: int, chosen: _Chosen) -> Decision:
        sides, place = self.layer.sides, self.place
        written = {
            side: self._shifts(side, self.models[side].shown[place].of_row(rank)) for side in SIDES
        }
        return Decision(
            prompt=sides.tokens["tuned"].ids[chosen.row],
            chosen_by=chosen.by,
            closed_nats=chosen.closed_nats,
            delta_nats=chosen.delta_nats,
            base=self.models["base"].reader.attended(place, chosen.row),
            tuned=self.models["tuned"].reader.attended(place, chosen.row),
            next_tokens=NextTokens(
                base=self._likely("base", 0, chosen.row),
                tuned=self._likely("tuned", 0, chosen.row),
                tuned_with_base_head=self._likely("tuned", place + 1, chosen.row),
                base_with_tuned_head=self._likely("base", place + 1, chosen.row),
            ),
            writes_base=written["base"],
            writes_tuned=written["tuned"],
            reasons={"closed_nats": OTHER_VOCABULARY, "delta_nats": NO_NUMBERS},
        )

    def _likely(self, side: Side, row: int, prompt: int) -> tuple[Likely, ...]:
        """The likely tokens of one prompt."""
        found = self.swaps[side].likeliest
        return self._named(side, found.tokens[prompt, row], found.probabilities[prompt, row])

    def _named(
        self, side: Side, tokens: Int[ndarray, "likely"], shares: Float[ndarray, "likely"]
    ) -> tuple[Likely, ...]:
        pairs = zip(tokens.tolist(), shares.tolist(), strict=True)
        return tuple(Likely(self.layer.sides.token(side, at), _short(p)) for at, p in pairs)

    def _shifts(self, side: Side, ends: Extremes) -> Shifts:
        raised, lowered = (
            tuple(
                TokenShift(self.layer.sides.token(side, at), _short(value))
                for at, value in zip(tokens, values, strict=True)
            )
            for tokens, values in zip(ends.tokens.tolist(), ends.logits.tolist(), strict=True)
        )
        return Shifts(raised, lowered)


def _short(value: float) -> float:
    """A number with four significant digits: a card shows three."""
    return float(f"{value:.4g}")
