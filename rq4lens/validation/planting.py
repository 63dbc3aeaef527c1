"""Planted pairs: a tuned copy of any model whose changed heads are known.

A method that localises changes is tested by what it was told nowhere: which heads were changed.
Rotating or scaling a head's value space changes its activations and nothing else; turning (a
rotation that is not undone), shifting, rewiring and replacing change what the head does; drift
changes everything a little and is what a fine-tune does besides.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import ortho_group
from torch import Tensor

from rq4lens.errors import UserError
from rq4lens.heads import Head, HeadSet
from rq4lens.models.load.lens import HookedTransformer
from rq4lens.models.load.loading import LoadedModel
from rq4lens.validation.attended import AttendedInputs

ChangeKind = Literal["rotated", "scaled", "turned", "shifted", "rewired", "replaced"]
WeightName = Literal["W_Q", "W_K", "W_V", "W_O"]
CHANGE_KINDS: tuple[ChangeKind, ...] = get_args(ChangeKind)
WEIGHTS: tuple[WeightName, ...] = get_args(WeightName)
SHARED_WEIGHTS = ("W_K", "W_V")
"""Weights that the query heads of a group share in a model with grouped-query attention."""


@dataclass(frozen=True)
class PlantedChange:
    """One change, and every head whose activations it changes.

    Attributes:
        kind: what was done.
        heads: the changed heads: one, or all that share the changed key or value head.
        rotation: ``R`` of a rotated or turned head; its activations become ``z R``.
        scale: ``s`` of a scaled head; its activations become ``s z``.
        shift: ``v`` of a shifted head; its activations become ``z + v``.
        weights: which weights of a rewired head have new content.
    """

    kind: ChangeKind
    heads: tuple[Head, ...]
    rotation: Float[Tensor, "d_head d_head"] | None = None
    scale: float | None = None
    shift: Float[Tensor, " d_head"] | None = None
    weights: tuple[WeightName, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The change as JSON; matrices follow from the seed."""
        return {
            "kind": self.kind,
            "heads": [head.label for head in self.heads],
            "scale": self.scale,
            "weights": list(self.weights),
        }


@dataclass(frozen=True)
class Planting:
    """How much is changed, and how.

    >>> rq.Planting(strength=0.5).drift
    0.0

    Args:
        drift: how far every parameter of the model moves, relative to its own norm.
        strength: size of the changes.
        weights: which weights of a rewired head get new content.
        rank: rank of the new content; None is full rank.
        attended: what the changed heads' layer attends to in the base model. New content of ``W_V``
            is then what no linear map of the old activations explains, and varies ``strength``
            times as far as they do (:meth:`AttendedInputs.unread`).
        seed: every change has random numbers made from this seed, its kind and its head, so
            planting one more head leaves the others as they are.

    Raises:
        UserError: if a number is out of range, or a weight cannot be rewired.
    """

    drift: float = 0.0
    strength: float = 1.0
    weights: Sequence[WeightName] = WEIGHTS
    rank: int | None = None
    attended: AttendedInputs | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("drift", "strength"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} {value} is not a size: give a number of at least 0.")
        for weight in self.weights:
            if weight not in WEIGHTS:
                raise UserError(f"weight {weight!r} cannot be rewired: choose from {WEIGHTS}.")


DEFAULTS = Planting()


@dataclass(frozen=True)
class PlantedPair:
    """A base model, its tuned copy, and the truth about their difference.

    Attributes:
        base: the model that was given, untouched.
        tuned: the changed copy.
        changes: what was changed.
        how: sizes of the changes, and the seed of their random numbers.
    """

    base: HookedTransformer = field(repr=False)
    tuned: HookedTransformer = field(repr=False)
    changes: tuple[PlantedChange, ...]
    how: Planting

    @property
    def truth(self) -> Mapping[Head, ChangeKind]:
        """What happened to each changed head."""
        return {head: change.kind for change in self.changes for head in change.heads}

    def changed_heads(self, layer: int) -> HeadSet:
        """The changed heads of a layer."""
        indices = [head.index for head in self.truth if head.layer == layer]
        return HeadSet.of(indices, self.base.cfg.n_heads)

    def to_dict(self) -> dict[str, Any]:
        """The truth as JSON."""
        return {
            "changes": [change.to_dict() for change in self.changes],
            "drift": self.how.drift,
            "strength": self.how.strength,
            "seed": self.how.seed,
        }

    def loaded(self, base: LoadedModel) -> LoadedModel:
        """The tuned copy as a loaded model, for a pair with the model it was made from.

        Args:
            base: the loaded model whose ``model`` was given to :func:`plant`.
        """
        source = f"{base.source} (planted, seed {self.how.seed})"
        return replace(
            base, model=self.tuned, source=source, files=None, logit_check_max_abs_diff=None
        )


