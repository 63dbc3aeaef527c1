"""From a configuration to an experiment: activations, maps, engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from rq4lens.config import RunConfig
from rq4lens.disk.run import ACTIVATIONS
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.progress import Clock
from rq4lens.models.catalog import keep_base_card, resolve_device
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import FIT_SPLIT
from rq4lens.patching.activations import PairActivations, check_layers
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.grid import GridPlan
from rq4lens.patching.maps.fitting import fit_maps, maps_from
from rq4lens.patching.maps.map import DEFAULT_KIND, LayerMap

log = logging.getLogger(__name__)


def plan_of(config: RunConfig, pair: ModelPair) -> GridPlan:
    """The grid's plan, checked against the pair.

    Raises:
        UserError: if no layer is named, or a layer or k does not fit the models.
    """
    return plan_for(config, pair.n_layers, pair.n_heads)


def plan_for(config: RunConfig, n_layers: int, n_heads: int) -> GridPlan:
    """The grid's plan, checked against models of so many layers and heads.

    Raises:
        UserError: if no layer is named, or a layer or k does not fit the models.
    """
    if config.layer is None:
        raise UserError(
            f"no layer is named for pair {config.pair!r}: give one from 0 to {n_layers - 1} "
            "with --layer."
        )
    plan = GridPlan(n_heads, config.layer, config.control_layer, config.k, config.random_seeds)
    check_layers(plan.layers, n_layers)
    return plan


def cache_of(config: RunConfig, directory: Path | None = None) -> Path | None:
    """Where activations of the base model are kept."""
    if config.cache is not None:
        return Path(config.cache)
    return None if directory is None else directory / ACTIVATIONS


def capture(
    config: RunConfig,
    pair: ModelPair,
    layers: Sequence[int],
    clock: Clock,
    *,
    cache: Path | None = None,
    fresh: bool = False,
) -> PairActivations:
    """Read both models' activations."""
    device = torch.device(resolve_device(config.device)).type
    activations = PairActivations(
        pair,
        k_positions=config.k_positions,
        batch_size=config.batch_size,
        store=None if cache is None else Store(cache, fresh=fresh),
        device=device,
    )
    with clock("capture"):
        # All of base before any of tuned: the models may not fit into memory together.
        activations.capture("base", FIT_SPLIT, layers)
        activations.capture("base", config.split, layers)
        activations.capture("tuned", FIT_SPLIT, layers)
    if not pair.base.was_loaded:
        log.info("the base model was not loaded: its activations are kept in %s", cache)
    return activations


def keep_base(
    config: RunConfig, pair: ModelPair, activations: PairActivations, cache: Path | None
) -> None:
    """Keep what a later run needs of the base model, so that it need not be loaded again.

    Raises:
        UserError: if it cannot be written.
    """
    if cache is not None and pair.base.was_loaded:
        activations.keep()
        keep_base_card(config, pair, cache)


def maps_of(
    config: RunConfig,
    activations: PairActivations,
    layers: Sequence[int],
    store: Store | None = None,
) -> dict[int, LayerMap]:
    """The maps of a configuration, from a store if there is one."""
    kind, scope, seed = config.map_kind or DEFAULT_KIND, config.map_scope, config.seed
    if store is not None:
        return maps_from(store, activations, layers, kind, scope=scope, seed=seed)
    return fit_maps(activations.pair, layers, kind, scope=scope, seed=seed, activations=activations)


def prepare_experiment(
    config: RunConfig,
    activations: PairActivations,
    layers: Sequence[int],
    clock: Clock,
    *,
    store: Store | None = None,
    rows: Sequence[int] | None = None,
) -> Experiment:
    """Fit the maps or take them from a store, and set the tuned model behind an engine."""
    pair = activations.pair
    with clock("maps"):
        maps = maps_of(config, activations, layers, store)
    with clock("prepare"):
        return prepare(
            pair,
            maps,
            split=config.split,
            raw_baseline=config.raw_baseline,
            kl_direction=config.kl_direction,
            engine=config.engine,
            batch_size=config.batch_size if rows is None else len(rows),
            activations=activations,
            rows=rows,
        )
