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
from rq4lens.models.catalog import holds_both, prompts_left_in, size_of, tokens_of
from rq4lens.models.load.devices import Placement, chosen_devices, free_bytes
from rq4lens.models.load.lens import ModelConfig
from rq4lens.models.load.size import estimate_memory, gigabytes
from rq4lens.models.pair import SIDES, require_same_heads
from rq4lens.models.prompts.prompt_set import FIT_SPLIT, TokenizedPrompts
from rq4lens.patching.engines.clean_pass import n_columns
from rq4lens.patching.engines.memory import (
    CPU_BUDGET_BYTES,
    FREE_SHARE_OF_GPU,
    MemoryPlan,
    RowBudget,
    bytes_per_row,
    even_parts,
    key_bytes,
)
from rq4lens.patching.grid import GridPlan

log = logging.getLogger(__name__)

MAIN = "main memory"
"""Where everything is that is on no GPU."""

FIT_COPIES = 6
"""Float64 copies that fitting and judging one layer's map makes of activations and of matrices."""


@dataclass(frozen=True)
class WorkMemory:
    """Bytes of the work on one model.

    ``kept`` is what stays of the clean pass, ``smallest`` what a single prompt and row take.
    """

    kept: int
    kept_on_device: bool
    in_pass: int
    n_prompts_at_once: int
    in_rows: int
    n_rows_at_once: int
    smallest: int
    activations: int
    fit: int


