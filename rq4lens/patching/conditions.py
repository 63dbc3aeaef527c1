"""Measuring planned conditions, each addressed by everything that can change its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from rq4lens.heads import HeadSet
from rq4lens.models.fingerprint import arithmetic_libraries
from rq4lens.patching.activations import device_of
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.patch import MAPPED, RAW, Advance, Patch
from rq4lens.results import ConditionResult
from rq4lens.store import ConditionIngredients, Store

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
        advance: called with the number of rows (prompt x patch) just finished.
    """

    experiment: Experiment
    alpha: float
    store: Store | None = None
    advance: Advance | None = None
    _measured: dict[Patch, dict[str, Any]] = field(default_factory=dict)

    def measure(self, planned: Sequence[Planned]) -> dict[str, ConditionResult]:
        """Results of the conditions by name.

        Args:
            planned: the conditions; two of them may patch the same heads, which are then measured
                once.

        Returns:
            The results, in the order of the plan.
        """
        patches = dict.fromkeys(patch for plan in planned for patch in plan.patches(self.alpha))
        for chunk in _chunks([patch for patch in patches if patch not in self._measured]):
            self._measured.update(zip(chunk, self._chunk(chunk), strict=True))
        return {plan.cond: self._result(plan) for plan in planned}

    def _chunk(self, patches: Sequence[Patch]) -> list[dict[str, Any]]:
        stored = [self._get(patch) for patch in patches]
        found = [payload for payload in stored if payload is not None]
        if len(found) == len(patches):
            self._report(len(patches))
            return found
        effects = self.experiment.engine.effects(
            [(patch,) for patch in patches], self.experiment.sources, self.advance
        )
        measured = [
            {"kl_nats": kl.tolist(), "answer_logprob_change_nats": change.tolist()}
            for kl, change in zip(effects.kl_nats, effects.answer_logprob_change_nats, strict=True)
        ]
        for patch, before, payload in zip(patches, stored, measured, strict=True):
            if self.store is not None and before is None:
                self.store.put(self._ingredients(patch), payload)
        # What is stored is what the table shows, even where this machine would round otherwise.
        return [before or new for before, new in zip(stored, measured, strict=True)]

    def _get(self, patch: Patch) -> dict[str, Any] | None:
        return None if self.store is None else self.store.get(self._ingredients(patch))

    def _report(self, n_patches: int) -> None:
        if self.advance is not None:
            self.advance(n_patches * len(self.experiment.prompts))

    def _result(self, plan: Planned) -> ConditionResult:
        raw, mapped = (self._measured[patch] for patch in plan.patches(self.alpha))
        return ConditionResult(
            cond=plan.cond,
            layer=plan.layer,
            heads=plan.heads,
            alpha=self.alpha,
            kl_raw_nats=np.array(raw["kl_nats"]),
            kl_mapped_nats=np.array(mapped["kl_nats"]),
            answer_logprob_change_raw_nats=np.array(raw["answer_logprob_change_nats"]),
            answer_logprob_change_mapped_nats=np.array(mapped["answer_logprob_change_nats"]),
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
            "kl_direction": experiment.kl_direction,
            "raw_baseline": experiment.raw_baseline,
            "libraries": arithmetic_libraries(),
        }


def _chunks(patches: Sequence[Patch]) -> Iterator[Sequence[Patch]]:
    for start in range(0, len(patches), CHUNK):
        yield patches[start : start + CHUNK]
