"""A job, which is a run or a sweep, and its pieces, which any process measures in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from rq4lens.config import RunConfig, config_from
from rq4lens.disk.files import make_directory, read_json, refuse_damage, write_json_atomic
from rq4lens.disk.run import JOB
from rq4lens.disk.store import Store, content_key
from rq4lens.errors import UserError
from rq4lens.jobs.bench import plan_for
from rq4lens.models.load.devices import resolve_device
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.patching.activations import check_layers
from rq4lens.patching.grid import GridPlan
from rq4lens.patching.measured import patches_of, recorded_together
from rq4lens.patching.patch import Patch, into_side
from rq4lens.results import EVERY, EVERY_LAYER

Command = Literal["run", "sweep"]

PIECES = "pieces"
FORMAT = 3

ELSEWHERE = {
    *("about", "base", "tuned", "base_revision", "tuned_revision", "prompts", "trust_remote_code"),
    *("device", "n_devices", "device_map", "batch_size", "keep_both", "cache", "engine"),
    *("analysis", "random_sizes", "resamples"),
}
"""Settings that may differ between the processes of a job: models and prompts are compared by their
content, and the others change no measured number."""


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Args:
        command: ``"run"`` for the main job of one layer, ``"sweep"`` for the grid of several.
        config: the pair and how to patch.
        layers: the layers of a sweep; None are all of them.
    """

    command: Command
    config: RunConfig
    layers: tuple[int, ...] | None = None

    def plans(self, pair: ModelPair) -> list[GridPlan]:
        """The grids that are measured, checked against the pair.

        Raises:
            UserError: if a layer or k does not fit the models, or a run names no layer.
        """
        if self.command == "run":
            return [plan_for(self.config, pair.n_layers, pair.n_heads)]
        layers = tuple(range(pair.n_layers)) if self.layers is None else self.layers
        check_layers(layers, pair.n_layers)
        return [
            GridPlan(pair.n_heads, self.config.patching.but(layer=layer, control_layer=None))
            for layer in inward(sorted(set(layers)))
        ]


@dataclass(frozen=True)
class Piece:
    """Patches that are measured together; a piece may be measured any number of times.

    Args:
        patches: the patches, all into one model.
        job: key of the job that the piece belongs to, empty while none is known.
        prompts: ids of the prompts that they are measured on; all measured prompts when empty.
    """

    patches: tuple[Patch, ...]
    job: str = ""
    prompts: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its layer, patches and prompts, short enough for a file name."""
        layer = self.patches[0].layer
        where = EVERY if layer == EVERY_LAYER else f"L{layer}"
        of = f"_of_{len(self.prompts)}_prompts" if self.prompts else ""
        return f"{where}_{len(self.patches)}_patches_{into_side(self.patches[0])}{of}"

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides what is measured, by name."""
        whole = {
            "job": self.job,
            "patches": [
                [each.layer, list(each.heads), float(each.alpha), each.source]
                for each in self.patches
            ],
        }
        return {**whole, "prompts": list(self.prompts)} if self.prompts else whole

    @property
    def whole(self) -> Piece:
        """The same patches on all measured prompts."""
        return replace(self, prompts=())

    @property
    def key(self) -> str:
        """Hash of its content."""
        return content_key(self.to_dict())

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose maps it needs."""
        layers = dict.fromkeys(each.layer for each in self.patches)
        return tuple(layer for layer in layers if layer != EVERY_LAYER)

    def describe(self) -> str:
        """The piece in a few words."""
        first, last = self.patches[0], self.patches[-1]
        where = "every layer" if first.layer == EVERY_LAYER else f"layer {first.layer}"
        on = f" on {len(self.prompts)} prompts from {self.prompts[0]!r}" if self.prompts else ""
        to = f" to {last.source} of {last.heads}" if last != first else ""
        return f"{where} of {into_side(first)} from {first.source} of {first.heads}{to}{on}"


def pieces_of(plans: Sequence[GridPlan], device: str, job: str = "") -> list[Piece]:
    """Every patch whose head set is known beforehand, in pieces; top-k sets are for the merge."""
    # A piece is a chunk that a single process measures together too, so that its numbers are the
    # same to the last digit wherever it is measured.
    pieces: list[Piece] = []
    seen: set[Patch] = set()
    for plan in plans:
        new = [patch for patch in patches_of(plan.fixed()) if patch not in seen]
        seen |= set(new)
        pieces += (Piece(tuple(chunk), job) for chunk in recorded_together(new, device))
    return pieces


def divided(pieces: Sequence[Piece], parts: Sequence[tuple[str, ...]]) -> list[Piece]:
    """Pieces that cover a part of the prompts each."""
    return [replace(piece, prompts=part) for part in parts for piece in pieces]


def inward(layers: Sequence[int]) -> list[int]:
    """Lowest and highest in turn, so that equal parts of the list cost about the same.

    A row patched at a layer runs through all layers above: low layers cost more.
    """
    in_turn = chain.from_iterable(zip(layers, reversed(layers), strict=True))
    return list(in_turn)[: len(layers)]


@dataclass(frozen=True)
class Job:
    """What the processes that share a run directory agree on.

    ``identity`` is everything that decides its numbers, ``layers`` are the layer and control layer
    of each grid, and ``n_shards`` is into how many shares the first process divided it.
    ``prompt_parts`` are ids of the prompts that pieces cover; empty where each covers all.
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
        return pieces_of(plans, self.identity["device"], content_key(self.identity))

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
