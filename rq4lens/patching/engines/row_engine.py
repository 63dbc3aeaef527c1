"""What the engines share that measure conditions as rows at the decision token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64, Int
from numpy import ndarray
from torch import Tensor

from rq4lens.config import Patching, Place
from rq4lens.models.load.devices import Placement, copied_once
from rq4lens.models.load.lens import HookedModel
from rq4lens.models.prompts.prompt_set import PaddingSide, TokenBatch, TokenizedPrompts
from rq4lens.patching.activations import check_layers
from rq4lens.patching.engines.clean_pass import CleanBatch, some_prompts
from rq4lens.patching.engines.hooks import everywhere, used_sources, used_writers
from rq4lens.patching.engines.memory import MemoryPlan, RowBlock, is_main_memory
from rq4lens.patching.engines.windows import Window
from rq4lens.patching.passes import precise_dtype
from rq4lens.patching.patch import (
    Effects,
    Intervention,
    OtherModel,
    Patch,
    Progress,
    Sources,
    all_effects,
    answer_effects,
    blend,
    effects_by_difference,
    head_outputs,
    n_measures,
)

SourceTensors = Mapping[tuple[int, str], Float[Tensor, "prompt position head d_head"]]
"""Activations to blend in, of the prompts at hand, by layer and source."""


def entry_layer(intervention: Intervention, default: int) -> int:
    """The lowest layer an intervention patches; an empty intervention may enter anywhere."""
    return min((patch.layer for patch in intervention), default=default)


@dataclass(frozen=True)
class RowGroup:
    """Rows that enter at one layer: a clean reference first, then the interventions.

    ``conditions`` are the interventions' places in the sorted list.
    """

    layer: int
    rows: slice
    conditions: slice


Writers = Mapping[tuple[int, str], Float[Tensor, "head d_head d_model"]]
"""Output matrices of sources that have their own, by layer and source."""


@dataclass(frozen=True)
class LayerPatch:
    """All rows that one layer blends with one source: their places, heads and strengths.

    ``W_O`` is the source's own output matrix, where it has one.
    """

    rows: Int[Tensor, "condition"]
    mask: Bool[Tensor, "condition 1 head"]
    alpha: Float[Tensor, "condition 1"]
    W_O: Float[Tensor, "head d_head d_model"] | None = None


@dataclass(frozen=True)
class Rows:
    """Interventions sorted by the layer at which they leave the clean run.

    The rows of one layer start with a clean reference: it runs through the same products, of the
    same shapes and in the same precision, as the rows that are compared with it. It has an empty
    intervention.
    """

    interventions: tuple[Intervention, ...]
    groups: tuple[RowGroup, ...]
    placement: Placement
    writers: Writers = field(default_factory=dict)

    @classmethod
    def arrange(
        cls,
        interventions: Sequence[Intervention],
        conditions: slice,
        placement: Placement,
        writers: Writers,
    ) -> Rows:
        """The rows of some of the interventions."""
        last = len(placement.layers) - 1
        rows: list[Intervention] = []
        groups: list[RowGroup] = []
        at = conditions.start
        chosen = interventions[conditions]
        for layer, members in groupby(chosen, key=lambda each: entry_layer(each, last)):
            start = len(rows)
            rows += [(), *members]
            stop = at + len(rows) - start - 1
            groups.append(RowGroup(layer, slice(start, len(rows)), slice(at, stop)))
            at = stop
        return cls(tuple(rows), tuple(groups), placement, writers)

    def only(self, group: RowGroup) -> Rows:
        """The rows of one group."""
        chosen = self.interventions[group.rows]
        alone = RowGroup(group.layer, slice(0, len(chosen)), group.conditions)
        return Rows(chosen, (alone,), self.placement, self.writers)

    def entering(self, layer: int) -> int:
        """How many rows enter at a layer."""
        rows = [group.rows for group in self.groups if group.layer == layer]
        return sum(each.stop - each.start for each in rows)

    @cached_property
    def patches(self) -> dict[tuple[int, str], LayerPatch]:
        """The blends, by layer and source."""
        found: dict[tuple[int, str], list[tuple[int, Patch]]] = {}
        for row, intervention in enumerate(self.interventions):
            for patch in intervention:
                found.setdefault((patch.layer, patch.source), []).append((row, patch))
        return {key: self._layer_patch(key, members) for key, members in found.items()}

    def _layer_patch(self, key: tuple[int, str], members: list[tuple[int, Patch]]) -> LayerPatch:
        device, W_O = self.placement.layers[key[0]], self.writers.get(key)
        rows = [row for row, _ in members]
        mask = torch.tensor([patch.heads.mask for _, patch in members], dtype=torch.bool)
        alpha = torch.tensor([patch.alpha for _, patch in members], dtype=torch.float64)
        alpha = rearrange(alpha, "condition -> condition 1")
        mask = rearrange(mask, "condition head -> condition 1 head")
        # A blocking copy would wait until the device has worked off everything that is queued.
        rows_on, mask, alpha = (
            tensor.to(device, non_blocking=True) for tensor in (torch.tensor(rows), mask, alpha)
        )
        return LayerPatch(rows_on, mask, alpha, None if W_O is None else W_O.to(device))

    def blend_into(
        self,
        z: Float[Tensor, "prompt condition position head d_head"],
        layer: int,
        sources: SourceTensors,
        patched: Bool[Tensor, "prompt position"] | None = None,
    ) -> Float[Tensor, "prompt condition position d_model"] | None:
        """Blend what this layer's rows are patched with into their ``z``, in place.

        Only the positions that ``patched`` names are, or all of them.

        What sources with an output matrix of their own write beside ``z W_O`` is returned.
        """
        written: Tensor | None = None
        spots = None if patched is None else patched.to(z.device)[:, None, :, None]
        for (patched_layer, source), patch in self.patches.items():
            if patched_layer != layer:
                continue
            mask = patch.mask if spots is None else patch.mask & spots
            current = z[:, patch.rows]
            incoming = sources[layer, source][:, None].expand_as(current)
            if patch.W_O is None:
                z[:, patch.rows] = blend(current, incoming, mask, patch.alpha)
                continue
            kept, out = head_outputs(current, incoming, (mask, patch.alpha), patch.W_O)
            z[:, patch.rows] = kept
            if written is None:
                written = out.new_zeros(*z.shape[:-2], out.shape[-1])
            written[:, patch.rows] += out
        return written


class _Asked(NamedTuple):
    """What is measured: interventions, sorted by the layer they enter at, and beside what."""

    interventions: Sequence[Intervention]
    sources: Sources
    other: OtherModel | None


class RowEngine(ABC):
    """Measures interventions on a model from one clean pass of it.

    A layer below ``first_layer`` is served too, by another clean pass. ``max_bytes`` is memory on
    each device for all that is stored and computed; by default half of what is free on the fullest.
    """

    name: str
    padding_side: PaddingSide
    rows_copy_keys: bool
    """Whether each row needs its own copy of its prompt's keys and values."""

    def __init__(
        self,
        model: HookedModel,
        prompts: TokenizedPrompts,
        settings: Patching | None = None,
        place: Place | None = None,
        *,
        first_layer: int = 0,
        max_bytes: int | None = None,
    ) -> None:
        check_layers([first_layer], model.cfg.n_layers)
        self.model = model
        self.settings = settings or Patching()
        self.prompts = prompts.placed(self.settings.k_positions)
        self.window = Window.of(self.prompts)
        self._patched = self.window.patched
        self.first_layer = first_layer
        self.fallback_reason: str | None = None
        self.placement = Placement.of(model)
        self.batch_size = (place or Place()).prompts_per_pass
        self._memory = MemoryPlan.of(
            model.cfg,
            prompts,
            self.placement,
            batch_size=(place or Place()).batch_size,
            max_bytes=max_bytes,
            rows_copy_keys=self.rows_copy_keys,
        )
        self._clean: list[CleanBatch] = []
        self._compared: tuple[OtherModel, list[OtherModel]] | None = None

    @classmethod
    def not_covered(cls, model: Any) -> str | None:
        """Why the engine does not cover a model, or None if it does."""
        reasons = {
            f"its attention is {model.cfg.attention_dir}": model.cfg.attention_dir != "causal",
            "its rotary base depends on the length of the batch": getattr(
                model.cfg, "use_dynamic_ntk_rope", False
            ),
            **cls._limits(model),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    @staticmethod
    @abstractmethod
    def _limits(model: HookedModel) -> dict[str, bool]:
        """Further reasons not to cover a model, and whether they hold."""

    @abstractmethod
    def _clean_pass(self, batch: TokenBatch, first_layer: int) -> Sequence[CleanBatch]:
        """Run the clean model once over prompts; store what rows from ``first_layer`` up need."""

    @abstractmethod
    def _group_logits(
        self, clean: CleanBatch, prompts: slice, rows: Rows, sources: SourceTensors
    ) -> Iterator[tuple[RowGroup, Float[Tensor, "token row vocab"]]]:
        """Logits of each group's rows, the clean reference first, at each compared token."""

    @property
    def memory_report(self) -> dict[str, Any]:
        """What memory was asked for and used, for the record of a run."""
        stored = sum(layer.n_bytes for batch in self._clean for layer in batch.layers.values())
        return {"kept_bytes": stored, **self._memory.report()}

    def clean_z(self, layer: int) -> Float[Tensor, "prompt position head d_head"]:
        """Clean activations at the patched tokens of a layer."""
        cfg = self.model.cfg
        check_layers([layer], cfg.n_layers)
        shape = (len(self.prompts), self.prompts.n_spots, cfg.n_heads, cfg.d_head)
        z = torch.empty(shape, dtype=cfg.dtype)
        for clean in self.clean_batches(self.first_layer):
            stored = clean.layers.get(layer)
            found = stored.z if stored else clean.z_below[layer]
            z[clean.rows] = self.window.gather(found, clean.rows).cpu()
        return z

    @torch.no_grad()
    def clean_log_probs(self) -> Float[Tensor, "prompt answer vocab"]:
        """The clean model's next-token distribution at each compared token."""
        shape = (len(self.prompts), self.window.n_answer, self.model.cfg.d_vocab_out)
        log_probs = torch.empty(shape, dtype=precise_dtype(self.model))
        for clean in self.clean_batches(self.model.cfg.n_layers - 1):

            def work(block: RowBlock, rows: Tensor = clean.rows, here: CleanBatch = clean) -> None:
                logits = self.logits_of(here, block.prompts, [()], {})[:, 0].unflatten(
                    0, (-1, self.window.n_answer)
                )
                log_probs[rows[block.prompts]] = logits.double().log_softmax(-1).to(log_probs).cpu()

            self._memory.rows.run(RowBlock(slice(0, len(clean.rows)), slice(0, 1)), work)
        return log_probs

    def every_layer(
        self, source: str, sources: Sources, other: OtherModel | None = None
    ) -> Effects:
        """Effect of a source in place of every head of every layer."""
        return self.effects([everywhere(self.model, source)], sources, other=other)

    def effects(
        self,
        interventions: Sequence[Intervention],
        sources: Sources,
        progress: Progress | None = None,
        other: OtherModel | None = None,
    ) -> Effects:
        """Effect of each intervention on each prompt, and how far it takes the model to another."""
        last = self.model.cfg.n_layers - 1
        entries = [entry_layer(intervention, last) for intervention in interventions]
        order = sorted(range(len(interventions)), key=entries.__getitem__)
        in_order = [interventions[i] for i in order]
        work = _Asked(in_order, sources, other)
        measured = self._measure(work, progress, effects_by_difference)
        if not np.isfinite(measured).all():
            measured = self._measure(work, None, all_effects)
        every = np.empty_like(measured)
        every[:, order] = measured
        return Effects.of(every, self.window.n_answer)

    @torch.no_grad()
    def _measure(
        self, asked: _Asked, progress: Progress | None, effects_of: Callable[..., Any]
    ) -> Float64[ndarray, "measure condition prompt"]:
        """All measures of interventions that are sorted by entry layer, in chunks that fit."""
        interventions, sources, other = asked
        n_answer = self.window.n_answer
        shape = (len(self.prompts), self.prompts.n_spots)
        used = used_sources(interventions, sources, self.model, shape)
        writers = used_writers(used, sources)

        @lru_cache
        def arrange(start: int, stop: int) -> Rows:
            return Rows.arrange(interventions, slice(start, stop), self.placement, writers)

        lowest = entry_layer(interventions[0], self.model.cfg.n_layers - 1) if interventions else 0
        batches = self.clean_batches(lowest)
        at_one_layer = not is_main_memory(self.placement.exit) and all(
            entry_layer(intervention, lowest) == lowest for intervention in interventions
        )
        # A batch's prompts are picked beside its layer: picking many of them one by one in main
        # memory wakes all threads of a processor, which slows down several processes at once.
        every = {key: self._beside_layer(key, source) for key, source in used.items()}
        # Numbers stay on the device until all are there: fetching one would stop the queue.
        found = torch.empty(
            (n_measures(n_answer, other), len(interventions), len(self.prompts)),
            dtype=torch.float64,
            device=self.placement.exit,
        )
        parts = found.split([len(b.rows) for b in batches], -1)
        for clean, into, beside in zip(batches, parts, self._beside(other, batches), strict=True):
            here, rows_on = clean.to(self.placement), copied_once(clean.rows)
            incoming = {
                key: self.window.spread(source[rows_on(source.device)], clean.rows)
                for key, source in every.items()
            }

            def work(
                block: RowBlock,
                into: Tensor = into,
                here: CleanBatch = here,
                incoming: SourceTensors = incoming,
                beside: OtherModel | None = beside,
            ) -> None:
                rows = arrange(block.conditions.start, block.conditions.stop)
                some = {key: source[block.prompts] for key, source in incoming.items()}
                to = beside and beside.of_prompts(block.prompts).by_token(n_answer)
                n_prompts = block.prompts.stop - block.prompts.start
                there = torch.ones(n_prompts, n_answer, dtype=torch.bool)
                for group, logits in self._group_logits(here, block.prompts, rows, some):
                    direction, clean_logits = self.settings.kl_direction, logits[:, :1]
                    effects = answer_effects(effects_of, logits, clean_logits, there, direction, to)
                    for measure, values in zip(into, effects, strict=True):
                        measure[group.conditions, block.prompts] = values[:, 1:].mT
                if progress is not None:
                    progress(block.n_rows)

            prompts, conditions = slice(0, len(clean.rows)), slice(0, len(interventions))
            self._memory.rows.run(RowBlock(prompts, conditions, at_one_layer), work)
        measured = np.empty(found.shape)
        measured[:, :, torch.cat([clean.rows for clean in batches]).numpy()] = found.cpu().numpy()
        return measured

    @torch.no_grad()
    def logits_of(
        self,
        clean: CleanBatch,
        prompts: slice,
        interventions: Sequence[Intervention],
        sources: SourceTensors,
    ) -> Float[Tensor, "token condition vocab"]:
        """Logits of a few rows, all at once; the interventions are sorted by entry layer.

        The tokens are those compared of the first prompt, then those of the next.
        """
        every = slice(0, len(interventions))
        rows = Rows.arrange(interventions, every, self.placement, used_writers(sources, sources))
        chosen = clean.rows[prompts]
        here = {
            key: self.window.spread(self._beside_layer(key, source), chosen)
            for key, source in sources.items()
        }
        groups = self._group_logits(clean.to(self.placement), prompts, rows, here)
        return torch.cat([logits[:, 1:] for _, logits in groups], dim=1)

    def _beside(
        self, other: OtherModel | None, batches: Sequence[CleanBatch]
    ) -> Iterable[OtherModel | None]:
        """What the rows of each batch are compared with, beside the last layer."""
        if other is None:
            return [None] * len(batches)
        device = self.placement.exit
        parts = (other.of_prompts(clean.rows).to(device) for clean in batches)
        if is_main_memory(device) or not self._memory.keep_on_device:
            return parts
        if self._compared is None or self._compared[0] is not other:
            self._compared = other, list(parts)
        return self._compared[1]

    def _beside_layer(self, key: tuple[int, str], source: Tensor) -> Tensor:
        """A source where the layer is that it is blended into."""
        return source.to(self.placement.layers[key[0]], self.model.cfg.dtype, non_blocking=True)

    @torch.no_grad()
    def clean_batches(self, lowest: int) -> list[CleanBatch]:
        """The clean pass, made on first use; a layer below its first one makes another."""
        if self._clean and lowest in self._clean[0].layers:
            return self._clean
        self.first_layer = min(lowest, self.first_layer)
        every = next(self.prompts.batches(len(self.prompts), self.padding_side))
        made: list[CleanBatch] = []
        main_memory = Placement.all_on(torch.device("cpu"), self.model.cfg.n_layers)

        def work(block: RowBlock) -> None:
            batches = self._clean_pass(some_prompts(every, block.prompts), self.first_layer)
            on_device = self._memory.keep_on_device
            for clean in map(self._with_spots, batches):
                made.append(clean if on_device else clean.to(main_memory))

        self._memory.passes.run(RowBlock(slice(0, len(self.prompts)), slice(0, 1)), work)
        self._clean, self._compared = made, None
        return made

    def _with_spots(self, clean: CleanBatch) -> CleanBatch:
        patched = None if self._patched is None else self._patched[clean.rows]
        return replace(clean, patched=patched)
