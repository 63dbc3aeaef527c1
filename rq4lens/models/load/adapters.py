"""PEFT adapters (LoRA and its relatives): checked, then merged into their base model on load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rq4lens.disk.files import short_reason, short_value
from rq4lens.errors import UserError
from rq4lens.models.load.checkpoint import Checkpoint, locate, read_json

MAX_SECONDS = 10.0
"""For all patterns and names together; honest ones take hundredths."""

WORKER = Path(__file__).with_name("pattern_worker.py")
PLAIN = re.compile(r"[\w.-]*")
"""What is a name and no pattern; it is not tried."""


def require_quick(patterns: Mapping[str, str], names: Sequence[str], source: str) -> None:
    """Refuse patterns that are broken, or that some name would keep busy for ever.

    Raises:
        UserError: One of them is broken, or takes too long.
    """
    tried = {what: text for what, text in patterns.items() if not PLAIN.fullmatch(text)}
    answers = _try(list(tried.values()), names) if tried else []
    for number, (what, text) in enumerate(tried.items()):
        answer = answers[number] if number < len(answers) else "wrong it takes too long"
        if answer != "done":
            raise UserError(
                f"{what} of {source} has the pattern {short_value(text)}, which cannot be matched "
                f"({short_reason(ValueError(answer.removeprefix('wrong ')))}); write the names of "
                "the modules as a list."
            )


def _try(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    asked = json.dumps({"patterns": patterns, "names": names})
    command = [sys.executable, "-I", "-S", str(WORKER)]
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=MAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as late:
        return _lines(late.stdout)
    return _lines(done.stdout)


def _lines(output: str | bytes | None) -> list[str]:
    text = output.decode() if isinstance(output, bytes) else output or ""
    return text.splitlines()


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


EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""How the supported architectures end the name of their input embedding."""

SHARED = ("vblora_vector_bank", ".tinylora_v.", ".unilora_theta_d.")
"""Adapter weights that PEFT holds once and names again in each layer."""


def base_of(adapter: Checkpoint, *, with_weights: bool = True) -> Checkpoint:
    """The base model that an adapter names.

    Raises:
        UserError: It names none, or the named one cannot be found or is an adapter too.
    """
    settings = adapter_settings(adapter)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise UserError(
            f"The adapter {adapter.source} names no base model; write base_model_name_or_path "
            "into its adapter_config.json."
        )
    if not isinstance(base, str) or not isinstance(revision, str | None):
        raise UserError(
            f"base_model_name_or_path={short_value(base)} and revision={short_value(revision)} in "
            f"adapter_config.json of {adapter.source} must be text; restore the file."
        )
    try:
        found = locate(base, revision, with_weights=with_weights)
    except UserError as error:
        raise UserError(f"The base model of the adapter {adapter.source}: {error}") from error
    if found.is_adapter:
        raise UserError(
            f"The base model of the adapter {adapter.source}, {found.source}, is itself an "
            "adapter; merge that one into its own base first, and name the merged model."
        )
    return found


def merge_adapter(base_model: Any, adapter: Checkpoint) -> Any:
    """Add an adapter's change to the weights of its base model, in place.

    Raises:
        UserError: PEFT is not installed, or the adapter is damaged or does not fit the base.
    """
    try:
        from peft import PeftModel  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise UserError(
            f"{adapter.source} is an adapter, and merging it needs PEFT: "
            "install it with `pip install peft`."
        ) from None
    check_adapter(adapter, [name for name, _ in base_model.named_modules()])
    n_tokens = vocabulary_of(adapter)
    if n_tokens is not None and n_tokens != base_model.get_input_embeddings().weight.shape[0]:
        base_model.resize_token_embeddings(n_tokens)
    try:
        adapted = PeftModel.from_pretrained(base_model, str(adapter.folder))
        _require_whole(adapted, adapter)
        return adapted.merge_and_unload().eval()
    except UserError:
        raise
    except Exception as problem:  # PEFT checks what it reads by failing in any way
        raise UserError(
            f"The adapter {adapter.source} cannot be merged into its base model "
            f"({type(problem).__name__}: {short_reason(problem)}); use the base and the files that "
            "it was trained with."
        ) from problem


def _require_whole(adapted: Any, adapter: Checkpoint) -> None:
    """PEFT itself passes over weights that it does not find, or has no place for."""
    result = adapted.load_adapter(str(adapter.folder), "default")
    missing = [name for name in result.missing_keys if not any(s in name for s in SHARED)]
    for what, names in (("lacks", missing), ("has no place for", result.unexpected_keys)):
        if names:
            raise UserError(
                f"The adapter {adapter.source} cannot be merged into its base model, which "
                f"{what} {len(names)} of its weights, as {short_value(sorted(names)[0], 160)}; "
                "use the base and the files that it was trained with."
            )


def vocabulary_of(adapter: Checkpoint) -> int | None:
    """Rows of the input embedding if the adapter holds one, as after adding tokens."""
    rows = (t.shape[0] for name, t in adapter.tensors.items() if name.endswith(EMBEDDINGS))
    return next(rows, None)
