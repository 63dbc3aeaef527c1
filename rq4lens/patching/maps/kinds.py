"""How each kind of map is fitted: one function per kind, for all blocks at once, in float64.

A fitter takes samples of rows and returns ``ẑ = x W + b`` of each as a :class:`Fit`. A block is
whatever has a map of its own: a head, a layer's heads jointly, or any other pair of a source and a
target. All decompositions are batched and run where the rows lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Shaped
from numpy import ndarray
from torch import Tensor

from rq4lens.config import MapKind

RIDGE_STRENGTHS = np.logspace(-6, 6, 25)
LOW_RANK = 4

Groups = Shaped[ndarray, "row"]
Indices = Int[ndarray, "_"]
BlockRows = Float64[Tensor, "block row d"]
Matrices = Float64[Tensor, "block d d"]


@dataclass(frozen=True)
class Fit:
    """Fitted affine maps; ``details`` is what each fit chose by itself, by name, block by block."""

    weight: Float64[Tensor, "*block d d"]
    bias: Float64[Tensor, "*block d"]
    details: dict[str, Any] = field(default_factory=dict)

    def __call__(self, x: Float[Tensor, "row block d"]) -> Float64[Tensor, "row block d"]:
        """Map rows of every block."""
        return torch.einsum("rbi,bij->rbj", x.to(self.weight), self.weight) + self.bias


class FitRows:
    """Rows of several blocks; ``x`` and ``y`` with the same index belong together.

    Args:
        x: source rows.
        y: target rows.
        groups: the group of each row.
        whole: the rows that these are a part of, and which of them are left out.
    """

    def __init__(
        self,
        x: BlockRows,
        y: BlockRows,
        groups: Groups,
        whole: tuple[FitRows, Indices] | None = None,
    ) -> None:
        self.x, self.y, self.groups, self._whole = x, y, groups, whole
        self.mean_x, self.centred_x = _centred(x)
        self.mean_y, self.centred_y = _centred(y)

    def part(self, kept: Indices) -> FitRows:
        """Some of the rows; products of a part that lacks few are those of the whole, downdated."""
        left = np.setdiff1d(np.arange(len(self.groups)), kept)
        whole = (self, left) if len(left) < len(kept) else None
        return FitRows(self.x[:, kept], self.y[:, kept], self.groups[kept], whole)

    @cached_property
    def xx(self) -> Matrices:
        """``xᵀ x`` of centred rows."""
        return self._product("x", "x")

    @cached_property
    def xy(self) -> Matrices:
        """``xᵀ y`` of centred rows."""
        return self._product("x", "y")

    def _product(self, one: str, other: str) -> Matrices:
        a, b = getattr(self, f"centred_{one}"), getattr(self, f"centred_{other}")
        if self._whole is None:
            return a.mT @ b
        whole, left = self._whole
        c, d = (getattr(whole, f"centred_{name}")[:, left] for name in (one, other))
        # All centred rows sum to 0, so what is left out sums to minus the sum of what stays.
        apart = c.sum(1)[:, :, None] * d.sum(1)[:, None] / a.shape[1]
        varies = a.any(1)[:, :, None] & b.any(1)[:, None]
        return torch.where(varies, getattr(whole, one + other) - c.mT @ d - apart, 0.0)


def _centred(z: BlockRows) -> tuple[Float64[Tensor, "block d"], BlockRows]:
    """Means, and rows around them; what never varies is 0 exactly."""
    shifted = z - z[:, :1]
    mean = shifted.mean(1)
    return z[:, 0] + mean, shifted - mean[:, None]


def fit_all(kind: MapKind, samples: Sequence[FitRows]) -> list[Fit]:
    """Fit every block of every sample."""
    if kind in ("procrustes", "procrustes_scaled"):  # all rotations are found together
        found = polar_factor(torch.cat([rows.xy for rows in samples]))
        rotations = found.split([len(rows.x) for rows in samples])
        fit_rotated = _rotated if kind == "procrustes" else _rotated_and_scaled
        return [fit_rotated(*each) for each in zip(samples, rotations, strict=True)]
    return [FITTERS[kind](rows) for rows in samples]


def fit_block(
    kind: MapKind, x: Float64[ndarray, "row d"], y: Float64[ndarray, "row d"], groups: Groups
) -> Fit:
    """Fit one block."""
    (fit,) = fit_all(kind, [FitRows(torch.from_numpy(x)[None], torch.from_numpy(y)[None], groups)])
    return Fit(fit.weight[0], fit.bias[0], {name: each[0] for name, each in fit.details.items()})


def _identity(rows: FitRows) -> Fit:
    return Fit(_eye(rows), torch.zeros_like(rows.mean_x))


def _mean_shift(rows: FitRows) -> Fit:
    return _through_means(_eye(rows), rows)


def _moments(rows: FitRows) -> Fit:
    """Match mean and standard deviation of each coordinate."""
    spread_x, spread_y = (z.square().mean(1).sqrt() for z in (rows.centred_x, rows.centred_y))
    # A coordinate that never varies in the source carries nothing: it maps to the target mean.
    ratio = torch.where(spread_x > 0, spread_y / spread_x, 0.0)
    return _through_means(torch.diag_embed(ratio), rows)


def _rotated(rows: FitRows, rotation: Matrices) -> Fit:
    """Closest rotation or reflection between the centred activations.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem",
    Psychometrika 31 (1966): the polar factor of ``xᵀ y``.
    """
    return _through_means(rotation, rows)


def _rotated_and_scaled(rows: FitRows, rotation: Matrices) -> Fit:
    """Closest rotation times one scale between the centred activations.

    Source: Schönemann and Carroll, "Fitting one matrix to another under choice of a central
    dilation and a rigid motion", Psychometrika 35 (1970): the scale is the nuclear norm of
    ``xᵀ y`` over the squared norm of ``x``.
    """
    nuclear_norm, energy = (rotation * rows.xy).sum((1, 2)), rows.centred_x.square().sum((1, 2))
    # A source that never varies carries nothing: everything maps to the target mean.
    scale = torch.where(energy > 0, nuclear_norm / energy, 0.0)
    return _through_means(scale[:, None, None] * rotation, rows, scale=scale.tolist())


def polar_factor(matrices: Matrices) -> Matrices:
    """The orthogonal matrix closest to each matrix: ``U Vᵀ`` of its singular vectors.

    On a GPU, where singular values are slow, by Newton's iteration; a matrix that it fails at, such
    as a singular one, takes the decomposition.
    """
    if matrices.device.type == "cpu":
        return _polar_by_svd(matrices)
    found = polar_by_newton(matrices)
    symmetric, norm = found.mT @ matrices, torch.linalg.matrix_norm(matrices)
    eye = torch.eye(matrices.shape[-1]).to(matrices)
    errors = torch.stack(
        [
            torch.linalg.matrix_norm(symmetric - symmetric.mT) / norm,
            torch.linalg.matrix_norm(found.mT @ found - eye),
        ]
    )
    failed = ~(errors.amax(0) < 1e-9)  # also where a number is not finite
    if failed.any():
        found[failed] = _polar_by_svd(matrices[failed])
    return found


def _polar_by_svd(matrices: Matrices) -> Matrices:
    u, _, vt = torch.linalg.svd(matrices)
    return u @ vt


def polar_by_newton(matrices: Matrices, most: int = 30) -> Matrices:
    """Newton's iteration for the polar factor, scaled to converge in about ten steps.

    Source: Higham, "Computing the polar decomposition, with applications", SIAM Journal on
    Scientific and Statistical Computing 7 (1986), with the scale of Dubrulle, "An optimum iteration
    for the matrix polar decomposition", ETNA 8 (1999).
    """
    found = matrices / torch.linalg.matrix_norm(matrices, keepdim=True)
    for _ in range(most):
        inverse = torch.linalg.inv_ex(found)[0].mT
        norms = (torch.linalg.matrix_norm(z, keepdim=True) for z in (inverse, found))
        scale = torch.div(*norms).sqrt()
        before, found = found, (scale * found + inverse / scale) / 2
        if not torch.linalg.matrix_norm(found - before).nan_to_num().max() > 1e-9:
            break  # convergence is quadratic: the next step would change nothing
    return found


def _ridge(rows: FitRows) -> Fit:
    """Least squares with a penalty on ``W``, its strength chosen by cross-validation."""
    weight, strength = _ridge_weight(rows, rows.centred_y)
    return _through_means(weight, rows, strength=strength)


def _low_rank(rows: FitRows) -> Fit:
    """Identity plus a correction of rank at most ``LOW_RANK``, as a low-rank fine-tune makes.

    Source: reduced-rank regression, Izenman, Journal of Multivariate Analysis 5 (1975): the ridge
    solution for ``y - x`` is projected onto the leading directions of what it predicts.
    """
    correction, strength = _ridge_weight(rows, rows.centred_y - rows.centred_x)
    _, spread, directions = torch.linalg.svd(rows.centred_x @ correction, full_matrices=False)
    leading = directions[:, :LOW_RANK]
    return _through_means(
        _eye(rows) + correction @ leading.mT @ leading,
        rows,
        strength=strength,
        rank=[leading.shape[1]] * len(leading),
        spread=spread[:, :LOW_RANK].tolist(),
        first_direction=leading[:, 0].tolist(),
    )


def _ridge_weight(rows: FitRows, y: BlockRows) -> tuple[Matrices, list[float | None]]:
    x, n_groups = rows.centred_x, len(np.unique(rows.groups))
    varies = x.any(2).any(1)
    if n_groups < 2 or not varies.any():
        return torch.zeros_like(_eye(rows)), [None] * len(x)
    strengths = torch.from_numpy(RIDGE_STRENGTHS).to(x) * x.square().mean((1, 2))[:, None]
    spectrum = _spectrum(rows, x)
    # With a group a row, leaving each out has a closed form.
    grouped = n_groups < len(rows.groups)
    errors = (
        _group_errors(rows, y, strengths)
        if grouped
        else _leave_one_out_errors(x, y, spectrum, strengths)
    )
    strength = strengths.gather(1, errors.argmin(1, keepdim=True))[:, 0]
    weight = spectrum.weight(spectrum.outward.mT @ y, strength)
    # A source that never varies carries nothing.
    weight = torch.where(varies[:, None, None], weight, 0.0)
    chosen = zip(strength.tolist(), varies.tolist(), strict=True)
    return weight, [value if counts else None for value, counts in chosen]


class _Spectrum(NamedTuple):
    """Rows ``x`` decomposed so that the ridge weight is ``inward (values + λ)⁻¹ outwardᵀ y``.

    Its smaller side is decomposed: of ``xᵀ x = V Λ Vᵀ`` these are ``V`` and ``x V``, of
    ``x xᵀ = U Λ Uᵀ`` they are ``xᵀ U`` and ``U``.
    """

    values: Float64[Tensor, "block k"]
    inward: Float64[Tensor, "block d k"]
    outward: Float64[Tensor, "block row k"]

    def weight(
        self, target: Float64[Tensor, "block k d"], strength: Float64[Tensor, "block"]
    ) -> Matrices:
        return self.inward @ (target / (self.values + strength[:, None])[:, :, None])


def _spectrum(
    rows: FitRows, x: BlockRows, left: Float64[Tensor, "block left d"] | None = None
) -> _Spectrum:
    """Of some centred rows ``x``; ``left`` are the others, if any are."""
    if x.shape[1] > x.shape[2]:
        products = rows.xx if left is None else rows.xx - left.mT @ left
        values, vectors = torch.linalg.eigh(products)
        return _Spectrum(values.clamp(min=0), vectors, x @ vectors)
    values, vectors = torch.linalg.eigh(x @ x.mT)
    return _Spectrum(values.clamp(min=0), x.mT @ vectors, vectors)


Strengths = Float64[Tensor, "block strength"]


def _leave_one_out_errors(
    x: BlockRows, y: BlockRows, spectrum: _Spectrum, strengths: Strengths
) -> Strengths:
    """Squared error of each strength on rows left out one by one: ``(e / (1 - h))²``."""
    scores, target = x @ spectrum.inward, spectrum.outward.mT @ y
    errors = []
    for strength in strengths.T:
        shrunk = scores / (spectrum.values + strength[:, None])[:, None]
        leverage = (shrunk * spectrum.outward).sum(2, keepdim=True)
        errors.append(((y - shrunk @ target) / (1 - leverage)).square().sum((1, 2)))
    return torch.stack(errors, dim=1)


def _group_errors(rows: FitRows, y: BlockRows, strengths: Strengths) -> Strengths:
    """Squared error of each strength on held-out groups, in up to five folds."""
    x, errors = rows.centred_x, torch.zeros_like(strengths)
    for kept, held in group_folds(rows.groups):
        tested = x[:, held]
        spectrum = _spectrum(rows, x[:, kept], tested)
        scores, target = tested @ spectrum.inward, spectrum.outward.mT @ y[:, kept]
        for index, strength in enumerate(strengths.T):
            shrunk = scores / (spectrum.values + strength[:, None])[:, None]
            errors[:, index] += (y[:, held] - shrunk @ target).square().sum((1, 2))
    return errors


def group_folds(groups: Groups, most: int = 5) -> list[tuple[Indices, Indices]]:
    """Folds of about equal size that keep groups whole, as ``GroupKFold`` of scikit-learn has them.

    From the largest group down, each joins the lightest fold.
    """
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    weights = np.zeros(min(most, len(sizes)))
    fold_of = np.zeros(len(sizes), dtype=int)
    for group in np.argsort(sizes, kind="stable")[::-1]:
        fold_of[group] = np.argmin(weights)
        weights[fold_of[group]] += sizes[group]
    held = [fold_of[group_of] == fold for fold in range(len(weights))]
    return [(np.flatnonzero(~each), np.flatnonzero(each)) for each in held]


def _eye(rows: FitRows) -> Matrices:
    width = rows.x.shape[2]
    return torch.eye(width).to(rows.x).expand(len(rows.x), width, width)


def _through_means(weight: Matrices, rows: FitRows, **details: list[Any]) -> Fit:
    bias = rows.mean_y - (rows.mean_x[:, None] @ weight)[:, 0]
    return Fit(weight, bias, details)


FITTERS: dict[MapKind, Callable[[FitRows], Fit]] = {
    "identity": _identity,
    "mean_shift": _mean_shift,
    "moments": _moments,
    "ridge": _ridge,
    "low_rank": _low_rank,
}
"""Those of one sample; the rotations of several samples are found together, see :func:`fit_all`."""
