"""The vocabulary every engine shares: patches, sources, effects, the blend and the divergence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from threading import Lock
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import einops
import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Shaped
from numpy import ndarray
from torch import Tensor

from rq4lens.config import KLDirection
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.patching.metrics import Asked, more_precise
from rq4lens.results import OTHERS, OWN

logger = logging.getLogger(__name__)

RAW = "raw"
MAPPED = "mapped"
SELF = "self"
BASE = "base"
"""Base z itself, whatever the raw patch inserts."""
TUNED = "tuned"
"""The other direction: tuned z, patched into the base model."""
CONSTANT, SHIFTED, OUTPUT = "constant", "shifted", "output"
"""What else can replace a head: the tuned train mean, base z moved by the difference of the train
means, and what the base model's own ``W_O`` writes of base z."""


@dataclass(frozen=True)
class Patch:
    """One head set of one layer, blended with one source.

    Args:
        layer: the patched layer, or :data:`rq4lens.results.EVERY_LAYER`.
        heads: the patched heads.
        alpha: blend strength, in [0, 1].
        source: which activations are blended in: a key of :class:`Sources`, such as ``"raw"``;
            ``"tuned"`` is patched into the base model. :func:`rq4lens.patch` lists them.

    Raises:
        UserError: if alpha is outside [0, 1].
    """

    layer: int
    heads: HeadSet
    alpha: float
    source: str

    def __post_init__(self) -> None:
        if not isinstance(self.heads, HeadSet):
            raise UserError(
                f"{self.heads!r} is no HeadSet: write HeadSet.read({self.heads!r}, n_heads, "
                f"layer={self.layer}), or let rq.patch(pair, layer, heads) read it."
            )
        if not 0 <= self.alpha <= 1:
            raise UserError(
                f"alpha {self.alpha} is not a blend strength: give a number from 0 (nothing "
                "changes) to 1 (the source replaces the tuned activation)."
            )


def into_side(patch: Patch) -> Literal["base", "tuned"]:
    """The model that is patched."""
    return "base" if patch.source == TUNED else "tuned"


Progress = Callable[[int], None]
"""Called with the number of rows (prompt x intervention) just finished; feeds progress bars."""

Intervention = tuple[Patch, ...]
"""Patches that are applied in the same forward pass; at most one per layer."""


def blend(
    z: Float[Tensor, "*rows head d_head"],
    source: Float[Tensor, "*rows head d_head"],
    mask: Bool[Tensor, "*#rows head"],
    alpha: float | Float[Tensor, "*#rows"],
) -> Float[Tensor, "*rows head d_head"]:
    """``z' = (1 - α) z + α ẑ`` for the heads in the mask, ``z' = z`` for the others.

    This is the patch of the method page, before ``W_O``. It is the only place where alpha is
    applied: sources are never scaled by it beforehand.
    """
    strength = torch.as_tensor(alpha, dtype=z.dtype, device=z.device)
    weight = einops.rearrange(strength[..., None] * mask.to(z.dtype), "... head -> ... head 1")
    # lerp is exact at both ends and when both sides agree: patching z into itself changes no bit.
    return torch.lerp(z, source.to(z.dtype), weight)


def head_outputs(
    z: Float[Tensor, "*rows head d_head"],
    source: Float[Tensor, "*rows head d_head"],
    patched: tuple[Bool[Tensor, "*#rows head"], float | Float[Tensor, "*#rows"]],
    W_O: Float[Tensor, "head d_head d_model"],
) -> tuple[Float[Tensor, "*rows head d_head"], Float[Tensor, "*rows d_model"]]:
    """The blend of what heads write, where the source has its own ``W_O``.

    ``patched`` says which heads, and how strongly. The result is what is left of ``z``, and what
    the source writes into the residual stream beside it.
    """
    mask, alpha = patched
    nothing = torch.zeros_like(z)
    coming = blend(nothing, source, mask, alpha)
    out = einops.einsum(coming, W_O.to(z), "... head d_head, head d_head d_model -> ... d_model")
    return blend(z, nothing, mask, alpha), out


def patched_first(direction: KLDirection) -> bool:
    """Whether the divergence is ``KL(p_patched || p_clean)``."""
    if direction not in get_args(KLDirection):
        allowed = " or ".join(get_args(KLDirection))
        raise UserError(f"kl_direction {direction!r} does not exist: choose {allowed}.")
    return direction == "patched||clean"


