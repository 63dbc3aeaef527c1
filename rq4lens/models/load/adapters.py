"""PEFT adapters (LoRA and its relatives): checked, then merged into their base model on load."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rq4lens.disk.files import short_value
from rq4lens.errors import UserError
from rq4lens.models.load.checkpoint import (
    ADAPTER,
    Checkpoint,
    explained,
    locate,
    same_weights,
)

EMBEDDING = re.compile(
    r"(embed_tokens|wte|embed_in|word_embeddings)"
    r"(\.(modules_to_save|original_module|base_layer|token_adapter))*\.weight$"
)
"""How the supported architectures end the name of their input embedding, and PEFT inside it."""

SHARED = ("vblora_vector_bank", ".tinylora_v.", ".unilora_theta_d.")
"""Adapter weights that PEFT holds once and names again in each layer."""


def base_of(adapter: Checkpoint) -> Checkpoint:
    """The base model that an adapter names."""
    settings = adapter.config
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
    beside = adapter.folder / base  # a relative path means a folder beside the adapter first
    try:
        found = locate(
            str(beside) if os.path.isdir(beside) else base,  # noqa: PTH112 - False for any text
            revision,
            with_weights=adapter.with_weights,
            trust_remote_code=adapter.trust_remote_code,
        )
    except UserError as error:
        raise UserError(f"The base model of the adapter {adapter.source}: {error}") from error
    if found.is_adapter:
        raise UserError(
            f"The base model of the adapter {adapter.source}, {found.source}, is itself an "
            "adapter; merge that one into its own base first, and name the merged model."
        )
    return found


def other_base(adapter: Checkpoint, base: Checkpoint) -> str | None:
    """What is to be said where an adapter was trained on other weights than those of a base."""
    own = base_of(adapter)
    if not base.is_adapter and same_weights(own, base):
        return None
    return (
        f"the adapter {adapter.source} was trained on {own.source}, whose weights are not those of "
        f"the base model {base.source}: what is measured is not only what the fine-tune changed"
    )


def with_adapter(base_model: Any, adapter: Checkpoint) -> Any:
    """An adapter on its base model, as PEFT itself runs it: nothing is merged yet."""
    try:
        from peft import PeftModel  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise UserError(
            f"{adapter.source} is an adapter, and merging it needs PEFT: "
            "install it with `pip install peft`."
        ) from None
    check_adapter(adapter)
    n_tokens = vocabulary_of(adapter)
    if n_tokens is not None and n_tokens != base_model.get_input_embeddings().weight.shape[0]:
        base_model.resize_token_embeddings(n_tokens)
    head, embedding = base_model.get_output_embeddings(), base_model.get_input_embeddings()
    with _merging(adapter):
        adapted = PeftModel.from_pretrained(base_model, str(adapter.folder))
        _require_whole(adapted, adapter)
    if head.weight is embedding.weight:
        # PEFT adds a change to the one alone; merged into a shared matrix it would change both.
        head.weight = nn.Parameter(head.weight.detach().clone())
    return adapted


def merged(adapted: Any, adapter: Checkpoint) -> Any:
    """The base model with the adapter's change added to its weights, in place."""
    with _merging(adapter):
        return adapted.merge_and_unload()


@contextmanager
def _merging(adapter: Checkpoint) -> Iterator[None]:
    what = f"The adapter {adapter.source} cannot be merged into its base model"
    fix = "use the base and the files that it was trained with"
    with explained(what, fix), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of is checked here
        yield


def _require_whole(adapted: Any, adapter: Checkpoint) -> None:
    """PEFT itself passes over weights that it does not find, or has no place for."""
    result = adapted.load_adapter(str(adapter.folder), "default")
    missing = [name for name in result.missing_keys if not any(s in name for s in SHARED)]
    # PEFT writes some weights twice, and reads them back under the shorter name.
    plain = adapter.tensors.keys() - set(result.unexpected_keys)
    surplus = [name for name in result.unexpected_keys if COPY.sub("", name) not in plain]
    lacks = f"{ADAPTER} lacks {len(missing)} weights that its adapter_config.json asks for"
    holds = f"{ADAPTER} holds {len(surplus)} weights that the base model has no place for"
    for what, names in ((lacks, missing), (holds, surplus)):
        if names:
            raise UserError(
                f"The adapter {adapter.source} cannot be merged into its base model: {what}, as "
                f"{short_value(sorted(names)[0], 160)}; use the base and the files that it was "
                "trained with."
            )


def vocabulary_of(adapter: Checkpoint) -> int | None:
    """Rows of the input embedding if the adapter holds one, as after adding tokens."""
    rows = (t.shape[0] for name, t in adapter.tensors.items() if EMBEDDING.search(name))
    return next(rows, None)


COPY = re.compile(r"\.(modules_to_save|original_module)(?=\.)")
"""What PEFT puts into the name of a weight that it also writes under its plain name."""

REFUSED = ("megatron_config", "layer_replication")
"""The one imports a module by name, the other makes a model of other layers."""

PATTERNS = (
    "target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip
"""Settings that PEFT reads as regular expressions, as lists of them, or as objects by them."""


def check_adapter(adapter: Checkpoint) -> None:
    """Refuse an adapter that is no change of weights, or whose patterns are broken."""
    settings = adapter.config
    _check_type(settings.get("peft_type"), adapter)
    for name in REFUSED:
        if settings.get(name) is not None:
            raise adapter.wrong(name, settings[name], "null")
    start = settings.get("init_lora_weights")
    if str(start).startswith("pissa_niter"):
        raise UserError(
            f"init_lora_weights={short_value(start)} in adapter_config.json of {adapter.source} "
            "changes the base model by a random computation, anew at every load; convert it to a "
            "plain LoRA with save_pretrained(..., path_initial_model_for_weight_conversion=...), "
            "or merge it in the process that trained it."
        )
    rank = settings.get("r", 1)
    if not (isinstance(rank, int) and rank >= 1):
        raise adapter.wrong("r", rank, "a whole number from 1")
    for name in PATTERNS:
        value = settings.get(name) or []
        for pattern in value if isinstance(value, list | dict) else [value]:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError, TypeError):
                allowed = "a list of names of modules, or a pattern of them"
                raise adapter.wrong(name, pattern, allowed) from None


def _check_type(kind: Any, adapter: Checkpoint) -> None:
    from peft.mapping import (  # noqa: PLC0415 - an optional extra
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise adapter.wrong("peft_type", kind, "a type that the installed PEFT knows, as 'LORA'")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    # X-LoRA mixes adapters that it fetches from elsewhere.
    if kind == "XLORA" or not hasattr(tuner, "merge_and_unload"):
        spelled = PEFT_TYPE_TO_CONFIG_MAPPING[kind].__name__.removesuffix("Config")
        raise UserError(
            f"{adapter.source} is a {spelled} adapter ({kind}), which is no change of weights; "
            "only adapters that can be merged into the weights, as LoRA, are allowed."
        )
