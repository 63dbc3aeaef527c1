"""Loading pairs: those in the box, a preset, or any base and fine-tune."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from rq4lens.config import (
    BUILTIN,
    PairSource,
    Place,
    Reading,
    RunConfig,
    Settings,
    preset,
    preset_names,
)
from rq4lens.disk.store import NamedIngredients, Store
from rq4lens.errors import UserError
from rq4lens.models.load.adapters import other_base
from rq4lens.models.load.checkpoint import Checkpoint, locate
from rq4lens.models.load.devices import chosen_devices, free_bytes, resolve_device
from rq4lens.models.load.fingerprint import arithmetic_libraries, files_digest
from rq4lens.models.load.lens import HOOKED, chosen_backend
from rq4lens.models.load.loading import LoadedModel, load_hooked, load_own_tokenizer
from rq4lens.models.load.size import ModelSize, model_size
from rq4lens.models.pair import SIDES, ModelCard, ModelPair, PairMember, Side, prompts_left
from rq4lens.models.prompts.audit import Audit, audit_prompts, lacking
from rq4lens.models.prompts.prompt_set import PromptSet, TokenizedPrompts
from rq4lens.models.prompts.reading import ReadingLimits, tokenize

log = logging.getLogger(__name__)

S = TypeVar("S", bound=Settings)

SUPPLY = "SUPPLY"
"""Start of a preset's ``prompts`` entry when the user has to bring the file."""

SHARE_FOR_WEIGHTS = 0.7
"""Of the free memory, for both models' weights; activations and rows need the rest."""


def load_pair(
    name: Any = None,
    tuned: Any = None,
    prompts: Any = None,
    *,
    base: Any = None,
    reading: Reading | None = None,
    place: Place | None = None,
) -> ModelPair:
    """Load a base model, its fine-tune and their prompts.

    >>> import rq4lens as rq
    >>> rq.load_pair("etiquette")
    <ModelPair etiquette: 768 train, 320 val, 160 neutral prompts>

    Args:
        name: one of ``rq4lens pairs``, for instance ``"etiquette"``; for your own pair leave it
            out, or give the base model here. What is given beside it replaces what the pair comes
            with.
        tuned: fine-tuned model: hub id or folder.
        base: base model: hub id or folder. Two models in memory are a pair, too, see
            :class:`ModelPair`.
        prompts: a file or folder, a list, or a Hugging Face dataset, as :meth:`PromptSet.of`
            takes them.
        reading: how the prompts are read: where they are decided, and how long they may be.
        place: devices, number format, and whether both models are held at once.

    Returns:
        The pair.

    Raises:
        UserError: if the pair is unknown, something is missing or a model cannot be loaded.
    """
    if base is None and tuned is not None and name not in preset_names():
        name, base = None, name
    if any(isinstance(each, MODELS) for each in (name, base, tuned)):
        if base is None or tuned is None or prompts is None:
            raise UserError(
                "models in memory are a pair with each other and their prompts: write "
                "rq.ModelPair(base_model, tuned_model, prompts)."
            )
        return ModelPair(base, tuned, prompts, reading=reading)
    start = RunConfig() if name is None else preset(name)
    paths = {"base": base, "tuned": tuned}
    if isinstance(prompts, str | Path):
        paths["prompts"], prompts = prompts, None
    source = start.pair.but(**{key: str(path) for key, path in paths.items() if path is not None})
    return pair_from(
        source,
        _over(start.reading, reading),
        _over(start.place, place),
        prompts=None if prompts is None else PromptSet.of(prompts),
    )


MODELS = (*HOOKED, LoadedModel, PairMember)
"""What is a model already."""


def _over(start: S, given: S | None) -> S:
    """A preset's settings with those that were set in the given ones."""
    return start if given is None else start.but(**given.model_dump(exclude_unset=True))


def pair_from(
    source: PairSource,
    reading: Reading,
    place: Place,
    *,
    prompts: PromptSet | None = None,
    cache: Path | None = None,
) -> ModelPair:
    """Load the pair that settings name; the base model's card may be cached."""
    chosen_devices(place)  # refuses those that are not there
    prompts = prompts_of(source) if prompts is None else prompts
    members = _members(source, place, cache)
    _warn_of_other_base(source)
    return ModelPair(
        members["base"],
        members["tuned"],
        prompts,
        name=source.name,
        reading=reading,
        keep_both=holds_both(source, place),
    )


