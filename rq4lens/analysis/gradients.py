"""Gradient rankings: first-order answers to what exact patching measures.

The gradient of ``KL(patched || clean)`` at the clean point is exactly zero, so these methods follow
another scalar: the log-probability of the tuned model's own most likely next token, or its logit
minus that of the runner-up.

Source:
    Attribution patching: Nanda (2023), Kramár et al., AtP* (2024), section 2.3. Integrated
    gradients: Sundararajan et al., Axiomatic Attribution for Deep Networks (2017), equation 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from rq4lens.analysis.decision import DecisionFunction, RowsOfLogits, as_rows, decision_functions
from rq4lens.analysis.measured import MeasuredSets
from rq4lens.analysis.single_effects import per_prompt_ranking
from rq4lens.errors import UserError
from rq4lens.patching.activations import device_of
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.patch import MAPPED, RAW, SELF
from rq4lens.results import HeadRanking

TARGETS = ("answer_logprob", "logit_difference")
"""The scalars that a gradient can follow."""

PerHead = Float64[ndarray, "head prompt"]
Site = Float[Tensor, "prompt position head d_head"]


def rank_by_grad_act(measured: MeasuredSets, *, target: str = "answer_logprob") -> HeadRanking:
    """Rank heads by ``|z · ∇ℓ|``: how much the answer leans on the head as it is.

    It looks at the tuned model alone, so it cannot know what the fine-tune changed.

    Args:
        measured: says which layer to rank; its experiment has the model.
        target: the scalar ``ℓ``.
    """
    experiment = experiment_of(measured, "grad_act")
    z = experiment.sources[measured.layer, SELF]
    gradient = path_gradients(experiment, measured.layer, [torch.zeros_like(z)], CLEAN, target)
    scores = np.abs(_dot(z, gradient[0]))
    return per_prompt_ranking("grad_act", measured, scores, {"target": target})


def rank_by_attribution(
    measured: MeasuredSets, *, target: str = "answer_logprob", steps: int = 0
) -> HeadRanking:
    """Rank heads by ``α (ẑ - z) · ∇ℓ``, mapped minus raw: a first-order estimate of the repair.

    Args:
        measured: says which layer and alpha to rank; its experiment has the model.
        target: the scalar ``ℓ``.
        steps: 0 takes the gradient at the clean point; more average it along the straight path to
            the fully patched point (integrated gradients).
    """
    name = "attribution" if steps == 0 else "integrated_gradients"
    raw, mapped = attributions(measured, (RAW, MAPPED), target, steps)
    return per_prompt_ranking(name, measured, mapped - raw, {"target": target, "steps": steps})


def rank_by_integrated_gradients(
    measured: MeasuredSets, *, target: str = "answer_logprob", steps: int = 8
) -> HeadRanking:
    """Rank heads by attribution along the path; see :func:`rank_by_attribution`."""
    return rank_by_attribution(measured, target=target, steps=steps)


def attributions(
    measured: MeasuredSets, sources: Sequence[str], target: str, steps: int
) -> list[PerHead]:
    """What each head contributes to the change of ``ℓ`` when all heads are patched.

    With enough steps the contributions add up to that change (completeness).

    Args:
        measured: says which layer and alpha; its experiment has the model.
        sources: what is blended in, for instance ``"raw"``; each by itself.
        target: the scalar ``ℓ``.
        steps: points on the path at which the gradient is taken; 0 is the clean point alone.

    Returns:
        For each source the contribution of each head on each prompt, in nats or logits.
    """
    experiment = experiment_of(measured, "attribution")
    tensors, layer = experiment.sources, measured.layer
    z = tensors[layer, SELF]
    directions = [measured.alpha * (tensors[layer, source].to(z) - z) for source in sources]
    path = CLEAN if steps == 0 else Path.of(steps)
    gradients = path_gradients(experiment, layer, directions, path, target)
    return [_dot(step, mean) for step, mean in zip(directions, gradients, strict=True)]


@dataclass(frozen=True)
class Path:
    """Points on a straight path at which a gradient is taken, and how they are averaged.

    Args:
        at: the points, as shares of the whole way.
        weights: weight of each; they sum to 1.
    """

    at: tuple[float, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, steps: int) -> Path:
        """Gauss-Legendre points: a few of them integrate a smooth path to rounding error."""
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return cls(tuple((nodes + 1) / 2), tuple(weights / 2))


CLEAN = Path((0.0,), (1.0,))
"""The clean point alone."""


def path_gradients(
    experiment: Experiment, layer: int, directions: Sequence[Site], path: Path, target: str
) -> list[Site]:
    """Mean of ``∇ℓ`` along straight paths from the clean activations.

    Args:
        experiment: the pair and its prompts.
        layer: the layer whose ``z`` is varied.
        directions: where each path leads, for the whole way.
        path: the points on it.
        target: the scalar ``ℓ``.

    Returns:
        The mean gradient along each path, in the order of the prompts.
    """
    z = experiment.sources[layer, SELF]
    device = device_of(experiment.tuned_model)
    at, weights = (
        torch.tensor(values, dtype=z.dtype, device=device) for values in (path.at, path.weights)
    )
    means = [torch.empty_like(z) for _ in directions]
    for function in decision_functions(experiment, layer, len(path.at)):
        clean = as_rows(z[function.rows].to(device))
        for direction, mean in zip(directions, means, strict=True):
            step = as_rows(direction[function.rows].to(device))
            points = clean + rearrange(at, "row -> 1 row 1 1 1") * step
            by_row = _row_gradients(function, points, clean, target)
            weighted = einsum(by_row, weights, "prompt row ... , row -> prompt ...")
            mean[function.rows] = weighted.to(mean)
    return means


def _row_gradients(
    function: DecisionFunction, points: Tensor, clean: Tensor, target: str
) -> Tensor:
    with torch.no_grad():
        scalar = target_of(function(clean), target)
    points = points.detach().requires_grad_()
    # Every row's scalar depends on its own z alone, so one backward pass serves all rows.
    (gradients,) = torch.autograd.grad(scalar(function(points)).sum(), points)
    return gradients


def target_of(clean: RowsOfLogits, target: str) -> Callable[[RowsOfLogits], Tensor]:
    """The scalar ``ℓ``, its tokens chosen by the clean logits.

    Args:
        clean: clean logits of each prompt, as its single row.
        target: which scalar.

    Returns:
        A function from logits to ``ℓ`` of every row.

    Raises:
        UserError: if the target does not exist.
    """
    if target not in TARGETS:
        raise UserError(
            f"target {target!r} does not exist: choose {' or '.join(map(repr, TARGETS))}."
        )
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
    """The experiment behind the measurements, which has the model.

    Raises:
        UserError: if there is none.
    """
    if not isinstance(measured.experiment, Experiment):
        raise UserError(
            f"ranking method {method!r} needs the models, not only measured numbers: give the "
            "experiment."
        )
    return measured.experiment
