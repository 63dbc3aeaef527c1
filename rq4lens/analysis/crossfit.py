"""Cross-fitting: heads are ranked on one half of the prompts and scored on the other half.

Ranking and scoring on the same prompts flatters the ranking: the best 8 of 32 heads that do nothing
already look good. Halves keep groups of prompts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from rq4lens.analysis.head_scores import order_of, single_scores
from rq4lens.analysis.measured import MeasuredSets, prefixes
from rq4lens.analysis.statistics import group_membership
from rq4lens.results import RankBy

TOO_FEW_GROUPS = "there are fewer than two groups of prompts, so they cannot be split"


def half_splits(groups: Sequence[str], n_splits: int, seed: int) -> Bool[ndarray, "split prompt"]:
    """Random halves of the prompts, whole groups at a time.

    Args:
        groups: the group of each prompt.
        n_splits: number of splits.
        seed: seed of the draws.

    Returns:
        For each split, True for the prompts of its first half. No row with fewer than two groups.
    """
    membership = group_membership(groups)
    n_groups = len(membership)
    if n_groups < 2:
        return np.empty((0, len(groups)), dtype=bool)
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(n_groups), (n_splits, 1)), axis=1)
    return (order < n_groups // 2) @ membership > 0


def half_means(
    values: Float64[ndarray, "quantity prompt"], first: Bool[ndarray, "split prompt"]
) -> Float64[ndarray, "split half quantity"]:
    """Means of quantities over the first and the second half of each split."""
    halves = np.stack([first, ~first], axis=1).astype(float)
    return (halves / halves.sum(-1, keepdims=True)) @ values.T


@dataclass(frozen=True)
class CrossFit:
    """Rankings made on halves, and where they are scored.

    Args:
        measured: the head sets measured so far; what is missing is measured.
        first: the prompts of each split's first half.
        orders: heads ranked on the first and on the second half of each split.
    """

    measured: MeasuredSets
    first: Bool[ndarray, "split prompt"]
    orders: Int64[ndarray, "split half head"]

    @classmethod
    def of(cls, measured: MeasuredSets, rank_by: RankBy, n_splits: int, seed: int) -> CrossFit:
        """Rank single heads on each half.

        Args:
            measured: the head sets measured so far.
            rank_by: the score that orders single heads.
            n_splits: number of random splits.
            seed: seed of the splits.
        """
        first = half_splits(measured.groups, n_splits, seed)
        raw, mapped = (half_means(kl, first) for kl in measured.kl_nats(measured.singles))
        return cls(measured, first, order_of(single_scores(raw, mapped, rank_by)))

    @property
    def undefined_because(self) -> str | None:
        """Why nothing can be cross-fitted; None when it can."""
        return None if len(self.first) else TOO_FEW_GROUPS

    @cached_property
    def split_delta_nats(self) -> Float64[ndarray, "split k prompt"]:
        """Out-of-half ``ΔKL`` for k = 0 to H in each split.

        Each prompt is scored with the top k heads of the half it does not belong to.
        """
        return np.stack([self._scored(split) for split in range(len(self.first))])

    @property
    def delta_nats(self) -> Float64[ndarray, "k prompt"]:
        """Out-of-half ``ΔKL`` for k = 0 to H, averaged over the splits."""
        return self.split_delta_nats.mean(0)

    def _scored(self, split: int) -> Float64[ndarray, "k prompt"]:
        of_first, of_second = (
            self.measured.delta_nats(prefixes(order)) for order in self.orders[split].tolist()
        )
        return np.where(self.first[split], of_second, of_first)
