"""The controls: what else could explain the main layer's effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import einops
import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped
from numpy import ndarray
from scipy.stats import ortho_group
from torch import Tensor

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.records import NO_SHARE, Control, CoverageRow, FullEffect
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, Resampled, undefined
from rq4lens.models.prompts.prompt_set import FIT_SPLIT
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.maps.fitting import rows_of
from rq4lens.patching.maps.kinds import fit_block
from rq4lens.patching.maps.map import LayerMap, MapKind, to_blocks
from rq4lens.results import ConditionResult, GridResult

Site = Float[Tensor, "prompt position head d_head"]

SHUFFLED = "shuffled pairs"
WRONG_LAYER = "wrong layer"
ROTATED = "random rotation"
MEAN_ONLY = "mean only"
TUNED_MEAN = "tuned mean"


@dataclass(frozen=True)
class FitData:
    """The rows that the map of one layer was fitted on.

    Args:
        x: base activations.
        y: tuned activations.
        groups: the group of each row.
    """

    x: Float[Tensor, "row head d_head"]
    y: Float[Tensor, "row head d_head"]
    groups: Shaped[ndarray, "row"]

    @classmethod
    def of(cls, activations: PairActivations, layer: int) -> FitData:
        """The train rows of one layer."""
        prompts = activations.pair.prompts.split(FIT_SPLIT)
        x, y = (rows_of(activations.z(side, FIT_SPLIT, layer)) for side in ("base", "tuned"))
        groups = np.repeat(prompts.groups, activations.k_positions)
        return cls(x, y, groups)

    def unpaired(self, seed: int) -> FitData:
        """The same rows, each base row beside the tuned row of another prompt."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self.y)))
        return replace(self, y=self.y[order])


def refit(layer_map: LayerMap, data: FitData, kind: MapKind | None = None) -> LayerMap:
    """A map of the same scope on other rows or of another kind; it has no diagnostics."""
    kind = kind or layer_map.kind
    x, y = (to_blocks(z, layer_map.scope).numpy() for z in (data.x, data.y))
    fits = [fit_block(kind, x[:, block], y[:, block], data.groups) for block in range(x.shape[1])]
    weight, bias = (np.stack([getattr(fit, name) for fit in fits]) for name in ("weight", "bias"))
    return replace(
        layer_map,
        kind=kind,
        weight=torch.tensor(weight, dtype=torch.float32),
        bias=torch.tensor(bias, dtype=torch.float32),
        diagnostics=(),
        details={},
    )


def rotated(
    predicted: Site, centre: Float[Tensor, "head d_head"], rotations: Float64[ndarray, "head d d"]
) -> Site:
    """Predictions turned around a centre; their distance from it stays the same."""
    turned = einops.einsum(
        (predicted - centre).double(),
        torch.from_numpy(rotations),
        "prompt position head i, head i j -> prompt position head j",
    )
    return (centre + turned).to(predicted.dtype)


def random_rotations(n_heads: int, width: int, seed: int) -> Float64[ndarray, "head d d"]:
    """One random orthogonal matrix per head."""
    rng = np.random.default_rng(seed)
    if width == 1:
        return rng.choice([-1.0, 1.0], size=(n_heads, 1, 1))
    return ortho_group.rvs(width, size=n_heads, random_state=rng).reshape(n_heads, width, width)


def control_sources(
    experiment: Experiment,
    layer: int,
    control_layer: int | None,
    activations: PairActivations,
    seed: int,
) -> dict[str, Site]:
    """What each control blends in at the main layer."""
    own, data = experiment.maps[layer], FitData.of(activations, layer)
    z_base = activations.z("base", experiment.split, layer)
    predicted = own(z_base)
    mean = data.y.mean(0).to(predicted)
    turns = random_rotations(experiment.n_heads, z_base.shape[-1], seed)
    sources = {
        SHUFFLED: refit(own, data.unpaired(seed))(z_base),
        ROTATED: rotated(predicted, mean, turns),
        MEAN_ONLY: refit(own, data, "mean_shift")(z_base),
        TUNED_MEAN: mean.expand_as(predicted),
    }
    if control_layer is not None and control_layer in experiment.maps:
        sources[WRONG_LAYER] = experiment.maps[control_layer](z_base)
    return sources


