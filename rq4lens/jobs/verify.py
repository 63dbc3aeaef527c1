"""Checking a finished run: its files, its numbers, and a sample of it measured again."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rq4lens.analysis.card.sides import maps_of, models_of
from rq4lens.analysis.effects.table import ranking_rows, records
from rq4lens.analysis.saved import Run, read_run
from rq4lens.analysis.statistics.plain import Listed, to_json
from rq4lens.config import RunConfig, config_from
from rq4lens.disk.files import read_json, short_reason
from rq4lens.disk.run import CONDITIONS, RESULTS, RUN, file_sha256, holds_run, ranking_file
from rq4lens.disk.store import StoredRecord, content_key, read_record
from rq4lens.errors import UserError
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.patching.experiment import prepare
from rq4lens.patching.grid import GridPlan
from rq4lens.patching.keys import identity, measured_parts
from rq4lens.patching.measured import Measurer, Planned, patches_of, payload_of
from rq4lens.patching.patch import MAPPED, Patch
from rq4lens.results import EVERY, GridResult, PatchRow

ALLOWED_AT = 0.3
"""The strength that the allowance is given for."""

TOLERANCE_NATS = {"float64": 1e-9, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
"""How far a number measured again may be from the saved one, on any one prompt.

Rounding alone: another engine, batch size or machine adds up the same products in another order.
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; ``passed`` is None if it could not be checked."""

    name: str
    passed: bool | None
    said: str

    def __str__(self) -> str:
        verdict = {True: "pass", False: "DIFFERS", None: "not checked"}[self.passed]
        return f"{self.name:<12} {verdict:<12} {self.said}"


@dataclass(frozen=True, repr=False)
class Verification(Listed):
    """What checking a run found."""

    ROWS: ClassVar[str] = "checks"

    directory: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if nothing differs."""
        return all(check.passed is not False for check in self.checks)

    @property
    def text(self) -> str:
        """A line per check, and the verdict."""
        verdict = "PASS" if self.passed else "DIFFERS"
        return "\n".join([*map(str, self.checks), f"{verdict}: {self.directory}"]) + "\n"


def verify_run(
    directory: Path,
    *,
    sample: int = 5,
    seed: int = 0,
    trust_remote_code: bool = False,
    pair: ModelPair | None = None,
) -> Verification:
    """Check a finished run: its files, its table, its records, and a sample measured again."""
    if not holds_run(directory):
        read_run(directory)  # says so
    try:
        saved = read_run(directory)
    except UserError as problem:
        return Verification(directory, (Check("run", False, str(problem)),))
    again = partial(_check_again, sample=sample, seed=seed, trust=trust_remote_code, pair=pair)
    checks: dict[str, Callable[[Run], _Finding]] = {
        "files": _check_files,
        "conditions": _check_conditions,
        "plan": _check_plan,
        "table": _check_table,
        "maps": _check_maps,
        "re-run": again,
    }
    return Verification(directory, tuple(_looked_at(saved, *each) for each in checks.items()))


class _NotCheckedError(Exception):
    """Says why something could not be checked."""


_Finding = tuple[Sequence[str], str]
"""What differs, and what is said where nothing does."""


def _looked_at(saved: Run, name: str, check: Callable[[Run], _Finding]) -> Check:
    # A run that was tampered with can break a check in any way; that is a finding, not a crash.
    try:
        differences, otherwise = check(saved)
    except _NotCheckedError as reason:
        return Check(name, None, str(reason))
    except Exception as problem:
        return Check(name, False, f"{type(problem).__name__}: {short_reason(problem)}")
    if not differences:
        return Check(name, True, otherwise)
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    return Check(name, False, f"{differences[0]}{more}")


def _check_files(saved: Run) -> _Finding:
    expected = saved.run["files_sha256"]
    changed = [
        f"{name} is not what the run wrote"
        for name, digest in expected.items()
        if file_sha256(saved.directory / Path(name).name) != digest
    ]
    return changed, f"{len(expected)} checksums agree"


