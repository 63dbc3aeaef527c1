"""Loading pairs: the one in the box, a preset, or any base and fine-tune."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from rq4lens.config import SUPPLY, RunConfig, config_from, preset, preset_names
from rq4lens.errors import UserError
from rq4lens.models.loading import LoadedModel, load_hooked
from rq4lens.models.pair import SIDES, ModelPair, PairMember, Side
from rq4lens.models.prompts import PromptSet

BUILTIN = ("etiquette",)


def load_pair(name: str | None = None, **settings: Any) -> ModelPair:
    """Load a base model, its fine-tune and their prompts.

    Args:
        name: one of ``rq4lens pairs``, for instance ``"etiquette"``; leave it out for your own
            pair.
        **settings: any setting of :class:`rq4lens.config.RunConfig`, such as ``base``, ``tuned``,
            ``prompts``, ``device`` or ``dtype``; they replace the preset's.

    Returns:
        The pair.

    Raises:
        UserError: if the pair is unknown, something is missing or a model cannot be loaded.
    """
    start = {} if name is None else preset(name).model_dump(exclude_unset=True)
    return pair_from_config(config_from({**start, **settings}))


def pair_from_config(config: RunConfig) -> ModelPair:
    """Load the pair that a configuration names.

    Args:
        config: the configuration.

    Returns:
        The pair; models are loaded now, or one after the other if they may not be held at once.

    Raises:
        UserError: if something is missing or a model cannot be loaded.
    """
    if config.pair in BUILTIN and config.base is None and config.tuned is None:
        return _builtin_pair(config)
    prompts = PromptSet.from_jsonl(_required_prompts(config))
    members = {
        "base": partial(_load, _required(config, "base"), config, config.base_revision),
        "tuned": partial(_load, _required(config, "tuned"), config, config.tuned_revision),
    }
    return _pair(config, prompts, members)


def _builtin_pair(config: RunConfig) -> ModelPair:
    folder = _builtin_folder(config.pair)

    def load(side: Side) -> LoadedModel:
        loaded = _load(str(folder / side), config)
        return replace(loaded, source=f"{config.pair}/{side} (built in)")

    prompts = PromptSet.from_jsonl(config.prompts or folder / "prompts.jsonl")
    return _pair(config, prompts, {side: partial(load, side) for side in SIDES})


def _pair(
    config: RunConfig, prompts: PromptSet, load: Mapping[str, Callable[[], LoadedModel]]
) -> ModelPair:
    return ModelPair(
        config.pair,
        PairMember(load["base"]),
        PairMember(load["tuned"]),
        prompts,
        layer=config.layer,
        control_layer=config.control_layer,
        decision_rule=config.decision_rule,
        keep_both=config.keep_both,
    )


def builtin_manifest(name: str = "etiquette") -> Mapping[str, Any]:
    """What was measured when the built-in pair was trained."""
    return json.loads((_builtin_folder(name) / "manifest.json").read_text(encoding="utf-8"))


def resolve_device(device: str) -> str:
    """``"auto"`` becomes ``"cuda"`` where there is one, and ``"cpu"`` elsewhere.

    Raises:
        UserError: if the device does not exist here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # a number comes back: it computes there
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used here ({reason}): try 'cpu'.") from None
    return device


def _load(source: str, config: RunConfig, revision: str | None = None) -> LoadedModel:
    return load_hooked(
        source,
        revision=revision,
        device=resolve_device(config.device),
        dtype=getattr(torch, config.dtype),
        trust_remote_code=config.trust_remote_code,
    )


def _builtin_folder(name: str) -> Path:
    # Installed packages are plain folders; as_file would only matter for zipped ones.
    with as_file(files("rq4lens.models.builtin").joinpath(name)) as folder:
        return Path(folder)


def _required(config: RunConfig, what: str) -> str:
    value = getattr(config, what)
    if value is None:
        raise UserError(
            f"no {what} model is named: choose a pair ({', '.join(preset_names())}) with --pair, "
            "or give your own with --base and --tuned."
        )
    return str(value)


def _required_prompts(config: RunConfig) -> Path:
    if config.prompts is None or config.prompts.startswith(SUPPLY):
        wish = (config.prompts or "").removeprefix(SUPPLY).strip(": ")
        raise UserError(
            f"pair {config.pair!r} needs your prompts"
            + (f" ({wish})" if wish else "")
            + ": give a JSONL file with --prompts FILE."
        )
    return Path(config.prompts)
