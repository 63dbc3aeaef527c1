"""The grid of the main job: which head sets are measured, and their results."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.models.pair import ModelPair
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.maps.map import LayerMap
from rq4lens.patching.measured import Planned, Recorder
from rq4lens.patching.patch import SELF, Advance
from rq4lens.results import (
    ConditionResult,
    GridResult,
    GridSettings,
    HeadRanking,
    RankBy,
    rank_single_heads,
)

DEFAULT_KS = (1, 2, 4, 8)
DEFAULT_RANDOM_SEEDS = (0, 1, 2)
DEFAULT_ALPHA = 0.3


@dataclass(frozen=True)
class GridPlan:
    """Which conditions the grid has.

    Args:
        n_heads: heads per layer.
        layer: the main layer.
        control_layer: the control layer, or None.
        ks: sizes of the top-k and random-k head sets.
        random_seeds: seeds of the random-k head sets.

    Raises:
        UserError: if a layer is its own control, or a k does not fit.
    """

    n_heads: int
    layer: int
    control_layer: int | None
    ks: tuple[int, ...]
    random_seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.layer == self.control_layer:
            raise UserError(
                f"layer {self.layer} cannot be its own control: choose another control layer."
            )
        for k in self.ks:
            if not 1 <= k <= self.n_heads:
                raise UserError(
                    f"k {k} does not fit: a layer has {self.n_heads} heads; choose 1 to "
                    f"{self.n_heads}."
                )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that need a map."""
        return (self.layer,) if self.control_layer is None else (self.layer, self.control_layer)

    def fixed(self) -> list[Planned]:
        """Every condition whose head set is known before anything is measured."""
        n_heads = self.n_heads
        planned = [
            Planned(f"head{h}", self.layer, HeadSet.of([h], n_heads)) for h in range(n_heads)
        ]
        planned += [
            Planned(f"rand{k}_s{seed}", self.layer, random_heads(k, seed, n_heads))
            for k in self.ks
            for seed in self.random_seeds
        ]
        if self.control_layer is not None:
            planned.append(Planned("ctrl_full", self.control_layer, HeadSet.all(n_heads)))
        return [*planned, *self.checks()]

    def checks(self) -> list[Planned]:
        """The whole layer, and the two conditions that must read 0."""
        everything = HeadSet.all(self.n_heads)
        return [
            Planned("full", self.layer, everything),
            Planned("none", self.layer, HeadSet.none(self.n_heads)),
            Planned("self", self.layer, everything, SELF),
        ]

    def top(self, ranking: HeadRanking) -> list[Planned]:
        """The top-k conditions, once the single heads are ranked."""
        return [Planned(f"top{k}", self.layer, ranking.top_set(k)) for k in self.ks]

    @property
    def table_order(self) -> list[str]:
        """The names of all conditions in the order in which they are listed."""
        names = ["full", *(f"head{head}" for head in range(self.n_heads))]
        for k in self.ks:
            names += [f"top{k}", *(f"rand{k}_s{seed}" for seed in self.random_seeds)]
        control = [] if self.control_layer is None else ["ctrl_full"]
        return [*names, *control, "none", "self"]


def random_heads(k: int, seed: int, n_heads: int) -> HeadSet:
    """The random head set ``rand{k}_s{seed}``.

    Its heads are ``sorted(random.Random(seed).sample(range(n_heads), k))``.
    """
    return HeadSet.of(random.Random(seed).sample(range(n_heads), k), n_heads)


def run_grid(
    pair: ModelPair,
    maps: Mapping[int, LayerMap],
    layer: int,
    control_layer: int | None = None,
    alpha: float = DEFAULT_ALPHA,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    random_seeds: Sequence[int] = DEFAULT_RANDOM_SEEDS,
    rank_by: RankBy = "delta",
    seed: int = 0,
    store: Store | None = None,
    experiment: Experiment | None = None,
    advance: Advance | None = None,
    **settings: Any,
) -> GridResult:
    """Measure every condition of the main job.

    These are: all heads (``full``), each single head, the top k and random k heads, all heads of
    the control layer, and the two checks ``none`` and ``self``, which must read 0.

    Args:
        pair: the pair.
        maps: the maps of at least the main and the control layer.
        layer: the main layer.
        control_layer: the control layer, or None.
        alpha: blend strength, in [0, 1].
        ks: sizes of the top-k and random-k head sets.
        random_seeds: seeds of the random-k head sets.
        rank_by: the score that orders single heads, ``"delta"`` or ``"drop_pct"``.
        seed: seed of the run, recorded with the result.
        store: where finished conditions are kept and looked up.
        experiment: an experiment that is prepared already; otherwise one is prepared here.
        advance: called with the number of rows (prompt x patch) just finished.
        **settings: passed on to :func:`prepare`.

    Returns:
        The grid's results, with every prompt's own numbers.

    Raises:
        UserError: if a layer has no map, a k does not fit or alpha is outside [0, 1].
    """
    plan = GridPlan(pair.n_heads, layer, control_layer, tuple(ks), tuple(random_seeds))
    _check_maps(plan, maps)
    experiment = experiment or prepare(pair, maps, **settings)
    recorder = Recorder(experiment, alpha, store, advance)
    fixed = recorder.measure(plan.fixed())
    singles = [fixed[f"head{head}"] for head in range(plan.n_heads)]
    results = fixed | recorder.measure(plan.top(rank_single_heads(singles, rank_by)))
    conditions = {name: results[name] for name in plan.table_order}
    described = _settings(experiment, plan, alpha=alpha, rank_by=rank_by, seed=seed)
    return _result(experiment, described, conditions)


