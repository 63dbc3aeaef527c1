"""How well a map predicts held-out activations, beside simpler predictors."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.patching.maps.map import FitQuality, HeadDiagnostics

Rows = Float64[ndarray, "row d_head"]
HeadRows = Float64[ndarray, "row head d_head"]


def diagnose(
    target: HeadRows,
    *,
    fitted: HeadRows,
    mean: Float64[ndarray, "head d_head"],
    identity: HeadRows,
    shuffled: HeadRows,
) -> tuple[HeadDiagnostics, ...]:
    """Compare predictors of the tuned activations on held-out prompts, head by head."""
    constant = np.broadcast_to(mean, target.shape)
    predictors = (fitted, constant, identity, shuffled)
    return tuple(
        HeadDiagnostics(head, *(fit_quality(each[:, head], target[:, head]) for each in predictors))
        for head in range(target.shape[1])
    )


def fit_quality(predicted: Rows, target: Rows) -> FitQuality:
    """R², mean cosine and linear CKA of predictions; None where a quantity is undefined."""
    return FitQuality(r2(predicted, target), mean_cosine(predicted, target), cka(predicted, target))


def r2(predicted: Rows, target: Rows) -> float | None:
    """``1 - |target - predicted|² / |target - mean(target)|²``, at most 1."""
    spread = ((target - target.mean(axis=0)) ** 2).sum()
    return float(1 - ((target - predicted) ** 2).sum() / spread) if spread > 0 else None


def mean_cosine(predicted: Rows, target: Rows) -> float | None:
    """Mean over rows of the cosine between prediction and target."""
    norms = np.linalg.norm(predicted, axis=1) * np.linalg.norm(target, axis=1)
    return float(((predicted * target).sum(axis=1) / norms).mean()) if norms.all() else None


def cka(predicted: Rows, target: Rows) -> float | None:
    """Linear centred kernel alignment, in [0, 1].

    Source: Kornblith et al., "Similarity of neural network representations revisited" (2019),
    the linear case of equation 4.
    """
    x, y = predicted - predicted.mean(axis=0), target - target.mean(axis=0)
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    # A constant predictor has no spread up to rounding; its alignment is not defined.
    if np.allclose(x, 0) or np.allclose(y, 0):
        return None
    return float(np.linalg.norm(x.T @ y) ** 2 / scale)
