"""How each kind of map is fitted: one function per kind, all of one form.

A fitter takes source rows ``x`` and target rows ``y``, both ``[row d]`` in float64, and returns
``ẑ = x W + b`` as a :class:`Fit`. Rows of ``x`` and ``y`` with the same index belong together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped
from numpy import ndarray
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

from rq4lens.config import MapKind

RIDGE_STRENGTHS = np.logspace(-6, 6, 25)
LOW_RANK = 4


@dataclass(frozen=True)
class Fit:
    """A fitted affine map of one block; ``details`` is what the fit chose by itself."""

    weight: Float64[ndarray, "d d"]
    bias: Float64[ndarray, "d"]
    details: dict[str, Any] = field(default_factory=dict)


Rows = Float64[ndarray, "row d"]
Groups = Shaped[ndarray, "row"]


def fit_block(kind: MapKind, x: Rows, y: Rows, groups: Groups) -> Fit:
    """Fit one block."""
    return FITTERS[kind](x, y, groups)


def _identity(x: Rows, _y: Rows, _groups: Groups) -> Fit:
    width = x.shape[1]
    return Fit(np.eye(width), np.zeros(width))


def _mean_shift(x: Rows, y: Rows, _groups: Groups) -> Fit:
    return _through_means(np.eye(x.shape[1]), x, y)


def _moments(x: Rows, y: Rows, _groups: Groups) -> Fit:
    """Match mean and standard deviation of each coordinate."""
    spread_x, spread_y = x.std(axis=0), y.std(axis=0)
    # A coordinate that never varies in the source carries nothing: it maps to the target mean.
    ratio = np.divide(spread_y, spread_x, out=np.zeros_like(spread_x), where=spread_x > 0)
    return _through_means(np.diag(ratio), x, y)


def _procrustes(x: Rows, y: Rows, _groups: Groups) -> Fit:
    """Closest rotation or reflection between the centred activations.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem",
    Psychometrika 31 (1966).
    """
    rotation, _ = orthogonal_procrustes(*_centred(x, y))
    return _through_means(rotation, x, y)


def _procrustes_scaled(x: Rows, y: Rows, _groups: Groups) -> Fit:
    """Closest rotation times one scale between the centred activations.

    Source: Schönemann and Carroll, "Fitting one matrix to another under choice of a central
    dilation and a rigid motion", Psychometrika 35 (1970): the scale is the nuclear norm of
    ``x^T y`` over the squared norm of ``x``.
    """
    x_centred, y_centred = _centred(x, y)
    rotation, nuclear_norm = orthogonal_procrustes(x_centred, y_centred)
    energy = float((x_centred**2).sum())
    # A source that never varies carries nothing: everything maps to the target mean.
    scale = nuclear_norm / energy if energy > 0 else 0.0
    return _through_means(scale * rotation, x, y, scale=float(scale))


def _ridge(x: Rows, y: Rows, groups: Groups) -> Fit:
    """Least squares with a penalty on ``W``, its strength chosen by cross-validation."""
    weight, strength = _ridge_weight(*_centred(x, y), groups)
    return _through_means(weight, x, y, strength=strength)


def _low_rank(x: Rows, y: Rows, groups: Groups) -> Fit:
    """Identity plus a correction of rank at most ``LOW_RANK``, as a low-rank fine-tune makes.

    Source: reduced-rank regression, Izenman, Journal of Multivariate Analysis 5 (1975): the ridge
    solution for ``y - x`` is projected onto the leading directions of what it predicts.
    """
    x_centred, y_centred = _centred(x, y)
    correction, strength = _ridge_weight(x_centred, y_centred - x_centred, groups)
    _, spread, directions = np.linalg.svd(x_centred @ correction, full_matrices=False)
    leading = directions[:LOW_RANK]
    return _through_means(
        np.eye(x.shape[1]) + correction @ leading.T @ leading,
        x,
        y,
        strength=strength,
        rank=len(leading),
        spread=spread[:LOW_RANK].tolist(),
        first_direction=leading[0].tolist(),
    )


def _ridge_weight(
    x_centred: Rows, y_centred: Rows, groups: Groups
) -> tuple[Float64[ndarray, "d d"], float | None]:
    n_groups = len(np.unique(groups))
    if n_groups < 2 or not x_centred.any():
        return np.zeros((x_centred.shape[1], y_centred.shape[1])), None
    strengths = RIDGE_STRENGTHS * float((x_centred**2).mean())
    if n_groups < len(groups):
        strengths = strengths[[_group_errors(x_centred, y_centred, groups, strengths).argmin()]]
    # With one strength this is the fit; with several, leave-one-out has a closed form.
    model = RidgeCV(strengths, fit_intercept=False).fit(x_centred, y_centred)
    return model.coef_.T, float(model.alpha_)


def _group_errors(
    x: Rows, y: Rows, groups: Groups, strengths: Float64[ndarray, "strength"]
) -> Float64[ndarray, "strength"]:
    """Squared error of each strength on held-out groups, in up to five folds.

    One singular value decomposition of a fold's rows serves every strength: ``W`` is
    ``V diag(s / (s² + strength)) Uᵀ y``.
    """
    errors = np.zeros(len(strengths))
    folds = GroupKFold(min(5, len(np.unique(groups))))
    for kept, held in folds.split(x, groups=groups):
        u, s, vt = np.linalg.svd(x[kept], full_matrices=False)
        target, source = u.T @ y[kept], x[held] @ vt.T
        for index, strength in enumerate(strengths):
            shrunk = target * (s / (s**2 + strength))[:, None]
            errors[index] += ((y[held] - source @ shrunk) ** 2).sum()
    return errors


def _centred(x: Rows, y: Rows) -> tuple[Rows, Rows]:
    return x - x.mean(axis=0), y - y.mean(axis=0)


def _through_means(weight: Float64[ndarray, "d d"], x: Rows, y: Rows, **details: Any) -> Fit:
    return Fit(weight, y.mean(axis=0) - x.mean(axis=0) @ weight, details)


FITTERS: dict[MapKind, Callable[[Rows, Rows, Groups], Fit]] = {
    "identity": _identity,
    "mean_shift": _mean_shift,
    "moments": _moments,
    "procrustes": _procrustes,
    "procrustes_scaled": _procrustes_scaled,
    "ridge": _ridge,
    "low_rank": _low_rank,
}