def next_token_effects(
    patched_logits: Float[Tensor, "*rows vocab"],
    clean_logits: Float[Tensor, "*#rows vocab"],
    direction: KLDirection = "patched||clean",
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Divergence of the next-token distributions, and the answer's change of log-probability.

    Both measures of :class:`Effects`, from one softmax of each side.
    """
    patched, clean = _log_probs(patched_logits), _log_probs(clean_logits)
    answer = clean.argmax(-1, keepdim=True)
    change = patched.take_along_dim(answer, -1) - clean.take_along_dim(answer, -1)
    first, second = (patched, clean) if patched_first(direction) else (clean, patched)
    kl = divergence_terms(first, second).sum(-1)
    return kl, einops.rearrange(change, "... 1 -> ...")


def divergence_terms(
    first: Float[Tensor, "*#rows vocab"], second: Float[Tensor, "*#rows vocab"]
) -> Tensor:
    """What each token adds to ``KL(first || second)``, from log-probabilities."""
    # A logit of minus infinity gives 0 * (-inf - x), which is NaN where the limit is 0.
    return torch.where(first == -torch.inf, 0.0, first.exp() * (first - second))


@dataclass(frozen=True)
class OtherModel:
    """The clean next-token distributions of the other model of the pair."""

    log_probs: Float[Tensor, "*rows shared"]
    """Over the tokens that both models have, renormalised; a row for each compared token."""
    tokens: Int[Tensor, "shared"] | None = None
    """The patched model's ids of these tokens; None if the vocabularies are the same."""
    asked: Asked | None = None
    """The metric that is measured beside the divergence, if there is one."""

    def of_prompts(self, prompts: Any) -> OtherModel:
        """The same on some of the prompts."""
        asked = self.asked and self.asked.of_prompts(prompts)
        return OtherModel(self.log_probs[prompts], self.tokens, asked)

    def by_token(self, n_answer: int) -> OtherModel:
        """The same, with the last ``n_answer`` tokens of each prompt as rows of their own."""
        log_probs = self.log_probs[:, -n_answer:].flatten(0, 1)
        return OtherModel(log_probs, self.tokens, self.asked)

    def to(self, device: torch.device) -> OtherModel:
        """The same on a device."""
        tokens = None if self.tokens is None else self.tokens.to(device)
        return OtherModel(self.log_probs.to(device), tokens, self.asked)

    @property
    def answers(self) -> Int[Tensor, "*rows"]:
        """Its most likely token, as an id of the patched model."""
        best = self.log_probs.argmax(-1)
        return best if self.tokens is None else self.tokens[best]

    def shared(self, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows shared"]:
        """The patched model's logits of the tokens that both have."""
        return logits if self.tokens is None else logits[..., self.tokens]

    def scattered(
        self, p: Float[Tensor, "*rows shared"], logits: Float[Tensor, "*rows vocab"]
    ) -> Float[Tensor, "*rows vocab"]:
        """Probabilities of shared tokens at their places in the patched model's vocabulary."""
        if self.tokens is None:
            return p
        return torch.zeros_like(logits).index_copy(-1, self.tokens, p.to(logits.dtype))

    def gap_left_nats(self, logits: Float[Tensor, "prompt row vocab"]) -> Tensor:
        """``KL(p_other || p_patched)``, ``[prompt row]``."""
        patched = _log_probs(self.shared(logits))
        return divergence_terms(self.log_probs[:, None].to(patched.dtype), patched).sum(-1)

    def answer_is(
        self,
        logits: Float[Tensor, "prompt row vocab"],
        clean_logits: Float[Tensor, "prompt 1 vocab"],
    ) -> Int[Tensor, "prompt row"]:
        """Whose answer the most likely token is: :data:`OWN` plus :data:`OTHERS`, or 0."""
        answers = logits.argmax(-1)
        own, others = answers == clean_logits.argmax(-1), answers == self.answers[:, None]
        return OWN * own + OTHERS * others


def effects_by_difference(
    patched_logits: Float[Tensor, "prompt row vocab"],
    clean_logits: Float[Tensor, "prompt 1 vocab"],
    direction: KLDirection = "patched||clean",
    other: OtherModel | None = None,
) -> tuple[Shaped[Tensor, "prompt row"], ...]:
    """:func:`all_effects` of many rows: without a softmax of each, and no less precise.

    With ``δ`` the difference of the logits, counted from its value at the clean model's most likely
    token, ``q`` the clean probabilities and ``Z = Σ q exp(δ)``,

    ``KL(patched || clean) = Σ q exp(δ) δ / Z - ln Z``, ``KL(clean || patched) = ln Z - Σ q δ``, the
    log-probability of that token changes by ``-ln Z``, and the gap to another distribution ``p`` by
    ``ln Z - Σ p δ``. Of vocabularies that differ, the gap's ``Z`` is over the tokens of both.

    Rounding is relative to ``δ`` here, not to the log-probabilities, so small effects keep their
    digits in float32, and equal logits give exactly 0.

    On a GPU a kernel reads each logit once; as tensor operations they pass through memory fourteen
    times, which takes a good part of a scan where the vocabulary is large.
    """
    clean = clean_logits.to(torch.promote_types(clean_logits.dtype, torch.float32))
    tilted = patched_first(direction)
    # Of vocabularies that differ, the gap has probabilities of its own for the clean model too.
    whole = None if other is None or other.tokens is not None else other
    sums, first = summed_by_tensors, (tilted, whole is not None)
    if patched_logits.is_cuda and _kernel_works(
        patched_logits.device, patched_logits.dtype, clean.dtype, patched_logits.shape[-1], first
    ):
        from rq4lens.patching.engines.kernels import summed_by_kernel  # noqa: PLC0415

        sums = summed_by_kernel
    q, answer = clean.softmax(-1), clean.argmax(-1, keepdim=True)
    p = None if whole is None else whole.log_probs.exp()[:, None]
    excess, moment, pull = sums(patched_logits, clean, q, answer, p, tilted=tilted)
    ln_z = excess.log1p()
    kl = moment / (1 + excess) - ln_z if tilted else ln_z - moment
    if other is None:
        return kl, -ln_z
    excess_shared = excess
    if whole is None:
        p, q = (
            other.scattered(each, clean)
            for each in (other.log_probs.exp()[:, None], other.shared(clean).softmax(-1))
        )
        excess_shared, _, pull = sums(patched_logits, clean, q, answer, p, tilted=False)
    assert pull is not None
    gap_left = other.gap_left_nats(clean) - pull + excess_shared.log1p()
    return kl, -ln_z, gap_left, other.answer_is(patched_logits, clean_logits)


def all_effects(
    patched_logits: Float[Tensor, "prompt row vocab"],
    clean_logits: Float[Tensor, "prompt 1 vocab"],
    direction: KLDirection = "patched||clean",
    other: OtherModel | None = None,
) -> tuple[Shaped[Tensor, "prompt row"], ...]:
    """The measures of :class:`Effects`, all but the first two only beside another model."""
    own = next_token_effects(patched_logits, clean_logits, direction)
    if other is None:
        return own
    return (
        *own,
        other.gap_left_nats(patched_logits),
        other.answer_is(patched_logits, clean_logits),
    )


EffectsOf = Callable[..., Sequence[Shaped[Tensor, "token row"]]]
"""What measures rows by token: :func:`all_effects` or :func:`effects_by_difference`."""


def answer_effects(
    effects_of: EffectsOf,
    logits: Float[Tensor, "token row vocab"],
    clean_logits: Float[Tensor, "token 1 vocab"],
    there: Bool[Tensor, "prompt answer"],
    direction: KLDirection = "patched||clean",
    other: OtherModel | None = None,
) -> list[Shaped[Tensor, "prompt row"]]:
    """The measures of whole answers, in the order of :class:`Effects`; single tokens come last.

    An answer's divergence, log-probability and gap are the sums over its tokens, each read behind
    those before it, and the most likely answer is a model's own where each token is. Logits are at
    the compared tokens, prompt by prompt; ``there`` says which of these each answer has, and
    ``other`` is the other model at them, see :meth:`OtherModel.by_token`.
    """
    by_token = effects_of(logits, clean_logits, direction, other)
    asked = None if other is None else other.asked
    metric = [] if asked is None else [asked.values(logits, clean_logits, there)]
    n_answer = there.shape[1]
    if n_answer == 1:
        return [*by_token, *metric]
    kl, *others = (
        einops.rearrange(each, "(prompt token) row -> prompt row token", token=n_answer)
        for each in by_token
    )
    here = there.to(kl.device)[:, None]
    sums = [torch.where(here, each, 0).sum(-1) for each in (kl, *others[:2])]
    own, others_own = (
        [((each & value > 0) | ~here).all(-1) for each in others[2:]] for value in (OWN, OTHERS)
    )
    answer_is = [OWN * one + OTHERS * other for one, other in zip(own, others_own, strict=True)]
    return [*sums, *answer_is, *metric, *torch.where(here, kl, torch.nan).unbind(-1)]


def summed_by_tensors(
    patched: Float[Tensor, "prompt row vocab"],
    clean: Float[Tensor, "prompt 1 vocab"],
    q: Float[Tensor, "prompt 1 vocab"],
    answer: Int[Tensor, "prompt 1 1"],
    p: Float[Tensor, "prompt 1 vocab"] | None = None,
    *,
    tilted: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``Σ q (exp(δ) - 1)``, ``Σ w δ`` with ``w = q exp(δ)`` if tilted, else ``q``, and ``Σ p δ``.

    ``δ`` counts from its value at the answer, so the first two are small where the effect is small.
    """
    delta = patched - clean
    delta -= delta.take_along_dim(answer, -1)
    pull = None if p is None else einops.rearrange(delta @ p.to(delta).mT, "... 1 -> ...")
    gained = delta.expm1().mul_(q)
    excess = gained.sum(-1)
    weighted = gained.add_(q).mul_(delta) if tilted else delta.mul_(q)
    return excess, weighted.sum(-1), pull


def _kernel_works(
    device: torch.device,
    dtype: torch.dtype,
    precise: torch.dtype,
    n_vocab: int,
    asked: tuple[bool, bool],
) -> bool:
    """Whether divergences can be summed by the kernel here, tilted and with a pull as ``asked``."""
    tilted, pulled = asked

    def trial() -> None:
        from rq4lens.patching.engines.kernels import summed_by_kernel  # noqa: PLC0415

        row = torch.zeros(1, 1, n_vocab, device=device)
        p = row if pulled else None
        summed_by_kernel(row.to(dtype), row, row, row[..., :1].long(), p, tilted=tilted)

    form = (device, dtype, n_vocab, asked)
    return precise == torch.float32 and is_built("divergences are summed", form, trial)


def build_ahead(
    device: str, dtype: torch.dtype, vocabularies: Sequence[int], direction: KLDirection
) -> None:
    """Begin to build the kernel that a pair's divergences will be summed by, beside other work."""
    here = torch.empty(0, device=device).device  # with its number, as tensors name it
    if here.type != "cuda":
        return
    alike, tilted = len(set(vocabularies)) == 1, patched_first(direction)
    # Of vocabularies that differ the gap is summed by itself.
    forms = [(tilted, True)] if alike else [(tilted, False), (False, True)]
    pool = ThreadPoolExecutor(1, thread_name_prefix="kernels")
    for form in forms:
        pool.submit(_kernel_works, here, dtype, torch.float32, vocabularies[0], form)
    pool.shutdown(wait=False)


_BUILT: dict[tuple[str, Hashable], bool] = {}
_BUILDING = Lock()


def is_built(what: str, form: Hashable, trial: Callable[[], object]) -> bool:
    """Whether a kernel can be built here; each form of it is tried once.

    It takes Triton, a C compiler and half a second.
    """
    with _BUILDING:
        if (what, form) not in _BUILT:
            _BUILT[what, form] = _succeeds(what, trial)
        return _BUILT[what, form]


def _succeeds(what: str, trial: Callable[[], object]) -> bool:
    try:
        trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # Triton raises errors of many kinds; the other way is exact too
        logger.warning(
            "%s without the GPU kernel, which is slower but as exact (%s: %s)",
            what,
            type(problem).__name__,
            problem,
        )
        return False
    return True


def _log_probs(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    # One precision above the logits: a divergence is of second order in the logits' difference, so
    # rounding log-probabilities to the logits' own precision would swamp the small ones.
    return logits.log_softmax(-1, dtype=more_precise(logits.dtype))


Site = Float[Tensor, "prompt position head d_head"]
"""Activations of a layer; ``position`` runs over the patched tokens, 0 where a prompt has fewer."""


class Sources(dict[tuple[int, str], Tensor]):
    """What is blended in, by layer and source name; ``made`` makes what is not there yet.

    ``W_O`` are the output matrices of sources that do not go through the patched model's own: the
    patched heads write ``z W_O`` of these into the residual stream instead.
    """

    def __init__(
        self,
        tensors: Mapping[tuple[int, str], Site],
        made: Mapping[str, Callable[[int], Site]] | None = None,
        W_O: Mapping[str, Callable[[int], Float[Tensor, "head d_head d_model"]]] | None = None,
    ) -> None:
        shapes = {tuple(tensor.shape[:2]) for tensor in tensors.values()}
        if len(shapes) > 1:
            raise UserError(
                f"sources disagree on prompts and positions: {sorted(shapes)}; capture them all "
                "on the same prompts with the same number of positions."
            )
        super().__init__(tensors)
        self.made = dict(made or {})
        self.W_O = dict(W_O or {})

    def __missing__(self, key: tuple[int, str]) -> Tensor:
        layer, source = key
        if source in self.made:
            self[key] = self.made[source](layer)
            return self[key]
        there = [f"{name!r} at layer {at}" for at, name in self if name not in self.made]
        there += ["at any layer " + ", ".join(map(repr, self.made))] if self.made else []
        raise UserError(
            f"no activations for source {source!r} at layer {layer}: there are {', '.join(there)}."
        )

    def of_prompts(self, rows: Sequence[int]) -> Sources:
        """The same for some of the prompts, each looked up when it is asked for."""

        def chosen(name: str) -> Callable[[int], Site]:
            return lambda layer: self[layer, name][rows]

        names = {*self.made, *(name for _, name in self)}
        return Sources({}, {name: chosen(name) for name in names}, self.W_O)

    def also(self, extra: Mapping[tuple[int, str], Site]) -> Sources:
        """The same with more."""
        return Sources({**self, **extra}, self.made, self.W_O)


@dataclass(frozen=True)
class Effects:
    """What interventions did to the next-token distribution, or to those of an answer's tokens.

    Args:
        kl_nats: divergence from the clean patched model, in nats, ``[condition prompt]``.
        answer_logprob_change_nats: log-probability of the clean model's most likely token, patched
            minus clean, ``[condition prompt]``.
        gap_left_nats: ``KL(p_other || p_patched)``, how far the patched model still is from the
            other model of the pair, in nats; None if there is no other.
        answer_is: whose answer the most likely token is, see :meth:`OtherModel.answer_is`.
        metric: the patched model's value of the metric, in its unit; None where none is measured.
        kl_by_token_nats: ``kl_nats`` of each token of an answer of several, NaN behind the end of
            shorter ones; None where one token is compared.
    """

    kl_nats: Float64[ndarray, "condition prompt"]
    answer_logprob_change_nats: Float64[ndarray, "condition prompt"]
    gap_left_nats: Float64[ndarray, "condition prompt"] | None = None
    answer_is: Float64[ndarray, "condition prompt"] | None = None
    metric: Float64[ndarray, "condition prompt"] | None = None
    kl_by_token_nats: Float64[ndarray, "condition prompt token"] | None = None

    @classmethod
    def of(cls, rows: Float64[ndarray, "measure condition prompt"], n_answer: int) -> Effects:
        """The measures one behind the other, those of an answer's tokens last."""
        if n_answer == 1:
            return cls(*rows)
        whole, by_token = rows[:-n_answer], rows[-n_answer:]
        tokens = einops.rearrange(by_token, "token condition prompt -> condition prompt token")
        return replace(cls(*whole), kl_by_token_nats=tokens)

    def __repr__(self) -> str:
        return "<Effects of {} patches on {} prompts>".format(*self.kl_nats.shape)

    @property
    def measures(self) -> dict[str, Float64[ndarray, "condition prompt *token"]]:
        """Those that were measured, by name."""
        every = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: values for name, values in every.items() if values is not None}

    @property
    def rows(self) -> Float64[ndarray, "measure condition prompt"]:
        """The measures one behind the other, as :meth:`of` takes them."""
        whole = [values for values in self.measures.values() if values.ndim == 2]
        tokens = self.kl_by_token_nats
        return np.stack([*whole, *([] if tokens is None else np.moveaxis(tokens, -1, 0))])

    def __getitem__(self, conditions: slice) -> Effects:
        """Some of the conditions."""
        return Effects(**{name: each[conditions] for name, each in self.measures.items()})


def n_measures(n_answer: int, other: OtherModel | None) -> int:
    """How many measures of a patch there are, alone or beside another model."""
    whole = 2 if other is None else 4 + (other.asked is not None)
    return whole + (n_answer if n_answer > 1 else 0)


@runtime_checkable
class Engine(Protocol):
    """Measures interventions on one model over a fixed list of prompts."""

    name: str
    fallback_reason: str | None
    """Why a faster engine is not used, for the record of a run."""

    @property
    def memory_report(self) -> Mapping[str, Any]:
        """What memory was asked for and used, for the record of a run."""

    def clean_z(self, layer: int) -> Site:
        """Clean activations at the patched positions of a layer."""

    def clean_log_probs(self) -> Float[Tensor, "prompt answer vocab"]:
        """The clean model's next-token distribution at each compared token; else 0."""

    def every_layer(
        self, source: str, sources: Sources, other: OtherModel | None = None
    ) -> Effects:
        """Effect of a source in place of every head of every layer."""

    def effects(
        self,
        interventions: Sequence[Intervention],
        sources: Sources,
        progress: Progress | None = None,
        other: OtherModel | None = None,
    ) -> Effects:
        """Effect of each intervention on each prompt, and how far it takes the model to another."""
