"""What head cards are made from: a pair, and what a run measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rq4lens.analysis.effects.table import bootstrap_of
from rq4lens.analysis.result import Analysis
from rq4lens.analysis.saved import Run
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.config import Effort, Place, config_from
from rq4lens.disk.run import MAPS, RUN
from rq4lens.errors import UserError
from rq4lens.heads import Head
from rq4lens.models.catalog import pair_from
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import MEASURE_SPLIT
from rq4lens.patching.activations import check_layers
from rq4lens.patching.maps.map import LayerMap, load_map
from rq4lens.results import GridResult


@dataclass(frozen=True)
class CardInputs:
    """What cards are made from: a pair, and what a run measured of it.

    Args:
        pair: the pair.
        grid: its measured grid, if there is one.
        analysis: the analysis of that grid.
        maps: maps by layer.
        place: the engine, and how many prompts a forward pass takes.
    """

    pair: ModelPair
    grid: GridResult | None = None
    analysis: Analysis | None = None
    maps: Mapping[int, LayerMap] = field(default_factory=dict)
    place: Place = field(default_factory=Place)

    def __post_init__(self) -> None:
        ids = self.pair.tokens("tuned", self.split).ids
        if self.grid is not None and self.grid.prompt_ids != ids:
            raise UserError(
                f"the grid was measured on {self.grid.n_prompts} prompts that are not the "
                f"{len(ids)} of split {self.split!r}: give the grid of this pair."
            )

    @classmethod
    def of_run(cls, run: Run, *, trust_remote_code: bool = False) -> CardInputs:
        """The inputs that a finished run names; its models are loaded again.

        Raises:
            UserError: if a model cannot be loaded.
        """
        config = config_from(run.run["config"], str(run.directory / RUN))
        place = config.place.but(device="auto")
        source = config.pair.but(trust_remote_code=trust_remote_code)
        pair = pair_from(source, config.reading, place)
        return cls(pair, run.grid, run.analysis, maps_of(run), place)

    @property
    def split(self) -> str:
        """The split that is looked at."""
        return MEASURE_SPLIT if self.grid is None else self.grid.settings.patching.split

    @cached_property
    def bootstrap(self) -> Bootstrap:
        """The resamples of the grid, or as many of the prompts."""
        if self.grid is not None:
            return bootstrap_of(self.grid)
        effort = Effort()
        return Bootstrap(self.pair.prompts.split(self.split).groups, effort.resamples, effort.seed)

    def refuse_missing(self, heads: Sequence[Head]) -> None:
        """Refuse heads that the models do not have."""
        check_layers([head.layer for head in heads], self.pair.n_layers)
        for head in heads:
            if not 0 <= head.index < self.pair.n_heads:
                raise UserError(
                    f"head {head} does not exist: a layer of this model has heads 0 to "
                    f"{self.pair.n_heads - 1}."
                )


def maps_of(run: Run) -> dict[int, LayerMap]:
    """The maps that a run used, found by their fingerprints; a lost one is left out."""
    wanted = {entry["fingerprint"]: int(layer) for layer, entry in run.run["maps"].items()}
    found = {}
    for path in sorted((run.directory / MAPS).glob("*.safetensors")):
        try:
            layer_map = load_map(path)
        except UserError:
            continue  # whoever needs this map says that it is missing
        if layer_map.fingerprint in wanted:
            found[wanted[layer_map.fingerprint]] = layer_map
    return found
