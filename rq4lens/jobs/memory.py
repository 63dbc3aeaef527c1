"""What a run will take in memory: worked out before any weight is read, printed and recorded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rq4lens.config import RunConfig
from rq4lens.errors import UserError
from rq4lens.jobs.bench import plan_for
from rq4lens.models.catalog import (
    devices_of,
    holds_both,
    prompts_left_in,
    size_of,
    tokens_from_config,
)
from rq4lens.models.load.devices import Placement, free_bytes
from rq4lens.models.load.size import ModelSize, estimate_memory, gigabytes
from rq4lens.models.pair import SIDES, require_same_heads
from rq4lens.models.prompts.prompt_set import FIT_SPLIT
from rq4lens.patching.engines.memory import (
    CPU_BUDGET_BYTES,
    FREE_SHARE_OF_GPU,
    WorkMemory,
    work_memory,
)

log = logging.getLogger(__name__)

MAIN = "main memory"
"""Where everything is that is on no GPU."""


@dataclass(frozen=True)
class RunMemory:
    """A run's needs against what the machine has, in bytes.

    Args:
        weights: of each model, by side; exact.
        keep_both: whether both models are held at once.
        dtype: type of the weights.
        devices: where the blocks are: GPUs by name, or main memory.
        held: weights on each device while the tuned model is measured.
        largest_model: the most weights of a single model on each device.
        free: what is free on each device, and in main memory.
        work: everything besides weights.
    """

    weights: dict[str, int]
    keep_both: bool
    dtype: str
    devices: tuple[str, ...]
    held: dict[str, int]
    largest_model: dict[str, int]
    free: dict[str, int]
    work: WorkMemory

    @property
    def needed(self) -> dict[str, int]:
        """The most that each device and main memory hold at once."""
        needed = {place: self.held.get(place, 0) for place in self.free}
        for place in self.devices:
            needed[place] += self.work.on_device
        needed[MAIN] += self.work.in_main_memory
        return needed

    @property
    def fits(self) -> bool:
        """Whether all of it is free everywhere."""
        return all(n_bytes <= self.free[place] for place, n_bytes in self.needed.items())

    @property
    def can_start(self) -> bool:
        """Whether a single model, with one prompt and one row in flight, fits on its devices."""
        return all(
            n_bytes + self.work.smallest <= self.free[place]
            for place, n_bytes in self.largest_model.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain JSON values, for ``run.json``."""
        return {
            "weights_bytes": self.weights,
            "keep_both": self.keep_both,
            "needed_bytes": self.needed,
            "free_bytes": self.free,
            "fits": self.fits,
            **{f"work_{name}": value for name, value in asdict(self.work).items()},
        }

    @property
    def line(self) -> str:
        """One line for a run that fits."""
        parts = (
            f"{gigabytes(n_bytes)} of the {gigabytes(self.free[place])} free "
            f"{'in' if place == MAIN else 'on'} {place}"
            for place, n_bytes in self.needed.items()
        )
        return f"memory: about {', '.join(parts)}"

    @property
    def table(self) -> str:
        """What takes how much, where, and what is free there."""
        work, where = self.work, ", ".join(self.devices)
        kept_where = where if work.kept_on_device else MAIN
        rows = [
            *((f"weights of {side}", n, where) for side, n in self.weights.items()),
            ("clean pass, kept", work.kept, kept_where),
            (f"clean pass, {work.n_prompts_at_once} prompts at once", work.in_pass, where),
            (f"rows, {work.n_rows_at_once:,} at once", work.in_rows, where),
            ("captured activations", work.activations, MAIN),
            ("fitting maps", work.fit, MAIN),
        ]
        both = "both models at once" if self.keep_both else "one model at a time"
        lines = [f"{what:<34}{gigabytes(n):>10}  {place}" for what, n, place in rows]
        for place, n_bytes in self.needed.items():
            lines.append(
                f"{f'at most, {both}':<34}{gigabytes(n_bytes):>10}  {place}, where "
                f"{gigabytes(self.free[place])} are free"
            )
        return "\n".join([*lines, *self.advice])

    @property
    def advice(self) -> tuple[str, ...]:
        """What to change, in the words of the command line; empty for a run that fits."""
        return () if self.fits else tuple(self._remedies())

    def _remedies(self) -> Iterator[str]:
        short = [place for place, n in self.needed.items() if n > self.free[place]]
        yield f"this does not fit in what is free ({', '.join(short)}):"
        if self.dtype in {"float32", "float64"}:
            yield "  --dtype bfloat16 takes half of the weights and of all that follows from them"
        if self.keep_both:
            yield "  --no-keep-both holds one model at a time"
        if torch.cuda.device_count() > len(self.devices):
            yield f"  --n-devices {torch.cuda.device_count()} or --device-map auto use every GPU"
        if self.work.n_prompts_at_once > 1 and self.work.in_pass >= self.work.in_rows:
            half = self.work.n_prompts_at_once // 2
            yield f"  --batch-size {half} has half as many prompts in flight"
        yield "  --max-tokens N cuts long prompts from the left; fewer prompts need less, too"

    def require_start(self) -> None:
        """Refuse what cannot be measured whatever is halved.

        Raises:
            UserError: a single model with one prompt in flight does not fit.
        """
        if not self.can_start:
            place = max(self.largest_model, key=lambda each: self.largest_model[each])
            raise UserError(
                f"a model of {gigabytes(self.largest_model[place])} and at least "
                f"{gigabytes(self.work.smallest)} for one prompt do not fit in the "
                f"{gigabytes(self.free[place])} free on {place}: "
                + "; ".join(each.strip() for each in tuple(self._remedies())[1:])
                + "."
            )


