"""The typed configuration of a run, from a preset, a TOML file, options, or a finished run."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from rq4lens.disk.files import read_text
from rq4lens.errors import UserError

S = TypeVar("S", bound="Settings")

PROMPTS_PER_PASS = 32
"""Prompts in a forward pass of a whole model, unless told otherwise."""

BUILTIN = ("etiquette", "dialect")
"""The pairs that run without any download."""

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")


def setting(default: Any, meaning: str, **limits: Any) -> Any:
    """A setting: its default, and what it means in TOML files, options and error sentences."""
    return Field(default=default, description=meaning, **limits)


class Settings(BaseModel):
    """One part of a configuration: frozen, and checked where it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def __init__(self, **values: Any) -> None:
        self._fill(values, type(self).__name__)

    def _fill(self, values: Mapping[str, Any], where: str) -> None:
        known = {**self.by_file_key(), **type(self).model_fields}
        refuse_unknown(values, known, where)
        for key, value in values.items():  # True would pass for the number 1
            parts = value if isinstance(value, list | tuple) else [value]
            takes_truth = "bool" in str(known[key].annotation)
            if any(isinstance(each, bool) for each in parts) and not takes_truth:
                message = "true and false are no numbers"
                raise _not_allowed(where, key, known[key], value, message)
        try:
            super().__init__(**values)
        except ValidationError as problem:
            first = problem.errors()[0]
            if not first["loc"]:  # of several settings together; it says which
                raise UserError(str(first["ctx"]["error"])) from None
            key, message = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
            raise _not_allowed(where, key, known[key], first.get("input"), message) from None

    @classmethod
    def checked(cls: type[S], values: Mapping[str, Any], where: str) -> S:
        """Settings from values by key; an error sentence starts with where they come from."""
        settings = cls.__new__(cls)
        settings._fill({key: values[key] for key in cls.by_file_key() if key in values}, where)
        return settings

    @classmethod
    def by_file_key(cls) -> dict[str, FieldInfo]:
        """The settings by what they are called in a TOML file."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    def but(self: S, **changes: Any) -> S:
        """The same settings with some values replaced and checked again."""
        return type(self)(**{**self.model_dump(exclude_unset=True), **changes})


class PairSource(Settings):
    """Which pair of models, on which prompts."""

    about: str = setting("", "what the pair is")
    name: str = Field(
        default="custom",
        alias="pair",
        description="name of the pair; one of `rq4lens pairs` or your own, else of both models",
    )
    base: str | None = setting(None, "base model: hub id or folder")
    tuned: str | None = setting(None, "fine-tuned model: hub id or folder")
    base_revision: str | None = setting(None, "revision of the base hub id")
    tuned_revision: str | None = setting(None, "revision of the tuned hub id")
    prompts: str | None = setting(
        None, "JSONL or CSV file, or folder of a saved Hugging Face dataset"
    )
    trust_remote_code: bool = setting(False, "let a checkpoint run its own code")

    @model_validator(mode="after")
    def _named_by_its_models(self) -> PairSource:
        if "name" not in self.model_fields_set and self.base and self.tuned:
            both = (Path(os.path.abspath(path)).name for path in (self.base, self.tuned))  # noqa: PTH100 - takes any text
            self.__dict__["name"] = " and ".join(both)
        return self

    def found_from(self, folder: Path) -> PairSource:
        """The same pair with each relative path that leads somewhere from a folder or one above."""
        paths = {name: getattr(self, name) for name in ("base", "tuned", "prompts")}
        found = {name: path and _found(path, folder.absolute()) for name, path in paths.items()}
        return self.but(**{name: path for name, path in found.items() if path})


def _found(path: str, folder: Path) -> str | None:
    """Where a relative path leads to from a folder or the nearest above it; None if nowhere."""
    for place in (folder, *folder.parents):
        there = str(place / path)
        if os.path.exists(there):  # noqa: PTH110 - False for what no file system can have
            return None if os.path.exists(path) and os.path.samefile(path, there) else there  # noqa: PTH110, PTH121
    return None


class Reading(Settings):
    """How prompts are read: where they are decided, and how long they may be.

    >>> rq.Reading(decision_rule="last_content").label
    'last_content'

    Attributes:
        decision_rule: ``"last"`` decides a prompt at its last token, ``"last_content"`` at the
            last one that is not special, ``"before_answer"`` at the token before the prompt's
            answer, ``"marker"`` at the last character of a marker's last occurrence, ``"offset"``
            at the character that the prompt names.
        marker: the marker of prompts that name none.
        positions: ``"decision"`` patches the decision token, and the ``k_positions - 1`` before it;
            ``"-4..-1"`` such a range of the tokens up to it, which is -1; ``"subject"`` the tokens
            of each prompt's ``subject``; ``"all"`` every token up to it but the BOS.
        answer_tokens: how many tokens of the answer are compared, each at the token before it.

    Raises:
        UserError: if a value is not allowed, or a marker is given that no rule looks for.
    """

    decision_rule: Literal["last", "last_content", "before_answer", "marker", "offset"] = setting(
        "last", "at which token of a prompt the next one is compared"
    )
    marker: str | None = setting(None, "string that rule marker decides at the end of")
    max_tokens: int | None = setting(
        None, "longer prompts lose tokens on the left, but not their BOS", ge=1
    )
    exclude_misaligned: bool = setting(False, "leave out prompts that the models do not read alike")
    group_by: tuple[str, ...] = setting(
        (), "fields whose values make a group of prompts: content, meta.KEY"
    )
    hold_out: str = setting(
        "content", "field that says what a prompt is about; maps are tried without it"
    )
    positions: str = setting(
        "decision", "patched tokens: decision, a range as -4..-1, subject of each prompt, or all"
    )
    answer_tokens: int = setting(1, "how many tokens of the answer are compared", ge=1)

    @field_validator("positions", mode="after")
    @classmethod
    def _positions_exist(cls, value: str) -> str:
        if value not in ("decision", "subject", "all") and _last_tokens(value) is None:
            raise ValueError(
                "allowed are decision, subject, all, or a range that ends at -1 or before"
            )
        return value

    @property
    def last_tokens(self) -> tuple[int, int] | None:
        """The first and the last of a range of patched tokens; None where it is no range."""
        return _last_tokens(self.positions)

    @model_validator(mode="after")
    def _marker_has_its_rule(self) -> Reading:
        if self.marker is not None and self.decision_rule != "marker":
            raise UserError(
                f"marker {self.marker!r} is given, but the decision rule is "
                f"{self.decision_rule!r}: set it to 'marker', or leave the marker out."
            )
        if self.marker == "":
            raise UserError("the marker is empty: give a string of the prompts' texts.")
        return self

    @property
    def label(self) -> str:
        """The rule in a few words, with everything that can change a token."""
        said = [self.decision_rule if self.marker is None else f"marker {self.marker!r}"]
        if self.max_tokens is not None:
            said.append(f"last {self.max_tokens} tokens")
        if self.positions != "decision":
            said.append(f"patched at {self.positions}")
        if self.answer_tokens > 1:
            said.append(f"{self.answer_tokens} answer tokens")
        return ", ".join(said)


def _last_tokens(positions: str) -> tuple[int, int] | None:
    """A range of places counted from the end, as ``"-4..-1"``, if it is one."""
    found = re.fullmatch(r"-(\d{1,6})\.\.-(\d{1,6})", positions)
    if found is None:
        return None
    first, last = (-int(each) for each in found.groups())
    return (first, last) if first <= last < 0 else None


def refuse_two_places(reading: Reading, k_positions: int) -> None:
    """Refuse patched tokens that are named both by ``positions`` and by ``k_positions``."""
    if k_positions > 1 and reading.positions != "decision":
        raise UserError(
            f"positions {reading.positions!r} and k_positions {k_positions} both say which tokens "
            f"are patched: leave one out; the last {k_positions} are -{k_positions}..-1."
        )


RankBy = Literal["delta", "drop_pct", "kl_raw", "to_base", "to_tuned", "metric", "metric_to_tuned"]
MetricName = Literal["kl", "answer_logprob", "logit_difference", "accuracy"]
MapKind = Literal[
    "identity", "mean_shift", "moments", "procrustes", "procrustes_scaled", "ridge", "low_rank"
]
MapScope = Literal["head", "layer"]
KLDirection = Literal["patched||clean", "clean||patched"]


class Patching(Settings):
    """How base activations are patched into the tuned model, and what is measured of it.

    >>> rq.Patching(layer=1, alpha=0.5).k
    (1, 2, 4, 8)

    Attributes:
        map_scope: ``"head"`` for one map per head, ``"layer"`` for one over all heads jointly.
        metric: what is measured beside the divergence: ``"kl"`` nothing; ``"answer_logprob"`` the
            log-probability of the answer, which is the tuned model's own where a prompt gives none;
            ``"logit_difference"`` that of answer and foil; ``"accuracy"`` whether the answer lies
            above the foil. With another than ``"kl"`` heads are ranked by it unless ``rank_by``
            says otherwise. ``"own:NAME"`` stands for a :class:`rq4lens.Metric`.
        raw_baseline: what the raw patch inserts: ``"identity"`` base z itself, ``"moments"`` base
            z matched in mean and spread (fitted on train).

    Raises:
        UserError: if a value is not allowed.
    """

    layer: int | None = setting(None, "layer whose heads are patched", ge=0)
    control_layer: int | None = setting(None, "the control layer", ge=0)
    alpha: float = setting(0.3, "blend strength, from 0 to 1", ge=0, le=1)
    k: tuple[int, ...] = setting((1, 2, 4, 8), "sizes of top-k and of random sets")
    random_seeds: tuple[Annotated[int, Field(ge=0)], ...] = setting(
        (0, 1, 2), "seeds of the random-k sets"
    )
    rank_by: RankBy = setting("delta", "score of single heads")
    map_kind: MapKind = setting("procrustes_scaled", "kind of map")
    map_scope: MapScope = setting("head", "map per head or joint")
    split: str = setting("val", "split of the prompts that are measured")
    k_positions: int = setting(1, "patched positions, the decision token last", ge=1)
    raw_baseline: Literal["identity", "moments"] = setting(
        "identity", "raw patch: base z itself, or matched in mean and spread"
    )
    kl_direction: KLDirection = setting("patched||clean", "which way the divergence is taken")
    metric: MetricName | Annotated[str, Field(pattern="^own:.")] = setting(
        "kl", "what is measured of the answer beside the divergence, and ranks heads"
    )

    @model_validator(mode="after")
    def _metric_ranks(self) -> Patching:
        if self.metric != "kl" and "rank_by" not in self.model_fields_set:
            self.__dict__["rank_by"] = "metric"
        if self.metric == "kl" and self.rank_by.startswith("metric"):
            raise UserError(
                f"rank_by {self.rank_by!r} has no metric to rank by: choose one with --metric, or "
                "rank by delta or to_base."
            )
        return self

    @property
    def of_divergence(self) -> Patching:
        """The same without a metric, for prompts that nothing else is asked of."""
        return self if self.metric == "kl" else self.but(metric="kl", rank_by="delta")

    @field_validator("k", "random_seeds", mode="after")
    @classmethod
    def _unique(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(values)) < len(values):
            raise ValueError("a number stands twice in the list")
        return values


class Place(Settings):
    """Where models and their work are: kind of model, engine, devices, number format, memory.

    >>> rq.Place(device="cpu").dtype
    'float32'
    """

    backend: Literal["hooked", "bridge"] | None = setting(
        None,
        "HookedTransformer, or bridge: the Hugging Face model itself; if left out, what the "
        "installed TransformerLens has first",
    )

    engine: Literal["suffix", "cached", "hooks"] = setting(
        "suffix", "fast engines, or hooks, the reference"
    )
    device: str = setting("auto", "where the models are: cpu, cuda, cuda:1 and so on, mps, or auto")
    n_devices: int = setting(1, "over how many GPUs each model is spread", ge=1)
    device_map: str | None = setting(
        None, "GPUs that each model is spread over, as cuda:0,cuda:2, or auto"
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = setting(
        "float32", "number format of the models"
    )
    batch_size: int | None = setting(
        None, "prompts per forward pass; if left out 32, and up to 256 in a GPU's engine", ge=1
    )
    keep_both: bool | None = setting(
        None, "hold both models at once; decided by free memory when left out"
    )
    cache: str | None = setting(
        None, "folder that runs share: base activations, finished runs; the run's own if left out"
    )

    @property
    def prompts_per_pass(self) -> int:
        """Prompts in a forward pass of a whole model."""
        return self.batch_size or PROMPTS_PER_PASS


class Effort(Settings):
    """How much is measured and drawn beyond the grid, and from which seed.

    >>> rq.Effort(analysis="grid").resamples
    10000
    """

    analysis: Literal["full", "grid"] = setting(
        "full", "full, or grid: only what the grid's own conditions support"
    )
    random_sizes: Literal["affordable", "every", "k"] = setting(
        "affordable", "where random sets are measured: as many k as can be afforded, every k, or k"
    )
    noise_pair: bool = setting(
        True, "compare with a shuffled weight change; takes the memory of one more tuned model"
    )
    resamples: int = setting(10_000, "bootstrap resamples", ge=100, le=1_000_000)
    seed: int = setting(0, "seed of folds, resamples, planted heads", ge=0, lt=2**32)


class AnalysisEffort(Settings):
    """What an analysis measures and compares beyond the grid.

    >>> rq.AnalysisEffort(alphas=(0.3, 1.0)).n_random_sets
    200
    """

    n_random_sets: int = setting(200, "random sets drawn of each size that has more, at most", ge=1)
    random_ks: tuple[int, ...] | None = setting(
        None, "sizes of random sets besides the grid's; if left out, as many as affordable"
    )
    n_splits: int = setting(5, "random half splits behind the cross-fitted numbers", ge=1)
    methods: tuple[str, ...] | None = setting(
        None, "ranking methods to compare; all of them if left out"
    )
    alphas: tuple[Annotated[float, Field(ge=0, le=1)], ...] = setting(
        (0.1, 0.3, 0.5, 0.7, 1.0), "blend strengths of the sweep"
    )


class RunConfig(BaseModel):
    """Everything that decides a run, part by part.

    The keys of a TOML file are flat; :func:`config_from` sorts them into the parts.

    >>> config = rq.RunConfig(patching=rq.Patching(layer=1))
    >>> config.updated(alpha=0.5).patching.alpha
    0.5

    Attributes:
        pair: which models, on which prompts.
        reading: how the prompts are read.
        patching: how heads are patched and measured.
        place: where the models are.
        effort: how much is measured and drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pair: PairSource = Field(default_factory=PairSource)
    reading: Reading = Field(default_factory=Reading)
    patching: Patching = Field(default_factory=Patching)
    place: Place = Field(default_factory=Place)
    effort: Effort = Field(default_factory=Effort)

    def __init__(self, **parts: Any) -> None:
        for name, part in parts.items():
            if not isinstance(part, (PARTS.get(name, ()), dict)):
                raise UserError(
                    f"RunConfig has no part {name}={str(part)[:40]!r}: write patching="
                    "rq.Patching(layer=1), or rq.config_from({'pair': 'etiquette', 'layer': 1})."
                )
        super().__init__(**parts)
        refuse_two_places(self.reading, self.patching.k_positions)

    def flat(self, *, defaults: bool = False) -> dict[str, Any]:
        """What was set, by the keys of a TOML file, as plain JSON values; or every setting."""
        flat: dict[str, Any] = {}
        for _, part in self:
            flat |= part.model_dump(mode="json", by_alias=True, exclude_unset=not defaults)
        return flat

    def updated(self, **changes: Any) -> RunConfig:
        """The configuration with some values replaced and checked again."""
        return config_from({**self.flat(), **changes})


