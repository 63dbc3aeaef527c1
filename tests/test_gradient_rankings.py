"""Gradient and curvature rankings: derivatives, completeness, and the limit of small α."""

import numpy as np
import pytest
import torch
from tiny import (
    MicroFormula,
    fine_tuned,
    half_precision,
    pair_of,
    prepared,
    random_prompts,
    tiny_model,
)

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.compared import rank_heads
from rq4lens.analysis.rankings.gradients import (
    as_rows,
    attributions,
    curvature,
    decision_functions,
    rank_by_attribution,
    rank_by_grad_act,
    rank_by_integrated_gradients,
    rank_by_kl_curvature,
    target_of,
)
from rq4lens.analysis.rankings.methods import METHODS, RankingSettings
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.patch import MAPPED, RAW, SELF, Patch

LAYER = 1


@pytest.fixture(scope="module")
def double():
    """The tiny pair in double precision, so that limits and derivatives can be taken."""
    base = tiny_model()
    tuned = fine_tuned(base)
    for model in (base, tuned):
        model.cfg.dtype = torch.float64
        model.double()
    pair = pair_of(base, tuned, random_prompts())
    return prepared(pair, fit_maps(pair, [LAYER]))


def logits_at(experiment, z):
    """Decision logits of all prompts at one z, whatever the batches."""
    found = {}
    with torch.no_grad():
        for function in decision_functions(experiment, LAYER, 1):
            logits = function.logits(as_rows(z[function.rows]))[:, 0]
            found |= dict(zip(function.rows.tolist(), logits, strict=True))
    return torch.stack([found[row] for row in range(len(found))])


def test_decision_function_at_the_clean_point_is_the_model(tiny_experiment):
    """At z of the clean run the decision function gives the model's own logits."""
    experiment = tiny_experiment
    logits = logits_at(experiment, experiment.sources[LAYER, SELF])
    for batch in experiment.prompts.batches(8):
        clean = experiment.tuned_model(batch.tokens)[torch.arange(len(batch.rows)), batch.decision]
        assert torch.allclose(logits[batch.rows], clean, atol=1e-4)


def test_decision_function_is_what_the_engine_measures(tiny_experiment):
    """The answer's log-probability at the raw patch changes as the experiment measured."""
    experiment = tiny_experiment
    z, raw = (experiment.sources[LAYER, source] for source in (SELF, RAW))
    clean, patched = (logits_at(experiment, each) for each in (z, raw))
    answer = clean.argmax(-1, keepdim=True)
    change = (patched.log_softmax(-1) - clean.log_softmax(-1)).take_along_dim(answer, -1)[:, 0]
    measured, _ = experiment.measure(LAYER, [HeadSet.all(experiment.n_heads)], 1.0)
    assert np.allclose(change, measured.answer_logprob_change_nats[0], atol=1e-4)


def test_gradient_is_the_slope_of_finite_differences(double):
    """``z · ∇ℓ`` of a head is how fast ℓ grows when the head is scaled up."""
    measured = MeasuredSets.of(double, LAYER, 0.3)
    ranking = rank_by_grad_act(measured, RankingSettings(target="logit_difference"))
    z = double.sources[LAYER, SELF]
    step, head = 1e-5, 2
    moved = [z.clone(), z.clone()]
    for scaled, sign in zip(moved, (1, -1), strict=True):
        scaled[:, :, head] *= 1 + sign * step
    scalar = target_of(as_rows_of_logits(logits_at(double, z)), "logit_difference")
    up, down = (scalar(as_rows_of_logits(logits_at(double, each)))[:, 0] for each in moved)
    slope = ((up - down) / (2 * step)).abs().numpy()
    assert ranking.per_prompt[head] == pytest.approx(slope, rel=1e-4, abs=1e-8)


def as_rows_of_logits(logits):
    return logits[:, None]


@pytest.mark.parametrize("source", [RAW, MAPPED])
def test_integrated_gradients_are_complete(double, source):
    """The heads' contributions add up to the change of ℓ that patching all heads makes."""
    alpha = 0.7
    measured = MeasuredSets.of(double, LAYER, alpha)
    contributions = attributions(measured, [source], "answer_logprob", 12)[0]
    everything = HeadSet.all(double.n_heads)
    effects = double.effects([Patch(LAYER, everything, alpha, source)])
    change = effects.answer_logprob_change_nats[0]
    assert contributions.sum(0) == pytest.approx(change, abs=1e-6)


def test_attribution_is_the_limit_of_small_alpha(double):
    """For α → 0 first-order contributions and exact single-head changes become the same."""
    alpha = 1e-4
    measured = MeasuredSets.of(double, LAYER, alpha)
    contributions = attributions(measured, [RAW], "answer_logprob", 0)[0]
    singles = [HeadSet.of([head], double.n_heads) for head in range(double.n_heads)]
    exact = double.measure(LAYER, singles, alpha)[0].answer_logprob_change_nats
    assert contributions == pytest.approx(exact, rel=0.01, abs=1e-7)


def to_second_order(gram, sets, alpha):
    """``½ δᵀFδ`` of head sets, ``[set prompt]``, from the Gram matrices of one source."""
    n_heads = gram.shape[-1]
    masks = np.array([[head in heads for head in range(n_heads)] for heads in sets], dtype=float)
    return alpha**2 / 2 * np.einsum("si,pij,sj->sp", masks, gram, masks)


