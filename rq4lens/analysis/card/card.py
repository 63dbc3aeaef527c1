"""A head card: what one head reads, writes and decides, in base and in tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from rq4lens.analysis.card.passes import HeadWrites, some_at_once
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
    HeadNumbers,
    HeadReads,
    Likely,
    MapFacts,
    NextTokens,
    Shifts,
    TokenShift,
    Writes,
)
from rq4lens.analysis.card.sides import CardInputs, Sides
from rq4lens.analysis.card.swaps import Swapped, TopTokens, divergence, swapped
from rq4lens.analysis.effects.table import records, why_no_gap
from rq4lens.analysis.records import Analysis
from rq4lens.analysis.saved import Run
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, undefined
from rq4lens.errors import UserError
from rq4lens.heads import Head
from rq4lens.models.pair import SIDES, ModelPair, Side
from rq4lens.patching.maps.kinds import polar_factor
from rq4lens.patching.maps.map import LayerMap
from rq4lens.results import GridResult

MOST_CARDS, MOST_PROMPTS = 24, 12
"""Cards of a page and prompts of a card, so that a page stays small."""

N_SHIFTS, N_SHIFTS_OF_PROMPT = 10, 5
"""Tokens that are named as raised and as lowered."""

OTHER_VOCABULARY = "the models have other vocabularies, so their answers are over other tokens"
NO_MAP = "no map of this layer was given"
NO_NUMBERS = "the single heads of this layer were not measured by a run that was given"
NO_ANALYSIS = "no analysis of the grid was given"
NO_TRANSFER = "the head carries nothing to take a share of: the interval of its transfer reaches 0"
NO_OUTPUT = "the head writes nothing in base"
JOINT_MAP = "the map is one over all heads of the layer"

Named = TypeVar("Named", Likely, TokenShift)


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
    """Cards of many heads, layer by layer, from one clean pass of each model."""
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


def extremes(logits: Float[Tensor, "*row vocab"], n: int) -> TopTokens:
    """``[row end token]``: what direct effects raise and lower most, from the mean over tokens."""
    centred, n = logits - logits.mean(-1, keepdim=True), min(n, logits.shape[-1] // 2)
    raised, lowered = TopTokens.of(centred, n), TopTokens.of(-centred, n)
    return TopTokens(
        np.stack([raised.tokens, lowered.tokens], axis=-2),
        np.stack([raised.numbers, -lowered.numbers], axis=-2),
    )


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
    shown: Sequence[TopTokens]


class _Layer:
    """The cards of some heads of one layer."""

    def __init__(self, sides: Sides, layer: int, heads: Sequence[int], n_prompts: int) -> None:
        self.sides, self.layer, self.heads, self.n_prompts = sides, layer, heads, n_prompts
        self.inputs = sides.inputs
        self.swaps: dict[Side, Swapped] = {}
        self.models: dict[Side, _Model] = {}

    def cards(self) -> Iterator[HeadCard]:
        """The cards in the order of the heads; all that needs tuned comes before base again."""
        inputs, z_tuned = self.inputs, self.sides.states["tuned"].z[self.layer]
        self.swaps["tuned"], direct = self._swapped("tuned"), self._direct_kl()
        chosen = [self._chosen(place) for place in range(len(self.heads))]
        self.models["tuned"] = self._model("tuned", chosen)
        self.swaps["base"], self.models["base"] = self._swapped("base"), self._model("base", chosen)
        layer_map = inputs.maps.get(self.layer)
        parts = zip(self._carried(direct), self._reads(), self._writes(), chosen, strict=True)
        for place, (carried, reads, writes, shown) in enumerate(parts):
            head = Head(self.layer, self.heads[place])
            z = z_tuned[:, head.index]
            yield HeadCard(
                head=head,
                pair=inputs.pair.name,
                split=inputs.split,
                n_prompts=len(z),
                carried=carried,
                numbers=numbers_of(inputs.grid, inputs.analysis, head),
                reads=reads,
                writes=writes,
                map=None if layer_map is None else map_facts(layer_map, head.index, z),
                decides=self._decisions(place, shown),
                reasons={"numbers": NO_NUMBERS, "map": NO_MAP},
            )

    def _swapped(self, side: Side) -> Swapped:
        """One model with the other one's heads."""
        other: Side = "base" if side == "tuned" else "tuned"
        readouts = self.sides.readouts
        target = readouts[other] if self.sides.one_vocabulary else None
        z = self.sides.states[other].z[self.layer]
        return swapped(self.sides.engine(side), self.layer, self.heads, z, readouts[side], target)

    @torch.no_grad()
    def _direct_kl(self) -> Float64[ndarray, "row prompt"] | None:
        """Divergence of base from tuned, clean and with base's heads while the rest is held."""
        if not self.sides.one_vocabulary:
            return None
        tuned, base = (self._head_writes("tuned", self.sides.states[at].z) for at in SIDES[::-1])
        changes = tuned.changes(base)[:, self.heads]
        changes = torch.cat([torch.zeros_like(changes[:, :1]), changes], dim=1)
        readouts, found = self.sides.readouts, []
        n_logits = changes.shape[1] * readouts["tuned"].n_vocab
        for rows in some_at_once(len(changes), n_logits):
            target = readouts["base"].of_prompts(rows).beside_heads().log_probs()
            said = readouts["tuned"].of_prompts(rows).beside_heads().log_probs(changes[rows])
            found.append(divergence(target.to(said), said).T)
        return np.concatenate(found, axis=1)

    def _head_writes(self, side: Side, z: Mapping[int, Tensor]) -> HeadWrites:
        return HeadWrites.of(self.sides.model(side).blocks[self.layer], z[self.layer])

    @torch.no_grad()
    def _model(self, side: Side, chosen: Sequence[Mapping[int, str]]) -> _Model:
        states, readout = self.sides.states[side], self.sides.readouts[side]
        writes, heads = self._head_writes(side, states.z), torch.tensor(self.heads)
        added = writes.in_stream[:, heads]
        rows = torch.tensor([list(some) for some in chosen])
        shown: list[TopTokens] = []
        for places in some_at_once(len(heads), rows.shape[1] * readout.n_vocab):
            prompts = rows[places]
            direct = readout.of_prompts(prompts).direct(added[prompts, places[:, None]])
            ends = extremes(direct, N_SHIFTS_OF_PROMPT)
            shown += [ends[at] for at in range(len(places))]
        elsewhere = None
        if states.z_elsewhere:
            elsewhere = self._head_writes(side, states.z_elsewhere).each[:, heads].cpu()
        return _Model(
            PatternReader(
                self.sides.texts[side],
                states.pattern[self.layer][:, heads].double().transpose(0, 1).numpy(),
                self.sides.model(side).cfg.use_attention_sinks,
            ),
            writes.each[:, heads].cpu(),
            elsewhere,
            readout.unembedded(readout.beside_heads().normed(added).mean(0)),
            shown,
        )

    def _carried(self, direct: Float64[ndarray, "row prompt"] | None) -> list[Carried]:
        if direct is None:
            return [Carried(*[undefined(OTHER_VOCABULARY)] * 3)] * len(self.heads)
        return carried_by(self.swaps["tuned"], self.swaps["base"], direct, self.inputs.bootstrap)

    def _reads(self) -> list[HeadReads]:
        base, tuned, bootstrap = self.models["base"], self.models["tuned"], self.inputs.bootstrap
        apart = moved = [undefined(OTHER_TOKENS)] * len(self.heads)
        if tuned.elsewhere is not None:
            apart = distances(base.reader, tuned.reader, bootstrap)
            moved = moved_pct(tuned.outputs - tuned.elsewhere, base.outputs, bootstrap)
        roles = roles_of(base.reader, tuned.reader, bootstrap)
        texts = text_shares(base.reader, tuned.reader)
        return list(map(HeadReads, roles, texts, apart, moved))

    def _writes(self) -> list[Writes]:
        base, tuned = self.models["base"], self.models["tuned"]
        moved, change = [undefined(OTHER_TOKENS)] * len(self.heads), None
        if tuned.elsewhere is not None:
            moved = moved_pct(tuned.elsewhere - base.outputs, base.outputs, self.inputs.bootstrap)
        before, after = (extremes(each.mean, N_SHIFTS) for each in (base, tuned))
        if self.sides.one_vocabulary:
            change = extremes(tuned.mean - base.mean.to(tuned.mean), N_SHIFTS)
        return [
            Writes(
                base=self._shifts("base", before, place),
                tuned=self._shifts("tuned", after, place),
                change=self._shifts("tuned", change, place) if change else None,
                output_change_pct=each,
                reasons={"change": OTHER_VOCABULARY},
            )
            for place, each in enumerate(moved)
        ]

    def _delta_nats(self, place: int) -> Float64[ndarray, "prompt"] | None:
        """``ΔKL`` of a head per prompt, if a run measured it."""
        grid = self.inputs.grid
        if grid is None or grid.settings.layer != self.layer:
            return None
        return grid.single(self.heads[place]).delta_nats

    def _closed_nats(self, place: int) -> Float64[ndarray, "prompt"] | None:
        """How much nearer base's head brings the tuned model to base, per prompt."""
        kl = self.swaps["tuned"].kl_nats
        return None if kl is None else kl[0] - kl[place + 1]

    def _chosen(self, place: int) -> dict[int, str]:
        """The prompts of the largest transfer, then of the largest ``ΔKL``, then further ones.

        Each with the quantity that it is chosen by.
        """
        sizes = {"transfer": self._closed_nats(place), "ΔKL": self._delta_nats(place)}
        by_size = {
            name: np.argsort(-key, kind="stable").tolist()
            for name, key in sizes.items()
            if key is not None
        }
        orders = by_size or {"its place": list(range(len(self.sides.tokens["tuned"])))}
        share = -(-self.n_prompts // len(orders))
        picked = {row: name for name, order in orders.items() for row in order[:share]}
        name, order = next(iter(orders.items()))
        picked |= dict.fromkeys(order[:share], name)
        further = {row: name for row in order if row not in picked}
        return dict([*picked.items(), *further.items()][: self.n_prompts])

    def _decisions(self, place: int, chosen: Mapping[int, str]) -> tuple[Decision, ...]:
        base, tuned = self.models["base"], self.models["tuned"]
        closed, delta = self._closed_nats(place), self._delta_nats(place)
        return tuple(
            Decision(
                prompt=self.sides.tokens["tuned"].ids[row],
                chosen_by=by,
                closed_nats=None if closed is None else float(closed[row]),
                delta_nats=None if delta is None else float(delta[row]),
                base=base.reader.attended(place, row),
                tuned=tuned.reader.attended(place, row),
                next_tokens=NextTokens(
                    base=self._likely("base", row, 0),
                    tuned=self._likely("tuned", row, 0),
                    tuned_with_base_head=self._likely("tuned", row, place + 1),
                    base_with_tuned_head=self._likely("base", row, place + 1),
                ),
                writes_base=self._shifts("base", base.shown[place], rank),
                writes_tuned=self._shifts("tuned", tuned.shown[place], rank),
                reasons={"closed_nats": OTHER_VOCABULARY, "delta_nats": NO_NUMBERS},
            )
            for rank, (row, by) in enumerate(chosen.items())
        )

    def _likely(self, side: Side, prompt: int, row: int) -> tuple[Likely, ...]:
        return self._named(side, Likely, self.swaps[side].likeliest[prompt, row])

    def _shifts(self, side: Side, ends: TopTokens, row: int) -> Shifts:
        return Shifts(*(self._named(side, TokenShift, ends[row, end]) for end in (0, 1)))

    def _named(
        self, side: Side, kind: Callable[[str, float], Named], found: TopTokens
    ) -> tuple[Named, ...]:
        pairs = zip(found.tokens.tolist(), found.numbers.tolist(), strict=True)
        # Four significant digits: a card shows three.
        return tuple(
            kind(self.sides.token[side](token), float(f"{number:.4g}")) for token, number in pairs
        )


# The numbers of a card


def numbers_of(
    grid: GridResult | None, analysis: Analysis | None, head: Head
) -> HeadNumbers | None:
    """What a run measured of a head; None for a layer whose single heads were not measured."""
    if grid is None or head.layer != grid.settings.layer:
        return None
    (record,) = records(grid, [grid.single(head.index)])
    stable = {row.head: row for row in (analysis.stability.heads if analysis else ())}
    row, ladders = stable.get(head.index), analysis.ladders if analysis else ()
    return HeadNumbers(
        alpha=grid.settings.patching.alpha,
        kind=analysis.kinds.heads[head.index].kind if analysis else None,
        rank=grid.ranking.rank_of(head.index),
        rank_low=row.rank_low if row else None,
        rank_high=row.rank_high if row else None,
        KL_raw=record.KL_raw_mean,
        KL_mapped=record.KL_mapped_mean,
        delta=record.delta,
        drop_pct=record.drop_pct,
        recovered_pct=ladders[0][f"head{head.index}"].recovered_pct if ladders else {},
        reasons=dict.fromkeys(("kind", "rank_low", "rank_high"), NO_ANALYSIS),
    )


def carried_by(
    tuned: Swapped, base: Swapped, direct: Float64[ndarray, "row prompt"], bootstrap: Bootstrap
) -> list[Carried]:
    """How far each head takes one model to the other; the models have one vocabulary."""
    transfers = []
    for swap in (tuned, base):
        assert swap.kl_nats is not None
        gap, left = swap.kl_nats[:1], swap.kl_nats[1:]
        why = why_no_gap(bootstrap.estimate(gap)[0], swap.noise_nats)
        transfers.append(
            bootstrap.shares(gap, left) if why is None else [undefined(why)] * len(left)
        )
    closed = [each[0] - each[1:] for each in (direct, tuned.kl_nats) if each is not None]
    shares = bootstrap.estimate(np.concatenate(closed), _ratio_pct)
    return [
        Carried(to_base, to_tuned, _direct_pct(to_base, share))
        for to_base, to_tuned, share in zip(*transfers, shares, strict=True)
    ]


def _direct_pct(transfer: Estimate, share: Estimate) -> Estimate:
    """How much of a transfer is direct, where there is one."""
    if transfer.value is None:
        return transfer
    ends = transfer.interval
    reaches_zero = not transfer.value if ends is None else ends.contains(0.0)
    return undefined(NO_TRANSFER) if reaches_zero else share


def _ratio_pct(mean: Float64[ndarray, "*rows both"]) -> ndarray:
    """The first half of quantities in percent of the second half."""
    above, below = np.split(mean, 2, axis=-1)
    return 100 * above / below


def moved_pct(
    moved: Float[Tensor, "prompt head d_model"],
    beside: Float[Tensor, "prompt head d_model"],
    bootstrap: Bootstrap,
) -> list[Estimate]:
    """The size of each head's movement: root mean square, in percent of that of its vectors."""
    squares = [each.double().square().sum(-1).T.numpy() for each in (moved, beside)]
    sizes = bootstrap.estimate(np.concatenate(squares), lambda mean: 10 * np.sqrt(_ratio_pct(mean)))
    return [
        size if there else undefined(NO_OUTPUT)
        for size, there in zip(sizes, map(np.any, squares[1]), strict=True)
    ]


def map_facts(layer_map: LayerMap, head: int, z_tuned: Float[Tensor, "prompt d_head"]) -> MapFacts:
    """One head's map in a few numbers; a map over the whole layer has no rotation of one head."""
    kind = layer_map.kind
    r2 = next((row.fitted.r2 for row in layer_map.diagnostics if row.head == head), None)
    reasons = {"r2": "no held-out fit was measured, or the activations do not vary"}
    if layer_map.scope != "head":
        reasons |= dict.fromkeys(("rotation_degrees", "scale", "shift_pct"), JOINT_MAP)
        return MapFacts(kind, r2, None, None, None, reasons=reasons)
    reasons["shift_pct"] = "the head's tuned activations are all 0"
    weight, bias = layer_map.weight[head].double(), layer_map.bias[head].double()
    angles = torch.linalg.eigvals(polar_factor(weight[None])[0]).angle().abs()
    length = z_tuned.double().square().sum(-1).mean().sqrt()
    return MapFacts(
        kind=kind,
        r2=r2,
        rotation_degrees=float(angles.rad2deg().mean()),
        scale=float((weight.square().sum() / len(weight)).sqrt()),
        shift_pct=float(100 * bias.norm() / length) if length else None,
        reasons=reasons,
    )
