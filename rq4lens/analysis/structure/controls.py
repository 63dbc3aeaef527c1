"""The controls: what else could explain the main layer's effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import einops
import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from scipy.stats import ortho_group
from torch import Tensor

from rq4lens.analysis.effects.layer import MeasuredLayer
from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.records import NO_SHARE, Control, CoverageRow, FullEffect
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, Resampled, undefined
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.maps.fitting import FitData, refit
from rq4lens.patching.measured import MeasuresPatches
from rq4lens.results import NO_CONTROL_LAYER, GridResult

Site = Float[Tensor, "prompt position head d_head"]

SHUFFLED = "shuffled pairs"
WRONG_LAYER = "wrong layer"
ROTATED = "random rotation"
MEAN_ONLY = "mean only"
TUNED_MEAN = "tuned mean"


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
    return _judged(name, question, means.estimates(), means, unit)


def _judged(
    name: str, question: str, estimates: Sequence[Estimate], means: Resampled, unit: str
) -> Control:
    """The verdict of a difference; value and reference are the first two of the means."""
    value, reference, difference = estimates
    interval = difference.interval
    share = means.apply(lambda m: 100 * m[:, :1] / m[:, 1:2]).estimates("percentile")[0]
    return Control(
        name=name,
        question=question,
        value=value,
        reference=reference,
        difference=difference,
        unit=unit,
        survives=None if interval is None else interval.low > 0,
        reason=difference.reason if interval is None else None,
        share_pct=NO_SHARE if share.value is None else share,
    )


def missing(name: str, question: str, reason: str, unit: str = DELTA_NATS) -> Control:
    """A control that could not be run."""
    nothing = undefined(reason)
    return Control(name, question, nothing, nothing, nothing, unit, None, reason)


def grid_controls(grid: GridResult, bootstrap: Bootstrap) -> list[Control]:
    """The controls that the grid itself holds: the control layer and the self-patch."""
    full, control, itself = grid.full, grid.control, grid.conditions.get("self")
    layer = "Does the control layer's map repair as much of its own layer's damage?"
    nothing = "Does patching the tuned model into itself change nothing?"
    if control is None:
        rows = [missing("control layer", layer, NO_CONTROL_LAYER)]
    else:
        rows = [paired("control layer", layer, control.delta_nats, full.delta_nats, bootstrap)]
    if itself is not None:
        both = itself.kl_raw_nats, full.kl_raw_nats
        rows.append(paired("self", nothing, *both, bootstrap, KL_RAW_NATS))
    return rows


@dataclass(frozen=True)
class ControlInputs:
    """What the measured controls are made from; ``neutral`` is the pair on neutral prompts."""

    layer: MeasuredLayer
    experiment: Experiment
    activations: PairActivations
    control_layer: int | None
    neutral: MeasuresPatches | None


def measured_controls(inputs: ControlInputs) -> list[Control]:
    """The controls that put something else in the map's place, and the neutral prompts."""
    measured, bootstrap = inputs.layer.measured, inputs.layer.bootstrap
    layer, everything = measured.layer, measured.everything
    sources = control_sources(
        inputs.experiment, layer, inputs.control_layer, inputs.activations, bootstrap.seed
    )
    varied = measured.with_mapped(sources)
    reference = measured.delta_nats([everything])[0]
    rows = []
    for name, question in QUESTIONS.items():
        if name in varied:
            value = varied[name].delta_nats([everything])[0]
            rows.append(paired(name, question, value, reference, bootstrap))
        else:
            rows.append(missing(name, question, NO_CONTROL_LAYER))
    return [*rows, _neutral(inputs)]


def _neutral(inputs: ControlInputs) -> Control:
    """Side effect: what the raw patch does to prompts that the fine-tune is not about."""
    name = "neutral prompts"
    question = "Does swapping all heads disturb neutral prompts as much?"
    if inputs.neutral is None:
        return missing(name, question, "the pair has no neutral prompts", KL_RAW_NATS)
    measured, bootstrap = inputs.layer.measured, inputs.layer.bootstrap
    elsewhere = MeasuredSets.of(inputs.neutral, measured.layer, measured.alpha)
    value = elsewhere.kl_nats([measured.everything])[0]
    reference = measured.kl_nats([measured.everything])[0]
    # Other prompts, so other resamples: the two are independent.
    other = Bootstrap(elsewhere.groups, bootstrap.n_resamples, bootstrap.seed + 1)
    return unpaired(name, question, other.resampled(value), bootstrap.resampled(reference))


def unpaired(name: str, question: str, value: Resampled, reference: Resampled) -> Control:
    """A control measured on other prompts than what it is compared with."""
    point, draws = (
        np.concatenate([getattr(side, name) for side in (value, reference)], axis=-1)
        for name in ("point", "draws")
    )
    # An interval needs several groups on both sides; no jackknife says that there are none.
    several = min(len(value.jackknife), len(reference.jackknife), 1)
    both = Resampled(point, draws, point[None][:several])
    # Without a jackknife over both sides there is no correction of skewness: percentiles.
    difference = both.apply(lambda m: m[:, 1:] - m[:, :1]).estimates("percentile")
    estimates = [*value.estimates(), *reference.estimates(), *difference]
    return _judged(name, question, estimates, both, KL_RAW_NATS)


def random_controls(rows: Sequence[CoverageRow], n_heads: int, full: FullEffect) -> list[Control]:
    """Random heads, with maps fitted like all others, against the top k chosen on other prompts.

    The claim survives when the cross-fitted p-value is at most 0.05. Where it cannot be that small,
    with fewer than ten groups of prompts, the control has no verdict; nor has it where the map does
    harm, of which the heads that are ranked first do least.
    """
    return [_random(row, full.is_harm) for row in rows if row.k < n_heads]


def _random(row: CoverageRow, is_harm: bool) -> Control:
    what = f"random heads, k={row.k}", "Do as many random heads carry as much?"
    reference, mean_pct = row.cross_fitted_coverage_pct, row.random_mean_pct
    if is_harm:
        reason = "the heads ranked first are those that do least harm"
        return missing(*what, reason, COVERAGE_PCT)
    if row.p_value is None or mean_pct is None or reference.value is None:
        absent = reference.reason or row.reason or "there is no p-value"
        return missing(*what, absent, COVERAGE_PCT)
    judged, smallest = f"judged by p = {row.p_value:.3g}", row.p_value_min or 0.0
    decides, share = smallest <= SIGNIFICANT, NO_SHARE
    if reference.value:
        share = Estimate(100 * mean_pct / reference.value, None, judged)
    return Control(
        *what,
        value=Estimate(mean_pct, None, f"mean of {row.n_subsets} random sets"),
        reference=reference,
        difference=Estimate(reference.value - mean_pct, None, judged),
        unit=COVERAGE_PCT,
        survives=row.p_value <= SIGNIFICANT if decides else None,
        reason=None if decides else f"no p-value below {smallest:.3g} can come out",
        share_pct=share,
    )
