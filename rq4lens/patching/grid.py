"""The grid of the main job: which head sets are measured, and their results."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from rq4lens.config import Effort, Patching
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.models.pair import ModelPair
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.keys import PREPARED
from rq4lens.patching.maps.map import LayerMap
from rq4lens.patching.measured import Measurer, Planned
from rq4lens.patching.metrics import Metric, metric_of
from rq4lens.patching.patch import SELF, Progress
from rq4lens.results import (
    EVERY,
    EVERY_LAYER,
    ConditionResult,
    GridResult,
    GridSettings,
    HeadRanking,
    Transfer,
    rank_conditions,
)


@dataclass(frozen=True)
class GridPlan:
    """Which conditions the grid has."""

    n_heads: int
    settings: Patching

    def __post_init__(self) -> None:
        if self.settings.layer is None:
            raise UserError("no layer is named: give the one whose heads are patched.")
        if self.layer == self.control_layer:
            raise UserError(
                f"layer {self.layer} cannot be its own control: choose another control layer."
            )
        for k in self.settings.k:
            if not 1 <= k <= self.n_heads:
                raise UserError(
                    f"k {k} does not fit: a layer has {self.n_heads} heads; choose 1 to "
                    f"{self.n_heads}."
                )

    @property
    def ks(self) -> tuple[int, ...]:
        """The sizes of head sets; as many as the layer has are the condition ``full``."""
        return tuple(k for k in self.settings.k if k < self.n_heads)

    @property
    def layer(self) -> int:
        """The main layer."""
        return int(self.settings.layer or 0)

    @property
    def control_layer(self) -> int | None:
        """The control layer, if there is one."""
        return self.settings.control_layer

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that need a map."""
        return (self.layer,) if self.control_layer is None else (self.layer, self.control_layer)

    @property
    def n_patches(self) -> int:
        """How many patches it measures, raw and mapped, if no two head sets are the same."""
        n_top = 4 * len(self.ks)
        return n_top + sum(len(planned.patches) for planned in self.fixed())

    def fixed(self) -> list[Planned]:
        """Every condition whose head set is known before anything is measured."""
        n_heads = self.n_heads
        planned = [self._planned(f"head{h}", HeadSet.of([h], n_heads)) for h in range(n_heads)]
        for k in self.ks:
            for seed in self.settings.random_seeds:
                drawn = HeadSet.of(random.Random(seed).sample(range(n_heads), k), n_heads)
                planned.append(self._planned(f"rand{k}_s{seed}", drawn))
        if self.control_layer is not None:
            alpha = self.settings.alpha
            planned.append(Planned("ctrl_full", self.control_layer, HeadSet.all(n_heads), alpha))
        return [*planned, *self.checks(), self.every_layer]

    @property
    def every_layer(self) -> Planned:
        """All heads of all layers at once, at full strength."""
        return Planned(EVERY, EVERY_LAYER, HeadSet.all(self.n_heads), 1.0)

    def checks(self) -> list[Planned]:
        """The whole layer, and the two conditions that must read 0."""
        everything = HeadSet.all(self.n_heads)
        return [
            self._planned("full", everything),
            self._planned("none", HeadSet.none(self.n_heads)),
            self._planned("self", everything, SELF),
        ]

    def top(self, ranking: HeadRanking) -> list[Planned]:
        """The top-k conditions, once the single heads are ranked."""
        return [self._planned(f"top{k}", ranking.top_set(k)) for k in self.ks]

    def _planned(self, cond: str, heads: HeadSet, source: str | None = None) -> Planned:
        return Planned(cond, self.layer, heads, self.settings.alpha, source)

    @property
    def table_order(self) -> list[str]:
        """The names of all conditions in the order in which they are listed."""
        names = ["full", *(f"head{head}" for head in range(self.n_heads))]
        for k in self.ks:
            names += [f"top{k}", *(f"rand{k}_s{seed}" for seed in self.settings.random_seeds)]
        return [*names, *(["ctrl_full"] if self.layers[1:] else []), "none", "self"]


