"""The bench that every job works at: a pair, its activations, maps and experiments, made once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rq4lens.config import PairSource, RunConfig
from rq4lens.disk.files import refuse_no_directory, remove_leftovers
from rq4lens.disk.run import ACTIVATIONS, CONDITIONS, MAPS, MEASURED, refuse_foreign
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.progress import Clock, Stage, silent
from rq4lens.models.catalog import keep_base_card, pair_from, prompts_left_in, size_of
from rq4lens.models.load.devices import choose_threads, chosen_devices, resolve_device
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import FIT_SPLIT
from rq4lens.patching.activations import PairActivations, check_layers
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.grid import GridPlan
from rq4lens.patching.maps.fitting import fit_maps, maps_from
from rq4lens.patching.maps.map import LayerMap
from rq4lens.patching.measured import Measurer
from rq4lens.patching.metrics import metric_named, require_needs
from rq4lens.patching.patch import build_ahead

log = logging.getLogger(__name__)


class Bench:
    """A pair and what is measured of it, each part made when it is first needed.

    Args:
        config: the pair, and how it is read, patched and measured.
        directory: the run directory that keeps conditions, maps and activations, if any.
        fresh: make everything again, whatever the directory holds.
        stage: opens a stage of the work, for progress bars.
        pair: a pair in memory, in place of the one that the configuration names.

    Raises:
        UserError: if the directory holds other files, or there is no configuration.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path | str | None = None,
        *,
        fresh: bool = False,
        stage: Stage = silent,
        pair: ModelPair | None = None,
    ) -> None:
        refuse_no_directory(directory, "--out; in Python the directory")
        refuse_no_directory(config.place.cache, "--cache; in Python rq.Place(cache=...)")
        if directory is not None:
            directory = Path(directory)
            refuse_foreign(directory)
            remove_leftovers(directory)
        self.given_pair = pair
        self.config = config if pair is None else _as_given(config, pair)
        self.directory = directory
        self.fresh = fresh
        self.keep_both = config.place.keep_both
        self.clock = Clock(stage)
        self._measurer: Measurer | None = None
        self._maps: dict[int, LayerMap] = {}

    @property
    def run_directory(self) -> Path:
        """The run directory of a job that has one."""
        if self.directory is None:
            raise UserError("this job writes a run: give it a directory.")
        return self.directory

    @cached_property
    def pair(self) -> ModelPair:
        """The pair; the base model is not loaded while its cached activations do."""
        config, given = self.config, self.given_pair
        if (metric := metric_named(config.patching.metric)) is not None:  # before a model is read
            asked = given.prompts if given else prompts_left_in(config.pair, config.reading)
            require_needs(metric, asked.split(config.patching.split))
        if given is not None:
            return given
        cache = None if self.fresh else self.cache
        place = config.place.but(keep_both=self.keep_both)
        tuned, base = (size_of(config.pair, side, place) for side in ("tuned", "base"))
        choose_threads(tuned.weights.total)
        vocabularies = tuned.cfg.d_vocab_out, base.cfg.d_vocab_out
        exit_device, direction = chosen_devices(place).names[-1], config.patching.kl_direction
        build_ahead(exit_device, tuned.cfg.dtype, vocabularies, direction)
        return pair_from(config.pair, config.reading, place, cache=cache)

    @property
    def plan(self) -> GridPlan:
        """The grid of the configuration, checked against the pair."""
        return plan_for(self.config, self.pair.n_layers, self.pair.n_heads)

    @property
    def cache(self) -> Path | None:
        """Where activations of the base model are cached, if anywhere."""
        if self.config.place.cache is not None:
            return Path(self.config.place.cache)
        return None if self.directory is None else self.directory / ACTIVATIONS

    @cached_property
    def store(self) -> Store | None:
        """The measured conditions on disk, if there is a run directory."""
        return None if self.directory is None else Store(self.directory / CONDITIONS, self.fresh)

    @cached_property
    def chunks(self) -> Store | None:
        """The head sets that an analysis measured, if there is a run directory."""
        return None if self.directory is None else Store(self.directory / MEASURED, self.fresh)

    @cached_property
    def activations(self) -> PairActivations:
        """What the forward passes of both models give; filled by :meth:`capture`."""
        return PairActivations(
            self.pair,
            k_positions=self.config.patching.k_positions,
            batch_size=self.config.place.prompts_per_pass,
            store=None if self.cache is None else Store(self.cache, fresh=self.fresh),
            device=torch.device(resolve_device(self.config.place.device)).type,
        )

    def capture(self, layers: Sequence[int]) -> PairActivations:
        """Read both models' activations at some layers, and cache those of base."""
        split = self.config.patching.split
        with self.clock("capture"):
            # All of base before any of tuned: the models may not fit into memory together.
            self.activations.capture("base", FIT_SPLIT, layers)
            self.activations.capture("base", split, range(self.pair.n_layers), to_the_end=True)
            self.activations.capture("tuned", FIT_SPLIT, layers)
        if not self.pair.base.was_loaded:
            log.info("the base model was not loaded: its activations are cached in %s", self.cache)
        elif self.cache is not None:
            self.activations.keep()
            if self.given_pair is None:
                keep_base_card(self.config.pair, self.config.place, self.pair, self.cache)
        return self.activations

    def maps(self, layers: Sequence[int]) -> dict[int, LayerMap]:
        """The maps of some layers: from the run directory, or fitted once."""
        missing = [layer for layer in layers if layer not in self._maps]
        if missing:
            self._maps |= self._fit(missing)
        return {layer: self._maps[layer] for layer in layers}

    def _fit(self, layers: Sequence[int]) -> dict[int, LayerMap]:
        kind, scope = self.config.patching.map_kind, self.config.patching.map_scope
        how: dict[str, Any] = {"scope": scope, "seed": self.config.effort.seed}
        if self.directory is None:
            return fit_maps(self.pair, layers, kind, activations=self.activations, **how)
        store = Store(self.directory / MAPS, fresh=self.fresh)
        return maps_from(store, self.activations, layers, kind, **how)

    def measurer(self, layers: Sequence[int], prompts: Sequence[str] = ()) -> Measurer:
        """Some layers ready to be measured; the one that was made last stays, and serves for less.

        Args:
            layers: the layers.
            prompts: ids of the prompts; all measured prompts when empty.
        """
        if self._measurer is None or not self._serves(self._measurer, layers, prompts):
            self._measurer = None  # lets the memory of the one before go first
            self.capture(layers)
            with self.clock("maps"):
                maps = self.maps(layers)
            with self.clock("prepare"):
                experiment = prepare(
                    self.pair,
                    maps,
                    self.config.patching,
                    self.config.place,
                    activations=self.activations,
                    rows=self._rows_of(prompts) if prompts else None,
                )
            self._measurer = self.measuring(experiment)
        return self._measurer

    def _serves(self, measurer: Measurer, layers: Sequence[int], prompts: Sequence[str]) -> bool:
        ids = prompts or self.pair.tokens("tuned", self.config.patching.split).ids
        experiment = measurer.experiment
        return set(layers) <= set(experiment.maps) and experiment.prompt_ids == tuple(ids)

    def _rows_of(self, prompts: Sequence[str]) -> list[int]:
        ids = self.pair.tokens("tuned", self.config.patching.split).ids
        places = {each: place for place, each in enumerate(ids)}
        return [places[each] for each in prompts]

    def measuring(self, experiment: Experiment) -> Measurer:
        """Measures with an experiment what the run directory does not hold."""
        return Measurer(experiment, self.store, self.chunks)


def _as_given(config: RunConfig, pair: ModelPair) -> RunConfig:
    """A configuration that says of its pair what a pair in memory is."""
    place = config.place.but(dtype=pair.tuned.card.dtype)
    if pair.tuned.is_loaded:
        place = place.but(device=str(next(pair.tuned.model.parameters()).device))
    changes = {"pair": PairSource(pair=pair.name), "reading": pair.reading, "place": place}
    return config.model_copy(update=changes)


def plan_for(config: RunConfig, n_layers: int, n_heads: int) -> GridPlan:
    """The grid of a configuration, checked against models of so many layers and heads.

    Raises:
        UserError: if no layer is named, or a layer or k does not fit the models.
    """
    if config.patching.layer is None:
        raise UserError(
            f"no layer is named for pair {config.pair.name!r}: give one from 0 to {n_layers - 1} "
            "with --layer."
        )
    plan = GridPlan(n_heads, config.patching)
    check_layers(plan.layers, n_layers)
    return plan
