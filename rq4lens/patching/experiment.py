"""A pair made ready to measure: sources captured and mapped, the models behind engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from rq4lens.config import Patching, Place
from rq4lens.heads import Heads, head_sets
from rq4lens.models.load.lens import HookedModel
from rq4lens.models.pair import SIDES, ModelPair, Side
from rq4lens.models.prompts.prompt_set import FIT_SPLIT, TokenizedPrompts
from rq4lens.models.weights import together
from rq4lens.patching.activations import PairActivations, check_layers, require_finite
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.maps.map import LayerMap
from rq4lens.patching.metrics import Asked, Metric, metric_of, require_needs
from rq4lens.patching.patch import (
    BASE,
    CONSTANT,
    MAPPED,
    OUTPUT,
    RAW,
    SELF,
    SHIFTED,
    TUNED,
    Effects,
    Engine,
    OtherModel,
    Patch,
    Progress,
    Sources,
    divergence_terms,
    into_side,
    n_measures,
)
from rq4lens.results import EVERY_LAYER, Compared


@dataclass(eq=False, repr=False)
class Ends:
    """The two models of a pair behind engines, each made when it is first needed.

    A model that may not stay in memory beside the other goes with its engine. ``rows`` are the
    measured ones of the split's prompts.
    """

    activations: PairActivations
    settings: Patching
    place: Place
    first_layer: int
    rows: slice | list[int]
    metric: InitVar[Metric | None]
    _prompts: dict[Side, TokenizedPrompts] = field(default_factory=dict)
    _asked: dict[Side, Asked] = field(default_factory=dict)
    _engines: dict[Side, Engine] = field(default_factory=dict)
    _others: dict[Side, OtherModel] = field(default_factory=dict)
    _left_out: dict[Side, float] = field(default_factory=dict)

    def __post_init__(self, metric: Metric | None) -> None:
        self.pair = self.activations.pair
        if metric is not None:
            measured = self.pair.prompts.split(self.settings.split)
            require_needs(metric, measured.of_ids(self.prompts("tuned").ids))
            for side in SIDES:
                prompts = self.prompts(side)
                self._asked[side] = Asked.of(metric, prompts.ids, prompts.answers, prompts.foils)

    def prompts(self, side: Side) -> TokenizedPrompts:
        """The measured prompts as one of the models reads them."""
        if side not in self._prompts:
            every = self.activations.prompts(side, self.settings.split)
            self._prompts[side] = every if isinstance(self.rows, slice) else every.some(self.rows)
        return self._prompts[side]

    def engine(self, side: Side) -> Engine:
        """One of the models behind an engine."""
        if side not in self._engines:
            if not self.pair.keep_both:
                self._engines = {}
            self._engines[side] = make_engine(
                self.pair.use(side).model,
                self.prompts(side),
                self.settings,
                self.place,
                first_layer=self.first_layer,
            )
        return self._engines[side]

    def other(self, side: Side) -> OtherModel:
        """What one of the models is compared with: the other one, over the tokens of both."""
        if side not in self._others:
            other: Side = "base" if side == "tuned" else "tuned"
            shared = self.pair.shared_tokens
            log_probs, ids = self._log_probs(other), shared[other]
            self._left_out[other] = 0.0
            if ids is not None:
                log_probs = log_probs[..., ids]
                inside = log_probs.double().logsumexp(-1, keepdim=True)
                there = self.prompts(side).is_compared
                self._left_out[other] = float(100 * (1 - inside[there].exp()).mean())
                log_probs = (log_probs - inside).to(log_probs)
            self._others[side] = OtherModel(log_probs, shared[side], self.asked(side))
        return self._others[side]

    def asked(self, side: Side) -> Asked | None:
        """What the metric is asked of one of the models; None without one.

        The answer of a prompt that gives none is the tuned model's most likely token.
        """
        asked = self._asked.get(side)
        if asked is None or all(asked.answers):
            return asked
        shared = self.pair.shared_tokens
        log_probs, ids, own = self._log_probs("tuned"), shared["tuned"], shared[side]
        best = (log_probs if ids is None else log_probs[..., ids])[:, -1].argmax(-1)
        self._asked[side] = asked.answered((best if own is None else own[best]).tolist())
        return self._asked[side]

    def compared(self) -> Compared:
        """How well the two distributions can be compared."""
        for side in SIDES:
            self.other(side)
        one, other = self._log_probs("base").double(), self.engine("base").clean_log_probs()
        noise = divergence_terms(one, other).sum((1, 2))
        left_out, weights = self._left_out, together(self.pair.weight_changes)
        return Compared(
            left_out_base_pct=left_out["base"],
            left_out_tuned_pct=left_out["tuned"],
            noise_nats=float(noise.abs().mean()),  # signed roundings may cancel by chance
            weight_cosine=weights and weights.cosine,
        )

    def _log_probs(self, side: Side) -> Float[Tensor, "prompt answer vocab"]:
        if side == "base":
            return self.activations.log_probs(side, self.settings.split)[self.rows]
        return self.engine(side).clean_log_probs()


@dataclass(frozen=True)
class Experiment:
    """A pair, its measured prompts and its maps, ready to measure any head set.

    >>> experiment.layers
    (1,)

    Args:
        pair: the pair.
        settings: how the pair is patched and measured.
        prompts: the measured prompts as the tuned model reads them.
        groups: the group of each prompt.
        maps: the maps by layer.
        sources: what can be blended in, by layer and name: ``"raw"`` and ``"mapped"`` of the layers
            that have a map, and what is made when it is asked for.
        ends: both models, each behind an engine.
        source_maps: the map that a source went through, by ``(layer, source)``; a source without
            one is the activation itself.
    """

    pair: ModelPair
    settings: Patching
    prompts: TokenizedPrompts
    groups: tuple[str, ...]
    maps: Mapping[int, LayerMap]
    sources: Sources
    ends: Ends
    source_maps: Mapping[tuple[int, str], LayerMap] = field(default_factory=dict)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"<Experiment on {self.pair!r}: layers {layers}, split {self.split}>"

    @property
    def engine(self) -> Engine:
        """Measures interventions on the tuned model."""
        return self.ends.engine("tuned")

    @property
    def split(self) -> str:
        """The split of the measured prompts."""
        return self.settings.split

    @property
    def tuned_model(self) -> HookedModel:
        """The tuned model."""
        return self.pair.use("tuned").model

    @property
    def prompt_ids(self) -> tuple[str, ...]:
        """The measured prompts' ids."""
        return self.prompts.ids

    @property
    def n_heads(self) -> int:
        """Heads per layer."""
        return self.pair.n_heads

    @property
    def n_layers(self) -> int:
        """Layers of each model."""
        return self.pair.n_layers

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that can be patched."""
        return tuple(self.maps)

    def z(self, layer: int, source: str) -> Float[Tensor, "prompt head d_head"]:
        """Activations of a source at the decision token."""
        return self.sources[layer, source][:, -1]

    def with_sources(self, extra: Mapping[tuple[int, str], Tensor]) -> Experiment:
        """The same experiment with more sources, for instance other maps under other names.

        Args:
            extra: tensors ``[prompt position head d_head]`` by ``(layer, source)``.

        Returns:
            A new experiment that shares the engine and its clean pass.
        """
        return replace(self, sources=self.sources.also(extra))

    def effects(self, patches: Sequence[Patch], progress: Progress | None = None) -> Effects:
        """Effect of each patch by itself on each prompt.

        Patches of source ``"tuned"`` go into the base model, all others into the tuned one.

        Args:
            patches: the patches; each is a forward pass of its own.
            progress: called with the number of rows (prompt x patch) just finished.

        Returns:
            The effects, in the order of the patches.

        Raises:
            UserError: if a layer was not prepared, a head set does not fit, or a number of the
                models' format overflows.
        """
        rows, n_answer = np.empty((0, 0, 0)), self.prompts.longest_answer
        for side in reversed(SIDES):
            into = [at for at, patch in enumerate(patches) if into_side(patch) == side]
            if into:
                found = self._into(side, [patches[at] for at in into], progress)
                rows = rows if rows.size else np.empty((len(found), len(patches), found.shape[-1]))
                rows[:, into] = found
        nothing = np.empty((2, 0, len(self.prompts)))
        return Effects.of(rows, n_answer) if rows.size else Effects(*nothing)

    def _into(
        self, side: Side, patches: Sequence[Patch], progress: Progress | None
    ) -> Float64[ndarray, "measure patch prompt"]:
        """The measures of patches that go into one of the models."""
        if side == "base":
            # The other model's activations first: it may have to go before this one is loaded.
            for patch in patches:
                every = range(self.n_layers) if patch.layer == EVERY_LAYER else [patch.layer]
                for layer in every:
                    self.sources[layer, patch.source]
        other, engine = self.ends.other(side), self.ends.engine(side)
        n_rows = n_measures(self.prompts.longest_answer, other)
        rows = np.empty((n_rows, len(patches), len(self.prompts)))
        single = [at for at, patch in enumerate(patches) if patch.layer != EVERY_LAYER]
        if single:
            interventions = [(patches[at],) for at in single]
            found = engine.effects(interventions, self.sources, progress, other)
            rows[:, single] = found.rows
        for at in set(range(len(patches))) - set(single):
            found = engine.every_layer(patches[at].source, self.sources, other)
            rows[:, at] = found.rows[:, 0]
            if progress is not None:
                progress(len(self.prompts))
        whole: list[bool] = np.isfinite(rows[0]).all(0).tolist()
        dtype = self.pair.member(side).card.dtype
        require_finite(whole, self.ends.prompts(side).ids, side, dtype)
        return rows

    def measure(
        self,
        layer: int,
        heads: Heads | Iterable[Heads],
        alpha: float,
        *,
        raw: str = RAW,
        mapped: str = MAPPED,
    ) -> tuple[Effects, Effects]:
        """Patch each head set by itself, raw and mapped.

        Args:
            layer: the patched layer.
            heads: the head sets, or one, as ``"0,2"`` or ``[0, 2]``.
            alpha: blend strength, in [0, 1].
            raw: the source that counts as raw.
            mapped: the source that counts as mapped.

        Returns:
            The effects of the raw and of the mapped patches, in the order of the head sets.

        Raises:
            UserError: if the layer was not prepared, a head set does not fit or alpha is outside
                [0, 1].
        """
        sets = head_sets(heads, self.n_heads, layer)
        both = self.effects(
            [Patch(layer, each, alpha, source) for source in (raw, mapped) for each in sets]
        )
        return both[: len(sets)], both[len(sets) :]


def prepare(
    pair: ModelPair,
    maps: Mapping[int, LayerMap],
    settings: Patching | None = None,
    place: Place | None = None,
    *,
    activations: PairActivations | None = None,
    rows: Sequence[int] | None = None,
    metric: Metric | str | None = None,
) -> Experiment:
    """Capture the measured prompts, map them, and set the tuned model behind an engine.

    >>> rq.prepare(pair, maps)
    <Experiment on <ModelPair etiquette: ...>: layers 1, split val>

    Args:
        pair: the pair.
        maps: the maps by layer, as :func:`rq4lens.fit_maps` returns them.
        settings: which split is measured, at how many positions, what the raw patch inserts and
            which way the divergence is taken.
        place: the engine, and how many prompts a forward pass takes.
        activations: already captured activations of this pair.
        rows: places of the split's prompts that are measured, in the order in which they are; all
            of them when left out.
        metric: a metric or its name, in place of the one that the settings name.

    Returns:
        The experiment.

    Raises:
        UserError: if a layer does not exist, or a prompt lacks what the metric needs.
    """
    settings, metric = metric_of(settings or Patching(), metric)
    split, place = settings.split, place or Place()
    check_layers(list(maps), pair.n_layers)
    activations = activations or PairActivations(
        pair, k_positions=settings.k_positions, batch_size=place.prompts_per_pass
    )
    settings = settings.but(k_positions=activations.k_positions)
    if rows is not None:
        place = place.but(batch_size=len(rows))
    measured = slice(None) if rows is None else list(rows)
    # Before any forward pass: it refuses prompts that lack what the metric needs.
    ends = Ends(activations, settings, place, min(maps), measured, metric)
    activations.capture("base", split, range(pair.n_layers), to_the_end=True)
    raw_maps: dict[int, LayerMap] = {}
    if settings.raw_baseline != "identity":
        raw_maps = fit_maps(pair, list(maps), "moments", activations=activations)
    ends.engine("tuned")
    tensors: dict[tuple[int, str], Tensor] = {}
    for layer, layer_map in maps.items():
        z_base = activations.z("base", split, layer)
        raw = raw_maps[layer](z_base) if layer in raw_maps else z_base
        # All prompts are mapped, whichever are measured: products of other shapes round otherwise.
        tensors[layer, RAW] = raw[ends.rows]
        tensors[layer, MAPPED] = layer_map(z_base)[ends.rows]
    groups = np.array(pair.prompts.split(split).groups, dtype=object)
    return Experiment(
        pair=pair,
        settings=settings,
        prompts=ends.prompts("tuned"),
        groups=tuple(groups[ends.rows]),
        maps=dict(maps),
        sources=Sources(tensors, *_made(ends)),
        ends=ends,
        source_maps={(layer, MAPPED): each for layer, each in maps.items()}
        | {(layer, RAW): each for layer, each in raw_maps.items()},
    )


def _made(ends: Ends) -> tuple[dict[str, Callable[[int], Tensor]], dict[str, Any]]:
    """What sources are made of their layer, and whose output matrix they go through."""
    activations, split = ends.activations, ends.settings.split
    dtype = getattr(torch, ends.pair.tuned.card.dtype)

    def base(layer: int) -> Tensor:
        return activations.z("base", split, layer)[ends.rows]

    def tuned(layer: int) -> Tensor:
        return ends.engine("tuned").clean_z(layer)

    def mean(side: Side, layer: int) -> Tensor:
        return activations.z(side, FIT_SPLIT, layer)[activations.there(FIT_SPLIT)].double().mean(0)

    def constant(layer: int) -> Tensor:
        prompts = ends.prompts("tuned")
        return mean("tuned", layer).expand(len(prompts), prompts.n_spots, -1, -1).to(dtype)

    def shifted(layer: int) -> Tensor:
        move = mean("tuned", layer) - mean("base", layer)
        return (base(layer) + move).to(dtype)

    made: dict[str, Callable[[int], Tensor]] = {
        BASE: base,
        SELF: tuned,
        TUNED: tuned,
        CONSTANT: constant,
        SHIFTED: shifted,
    }
    if not ends.pair.keep_both:
        return made, {}
    W_O = {OUTPUT: lambda layer: ends.pair.use("base").model.blocks[layer].attn.W_O.detach()}
    return {**made, OUTPUT: base}, W_O
