"""A pair made ready to measure: sources captured and mapped, the tuned model behind an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import einops
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from rq4lens.config import Patching, Place
from rq4lens.heads import HeadSet
from rq4lens.models.load.loading import HookedModel
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.activations import PairActivations, check_layers
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.maps.map import LayerMap
from rq4lens.patching.patch import (
    MAPPED,
    RAW,
    SELF,
    Engine,
    Patch,
    Progress,
    Sources,
)


@dataclass(frozen=True)
class HeadSetEffects:
    """Raw and mapped effect of several head sets of one layer, per prompt.

    Args:
        layer: the patched layer.
        alpha: blend strength.
        head_sets: the patched head sets; one row of each array.
        kl_raw_nats: KL of the raw patch.
        kl_mapped_nats: KL of the mapped patch.
        answer_logprob_change_raw_nats: change of the log-probability of the clean model's most
            likely token under the raw patch.
        answer_logprob_change_mapped_nats: the same under the mapped patch.
    """

    layer: int
    alpha: float
    head_sets: tuple[HeadSet, ...]
    kl_raw_nats: Float64[ndarray, "condition prompt"]
    kl_mapped_nats: Float64[ndarray, "condition prompt"]
    answer_logprob_change_raw_nats: Float64[ndarray, "condition prompt"]
    answer_logprob_change_mapped_nats: Float64[ndarray, "condition prompt"]

    @property
    def delta_nats(self) -> Float64[ndarray, "condition prompt"]:
        """``ΔKL`` of each head set on each prompt."""
        return self.kl_raw_nats - self.kl_mapped_nats


@dataclass(frozen=True)
class Experiment:
    """A pair, its measured prompts, its maps and an engine, ready to measure any head set.

    Args:
        pair: the pair.
        settings: how the pair is patched and measured.
        prompts: the measured prompts as the tuned model reads them.
        groups: the group of each prompt.
        maps: the maps by layer.
        sources: what can be blended in: ``"raw"``, ``"mapped"`` and ``"self"`` of each layer.
        engine: measures interventions on the tuned model.
        source_maps: the map that a source went through, by ``(layer, source)``; a source without
            one is the activation itself.
    """

    pair: ModelPair
    settings: Patching
    prompts: TokenizedPrompts
    groups: tuple[str, ...]
    maps: Mapping[int, LayerMap]
    sources: Sources
    engine: Engine
    source_maps: Mapping[tuple[int, str], LayerMap] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """The split of the measured prompts."""
        return self.settings.split

    @property
    def k_positions(self) -> int:
        """How many positions are patched, the decision token last."""
        return self.settings.k_positions

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
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Experiment(**values | {"sources": Sources({**self.sources, **extra})})

    def measure(
        self,
        layer: int,
        head_sets: Sequence[HeadSet],
        alpha: float,
        *,
        raw: str = RAW,
        mapped: str = MAPPED,
        progress: Progress | None = None,
    ) -> HeadSetEffects:
        """Patch each head set by itself, raw and mapped.

        Args:
            layer: the patched layer.
            head_sets: the head sets.
            alpha: blend strength, in [0, 1].
            raw: the source that counts as raw.
            mapped: the source that counts as mapped.
            progress: called with the number of rows (prompt x intervention) just finished.

        Returns:
            The effects, in the order of the head sets.

        Raises:
            UserError: if the layer was not prepared, a head set does not fit or alpha is outside
                [0, 1].
        """
        interventions = [
            (Patch(layer, heads, alpha, source),) for source in (raw, mapped) for heads in head_sets
        ]
        effects = self.engine.effects(interventions, self.sources, progress)
        pick = "(source condition) prompt -> source condition prompt"
        kl = einops.rearrange(effects.kl_nats, pick, source=2)
        change = einops.rearrange(effects.answer_logprob_change_nats, pick, source=2)
        return HeadSetEffects(layer, alpha, tuple(head_sets), kl[0], kl[1], change[0], change[1])


def prepare(
    pair: ModelPair,
    maps: Mapping[int, LayerMap],
    settings: Patching | None = None,
    place: Place | None = None,
    *,
    activations: PairActivations | None = None,
    rows: Sequence[int] | None = None,
) -> Experiment:
    """Capture the measured prompts, map them, and set the tuned model behind an engine.

    Args:
        pair: the pair.
        maps: the maps by layer, as :func:`rq4lens.fit_maps` returns them.
        settings: which split is measured, at how many positions, what the raw patch inserts and
            which way the divergence is taken.
        place: the engine, and how many prompts a forward pass takes.
        activations: already captured activations of this pair.
        rows: places of the split's prompts that are measured, in the order in which they are; all
            of them when left out.

    Returns:
        The experiment.

    Raises:
        UserError: if a layer does not exist.
    """
    settings, place = settings or Patching(), place or Place()
    split = settings.split
    check_layers(list(maps), pair.n_layers)
    activations = activations or PairActivations(
        pair, k_positions=settings.k_positions, batch_size=place.batch_size
    )
    settings = settings.but(k_positions=activations.k_positions)
    activations.capture("base", split, list(maps))
    raw_maps = (
        {}
        if settings.raw_baseline == "identity"
        else fit_maps(pair, list(maps), "moments", activations=activations)
    )
    every, groups = pair.tokens("tuned", split), pair.prompts.split(split).groups
    chosen = slice(None) if rows is None else list(rows)
    prompts = every if rows is None else every.some(rows)
    tuned_engine = make_engine(
        pair.use("tuned").model,
        prompts,
        settings,
        place if rows is None else place.but(batch_size=len(rows)),
        first_layer=min(maps),
    )
    tensors: dict[tuple[int, str], Tensor] = {}
    for layer, layer_map in maps.items():
        z_base = activations.z("base", split, layer)
        raw = raw_maps[layer](z_base) if layer in raw_maps else z_base
        # All prompts are mapped, whichever are measured: products of other shapes round otherwise.
        tensors[layer, RAW], tensors[layer, MAPPED] = raw[chosen], layer_map(z_base)[chosen]
        tensors[layer, SELF] = tuned_engine.tuned_z(layer)
    return Experiment(
        pair=pair,
        settings=settings,
        prompts=prompts,
        groups=groups if rows is None else tuple(groups[row] for row in rows),
        maps=dict(maps),
        sources=Sources(tensors),
        engine=tuned_engine,
        source_maps={(layer, MAPPED): each for layer, each in maps.items()}
        | {(layer, RAW): each for layer, each in raw_maps.items()},
    )
