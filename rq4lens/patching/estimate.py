"""What measuring will take in memory besides weights, before a model is there to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformer_lens import HookedTransformerConfig

from rq4lens.models.placement import Placement
from rq4lens.models.prompts import TokenizedPrompts
from rq4lens.patching.clean_pass import n_columns
from rq4lens.patching.memory import Block, MemoryPlan, RowBudget, bytes_per_row, key_bytes

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
    """Estimate what one run of the engine, with its maps, takes.

    Args:
        cfg: the tuned model's configuration.
        measured: the measured prompts, tokenized for the tuned model.
        placement: where the model's blocks will be.
        layers: the patched layers.
        n_train: train prompts.
        max_bytes: what the engine may use of each device, see :class:`MemoryPlan`.
        n_conditions: how many conditions are measured together; None for as many as fit.
        k_positions: patched positions.
        batch_size: prompts of a forward pass.
        joint_maps: whether maps are over all heads of a layer.
        by_hooks: whether each condition is a forward pass through native hooks.

    Returns:
        The estimate.
    """
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
    """Bytes of captured activations.

    Args:
        site_bytes: of all heads of a layer at one position.
        n_prompts: prompts read.
        n_layers: layers read of each.
        k_positions: positions read of each.
    """
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

    Args:
        cfg: the model's configuration.
        prompts: the prompts.
        passes: how many of them are in a pass at once.
        n_layers: layers from the lowest patched one up.
        k_positions: patched positions.
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