@dataclass(frozen=True)
class RunMemory:
    """A run's needs against what the machine has, in bytes.

    ``held`` are the weights on each device, those of the noise pair (``noise_pair`` bytes) among
    them, and ``largest_model`` the most of a single model.
    """

    weights: dict[str, int]
    keep_both: bool
    dtype: str
    devices: tuple[str, ...]
    held: dict[str, int]
    noise_pair: int
    largest_model: dict[str, int]
    free: dict[str, int]
    work: WorkMemory

    @property
    def needed(self) -> dict[str, int]:
        """The most that each device and main memory hold at once."""
        needed, work = {place: self.held.get(place, 0) for place in self.free}, self.work
        # Base stands behind an engine of its own, which keeps about as much of its clean pass.
        kept = 2 * work.kept if self.keep_both else work.kept
        for place in self.devices:
            needed[place] += max(work.in_pass, work.in_rows) + (kept if work.kept_on_device else 0)
        needed[MAIN] += work.activations + work.fit + (0 if work.kept_on_device else kept)
        return needed

    @property
    def fits(self) -> bool:
        """Whether all of it is free everywhere."""
        return all(n_bytes <= self.free[place] for place, n_bytes in self.needed.items())

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
    def table(self) -> str:
        """What takes how much, where, and what is free there."""
        work, where = self.work, ", ".join(self.devices)
        kept_where = where if work.kept_on_device else MAIN
        rows = [
            *((f"weights of {side}", n, where) for side, n in self.weights.items()),
            *([("weights of the noise pair", self.noise_pair, where)] if self.noise_pair else ()),
            ("clean pass, kept", work.kept, kept_where),
            *([("clean pass of base, kept", work.kept, kept_where)] if self.keep_both else ()),
            (f"clean pass, {work.n_prompts_at_once} prompts at once", work.in_pass, where),
            (f"rows, {work.n_rows_at_once:,} at once", work.in_rows, where),
            ("captured activations", work.activations, MAIN),
            ("fitting maps", work.fit, MAIN),
        ]
        both = "both models at once" if self.keep_both else "one model at a time"
        rows += [
            (f"at most, {both}", n, f"{place}, where {gigabytes(self.free[place])} are free")
            for place, n in self.needed.items()
        ]
        lines = [f"{what:<34}{gigabytes(n):>10}  {place}" for what, n, place in rows]
        if not self.fits:
            short = [place for place, n in self.needed.items() if n > self.free[place]]
            lines.append(f"this does not fit in what is free ({', '.join(short)}):")
            lines += [f"  {each}" for each in self.advice]
        return "\n".join(lines)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to change, in the words of the command line; empty for a run that fits."""
        return () if self.fits else tuple(self._remedies())

    def _remedies(self) -> Iterator[str]:
        if self.dtype in {"float32", "float64"}:
            yield "--dtype bfloat16 takes half of the weights and of all that follows from them"
        if self.noise_pair:
            yield "--no-noise-pair holds no third model"
        if self.keep_both:
            yield "--no-keep-both holds one model at a time"
        if torch.cuda.device_count() > len(self.devices):
            yield f"--n-devices {torch.cuda.device_count()} or --device-map auto use every GPU"
        if self.work.n_prompts_at_once > 1 and self.work.in_pass >= self.work.in_rows:
            half = self.work.n_prompts_at_once // 2
            yield f"--batch-size {half} has half as many prompts in flight"
        yield "--max-tokens N cuts long prompts from the left; fewer prompts need less, too"


def plan_memory(config: RunConfig) -> RunMemory:
    """Estimate a run from the small files of its models and the tokens of its prompts."""
    source, reading, place = config.pair, config.reading, config.place
    devices, prompts = chosen_devices(place), prompts_left_in(source, reading)
    sizes = {side: size_of(source, side, place) for side in SIDES}
    cfg = sizes["tuned"].cfg
    require_same_heads(sizes["base"].cfg, cfg)
    plan = plan_for(config, cfg.n_layers, cfg.n_heads)
    keep_both = holds_both(source, place, sizes.values())
    estimates = {side: estimate_memory(size, devices) for side, size in sizes.items()}
    on = {
        side: Counter({_place(at): n for at, n in sizes[side].weights.on(each.placement).items()})
        for side, each in estimates.items()
    }
    tuned = estimates["tuned"]
    held = on["tuned"] + (on["base"] if keep_both else Counter())
    with_noise = keep_both and config.effort.analysis == "full" and config.effort.noise_pair
    if with_noise:
        held += on["tuned"]  # the noise pair's tuned model
    free = {_place(device): n_bytes for device, n_bytes in tuned.free.items()}
    free.setdefault(MAIN, free_bytes("cpu"))
    left = [max(0, free[place] - n) for place, n in held.items() if place != MAIN]
    work = work_memory(
        config,
        plan,
        cfg,
        tokens_of(source, "tuned", prompts.split(config.patching.split), reading),
        tuned.placement,
        n_train=len(prompts.split(FIT_SPLIT)),
        max_bytes=int(FREE_SHARE_OF_GPU * min(left)) if left else CPU_BUDGET_BYTES,
    )
    return RunMemory(
        weights={side: size.weights.total for side, size in sizes.items()},
        keep_both=keep_both,
        dtype=place.dtype,
        devices=tuple(dict.fromkeys(map(_place, devices.names))),
        held=dict(held),
        noise_pair=sizes["tuned"].weights.total if with_noise else 0,
        largest_model=dict(on["tuned"] | on["base"]),
        free=free,
        work=work,
    )


def work_memory(
    config: RunConfig,
    plan: GridPlan,
    cfg: ModelConfig,
    measured: TokenizedPrompts,
    placement: Placement,
    *,
    n_train: int,
    max_bytes: int | None = None,
) -> WorkMemory:
    """Estimate what one run of the engine, with its maps, takes."""
    patching, n_layers, width = config.patching, len(plan.layers), cfg.n_heads * cfg.d_head
    n_answer = config.reading.answer_tokens
    if n_answer > 1:  # whatever they are
        measured = measured.continued([(0,) * n_answer] * len(measured))
    measured = measured.placed(patching.k_positions)
    n_positions, _ = max(measured.windows)
    # Read of base on train and measured prompts, of tuned on train prompts.
    n_read = (2 * n_train + len(measured)) * measured.n_spots
    joint = patching.map_scope == "layer"
    side, n_blocks = (width, 1) if joint else (cfg.d_head, cfg.n_heads)
    matrices = 4 * n_layers * n_blocks * side**2 + 8 * FIT_COPIES * side**2
    in_main_memory = {
        "activations": n_read * n_layers * width * cfg.dtype.itemsize,
        "fit": 8 * FIT_COPIES * n_train * measured.n_spots * width + matrices,
    }
    if config.place.engine == "hooks":
        longest = int(measured.lengths.max())
        at_once = min(config.place.prompts_per_pass, len(measured))
        one = longest * bytes_per_row(cfg, longest, cfg.d_vocab_out)
        every = at_once * one
        return WorkMemory(0, True, every, at_once, every, at_once, one, **in_main_memory)
    budget = MemoryPlan.of(
        cfg, measured, placement, batch_size=config.place.batch_size, max_bytes=max_bytes
    )
    passes, rows = budget.passes, budget.rows
    n_prompts, n_rows = min(passes.max_rows, len(measured)), rows.max_rows
    if config.effort.analysis == "grid":
        n_rows = min(n_rows, n_prompts * plan.n_patches)
    n_stored_layers = cfg.n_layers - min(plan.layers)
    return WorkMemory(
        kept=n_stored_layers * _clean_pass_bytes(cfg, measured, passes, n_positions),
        kept_on_device=budget.keep_on_device,
        in_pass=n_prompts * passes.bytes_per_row,
        n_prompts_at_once=n_prompts,
        in_rows=n_rows * rows.bytes_per_row,
        n_rows_at_once=n_rows,
        smallest=max(passes.bytes_per_row, rows.bytes_per_row),
        **in_main_memory,
    )


def _clean_pass_bytes(
    cfg: ModelConfig, prompts: TokenizedPrompts, passes: RowBudget, n_positions: int
) -> int:
    """Bytes that the suffix engine stores of each layer."""
    lengths = prompts.lengths.sort().values
    at_positions = n_positions * (cfg.d_model + cfg.n_heads * cfg.d_head) * cfg.dtype.itemsize
    return sum(
        (part.stop - part.start)
        * (key_bytes(cfg, n_columns(int(lengths[part].max()))) + at_positions)
        for part in even_parts(slice(0, len(prompts)), passes.max_rows)
    )


def _place(device: str) -> str:
    return device if torch.device(device).type == "cuda" else MAIN


def say_and_require(memory: RunMemory) -> None:
    """One line in the log for a run that fits, else the table and what to change."""
    if memory.fits:
        parts = (
            f"{gigabytes(n_bytes)} of the {gigabytes(memory.free[place])} free "
            f"{'in' if place == MAIN else 'on'} {place}"
            for place, n_bytes in memory.needed.items()
        )
        log.info("memory: about %s", ", ".join(parts))
        return
    log.warning(memory.table)
    largest, smallest = memory.largest_model, memory.work.smallest
    # What does not fit with one model, one prompt and one row does not fit whatever is halved.
    if any(n + smallest > memory.free[place] for place, n in largest.items()):
        place, weights = max(largest.items(), key=lambda item: item[1])
        raise UserError(
            f"a model of {gigabytes(weights)} and at least {gigabytes(smallest)} for one prompt do "
            f"not fit in the {gigabytes(memory.free[place])} free on {place}: "
            f"{'; '.join(memory.advice)}."
        )