def _warn_of_other_base(source: PairSource) -> None:
    """Say where an adapter is compared with another model than the one that it was trained on."""
    if _origin(source, "tuned").found(with_weights=False).is_adapter:
        found = checkpoints_of(source)
        if (said := other_base(found["tuned"], found["base"])) is not None:
            log.warning(said)


def prompts_left_in(source: PairSource, reading: Reading) -> PromptSet:
    """The prompts that a run reads: some may be left out as misaligned."""
    return prompts_left(prompts_of(source), _members(source, Place()), reading)


def audit_of(source: PairSource, reading: Reading, place: Place | None = None) -> Audit:
    """Audit the prompts of a pair, from the tokenizers of its models alone."""
    prompts, members = prompts_of(source), _members(source, Place())
    shapes: dict[Side, Any] = {side: size_of(source, side, place or Place()).cfg for side in SIDES}
    reads = {side: ReadingLimits(cfg.n_ctx, cfg.d_vocab) for side, cfg in shapes.items()}
    tokenizers = {side: member.tokenizer for side, member in members.items()}
    audit = audit_prompts(prompts, tokenizers, reading, reads)
    # A run leaves out what does not align; what a model cannot hold, it refuses.
    misaligned = audit_prompts(prompts, tokenizers, reading).misaligned
    too_long = sorted({*audit.misaligned} - {*misaligned})
    excluded = misaligned if reading.exclude_misaligned else ()
    refused = [*lacking(prompts.without(excluded))]
    if too_long:
        refused.append(f"a run refuses prompt {too_long[0]!r}: it does not fit both models")
    return replace(audit, excluded=excluded, lacking=tuple(refused))


def checkpoints_of(source: PairSource, *, with_weights: bool = True) -> dict[Side, Checkpoint]:
    """The folders of both models, fetched if they are not here."""
    origins = {side: _origin(source, side) for side in SIDES}
    return {side: each.found(with_weights=with_weights) for side, each in origins.items()}


def prompts_of(source: PairSource) -> PromptSet:
    """The prompts of a pair, or those of a built-in pair."""
    if is_builtin(source) and source.prompts is None:
        return PromptSet.from_jsonl(_builtin_folder(source.name) / "prompts.jsonl")
    if source.prompts is None or source.prompts.startswith(SUPPLY):
        for side in SIDES:
            _origin(source, side)  # a model that is missing too is said first
        wish = (source.prompts or "").removeprefix(SUPPLY).strip(": ")
        both = f"pair {source.name!r}"
        raise UserError(
            f"{both if source.base != source.tuned else f'model {source.base!r}'} needs your "
            f"prompts{f' ({wish})' if wish else ''}: give a JSONL file (--prompts FILE; in Python "
            "prompts=...)."
        )
    return PromptSet.of(source.prompts)


def is_builtin(source: PairSource) -> bool:
    """Whether the models are those of a pair in the box."""
    return source.name in BUILTIN and source.base is None and source.tuned is None


class _Origin(NamedTuple):
    """Where a model comes from, and what results call it."""

    path: str
    revision: str | None
    name: str
    trust_remote_code: bool

    def found(self, *, with_weights: bool = True) -> Checkpoint:
        """The checkpoint itself, fetched if it is not here."""
        return locate(
            self.path,
            self.revision,
            with_weights=with_weights,
            trust_remote_code=self.trust_remote_code,
        )


def _origin(source: PairSource, side: Side) -> _Origin:
    path, revision = getattr(source, side), getattr(source, f"{side}_revision")
    name = path
    if is_builtin(source):
        path, revision = str(_builtin_folder(source.name) / side), None
        name = f"{source.name}/{side} (built in)"
    if path is None:
        raise UserError(
            f"no {side} model is named: choose a pair, {' or '.join(preset_names())} (--pair; in "
            "Python rq.load_pair('etiquette'), or pair=... of a run), or give your own models "
            "(--base and --tuned; in Python base=... and tuned=...)."
        )
    return _Origin(path, revision, name, source.trust_remote_code)