def test_curvature_becomes_exact_as_alpha_goes_to_zero(double):
    """The ratio of ½ δᵀFδ to exact KL is 1 within 1%, for singles, pairs and all heads."""
    measured = MeasuredSets.of(double, LAYER, 1e-2)
    of_raw, of_mapped = curvature(measured)
    sets = [*measured.singles, *measured.pairs, measured.everything]
    raw, mapped = measured.kl_nats(sets)
    # Mean over prompts: on a single prompt a third-order term can be large beside a small KL.
    found = to_second_order(of_raw, sets, 1e-2)
    assert found.mean(-1) / raw.mean(-1) == pytest.approx(np.ones(len(sets)), abs=0.01)
    found = to_second_order(of_mapped, sets, 1e-2)
    assert found.mean(-1) / mapped.mean(-1) == pytest.approx(np.ones(len(sets)), abs=0.01)


def test_curvature_error_shrinks_with_alpha(double):
    """Ten times smaller α brings the ratio at least five times closer to 1."""

    def error(alpha):
        measured = MeasuredSets.of(double, LAYER, alpha)
        exact = measured.kl_nats([measured.everything])[0].mean()
        of_raw, _ = curvature(measured)
        return abs(to_second_order(of_raw, [measured.everything], alpha).mean() / exact - 1)

    assert error(0.01) < error(0.1) / 5


def test_curvature_of_the_micro_model_is_the_formula(micro):
    """In the micro model's last layer the Gram matrix is that of ``δ W_O W_U`` in plain numpy."""
    _, tuned, pair = micro
    maps = fit_maps(pair, [1])
    experiment = prepared(pair, maps)
    found = curvature(MeasuredSets.of(experiment, 1, 0.3))[0]
    for row, tokens in enumerate(experiment.prompts.token_ids):
        z_tuned, z_base = tuned.z(tokens, 1), experiment.z(1, RAW)[row].numpy()
        logits = tuned.logits(tokens)
        p = np.exp(logits) / np.exp(logits).sum()
        u = np.einsum("hd,hdm,mv->hv", z_base - z_tuned, tuned.W_O[1], tuned.W_U)
        expected = np.einsum("v,iv,jv->ij", p, u, u) - np.outer(u @ p, u @ p)
        assert found[row] == pytest.approx(expected)


def test_engines_give_the_same_approximate_rankings(tiny_pair, tiny_maps):
    """Rows over kept keys and full passes through hooks give the same scores."""
    scores = []
    for engine in ("suffix", "hooks"):
        measured = MeasuredSets.of(prepared(tiny_pair, tiny_maps, engine=engine), LAYER, 0.3)
        rankings = (
            rank_by_grad_act(measured),
            rank_by_attribution(measured),
            rank_by_integrated_gradients(measured, RankingSettings(ig_steps=3)),
            rank_by_kl_curvature(measured),
        )
        scores.append(np.stack([ranking.per_prompt for ranking in rankings]))
    assert np.allclose(scores[0], scores[1], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ranks_a_half_precision_model(method):
    """Derivatives go through half-precision modules, and the best heads stay near the top."""
    found = []
    for precision in (lambda model: model, half_precision):
        base = tiny_model()
        pair = pair_of(precision(base), precision(fine_tuned(tiny_model())), random_prompts())
        measured = MeasuredSets.of(prepared(pair, fit_maps(pair, [LAYER])), LAYER, 0.3)
        found.append(rank_heads(method, measured).heads)
    exact, rounded = found
    assert exact[0] in rounded[:2]


def test_more_than_one_position_counts(tiny_pair):
    """With two patched positions, contributions cover both and stay complete."""
    activations = PairActivations(tiny_pair, k_positions=2)
    maps = fit_maps(tiny_pair, [LAYER], activations=activations)
    experiment = prepared(tiny_pair, maps, activations=activations)
    measured = MeasuredSets.of(experiment, LAYER, 0.5)
    contributions = attributions(measured, [RAW], "answer_logprob", 10)[0]
    raw, _ = experiment.measure(LAYER, [HeadSet.all(experiment.n_heads)], 0.5)
    assert contributions.sum(0) == pytest.approx(raw.answer_logprob_change_nats[0], abs=1e-4)


def test_gradients_leave_nothing_behind(tiny_experiment):
    """No hook, no gradient on a parameter, and later measurements are as before."""
    experiment = tiny_experiment
    before, _ = experiment.measure(LAYER, [HeadSet.all(experiment.n_heads)], 0.3)
    measured = MeasuredSets.of(experiment, LAYER, 0.3)
    rank_by_attribution(measured)
    rank_by_kl_curvature(measured)
    after, _ = experiment.measure(LAYER, [HeadSet.all(experiment.n_heads)], 0.3)
    assert np.array_equal(before.kl_nats, after.kl_nats)
    assert all(parameter.grad is None for parameter in experiment.tuned_model.parameters())
    assert not any(point.fwd_hooks for point in experiment.tuned_model.hook_dict.values())


def test_unknown_target_is_refused():
    """The error names the scalars there are."""
    with pytest.raises(UserError, match="'loss' does not exist: choose answer_logprob"):
        RankingSettings(target="loss")


def test_micro_formula_is_the_model(micro):
    """The plain numpy logits that the curvature test uses are those of the model."""
    _, tuned, pair = micro
    assert isinstance(tuned, MicroFormula)
    tokens = pair.tokens("tuned", "val").token_ids[0]
    logits = pair.use("tuned").model(torch.tensor([tokens]))[0, -1]
    assert logits.detach().numpy() == pytest.approx(tuned.logits(tokens))
