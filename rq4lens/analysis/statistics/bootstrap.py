"""Uncertainty over prompts: the paired bootstrap by group, and the intervals it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray
from scipy.sparse import csr_array
from scipy.special import ndtr, ndtri

from rq4lens.errors import UserError

PerPrompt = Float64[ndarray, "quantity prompt"]
Draws = Float64[ndarray, "resample quantity"]
WithoutGroup = Float64[ndarray, "group quantity"]
Ends = Float64[ndarray, "tail quantity"]


def bca_levels(
    point: Float64[ndarray, "quantity"],
    draws: Draws,
    jackknife: WithoutGroup,
    tails: Float64[ndarray, "tail"],
) -> Ends:
    """Quantile levels of the bias-corrected and accelerated interval.

    Source:
        Efron, Better Bootstrap Confidence Intervals (JASA 1987), equations 2.3 and 6.6.
    """
    # Ties with the point count half, as in scipy: discrete scores would bias the correction.
    below = ((draws < point).mean(0) + (draws <= point).mean(0)) / 2
    bias = ndtri(below)
    deviations = jackknife.mean(0) - jackknife
    scale = (deviations**2).sum(0)
    cubes = (deviations**3).sum(0)
    acceleration = np.divide(cubes, 6 * scale**1.5, out=np.zeros_like(scale), where=scale > 0)
    shifted = bias + ndtri(tails)[:, None]
    with np.errstate(invalid="ignore"):
        levels = ndtr(bias + shifted / (1 - acceleration * shifted))
    # A point beyond every draw has no finite bias correction: read the draws at their end.
    return np.where(np.isfinite(bias), levels, below)


def quantiles(draws: Draws, levels: Ends) -> Ends:
    """Quantiles of each column at levels of its own, interpolated linearly."""
    ordered = np.sort(draws, axis=0)
    place = levels * (len(ordered) - 1)
    below: Int64[ndarray, "tail quantity"] = np.floor(place).astype(int)
    above = np.minimum(below + 1, len(ordered) - 1)
    low = np.take_along_axis(ordered, below, axis=0)
    high = np.take_along_axis(ordered, above, axis=0)
    return low + (place - below) * (high - low)


def is_constant(draws: Draws) -> Bool[ndarray, "quantity"]:
    """Whether a quantity is the same in every resample, up to rounding of the weighted sums."""
    rounding = 64 * np.finfo(float).eps * np.abs(draws).max(0)
    with np.errstate(invalid="ignore"):  # infinite in each of them
        return ~(draws.max(0) - draws.min(0) > rounding)


def number_text(value: float | None, form: str, absent: str = "undefined") -> str:
    """A number by a format specification and a unit, as in ``".1f%"`` or ``".3g nats"``.

    ``"auto"`` has five decimals, or two digits where these would show nothing.
    """
    if value is None:
        return absent
    if form == "auto":
        form = ".5f" if value == 0 or abs(value) >= 1e-4 else ".1e"
    spec, space, unit = form.partition(" ")
    percent = "%" if spec.endswith("%") else ""
    # z: what is rounded to 0 has no sign.
    return f"{value:z{spec.removesuffix('%')}}{percent}{space}{unit}"


IntervalMethod = Literal["bca", "percentile"]

LEVEL = 0.95
CHUNK = 500
"""Resamples drawn at once: what is drawn takes no more memory than what is kept."""

ONE_GROUP = "there is only one group of prompts, so nothing shows how much groups differ"
ZERO_DENOMINATOR = "its denominator is 0"
NO_SPREAD = "every resample gives the same value, so resampling shows no spread"
UNDEFINED_IN_RESAMPLES = "the quantity is undefined in some resamples (a denominator reaches 0)"


class Interval(NamedTuple):
    """A 95% confidence interval, from ``low`` to ``high``.

    ``in`` looks for one of the ends, as in any tuple; :meth:`contains` for what lies between.
    """

    low: float
    high: float

    def __format__(self, form: str) -> str:
        """``[low, high]`` by the form of :func:`number_text`, without its unit."""
        form = form.partition(" ")[0].removesuffix("%")
        return f"[{number_text(self.low, form)}, {number_text(self.high, form)}]"

    def contains(self, value: float) -> bool:
        """Whether the value lies in the interval, ends included."""
        return bool(self.low <= value <= self.high)


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; whatever is undefined is None and has a reason.

    Args:
        value: the number on all prompts.
        interval: its interval.
        reason: why ``value`` (or, where only that is missing, ``interval``) is None.
    """

    ENDS: ClassVar[str] = "_ci95"

    value: float | None
    interval: Interval | None = None
    reason: str | None = None

    def __format__(self, form: str) -> str:
        """Value and interval by the form of :func:`number_text`: ``12.3% [10.0, 15.0]``."""
        value = number_text(self.value, form)
        return value if self.interval is None else f"{value} {self.interval:{form}}"

    def __str__(self) -> str:
        return format(self, ".4g")

    def fields(self, name: str) -> dict[str, Any]:
        """The estimate as ``name``, ``name_ci95`` and, where one is null, ``name_reason``."""
        ends = None if self.interval is None else list(self.interval)
        fields = {name: self.value, name + self.ENDS: ends}
        return fields if self.reason is None else {**fields, f"{name}_reason": self.reason}

    @classmethod
    def from_fields(cls, name: str, fields: Mapping[str, Any]) -> Estimate:
        """The estimate that :meth:`fields` wrote."""
        value, ends = fields[name], fields[name + cls.ENDS]
        interval = None if ends is None else Interval(float(ends[0]), float(ends[1]))
        reason = fields.get(f"{name}_reason")
        return cls(None if value is None else float(value), interval, reason)

    def divided_by(self, unit: float) -> Estimate:
        """The same in another unit."""
        if self.value is None:
            return self
        ends = None if self.interval is None else Interval(*(end / unit for end in self.interval))
        return replace(self, value=self.value / unit, interval=ends)


