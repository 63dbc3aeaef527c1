"""Runs that were finished before: not replaced unasked, and with a shared cache not made twice."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import rq4lens
from rq4lens.config import RunConfig, read_config
from rq4lens.disk.files import make_directory, read_json, read_regular_bytes, write_bytes_atomic
from rq4lens.disk.run import ACTIVATIONS, RUN, file_sha256
from rq4lens.disk.store import NamedIngredients, Store
from rq4lens.errors import UserError

if TYPE_CHECKING:
    from rq4lens.models.pair import ModelPair

SAME_RUN = {
    *("about", "trust_remote_code", "device", "n_devices", "device_map", "batch_size"),
    *("keep_both", "cache", "engine", "analysis", "random_sizes"),
}
"""Settings that change no number of a run, or only add to them."""

LIBRARIES = ("torch", "transformer-lens", "transformers", "numpy", "scipy", "scikit-learn")

MOST_KNOWN = 4
"""So many folders that hold the same run are remembered: one of them may go, or grow."""

SETTLED_NS = 10**9
"""A file that was changed more recently can change again without another time of change."""


def refuse_other_run(config: RunConfig, directory: Path, pair: ModelPair | None = None) -> None:
    """Refuse to replace a finished run of other settings, or of other models in memory.

    Raises:
        UserError: if the directory holds one; the sentence names what differs.
    """
    try:
        before = read_config(directory / RUN).flat(defaults=True)
    except UserError:
        return  # there is no finished run, or none that can be read
    now = config.flat(defaults=True)
    differing = [name for name in now if now[name] != before[name] and name not in SAME_RUN]
    what = [f"{name} {before[name]} there, {now[name]} here" for name in differing]
    what += [] if pair is None else _other_models(pair, directory)
    if what:
        raise UserError(
            f"{str(directory)!r} holds a finished run of other settings ({'; '.join(what)}): name "
            "another folder (--out), or replace that run (--replace; in Python replace=True)."
        )


def _other_models(pair: ModelPair, directory: Path) -> list[str]:
    """The models of a pair in memory that are not those of a finished run."""
    then, key = read_json(directory / RUN)["models"], "weights_fingerprint"
    return [
        f"another {side} model"
        for side, member in pair.members.items()
        if getattr(member.card, key) != then[side][key]
    ]


class FinishedFiles(NamedTuple):
    """A finished run: where it lies, and the checksums of its files."""

    directory: Path
    files: Mapping[str, str]

    @property
    def is_whole(self) -> bool:
        """Whether all files are what they were."""
        return all(file_sha256(self.directory / name) == self.files[name] for name in self.files)

    def copy_to(self, directory: Path) -> None:
        """Copy all files; the one by which a run is known as finished comes last."""
        for name in sorted(self.files, key=lambda name: name == RUN):
            make_directory((directory / name).parent)
            write_bytes_atomic(directory / name, read_regular_bytes(self.directory / name))


class Finished:
    """Which run of a shared cache is the same as one that is about to be made.

    The same are all settings, the prompts, the files of both models, the code, its libraries and
    the kind of device. A model's file counts by its path, size and times of change, so that none
    is read; one that changed a moment ago is not trusted.

    Args:
        config: the run.
        cache: the shared cache.
    """

    def __init__(self, config: RunConfig, cache: Path) -> None:
        self.config = config
        self.store = Store(cache)
        self.made_of = self._made_of()

    def _made_of(self) -> NamedIngredients | None:
        """Everything that can change a file of the run; None while files may be changing."""
        from rq4lens.models.catalog import checkpoints_of, prompts_of  # noqa: PLC0415 - loads torch
        from rq4lens.models.load.devices import resolve_device  # noqa: PLC0415
        from rq4lens.models.load.fingerprint import file_states  # noqa: PLC0415

        config, pair = self.config.flat(defaults=True), self.config.pair
        try:
            checkpoints = checkpoints_of(pair, with_weights=False).values()
            every = [file for each in checkpoints for part in file_states(each) for file in part]
            prompts = prompts_of(pair).fingerprint
        except UserError:
            return None  # not fetched yet, or refused where it is read
        if time.time_ns() - max(file.changed_ns for file in every) < SETTLED_NS:
            return None
        values = {
            "config": {name: config[name] for name in config if name not in ("about", "cache")},
            "models": [[str(file.path), *file[1:]] for file in every],
            "prompts": prompts,
            "code": _code(),
            "libraries": {name: version(name) for name in LIBRARIES},
            "device": resolve_device(self.config.place.device).partition(":")[0],
        }
        return NamedIngredients("run", values)

    @cached_property
    def same(self) -> FinishedFiles | None:
        """The same run, if there is one all of whose files are what they were."""
        return next((each for each in self._known() if each.is_whole), None)

    def _known(self) -> list[FinishedFiles]:
        found = self.store.get(self.made_of) if self.made_of else None
        return [FinishedFiles(Path(each["directory"]), each["files"]) for each in found or ()]

    def remember(self, directory: Path) -> None:
        """Say in the cache where the run lies, now that it is finished."""
        if self.made_of is None or self._made_of() != self.made_of:
            return  # something was changed meanwhile
        inside = ((path, path.relative_to(directory)) for path in sorted(directory.rglob("*")))
        files = {
            str(name): file_sha256(path)
            for path, name in inside
            if path.is_file() and name.parts[0] != ACTIVATIONS
        }
        every = [{"directory": str(directory.resolve()), "files": files}]
        every += [{"directory": str(each.directory), "files": each.files} for each in self._known()]
        self.store.put(self.made_of, every[:MOST_KNOWN])


def _code() -> str:
    """A hash of the package's own code."""
    code = hashlib.sha256()
    for path in sorted(Path(rq4lens.__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()
