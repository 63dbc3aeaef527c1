"""Frozen records of what was measured, and the quantities that follow from one record alone.

Everything here is plain numbers: no model, no figure. Symbols are those of the method page:
``KL_raw``, ``KL_mapped`` and ``ΔKL = KL_raw - KL_mapped``, in nats, per prompt and as means over
the prompts of the split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float64, Int64
from numpy import ndarray
from pydantic import TypeAdapter

from rq4lens.config import Effort, Patching, RankBy, refuse_unknown
from rq4lens.errors import UserError
from rq4lens.heads import Head, HeadSet

HOOK = "hook_z"
NO_CONTROL_LAYER = "the run has no control layer"
NO_RAW_EFFECT = "the raw patch changes nothing (KL_raw is 0)"


@dataclass(frozen=True)
class Record:
    """A record whose undefined values are None, and why.

    Args:
        reasons: why a field is None, or holds one, by the field's name. Reasons of fields that
            hold no None are dropped, so that they can be given before it is known.
    """

    BECAUSE: ClassVar[Mapping[str, str]] = {}
    """What None means in a field unless another reason is given."""

    reasons: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        reasons = {**self.BECAUSE, **self.reasons}
        needed = {n: reason for n, reason in reasons.items() if _has_none(getattr(self, n))}
        object.__setattr__(self, "reasons", needed)


class Shown(ABC):
    """A result that a notebook shows as a table."""

    @abstractmethod
    def to_dataframe(self) -> pd.DataFrame:
        """The result as a table."""

    def _repr_html_(self) -> str:
        return table_html(self.to_dataframe())


def table_html(table: pd.DataFrame) -> str:
    """A table as a notebook shows it: three digits, and no reasons for what is undefined."""
    shown = [name for name in table if not str(name).endswith("_reason")]
    html: str = table[shown].to_html(
        index=False, float_format="{:.3g}".format, na_rep="", max_rows=SHOWN_ROWS
    )
    return html


SHOWN_ROWS = 60
"""A notebook shows no more rows of a table."""


def _has_none(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and any(map(_has_none, value)))


@dataclass(frozen=True)
class GridSettings:
    """How a grid was made; printed on every figure and written with every result.

    Args:
        pair: name of the pair.
        base: where the base model came from.
        tuned: where the tuned model came from.
        n_layers: layers of the models.
        n_heads: heads per layer.
        decision_rule: how the decision token was found.
        dtype: number format of the models.
        engine: the engine that computed the numbers.
        patching: how heads were patched and measured.
        effort: resamples and seed of everything that is drawn.
    """

    pair: str
    base: str
    tuned: str
    n_layers: int
    n_heads: int
    decision_rule: str
    dtype: str
    engine: str
    patching: Patching
    effort: Effort = field(default_factory=Effort)

    @property
    def layer(self) -> int:
        """The main layer."""
        if self.patching.layer is None:
            raise UserError("a grid has a main layer: name it in Patching(layer=...).")
        return self.patching.layer

    def to_dict(self) -> dict[str, Any]:
        """The settings as flat JSON values, the sizes of head sets as ``ks``."""
        parts = {"patching", "effort"}
        patching = self.patching.model_dump(mode="json")
        if self.patching.control_layer is None:
            patching["control_layer_reason"] = NO_CONTROL_LAYER
        return {
            **{name: value for name, value in vars(self).items() if name not in parts},
            "ks": patching.pop("k"),
            **patching,
            **self.effort.model_dump(mode="json"),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GridSettings:
        """Settings read back from JSON.

        Raises:
            ValueError: if one is missing or of another type.
        """
        flat = {**values, "k": values.get("ks")}
        own = {name: flat[name] for name in cls.__dataclass_fields__ if name in flat}
        own["patching"] = Patching.checked(flat, "the settings of the grid")
        own["effort"] = Effort.checked(flat, "the settings of the grid")
        return TypeAdapter(cls).validate_python(own)

    def comparable_to(self, other: GridSettings) -> bool:
        """Whether two grids differ at most in layers, head sets and seeds."""
        same = {"layer": 0, "control_layer": None, "k": (), "random_seeds": (), "rank_by": "delta"}
        first, second = (
            replace(each, engine="", effort=Effort(), patching=each.patching.but(**same))
            for each in (self, other)
        )
        return first == second


METRIC_UNITS = {"answer_logprob": " nats", "logit_difference": " nats"}
"""The units of metrics that have one, behind a number."""

OWN, OTHERS = 1, 2
"""The most likely token is that of the clean patched model, of the other model."""


class PatchRow(NamedTuple):
    """The effect of one patch on each prompt.

    Args:
        kl_nats: divergence from the clean patched model.
        answer_logprob_change_nats: log-probability of that model's own most likely next token,
            patched minus clean.
        gap_left_nats: ``KL(p_other || p_patched)``: how far it still is from the other model.
        answer_is: 1 where its most likely token is its own clean one, plus 2 where it is the other
            model's.
        metric: the patched model's value of the metric, in its unit.
        kl_by_token_nats: ``kl_nats`` of each token of the answer, NaN behind the end of shorter
            ones; None where one token is compared.

    Gap and answer are None where there was no other model. Of an answer of several tokens they and
    the first two are those of all of it.
    """

    kl_nats: Float64[ndarray, "prompt"]
    answer_logprob_change_nats: Float64[ndarray, "prompt"]
    gap_left_nats: Float64[ndarray, "prompt"] | None = None
    answer_is: Float64[ndarray, "prompt"] | None = None
    metric: Float64[ndarray, "prompt"] | None = None
    kl_by_token_nats: Float64[ndarray, "prompt token"] | None = None

    @property
    def measures(self) -> dict[str, Float64[ndarray, "prompt *token"]]:
        """Those that were measured, by name."""
        return {name: each for name, each in self._asdict().items() if each is not None}


UNRELATED_COSINE = 0.5
"""Weights of a fine-tune point where those of its base do."""


class Compared(NamedTuple):
    """How well the next-token distributions of the two models can be compared.

    Left out is the probability of tokens that the other model lacks; the noise is the mean size of
    ``KL`` between two ways to compute one distribution; the cosine, of the weights over all
    matrices, is None where the two were not in memory together.
    """

    left_out_base_pct: float = 0.0
    left_out_tuned_pct: float = 0.0
    noise_nats: float = 0.0
    weight_cosine: float | None = None


class Transfer(NamedTuple):
    """What a head set carries: each model with the other one's activations at full strength."""

    into_tuned: PatchRow
    into_base: PatchRow

    def left_nats(self, direction: RankBy) -> Float64[ndarray, "prompt"]:
        """What is left of the gap in one direction, ``"to_base"`` or ``"to_tuned"``."""
        return np.asarray(getattr(self, TRANSFERS[direction]).gap_left_nats)

    @property
    def answer_is(self) -> Float64[ndarray, "prompt"]:
        """Whose the most likely token of the tuned model is."""
        return np.asarray(self.into_tuned.answer_is)