PARTS: dict[str, type[Settings]] = {
    "pair": PairSource,
    "reading": Reading,
    "patching": Patching,
    "place": Place,
    "effort": Effort,
}

SETTINGS: dict[str, FieldInfo] = {
    key: field for part in PARTS.values() for key, field in part.by_file_key().items()
}
"""Every setting by its key in a TOML file."""


def config_from(values: Mapping[str, Any], where: str = "the configuration") -> RunConfig:
    """A configuration from plain values by key; the error sentence calls their origin ``where``.

    >>> rq.config_from({"pair": "etiquette", "layer": 1}).patching.layer
    1

    Raises:
        UserError: for an unknown key (the nearest known one is named) or a value that is not
            allowed.
    """
    refuse_unknown(values, SETTINGS, where)
    parts: dict[str, Any] = {name: part.checked(values, where) for name, part in PARTS.items()}
    return RunConfig(**parts)


def read_config(path: Path | str) -> RunConfig:
    """Read a TOML file, or the ``run.json`` of a finished run to repeat it.

    >>> rq.read_config(folder / "run.json").patching.layer
    1

    Raises:
        UserError: if the file is missing, damaged, or has a key or value that is not allowed.
    """
    path = Path(path)
    if os.path.isdir(path):  # noqa: PTH112 - False for what no file system can have
        raise UserError(
            f"{str(path)!r} is a directory, not a configuration: to repeat the run in it, name its "
            f"{str(path / 'run.json')!r}."
        )
    of_run = path.suffix == ".json"
    values = read_text(
        path,
        "configuration file",
        parse=_config_of_run if of_run else tomllib.loads,
        form="a run.json" if of_run else "TOML",
        missing="name a TOML file, or the run.json of a run",
        fix="restore it" if of_run else "write a line per setting, as alpha = 0.5",
    )
    return config_from(values, str(path))