@torch.no_grad()
def plant(
    base: HookedTransformer, *, how: Planting = DEFAULTS, **heads: Iterable[Head | str]
) -> PlantedPair:
    """Make a tuned copy of a model in which chosen heads are changed in known ways.

    With grouped-query attention a change of a value (or key) head changes every query head that
    shares it, and the truth names them all. Heads are given by the kind of their change:

    - ``rotated``: heads whose value space is rotated by a random orthogonal matrix ``R``:
      ``W_V R``, ``b_V R``, ``Rᵀ W_O``. The model's function stays the same.
    - ``scaled``: heads whose value space is scaled by ``s = 1 + strength``: ``s W_V``, ``s b_V``,
      ``W_O / s``. The model's function stays the same.
    - ``turned``: heads whose value space is rotated while ``W_O`` stays: the function changes.
    - ``shifted``: heads whose ``b_V`` is moved by a random vector of length ``strength * |W_V|``:
      about ``strength`` times the length of a typical value vector.
    - ``rewired``: heads that get new content in ``weights`` beside the old: a random matrix,
      ``strength`` times as large as the old one in Frobenius norm, is added. What changes is
      partly a linear function of the old activations, unless ``attended`` is given.
    - ``replaced``: heads whose values read something else in place of what they read; it takes
      ``attended``.

    >>> planted = rq.plant(pair.base.model, turned=[rq.Head(1, 3)])
    >>> str(planted.changed_heads(1))
    '3'

    Args:
        base: the model; it is copied, never changed.
        how: drift, strength and seed, and what rewired and replaced heads get.
        heads: the heads to change, by kind; each may be a label, as ``"L1H3"``.

    Returns:
        Both models and the truth.

    Raises:
        UserError: if a head does not exist, is to be changed twice, or the rank does not fit.
    """
    if how.rank is not None and not 1 <= how.rank <= base.cfg.d_head:
        raise UserError(f"rank {how.rank} does not fit: give a number from 1 to {base.cfg.d_head}.")
    unknown = [kind for kind in heads if kind not in CHANGE_KINDS]
    if unknown:
        raise UserError(f"heads cannot be {unknown[0]}: plant {', '.join(CHANGE_KINDS)} ones.")
    tuned = copy.deepcopy(base)
    _drift(tuned, how.drift, how.seed)
    changes: list[PlantedChange] = []
    for kind in (each for each in CHANGE_KINDS if each in heads):
        shares = kind != "rewired" or bool(set(how.weights) & set(SHARED_WEIGHTS))
        named = [h if isinstance(h, Head) else Head.parse(str(h)) for h in heads[kind]]
        for group in _groups(tuned, named, shares):
            _refuse_second_change(group, changes)
            seeds = [how.seed, crc32(kind.encode()), group[0].layer, group[0].index]
            site = _Site(tuned, group, np.random.default_rng(seeds))
            changes.append(_PLANTERS[kind](site, how))
    return PlantedPair(base, tuned, tuple(changes), how)