def _check_plan(saved: Run) -> _Finding:
    """Every condition patches the heads that its name promises."""
    grid = saved.grid
    plan = GridPlan(grid.settings.n_heads, grid.settings.patching)
    fixed = [each for each in plan.fixed() if each.cond != EVERY]
    promised = {each.cond: each for each in [*fixed, *plan.top(grid.ranking)]}
    patched = {
        name: (found.layer, found.heads, found.alpha) for name, found in grid.conditions.items()
    }
    differences = [
        f"{name} is not {each.heads} of layer {each.layer}"
        for name, each in promised.items()
        if patched.get(name) != (each.layer, each.heads, each.alpha)
    ]
    differences += [f"{name} was not planned" for name in grid.conditions if name not in promised]
    return differences, f"{len(promised)} conditions patch what their names say"


def _check_table(saved: Run) -> _Finding:
    grid = saved.grid
    again = to_json(records(grid))
    ranking = ranking_file(grid.settings.layer, grid.settings.patching.alpha)
    checks = [grid["none"], grid["self"]]
    noise = max(abs(kl) for check in checks for kl in (check.KL_raw, check.KL_mapped))
    differences = [
        *_differences(read_json(saved.directory / RESULTS), again, RESULTS),
        *_differences(read_json(saved.directory / ranking), ranking_rows(grid), ranking),
        *_differences(saved.run["noise_floor_nats"], noise, "noise floor"),
        *_differences(_config(saved).effort.seed, grid.settings.effort.seed, "config.seed"),
    ]
    return differences, f"{len(again)} rows follow from the per-prompt numbers"


def _config(saved: Run) -> RunConfig:
    return config_from(saved.run["config"], f"{saved.directory / RUN}")


def _differences(saved: Any, again: Any, where: str) -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(again, dict):
        for key in {**again, **saved}:
            yield from _differences(saved.get(key), again.get(key), f"{where}.{key}")
    elif isinstance(saved, list) and isinstance(again, list) and len(saved) == len(again):
        for index, pair in enumerate(zip(saved, again, strict=True)):
            yield from _differences(*pair, f"{where}[{index}]")
    elif saved != again:
        numbers = isinstance(saved, int | float) and isinstance(again, int | float)
        # Another version of numpy may add up in another order.
        if not (numbers and math.isclose(saved, again, rel_tol=1e-9, abs_tol=1e-12)):
            yield f"{where} is {str(saved)[:40]}, but follows to be {str(again)[:40]}"


# Conditions on disk


def _check_conditions(saved: Run) -> _Finding:
    """Every prompt's own numbers are those of the records."""
    found, differences = _records(saved.directory / CONDITIONS)
    for cond, (plan, rows) in _measured(saved.grid).items():
        for patch, row in zip(plan.patches, rows, strict=True):
            candidates = [
                record.payload
                for record in found.get(_address(patch), ())
                if _is_of_run(record.ingredients, saved, patch)
            ]
            if not candidates:
                differences.append(f"{cond} {patch.source} has no record of this run")
            elif payload_of(row) not in candidates:
                differences.append(f"{cond} {patch.source} is not what its record holds")
    n_records = sum(map(len, found.values()))
    return differences, f"{n_records} records are whole and agree with the table"


_Measured = tuple[Planned, tuple[PatchRow, ...]]


def _measured(grid: GridResult) -> dict[str, _Measured]:
    """How each condition was measured, all layers at once among them, and what came of it."""
    found = {each.cond: (Planned.of(each), each.rows) for each in grid.conditions.values()}
    if grid.every_layer is None:
        return found
    plan = GridPlan(grid.settings.n_heads, grid.settings.patching)
    return {**found, EVERY: (plan.every_layer, tuple(grid.every_layer))}


_Address = tuple[int, int, tuple[int, ...], float, str]


def _address(patch: Patch) -> _Address:
    return patch.layer, patch.heads.n_heads, patch.heads.indices, patch.alpha, patch.source


def _records(directory: Path) -> tuple[dict[_Address, list[StoredRecord]], list[str]]:
    found: dict[_Address, list[StoredRecord]] = defaultdict(list)
    damaged = []
    for path in sorted(directory.glob("*.json")):
        try:
            record = read_record(path)
            if not path.stem.endswith(f"_{content_key(record.ingredients)[:16]}"):
                raise ValueError("its name is that of another record")
            if "patch" not in record.ingredients:
                continue  # how well the two models can be compared
            layer, n_heads, heads, alpha, source = (
                record.ingredients["patch"][name]
                for name in ("layer", "n_heads", "heads", "alpha", "source")
            )
            found[layer, n_heads, tuple(heads), alpha, source].append(record)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
            damaged.append(f"{path.name}: {short_reason(problem)}")
    return found, damaged


