"""What effects are addressed by on disk: everything that can change a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rq4lens.config import Patching
from rq4lens.disk.store import NamedIngredients, content_key
from rq4lens.patching.patch import Patch

PREPARED = {"split", "k_positions", "raw_baseline", "kl_direction", "metric"}
"""Settings that are decided when an experiment is prepared."""


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


@dataclass(frozen=True)
class ConditionIngredients:
    """Everything that can change the effect of one patch, which was measured ``on`` something."""

    on: Mapping[str, Any]
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
        return {**self.on, "patch": patch}


def chunk_ingredients(
    conditions: Sequence[ConditionIngredients], prompt_ids: Sequence[str]
) -> NamedIngredients:
    """Everything that can change the effects of patches that were measured together.

    Patches of one layer, strength and source stand together, their head sets as a hash: they may be
    thousands. The prompts, in order, may be a part of the split.
    """
    patches = []
    for group, members in groupby(
        conditions, key=lambda each: _group(each.patch, each.map_fingerprint)
    ):
        head_sets = [list(each.patch.heads) for each in members]
        patches.append(group | {"head_sets": content_key({"head_sets": head_sets})})
    prompts = content_key({"ids": list(prompt_ids)})
    first = conditions[0]
    return NamedIngredients(
        f"L{first.patch.layer}_{len(conditions)}_patches_a{float(first.patch.alpha):g}",
        {**first.on, "prompt_ids": prompts, "patches": patches},
    )


def _group(patch: Patch, map_fingerprint: str | None) -> dict[str, Any]:
    return {
        "layer": patch.layer,
        "n_heads": patch.heads.n_heads,
        "alpha": float(patch.alpha) + 0.0,  # 0 and -0.0 are one strength
        "source": patch.source,
        "map": map_fingerprint,
    }