@dataclass(frozen=True)
class _Site:
    """Heads that are changed together, and the random numbers of their change."""

    model: HookedTransformer
    heads: tuple[Head, ...]
    rng: np.random.Generator

    def weight(self, name: str, head: Head) -> Tensor:
        """The stored weight of one head, a view that can be written to."""
        attention = self.model.blocks[head.layer].attn
        if name.removeprefix("_")[-1] in "KV" and hasattr(attention, f"_{name}"):
            return getattr(attention, f"_{name}")[head.index // _heads_per_group(self.model)]
        return getattr(attention, name)[head.index]

    def shared(self, name: str) -> Tensor:
        """The stored weight that all of these heads share."""
        return self.weight(name, self.heads[0])

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers in float64."""
        return torch.from_numpy(self.rng.standard_normal(shape))


def _turn(site: _Site, _how: Planting) -> PlantedChange:
    width = site.model.cfg.d_head
    rotation = torch.from_numpy(
        np.atleast_2d(ortho_group.rvs(width, random_state=site.rng) if width > 1 else -1.0)
    )
    for name in ("W_V", "b_V"):
        site.shared(name).copy_(_exact(site.shared(name)) @ rotation)
    return PlantedChange("turned", site.heads, rotation=rotation)


def _rotate(site: _Site, how: Planting) -> PlantedChange:
    turned = _turn(site, how)
    assert turned.rotation is not None
    for head in site.heads:
        site.weight("W_O", head).copy_(turned.rotation.T @ _exact(site.weight("W_O", head)))
    return replace(turned, kind="rotated")


def _scale(site: _Site, how: Planting) -> PlantedChange:
    scale = 1 + how.strength
    for name in ("W_V", "b_V"):
        site.shared(name).mul_(scale)
    for head in site.heads:
        site.weight("W_O", head).div_(scale)
    return PlantedChange("scaled", site.heads, scale=scale)


def _rewire(site: _Site, how: Planting) -> PlantedChange:
    weights = tuple(how.weights)
    for name in weights:
        for head in site.heads[:1] if name in SHARED_WEIGHTS else site.heads:
            weight = site.weight(name, head)
            if name == "W_V" and how.attended is not None:
                weight.copy_(_exact(weight) + _unread(site, how))
            else:
                weight.copy_(_added(weight, _content(site, how, weight.shape), how.strength))
    return PlantedChange("rewired", site.heads, weights=weights)


def _replace(site: _Site, how: Planting) -> PlantedChange:
    new = _unread(site, how)
    assert how.attended is not None
    mean = how.attended.z[:, [head.index for head in site.heads]].mean((0, 1))
    site.shared("W_V").copy_(new)
    site.shared("b_V").copy_(mean)
    return PlantedChange("replaced", site.heads, weights=("W_V",))


def _unread(site: _Site, how: Planting) -> Tensor:
    """Values that read what no linear map of the old activations explains."""
    if how.attended is None:
        raise UserError(
            f"what heads like {site.heads[0]} do not read yet is not known: give "
            "Planting(attended=AttendedInputs.of(...))."
        )
    if site.heads[0].layer != how.attended.layer:
        raise UserError(
            f"head {site.heads[0]} is not of layer {how.attended.layer}, whose attended inputs "
            "were given: give those of the layer that is changed."
        )
    mixing = _content(site, how, site.shared("W_V").shape)
    return how.attended.unread(tuple(head.index for head in site.heads), how.strength, mixing)


def _content(site: _Site, how: Planting, shape: Sequence[int]) -> Tensor:
    rows, columns = shape
    if how.rank is None:
        return site.normal(rows, columns)
    return site.normal(rows, how.rank) @ site.normal(how.rank, columns)


def _shift(site: _Site, how: Planting) -> PlantedChange:
    direction = site.normal(site.model.cfg.d_head)
    length = how.strength * _exact(site.shared("W_V")).norm()
    shift = length * direction / direction.norm()
    site.shared("b_V").copy_(_exact(site.shared("b_V")) + shift)
    return PlantedChange("shifted", site.heads, shift=shift)


_PLANTERS: dict[str, Callable[[_Site, Planting], PlantedChange]] = {
    "rotated": _rotate,
    "scaled": _scale,
    "turned": _turn,
    "shifted": _shift,
    "rewired": _rewire,
    "replaced": _replace,
}


@torch.no_grad()
def unrelated(base: HookedTransformer, seed: int = 0) -> PlantedPair:
    """A base model beside a copy with the entries of each weight in an order that the seed decides.

    The two share their shape and the sizes of their weights, nothing else.
    """
    other = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(other.named_parameters()):
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return PlantedPair(base, other, (), Planting(seed=seed))


def _drift(model: HookedTransformer, drift: float, seed: int) -> None:
    if drift == 0:
        return
    rng = np.random.default_rng([seed, crc32(b"drift")])
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
        parameter.copy_(_added(parameter, noise, drift))


def _exact(weight: Tensor) -> Tensor:
    """The weight in float64 on the CPU: the same arithmetic on every machine."""
    return weight.double().cpu()


def _added(weight: Tensor, content: Tensor, strength: float) -> Tensor:
    """The weight plus content of ``strength`` times its norm."""
    old = _exact(weight)
    return old + strength * old.norm() / content.norm() * content


def _heads_per_group(model: HookedTransformer) -> int:
    return model.cfg.n_heads // (model.cfg.n_key_value_heads or model.cfg.n_heads)


def _groups(
    model: HookedTransformer, heads: Iterable[Head], shares: bool
) -> list[tuple[Head, ...]]:
    """The heads that are changed together, in order and without repetition."""
    width = _heads_per_group(model) if shares else 1
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    firsts = set()
    for head in heads:
        if not (0 <= head.layer < n_layers and 0 <= head.index < n_heads):
            raise UserError(
                f"head {head} does not exist: the model has layers 0 to {n_layers - 1} with heads "
                f"0 to {n_heads - 1}; plant in those."
            )
        firsts.add(Head(head.layer, head.index // width * width))
    return [
        tuple(Head(first.layer, first.index + step) for step in range(width))
        for first in sorted(firsts)
    ]


def _refuse_second_change(group: tuple[Head, ...], changes: Sequence[PlantedChange]) -> None:
    changed = {head: change.kind for change in changes for head in change.heads}
    for head in group:
        if head in changed:
            raise UserError(
                f"head {head} is to be changed twice (it is {changed[head]} already, perhaps "
                "through the value head it shares): plant each head once."
            )
