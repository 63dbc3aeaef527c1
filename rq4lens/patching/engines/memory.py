"""How much the engines store and compute together, by the memory that there is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch

from rq4lens.config import PROMPTS_PER_PASS, Place
from rq4lens.errors import UserError
from rq4lens.models.load.devices import Placement, free_bytes
from rq4lens.models.load.lens import HookedModel, HookedTransformer, ModelConfig
from rq4lens.models.prompts.prompt_set import TokenizedPrompts

logger = logging.getLogger("rq4lens")

CPU_BUDGET_BYTES = 512 * 2**20
"""Small enough that a chunk's largest tensors do not crowd out everything else on a laptop."""

CPU_MAX_ROWS = 4096
"""More rows than this only push each other out of a processor's caches."""

FEWEST_CONDITIONS = 32
"""Conditions that stay together as long as memory allows."""

GPU_PROMPTS = 256
"""Prompts in a clean pass on a GPU, if they fit: with few, its rows are too few to keep it busy."""

FREE_SHARE_OF_GPU = 0.5
"""Share of the free GPU memory that is used unless told otherwise."""


def is_main_memory(device: torch.device) -> bool:
    """Whether a device has no memory of its own."""
    return device.type != "cuda"


def default_budget_bytes(device: torch.device) -> int:
    """Memory for the rows in flight when the user names none."""
    if is_main_memory(device):
        return CPU_BUDGET_BYTES
    return int(FREE_SHARE_OF_GPU * free_bytes(str(device)))


