"""The vocabulary every engine shares: patches, sources, effects, the blend and the divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args, runtime_checkable

import einops
import torch
from jaxtyping import Bool, Float, Float64
from numpy import ndarray
from torch import Tensor

from rq4lens.config import KLDirection
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.patching.engines.difference_sums import difference_sums

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


def head_mask(heads: HeadSet, device: torch.device | None = None) -> Bool[Tensor, "head"]:
    """The head set as booleans, one per head of the layer."""
    return torch.tensor(heads.mask, dtype=torch.bool, device=device)


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
    """Whether the divergence is ``KL(p_patched || p_clean)``.

    Raises:
        UserError: if there is no such direction.
    """
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
    """
    clean = clean_logits.to(torch.promote_types(clean_logits.dtype, torch.float32))
    tilted = patched_first(direction)
    excess, moment = difference_sums(
        patched_logits,
        clean,
        clean.softmax(-1),
        clean.argmax(-1, keepdim=True),
        tilted=tilted,
        by_kernel=by_kernel,
    )
    ln_z = excess.log1p()
    kl = moment / (1 + excess) - ln_z if tilted else ln_z - moment
    return kl, -ln_z


def _log_probs(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    # One precision above the logits: a divergence is of second order in the logits' difference, so
    # rounding log-probabilities to the logits' own precision would swamp the small ones.
    half = logits.dtype.itemsize < 4
    return logits.log_softmax(-1, dtype=torch.float32 if half else torch.float64)


class Sources(Mapping[tuple[int, str], Tensor]):
    """What is blended in, by layer and source name.

    Each tensor is ``[prompt position head d_head]``; ``position`` runs over the patched positions,
    the decision token last.

    Args:
        tensors: the activations, by ``(layer, source)``.

    Raises:
        UserError: if two tensors differ in their number of prompts or positions.
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
        self._tensors = dict(tensors)

    def __getitem__(self, key: tuple[int, str]) -> Float[Tensor, "prompt position head d_head"]:
        if key not in self._tensors:
            known = ", ".join(f"{source!r} at layer {layer}" for layer, source in self._tensors)
            raise UserError(
                f"no activations for source {key[1]!r} at layer {key[0]}: there are {known}."
            )
        return self._tensors[key]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class Effects:
    """What interventions did to the next-token distribution.

    Args:
        kl_nats: divergence from the clean tuned model, in nats.
        answer_logprob_change_nats: log-probability of the clean model's most likely token, patched
            minus clean.
    """

    kl_nats: Float64[ndarray, "condition prompt"]
    answer_logprob_change_nats: Float64[ndarray, "condition prompt"]


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
