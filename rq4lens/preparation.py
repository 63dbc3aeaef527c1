"""From a configuration to an experiment: activations, maps, engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rq4lens.config import RunConfig
from rq4lens.errors import UserError
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts import FIT_SPLIT
from rq4lens.patching.activations import PairActivations, check_layers
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.fitting import fit_maps
from rq4lens.patching.grid import GridPlan
from rq4lens.stages import Clock


def plan_of(config: RunConfig, pair: ModelPair) -> GridPlan:
    """The grid's plan, checked against the pair.

    Raises:
        UserError: if no layer is named, or a layer or k does not fit the models.
    """
    if config.layer is None:
        raise UserError(
            f"no layer is named for pair {config.pair!r}: give one from 0 to {pair.n_layers - 1} "
            "with --layer."
        )
    plan = GridPlan(pair.n_heads, config.layer, config.control_layer, config.k, config.random_seeds)
    check_layers(plan.layers, pair.n_layers)
    return plan


def capture(
    config: RunConfig, pair: ModelPair, layers: Sequence[int], clock: Clock
) -> PairActivations:
    """Read both models' activations.

    Args:
        config: which split is measured, at how many positions.
        pair: the pair.
        layers: the layers to read.
        clock: times the stage.

    Returns:
        The activations.
    """
    activations = PairActivations(
        pair, k_positions=config.k_positions, batch_size=config.batch_size
    )
    with clock("capture"):
        # All of base before any of tuned: the models may not fit into memory together.
        activations.capture("base", FIT_SPLIT, layers)
        activations.capture("base", config.split, layers)
        activations.capture("tuned", FIT_SPLIT, layers)
    return activations


def prepare_experiment(
    config: RunConfig,
    activations: PairActivations,
    layers: Sequence[int],
    clock: Clock,
    *,
    maps_directory: Path | None = None,
    fresh: bool = False,
) -> Experiment:
    """Fit or reuse the maps, and set the tuned model behind an engine.

    Args:
        config: how to fit and patch.
        activations: what :func:`capture` read.
        layers: the layers to prepare.
        clock: times the stages.
        maps_directory: where fitted maps are looked up and kept, if anywhere.
        fresh: fit every map again.

    Returns:
        The experiment.
    """
    pair = activations.pair
    with clock("maps"):
        maps = fit_maps(
            pair,
            layers,
            config.map_kind,
            scope=config.map_scope,
            seed=config.seed,
            activations=activations,
            directory=maps_directory,
            fresh=fresh,
        )
    with clock("prepare"):
        return prepare(
            pair,
            maps,
            split=config.split,
            raw_baseline=config.raw_baseline,
            kl_direction=config.kl_direction,
            engine=config.engine,
            batch_size=config.batch_size,
            activations=activations,
        )