def plan_memory(config: RunConfig) -> RunMemory:
    """Estimate a run from the small files of its models and the tokens of its prompts.

    Raises:
        UserError: if a model, its tokenizer or the prompts cannot be read, or the models do not
            belong together, or a layer or k does not fit them.
    """
    devices, prompts = devices_of(config), prompts_left_in(config)
    sizes = {side: size_of(config, side) for side in SIDES}
    cfg = sizes["tuned"].cfg
    require_same_heads(sizes["base"].cfg, cfg)
    plan, keep_both = plan_for(config, cfg.n_layers, cfg.n_heads), holds_both(config)
    estimates = {side: estimate_memory(size, devices) for side, size in sizes.items()}
    on = {side: _by_place(sizes[side], each.placement) for side, each in estimates.items()}
    tuned = estimates["tuned"]
    held = Counter(on["tuned"]) + Counter(on["base"] if keep_both else {})
    largest = Counter(on["tuned"]) | Counter(on["base"])
    free = {_place(device): n_bytes for device, n_bytes in tuned.free.items()}
    free.setdefault(MAIN, free_bytes("cpu"))
    left = [max(0, free[place] - n) for place, n in held.items() if place != MAIN]
    work = work_memory(
        cfg,
        tokens_from_config(config, "tuned", prompts.split(config.patching.split)),
        tuned.placement,
        layers=plan.layers,
        n_train=len(prompts.split(FIT_SPLIT)),
        max_bytes=int(FREE_SHARE_OF_GPU * min(left)) if left else CPU_BUDGET_BYTES,
        n_conditions=plan.n_patches if config.effort.analysis == "grid" else None,
        k_positions=config.patching.k_positions,
        batch_size=config.place.batch_size,
        joint_maps=config.patching.map_scope == "layer",
        by_hooks=config.place.engine == "hooks",
    )
    return RunMemory(
        weights={side: size.weights.total for side, size in sizes.items()},
        keep_both=keep_both,
        dtype=config.place.dtype,
        devices=tuple(dict.fromkeys(map(_place, devices.names))),
        held=dict(held),
        largest_model=dict(largest),
        free=free,
        work=work,
    )


def _by_place(size: ModelSize, placement: Placement) -> dict[str, int]:
    return {_place(device): n for device, n in size.weights.on(placement).items()}


def _place(device: str) -> str:
    return device if torch.device(device).type == "cuda" else MAIN


def say_and_require(memory: RunMemory) -> None:
    """One line in the log for a run that fits, else the table and what to change.

    Raises:
        UserError: not even a single model with one prompt in flight fits.
    """
    if memory.fits:
        log.info(memory.line)
        return
    log.warning(memory.table)
    memory.require_start()