def _is_of_run(ingredients: Mapping[str, Any], saved: Run, patch: Patch) -> bool:
    """Whether a record agrees with what the run says about itself."""
    run, settings = saved.run, saved.grid.settings
    known = {
        "models": {side: identity(run["models"][side]) for side in SIDES},
        "tokens": run["prompts"]["tokens"],
        "patching": measured_parts(settings.patching),
        "dtype": settings.dtype,
    }
    made_by, maps = ingredients["patch"]["map"], run["maps"]
    if patch.source == MAPPED and made_by != maps[str(patch.layer)]["fingerprint"]:
        return False
    return all(ingredients.get(name) == value for name, value in known.items())


# Maps and models


def _check_maps(saved: Run) -> _Finding:
    maps = maps_of(saved)
    lost = [layer for layer in saved.run["maps"] if int(layer) not in maps]
    missing = [f"the map of layer {layer} is missing" for layer in lost]
    return missing, f"{len(maps)} maps agree with their checksums"


def _check_again(
    saved: Run, sample: int, seed: int, trust: bool, pair: ModelPair | None
) -> _Finding:
    if sample == 0:
        raise _NotCheckedError("no condition was to be measured again")
    try:
        pair = pair or models_of(saved, trust_remote_code=trust)[0]
        others = _other_models(saved, pair)
    except Exception as problem:  # a hub, a disk, a library: any of them can fail to give a model
        reason = f"the models cannot be loaded here: {short_reason(problem)}"
        raise _NotCheckedError(reason) from None
    if others:
        return others, ""
    measured = _measured(saved.grid)
    names = random.Random(seed).sample(list(measured), min(sample, len(measured)))
    chosen = {name: measured[name] for name in names}
    name, distance = max(_distances(saved, pair, chosen).items(), key=lambda item: item[1])
    tolerance = TOLERANCE_NATS[saved.grid.settings.dtype]
    said = (
        f"{len(chosen)} conditions through the hooks engine: {name} is furthest, by "
        f"{distance:.2g} nats on one prompt (allowed {tolerance:g})"
    )
    return ([], said) if distance <= tolerance else ([said], "")


def _other_models(saved: Run, pair: ModelPair) -> list[str]:
    split = saved.grid.settings.patching.split
    differences = []
    for side in SIDES:
        card, then = pair.member(side).card.to_dict(), saved.run["models"][side]
        for part in ("weights_fingerprint", "config_fingerprint", "tokenizer_fingerprint"):
            if card[part] != then[part]:
                differences.append(f"the {side} model has another {part} than the run's")
        if pair.tokens(side, split).fingerprint != saved.run["prompts"]["tokens"][side]:
            differences.append(f"the {side} model reads other {split} prompts than the run's")
    return differences


def _distances(saved: Run, pair: ModelPair, chosen: Mapping[str, _Measured]) -> dict[str, float]:
    """Largest difference on one prompt, by condition, of the sample measured again."""
    settings, place = saved.grid.settings, _config(saved).place.but(engine="hooks")
    layers = {plan.layer for plan, _ in chosen.values()} & set(maps_of(saved))
    # All layers at once need no map, but an experiment has one.
    maps = {layer: maps_of(saved)[layer] for layer in layers or {settings.layer}}
    again = Measurer(prepare(pair, maps, settings.patching, place))
    again.record(patches_of([plan for plan, _ in chosen.values()]))
    found = {}
    for cond, (plan, rows) in chosen.items():
        # What is left of the gap is far from 0, so that rounding moves it more than it moves KL.
        apart = np.abs([row.kl_nats for row in rows] - again.effects(plan.patches).kl_nats)
        # KL has a slope in proportion to the displacement, so rounding of the logits moves it so
        # much more at full strength than at the strength that the allowance is given for.
        strength = np.array([[max(1.0, patch.alpha / ALLOWED_AT)] for patch in plan.patches])
        found[cond] = float((apart / strength).max())
    return found