class Spread(Estimate):
    """How a number varies over draws, such as random splits: no confidence interval.

    The value is the median over the draws, and the interval holds the middle 95% of them.
    """

    ENDS = "_range95"

    @classmethod
    def of(cls, draws: Float64[ndarray, "draw"]) -> Spread:
        """The spread of finite draws."""
        low, middle, high = np.quantile(draws, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2]).tolist()
        return cls(middle, Interval(low, high))


def undefined(reason: str) -> Estimate:
    """An estimate that does not exist, and why."""
    return Estimate(None, None, reason)


def exact(value: float) -> Estimate:
    """A number that holds by definition, such as a coverage of 100 for all heads."""
    return Estimate(value, Interval(value, value))


@dataclass(frozen=True)
class Bootstrap:
    """Paired resampling of prompts; those of a group are drawn together.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6, 8 and 14.
    """

    groups: tuple[str, ...]
    n_resamples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.groups:
            raise UserError("there is no prompt to resample: measure at least one.")
        if self.n_resamples < 1:
            raise UserError(f"n_resamples {self.n_resamples} is too few: ask for at least 1.")

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(set(self.groups))

    @cached_property
    def membership(self) -> csr_array:
        """``[group prompt]``: 1 where a prompt belongs to a group."""
        return group_membership(self.groups)

    @cached_property
    def counts(self) -> Float64[ndarray, "resample group"]:
        """How often each group is drawn in each resample."""
        rng = np.random.default_rng(self.seed)
        even = np.full(self.n_groups, 1 / self.n_groups)
        return rng.multinomial(self.n_groups, even, size=self.n_resamples).astype(float)

    @cached_property
    def weights(self) -> Float64[ndarray, "resample prompt"]:
        """Weight of each prompt in each resample; rows sum to 1."""
        weights = np.empty((self.n_resamples, len(self.groups)))
        for start in range(0, self.n_resamples, CHUNK):
            some = weights[start : start + CHUNK]
            some[:] = self.counts[start : start + CHUNK] @ self.membership
            some /= some.sum(-1, keepdims=True)
        return weights

    def without_each_group(self, values: PerPrompt) -> WithoutGroup:
        """Mean of each quantity with one group left out.

        With a single group there is nothing left to average, and there are no rows.
        """
        if self.n_groups == 1:
            return np.empty((0, len(values)))
        left = len(self.groups) - self.membership.sum(-1)
        return np.asarray((values.sum(-1) - self.membership @ values.T) / left[:, None])

    def means(self, values: PerPrompt) -> Draws:
        """Mean of each quantity in each resample."""
        return self.weights @ values.T

    def resampled(self, values: PerPrompt) -> Resampled:
        """Means of quantities on all prompts, in every resample and without each group."""
        return Resampled(values.mean(-1), self.means(values), self.without_each_group(values))

    def estimate(
        self,
        values: PerPrompt,
        statistic: Callable[[ndarray], ndarray] | None = None,
        *,
        method: IntervalMethod = "bca",
    ) -> list[Estimate]:
        """Estimates of means, or of functions of means, with their intervals."""
        resampled = self.resampled(values)
        if statistic is not None:
            resampled = resampled.apply(statistic)
        return resampled.estimates(method)

    def percent(self, whole: Float64[ndarray, "prompt"], parts: PerPrompt) -> list[Estimate]:
        """``100 part / whole`` of means."""
        both = np.concatenate([whole[None], parts])
        return self.estimate(both, lambda means: 100 * means[..., 1:] / means[..., :1])

    def shares(
        self,
        whole: Float64[ndarray, "#quantity prompt"],
        left: PerPrompt,
        *,
        method: Literal["studentised", "bca"] = "studentised",
    ) -> list[Estimate]:
        """``100 (1 - left / whole)`` of means: how much of a whole is gone, in percent.

        What is left lies on few prompts, and the share ends at 100: the interval is studentised on
        the logarithm of what is left. Where nothing is left in some resample it is BCa, too.

        Source:
            Hall, Theoretical Comparison of Bootstrap Confidence Intervals (Annals of Statistics
            1988); influences as in Efron and Tibshirani, chapters 12 and 21.
        """
        both = np.concatenate([np.broadcast_to(whole, left.shape), left])
        plain = self.estimate(both, _gone_pct)
        if method == "bca":
            return plain
        ends = zip(plain, *self._studentised(whole, left).tolist(), strict=True)
        return [
            replace(each, interval=Interval(low, high))
            if each.interval is not None and np.isfinite([low, high]).all()
            else each
            for each, low, high in ends
        ]

    def _studentised(self, whole: ndarray, left: ndarray) -> Float64[ndarray, "end quantity"]:
        """Ends of ``100 (1 - left / whole)``; not finite where resamples do not have them."""
        by_group = self.membership.T
        w, gone = whole @ by_group, (whole - left) @ by_group

        def log_left(counts: ndarray) -> tuple[ndarray, ndarray]:
            """Logarithm of the share that is left, and its standard error, of the same draws."""
            of_whole, share = counts @ w.T, counts @ gone.T / (counts @ w.T)
            influences = (
                share**2 * (counts @ (w * w).T)
                - 2 * share * (counts @ (w * gone).T)
                + counts @ (gone * gone).T
            )
            error = np.sqrt(np.maximum(influences, 0)) / (of_whole * (1 - share))
            return np.log1p(-share), error

        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            point, error = log_left(np.ones((1, self.n_groups)))
            drawn, errors = log_left(self.counts)
            t = np.quantile((drawn - point) / errors, [(1 + LEVEL) / 2, (1 - LEVEL) / 2], axis=0)
            ends: Float64[ndarray, "end quantity"] = -100 * np.expm1(point - error * t)
        return ends[::-1]


