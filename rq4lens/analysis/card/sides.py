"""Both models of a pair, what a run measured of them, and what one clean pass of each leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

from rq4lens.analysis.card.passes import Readout
from rq4lens.analysis.card.reads import ReadTexts
from rq4lens.analysis.effects.table import bootstrap_of
from rq4lens.analysis.records import Analysis
from rq4lens.analysis.saved import Run
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.config import Effort, Place, config_from
from rq4lens.disk.run import MAPS, RUN
from rq4lens.errors import UserError
from rq4lens.heads import Head
from rq4lens.models.catalog import pair_from
from rq4lens.models.load.lens import HookedTransformer
from rq4lens.models.pair import SIDES, ModelPair, Side
from rq4lens.models.prompts.prompt_set import MEASURE_SPLIT
from rq4lens.models.prompts.reading import decoded
from rq4lens.patching.activations import check_layers
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.decision import DecisionStates, decision_states
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.engines.row_engine import RowEngine
from rq4lens.patching.maps.map import LayerMap, load_map
from rq4lens.patching.patch import Engine
from rq4lens.results import GridResult

NO_CARD = (
    "head cards need a HookedTransformer, whose norms and weights have one form, and a "
    "TransformerBridge runs the Hugging Face model's own: use --backend hooked where there is one"
)


@dataclass(frozen=True)
class CardInputs:
    """What cards are made from: a pair, what a run measured of it, and its maps by layer.

    ``engines`` have made their clean pass over these prompts already, for patches at the decision
    token alone; those that are missing are made.
    """

    pair: ModelPair
    grid: GridResult | None = None
    analysis: Analysis | None = None
    maps: Mapping[int, LayerMap] = field(default_factory=dict)
    place: Place = field(default_factory=Place)
    engines: Mapping[Side, Engine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = self.pair.tokens("tuned", self.split).ids
        if self.grid is not None and self.grid.prompt_ids != ids:
            raise UserError(
                f"the grid was measured on {self.grid.n_prompts} prompts that are not the "
                f"{len(ids)} of split {self.split!r}: give the grid of this pair."
            )

    @classmethod
    def of_run(cls, run: Run, *, trust_remote_code: bool = False) -> CardInputs:
        """The inputs that a finished run names; its models are loaded again."""
        pair, place = models_of(run, trust_remote_code=trust_remote_code)
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


def models_of(run: Run, *, trust_remote_code: bool = False) -> tuple[ModelPair, Place]:
    """The pair that a finished run names, its models to be loaded again, and where they go."""
    config = config_from(run.run["config"], str(run.directory / RUN))
    place = config.place.but(device="auto")
    source = config.pair.found_from(run.directory).but(trust_remote_code=trust_remote_code)
    return pair_from(source, config.reading, place), place


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


class Sides:
    """Both models behind engines, and what a clean pass of each leaves at the decision token."""

    def __init__(self, inputs: CardInputs, layers: Sequence[int]) -> None:
        self.inputs, self.first_layer = inputs, min(layers)
        self.tokens = {side: inputs.pair.tokens(side, inputs.split).decided() for side in SIDES}
        self.aligned = self.tokens["base"].token_ids == self.tokens["tuned"].token_ids
        self._engines: dict[Side, Engine] = dict(inputs.engines)
        tokenizers = {side: inputs.pair.member(side).tokenizer for side in SIDES}
        texts = {id(each): cache(partial(decoded, each)) for each in tokenizers.values()}
        self.token = {side: texts[id(each)] for side, each in tokenizers.items()}
        """The text of a token in each model."""
        self.states: dict[Side, DecisionStates] = {}
        self.readouts: dict[Side, Readout] = {}
        for side in SIDES:
            other = self.states["base"].pattern if self.states and self.aligned else None
            self.states[side] = decision_states(self.engine(side), layers, other)
            self.readouts[side] = Readout.of(self.model(side), self.states[side].resid)

    def model(self, side: Side) -> HookedTransformer:
        """One of the models, the other one released if both do not fit."""
        if not self.inputs.pair.keep_both:
            self._engines = {at: each for at, each in self._engines.items() if at == side}
        model = self.inputs.pair.use(side).model
        if not isinstance(model, HookedTransformer):
            raise UserError(f"{NO_CARD}.")
        return model

    def engine(self, side: Side) -> RowEngine | HookEngine:
        """The engine of one model, made once while the model stays."""
        model = self.model(side)
        if side not in self._engines:
            self._engines[side] = make_engine(
                model, self.tokens[side], place=self.inputs.place, first_layer=self.first_layer
            )
        engine = self._engines[side]
        assert isinstance(engine, RowEngine | HookEngine)  # all prompts have one window
        return engine

    @cached_property
    def one_vocabulary(self) -> bool:
        """Whether a token is the same in both models."""
        sizes = {readout.n_vocab for readout in self.readouts.values()}
        return len(sizes) == 1 and self.inputs.pair.same_tokenizer

    @cached_property
    def texts(self) -> dict[Side, ReadTexts]:
        """The prompts as each model reads them."""
        return {side: ReadTexts.of(self.tokens[side].token_ids, self.token[side]) for side in SIDES}
