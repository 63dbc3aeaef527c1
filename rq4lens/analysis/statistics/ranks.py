"""Ranks of numbers that may tie."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray


def mean_ranks(values: Float64[ndarray, "*rows each"]) -> Float64[ndarray, "*rows each"]:
    """Ranks from 1 for the smallest of each row; ties share their mean rank."""
    n_values, order = values.shape[-1], np.argsort(values, axis=-1)
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, np.arange(1.0, n_values + 1), axis=-1)
    ordered = np.take_along_axis(values, order, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        from scipy.stats import rankdata  # noqa: PLC0415 - more than a second, and ties are rare

        return np.asarray(rankdata(values, axis=-1))
    return ranks
