"""What is to be validated, as any process understands it."""

from __future__ import annotations

from dataclasses import dataclass

from rq4lens.analysis.rankings.methods import METHODS
from rq4lens.config import RunConfig
from rq4lens.models.catalog import pair_from
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.validation.suite import Suite
from rq4lens.validation.trials import SCENARIOS


@dataclass(frozen=True)
class ValidationRequest:
    """What is to be validated, as any process understands it.

    Args:
        config: names the base model, the prompts and alpha.
        methods: names of ranking methods.
        layer: the layer to plant in; None draws one per pair.
        pairs: planted pairs per scenario.
        drift: how far every weight moves, relative to its matrix.
    """

    config: RunConfig
    methods: tuple[str, ...] = tuple(METHODS)
    layer: int | None = None
    pairs: int = 4
    drift: float = 0.02

    def suite(self) -> Suite:
        """Load the base model.

        Raises:
            UserError: if a method does not exist, or the model cannot be loaded or planted in.
        """
        base, prompts = base_of(self.config)
        return Suite(
            base,
            prompts,
            methods=self.methods,
            layers=None if self.layer is None else [self.layer],
            alpha=self.config.patching.alpha,
            pairs=self.pairs,
            drift=self.drift,
            seed=self.config.effort.seed,
            reading=self.config.reading,
        )

    @property
    def n_planted(self) -> int:
        """How many planted pairs there are."""
        return self.pairs * len(SCENARIOS)


def methods_of(text: str) -> tuple[str, ...]:
    """Ranking methods as a user writes them, separated by commas; ``"ALL"`` are all of them."""
    return tuple(METHODS) if text.upper() == "ALL" else tuple(text.split(","))


def base_of(config: RunConfig) -> tuple[LoadedModel, PromptSet]:
    """The base model and the prompts that a configuration names; a tuned model is not loaded.

    Raises:
        UserError: if something is missing or the model cannot be loaded.
    """
    source = config.pair.but(tuned=config.pair.tuned or config.pair.base)
    pair = pair_from(source, config.reading, config.place.but(keep_both=False))
    return pair.use("base").loaded, pair.prompts