DELTA_NATS = "ΔKL, nats"
KL_RAW_NATS = "KL_raw, nats"
COVERAGE_PCT = "coverage, %"
SIGNIFICANT = 0.05

QUESTIONS = {
    SHUFFLED: "Does a map fitted on prompts that do not belong together repair as much?",
    WRONG_LAYER: "Does the control layer's map, used at the main layer, repair as much?",
    ROTATED: "Do predictions of the same length in random directions repair as much?",
    MEAN_ONLY: "Does moving the mean alone repair as much?",
    TUNED_MEAN: "Does the tuned mean repair as much, whatever the prompt says?",
}
"""What the controls ask that put something else in the map's place."""

PerPrompt = Float64[ndarray, "prompt"]


def paired(
    name: str,
    question: str,
    value: PerPrompt,
    reference: PerPrompt,
    bootstrap: Bootstrap,
    unit: str = DELTA_NATS,
) -> Control:
    """A control measured on the same prompts as what it is compared with.

    The claim survives when the interval of the difference lies above 0.
    """
    means = bootstrap.resampled(np.stack([value, reference, reference - value]))
    estimates = [*means.estimates(), _share(means.apply(lambda m: 100 * m[:, :1] / m[:, 1:2]))]
    return _judged(name, question, estimates, unit)


def _share(resampled: Resampled) -> Estimate:
    share = resampled.estimates(method="percentile")[0]
    return NO_SHARE if share.value is None else share


def _judged(name: str, question: str, estimates: Sequence[Estimate], unit: str) -> Control:
    value, reference, difference, share = estimates
    interval = difference.interval
    return Control(
        name=name,
        question=question,
        value=value,
        reference=reference,
        difference=difference,
        unit=unit,
        survives=None if interval is None else interval.low > 0,
        reason=difference.reason if interval is None else None,
        share_pct=share,
    )


def missing(name: str, question: str, reason: str, unit: str = DELTA_NATS) -> Control:
    """A control that could not be run."""
    nothing = undefined(reason)
    return Control(name, question, nothing, nothing, nothing, unit, None, reason)


def grid_controls(grid: GridResult, bootstrap: Bootstrap) -> list[Control]:
    """The controls that the grid itself holds: the control layer and the self-patch."""
    full = grid.full.delta_nats
    layer = "Does the control layer's map repair as much of its own layer's damage?"
    nothing = "Does patching the tuned model into itself change nothing?"
    control = grid.control
    rows = [
        paired("control layer", layer, control.delta_nats, full, bootstrap)
        if isinstance(control, ConditionResult)
        else missing("control layer", layer, "the run has no control layer")
    ]
    itself = grid.conditions.get("self")
    if itself is not None:
        kl_raw = grid.full.kl_raw_nats
        self_kl = itself.kl_raw_nats
        rows.append(paired("self", nothing, self_kl, kl_raw, bootstrap, KL_RAW_NATS))
    return rows


@dataclass(frozen=True)
class ControlStudy:
    """What the measured controls are made from.

    Args:
        experiment: the pair, its maps and its engine.
        measured: the head sets of the main layer.
        control_layer: the control layer, or None.
        bootstrap: the resamples.
        activations: train and measured activations of the pair.
        neutral: the same pair measured on neutral prompts; None where there are none.
        seed: seed of shuffling and rotation.
    """

    experiment: Experiment
    measured: MeasuredSets
    control_layer: int | None
    bootstrap: Bootstrap
    activations: PairActivations
    neutral: Experiment | None
    seed: int


