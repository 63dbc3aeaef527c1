"""Effects of patches: each is measured once, and lies on disk under all that can change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import chain, groupby
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy import ndarray

from rq4lens.disk.store import NUMERICS_VERSION, NamedIngredients, PutAll, Store, content_key
from rq4lens.heads import HeadSet
from rq4lens.models.load.fingerprint import arithmetic_libraries, tensor_fingerprint
from rq4lens.models.pair import SIDES
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.keys import (
    ConditionIngredients,
    chunk_ingredients,
    identity,
    measured_parts,
)
from rq4lens.patching.passes import device_of
from rq4lens.patching.patch import (
    BASE,
    MAPPED,
    OUTPUT,
    RAW,
    SELF,
    TUNED,
    Effects,
    Patch,
    Progress,
    into_side,
)
from rq4lens.results import EVERY_LAYER, Compared, ConditionResult, GridResult, PatchRow, Transfer

T = TypeVar("T")
Indices = tuple[int, ...]

RECORDED_TOGETHER = {"cpu": 32, "cuda": 256}
"""Patches of a grid that are measured together, by kind of device; each has a record of its own. A
GPU stands still between two chunks."""

MEASURED_TOGETHER = 2048
"""Patches of an analysis that are measured together, and lie in one file."""


class Planned(NamedTuple):
    """A condition to be measured; a ``source`` stands in both columns, raw and mapped."""

    cond: str
    layer: int
    heads: HeadSet
    alpha: float
    source: str | None = None

    @classmethod
    def of(cls, found: ConditionResult) -> Planned:
        """How a condition was measured."""
        itself = SELF if found.cond == SELF else None
        return cls(found.cond, found.layer, found.heads, found.alpha, itself)

    def measured(self, found: ConditionResult) -> Iterator[tuple[Patch, PatchRow]]:
        """The patches of a condition beside what was measured of them."""
        swaps = self.swaps if found.transfer else ()
        return zip((*self.raw_and_mapped, *swaps), found.rows, strict=True)

    @property
    def patches(self) -> tuple[Patch, ...]:
        """Every patch of this condition."""
        both = () if self.layer == EVERY_LAYER else self.raw_and_mapped
        return (*both, *self.swaps)

    @property
    def raw_and_mapped(self) -> tuple[Patch, Patch]:
        """The raw and the mapped patch."""
        sources = (self.source, self.source) if self.source else (RAW, MAPPED)
        raw, mapped = (Patch(self.layer, self.heads, self.alpha, source) for source in sources)
        return raw, mapped

    @property
    def swaps(self) -> tuple[Patch, ...]:
        """Each model with the other one's activations at full strength; none of the self-patch."""
        sources = () if self.source else (BASE, TUNED)
        return tuple(Patch(self.layer, self.heads, 1.0, source) for source in sources)


OWN_SOURCES = frozenset({RAW, SELF, BASE, TUNED, OUTPUT})
"""Sources that the models and prompts decide alone."""


@runtime_checkable
class MeasuresPatches(Protocol):
    """Whatever measures patches: an experiment, or a measurer that remembers its effects."""

    @property
    def groups(self) -> tuple[str, ...]:
        """The group of each prompt."""

    @property
    def n_heads(self) -> int:
        """Heads per layer."""

    def effects(self, patches: Sequence[Patch], progress: Progress | None = None) -> Effects:
        """Effect of each patch by itself on each prompt."""