@dataclass(frozen=True)
class RowBlock:
    """Some prompts by some conditions: the rows that are computed together.

    ``whole_conditions`` divides prompts alone as long as all conditions of one fit, so that no part
    brings a clean reference of its own.
    """

    prompts: slice
    conditions: slice
    whole_conditions: bool = False

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return _size(self.prompts) * _size(self.conditions)

    def split(self, max_rows: int) -> list[RowBlock]:
        """Blocks of at most ``max_rows`` rows; conditions are divided first if they may be.

        They are sorted by the layer at which they enter, so a part of them starts at few layers and
        its products are large at all of them. Below a few conditions, the clean reference that
        each part brings along would be felt, and prompts are divided instead.
        """
        fewest = _size(self.conditions) if self.whole_conditions else FEWEST_CONDITIONS
        per_part = max(max_rows // _size(self.prompts), min(max_rows, fewest))
        conditions = even_parts(self.conditions, per_part)
        widest = max(map(_size, conditions))
        prompts = even_parts(self.prompts, max(1, max_rows // widest))
        kept = self.whole_conditions
        return [RowBlock(some, part, kept) for part in conditions for some in prompts]


def _size(part: slice) -> int:
    return part.stop - part.start


def even_parts(whole: slice, largest: int) -> list[slice]:
    """The slice in parts of nearly equal size, none above ``largest``."""
    size = _size(whole)
    n_parts = max(1, -(-size // largest))
    edges = [whole.start + size * part // n_parts for part in range(n_parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


@dataclass
class RowBudget:
    """Rows that are computed together, and how memory limited them.

    ``bytes_per_row`` is what one row is expected to need at its widest point. ``max_rows`` follows
    from it and is halved when memory runs out.
    """

    budget_bytes: int
    bytes_per_row: int
    max_rows: int = field(init=False)
    largest_chunk_rows: int = 0
    n_chunks: int = 0
    n_out_of_memory: int = 0

    def __post_init__(self) -> None:
        self.max_rows = max(1, self.budget_bytes // self.bytes_per_row)

    def run(self, whole: RowBlock, work: Callable[[RowBlock], None]) -> None:
        """Work through a block in pieces that fit, halving the pieces when memory runs out.

        What is finished stays finished: only the piece that failed is divided and tried again.
        """
        pending = [whole] if whole.n_rows else []
        while pending:
            block = pending.pop()
            if block.n_rows > self.max_rows:
                pending.extend(reversed(block.split(self.max_rows)))
            elif not self._fits(block, work):
                self._shrink(block)
                pending.append(block)

    def _fits(self, block: RowBlock, work: Callable[[RowBlock], None]) -> bool:
        try:
            work(block)
        except torch.OutOfMemoryError:
            return False
        self.n_chunks += 1
        self.largest_chunk_rows = max(self.largest_chunk_rows, block.n_rows)
        return True

    def _shrink(self, block: RowBlock) -> None:
        # Outside the handler of the error, which would keep the failed tensors alive.
        if block.n_rows == 1:
            raise UserError(
                "memory ran out with a single prompt and condition in flight: use shorter prompts, "
                "a smaller dtype such as bfloat16, or a device with more free memory."
            )
        self.n_out_of_memory += 1
        self.max_rows = block.n_rows // 2
        logger.warning("memory ran out at %d rows; going on with %d", block.n_rows, self.max_rows)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class MemoryPlan:
    """Where the clean pass is stored, and how much is computed together, on each device by itself.

    A row of ``passes`` is a prompt, a row of ``rows`` a prompt under one condition. The clean pass
    is stored in main memory when it would take more than half of the device memory asked for.
    """

    passes: RowBudget
    rows: RowBudget
    keep_on_device: bool

    @classmethod
    def of(
        cls,
        cfg: ModelConfig,
        prompts: TokenizedPrompts,
        placement: Placement,
        *,
        batch_size: int | None = None,
        max_bytes: int | None = None,
        rows_copy_keys: bool = False,
    ) -> MemoryPlan:
        """Divide a memory budget."""
        devices = placement.devices
        if max_bytes is None:
            max_bytes = min(default_budget_bytes(device) for device in devices)
        longest = int(prompts.lengths.max())
        keys = int(stored_bytes_per_prompt(cfg, longest) * placement.largest_share)
        shares_memory = all(is_main_memory(device) for device in devices)
        compared = 4 * cfg.d_vocab_out * prompts.longest_answer
        kept = (keys + compared) * len(prompts)
        keep_on_device = shares_memory or kept <= max_bytes // 2
        # What is stored in main memory is not what the budget is about.
        left = max_bytes - (0 if shares_memory else min(kept, max_bytes // 2))
        # A pass through the model's own cache ends with logits everywhere.
        vocab = cfg.d_vocab_out if rows_copy_keys else 0
        passes = RowBudget(left, longest * bytes_per_row(cfg, longest, vocab) + keys)
        in_row = bytes_per_row(
            cfg, longest, cfg.d_vocab_out, max(prompts.windows), sums_in_place=not shares_memory
        )
        rows = RowBudget(left, in_row + keys * rows_copy_keys)
        at_once = batch_size or (PROMPTS_PER_PASS if shares_memory else GPU_PROMPTS)
        passes.max_rows = min(passes.max_rows, at_once)
        if shares_memory:
            rows.max_rows = min(rows.max_rows, CPU_MAX_ROWS)
        return cls(passes, rows, keep_on_device)

    def report(self) -> dict[str, Any]:
        """What was asked for and used, for the record of a run."""
        return {
            "kept_on_device": self.keep_on_device,
            "clean_pass": asdict(self.passes),
            "rows": asdict(self.rows),
        }


def stored_bytes_per_prompt(cfg: ModelConfig, n_pos: int) -> int:
    """Memory of one prompt's keys and values over all layers."""
    return cfg.n_layers * key_bytes(cfg, n_pos)


def key_bytes(cfg: ModelConfig, n_pos: int) -> int:
    """Memory of one prompt's keys and values in one layer."""
    n_kv_heads = cfg.n_key_value_heads or cfg.n_heads
    return 2 * n_pos * n_kv_heads * cfg.d_head * cfg.dtype.itemsize


def bytes_per_row(
    cfg: ModelConfig,
    n_pos: int,
    vocab: int,
    window: tuple[int, int] = (1, 1),
    *,
    sums_in_place: bool = False,
) -> int:
    """Memory of one row at its widest point, estimated from above.

    ``window`` is how many positions it has, and at how many of them it has logits.

    The three wide points are not reached together: attention (queries, scores and their copies),
    the MLP, and the vocabulary (logits, and their differences in float32 or better, which a GPU's
    kernel does not store).
    """
    size, (n_positions, n_answer) = cfg.dtype.itemsize, window
    always = 6 * cfg.d_model * max(size, 4)
    attention = size * cfg.n_heads * (8 * cfg.d_head + 4 * n_pos)
    mlp = 5 * size * (cfg.d_mlp or 0) * (cfg.experts_per_token or 1)
    logits = n_answer * vocab * (2 * size + (0 if sums_in_place else 2 * max(size, 4)))
    return n_positions * always + max(n_positions * attention, n_positions * mlp, logits)


def prompt_parts(
    model: HookedModel, prompts: TokenizedPrompts, place: Place
) -> list[tuple[int, ...]]:
    """The batches of the clean pass. Nothing passes between them, but rounding depends on them.

    An engine that is given one part alone therefore repeats the very products of an engine that is
    given all prompts.
    """
    order = torch.argsort(prompts.lengths, stable=True)
    if place.engine == "hooks" or not isinstance(model, HookedTransformer):
        return [tuple(rows.tolist()) for rows in order.split(place.prompts_per_pass)]
    memory = MemoryPlan.of(model.cfg, prompts, Placement.of(model), batch_size=place.batch_size)
    parts = even_parts(slice(0, len(prompts)), memory.passes.max_rows)
    return [tuple(order[part].tolist()) for part in parts]
