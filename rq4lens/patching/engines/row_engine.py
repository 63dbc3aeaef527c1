"""What the engines share that measure conditions as rows at the decision token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int
from numpy import ndarray
from torch import Tensor
from transformer_lens import HookedTransformer

from rq4lens.config import KLDirection
from rq4lens.models.load.devices import Placement, copied_once
from rq4lens.models.prompts.prompt_set import PaddingSide, TokenBatch, TokenizedPrompts
from rq4lens.patching.activations import check_layers, patched_positions
from rq4lens.patching.engines.hooks import check_interventions
from rq4lens.patching.engines.kept import Kept, SourceTensors, some_prompts
from rq4lens.patching.engines.memory import Block, MemoryPlan
from rq4lens.patching.engines.rows import RowGroup, Rows, check_source, entry_layer, used_sources
from rq4lens.patching.patch import (
    Advance,
    Effects,
    Intervention,
    Sources,
    effects_by_difference,
    next_token_effects,
)

KERNEL_MIN_LOGITS = 2**34
"""From here on it pays to build a kernel for the sums over the vocabulary."""


class RowEngine(ABC):
    """Measures interventions on the tuned model from one clean pass of it.

    Args:
        model: the tuned model.
        prompts: the measured prompts, tokenized for the tuned model.
        k_positions: how many positions, ending at the decision token, are patched.
        first_layer: the lowest layer that will be asked for; a lower one is served too, by another
            clean pass.
        max_bytes: memory on each device for everything the engine keeps and computes; by default
            half of what is free on the fullest GPU.
        batch_size: prompts per clean forward pass, if memory allows; by default as many as it does.
        kl_direction: which way the divergence is taken.
    """

    name: str
    padding_side: PaddingSide
    rows_copy_keys: bool
    """Whether each row needs its own copy of its prompt's keys and values."""

    def __init__(
        self,
        model: HookedTransformer,
        prompts: TokenizedPrompts,
        *,
        k_positions: int = 1,
        first_layer: int = 0,
        max_bytes: int | None = None,
        batch_size: int | None = None,
        kl_direction: KLDirection = "patched||clean",
    ) -> None:
        check_layers([first_layer], model.cfg.n_layers)
        shortest = next(prompts.batches(1))
        patched_positions(shortest, k_positions)  # refuses more positions than it has
        self.model = model
        self.prompts = prompts
        self.k_positions = k_positions
        self.kl_direction: KLDirection = kl_direction
        self.fallback_reason: str | None = None
        self.placement = Placement.of(model)
        self._memory = MemoryPlan.of(
            model.cfg, prompts, self.placement, self.rows_copy_keys, max_bytes, batch_size
        )
        self.first_layer = first_layer
        self._kept: list[Any] = []

    @abstractmethod
    def _clean_pass(self, batch: TokenBatch, first_layer: int) -> Sequence[Kept]:
        """Run the clean model once over prompts and keep what rows from ``first_layer`` up need."""

    @abstractmethod
    def _group_logits(
        self, kept: Any, prompts: slice, rows: Rows, sources: SourceTensors
    ) -> Iterator[tuple[RowGroup, Float[Tensor, "prompt row vocab"]]]:
        """Logits at the decision token of each group's rows, the clean reference first."""

    @property
    def memory_report(self) -> dict[str, Any]:
        """What memory was asked for and used, for the record of a run."""
        kept = sum(batch.n_bytes for batch in self._kept)
        return {"kept_bytes": kept, **self._memory.report()}

    def tuned_z(self, layer: int) -> Float[Tensor, "prompt position head d_head"]:
        """Clean activations of the tuned model at the patched positions of a layer.

        Raises:
            UserError: if the model has no such layer.
        """
        check_layers([layer], self.model.cfg.n_layers)
        z = torch.empty(self._site_shape, dtype=self.model.cfg.dtype)
        for kept in self.kept_batches(layer):
            z[kept.rows] = kept.z(layer).cpu()
        return z

    def effects(
        self,
        interventions: Sequence[Intervention],
        sources: Sources,
        advance: Advance | None = None,
    ) -> Effects:
        """Effect of each intervention on each prompt.

        Raises:
            UserError: if a layer, head set or source does not fit the model, or if memory runs out
                with a single row in flight.
        """
        order = self._by_entry_layer(interventions)
        in_order = [interventions[i] for i in order]
        n_logits = len(interventions) * len(self.prompts) * self.model.cfg.d_vocab_out
        difference = partial(effects_by_difference, by_kernel=n_logits >= KERNEL_MIN_LOGITS)
        measured = self._measure(in_order, sources, advance, difference)
        if not np.isfinite(measured).all():
            measured = self._measure(in_order, sources, None, next_token_effects)
        both = np.empty_like(measured)
        both[:, order] = measured
        return Effects(both[0], both[1])

    @torch.no_grad()
    def _measure(
        self,
        interventions: Sequence[Intervention],
        sources: Sources,
        advance: Advance | None,
        effects_of: Callable[[Tensor, Tensor, KLDirection], tuple[Tensor, Tensor]],
    ) -> Float64[ndarray, "measure condition prompt"]:
        """Both measures of interventions that are sorted by entry layer."""
        shape = (2, len(interventions), len(self.prompts))
        # Numbers stay on the device until all are there: fetching one would stop the queue.
        here = torch.empty(shape, dtype=torch.float64, device=self.placement.exit)

        def store(group: RowGroup, places: slice, logits: Tensor) -> None:
            found = effects_of(logits, logits[:, :1], self.kl_direction)
            for measure, values in zip(here, found, strict=True):
                by_condition = rearrange(values[:, 1:], "prompt condition -> condition prompt")
                measure[group.conditions, places] = by_condition

        order = self._run(interventions, sources, store, advance)
        measured = np.empty(shape)
        measured[:, :, order.numpy()] = here.cpu().numpy()
        return measured

    @torch.no_grad()
    def logits(
        self, interventions: Sequence[Intervention], sources: Sources
    ) -> Float[Tensor, "condition prompt vocab"]:
        """Logits at the decision token under each intervention.

        Raises:
            UserError: as for :meth:`effects`.
        """
        cfg = self.model.cfg
        shape = (len(interventions), len(self.prompts), cfg.d_vocab_out)
        order = self._by_entry_layer(interventions)
        every = torch.empty(shape, dtype=cfg.dtype)
        here = torch.empty(shape, dtype=cfg.dtype)

        def store(group: RowGroup, places: slice, logits: Tensor) -> None:
            patched = rearrange(logits[:, 1:], "prompt condition vocab -> condition prompt vocab")
            here[group.conditions, places] = patched.cpu()

        rows = self._run([interventions[i] for i in order], sources, store)
        every[torch.tensor(order)[:, None], rows] = here
        return every

    @torch.no_grad()
    def logits_of(
        self,
        kept: Any,
        prompts: slice,
        interventions: Sequence[Intervention],
        sources: SourceTensors,
    ) -> Float[Tensor, "prompt condition vocab"]:
        """Logits of a few rows, all at once."""
        rows = Rows.arrange(interventions, slice(0, len(interventions)), self.placement)
        here = {key: self._beside_layer(key, source) for key, source in sources.items()}
        groups = self._group_logits(kept.to(self.placement), prompts, rows, here)
        return torch.cat([logits[:, 1:] for _, logits in groups], dim=1)

    def _by_entry_layer(self, interventions: Sequence[Intervention]) -> list[int]:
        n_layers = self.model.cfg.n_layers
        entries = [entry_layer(intervention, n_layers - 1) for intervention in interventions]
        return sorted(range(len(interventions)), key=entries.__getitem__)

    @property
    def _site_shape(self) -> tuple[int, int, int, int]:
        cfg = self.model.cfg
        return len(self.prompts), self.k_positions, cfg.n_heads, cfg.d_head

    def _run(
        self,
        interventions: Sequence[Intervention],
        sources: Sources,
        store: Callable[[RowGroup, slice, Float[Tensor, "prompt row vocab"]], None],
        advance: Advance | None = None,
    ) -> Int[Tensor, "prompt"]:
        """Compute all rows in chunks that fit into memory, batch of prompts by batch."""
        check_interventions(interventions, self.model)

        @lru_cache
        def arrange(start: int, stop: int) -> Rows:
            return Rows.arrange(interventions, slice(start, stop), self.placement)

        last = self.model.cfg.n_layers - 1
        batches = self.kept_batches(min((entry_layer(i, last) for i in interventions), default=0))
        every = self._sources_of(interventions, sources)
        first_place = 0
        for kept in batches:
            here, rows_on = kept.to(self.placement), copied_once(kept.rows)
            incoming = {key: source[rows_on(source.device)] for key, source in every.items()}

            def work(
                block: Block,
                here: Any = here,
                incoming: SourceTensors = incoming,
                first_place: int = first_place,
            ) -> None:
                rows = arrange(block.conditions.start, block.conditions.stop)
                some = {key: source[block.prompts] for key, source in incoming.items()}
                places = slice(first_place + block.prompts.start, first_place + block.prompts.stop)
                for group, logits in self._group_logits(here, block.prompts, rows, some):
                    store(group, places, logits)
                if advance is not None:
                    advance(block.n_rows)

            whole = Block(slice(0, len(kept.rows)), slice(0, len(interventions)))
            self._memory.rows.run(whole, work)
            first_place += len(kept.rows)
        return torch.cat([kept.rows for kept in batches])

    def _sources_of(self, interventions: Sequence[Intervention], sources: Sources) -> SourceTensors:
        """What is blended in, of all prompts, beside its layers.

        A batch's prompts are picked there: picking many of them one by one in main memory wakes all
        of the processor's threads, which then slow each other down when several processes do it.
        """
        chosen = dict(used_sources(interventions, sources))
        for key, source in chosen.items():
            check_source(key, source, self._site_shape)
        return {key: self._beside_layer(key, source) for key, source in chosen.items()}

    def _beside_layer(self, key: tuple[int, str], source: Tensor) -> Tensor:
        """A source where the layer is that it is blended into."""
        return source.to(self.placement.layers[key[0]], self.model.cfg.dtype, non_blocking=True)

    def kept_batches(self, lowest: int) -> list[Any]:
        """The clean pass, made on first use; a layer below its first one makes another."""
        if not self._kept or lowest < self.first_layer:
            self.first_layer = min(lowest, self.first_layer)
            self._kept = self._clean_passes()
        return self._kept

    @torch.no_grad()
    def _clean_passes(self) -> list[Any]:
        every = next(self.prompts.batches(len(self.prompts), self.padding_side))
        made: list[Any] = []
        main_memory = Placement.all_on(torch.device("cpu"), self.model.cfg.n_layers)

        def work(block: Block) -> None:
            batches = self._clean_pass(some_prompts(every, block.prompts), self.first_layer)
            on_device = self._memory.keep_on_device
            made.extend(kept if on_device else kept.to(main_memory) for kept in batches)

        self._memory.passes.run(Block(slice(0, len(self.prompts)), slice(0, 1)), work)
        return made
