"""What effects are addressed by on disk: everything that can change a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from rq4lens.config import Patching
from rq4lens.disk.store import NUMERICS_VERSION, content_key
from rq4lens.patching.patch import Patch

PREPARED = {"split", "k_positions", "raw_baseline", "kl_direction", "metric"}
"""Settings that are decided when an experiment is prepared."""


class NamedIngredients(NamedTuple):
    """Everything that a record depends on, by name, and a readable start of its file name."""

    label: str
    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Every ingredient by name."""
        return self.values


def identity(card: Mapping[str, Any]) -> dict[str, str]:
    """What a model is known by; the same weights under another configuration are another model."""
    return {part: card[f"{part}_fingerprint"] for part in ("weights", "config", "tokenizer")}


def measured_parts(patching: Patching) -> dict[str, Any]:
    """The settings that decide what a patch is and how it is measured, whatever is patched."""
    return settings_values(patching, PREPARED)


def settings_values(patching: Patching, names: set[str] | None = None) -> dict[str, Any]:
    """Settings by name; one that measures nothing more stands in no key."""
    values = patching.model_dump(mode="json", include=names)
    return {name: value for name, value in values.items() if (name, value) != ("metric", "kl")}


@dataclass(frozen=True, kw_only=True)
class MeasuredOn:
    """Everything but the patch that can change an effect.

    Batch size, padding side, engine and chunking are absent on purpose: they change no number.
    Models, prompts and tokens are fingerprints; ``device`` is its kind, which decides rounding.
    """

    models: Mapping[str, Mapping[str, str]]
    prompts: str
    tokens: Mapping[str, str]
    decision_rule: str
    patching: Mapping[str, Any]
    dtype: str
    device: str
    libraries: str
    numerics_version: str = NUMERICS_VERSION

    @cached_property
    def values(self) -> dict[str, Any]:
        """Everything by name; it stands in thousands of records."""
        return asdict(self)


@dataclass(frozen=True)
class ConditionIngredients:
    """Everything that can change the effect of one patch."""

    on: MeasuredOn
    patch: Patch
    map_fingerprint: str | None

    @property
    def label(self) -> str:
        """Layer, heads, strength and source, short enough for a file name."""
        patch, indices = self.patch, self.patch.heads.indices
        heads = "-".join(map(str, indices[:4])) or "none"
        more = f"+{len(indices) - 4}" if len(indices) > 4 else ""
        return f"L{patch.layer}_heads{heads}{more}_a{float(patch.alpha):g}_{patch.source}"

    def to_dict(self) -> dict[str, Any]:
        """Every ingredient by name."""
        patch = _group(self.patch, self.map_fingerprint) | {"heads": list(self.patch.heads)}
        return self.on.values | {"patch": patch}


@dataclass(frozen=True)
class ChunkIngredients:
    """Everything that can change the effects of patches that were measured together.

    Patches of one layer, strength and source stand together; the prompts, in order, may be a part
    of the split.
    """

    conditions: Sequence[ConditionIngredients]
    prompt_ids: Sequence[str]

    @property
    def label(self) -> str:
        """Layer, strength and number of the patches."""
        first = self.conditions[0].patch
        return f"L{first.layer}_{len(self.conditions)}_patches_a{float(first.alpha):g}"

    def to_dict(self) -> dict[str, Any]:
        """Every ingredient by name; thousands of head sets stand there as their hash."""
        return self._values

    @cached_property
    def _values(self) -> dict[str, Any]:
        patches = []
        for group, members in groupby(
            self.conditions, key=lambda each: _group(each.patch, each.map_fingerprint)
        ):
            head_sets = [list(each.patch.heads) for each in members]
            patches.append(group | {"head_sets": content_key({"head_sets": head_sets})})
        prompt_ids = content_key({"ids": list(self.prompt_ids)})
        return self.conditions[0].on.values | {"prompt_ids": prompt_ids, "patches": patches}


def _group(patch: Patch, map_fingerprint: str | None) -> dict[str, Any]:
    return {
        "layer": patch.layer,
        "n_heads": patch.heads.n_heads,
        "alpha": float(patch.alpha) + 0.0,  # 0 and -0.0 are one strength
        "source": patch.source,
        "map": map_fingerprint,
    }
