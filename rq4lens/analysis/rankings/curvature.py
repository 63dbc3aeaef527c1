"""The second-order form of KL: ``½ δᵀ F δ`` with F the Fisher information of the decision logits.

The divergence has no first-order term at the clean point; this is its leading one, and it is the
same for both directions of the divergence. With ``u_h = J δ_h`` the first-order change of the
logits when head h is patched, ``½ δᵀFδ = ½ Var_p(Σ_h u_h)`` under the clean distribution p. The
Gram matrix ``Cov_p(u_i, u_j)`` therefore approximates every head set at once.

Source:
    Amari, Information Geometry and Its Applications (2016), section 1.2: KL to second order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor
from torch.autograd import forward_ad

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.exact import per_prompt_ranking
from rq4lens.analysis.rankings.gradients import (
    DecisionFunction,
    RowsOfLogits,
    RowsOfZ,
    Site,
    as_rows,
    decision_functions,
    experiment_of,
)
from rq4lens.patching.passes import device_of
from rq4lens.patching.patch import MAPPED, RAW, SELF
from rq4lens.results import HeadRanking

Gram = Float64[ndarray, "prompt head head"]


@dataclass(frozen=True)
class Curvature:
    """Second-order form of the KL of every head set: Gram matrices of both patches at ``α = 1``."""

    raw: Gram
    mapped: Gram

    def kl_nats(
        self, gram: Gram, sets: Iterable[Iterable[int]], alpha: float
    ) -> Float64[ndarray, "condition prompt"]:
        """Approximate KL of head sets on each prompt."""
        every_head = np.arange(gram.shape[-1])
        masks = np.array([np.isin(every_head, list(heads)) for heads in sets], dtype=float)
        quadratic = einsum(masks, gram, masks, "set i, prompt i j, set j -> set prompt")
        return alpha**2 / 2 * quadratic

    def delta_nats(
        self, sets: Iterable[Iterable[int]], alpha: float
    ) -> Float64[ndarray, "condition prompt"]:
        """Approximate ``ΔKL`` of head sets on each prompt."""
        chosen = list(sets)
        return self.kl_nats(self.raw, chosen, alpha) - self.kl_nats(self.mapped, chosen, alpha)


def rank_by_kl_curvature(measured: MeasuredSets) -> HeadRanking:
    """Rank heads by ``½ δᵀ F δ``, raw minus mapped: ``ΔKL`` to second order in alpha."""
    scores = curvature(measured).delta_nats(measured.singles, measured.alpha)
    return per_prompt_ranking("kl_curvature", measured, scores)


def curvature(measured: MeasuredSets) -> Curvature:
    """The Gram matrices of a layer, from one forward-mode derivative per head and source."""
    experiment = experiment_of(measured, "kl_curvature")
    device = device_of(experiment.tuned_model)
    n_prompts, n_heads = len(experiment.prompts), experiment.n_heads
    z = experiment.sources[measured.layer, SELF]
    grams = np.zeros((2, n_prompts, n_heads, n_heads))
    # One row per head and source, and the clean row that each derivative starts from.
    for function in decision_functions(experiment, measured.layer, 4 * n_heads):
        clean = z[function.rows].to(device)
        sources = [
            experiment.sources[measured.layer, source][function.rows].to(clean) - clean
            for source in (RAW, MAPPED)
        ]
        found = _grams(function, clean, torch.stack(sources, dim=1))
        grams[:, function.rows.numpy()] += found.cpu().numpy()
    return Curvature(grams[0], grams[1])


@torch.no_grad()
def _grams(
    function: DecisionFunction,
    z: Site,
    deltas: Float[Tensor, "prompt source position head d_head"],
) -> Float[Tensor, "source prompt i j"]:
    """``Cov_p(u_i, u_j)`` of the logit changes of single heads, for each source."""
    n_sources, n_heads = deltas.shape[1], z.shape[2]
    only = torch.eye(n_heads, dtype=z.dtype, device=z.device)
    directions = einsum(
        deltas, only, "prompt source position head d, row head -> prompt source row position head d"
    ).flatten(1, 2)
    changes = rearrange(
        _logit_changes(function, z, directions).double(),
        "prompt (source head) vocab -> prompt source head vocab",
        source=n_sources,
    )
    p = function(as_rows(z)).double().softmax(-1)[:, :, None]
    centred = changes - (p * changes).sum(-1, keepdim=True)
    return einsum(
        p[:, 0, 0],
        centred,
        centred,
        "prompt vocab, prompt source i vocab, prompt source j vocab -> source prompt i j",
    )


def _logit_changes(
    function: DecisionFunction,
    z: Site,
    directions: RowsOfZ,
) -> RowsOfLogits:
    """Directional derivatives of the logits at the clean point."""
    with forward_ad.dual_level():
        clean = as_rows(z).expand_as(directions).contiguous()
        return forward_ad.unpack_dual(function(forward_ad.make_dual(clean, directions))).tangent