class Measurer:
    """The effects of patches, each measured once.

    Patches that are not known yet are measured in chunks. Rounding depends on how many rows a
    matrix product has, so a chunk is cut from what is asked for, never from what the disk lacks: a
    resumed run then repeats the very products of an uninterrupted one.

    Args:
        source: measures what is not known.
        records: conditions of grids on disk, a record per patch; only an experiment has these.
        chunks: all other effects on disk, a file per chunk.
    """

    def __init__(
        self, source: MeasuresPatches, records: Store | None = None, chunks: Store | None = None
    ) -> None:
        self.source = source
        self.groups, self.n_heads = source.groups, source.n_heads
        self.records = records
        self.chunks = chunks
        self._known: dict[tuple[int, float, str], dict[Indices, PatchRow]] = {}
        self._fingerprints: dict[tuple[int, str], str | None] = {}

    @classmethod
    def of(cls, source: MeasuresPatches) -> Measurer:
        """The source if it is a measurer, or one that remembers its effects."""
        return source if isinstance(source, Measurer) else cls(source)

    @property
    def experiment(self) -> Experiment:
        """The experiment, where one measures."""
        assert isinstance(self.source, Experiment)
        return self.source

    def with_sources(self, extra: Mapping[tuple[int, str], torch.Tensor]) -> Measurer:
        """The same with more sources; nothing is known of it yet.

        So the raw patch is measured again beside what stands in place of the mapped one: both go
        through the same products, and rounding cancels in their difference.
        """
        other = Measurer(self.experiment.with_sources(extra), self.records, self.chunks)
        other._fingerprints = {key: tensor_fingerprint(tensor) for key, tensor in extra.items()}
        return other

    def known(self, layer: int, alpha: float, source: str) -> dict[Indices, PatchRow]:
        """What is known, by head set, in the order in which it was measured; it grows."""
        return self._known.setdefault((layer, alpha, source), {})

    def take_over(self, grid: GridResult) -> None:
        """Know what a grid measured."""
        for each in grid.conditions.values():
            self._learn(*zip(*Planned.of(each).measured(each), strict=True))

    def require(self, patches: Sequence[Patch], progress: Progress | None = None) -> None:
        """Measure those patches that are not known, or take them from disk."""
        for chunk in _chunks(self._unknown(patches), MEASURED_TOGETHER):
            by_source: dict[tuple[int, float, str], list[Patch]] = {}
            for patch in chunk:
                by_source.setdefault((patch.layer, patch.alpha, patch.source), []).append(patch)
            together = list(chain.from_iterable(by_source.values()))
            self._learn(together, self._stored(together, progress))

    def effects(self, patches: Sequence[Patch], progress: Progress | None = None) -> Effects:
        """Effect of each patch by itself on each prompt."""
        self.require(patches, progress)
        rows = [self._row(patch).measures for patch in patches]
        nothing = np.empty((0, len(self.groups)))
        if not rows:
            return Effects(nothing, nothing)
        return Effects(**{name: np.stack([each[name] for each in rows]) for name in rows[0]})

    def _stored(self, patches: Sequence[Patch], progress: Progress | None) -> list[PatchRow]:
        if self.chunks is None:
            return self._measured(patches, progress)
        conditions = tuple(map(self._ingredients, patches))
        ingredients = chunk_ingredients(conditions, self.experiment.prompt_ids)
        found = self.chunks.get_tensors(ingredients)
        if found is not None:
            self._report(len(patches), progress)
            return _rows({name: each.numpy() for name, each in found.items() if name != "heads"})
        measured = self._measured(patches, progress)
        rows = [row.measures for row in measured]
        tensors = {
            name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]
        }
        heads = torch.tensor([patch.heads.mask for patch in patches], dtype=torch.uint8)
        self.chunks.put_tensors(ingredients, {**tensors, "heads": heads})
        return measured

    def compared(self) -> Compared:
        """How well the distributions of the two models can be compared."""
        ingredients = NamedIngredients("compared", self.on)
        return Compared(**self.once(ingredients, lambda: self.experiment.ends.compared()._asdict()))

    def once(
        self, ingredients: NamedIngredients, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What was measured and recorded before, else what is measured now, if anything is."""
        found = self.records and self.records.get(ingredients)
        if not found:
            found = measure()
            if found and self.records is not None:
                self.records.put(ingredients, found)
        return found

    def conditions(
        self, planned: Sequence[Planned], progress: Progress | None = None
    ) -> dict[str, ConditionResult]:
        """Results of conditions by name."""
        self.record(patches_of(planned), progress)
        return {plan.cond: self._condition(plan) for plan in planned if plan.layer != EVERY_LAYER}

    def transfer(self, plan: Planned) -> Transfer:
        """What the heads of a condition carry, in both directions."""
        self.require(plan.swaps)
        return Transfer(*(self._row(patch) for patch in plan.swaps))

    def record(self, patches: Sequence[Patch], progress: Progress | None = None) -> None:
        """Measure those patches that are not known, or take them from their records."""
        with nullcontext() if self.records is None else self.records.writing() as put:
            for chunk in recorded_together(self._unknown(patches), self.device):
                self._learn(chunk, self._recorded(chunk, progress, put))

    def are_recorded(self, patches: Sequence[Patch]) -> bool:
        """Whether every patch has a record, on all prompts."""
        return all(self._record(patch) is not None for patch in patches)

    def part(self, patches: Sequence[Patch], progress: Progress | None = None) -> dict[str, Any]:
        """What the experiment's prompts, a part of the split, add to patches of one chunk."""
        return {
            "prompts": list(self.experiment.prompt_ids),
            "keys": self._keys(patches),
            "patches": [payload_of(row) for row in self._measured(patches, progress)],
        }

    def join(self, patches: Sequence[Patch], parts: Sequence[Mapping[str, Any]]) -> list[int]:
        """Record patches that were measured in parts of the prompts.

        Nothing is recorded if parts were made of something else; their places are returned.
        """
        keys = self._keys(patches)
        foreign = [place for place, part in enumerate(parts) if part["keys"] != keys]
        if foreign or self.records is None:
            return foreign
        ids = self.experiment.pair.tokens("tuned", self.experiment.split).ids
        for place, patch in enumerate(patches):
            joined = {}
            for name in parts[0]["patches"][place]:
                by_id: dict[str, Any] = {}
                for part in parts:
                    numbers = part["patches"][place][name]
                    by_id.update(zip(part["prompts"], numbers, strict=True))
                joined[name] = [by_id[each] for each in ids]
            self.records.put(self._ingredients(patch), joined)
        return []

    def _recorded(
        self, patches: Sequence[Patch], progress: Progress | None, put: PutAll | None
    ) -> list[PatchRow]:
        records = [self._record(patch) for patch in patches]
        found = [row for row in records if row is not None]
        if len(found) == len(patches):
            self._report(len(patches), progress)
            return found
        measured = self._measured(patches, progress)
        if put is not None:
            put(
                (self._ingredients(patch), row.measures)
                for patch, found, row in zip(patches, records, measured, strict=True)
                if not found
            )
        # What is stored is what the table shows, even where this machine would round otherwise.
        return [before or new for before, new in zip(records, measured, strict=True)]

    def _record(self, patch: Patch) -> PatchRow | None:
        payload = None if self.records is None else self.records.get(self._ingredients(patch))
        if not payload:
            return None
        return PatchRow(**{name: np.array(each, dtype=float) for name, each in payload.items()})

    def _condition(self, plan: Planned) -> ConditionResult:
        raw, mapped = (self._row(patch) for patch in plan.raw_and_mapped)
        return ConditionResult(
            cond=plan.cond,
            layer=plan.layer,
            heads=plan.heads,
            alpha=plan.alpha,
            raw=raw,
            mapped=mapped,
            transfer=self.transfer(plan) if plan.swaps else None,
        )

    def _unknown(self, patches: Sequence[Patch]) -> list[Patch]:
        wanted = dict.fromkeys(patches)
        return [patch for patch in wanted if patch.heads.indices not in self._beside(patch)]

    def _beside(self, patch: Patch) -> dict[Indices, PatchRow]:
        return self.known(patch.layer, patch.alpha, patch.source)

    def _row(self, patch: Patch) -> PatchRow:
        return self._beside(patch)[patch.heads.indices]

    def _learn(self, patches: Sequence[Patch], rows: Sequence[PatchRow]) -> None:
        for patch, row in zip(patches, rows, strict=True):
            self._beside(patch).setdefault(patch.heads.indices, row)

    def _measured(self, patches: Sequence[Patch], progress: Progress | None) -> list[PatchRow]:
        return _rows(self.source.effects(patches, progress).measures)

    def _report(self, n_patches: int, progress: Progress | None) -> None:
        if progress is not None:
            progress(n_patches * len(self.groups))

    def _keys(self, patches: Sequence[Patch]) -> list[str]:
        return [content_key(self._ingredients(patch).to_dict()) for patch in patches]

    def _ingredients(self, patch: Patch) -> ConditionIngredients:
        return ConditionIngredients(self.on, patch, self._made_by(patch.layer, patch.source))

    @cached_property
    def device(self) -> str:
        """The kind of device that measures."""
        here = isinstance(self.source, Experiment)
        return device_of(self.experiment.tuned_model).type if here else "cpu"

    @cached_property
    def on(self) -> dict[str, Any]:
        """Everything but the patch that can change an effect.

        Batch size, padding side, engine and chunking are absent on purpose: they change no number.
        Models, prompts and tokens are fingerprints; the kind of device decides rounding.
        """
        experiment = self.experiment
        pair, split = experiment.pair, experiment.split
        read = experiment.ends.activations.read
        return {
            "models": {side: identity(pair.member(side).card.to_dict()) for side in SIDES},
            "prompts": pair.prompts.split(split).fingerprint,
            "tokens": {side: read(side, split).fingerprint for side in SIDES},
            "decision_rule": pair.reading.label,
            "patching": measured_parts(experiment.settings),
            "dtype": pair.tuned.card.dtype,
            "device": self.device,
            "libraries": arithmetic_libraries(),
            "numerics_version": NUMERICS_VERSION,
        }

    def _made_by(self, layer: int, source: str) -> str | None:
        """Fingerprint of the map that a source went through, or of what else it is.

        The models' own activations need none, so they outlive a change of map.
        """
        if (layer, source) not in self._fingerprints:
            layer_map = self.experiment.source_maps.get((layer, source))
            found = layer_map.fingerprint if layer_map else None
            if found is None and source not in OWN_SOURCES:
                found = tensor_fingerprint(self.experiment.sources[layer, source])
            self._fingerprints[layer, source] = found
        return self._fingerprints[layer, source]


def patches_of(planned: Sequence[Planned]) -> list[Patch]:
    """Every patch of some conditions, nothing twice."""
    return list(dict.fromkeys(patch for plan in planned for patch in plan.patches))


def recorded_together(patches: Sequence[Patch], device: str) -> Iterator[Sequence[Patch]]:
    """Patches by the chunks in which a kind of device measures them.

    All of one model come before any of the other, since they may not fit into memory together.
    All layers at once are alone, so that a sweep, which measures them once, cuts each layer alike.
    """
    for _, together in groupby(sorted(patches, key=_company), key=_company):
        yield from _chunks(tuple(together), RECORDED_TOGETHER.get(device, RECORDED_TOGETHER["cpu"]))


def _company(patch: Patch) -> tuple[bool, bool]:
    return into_side(patch) == "base", patch.layer == EVERY_LAYER


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _rows(measures: Mapping[str, ndarray]) -> list[PatchRow]:
    of_patches = zip(*measures.values(), strict=True)
    return [PatchRow(**dict(zip(measures, each, strict=True))) for each in of_patches]


def payload_of(row: PatchRow) -> dict[str, list[Any]]:
    """What the record of a patch holds: a number for each prompt, null where there is none."""
    found = {name: each.astype(object) for name, each in row.measures.items()}
    for each in found.values():
        each[np.isnan(each.astype(float))] = None
    return {name: each.tolist() for name, each in found.items()}
