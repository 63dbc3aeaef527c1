"""Is an ``adapter_config.json`` one that may be given to PEFT?

It holds sizes, regular expressions and names of modules to import; PEFT takes them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rq4lens.errors import UserError
from rq4lens.files import short_value
from rq4lens.models.checkpoint import Checkpoint
from rq4lens.models.checkpoint_json import read_json
from rq4lens.models.patterns import require_quick

RANKS = ("r", "init_r", "target_r")
REFUSED = ("megatron_config", "layer_replication")
"""The one imports a module by name, the other makes a model of other layers."""

NAMES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
NOT_MERGED = ("XLORA",)
"""Mixes adapters that it fetches from elsewhere."""


def adapter_settings(adapter: Checkpoint) -> dict[str, Any]:
    """What an adapter's ``adapter_config.json`` says.

    Raises:
        UserError: It is no JSON object.
    """
    return read_json(adapter.folder / "adapter_config.json", adapter.source)


def check_adapter(adapter: Checkpoint, module_names: Sequence[str]) -> None:
    """Refuse an adapter whose settings cannot be obeyed in bounded time and memory.

    Args:
        adapter: The adapter's folder.
        module_names: Of the base model's modules, which its patterns are matched against.

    Raises:
        UserError: Type, rank, targets or patterns are none that can be merged.
    """
    settings = adapter_settings(adapter)
    _check_type(settings, adapter.source)
    _check_ranks(settings, adapter)
    for name in REFUSED:
        if settings.get(name) is not None:
            raise _wrong(name, settings[name], adapter.source, "null")
    for name in NAMES:
        value = settings.get(name)
        if not (value is None or isinstance(value, str) or _is_names(value)):
            raise _wrong(name, value, adapter.source, "a list of names of modules")
    require_quick(dict(_patterns(settings)), module_names, f"the adapter {adapter.source}")


def _check_type(settings: Mapping[str, Any], source: str) -> None:
    from peft.mapping import (  # noqa: PLC0415 - an optional extra
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    kind = settings.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise _wrong("peft_type", kind, source, "a type that the installed PEFT knows, as 'LORA'")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if kind in NOT_MERGED or not hasattr(tuner, "merge_and_unload"):
        spelled = PEFT_TYPE_TO_CONFIG_MAPPING[kind].__name__.removesuffix("Config")
        raise UserError(
            f"{source} is a {spelled} adapter ({kind}), which is no change of weights; only "
            "adapters that can be merged into the weights, as LoRA, are allowed."
        )


def _check_ranks(settings: Mapping[str, Any], adapter: Checkpoint) -> None:
    most = max((max(t.shape, default=1) for t in adapter.tensors.values()), default=1)
    allowed = f"a whole number from 1 to {most}, the longest side of its weights"
    for name in RANKS:
        if name in settings and not _is_rank(settings[name], most):
            raise _wrong(name, settings[name], adapter.source, allowed)
    for name, kind in (("rank_pattern", int), ("alpha_pattern", int | float)):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict) or not all(
            isinstance(v, kind) for v in patterns.values()
        ):
            raise _wrong(name, patterns, adapter.source, "an object from patterns to numbers")
    for rank in (settings.get("rank_pattern") or {}).values():
        if not _is_rank(rank, most):
            raise _wrong("rank_pattern", rank, adapter.source, allowed)


def _is_rank(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _patterns(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every regular expression, in the frame that PEFT puts around it."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(value := settings.get(name), str):
            yield name, value if value.isidentifier() else rf"(?:{value})\Z"
    for name, frame in (
        ("modules_to_save", r"(^|.*\.){}($|\..*)"),
        ("layers_pattern", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
        ("rank_pattern", r"(.*\.)?({})$"),
        ("alpha_pattern", r"(.*\.)?({})$"),
    ):
        value = settings.get(name) or []
        for number, part in enumerate([value] if isinstance(value, str) else value, start=1):
            yield f"{name}, entry {number},", frame.replace("{}", part)


def _wrong(name: str, value: Any, source: str, allowed: str) -> UserError:
    return UserError(
        f"{name}={short_value(value)} in adapter_config.json of {source} must be {allowed}; "
        "restore the file that PEFT wrote."
    )