def _gone_pct(means: ndarray) -> ndarray:
    whole, left = np.split(means, 2, axis=-1)
    return 100 * (1 - left / whole)


@dataclass(frozen=True)
class Resampled:
    """Quantities on all prompts, in every resample, and with each group left out."""

    point: Float64[ndarray, "quantity"]
    draws: Draws
    jackknife: WithoutGroup

    def apply(self, statistic: Callable[[ndarray], ndarray]) -> Resampled:
        """The same resamples of a function of the quantities."""
        with np.errstate(divide="ignore", invalid="ignore"):
            point, draws, jackknife = (
                np.asarray(statistic(each), dtype=float)
                for each in (self.point[None], self.draws, self.jackknife)
            )
        return Resampled(point[0], draws, jackknife)

    def some(self, start: int, n: int) -> Resampled:
        """The same resamples of some of the quantities."""
        part = slice(start, start + n)
        return Resampled(self.point[part], self.draws[:, part], self.jackknife[:, part])

    def estimates(self, method: IntervalMethod = "bca") -> list[Estimate]:
        """Each quantity with its interval."""
        estimates = [
            Estimate(value, None, reason) if np.isfinite(value) else undefined(ZERO_DENOMINATOR)
            for value, reason in zip(self.point.tolist(), self._reasons(), strict=True)
        ]
        usable = [index for index, each in enumerate(estimates) if each.reason is None]
        if not usable:
            return estimates
        draws, tails = self.draws[:, usable], np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        levels = np.repeat(tails[:, None], len(usable), axis=1)
        if method == "bca":
            levels = bca_levels(self.point[usable], draws, self.jackknife[:, usable], tails)
        for index, ends in zip(usable, quantiles(draws, levels).T.tolist(), strict=True):
            estimates[index] = replace(estimates[index], interval=Interval(*ends))
        return estimates

    def _reasons(self) -> list[str | None]:
        """Why a quantity has no interval; None where it has one."""
        if len(self.jackknife) == 0:
            return [ONE_GROUP] * len(self.point)
        finite = np.isfinite(self.draws).all(0) & np.isfinite(self.jackknife).all(0)
        constant = is_constant(self.draws)
        return [
            UNDEFINED_IN_RESAMPLES if not ok else NO_SPREAD if same else None
            for ok, same in zip(finite, constant, strict=True)
        ]


def group_membership(groups: Sequence[str]) -> csr_array:
    """``[group prompt]``: 1 where a prompt belongs to a group, in order of appearance.

    It is sparse: a full one would grow with the square of the prompts.
    """
    index = {group: row for row, group in enumerate(dict.fromkeys(groups))}
    rows = [index[group] for group in groups]
    columns, shape = np.arange(len(groups)), (len(index), len(groups))
    return csr_array((np.ones(len(groups)), (rows, columns)), shape=shape)
