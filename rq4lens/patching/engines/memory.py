"""What the engines keep and compute together, and what measuring will take in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from transformer_lens import HookedTransformerConfig

from rq4lens.errors import UserError
from rq4lens.models.load.devices import Placement
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.engines.clean_pass import n_columns

logger = logging.getLogger("rq4lens")

CPU_BUDGET_BYTES = 512 * 2**20
"""Small enough that a chunk's largest tensors do not crowd out everything else on a laptop."""

CPU_MAX_ROWS = 4096
"""More rows than this only push each other out of a processor's caches."""

CPU_MAX_PROMPTS = 32
"""For the same reason, prompts of one clean forward pass on a CPU."""

FEWEST_CONDITIONS = 32
"""Conditions that stay together as long as memory allows."""

FREE_SHARE_OF_GPU = 0.5
"""Share of the free GPU memory that is used unless told otherwise."""


def is_main_memory(device: torch.device) -> bool:
    """Whether a device has no memory of its own."""
    return device.type != "cuda"


def default_budget_bytes(device: torch.device) -> int:
    """Memory for the rows in flight when the user names none."""
    if is_main_memory(device):
        return CPU_BUDGET_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(FREE_SHARE_OF_GPU * (free + reusable))


@dataclass(frozen=True)
class Block:
    """Some prompts by some conditions: the rows that are computed together."""

    prompts: slice
    conditions: slice

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return self.prompts.stop - self.prompts.start

    @property
    def n_conditions(self) -> int:
        """Number of conditions."""
        return self.conditions.stop - self.conditions.start

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.n_prompts * self.n_conditions

    def split(self, max_rows: int) -> list[Block]:
        """Blocks of at most ``max_rows`` rows; conditions are divided first.

        They are sorted by the layer at which they enter, so a part of them starts at few layers and
        its products are large at all of them. Below a few conditions, the clean reference that
        each part brings along would be felt, and prompts are divided instead.
        """
        per_part = max(max_rows // self.n_prompts, min(max_rows, FEWEST_CONDITIONS))
        conditions = even_parts(self.conditions, per_part)
        widest = max(part.stop - part.start for part in conditions)
        prompts = even_parts(self.prompts, max(1, max_rows // widest))
        return [Block(some, part) for part in conditions for some in prompts]


def even_parts(whole: slice, largest: int) -> list[slice]:
    """The slice in parts of nearly equal size, none above ``largest``."""
    size = whole.stop - whole.start
    n_parts = max(1, -(-size // largest))
    edges = [whole.start + size * part // n_parts for part in range(n_parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


@dataclass
class RowBudget:
    """Rows that are computed together, and how memory limited them.

    Args:
        max_bytes: memory for the rows in flight.
        bytes_per_row: what one row is expected to need at its widest point.
        max_rows: rows that are computed together; halved when memory runs out.
        largest_chunk_rows: the largest block that was finished.
        n_chunks: blocks that were finished.
        n_out_of_memory: how often a block had to be divided.
    """

    max_bytes: int
    bytes_per_row: int
    max_rows: int = field(init=False)
    largest_chunk_rows: int = 0
    n_chunks: int = 0
    n_out_of_memory: int = 0

    def __post_init__(self) -> None:
        self.max_rows = max(1, self.max_bytes // self.bytes_per_row)

    def run(self, whole: Block, work: Callable[[Block], None]) -> None:
        """Work through a block in pieces that fit, halving the pieces when memory runs out.

        What is finished stays finished: only the piece that failed is divided and tried again.

        Raises:
            UserError: if a single row does not fit.
        """
        pending = [whole] if whole.n_rows else []
        while pending:
            block = pending.pop()
            if block.n_rows > self.max_rows:
                pending.extend(reversed(block.split(self.max_rows)))
            elif self._fits(block, work):
                self._finished(block)
            else:
                self._shrink(block)
                pending.append(block)

    @staticmethod
    def _fits(block: Block, work: Callable[[Block], None]) -> bool:
        try:
            work(block)
        except torch.OutOfMemoryError:
            return False
        return True

    def _finished(self, block: Block) -> None:
        self.n_chunks += 1
        self.largest_chunk_rows = max(self.largest_chunk_rows, block.n_rows)

    def _shrink(self, block: Block) -> None:
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

    def report(self) -> dict[str, int]:
        """What was asked for and what was used, for the record of a run."""
        return {
            "budget_bytes": self.max_bytes,
            "bytes_per_row": self.bytes_per_row,
            "max_rows": self.max_rows,
            "largest_chunk_rows": self.largest_chunk_rows,
            "n_chunks": self.n_chunks,
            "n_out_of_memory": self.n_out_of_memory,
        }


@dataclass(frozen=True)
class MemoryPlan:
    """Where the clean pass is kept, and how much is computed together.

    All of it counts on each device by itself.

    Args:
        passes: budget of the clean pass; a row is a prompt.
        rows: budget of the conditions; a row is a prompt under one condition.
        keep_on_device: False when the clean pass is kept in main memory, because it would take
            more than half of the device memory asked for.
    """

    passes: RowBudget
    rows: RowBudget
    keep_on_device: bool

    @classmethod
    def of(
        cls,
        cfg: HookedTransformerConfig,
        prompts: TokenizedPrompts,
        placement: Placement,
        rows_copy_keys: bool = False,
        max_bytes: int | None = None,
        batch_size: int | None = None,
    ) -> MemoryPlan:
        """Divide a memory budget."""
        devices = placement.devices
        if max_bytes is None:
            budget = min(default_budget_bytes(device) for device in devices)
        else:
            budget = max_bytes
        longest = int(prompts.lengths.max())
        keys = int(kept_bytes_per_prompt(cfg, longest) * placement.largest_share)
        shares_memory = all(is_main_memory(device) for device in devices)
        keep_on_device = shares_memory or keys * len(prompts) <= budget // 2
        # What is kept in main memory is not what the budget is about.
        kept = 0 if shares_memory else min(keys * len(prompts), budget // 2)
        in_pass = longest * bytes_per_row(cfg, longest, vocab=0) + keys
        in_row = bytes_per_row(cfg, longest, cfg.d_vocab_out) + keys * rows_copy_keys
        passes, rows = RowBudget(budget - kept, in_pass), RowBudget(budget - kept, in_row)
        if shares_memory:
            rows.max_rows = min(rows.max_rows, CPU_MAX_ROWS)
            batch_size = batch_size or CPU_MAX_PROMPTS
        if batch_size is not None:
            passes.max_rows = min(passes.max_rows, batch_size)
        return cls(passes, rows, keep_on_device)

    def report(self) -> dict[str, Any]:
        """What was asked for and used, for the record of a run."""
        return {
            "kept_on_device": self.keep_on_device,
            "clean_pass": self.passes.report(),
            "rows": self.rows.report(),
        }


def kept_bytes_per_prompt(cfg: HookedTransformerConfig, n_pos: int) -> int:
    """Memory of one prompt's kept keys and values over all layers."""
    return cfg.n_layers * key_bytes(cfg, n_pos)


def key_bytes(cfg: HookedTransformerConfig, n_pos: int) -> int:
    """Memory of one prompt's keys and values in one layer."""
    n_kv_heads = cfg.n_key_value_heads or cfg.n_heads
    return 2 * n_pos * n_kv_heads * cfg.d_head * cfg.dtype.itemsize


def bytes_per_row(cfg: HookedTransformerConfig, n_pos: int, vocab: int) -> int:
    """Memory of one row at its widest point, estimated from above.

    The three wide points are not reached together: attention (queries, scores and their copies),
    the MLP, and the vocabulary (logits, and their differences in float32 or better).
    """
    size = cfg.dtype.itemsize
    always = 6 * cfg.d_model * max(size, 4)
    attention = size * cfg.n_heads * (8 * cfg.d_head + 4 * n_pos)
    mlp = 5 * size * (cfg.d_mlp or 0) * (cfg.experts_per_token or 1)
    logits = vocab * (2 * size + 2 * max(size, 4))
    return always + max(attention, mlp, logits)


FIT_COPIES = 6
"""Float64 copies that fitting and judging one layer's map makes of activations and of matrices."""


@dataclass(frozen=True)
class WorkMemory:
    """Bytes of the work on one model.

    Args:
        kept: of the clean pass: keys, values, residual stream and z of every prompt; exact.
        kept_on_device: whether that stays on the model's device.
        in_pass: of the prompts that are in a clean pass at once.
        n_prompts_at_once: how many these are.
        in_rows: of the rows that are computed at once, logits included.
        n_rows_at_once: how many these are.
        smallest: of a single prompt and a single row: with less nothing can be measured.
        activations: of both models' captured activations, in main memory; exact.
        fit: of fitting the maps, in main memory.
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

    @property
    def on_device(self) -> int:
        """The most that is on the model's device at once."""
        return max(self.in_pass, self.in_rows) + (self.kept if self.kept_on_device else 0)

    @property
    def in_main_memory(self) -> int:
        """What is in main memory whatever the device."""
        return self.activations + self.fit + (0 if self.kept_on_device else self.kept)


def work_memory(
    cfg: HookedTransformerConfig,
    measured: TokenizedPrompts,
    placement: Placement,
    *,
    layers: Sequence[int],
    n_train: int,
    max_bytes: int | None,
    n_conditions: int | None = None,
    k_positions: int = 1,
    batch_size: int = 32,
    joint_maps: bool = False,
    by_hooks: bool = False,
) -> WorkMemory:
    """Estimate what one run of the engine, with its maps, takes."""
    width = cfg.n_heads * cfg.d_head
    # Read of base on train and measured prompts, of tuned on train prompts.
    n_read = 2 * n_train + len(measured)
    activations = activation_bytes(width * cfg.dtype.itemsize, n_read, len(layers), k_positions)
    side, n_blocks = (width, 1) if joint_maps else (cfg.d_head, cfg.n_heads)
    matrices = 4 * len(layers) * n_blocks * side**2 + 8 * FIT_COPIES * side**2
    fit = 8 * FIT_COPIES * n_train * k_positions * width + matrices
    if by_hooks:
        longest = int(measured.lengths.max())
        one = longest * bytes_per_row(cfg, longest, cfg.d_vocab_out)
        at_once = min(batch_size, len(measured))
        return WorkMemory(
            0, True, at_once * one, at_once, at_once * one, at_once, one, activations, fit
        )
    plan = MemoryPlan.of(cfg, measured, placement, max_bytes=max_bytes, batch_size=batch_size)
    n_prompts = min(plan.passes.max_rows, len(measured))
    every_row = n_prompts * n_conditions if n_conditions else plan.rows.max_rows
    n_rows = min(plan.rows.max_rows, every_row)
    n_kept_layers = cfg.n_layers - min(layers)
    return WorkMemory(
        kept=clean_pass_bytes(cfg, measured, plan.passes, n_kept_layers, k_positions),
        kept_on_device=plan.keep_on_device,
        in_pass=n_prompts * plan.passes.bytes_per_row,
        n_prompts_at_once=n_prompts,
        in_rows=n_rows * plan.rows.bytes_per_row,
        n_rows_at_once=n_rows,
        smallest=max(plan.passes.bytes_per_row, plan.rows.bytes_per_row),
        activations=activations,
        fit=fit,
    )


def activation_bytes(site_bytes: int, n_prompts: int, n_layers: int, k_positions: int = 1) -> int:
    """Bytes of captured activations."""
    return site_bytes * n_prompts * n_layers * k_positions


def clean_pass_bytes(
    cfg: HookedTransformerConfig,
    prompts: TokenizedPrompts,
    passes: RowBudget,
    n_layers: int,
    k_positions: int,
) -> int:
    """Bytes that the suffix engine keeps of a clean pass, if memory does not run out meanwhile.

    Each batch is as wide as its longest prompt.
    """
    lengths = prompts.lengths.sort().values
    size = cfg.dtype.itemsize
    at_positions = k_positions * (cfg.d_model + cfg.n_heads * cfg.d_head) * size
    whole = Block(slice(0, len(prompts)), slice(0, 1))
    return sum(
        n_layers
        * block.n_prompts
        * (key_bytes(cfg, n_columns(int(lengths[block.prompts].max()))) + at_positions)
        for block in (whole.split(passes.max_rows) if whole.n_rows > passes.max_rows else [whole])
    )