EVERY, EVERY_LAYER = "every_layer", -1
"""The condition of all heads of all layers at once, and what stands for its layer in tables."""


@dataclass(frozen=True)
class ConditionResult(Shown):
    """One condition of the grid: a head set patched at one layer, raw and mapped.

    >>> str(run.full.heads)
    'ALL'

    Args:
        cond: name of the condition: ``full``, ``head{h}``, ``top{k}``, ``rand{k}_s{seed}``,
            ``ctrl_full``, ``none`` or ``self``.
        layer: the patched layer.
        heads: the patched heads.
        alpha: blend strength of ``raw`` and ``mapped``, in [0, 1].
        raw: the raw patch.
        mapped: the mapped patch.
        transfer: both models with the other one's activations at strength 1; None of ``self``.
    """

    cond: str
    layer: int
    heads: HeadSet
    alpha: float
    raw: PatchRow
    mapped: PatchRow
    transfer: Transfer | None = None

    def __repr__(self) -> str:
        return (
            f"<ConditionResult {self.cond} of layer {self.layer}, heads {self.heads}, alpha "
            f"{self.alpha:g}: KL_raw {self.KL_raw:.3g}, KL_mapped {self.KL_mapped:.3g} nats>"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """A row a prompt, in nats."""
        return pd.DataFrame(
            {"KL_raw": self.kl_raw_nats, "KL_mapped": self.kl_mapped_nats, "delta": self.delta_nats}
        )

    @property
    def rows(self) -> tuple[PatchRow, ...]:
        """Everything that was measured of it."""
        return (self.raw, self.mapped, *(self.transfer or ()))

    @property
    def kl_raw_nats(self) -> Float64[ndarray, "prompt"]:
        """KL of the raw patch, per prompt."""
        return self.raw.kl_nats

    @property
    def kl_mapped_nats(self) -> Float64[ndarray, "prompt"]:
        """KL of the mapped patch, per prompt."""
        return self.mapped.kl_nats

    @property
    def KL_raw(self) -> float:
        """Mean KL of the raw patch, in nats."""
        return float(self.kl_raw_nats.mean())

    @property
    def KL_mapped(self) -> float:
        """Mean KL of the mapped patch, in nats."""
        return float(self.kl_mapped_nats.mean())

    @property
    def delta_nats(self) -> Float64[ndarray, "prompt"]:
        """``ΔKL`` of each prompt, in nats."""
        return self.kl_raw_nats - self.kl_mapped_nats

    @property
    def delta(self) -> float:
        """``ΔKL``: how much of the raw patch's damage the map repairs, in nats."""
        return float(self.delta_nats.mean())

    @property
    def drop_pct(self) -> float | None:
        """``100 ΔKL / KL_raw``; None when the raw patch changes nothing."""
        return 100 * self.delta / self.KL_raw if self.KL_raw > 0 else None


@dataclass(frozen=True)
class HeadRanking(Record, Shown):
    """Heads of one layer, best first.

    >>> run.ranking.method
    'delta'

    Args:
        method: the ranking method, for instance ``"delta"``.
        layer: the layer whose heads are ranked.
        alpha: blend strength the scores refer to, or None when they do not depend on one.
        heads: head indices, best first.
        scores: score of each of ``heads``; None where the score is undefined (these come last).
        standard_errors: standard error of each score, where the method has one.
        per_prompt: score of each head (in index order, not rank order) on each prompt, where the
            method has one.
        share_of: where the score is a share in percent, what it is a share of on each prompt: the
            score is 100 times the mean of ``per_prompt`` over the mean of this.
        settings: the method's own settings.
    """

    BECAUSE: ClassVar[Mapping[str, str]] = {
        "alpha": "the scores do not depend on alpha",
        "scores": NO_RAW_EFFECT,
        "standard_errors": "the scores are not means over prompts",
    }

    method: str
    layer: int
    alpha: float | None
    heads: tuple[int, ...]
    scores: tuple[float | None, ...]
    standard_errors: tuple[float | None, ...] | None = None
    per_prompt: Float64[ndarray, "head prompt"] | None = field(default=None, compare=False)
    share_of: Float64[ndarray, "head prompt"] | None = field(default=None, compare=False)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_scores(
        cls,
        scores: Sequence[float | None],
        *,
        method: str,
        layer: int,
        alpha: float | None,
        standard_errors: Sequence[float | None] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> HeadRanking:
        """Rank heads by descending score; ties break by head index, undefined scores come last.

        Args:
            scores: score of head 0, 1, 2, ...
            method: name of the method.
            layer: the layer whose heads these are.
            alpha: blend strength, or None.
            standard_errors: standard error of head 0, 1, 2, ...
            settings: the method's own settings.

        Returns:
            The ranking; per-prompt scores are added with :func:`dataclasses.replace`.
        """
        values = np.array([-np.inf if score is None else score for score in scores], dtype=float)
        order = tuple(order_of(values).tolist())
        errors = None if standard_errors is None else tuple(standard_errors[head] for head in order)
        return cls(
            method=method,
            layer=layer,
            alpha=alpha,
            heads=order,
            scores=tuple(scores[head] for head in order),
            standard_errors=errors,
            settings=dict(settings or {}),
        )

    def __repr__(self) -> str:
        best = ", ".join(Head(self.layer, head).label for head in self.top(4))
        return f"<HeadRanking of {self.n_heads} heads by {self.method}: {best}, ...>"

    def to_dataframe(self) -> pd.DataFrame:
        """A row a head, best first."""
        errors = self.standard_errors or [None] * self.n_heads
        return pd.DataFrame(
            {
                "rank": range(1, self.n_heads + 1),
                "head": [Head(self.layer, head).label for head in self.heads],
                self.method: self.scores,
                "standard_error": errors,
            }
        )

    @property
    def n_heads(self) -> int:
        """Number of ranked heads."""
        return len(self.heads)

    @property
    def by_head(self) -> tuple[float | None, ...]:
        """The scores in head order."""
        of = dict(zip(self.heads, self.scores, strict=True))
        return tuple(of[head] for head in range(self.n_heads))

    def top(self, k: int) -> tuple[int, ...]:
        """The best ``k`` heads, best first."""
        return self.heads[:k]

    def top_set(self, k: int) -> HeadSet:
        """The best ``k`` heads as a head set."""
        return HeadSet.of(self.top(k), self.n_heads)

    def rank_of(self, head: int) -> int:
        """Rank of a head; 1 is best."""
        return self.heads.index(head) + 1


@dataclass(frozen=True)
class GridResult(Shown):
    """All conditions of one run of the main job, with every prompt's own numbers.

    >>> run.ranking_by("to_base").top(2)
    (0, 2)

    Args:
        settings: how the grid was made.
        prompt_ids: the measured prompts, in the order of every per-prompt array.
        groups: the group of each prompt (paraphrases share one); a prompt without a group is a
            group of its own, named by its id.
        conditions: the results by condition name, in the order of the grid.
        noise_floor_nats: largest mean KL that patching nothing leaves, in nats.
        every_layer: what all heads of all layers carry; None if it was not measured.
        compared: how well the two models' distributions can be compared.
        provenance: versions, fingerprints, timings: everything that says how it was made.
    """

    settings: GridSettings
    prompt_ids: tuple[str, ...]
    groups: tuple[str, ...]
    conditions: Mapping[str, ConditionResult]
    noise_floor_nats: float
    every_layer: Transfer | None = None
    compared: Compared = field(default_factory=Compared)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        settings = self.settings
        return (
            f"<GridResult {settings.pair}, layer {settings.layer} of {settings.n_layers}, "
            f"alpha {settings.patching.alpha:g}: {len(self.conditions)} conditions, "
            f"{self.n_prompts} {settings.patching.split} prompts>"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """A row a condition: its heads and means over prompts, in nats and percent."""
        return pd.DataFrame(
            {
                "cond": each.cond,
                "layer": each.layer,
                "heads": str(each.heads),
                "alpha": each.alpha,
                "KL_raw": each.KL_raw,
                "KL_mapped": each.KL_mapped,
                "delta": each.delta,
                "drop_pct": each.drop_pct,
            }
            for each in self.conditions.values()
        )

    def __getitem__(self, cond: str) -> ConditionResult:
        if cond not in self.conditions:
            raise UserError(
                f"the grid has no condition {cond!r}: it has {', '.join(self.conditions)}."
            )
        return self.conditions[cond]

    @cached_property
    def memo(self) -> dict[str, Any]:
        """What was computed of this grid before, by name; figures and pages ask for it often."""
        return {}

    @property
    def n_prompts(self) -> int:
        """Number of measured prompts."""
        return len(self.prompt_ids)

    @property
    def n_heads(self) -> int:
        """Number of heads of a layer."""
        return self.settings.n_heads

    @property
    def full(self) -> ConditionResult:
        """Every head of the main layer patched."""
        return self["full"]

    @property
    def control(self) -> ConditionResult | None:
        """Every head of the control layer patched, if there is one."""
        return self.conditions.get("ctrl_full")

    def single(self, head: int) -> ConditionResult:
        """One head of the main layer patched."""
        return self[f"head{head}"]

    @property
    def singles(self) -> tuple[ConditionResult, ...]:
        """The single-head conditions, in head order."""
        return tuple(self.single(head) for head in range(self.n_heads))

    @property
    def ranking(self) -> HeadRanking:
        """Single heads ranked by ``settings.patching.rank_by``."""
        return self.ranking_by(self.settings.patching.rank_by)

    def ranking_by(self, rank_by: RankBy) -> HeadRanking:
        """Single heads ranked by another score; see :func:`rank_single_heads`."""
        return rank_conditions(self.conditions, self.n_heads, rank_by)

    def label(self, head: int) -> str:
        """Name of a head of the main layer, for instance ``L26H3``."""
        return Head(self.settings.layer, head).label


def rank_conditions(
    conditions: Mapping[str, ConditionResult], n_heads: int, rank_by: RankBy
) -> HeadRanking:
    """Rank the heads of one layer from their single-head conditions."""
    singles = [conditions[f"head{head}"] for head in range(n_heads)]
    whole, part = kl_nats_of(singles)
    by_transfer = rank_by in SWAPPED
    if by_transfer:
        whole, part = gaps_of(conditions["none"], singles, rank_by)
    alpha = 1.0 if by_transfer else singles[0].alpha
    ranking = rank_single_heads(whole, part, rank_by, layer=singles[0].layer, alpha=alpha)
    return replace(ranking, settings={} if rank_by in METRIC_TRANSFERS else {"metric": "kl"})


def kl_nats_of(conditions: Sequence[ConditionResult]) -> Float64[ndarray, "kind condition prompt"]:
    """``KL_raw`` and ``KL_mapped`` of conditions on each prompt."""
    raw = [condition.kl_raw_nats for condition in conditions]
    return np.array([raw, [condition.kl_mapped_nats for condition in conditions]])


def gaps_of(
    nothing: ConditionResult, conditions: Sequence[ConditionResult], direction: RankBy
) -> Float64[ndarray, "when condition prompt"]:
    """The gap between the models, and what conditions leave of it, on each prompt.

    ``nothing`` is the condition that patches no head. By one of ``METRIC_TRANSFERS`` the gap is the
    difference of the metric, counted so that its mean is not negative.
    """
    missing = [each.cond for each in (nothing, *conditions) if each.transfer is None]
    if missing or nothing.transfer is None:
        raise UserError(f"transfer of {missing[0]} was not measured: rank by delta or kl_raw.")
    clean = nothing.transfer
    before, *left = (
        left_of(clean, each.transfer, direction) for each in (nothing, *conditions) if each.transfer
    )
    return np.array([[before] * len(left), left]) * sign_of(before)


def sign_of(gap: Float64[ndarray, "prompt"]) -> int:
    """1, or -1 where a gap is negative on average: a metric may be higher of either model."""
    return -1 if gap.mean() < 0 else 1


def left_of(clean: Transfer, patched: Transfer, direction: RankBy) -> Float64[ndarray, "prompt"]:
    """What a patched model still lies away from the clean other one; see :func:`gaps_of`."""
    if direction in TRANSFERS:
        return patched.left_nats(direction)
    into = METRIC_TRANSFERS[direction]
    other = "into_base" if into == "into_tuned" else "into_tuned"
    here, there = getattr(patched, into).metric, getattr(clean, other).metric
    if here is None or there is None:
        raise UserError("no metric was measured: choose one with --metric, or rank by to_base.")
    return np.asarray(here - there)


TRANSFERS: dict[RankBy, str] = {"to_base": "into_tuned", "to_tuned": "into_base"}
"""The directions of transfer, and which patch each is read from."""

METRIC_TRANSFERS: dict[RankBy, str] = {"metric": "into_tuned", "metric_to_tuned": "into_base"}
"""The same by the metric: how far it goes from its value of one model to that of the other."""

SWAPPED: dict[RankBy, str] = TRANSFERS | METRIC_TRANSFERS
"""Both: what is read from the models with each other's activations."""


def rank_single_heads(
    whole_nats: Float64[ndarray, "head prompt"],
    part_nats: Float64[ndarray, "head prompt"],
    rank_by: RankBy,
    *,
    layer: int,
    alpha: float,
) -> HeadRanking:
    """Rank the heads of one layer, each by its effect when it alone is patched.

    ``whole`` and ``part`` are ``KL_raw`` and ``KL_mapped``: the score is their difference ``ΔKL``
    by ``"delta"``, its share of ``KL_raw`` by ``"drop_pct"`` and ``KL_raw`` itself, map or not, by
    ``"kl_raw"``. By ``"to_base"``, ``"to_tuned"`` and ``"metric"`` they are the gap and what is
    left of it.
    """
    delta_nats = whole_nats - part_nats
    scores = single_scores(whole_nats.mean(-1), delta_nats.mean(-1), rank_by)
    ranking = HeadRanking.from_scores(
        [float(score) if np.isfinite(score) else None for score in scores],
        method=rank_by,
        layer=layer,
        alpha=alpha,
    )
    return replace(
        ranking,
        per_prompt=whole_nats if rank_by == "kl_raw" else delta_nats,
        share_of=None if rank_by in {"delta", "kl_raw"} else whole_nats,
    )


def single_scores(
    whole: Float64[ndarray, "*rows head"], delta: Float64[ndarray, "*rows head"], rank_by: RankBy
) -> Float64[ndarray, "*rows head"]:
    """The score that orders single heads; see :func:`rank_single_heads`."""
    refuse_unknown([rank_by], get_args(RankBy), "a ranking of single heads", "score")
    if rank_by in {"delta", "kl_raw"}:
        return delta if rank_by == "delta" else whole
    return np.divide(100 * delta, whole, out=np.full(whole.shape, -np.inf), where=whole > 0)


def order_of(scores: Float64[ndarray, "*rows head"]) -> Int64[ndarray, "*rows head"]:
    """Heads by descending score; ties break by head index."""
    return np.argsort(-scores, axis=-1, kind="stable")


def ranks_of(scores: Float64[ndarray, "*rows head"]) -> Int64[ndarray, "*rows head"]:
    """Rank of each head, 1 for the best; ties break by head index."""
    return np.argsort(order_of(scores), axis=-1, kind="stable") + 1
