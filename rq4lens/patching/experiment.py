"""A pair made ready to measure: sources captured and mapped, the tuned model behind an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Float
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
    Effects,
    Engine,
    Patch,
    Progress,
    Sources,
)


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
        return replace(self, sources=Sources({**self.sources, **extra}))

    def effects(self, patches: Sequence[Patch], progress: Progress | None = None) -> Effects:
        """Effect of each patch by itself on each prompt.

        Args:
            patches: the patches; each is a forward pass of its own.
            progress: called with the number of rows (prompt x patch) just finished.

        Returns:
            The effects, in the order of the patches.

        Raises:
            UserError: if a layer was not prepared, or a head set does not fit.
        """
        return self.engine.effects([(patch,) for patch in patches], self.sources, progress)

    def measure(
        self,
        layer: int,
        head_sets: Sequence[HeadSet],
        alpha: float,
        *,
        raw: str = RAW,
        mapped: str = MAPPED,
    ) -> tuple[Effects, Effects]:
        """Patch each head set by itself, raw and mapped.

        Args:
            layer: the patched layer.
            head_sets: the head sets.
            alpha: blend strength, in [0, 1].
            raw: the source that counts as raw.
            mapped: the source that counts as mapped.

        Returns:
            The effects of the raw and of the mapped patches, in the order of the head sets.

        Raises:
            UserError: if the layer was not prepared, a head set does not fit or alpha is outside
                [0, 1].
        """
        both = self.effects(
            [Patch(layer, heads, alpha, source) for source in (raw, mapped) for heads in head_sets]
        )
        return both[: len(head_sets)], both[len(head_sets) :]


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
    raw_maps: dict[int, LayerMap] = {}
    if settings.raw_baseline != "identity":
        raw_maps = fit_maps(pair, list(maps), "moments", activations=activations)
    prompts, groups = pair.tokens("tuned", split), pair.prompts.split(split).groups
    chosen: slice | list[int] = slice(None)
    if rows is not None:
        chosen = list(rows)
        prompts, groups = prompts.some(rows), tuple(groups[row] for row in rows)
        place = place.but(batch_size=len(rows))
    model = pair.use("tuned").model
    tuned_engine = make_engine(model, prompts, settings, place, first_layer=min(maps))
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
        groups=groups,
        maps=dict(maps),
        sources=Sources(tensors),
        engine=tuned_engine,
        source_maps={(layer, MAPPED): each for layer, each in maps.items()}
        | {(layer, RAW): each for layer, each in raw_maps.items()},
    )
