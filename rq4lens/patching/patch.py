"""The vocabulary every engine shares: patches, sources, effects, the blend and the divergence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, get_args, runtime_checkable

import einops
import torch
from jaxtyping import Bool, Float, Float64, Int
from numpy import ndarray
from torch import Tensor

from rq4lens.config import KLDirection
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet

logger = logging.getLogger(__name__)

RAW = "raw"
MAPPED = "mapped"
SELF = "self"


@dataclass(frozen=True)
class Patch:
    """One head set of one layer, blended with one source.

    Args:
        layer: the patched layer.
        heads: the patched heads.
        alpha: blend strength, in [0, 1].
        source: which activations are blended in: a key of :class:`Sources`, such as ``"raw"``,
            ``"mapped"`` or ``"self"``.

    Raises:
        UserError: if alpha is outside [0, 1].
    """

    layer: int
    heads: HeadSet
    alpha: float
    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(
                f"alpha {self.alpha} is not a blend strength: give a number from 0 (nothing "
                "changes) to 1 (the source replaces the tuned activation)."
            )


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
    terms = first.exp() * (first - second)
    # A logit of minus infinity gives 0 * (-inf - x), which is NaN where the limit is 0.
    terms = torch.where(first == -torch.inf, 0.0, terms)
    return terms.sum(-1), einops.rearrange(change, "... 1 -> ...")


def effects_by_difference(
    patched_logits: Float[Tensor, "prompt row vocab"],
    clean_logits: Float[Tensor, "prompt 1 vocab"],
    direction: KLDirection = "patched||clean",
    *,
    by_kernel: bool = False,
) -> tuple[Float[Tensor, "prompt row"], Float[Tensor, "prompt row"]]:
    """:func:`next_token_effects` for many rows: without a softmax of each, and no less precise.

    With ``δ`` the difference of the logits, counted from its value at the clean model's most likely
    token, ``q`` the clean probabilities and ``Z = Σ q exp(δ)``,

    ``KL(patched || clean) = Σ q exp(δ) δ / Z - ln Z``, ``KL(clean || patched) = ln Z - Σ q δ``, and
    the log-probability of that token changes by ``-ln Z``.

    Rounding is relative to ``δ`` here, not to the log-probabilities, so small effects keep their
    digits in float32, and equal logits give exactly 0.

    A GPU kernel reads each logit once; as tensor operations they pass through memory fourteen
    times, a seventh of a scan where the vocabulary is large.
    """
    clean = clean_logits.to(torch.promote_types(clean_logits.dtype, torch.float32))
    tilted = patched_first(direction)
    sums = summed_by_tensors
    if by_kernel and patched_logits.is_cuda:
        n_vocab = patched_logits.shape[-1]
        if _kernel_works(patched_logits.device, patched_logits.dtype, clean.dtype, n_vocab):
            from rq4lens.patching.engines.difference_kernel import summed_by_kernel  # noqa: PLC0415

            sums = summed_by_kernel
    q, answer = clean.softmax(-1), clean.argmax(-1, keepdim=True)
    excess, moment = sums(patched_logits, clean, q, answer, tilted=tilted)
    ln_z = excess.log1p()
    kl = moment / (1 + excess) - ln_z if tilted else ln_z - moment
    return kl, -ln_z


def summed_by_tensors(
    patched: Float[Tensor, "prompt row vocab"],
    clean: Float[Tensor, "prompt 1 vocab"],
    q: Float[Tensor, "prompt 1 vocab"],
    answer: Int[Tensor, "prompt 1 1"],
    *,
    tilted: bool,
) -> tuple[Float[Tensor, "prompt row"], Float[Tensor, "prompt row"]]:
    """``Σ q (exp(δ) - 1)`` and ``Σ w δ``, where ``w`` is ``q exp(δ)`` if tilted, else ``q``.

    ``δ`` counts from its value at the answer, so both sums are small where the effect is small.
    """
    delta = patched - clean
    delta -= delta.take_along_dim(answer, -1)
    gained = delta.expm1().mul_(q)
    excess = gained.sum(-1)
    if tilted:
        return excess, gained.add_(q).mul_(delta).sum(-1)
    return excess, delta.mul_(q).sum(-1)


@cache
def _kernel_works(
    device: torch.device, dtype: torch.dtype, precise: torch.dtype, n_vocab: int
) -> bool:
    """Whether the kernel can be built here: it takes Triton and a C compiler."""
    if precise != torch.float32:
        return False
    try:
        from rq4lens.patching.engines.difference_kernel import summed_by_kernel  # noqa: PLC0415

        row = torch.zeros(1, 1, n_vocab, device=device)
        summed_by_kernel(row.to(dtype), row, row, row[..., :1].long(), tilted=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # Triton raises errors of many kinds; the other way is exact too
        logger.warning(
            "divergences are summed without the GPU kernel, which is slower but as exact (%s: %s)",
            type(problem).__name__,
            problem,
        )
        return False
    return True


def _log_probs(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    # One precision above the logits: a divergence is of second order in the logits' difference, so
    # rounding log-probabilities to the logits' own precision would swamp the small ones.
    half = logits.dtype.itemsize < 4
    return logits.log_softmax(-1, dtype=torch.float32 if half else torch.float64)


class Sources(dict[tuple[int, str], Tensor]):
    """What is blended in, by layer and source name.

    ``position`` runs over the patched positions, the decision token last.
    """

    def __init__(
        self, tensors: Mapping[tuple[int, str], Float[Tensor, "prompt position head d_head"]]
    ) -> None:
        shapes = {tuple(tensor.shape[:2]) for tensor in tensors.values()}
        if len(shapes) > 1:
            raise UserError(
                f"sources disagree on prompts and positions: {sorted(shapes)}; capture them all "
                "on the same prompts with the same number of positions."
            )
        super().__init__(tensors)

    def __missing__(self, key: tuple[int, str]) -> Tensor:
        known = ", ".join(f"{source!r} at layer {layer}" for layer, source in self)
        raise UserError(
            f"no activations for source {key[1]!r} at layer {key[0]}: there are {known}."
        )


@dataclass(frozen=True)
class Effects:
    """What interventions did to the next-token distribution.

    Args:
        kl_nats: divergence from the clean tuned model, in nats, ``[condition prompt]``.
        answer_logprob_change_nats: log-probability of the clean model's most likely token, patched
            minus clean, ``[condition prompt]``.
    """

    kl_nats: Float64[ndarray, "condition prompt"]
    answer_logprob_change_nats: Float64[ndarray, "condition prompt"]

    def __getitem__(self, conditions: slice) -> Effects:
        """Some of the conditions."""
        return Effects(self.kl_nats[conditions], self.answer_logprob_change_nats[conditions])


@runtime_checkable
class Engine(Protocol):
    """Measures interventions on the tuned model over a fixed list of prompts."""

    name: str
    fallback_reason: str | None
    """Why a faster engine is not used, for the record of a run."""

    @property
    def memory_report(self) -> Mapping[str, Any]:
        """What memory was asked for and used, for the record of a run."""

    def tuned_z(self, layer: int) -> Float[Tensor, "prompt position head d_head"]:
        """Clean activations of the tuned model at the patched positions of a layer."""

    def effects(
        self,
        interventions: Sequence[Intervention],
        sources: Sources,
        progress: Progress | None = None,
    ) -> Effects:
        """Effect of each intervention on each prompt."""
