"""How unevenly a non-negative score lies on heads.

Source:
    Gini: Dorfman, A Formula for the Gini Coefficient (1979), in its sorted form. Effective number:
    Hill, Diversity and Evenness (1973), of order 1.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from scipy.special import entr

from rq4lens.analysis.records import Concentration
from rq4lens.analysis.statistics.bootstrap import Bootstrap, undefined

NO_SCORE = "all scores are 0"
CHURN_QUANTILE = 0.8

Scores = Float64[ndarray, "*rows head"]
PerRow = Float64[ndarray, "*rows"]


def concentration(
    scores: str, per_prompt: Float64[ndarray, "head prompt"], bootstrap: Bootstrap
) -> Concentration:
    """Concentration of the magnitudes of mean scores."""
    if not per_prompt.mean(-1).any():
        return Concentration(scores, *[undefined(NO_SCORE)] * 4)
    measures = (gini, entropy, effective_heads, churn)

    def all_measures(means: Scores) -> ndarray:
        return np.stack([measure(np.abs(means)) for measure in measures], axis=-1)

    return Concentration(scores, *bootstrap.estimate(per_prompt, all_measures, method="percentile"))


def gini(scores: Scores) -> PerRow:
    """Gini coefficient in [0, 1 - 1/H]; NaN when all scores are 0."""
    n_heads = scores.shape[-1]
    weights = 2 * np.arange(1, n_heads + 1) - n_heads - 1
    return np.sort(scores, axis=-1) @ weights / (n_heads * scores.sum(-1))


def entropy(scores: Scores) -> PerRow:
    """Shannon entropy of the shares over its maximum ``ln H``, in [0, 1]; 0 for a single head."""
    nats = _entropy_nats(scores)
    n_heads = scores.shape[-1]
    return nats / np.log(n_heads) if n_heads > 1 else nats


def effective_heads(scores: Scores) -> PerRow:
    """``exp`` of the entropy of the shares: how many equal heads would be as spread out."""
    return np.exp(_entropy_nats(scores))


def _entropy_nats(scores: Scores) -> PerRow:
    return entr(scores / scores.sum(-1, keepdims=True)).sum(-1)


def churn(scores: Scores, threshold: float | None = None) -> PerRow:
    """Share of heads above the 80th percentile of the scores."""
    if threshold is None:
        return (scores > np.quantile(scores, CHURN_QUANTILE, axis=-1, keepdims=True)).mean(-1)
    return (scores > threshold).mean(-1)
