"""Loading pairs: the one in the box, a preset, or any base and fine-tune."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rq4lens.config import SUPPLY, RunConfig, config_from, preset, preset_names
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.models.cards import CardIngredients, checkpoint_fingerprint, kept_card
from rq4lens.models.load.devices import Devices, chosen_devices, free_bytes
from rq4lens.models.load.fingerprint import arithmetic_libraries
from rq4lens.models.load.loading import LoadedModel, load_hooked, load_own_tokenizer
from rq4lens.models.load.size import ModelSize, model_size
from rq4lens.models.pair import SIDES, ModelCard, ModelPair, PairMember, Side
from rq4lens.models.prompts.audit import Audit, audit_prompts
from rq4lens.models.prompts.prompt_set import PromptSet, TokenizedPrompts
from rq4lens.models.prompts.reading import tokenize

log = logging.getLogger(__name__)

BUILTIN = ("etiquette",)

SHARE_FOR_WEIGHTS = 0.7
"""Of the free memory, for both models' weights; activations and rows need the rest."""


def load_pair(name: str | None = None, **settings: Any) -> ModelPair:
    """Load a base model, its fine-tune and their prompts.

    Args:
        name: one of ``rq4lens pairs``, for instance ``"etiquette"``; leave it out for your own
            pair.
        **settings: any setting of :class:`rq4lens.config.RunConfig`, such as ``base``, ``tuned``,
            ``prompts``, ``device`` or ``dtype``; they replace the preset's. ``prompts`` may also be
            a list or a Hugging Face dataset, as :meth:`PromptSet.of` takes them.

    Returns:
        The pair.

    Raises:
        UserError: if the pair is unknown, something is missing or a model cannot be loaded.
    """
    start = {} if name is None else preset(name).flat()
    prompts = settings.get("prompts")
    in_memory = None if isinstance(prompts, str | Path | None) else PromptSet.of(prompts)
    if in_memory is not None or isinstance(prompts, Path):
        settings["prompts"] = None if in_memory is not None else str(prompts)
    return pair_from_config(config_from({**start, **settings}), in_memory)


def pair_from_config(
    config: RunConfig, prompts: PromptSet | None = None, *, kept_in: Path | None = None
) -> ModelPair:
    """Load the pair that a configuration names.

    Raises:
        UserError: if something is missing or a model cannot be loaded.
    """
    devices_of(config)  # refuses those that are not there
    prompts = prompts_from_config(config) if prompts is None else prompts
    reading, members = config.reading, _members(config, kept_in)
    kept = _left_in(config, prompts, members)
    return ModelPair(
        config.pair.name,
        members["base"],
        members["tuned"],
        kept,
        layer=config.patching.layer,
        control_layer=config.patching.control_layer,
        reading=reading,
        keep_both=_fit_together(config)
        if config.place.keep_both is None
        else config.place.keep_both,
        excluded=prompts.without(kept.ids).prompts,
    )


def prompts_left_in(config: RunConfig) -> PromptSet:
    """The prompts that a run of the configuration reads: some may be left out as misaligned.

    Raises:
        UserError: if prompts or tokenizers cannot be read, or no prompt is left.
    """
    return _left_in(config, prompts_from_config(config), _members(config))


def _left_in(
    config: RunConfig, prompts: PromptSet, members: Mapping[Side, PairMember]
) -> PromptSet:
    if not config.reading.exclude_misaligned:
        return prompts
    audit = audit_prompts(prompts, _tokenizers(members), config.reading)
    kept = prompts.without(audit.misaligned)
    if not len(kept):
        raise UserError(
            f"none of the {len(prompts)} prompts is read alike by both models: see why with "
            "`rq4lens audit`, or choose another decision rule."
        )
    return kept


def audit_from_config(config: RunConfig) -> Audit:
    """Audit the prompts that a configuration names, from the tokenizers of its models alone.

    Raises:
        UserError: if prompts or tokenizers cannot be read.
    """
    prompts, members = prompts_from_config(config), _members(config)
    audit = audit_prompts(prompts, _tokenizers(members), config.reading)
    return replace(audit, excluded=audit.misaligned) if config.reading.exclude_misaligned else audit


def prompts_from_config(config: RunConfig) -> PromptSet:
    """The prompts that a configuration names, or those of the built-in pair.

    Raises:
        UserError: if there are none, or they cannot be read.
    """
    if is_builtin(config) and config.pair.prompts is None:
        return PromptSet.from_jsonl(_builtin_folder(config.pair.name) / "prompts.jsonl")
    return PromptSet.of(_required_prompts(config))


def is_builtin(config: RunConfig) -> bool:
    """Whether the models are those of a pair in the box."""
    return config.pair.name in BUILTIN and config.pair.base is None and config.pair.tuned is None


class _Source(NamedTuple):
    """Where a model comes from, and what results call it."""

    path: str
    revision: str | None
    name: str


def _source(config: RunConfig, side: Side) -> _Source:
    if is_builtin(config):
        folder = _builtin_folder(config.pair.name) / side
        return _Source(str(folder), None, f"{config.pair.name}/{side} (built in)")
    path = _required(config, side)
    return _Source(path, getattr(config.pair, f"{side}_revision"), path)


def size_of(config: RunConfig, side: Side) -> ModelSize:
    """What a model of a configuration will take; its weights are not read, nor fetched.

    Raises:
        UserError: if there is no such checkpoint, or no model can be built from it.
    """
    path, revision, _ = _source(config, side)
    return model_size(
        path,
        revision=revision,
        dtype=getattr(torch, config.place.dtype),
        trust_remote_code=config.pair.trust_remote_code,
    )


