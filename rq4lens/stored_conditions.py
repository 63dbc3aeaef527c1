"""The numbers of a finished run beside the conditions that its store keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rq4lens.files import short_reason
from rq4lens.models.pair import SIDES
from rq4lens.patching.patch import MAPPED, SELF
from rq4lens.results import ConditionResult
from rq4lens.run_directory import CONDITIONS, KINDS, SavedRun
from rq4lens.store import Record, content_key, read_record


def compare_with_store(saved: SavedRun) -> tuple[int, list[str]]:
    """Compare every prompt's own numbers with the stored conditions.

    Args:
        saved: the run.

    Returns:
        How many records are whole, and what differs.
    """
    found, differences = _stored(saved.directory / CONDITIONS)
    for condition in saved.grid.conditions.values():
        for kind in KINDS:
            differences += _against_store(saved, condition, kind, found)
    return sum(map(len, found.values())), differences


_Address = tuple[int, tuple[int, ...], float, str]


def _stored(directory: Path) -> tuple[dict[_Address, list[Record]], list[str]]:
    found: dict[_Address, list[Record]] = defaultdict(list)
    damaged = []
    for path in sorted(directory.glob("*.json")):
        try:
            record = read_record(path)
            values = record.ingredients
            if not path.stem.endswith(f"_{content_key(values)[:16]}"):
                raise ValueError("its name is that of another record")
            address = (values["layer"], tuple(values["heads"]), values["alpha"], values["kind"])
            found[address].append(record)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
            damaged.append(f"{path.name}: {short_reason(problem)}")
    return found, damaged


def _against_store(
    saved: SavedRun,
    condition: ConditionResult,
    kind: str,
    found: Mapping[_Address, Sequence[Record]],
) -> list[str]:
    source = SELF if condition.cond == SELF else kind
    known = _known_ingredients(saved, condition.layer, source)
    address = (condition.layer, condition.heads.indices, condition.alpha, source)
    candidates = [
        record.payload
        for record in found.get(address, ())
        if known.items() <= {k: v for k, v in record.ingredients.items() if k in known}.items()
    ]
    name = f"{condition.cond} {kind}"
    if not candidates:
        return [f"{name} has no record of this run"]
    table = {
        "kl_nats": getattr(condition, f"kl_{kind}_nats").tolist(),
        "answer_logprob_change_nats": getattr(
            condition, f"answer_logprob_change_{kind}_nats"
        ).tolist(),
    }
    return [] if table in candidates else [f"{name} is not what its record holds"]


def _known_ingredients(saved: SavedRun, layer: int, source: str) -> dict[str, Any]:
    """What the run says about itself that a record of it must agree with."""
    run, settings = saved.run, saved.grid.settings
    known = {
        "n_heads": settings.n_heads,
        "split": settings.split,
        "dtype": settings.dtype,
        "k_positions": settings.k_positions,
        "kl_direction": settings.kl_direction,
        "raw_baseline": settings.raw_baseline,
    }
    for side in SIDES:
        for part in ("weights", "config", "tokenizer"):
            known[f"{side}_{part}"] = run["models"][side][f"{part}_fingerprint"]
        known[f"{side}_token_ids"] = run["prompts"]["tokens"][side]
    if source == MAPPED:
        known["map_fingerprint"] = run["maps"][str(layer)]["fingerprint"]
    return known