def run_condition(
    experiment: Experiment, layer: int, heads: HeadSet, alpha: float = DEFAULT_ALPHA
) -> GridResult:
    """Measure one head set (``patch``), with the whole layer and the two checks beside it.

    Coverage is a share of the whole layer's effect and is only defined above the noise floor, so
    these are measured along with it.
    """
    plan = GridPlan(experiment.n_heads, layer, None, (), ())
    wanted = [Planned("patch", layer, heads), *plan.checks()]
    conditions = Recorder(experiment, alpha).measure(wanted)
    settings = _settings(experiment, plan, alpha=alpha, rank_by="delta", seed=0)
    return _result(experiment, settings, conditions)


def run_sweep(
    experiment: Experiment,
    alpha: float = DEFAULT_ALPHA,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    random_seeds: Sequence[int] = DEFAULT_RANDOM_SEEDS,
    rank_by: RankBy = "delta",
    seed: int = 0,
    store: Store | None = None,
    advance: Advance | None = None,
) -> dict[int, GridResult]:
    """The grid of every prepared layer, without control layers, from one clean pass.

    Args:
        experiment: the prepared pair; its layers are the ones that are swept.
        alpha: blend strength, in [0, 1].
        ks: sizes of the top-k and random-k head sets.
        random_seeds: seeds of the random-k head sets.
        rank_by: the score that orders single heads of a layer.
        seed: seed of the run, recorded with the results.
        store: where finished conditions are kept and looked up.
        advance: called with the number of rows (prompt x patch) just finished.

    Returns:
        One grid per layer.
    """
    return {
        layer: run_grid(
            experiment.pair,
            experiment.maps,
            layer,
            alpha=alpha,
            ks=ks,
            random_seeds=random_seeds,
            rank_by=rank_by,
            seed=seed,
            store=store,
            experiment=experiment,
            advance=advance,
        )
        for layer in experiment.layers
    }


def _result(
    experiment: Experiment, settings: GridSettings, conditions: Mapping[str, ConditionResult]
) -> GridResult:
    return GridResult(
        settings=settings,
        prompt_ids=experiment.prompt_ids,
        groups=experiment.groups,
        conditions=conditions,
        noise_floor_nats=_noise_floor(conditions),
    )


def _noise_floor(conditions: Mapping[str, ConditionResult]) -> float:
    checks = [conditions["none"], conditions["self"]]
    return max(abs(kl) for check in checks for kl in (check.KL_raw, check.KL_mapped))


def _check_maps(plan: GridPlan, maps: Mapping[int, LayerMap]) -> None:
    for needed in plan.layers:
        if needed not in maps:
            raise UserError(
                f"layer {needed} has no map: maps are fitted for {sorted(maps)}; fit it with "
                f"fit_maps(pair, layers=[..., {needed}])."
            )


def _settings(
    experiment: Experiment, plan: GridPlan, *, alpha: float, rank_by: RankBy, seed: int
) -> GridSettings:
    pair, layer_map = experiment.pair, experiment.maps[plan.layer]
    return GridSettings(
        pair=pair.name,
        base=pair.base.card.source,
        tuned=pair.tuned.card.source,
        layer=plan.layer,
        control_layer=plan.control_layer,
        alpha=alpha,
        ks=plan.ks,
        random_seeds=plan.random_seeds,
        rank_by=rank_by,
        map_kind=layer_map.kind,
        map_scope=layer_map.scope,
        split=experiment.split,
        k_positions=experiment.k_positions,
        n_layers=pair.n_layers,
        n_heads=pair.n_heads,
        kl_direction=experiment.kl_direction,
        raw_baseline=experiment.raw_baseline,
        decision_rule=pair.decision_rule,
        dtype=pair.tuned.card.dtype,
        seed=seed,
        engine=experiment.engine.name,
    )
