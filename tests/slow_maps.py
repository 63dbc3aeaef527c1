"""The slow reference of the maps: one block after the other, by scipy and scikit-learn.

A fitter takes source rows ``x`` and target rows ``y``, both ``[row d]`` in float64, and returns
weight, bias and strength of ``ẑ = x W + b``.
"""

import numpy as np
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

from rq4lens.patching.maps.kinds import LOW_RANK, RIDGE_STRENGTHS


def slow_fit(kind, x, y, groups):
    """Weight, bias, and the strength of a ridge (None for a kind that has none)."""
    weight, strength = FITTERS[kind](x, y, groups)
    shift = 0 if kind == "identity" else y.mean(0) - x.mean(0) @ weight
    return weight, np.zeros(x.shape[1]) + shift, strength


def eye(x, _y, _groups):
    return np.eye(x.shape[1]), None


def moments(x, y, _groups):
    return np.diag(y.std(0) / x.std(0)), None


def procrustes(x, y, _groups):
    return orthogonal_procrustes(*centred(x, y))[0], None


def procrustes_scaled(x, y, _groups):
    rotation, nuclear_norm = orthogonal_procrustes(*centred(x, y))
    return rotation * nuclear_norm / (centred(x, y)[0] ** 2).sum(), None


def ridge(x, y, groups):
    return ridge_weight(*centred(x, y), groups)


def low_rank(x, y, groups):
    x, y = centred(x, y)
    correction, strength = ridge_weight(x, y - x, groups)
    leading = np.linalg.svd(x @ correction, full_matrices=False)[2][:LOW_RANK]
    return np.eye(x.shape[1]) + correction @ leading.T @ leading, strength


def ridge_weight(x, y, groups):
    strengths = RIDGE_STRENGTHS * (x**2).mean()
    if len(np.unique(groups)) < len(groups):
        strengths = strengths[[group_errors(x, y, groups, strengths).argmin()]]
    model = RidgeCV(strengths, fit_intercept=False).fit(x, y)
    return model.coef_.T, model.alpha_


def group_errors(x, y, groups, strengths):
    """Squared error of each strength on held-out groups."""
    errors = np.zeros(len(strengths))
    for kept, held in GroupKFold(min(5, len(np.unique(groups)))).split(x, groups=groups):
        u, s, vt = np.linalg.svd(x[kept], full_matrices=False)
        for index, strength in enumerate(strengths):
            weight = vt.T @ np.diag(s / (s**2 + strength)) @ u.T @ y[kept]
            errors[index] += ((y[held] - x[held] @ weight) ** 2).sum()
    return errors


def centred(x, y):
    return x - x.mean(0), y - y.mean(0)


FITTERS = {
    "identity": eye,
    "mean_shift": eye,
    "moments": moments,
    "procrustes": procrustes,
    "procrustes_scaled": procrustes_scaled,
    "ridge": ridge,
    "low_rank": low_rank,
}
