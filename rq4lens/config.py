"""The typed configuration of a run, from a preset, a TOML file, options, or a finished run."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rq4lens.disk.files import read_regular_file, short_reason
from rq4lens.errors import UserError

SUPPLY = "SUPPLY"
"""Start of a preset's ``prompts`` entry when the user has to bring the file."""

NUMBERS = (
    *("layer", "control_layer", "alpha", "k", "random_seeds", "k_positions", "batch_size"),
    *("resamples", "seed", "max_tokens", "n_devices"),
)


class RunConfig(BaseModel):
    """Everything that decides a run. Field names are the keys of the TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    about: str = Field("", description="what the pair is")
    pair: str = Field("custom", description="name of the pair; one of `rq4lens pairs` or your own")
    base: str | None = Field(None, description="base model: hub id or folder")
    tuned: str | None = Field(None, description="fine-tuned model: hub id or folder")
    base_revision: str | None = Field(None, description="revision of the base hub id")
    tuned_revision: str | None = Field(None, description="revision of the tuned hub id")
    prompts: str | None = Field(
        None, description="JSONL or CSV file, or folder of a saved Hugging Face dataset"
    )
    layer: int | None = Field(None, ge=0, description="layer whose heads are patched")
    control_layer: int | None = Field(None, ge=0, description="the control layer")
    alpha: float = Field(0.3, ge=0, le=1, description="blend strength, from 0 to 1")
    k: tuple[int, ...] = Field((1, 2, 4, 8), description="sizes of top-k and of random sets")
    random_seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), description="seeds of the random-k sets"
    )
    rank_by: Literal["delta", "drop_pct"] = Field("delta", description="score of single heads")
    map_kind: (
        Literal[
            "identity",
            "mean_shift",
            "moments",
            "procrustes",
            "procrustes_scaled",
            "ridge",
            "low_rank",
        ]
        | None
    ) = Field(
        None,
        description="kind of map; left out, the best one kept in RUN/maps, else procrustes_scaled",
    )
    map_scope: Literal["head", "layer"] = Field("head", description="map per head or joint")
    split: str = Field("val", description="split of the prompts that are measured")
    k_positions: int = Field(1, ge=1, description="patched positions, the decision token last")
    raw_baseline: Literal["identity", "moments"] = Field(
        "identity", description="raw patch: base z itself, or matched in mean and spread"
    )
    kl_direction: Literal["patched||clean", "clean||patched"] = Field(
        "patched||clean", description="which way the divergence is taken"
    )
    decision_rule: Literal["last", "last_content", "before_answer", "marker", "offset"] = Field(
        "last", description="at which token of a prompt the next one is compared"
    )
    marker: str | None = Field(None, description="string that rule marker decides at the end of")
    max_tokens: int | None = Field(
        None, ge=1, description="longer prompts lose tokens on the left, but not their BOS"
    )
    exclude_misaligned: bool = Field(
        False, description="leave out prompts that the models do not read alike"
    )
    engine: Literal["suffix", "hooks"] = Field("suffix", description="fast engine, or reference")
    device: str = Field("auto", description="cpu, cuda, cuda:1 and so on, mps, or auto")
    n_devices: int = Field(1, ge=1, description="over how many GPUs each model is spread")
    device_map: str | None = Field(
        None, description="GPUs that each model is spread over, as cuda:0,cuda:2, or auto"
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="number format of the models"
    )
    batch_size: int = Field(32, ge=1, description="prompts per forward pass")
    keep_both: bool | None = Field(
        None, description="hold both models at once; decided by free memory when left out"
    )
    cache: str | None = Field(
        None, description="folder of base activations that runs share; the run's own if left out"
    )
    trust_remote_code: bool = Field(False, description="let a checkpoint run its own code")
    analysis: Literal["full", "grid"] = Field(
        "full", description="full, or grid: only what the grid's own conditions support"
    )
    random_sizes: Literal["affordable", "every", "k"] = Field(
        "affordable",
        description="where random sets are measured: as many k as can be afforded, every k, or k",
    )
    resamples: int = Field(10_000, ge=100, le=1_000_000, description="bootstrap resamples")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of folds, resamples, planted heads")

    @field_validator(*NUMBERS, mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any) -> Any:
        parts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(part, bool) for part in parts):
            raise ValueError("true and false are no numbers")
        return value

    @field_validator("k", "random_seeds", mode="after")
    @classmethod
    def _unique(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(values)) < len(values):
            raise ValueError("a number stands twice in the list")
        return values

    def updated(self, **changes: Any) -> RunConfig:
        """The configuration with some values replaced and checked again."""
        return config_from({**self.model_dump(exclude_unset=True), **changes})


def config_from(values: Mapping[str, Any], where: str = "the configuration") -> RunConfig:
    """Check plain values.

    Raises:
        UserError: for an unknown key (the nearest known one is named) or a value that is not
            allowed.
    """
    for key in values:
        if key not in RunConfig.model_fields:
            raise UserError(f"{where} has unknown key {key!r}: {_nearest(key)}")
    try:
        return RunConfig(**values)
    except ValidationError as problem:
        raise UserError(_sentence(problem, where)) from None


def read_config(path: Path) -> RunConfig:
    """Read a TOML file, or the ``run.json`` of a finished run to repeat it.

    Args:
        path: the file.

    Returns:
        The configuration.

    Raises:
        UserError: if the file is missing, damaged, or has a key or value that is not allowed.
    """
    try:
        text = read_regular_file(path)
    except FileNotFoundError:
        raise UserError(
            f"configuration file {str(path)!r} does not exist: name a TOML file, or the run.json "
            "of a run."
        ) from None
    except IsADirectoryError:
        raise UserError(
            f"{str(path)!r} is a directory, not a configuration: to repeat the run in it, name its "
            f"{str(path / 'run.json')!r}."
        ) from None
    except (OSError, ValueError) as problem:
        raise UserError(
            f"configuration file {str(path)!r} cannot be read: {short_reason(problem)}."
        ) from None
    try:
        values = json.loads(text)["config"] if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise UserError(
            f"configuration file {str(path)!r} is neither TOML nor a run.json: {problem}."
        ) from None
    if path.suffix == ".json" and isinstance(values, dict):
        # Repeating a stranger's run must not run a stranger's code.
        values.pop("trust_remote_code", None)
    if not isinstance(values, dict):
        raise UserError(f"configuration file {str(path)!r} holds no table of settings.")
    return config_from(values, str(path))


def preset_names() -> tuple[str, ...]:
    """The pairs that come with the package."""
    folder = files("rq4lens.models").joinpath("presets")
    names = [entry.name.removesuffix(".toml") for entry in folder.iterdir()]
    # The built-in pair first: it is the one that runs without any download.
    return tuple(sorted(names, key=lambda name: (name != "etiquette", name)))


def preset(name: str) -> RunConfig:
    """The settings of a pair that comes with the package.

    Args:
        name: one of :func:`preset_names`.

    Returns:
        Its configuration.

    Raises:
        UserError: if there is no such pair.
    """
    return config_from(tomllib.loads(preset_text(name)), f"preset {name!r}")


def preset_text(name: str) -> str:
    """The TOML file of a preset.

    Raises:
        UserError: if there is no such pair.
    """
    if name not in preset_names():
        raise UserError(
            f"pair {name!r} does not exist: choose one of {', '.join(preset_names())}, or give "
            "your own with --base, --tuned and --prompts."
        )
    return files("rq4lens.models").joinpath(f"presets/{name}.toml").read_text(encoding="utf-8")


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key, RunConfig.model_fields, n=1)
    return (
        f"did you mean {near[0]!r}?"
        if near
        else f"allowed are {', '.join(RunConfig.model_fields)}."
    )


def _sentence(problem: ValidationError, where: str) -> str:
    first = problem.errors()[0]
    key = ".".join(str(part) for part in first["loc"][:1])
    given = first.get("input")
    value = (",".join(map(str, given)) if isinstance(given, list | tuple) else str(given))[:80]
    message = first["msg"].removeprefix("Value error, ")
    meaning = RunConfig.model_fields[key].description if key in RunConfig.model_fields else ""
    return f"{where}: {key} = {value!r} is not allowed ({message}); it means: {meaning}."