def tokens_from_config(config: RunConfig, side: Side, prompts: PromptSet) -> TokenizedPrompts:
    """Prompts as a model of a configuration reads them; its weights are not needed.

    Raises:
        UserError: if its tokenizer or a prompt cannot be read.
    """
    tokenizer = _load_tokenizer(_source(config, side), config)
    return tokenize(prompts, tokenizer, config.reading)


def holds_both(config: RunConfig) -> bool:
    """Whether both models are held at once: as asked for, else if they leave room for the work."""
    if config.place.keep_both is not None:
        return config.place.keep_both
    needed, free = _needed_and_free(config)
    return needed <= SHARE_FOR_WEIGHTS * free


def _needed_and_free(config: RunConfig) -> tuple[int, int]:
    needed = sum(size_of(config, side).weights.total for side in SIDES)
    return needed, sum(map(free_bytes, devices_of(config).names))


def _fit_together(config: RunConfig) -> bool:
    """Whether both models leave room for the work, by what their configurations say."""
    if is_builtin(config):
        return True
    fit = holds_both(config)
    if not fit:
        needed, free = _needed_and_free(config)
        log.warning(
            "both models take %.3g GB of the %.3g GB free on %s: one is held at a time "
            "(--keep-both holds both all the same)",
            needed / 1e9,
            free / 1e9,
            devices_of(config),
        )
    return fit


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
        reason = str(problem).splitlines()[0].split(". ")[0]
        if "Expected one of" in reason:  # torch goes on with every kind of device it ever knew
            reason = "there is no such kind"
        raise UserError(
            f"device {device!r} cannot be used here ({reason}): give cpu, cuda, cuda:1 and so on, "
            "mps, or auto."
        ) from None
    return device


def devices_of(config: RunConfig) -> Devices:
    """The devices that each model of a configuration goes to.

    Raises:
        UserError: if one does not exist here, or the settings do not go together.
    """
    device = config.place.device if config.place.device_map else resolve_device(config.place.device)
    return chosen_devices(device, config.place.n_devices, config.place.device_map)


def keep_base_card(config: RunConfig, pair: ModelPair, directory: Path) -> None:
    """Keep the card of a base model that was loaded, for :func:`pair_from_config` to find.

    Raises:
        UserError: if it cannot be written.
    """
    if pair.base.was_loaded:
        ingredients = _card_ingredients(_source(config, "base"), config)
        Store(directory).put(ingredients, pair.base.card.to_dict())


def _members(config: RunConfig, kept_in: Path | None = None) -> dict[Side, PairMember]:
    """Both models, not loaded yet."""
    base, tuned = (_source(config, side) for side in SIDES)
    find_card = None if kept_in is None else partial(_find_card, base, config, kept_in)
    return {
        "base": PairMember(
            partial(_load, base, config), partial(_load_tokenizer, base, config), find_card
        ),
        "tuned": PairMember(partial(_load, tuned, config), partial(_load_tokenizer, tuned, config)),
    }


def _find_card(source: _Source, config: RunConfig, directory: Path) -> ModelCard | None:
    if not directory.is_dir():
        return None  # spares the reading of the whole checkpoint
    card = kept_card(Store(directory), _card_ingredients(source, config))
    # The same files may lie elsewhere by now.
    return None if card is None else replace(card, source=source.name)


def _card_ingredients(source: _Source, config: RunConfig) -> CardIngredients:
    return CardIngredients(
        checkpoint=checkpoint_fingerprint(source.path, source.revision),
        dtype=config.place.dtype,
        device=torch.device(resolve_device(config.place.device)).type,
        trust_remote_code=config.pair.trust_remote_code,
        libraries=arithmetic_libraries(),
    )


def _tokenizers(members: Mapping[Side, PairMember]) -> dict[Side, PreTrainedTokenizerBase]:
    return {side: member.tokenizer for side, member in members.items()}


def _load_tokenizer(source: _Source, config: RunConfig) -> PreTrainedTokenizerBase:
    return load_own_tokenizer(
        source.path, revision=source.revision, trust_remote_code=config.pair.trust_remote_code
    )


def _load(source: _Source, config: RunConfig) -> LoadedModel:
    loaded = load_hooked(
        source.path,
        revision=source.revision,
        device=config.place.device
        if config.place.device_map
        else resolve_device(config.place.device),
        dtype=getattr(torch, config.place.dtype),
        n_devices=config.place.n_devices,
        device_map=config.place.device_map,
        trust_remote_code=config.pair.trust_remote_code,
    )
    return replace(loaded, source=source.name)


def _builtin_folder(name: str) -> Path:
    # Installed packages are plain folders; as_file would only matter for zipped ones.
    with as_file(files("rq4lens.models").joinpath(f"builtin/{name}")) as folder:
        return Path(folder)


def _required(config: RunConfig, what: str) -> str:
    value = getattr(config.pair, what)
    if value is None:
        raise UserError(
            f"no {what} model is named: choose a pair ({', '.join(preset_names())}) with --pair, "
            "or give your own with --base and --tuned."
        )
    return str(value)


def _required_prompts(config: RunConfig) -> Path:
    if config.pair.prompts is None or config.pair.prompts.startswith(SUPPLY):
        wish = (config.pair.prompts or "").removeprefix(SUPPLY).strip(": ")
        raise UserError(
            f"pair {config.pair.name!r} needs your prompts"
            + (f" ({wish})" if wish else "")
            + ": give a JSONL file with --prompts FILE."
        )
    return Path(config.pair.prompts)
