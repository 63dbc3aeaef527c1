"""Measuring planned conditions, each addressed by everything that can change its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from rq4lens.disk.store import ConditionIngredients, Store, content_key
from rq4lens.heads import HeadSet
from rq4lens.models.load.fingerprint import arithmetic_libraries
from rq4lens.patching.activations import device_of
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.patch import MAPPED, RAW, Patch, Progress
from rq4lens.results import ConditionResult

KL, ANSWER = "kl_nats", "answer_logprob_change_nats"
"""What is stored of a patch: a number for each prompt."""

CHUNK = 32
"""Patches measured and stored together. Rounding depends on how many rows a matrix product has, so
chunks are cut from the plan, never from what is still missing: a resumed run then repeats the very
products of an uninterrupted one."""


class Planned(NamedTuple):
    """A condition to be measured.

    Args:
        cond: its name.
        layer: the patched layer.
        heads: the patched heads.
        source: None for the raw and mapped pair, or the one source that stands in both columns.
    """

    cond: str
    layer: int
    heads: HeadSet
    source: str | None = None

    def patches(self, alpha: float) -> tuple[Patch, Patch]:
        """The raw and the mapped patch of this condition."""
        sources = (self.source, self.source) if self.source else (RAW, MAPPED)
        raw, mapped = (Patch(self.layer, self.heads, alpha, source) for source in sources)
        return raw, mapped


@dataclass
class Recorder:
    """Measures planned conditions, or takes them from the store.

    Args:
        experiment: what to measure with.
        alpha: blend strength of every condition.
        store: finished patches; None keeps nothing.
        progress: called with the number of rows (prompt x patch) just finished.
    """

    experiment: Experiment
    alpha: float
    store: Store | None = None
    progress: Progress | None = None
    _measured: dict[Patch, dict[str, Any]] = field(default_factory=dict)

    def measure(self, planned: Sequence[Planned]) -> dict[str, ConditionResult]:
        """Results of the conditions by name."""
        patches = [patch for patch in self._patches(planned) if patch not in self._measured]
        for chunk in _chunks(patches):
            self._measured.update(zip(chunk, self._chunk(chunk), strict=True))
        return {plan.cond: self._result(plan) for plan in planned}

    def is_stored(self, planned: Sequence[Planned]) -> bool:
        """Whether the store has every patch of some conditions, on all prompts."""
        return all(self._get(patch) is not None for patch in self._patches(planned))

    def measure_part(self, planned: Sequence[Planned]) -> dict[str, Any]:
        """What the experiment's prompts, a part of the split, add to some conditions."""
        patches = self._patches(planned)
        numbers = [each for chunk in _chunks(patches) for each in self._effects(chunk)]
        return {
            "prompts": list(self.experiment.prompt_ids),
            "keys": [self._key(patch) for patch in patches],
            "patches": numbers,
        }

    def join(self, planned: Sequence[Planned], parts: Sequence[Mapping[str, Any]]) -> list[int]:
        """Put conditions into the store that were measured in parts of the prompts."""
        patches = self._patches(planned)
        keys = [self._key(patch) for patch in patches]
        foreign = [place for place, part in enumerate(parts) if part["keys"] != keys]
        if foreign or self.store is None:
            return foreign
        pair, split = self.experiment.pair, self.experiment.split
        ids = pair.tokens("tuned", split).ids
        for place, patch in enumerate(patches):
            numbers = [(part["prompts"], part["patches"][place]) for part in parts]
            self.store.put(self._ingredients(patch), _joined(ids, numbers))
        return []

    def _patches(self, planned: Sequence[Planned]) -> list[Patch]:
        return list(dict.fromkeys(patch for plan in planned for patch in plan.patches(self.alpha)))

    def _key(self, patch: Patch) -> str:
        return content_key(self._ingredients(patch).to_dict())

    def _chunk(self, patches: Sequence[Patch]) -> list[dict[str, Any]]:
        stored = [self._get(patch) for patch in patches]
        found = [payload for payload in stored if payload is not None]
        if len(found) == len(patches):
            self._report(len(patches))
            return found
        measured = self._effects(patches)
        for patch, before, payload in zip(patches, stored, measured, strict=True):
            if self.store is not None and before is None:
                self.store.put(self._ingredients(patch), payload)
        # What is stored is what the table shows, even where this machine would round otherwise.
        return [before or new for before, new in zip(stored, measured, strict=True)]

    def _effects(self, patches: Sequence[Patch]) -> list[dict[str, Any]]:
        effects = self.experiment.engine.effects(
            [(patch,) for patch in patches], self.experiment.sources, self.progress
        )
        return [
            {KL: kl.tolist(), ANSWER: change.tolist()}
            for kl, change in zip(effects.kl_nats, effects.answer_logprob_change_nats, strict=True)
        ]

    def _get(self, patch: Patch) -> dict[str, Any] | None:
        return None if self.store is None else self.store.get(self._ingredients(patch))

    def _report(self, n_patches: int) -> None:
        if self.progress is not None:
            self.progress(n_patches * len(self.experiment.prompts))

    def _result(self, plan: Planned) -> ConditionResult:
        raw, mapped = (self._measured[patch] for patch in plan.patches(self.alpha))
        return ConditionResult(
            cond=plan.cond,
            layer=plan.layer,
            heads=plan.heads,
            alpha=self.alpha,
            kl_raw_nats=np.array(raw[KL]),
            kl_mapped_nats=np.array(mapped[KL]),
            answer_logprob_change_raw_nats=np.array(raw[ANSWER]),
            answer_logprob_change_mapped_nats=np.array(mapped[ANSWER]),
        )

    def _ingredients(self, patch: Patch) -> ConditionIngredients:
        layer_map = self.experiment.source_maps.get((patch.layer, patch.source))
        return ConditionIngredients(
            **self._common,
            # A source that passes through no map outlives a change of map.
            map_fingerprint=None if layer_map is None else layer_map.fingerprint,
            layer=patch.layer,
            heads=patch.heads.indices,
            n_heads=patch.heads.n_heads,
            alpha=patch.alpha,
            kind=patch.source,
        )

    @cached_property
    def _common(self) -> Mapping[str, Any]:
        """What all conditions of an experiment share."""
        experiment = self.experiment
        pair, split = experiment.pair, experiment.split
        base, tuned = pair.base.card, pair.tuned.card
        return {
            "base_weights": base.weights_fingerprint,
            "tuned_weights": tuned.weights_fingerprint,
            "base_config": base.config_fingerprint,
            "tuned_config": tuned.config_fingerprint,
            "base_tokenizer": base.tokenizer_fingerprint,
            "tuned_tokenizer": tuned.tokenizer_fingerprint,
            "template": pair.prompts.split(split).fingerprint,
            "base_token_ids": pair.token_fingerprint("base", split),
            "tuned_token_ids": pair.token_fingerprint("tuned", split),
            # Sequences are cut at the decision token, so the tokens hold its index already.
            "base_decision": pair.decision_rule,
            "tuned_decision": pair.decision_rule,
            "split": split,
            "dtype": tuned.dtype,
            "device": device_of(experiment.tuned_model).type,
            "weight_processing": "none",
            "k_positions": experiment.k_positions,
            "kl_direction": experiment.settings.kl_direction,
            "raw_baseline": experiment.settings.raw_baseline,
            "libraries": arithmetic_libraries(),
        }


def _chunks(patches: Sequence[Patch]) -> Iterator[Sequence[Patch]]:
    for start in range(0, len(patches), CHUNK):
        yield patches[start : start + CHUNK]


def _joined(
    ids: Sequence[str], parts: Sequence[tuple[Sequence[str], Mapping[str, Sequence[float]]]]
) -> dict[str, list[float]]:
    """Numbers of one patch in the order of the ids, from parts that hold each id once."""
    joined = {}
    for name in (KL, ANSWER):
        by_id = {
            each: number
            for prompts, numbers in parts
            for each, number in zip(prompts, numbers[name], strict=True)
        }
        joined[name] = [by_id[each] for each in ids]
    return joined