def _config_of_run(text: str) -> dict[str, Any]:
    run = json.loads(text)
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
        raise ValueError("it holds no table of settings")
    # Repeating a stranger's run must not run a stranger's code.
    return {key: value for key, value in run["config"].items() if key != "trust_remote_code"}


def preset_names() -> tuple[str, ...]:
    """The pairs that come with the package.

    >>> rq.preset_names()[:2]
    ('etiquette', 'dialect')
    """
    folder = files("rq4lens.models").joinpath("presets")
    names = [entry.name.removesuffix(".toml") for entry in folder.iterdir()]
    return (*BUILTIN, *sorted(set(names) - set(BUILTIN)))


def preset(name: str) -> RunConfig:
    """The settings of a pair that comes with the package.

    >>> rq.preset("etiquette").patching.control_layer
    2

    Raises:
        UserError: if ``name`` is none of :func:`preset_names`.
    """
    return config_from(tomllib.loads(preset_text(name)), f"preset {name!r}")


def preset_text(name: str) -> str:
    """The TOML file of a preset."""
    if name not in preset_names():
        raise UserError(
            f"pair {name!r} does not exist: choose one of {', '.join(preset_names())}, or give "
            "your own with --base, --tuned and --prompts."
        )
    return files("rq4lens.models").joinpath(f"presets/{name}.toml").read_text(encoding="utf-8")


def refuse_unknown(
    values: Iterable[str], known: Iterable[str], where: str, noun: str = "key"
) -> None:
    """Refuse a key that nobody knows; the sentence names the nearest one."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(known)}."
            raise UserError(f"{where} has unknown {noun} {key!r}: {meant}")


def _not_allowed(where: str, key: str, field: FieldInfo, given: Any, message: str) -> UserError:
    value = (",".join(map(str, given)) if isinstance(given, list | tuple) else str(given))[:80]
    return UserError(
        f"{where}: {key} = {value!r} is not allowed ({message}); it means: {field.description}."
    )