def size_of(source: PairSource, side: Side, place: Place) -> ModelSize:
    """What a model of a pair will take; its weights are not read, nor fetched."""
    asked = _origin(source, side).found(with_weights=False)
    return model_size(asked, getattr(torch, place.dtype), place.backend)


def tokens_of(
    source: PairSource, side: Side, prompts: PromptSet, reading: Reading
) -> TokenizedPrompts:
    """Prompts as a model of a pair reads them; its weights are not needed."""
    return tokenize(prompts, _load_tokenizer(_origin(source, side)), reading)


def holds_both(source: PairSource, place: Place, sizes: Iterable[ModelSize] | None = None) -> bool:
    """Whether both models are held at once: as asked for, else if they leave room for the work."""
    if place.keep_both is not None or is_builtin(source):
        return place.keep_both is not False
    devices = chosen_devices(place)
    sizes = [size_of(source, side, place) for side in SIDES] if sizes is None else sizes
    needed = sum(size.weights.total for size in sizes)
    free = sum(map(free_bytes, devices.names))
    fit = needed <= SHARE_FOR_WEIGHTS * free
    if not fit:
        log.warning(
            "both models take %.3g GB of the %.3g GB free on %s: one is held at a time "
            "(--keep-both holds both all the same)",
            needed / 1e9,
            free / 1e9,
            devices,
        )
    return fit


def builtin_manifest(name: str = "etiquette") -> Mapping[str, Any]:
    """What was measured when a built-in pair was trained."""
    return json.loads((_builtin_folder(name) / "manifest.json").read_text(encoding="utf-8"))


def keep_base_card(source: PairSource, place: Place, pair: ModelPair, directory: Path) -> None:
    """Cache the card of a base model that was loaded, for :func:`pair_from` to find."""
    if pair.base.was_loaded:
        ingredients = _card_ingredients(_origin(source, "base"), place)
        Store(directory).put(ingredients, pair.base.card.to_dict())


def _card_ingredients(origin: _Origin, place: Place) -> NamedIngredients:
    """Everything that can change what is known of a model."""
    values = {
        "checkpoint": files_digest(origin.found()).result(),
        "backend": chosen_backend(place.backend),
        "dtype": place.dtype,
        "device": torch.device(resolve_device(place.device)).type,  # an adapter is merged there
        "trust_remote_code": origin.trust_remote_code,
        "libraries": arithmetic_libraries(),
    }
    return NamedIngredients(f"card_{place.dtype}", values)


def _find_card(origin: _Origin, place: Place, directory: Path) -> ModelCard | None:
    """The card of a model that was loaded before, so that it need not be loaded to be known."""
    if not directory.is_dir():
        return None  # spares the reading of the whole checkpoint
    values = Store(directory).get(_card_ingredients(origin, place)) or {}
    try:
        # The same files may lie elsewhere by now.
        return ModelCard(**(values | {"source": origin.name}))
    except TypeError:  # no card, or one of a version that knew more or less of a model
        return None


def _members(source: PairSource, place: Place, cache: Path | None = None) -> dict[Side, PairMember]:
    """Both models, not loaded yet."""
    base, tuned = (_origin(source, side) for side in SIDES)
    if cache is not None and cache.is_dir():
        files_digest(base.found())  # read beside what else is loaded
    find_card = None if cache is None else partial(_find_card, base, place, cache)
    return {
        "base": PairMember(partial(_load, base, place), partial(_load_tokenizer, base), find_card),
        "tuned": PairMember(partial(_load, tuned, place), partial(_load_tokenizer, tuned)),
    }


def _load_tokenizer(origin: _Origin) -> PreTrainedTokenizerBase:
    return load_own_tokenizer(origin.found(with_weights=False))


def _load(origin: _Origin, place: Place) -> LoadedModel:
    loaded = load_hooked(
        origin.path,
        revision=origin.revision,
        place=place,
        trust_remote_code=origin.trust_remote_code,
    )
    return replace(loaded, source=origin.name)


def _builtin_folder(name: str) -> Path:
    return Path(__file__).parent / "builtin" / name
