"""The job that the pieces of a run directory belong to, and which of them are done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rq4lens.cluster.pieces import Piece, Request, divided, pieces_of
from rq4lens.config import config_from
from rq4lens.disk.files import make_directory, read_json, refuse_damage, write_json_atomic
from rq4lens.disk.run import JOB
from rq4lens.disk.store import Store, content_key
from rq4lens.errors import UserError
from rq4lens.models.catalog import resolve_device
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.patching.grid import GridPlan

PIECES = "pieces"
FORMAT = 2

ELSEWHERE = {
    *("about", "base", "tuned", "base_revision", "tuned_revision", "prompts", "trust_remote_code"),
    *("device", "n_devices", "device_map", "batch_size", "keep_both", "cache", "engine"),
    *("analysis", "random_sizes", "resamples"),
}
"""Settings that may differ between the processes of a job: models and prompts are compared by their
content, and the others change no measured number."""


@dataclass(frozen=True)
class Job:
    """What the processes that share a run directory agree on.

    Args:
        identity: everything that decides its numbers: settings, fingerprints, kind of device.
        layers: the layer and control layer of each grid.
        n_shards: into how many shares the first process divided it; 1 where it did not.
        prompt_parts: ids of the prompts of the parts that pieces cover; empty where each covers
            all.
    """

    request: Request
    identity: Mapping[str, Any]
    n_heads: int
    n_prompts: int
    layers: tuple[tuple[int, int | None], ...]
    n_shards: int = 1
    prompt_parts: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, request: Request, pair: ModelPair, n_shards: int = 1) -> Job:
        """The job of a request, once both models were loaded; its prompts are not divided."""
        config, plans = request.config, request.plans(pair)
        every = config.flat(defaults=True)
        cards = {side: pair.member(side).card for side in SIDES}
        layers = tuple((plan.layer, plan.control_layer) for plan in plans)
        identity = {
            "command": request.command,
            "settings": {key: value for key, value in every.items() if key not in ELSEWHERE},
            "layers": [list(each) for each in layers],
            "weights": {side: card.weights_fingerprint for side, card in cards.items()},
            "configs": {side: card.config_fingerprint for side, card in cards.items()},
            "prompts": pair.prompts.fingerprint,
            "device": kind_of_device(config.place.device),
        }
        n_prompts = len(pair.prompts.split(config.patching.split))
        return cls(request, identity, pair.n_heads, n_prompts, layers, n_shards)

    def pieces(self) -> list[Piece]:
        """All of its pieces, in order; no model is needed to name them."""
        return divided(self.wholes(), self.prompt_parts) if self.prompt_parts else self.wholes()

    def wholes(self) -> list[Piece]:
        """Its conditions in pieces that cover all prompts."""
        patching = self.request.config.patching
        plans = [
            GridPlan(self.n_heads, patching.but(layer=layer, control_layer=control))
            for layer, control in self.layers
        ]
        return pieces_of(plans, content_key(self.identity))

    def rows(self, piece: Piece) -> int:
        """How many rows (prompt x patch) a piece has."""
        return len(piece.patches) * (len(piece.prompts) or self.n_prompts)

    def unjoined(self, marks: Store) -> list[Piece]:
        """Conditions that are not there for all prompts, though some of their parts may be."""
        return [whole for whole in self.wholes() if marks.get(whole) is None]

    def missing(self, marks: Store) -> list[int]:
        """Places of the pieces that are not done."""
        unjoined = {whole.key for whole in self.unjoined(marks)}
        return [
            place
            for place, piece in enumerate(self.pieces())
            if piece.whole.key in unjoined and (not piece.prompts or marks.get(piece) is None)
        ]

    def join(self, directory: Path) -> Job:
        """Write the job into its run directory, or check that the one there is the same."""
        path, request = directory / JOB, self.request
        if not path.exists():
            make_directory(directory)
            about = {
                "format": FORMAT,
                "command": request.command,
                "config": request.config.flat(),
                "asked_layers": request.layers,
            }
            agreed = {name: value for name, value in vars(self).items() if name != "request"}
            write_json_atomic(path, {**about, **agreed})
        other = read_job(directory, trust_remote_code=request.config.pair.trust_remote_code)
        if other.identity != self.identity:
            what = ", ".join(sorted(_differences(other.identity, self.identity)))
            raise UserError(
                f"{str(directory)!r} holds shares of another job ({what} differ): choose another "
                "--out, or give the settings and files that it was begun with."
            )
        return replace(self, n_shards=other.n_shards, prompt_parts=other.prompt_parts)


_JOB = TypeAdapter(Job)


def read_job(directory: Path, *, trust_remote_code: bool = False) -> Job:
    """Read the job of a run directory."""
    path = directory / JOB
    if not path.is_file():
        raise UserError(
            f"{str(directory)!r} holds no shares ({JOB} is missing): name the folder that "
            "`rq4lens run`, `sweep` or `study` wrote to with --shard I/N --out DIR."
        )
    record = read_json(path)
    with refuse_damage(repr(str(path)), "delete it and run one share again"):
        if record["format"] != FORMAT:
            raise ValueError(f"format {str(record['format'])[:20]!r}")
        values = {**record["config"], "trust_remote_code": trust_remote_code}
        request = {
            "command": record["command"],
            "config": config_from(values, str(path)),
            "layers": record["asked_layers"],
        }
        return _JOB.validate_python({**record, "request": request})


def kind_of_device(device: str) -> str:
    """``"cpu"`` or ``"cuda"``: numbers are kept apart by what computed them."""
    return resolve_device(device).partition(":")[0]


def _differences(one: Any, other: Any, path: str = "") -> set[str]:
    """Names of the values in which two identities differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = set(one) | set(other)
        return {
            each for name in names for each in _differences(one.get(name), other.get(name), name)
        }
    return set() if one == other else {path}
