"""What says how a run was made: the content of ``run.json``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from rq4lens.config import RunConfig
from rq4lens.models.catalog import resolve_device
from rq4lens.models.loading import HookedModel
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.row_engine import RowEngine
from rq4lens.results import GridResult
from rq4lens.run_directory import FORMAT
from rq4lens.store import Store

LIBRARIES = ("torch", "transformer-lens", "transformers", "numpy", "scipy", "scikit-learn")


def provenance(
    config: RunConfig,
    experiment: Experiment,
    grid: GridResult,
    store: Store,
    timings_seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything that says how a run was made; the content of ``run.json``.

    Args:
        config: what was asked for.
        experiment: the prepared pair.
        grid: its results.
        store: the store of conditions.
        timings_seconds: seconds of each stage.
    """
    pair = experiment.pair
    return {
        "format": FORMAT,
        "rq4lens": _version("rq4lens"),
        "config": config.model_dump(mode="json", exclude_unset=True),
        "settings": grid.settings.to_dict(),
        "noise_floor_nats": grid.noise_floor_nats,
        "models": {side: pair.member(side).card.to_dict() for side in SIDES},
        "prompts": {
            "fingerprint": pair.prompts.fingerprint,
            "splits": {name: len(pair.prompts.split(name)) for name in pair.prompts.splits},
            "tokens": {side: pair.token_fingerprint(side, grid.settings.split) for side in SIDES},
        },
        "maps": {
            str(layer): {**each.to_dict(), "fingerprint": each.fingerprint}
            for layer, each in experiment.maps.items()
        },
        "engine": _engine(experiment),
        "device": resolve_device(config.device),
        "blocks_on": _blocks_on(pair),
        "peak_device_bytes": _peak_device_bytes(),
        "store": {
            "reused": store.counters.reused,
            "computed": store.counters.computed,
            "set_aside": [list(entry) for entry in store.counters.set_aside],
        },
        "libraries": {name: _version(name) for name in LIBRARIES},
        "machine": {
            "python": platform.python_version(),
            "system": platform.system(),
            "processor": platform.machine(),
            "torch_threads": torch.get_num_threads(),
        },
        "timings_seconds": dict(timings_seconds),
    }


def _blocks_on(pair: ModelPair) -> dict[str, list[str] | None]:
    """The device of each block; None for a model that is not in memory any more."""

    def blocks(model: HookedModel) -> list[str]:
        return [str(next(block.parameters()).device) for block in model.blocks]

    members = {side: pair.member(side) for side in SIDES}
    return {
        side: blocks(member.model) if member.is_loaded else None for side, member in members.items()
    }


def _engine(experiment: Experiment) -> dict[str, Any]:
    engine = experiment.engine
    memory = engine.memory_report if isinstance(engine, RowEngine) else None
    return {
        "name": engine.name,
        "fallback_reason": engine.fallback_reason,
        "memory": memory,
    }


def _peak_device_bytes() -> int | None:
    """The most memory held at once on the GPU that held most; None without one."""
    used = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
    return max(used, default=None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
