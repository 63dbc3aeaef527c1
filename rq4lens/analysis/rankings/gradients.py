"""Rankings by derivatives: first- and second-order answers to what exact patching measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Float64, Int
from numpy import ndarray
from torch import Tensor
from torch.autograd import forward_ad

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.exact import per_prompt_ranking
from rq4lens.analysis.rankings.methods import DEFAULTS, RankingSettings
from rq4lens.errors import UserError
from rq4lens.models.load.devices import Placement
from rq4lens.models.load.lens import HookedModel, HookedTransformer, HookPoint, z_site
from rq4lens.models.prompts.prompt_set import TokenBatch
from rq4lens.patching.engines.block_row import finish_block, row_z
from rq4lens.patching.engines.clean_pass import CleanBatch
from rq4lens.patching.engines.memory import default_budget_bytes
from rq4lens.patching.engines.suffix import SuffixEngine
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.passes import device_of, forward_batch, unembed
from rq4lens.patching.patch import MAPPED, RAW, SELF
from rq4lens.results import HeadRanking

RowsOfZ = Float[Tensor, "prompt row position head d_head"]
RowsOfLogits = Float[Tensor, "prompt row vocab"]
Site = Float[Tensor, "prompt position head d_head"]
PerHead = Float64[ndarray, "head prompt"]

BYTES_PER_VALUE = 32
"""Memory of a number of the widest layer while it is derived, copies in float64 among it."""

MOST_BYTES = 4 * 2**30
"""Memory of a derivative; more of it makes a GPU no faster."""


class DecisionFunction(NamedTuple):
    """Logits at a compared token of some prompts, ``rows``, as a function of ``z`` at one layer."""

    rows: Int[Tensor, "prompt"]
    logits: Callable[[RowsOfZ], RowsOfLogits]


def _suffix_logits(
    model: HookedTransformer, patched: int, batch: CleanBatch, prompts: slice, z: RowsOfZ
) -> RowsOfLogits:
    """From ``z`` to logits over keys and values kept from the clean pass."""
    placement = Placement.of(model)
    clean = batch.layers[patched].resid[prompts]
    resid = repeat(clean, "prompt position d -> prompt row position d", row=z.shape[1])
    resid = finish_block(model.blocks[patched], resid, z.to(clean.device))
    for layer in range(patched + 1, model.cfg.n_layers):
        block, at = model.blocks[layer], batch.layers[layer].of_prompts(prompts)
        resid = resid.to(placement.layers[layer])
        resid = finish_block(block, resid, row_z(block, resid, at.earlier))
    return unembed(model, resid[:, :, -1].to(placement.exit))


def _native_logits(
    model: HookedModel, layer: int, batch: TokenBatch, token: int, z: RowsOfZ
) -> RowsOfLogits:
    """From ``z`` to logits at one token of the answer by full passes through a native hook."""
    places = batch.patched
    prompt, spot = places.there.nonzero(as_tuple=True)
    at = places.at[prompt, spot]

    def logits_of(row: Site) -> Tensor:
        def replace(clean: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001 - by the library
            here = (prompt.to(clean.device), at.to(clean.device))
            return clean.index_put(here, row[prompt, spot].to(clean))

        with model.hooks(fwd_hooks=[(z_site(layer), replace)]):
            logits = forward_batch(model, batch)
            return logits[torch.arange(len(logits)), batch.compared.at[:, token]]

    return torch.stack([logits_of(row) for row in z.unbind(1)], dim=1)


def decision_functions(
    experiment: Experiment, layer: int, rows_per_prompt: int
) -> Iterator[DecisionFunction]:
    """The decision functions of each batch of the measured prompts, one for each answer token."""
    model, engine = experiment.tuned_model, experiment.engine
    size = _prompts_at_once(experiment, rows_per_prompt)
    simple = isinstance(engine, SuffixEngine) and engine.window.is_patched_whole
    if isinstance(engine, SuffixEngine) and simple and engine.window.n_answer == 1:
        for clean in engine.clean_batches(layer):
            for start in range(0, len(clean.rows), size):
                here, prompts = clean.to(Placement.of(model)), slice(start, start + size)
                logits = partial(_suffix_logits, model, layer, here, prompts)
                yield DecisionFunction(here.rows[prompts], logits)
    else:
        for batch in experiment.prompts.batches(size):
            for token in range(-batch.longest_answer, 0):
                answering = batch.rows[batch.n_answer >= -token]
                if len(answering):
                    some = experiment.prompts.batch(answering)
                    logits = partial(_native_logits, model, layer, some, token)
                    yield DecisionFunction(answering, logits)


def _prompts_at_once(experiment: Experiment, rows_per_prompt: int) -> int:
    cfg = experiment.tuned_model.cfg
    longest = int(experiment.prompts.lengths.max())
    widest = cfg.d_vocab + (cfg.d_mlp or 0) + cfg.n_heads * longest
    n_values = rows_per_prompt * experiment.prompts.n_spots * widest
    free = default_budget_bytes(device_of(experiment.tuned_model))
    return max(1, min(free, MOST_BYTES) // (BYTES_PER_VALUE * n_values))


def as_rows(z: Site) -> RowsOfZ:
    """Activations as the single row of their prompt."""
    return rearrange(z, "prompt position head d_head -> prompt 1 position head d_head")


def rank_by_grad_act(measured: MeasuredSets, settings: RankingSettings = DEFAULTS) -> HeadRanking:
    """Rank heads by ``|z · ∇ℓ|``: how much the answer leans on the head as it is.

    It looks at the tuned model alone, so it cannot know what the fine-tune changed.
    """
    experiment = experiment_of(measured, "grad_act")
    z, target = experiment.sources[measured.layer, SELF], settings.target
    gradient = path_gradients(experiment, measured.layer, [torch.zeros_like(z)], 0, target)[0]
    return per_prompt_ranking("grad_act", measured, np.abs(_dot(z, gradient)), {"target": target})


def rank_by_attribution(
    measured: MeasuredSets, settings: RankingSettings = DEFAULTS
) -> HeadRanking:
    """Rank heads by ``α (ẑ - z) · ∇ℓ``, mapped minus raw: a first-order estimate of the repair."""
    return _attribution_ranking("attribution", measured, settings.target, steps=0)


def rank_by_integrated_gradients(
    measured: MeasuredSets, settings: RankingSettings = DEFAULTS
) -> HeadRanking:
    """Rank heads by attribution along the path; see :func:`rank_by_attribution`."""
    return _attribution_ranking(
        "integrated_gradients", measured, settings.target, settings.ig_steps
    )


def _attribution_ranking(name: str, measured: MeasuredSets, target: str, steps: int) -> HeadRanking:
    raw, mapped = attributions(measured, (RAW, MAPPED), target, steps)
    return per_prompt_ranking(name, measured, mapped - raw, {"target": target, "steps": steps})


def attributions(
    measured: MeasuredSets, sources: Sequence[str], target: str, steps: int
) -> list[PerHead]:
    """What each head contributes to the change of ``ℓ`` when all heads are patched.

    With enough steps the contributions add up to that change (completeness).
    """
    experiment = experiment_of(measured, "attribution")
    tensors, layer = experiment.sources, measured.layer
    z = tensors[layer, SELF]
    directions = [measured.alpha * (tensors[layer, source].to(z) - z) for source in sources]
    gradients = path_gradients(experiment, layer, directions, steps, target)
    return [_dot(step, mean) for step, mean in zip(directions, gradients, strict=True)]


def path_gradients(
    experiment: Experiment, layer: int, directions: Sequence[Site], steps: int, target: str
) -> list[Site]:
    """Mean of ``∇ℓ`` along straight paths from the clean activations; without steps, there.

    A few Gauss-Legendre points integrate a smooth path to rounding error.
    """
    shares, weights_at = np.zeros(1), np.ones(1)
    if steps:
        nodes, weights_at = np.polynomial.legendre.leggauss(steps)
        shares, weights_at = (nodes + 1) / 2, weights_at / 2
    z = experiment.sources[layer, SELF]
    device = device_of(experiment.tuned_model)
    at, weights = (
        torch.tensor(values, dtype=z.dtype, device=device) for values in (shares, weights_at)
    )
    means = [torch.zeros_like(z) for _ in directions]
    for function in decision_functions(experiment, layer, len(at)):
        clean = as_rows(z[function.rows].to(device))
        for direction, mean in zip(directions, means, strict=True):
            step = as_rows(direction[function.rows].to(device))
            points = clean + rearrange(at, "row -> 1 row 1 1 1") * step
            by_row = _row_gradients(function, points, clean, target)
            weighted = einsum(by_row, weights, "prompt row ... , row -> prompt ...")
            mean[function.rows] += weighted.to(mean)
    return means


def _row_gradients(
    function: DecisionFunction, points: Tensor, clean: Tensor, target: str
) -> Tensor:
    with torch.no_grad():
        scalar = target_of(function.logits(clean), target)
    points = points.detach().requires_grad_()
    # Every row's scalar depends on its own z alone, so one backward pass serves all rows.
    (gradients,) = torch.autograd.grad(scalar(function.logits(points)).sum(), points)
    return gradients


def target_of(clean: RowsOfLogits, target: str) -> Callable[[RowsOfLogits], Tensor]:
    """The scalar ``ℓ``, its tokens chosen by the clean logits."""
    best = clean.topk(2, dim=-1).indices

    def answer_logprob(logits: RowsOfLogits) -> Tensor:
        precise = logits if logits.dtype == torch.float64 else logits.float()
        return _pick(precise.log_softmax(-1), best[..., :1])

    def logit_difference(logits: RowsOfLogits) -> Tensor:
        return _pick(logits, best[..., :1]) - _pick(logits, best[..., 1:])

    return answer_logprob if target == "answer_logprob" else logit_difference


def _pick(values: Tensor, token: Tensor) -> Tensor:
    return values.take_along_dim(token.expand(*values.shape[:-1], 1), -1)[..., 0]


def _dot(first: Site, second: Site) -> PerHead:
    product = einsum(
        first.double(),
        second.double(),
        "prompt position head d_head, prompt position head d_head -> head prompt",
    )
    return product.numpy()


def experiment_of(measured: MeasuredSets, method: str) -> Experiment:
    """The experiment behind the measurements, which has the model; a sentence without one."""
    if not isinstance(measured.experiment, Experiment):
        raise UserError(
            f"ranking method {method!r} needs the models, not only measured numbers: give the "
            "experiment."
        )
    return measured.experiment


# The second-order form of KL


def rank_by_kl_curvature(measured: MeasuredSets) -> HeadRanking:
    """Rank heads by ``½ δᵀ F δ``, raw minus mapped: ``ΔKL`` to second order in alpha."""
    variances = np.diagonal(curvature(measured), axis1=-2, axis2=-1).swapaxes(1, 2).copy()
    raw, mapped = measured.alpha**2 / 2 * variances
    return per_prompt_ranking("kl_curvature", measured, raw - mapped)


def curvature(measured: MeasuredSets) -> Float64[ndarray, "source prompt head head"]:
    """``½ δᵀ F δ`` of every head set, raw and mapped, with F the Fisher information of the logits.

    The divergence has no first-order term at the clean point; this is its leading one, the same for
    both directions of the divergence. With ``u_h = J δ_h`` the first-order change of the logits
    when head h is patched at ``α = 1``, it is ``½ Var_p(Σ_h u_h)`` under the clean distribution p:
    this Gram matrix ``Cov_p(u_i, u_j)`` gives it for every head set at once, from one forward-mode
    derivative per head and source.

    Source:
        Amari, Information Geometry and Its Applications (2016), section 1.2: KL to second order.
    """
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
    return grams


@torch.no_grad()
def _grams(
    function: DecisionFunction, z: Site, deltas: Float[Tensor, "prompt source position head d_head"]
) -> Float[Tensor, "source prompt i j"]:
    """``Cov_p(u_i, u_j)`` of the logit changes of single heads, for each source."""
    n_sources, n_heads = deltas.shape[1], z.shape[2]
    only = torch.eye(n_heads, dtype=z.dtype, device=z.device)
    directions = einsum(
        deltas, only, "prompt source position head d, row head -> prompt source row position head d"
    ).flatten(1, 2)
    with forward_ad.dual_level():
        clean = as_rows(z).expand_as(directions).contiguous()
        moved = function.logits(forward_ad.make_dual(clean, directions))
        tangents = forward_ad.unpack_dual(moved).tangent.double()
    changes = rearrange(
        tangents, "prompt (source head) vocab -> prompt source head vocab", source=n_sources
    )
    p = function.logits(as_rows(z)).double().softmax(-1)[:, :, None]
    centred = changes - (p * changes).sum(-1, keepdim=True)
    return einsum(
        p[:, 0, 0],
        centred,
        centred,
        "prompt vocab, prompt source i vocab, prompt source j vocab -> source prompt i j",
    )