def measured_controls(study: ControlStudy) -> list[Control]:
    """The controls that put something else in the map's place, and the neutral prompts."""
    measured, experiment = study.measured, study.experiment
    layer, everything = measured.layer, measured.everything
    sources = control_sources(experiment, layer, study.control_layer, study.activations, study.seed)
    varied = experiment.with_sources({(layer, name): z for name, z in sources.items()})
    reference = measured.delta_nats([everything])[0]
    rows = []
    for name, question in QUESTIONS.items():
        if name in sources:
            control = MeasuredSets.of(varied, layer, measured.alpha, mapped=name)
            value = control.delta_nats([everything])[0]
            rows.append(paired(name, question, value, reference, study.bootstrap))
        else:
            rows.append(missing(name, question, "the run has no control layer"))
    return [*rows, _neutral(study)]


def _neutral(study: ControlStudy) -> Control:
    """Side effect: what the raw patch does to prompts that the fine-tune is not about."""
    name = "neutral prompts"
    question = "Does swapping all heads disturb neutral prompts as much?"
    if study.neutral is None:
        return missing(name, question, "the pair has no neutral prompts", KL_RAW_NATS)
    measured = study.measured
    elsewhere = MeasuredSets.of(study.neutral, measured.layer, measured.alpha)
    value = elsewhere.kl_nats([measured.everything])[0]
    reference = measured.kl_nats([measured.everything])[0]
    bootstrap = study.bootstrap
    # Other prompts, so other resamples: the two are independent.
    own = Bootstrap(elsewhere.groups, bootstrap.n_resamples, bootstrap.seed + 1)
    return unpaired(name, question, own.resampled(value), bootstrap.resampled(reference))


def unpaired(name: str, question: str, value: Resampled, reference: Resampled) -> Control:
    """A control measured on other prompts than what it is compared with."""
    # An interval needs several groups on both sides; no jackknife says that there are none.
    alone = min(len(value.jackknife), len(reference.jackknife)) == 0
    jackknife = value.jackknife[:0] if alone else reference.jackknife
    # Without a jackknife over both sides there is no correction of skewness: percentiles.
    difference, share = (
        Resampled(both(reference.point, value.point), both(reference.draws, value.draws), jackknife)
        for both in (np.subtract, _percent)
    )
    estimates = [
        value.estimates()[0],
        reference.estimates()[0],
        difference.estimates(method="percentile")[0],
        _share(share),
    ]
    return _judged(name, question, estimates, KL_RAW_NATS)


def _percent(whole: ndarray, part: ndarray) -> ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * part / whole


def random_controls(rows: Sequence[CoverageRow], n_heads: int, full: FullEffect) -> list[Control]:
    """Random heads, with maps fitted like all others, against the top k chosen on other prompts.

    The claim survives when the cross-fitted p-value is at most 0.05. Where it cannot be that small,
    with fewer than ten groups of prompts, the control has no verdict; nor has it where the map does
    harm, of which the heads that are ranked first do least.
    """
    return [_random(row, full.is_harm) for row in rows if row.k < n_heads]


def _random(row: CoverageRow, is_harm: bool) -> Control:
    name, question = f"random heads, k={row.k}", "Do as many random heads carry as much?"
    reference = row.cross_fitted_coverage_pct
    if is_harm:
        return missing(
            name, question, "the heads ranked first are those that do least harm", COVERAGE_PCT
        )
    if row.p_value is None or row.random_mean_pct is None or reference.value is None:
        absent = reference.reason or row.reason or "there is no p-value"
        return missing(name, question, absent, COVERAGE_PCT)
    judged = f"judged by p = {row.p_value:.3g}"
    difference = Estimate(reference.value - row.random_mean_pct, None, judged)
    mean = Estimate(row.random_mean_pct, None, f"mean of {row.n_subsets} random sets")
    assert row.p_value_min is not None
    decides = row.p_value_min <= SIGNIFICANT
    survives = row.p_value <= SIGNIFICANT if decides else None
    reason = None if decides else f"no p-value below {row.p_value_min:.3g} can come out"
    share = NO_SHARE
    if reference.value:
        share = Estimate(100 * row.random_mean_pct / reference.value, None, judged)
    return Control(
        name, question, mean, reference, difference, COVERAGE_PCT, survives, reason, share
    )