def run_grid(
    pair: ModelPair,
    maps: Mapping[int, LayerMap],
    layer: int,
    control_layer: int | None = None,
    alpha: float = 0.3,
    *,
    settings: Patching | None = None,
    effort: Effort | None = None,
    metric: Metric | str | None = None,
) -> GridResult:
    """Measure every condition of the main job.

    These are: all heads (``full``), each single head, the top k and random k heads, all heads of
    the control layer, and the two checks ``none`` and ``self``, which must read 0.

    >>> rq.run_grid(pair, maps, layer=1).ranking_by("to_base").top(2)
    (0, 2)

    Args:
        pair: the pair.
        maps: the maps of at least the main and the control layer.
        layer: the main layer.
        control_layer: the control layer, or None.
        alpha: blend strength, in [0, 1].
        settings: everything else that decides what is patched and measured.
        effort: resamples and seed of what is drawn later, recorded with the result.
        metric: a metric or its name; it then ranks heads unless the settings say otherwise.

    Returns:
        The grid's results, with every prompt's own numbers.

    Raises:
        UserError: if a layer has no map, a k does not fit, alpha is outside [0, 1], or a prompt
            lacks what the metric needs.
    """
    named = (settings or Patching()).but(layer=layer, control_layer=control_layer, alpha=alpha)
    named, metric = metric_of(named, metric)
    return measure_grid(prepare(pair, maps, named, metric=metric), named, effort)


def measure_grid(
    measurer: Measurer | Experiment,
    settings: Patching,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> GridResult:
    """Every condition of the main job, from an experiment that is prepared.

    >>> rq.measure_grid(experiment, rq.Patching(layer=1, k=(1,)))
    <GridResult etiquette, layer 1 of 6, ...>

    Raises:
        UserError: if a layer has no map or a k does not fit.
    """
    measurer = Measurer.of(measurer)
    plan = GridPlan(measurer.experiment.n_heads, settings)
    settings = settings.but(k=plan.ks)
    for needed in plan.layers:
        if needed not in measurer.experiment.maps:
            raise UserError(
                f"layer {needed} has no map: maps are fitted for "
                f"{sorted(measurer.experiment.maps)}; fit it with "
                f"fit_maps(pair, layers=[..., {needed}])."
            )
    fixed = measurer.conditions(plan.fixed(), progress)
    top = plan.top(rank_conditions(fixed, plan.n_heads, settings.rank_by))
    results = fixed | measurer.conditions(top, progress)
    conditions = {name: results[name] for name in plan.table_order}
    return _result(measurer, settings, effort, conditions, measurer.transfer(plan.every_layer))


def measure_condition(
    measurer: Measurer | Experiment,
    settings: Patching,
    heads: HeadSet,
    effort: Effort | None = None,
) -> GridResult:
    """One head set (``patch``), with the whole layer and the two checks beside it.

    Coverage is a share of the whole layer's effect and is only defined above the noise floor, so
    these are measured along with it.
    """
    measurer = Measurer.of(measurer)
    settings = settings.but(control_layer=None, k=(), random_seeds=())
    plan = GridPlan(measurer.experiment.n_heads, settings)
    patch = Planned("patch", plan.layer, heads, settings.alpha)
    conditions = measurer.conditions([patch, *plan.checks()])
    return _result(measurer, settings, effort, conditions)


def run_sweep(
    measurer: Measurer | Experiment,
    settings: Patching,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> dict[int, GridResult]:
    """The grid of every prepared layer, without control layers, from one clean pass.

    >>> sorted(rq.run_sweep(experiment, rq.Patching(k=(1,))))
    [1]

    Args:
        measurer: the prepared pair, or what measures with it; its layers are swept.
        settings: what is patched and measured in each layer.
        effort: resamples and seed of what is drawn later, recorded with the results.
        progress: called with the number of rows (prompt x patch) just finished.

    Returns:
        One grid per layer.
    """
    measurer, alone = Measurer.of(measurer), settings.but(control_layer=None)
    return {
        layer: measure_grid(measurer, alone.but(layer=layer), effort, progress)
        for layer in measurer.experiment.layers
    }


def _result(
    measurer: Measurer,
    settings: Patching,
    effort: Effort | None,
    conditions: Mapping[str, ConditionResult],
    every_layer: Transfer | None = None,
) -> GridResult:
    experiment = measurer.experiment
    pair, layer_map = experiment.pair, experiment.maps[int(settings.layer or 0)]
    checks = [conditions["none"], conditions["self"]]
    return GridResult(
        settings=GridSettings(
            pair=pair.name,
            base=pair.base.card.source,
            tuned=pair.tuned.card.source,
            n_layers=pair.n_layers,
            n_heads=pair.n_heads,
            decision_rule=pair.reading.label,
            dtype=pair.tuned.card.dtype,
            engine=experiment.engine.name,
            # What was measured, whatever was asked for.
            patching=settings.but(
                map_kind=layer_map.kind,
                map_scope=layer_map.scope,
                **experiment.settings.model_dump(include=PREPARED),
            ),
            effort=effort or Effort(),
        ),
        prompt_ids=experiment.prompt_ids,
        groups=experiment.groups,
        conditions=conditions,
        noise_floor_nats=max(abs(kl) for each in checks for kl in (each.KL_raw, each.KL_mapped)),
        every_layer=every_layer,
        compared=measurer.compared(),
    )
