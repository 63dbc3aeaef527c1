"""The records of a head card: what one head reads, writes and decides in base and in tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rq4lens.analysis.card.fragment import card_css, card_fragment
from rq4lens.analysis.statistics.bootstrap import Estimate
from rq4lens.analysis.statistics.plain import Listed
from rq4lens.heads import Head
from rq4lens.results import Record


@dataclass(frozen=True)
class Role:
    """How much of its attention a head gives to one kind of position, in percent.

    Roles may overlap: the previous position can be the first one.
    """

    name: str
    base_pct: float
    tuned_pct: float
    change_pct: Estimate


@dataclass(frozen=True)
class TextShare:
    """The attention, in percent over all prompts, to a token text; ``n_prompts`` hold it."""

    text: str
    n_prompts: int
    base_pct: float
    tuned_pct: float

    @property
    def change_pct(self) -> float:
        """Tuned minus base."""
        return self.tuned_pct - self.base_pct


@dataclass(frozen=True)
class HeadReads(Record):
    """What a head attends to from the decision token.

    Args:
        roles: attention by the role of the attended position, most changed first.
        texts: attention by the text of the attended token, most changed first.
        distance: mean Jensen-Shannon distance between the two patterns, from 0 (alike) to 1.
        output_change_pct: how far the head's output moves because it attends elsewhere, with the
            tuned model's values; root mean square, in percent of base's output.
    """

    roles: tuple[Role, ...]
    texts: tuple[TextShare, ...]
    distance: Estimate
    output_change_pct: Estimate


@dataclass(frozen=True)
class TokenShift:
    """What a head adds to the logit of a token, relative to the mean over the vocabulary."""

    token: str
    logits: float


@dataclass(frozen=True)
class Shifts:
    """The tokens that a head raises and lowers most by its direct effect, strongest first."""

    raised: tuple[TokenShift, ...]
    lowered: tuple[TokenShift, ...]


@dataclass(frozen=True)
class Writes(Record):
    """What a head writes straight to the logits, past all later layers.

    The direct effect is ``z W_O`` through the final norm, with the scale it has at that prompt,
    and ``W_U``; before a soft cap of the logits, if the model has one.

    Args:
        base: mean over prompts in base.
        tuned: mean over prompts in tuned.
        change: tuned minus base.
        output_change_pct: how far the head's output moves because its values or its ``W_O``
            changed, under base's attention; root mean square, in percent of base's output.
    """

    base: Shifts
    tuned: Shifts
    change: Shifts | None
    output_change_pct: Estimate


@dataclass(frozen=True)
class Carried(Record):
    """How far this head alone, at strength 1, takes one model to the other, in percent.

    Args:
        to_base_pct: the tuned model with base's activation of the head.
        to_tuned_pct: the base model with tuned's activation of the head.
        direct_pct: share of ``to_base_pct`` that is left when everything behind the head's layer
            is held at its clean values, in percent; the rest goes through later layers.
    """

    to_base_pct: Estimate
    to_tuned_pct: Estimate
    direct_pct: Estimate


@dataclass(frozen=True)
class HeadNumbers(Record):
    """What the run measured of the head.

    Args:
        alpha: blend strength of the run.
        kind: the kind of the head.
        rank: its rank among the heads of the layer.
        rank_low: low end of the 95% range of the rank over resamples of the prompts.
        rank_high: high end of it.
        KL_raw: KL of the raw patch, in nats.
        KL_mapped: KL of the mapped patch, in nats.
        delta: ``ΔKL``, in nats.
        drop_pct: share of the raw damage that the map repairs.
        recovered_pct: of what the head tells beyond a constant, how much is there when something
            else stands in for it at strength 1, by what it is; empty if it was not measured.
    """

    alpha: float
    kind: str | None
    rank: int
    rank_low: int | None
    rank_high: int | None
    KL_raw: Estimate
    KL_mapped: Estimate
    delta: Estimate
    drop_pct: Estimate
    recovered_pct: Mapping[str, Estimate]


@dataclass(frozen=True)
class MapFacts(Record):
    """The head's map from base to tuned activations, in a few numbers.

    Args:
        kind: how it was fitted.
        r2: held-out share of the variance that it explains.
        rotation_degrees: mean angle of the rotation nearest to it.
        scale: by how much it stretches, root mean square over directions.
        shift_pct: length of what it adds to every activation, in percent of the root mean square
            length of the tuned activations.
    """

    kind: str
    r2: float | None
    rotation_degrees: float | None
    scale: float | None
    shift_pct: float | None


@dataclass(frozen=True)
class Attended:
    """A prompt as one model reads it, and the head's attention from its last, deciding token."""

    tokens: tuple[str, ...]
    attention: tuple[float, ...]


@dataclass(frozen=True)
class Likely:
    """A next token and its probability."""

    token: str
    probability: float


@dataclass(frozen=True)
class NextTokens:
    """The most likely next tokens of both models, and of each with the other's head."""

    base: tuple[Likely, ...]
    tuned: tuple[Likely, ...]
    tuned_with_base_head: tuple[Likely, ...]
    base_with_tuned_head: tuple[Likely, ...]


@dataclass(frozen=True)
class Decision(Record):
    """A prompt on which the head decides.

    Args:
        prompt: its id.
        chosen_by: the quantity by which it is among the first: ``"transfer"`` or ``"ΔKL"``.
        closed_nats: how much nearer base's head brings the tuned model to base, in nats.
        delta_nats: ``ΔKL`` of the head on this prompt.
        base: the prompt and the head's attention in base.
        tuned: the same in tuned.
        next_tokens: the next tokens with and without the other model's head.
        writes_base: what the head writes in base.
        writes_tuned: what it writes in tuned.
    """

    prompt: str
    chosen_by: str
    closed_nats: float | None
    delta_nats: float | None
    base: Attended
    tuned: Attended
    next_tokens: NextTokens
    writes_base: Shifts
    writes_tuned: Shifts


@dataclass(frozen=True)
class HeadCard(Listed, Record):
    """What one head reads, writes and decides, in base and in tuned.

    >>> card = rq.head_card(pair, "L1H0", n_prompts=1)
    >>> card.decides[0].next_tokens.base != card.decides[0].next_tokens.tuned
    True

    Args:
        head: the head.
        pair: name of the pair.
        split: the split that was looked at.
        n_prompts: its prompts.
        carried: how far the head alone takes one model to the other.
        numbers: what the run measured of the head.
        reads: what it attends to.
        writes: what it writes to the logits.
        map: its map.
        decides: the prompts on which it decides; its table has a row for each.
    """

    ROWS: ClassVar[str] = "decides"

    head: Head
    pair: str
    split: str
    n_prompts: int
    carried: Carried
    numbers: HeadNumbers | None
    reads: HeadReads
    writes: Writes
    map: MapFacts | None
    decides: tuple[Decision, ...]

    def __repr__(self) -> str:
        return f"<HeadCard {self.head} of {self.pair}: {self.n_prompts} {self.split} prompts>"

    def _repr_html_(self) -> str:
        return f"<style>{card_css()}</style>{card_fragment(self)}"
