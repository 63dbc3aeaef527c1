"""Every sentence of the answer, on pairs and numbers of which it must not be said."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import CONTROL, MAIN, fine_tuned, pair_of, prepared, random_prompts, tiny_model

from rq4lens.analysis.analyse import Beside, analyse
from rq4lens.analysis.claims import NO_SHARE, NOTHING, claims, p_text, share, study_claims
from rq4lens.analysis.statistics.bootstrap import Estimate, Interval, undefined
from rq4lens.analysis.structure.kinds import NOT_ON_NEUTRAL
from rq4lens.config import AnalysisEffort, Effort, Patching, Place, Reading
from rq4lens.disk.store import Store
from rq4lens.heads import Head
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.patching import noise
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.experiment import prepare
from rq4lens.patching.grid import measure_grid
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.measured import Measurer
from rq4lens.validation.planting import Planting, plant

LITTLE = AnalysisEffort(
    n_random_sets=20, random_ks=(), n_splits=1, methods=("delta",), alphas=(0.3, 1.0)
)


def analysis_of(pair, layer=MAIN, control_layer=CONTROL, *, ks=(1, 2), beside_noise=True):
    """The analysis of a pair as a run makes it: noise pair, weights and neutral prompts beside."""
    layers = [layer] if control_layer is None else [layer, control_layer]
    activations = PairActivations(pair)
    maps = fit_maps(pair, layers, activations=activations)
    measurer = Measurer(prepared(pair, maps, activations=activations))
    patching = Patching(layer=layer, control_layer=control_layer, k=ks)
    grid = measure_grid(measurer, patching, Effort(resamples=1000))
    neutral = None
    if "neutral" in pair.prompts.splits:
        neutral = prepare(pair, maps, Patching(split="neutral"), activations=activations)
    effects = None
    if beside_noise:
        effects = noise.noise_effects(measurer, activations, patching, Place())
    beside = Beside(neutral, effects)
    return analyse(grid, measurer, LITTLE, beside=beside)


def every_claim(analysis) -> str:
    return " ".join((*analysis.claims, *analysis.study_claims))


SPOKEN = ("undoes", "undo ", "give base", "alone", "clearly less", "recoded", "replaced", "cover")
"""Words of sentences that claim something of heads."""


def assert_nothing_is_claimed(analysis, because):
    """No head is spoken of, no share is given, and the reason is."""
    said = every_claim(analysis)
    assert NOTHING in said
    assert NO_SHARE in said
    assert because in said
    spoken = said.replace(analysis.claims[-1], "")  # what is uncertain names undecided heads
    assert [word for word in SPOKEN if word in spoken] == []


# --- pairs of which nothing may be claimed -------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_of_noise_in_every_weight_nothing_is_claimed(seed):
    """Base beside base plus 2% of noise: its noise pair moves base about as far."""
    base = tiny_model(seed)
    tuned = plant(base, how=Planting(drift=0.02, seed=seed)).tuned
    analysis = analysis_of(pair_of(base, tuned, random_prompts(n_train=96, n_val=48)))
    assert_nothing_is_claimed(
        analysis, "a shuffled weight change of the same size moves base about"
    )


@pytest.mark.parametrize("seed", range(2))
def test_of_unrelated_models_nothing_is_claimed(seed):
    """They share their shape alone, however large and certain the map's repair is."""
    pair = pair_of(tiny_model(seed), tiny_model(seed + 10), random_prompts(n_train=96, n_val=48))
    assert_nothing_is_claimed(analysis_of(pair), "look unrelated")


def test_of_identical_models_nothing_is_claimed():
    """There is no gap to take a share of."""
    base = tiny_model()
    analysis = analysis_of(pair_of(base, copy.deepcopy(base), random_prompts()))
    said = every_claim(analysis)
    assert "cannot be told apart" in said
    assert NOTHING in said
    assert NO_SHARE in said


def changed_heads(base):
    """A fine-tune in which one head of the main layer reads something else altogether."""
    return plant(base, turned=[Head(MAIN, 1)]).tuned


def test_of_fewer_than_ten_groups_nothing_is_claimed():
    """However clear the effect is; one group more and there are ten."""
    base = tiny_model()
    prompts = random_prompts(n_train=96, n_val=40)
    grouped = {
        n: PromptSet(
            tuple(
                replace(each, group=f"{each.split}{at % n}")
                for at, each in enumerate(prompts.prompts)
            )
        )
        for n in (9, 10)
    }
    few, enough = (
        analysis_of(pair_of(base, changed_heads(base), grouped[n]), beside_noise=False)
        for n in (9, 10)
    )
    assert_nothing_is_claimed(few, "9 groups of prompts are too few")
    assert NOTHING not in every_claim(enough)


def test_a_repair_that_is_tiny_beside_the_gap_is_not_divided():
    """The models differ, but not by what this layer's heads say."""
    base = tiny_model()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.unembed.W_U += 0.3 * torch.randn(
            tuned.unembed.W_U.shape, generator=torch.Generator().manual_seed(0)
        )
        tuned.blocks[MAIN].attn.W_V *= 1.001
    pair = pair_of(base, tuned, random_prompts(n_train=96, n_val=48))
    analysis = analysis_of(pair, beside_noise=False)
    said = every_claim(analysis)
    assert "carries next to nothing" in analysis.claims[1]
    assert "is not asked" in analysis.claims[2]
    assert "the rest is not in what heads say" in analysis.claims[1]
    assert NO_SHARE in said
    assert "of the gap" in analysis.study_claims[0]
    assert " cover " not in said


# --- one true answer, and what each sentence must not outlive -------------------------------------


@pytest.fixture(scope="module")
def found(etiquette):
    """The pair in the box on some of its prompts."""
    splits = {"train": 160, "val": 60, "neutral": 40}
    some = [
        each for split, n in splits.items() for each in etiquette.prompts.split(split).prompts[:n]
    ]
    pair = replace_prompts(etiquette, PromptSet(tuple(some)))
    return analysis_of(pair, 1, 3)


def replace_prompts(pair, prompts):
    """The same models on other prompts."""
    return type(pair)(pair.base, pair.tuned, prompts, name=pair.name, reading=pair.reading)


UNDEFINED = Estimate(None, None, "not drawn")


def around(value, width=1.0):
    value = float(value)
    return Estimate(value, Interval(value - width, value + width))


def test_a_true_answer_says_what_is_so(found):
    """How far apart, how much here, which head, beside random ones, and what is uncertain."""
    gap, layer, heads, kinds, uncertain = found.claims
    assert "times what the same weight change gives when it is shuffled" in gap
    assert "undoes 100%" in layer
    assert "the rest is not" not in layer
    assert heads.startswith("L1H0 alone undoes 9")
    assert "clearly less (p" in heads
    assert "idle" in kinds
    assert "L1H12" in kinds
    assert uncertain.startswith("The intervals are over more prompts like these 60")


def test_a_share_of_the_gap_has_one_interval_wherever_it_stands(found):
    """In the table of heads, in that of the few heads, and in the sentence about them."""
    (row,) = (each for each in found.directions[0].coverage if each.k == 1)
    of_head = found.transfer.heads_to_base_pct[row.heads[0]]
    assert row.coverage_pct == of_head
    assert f"L1H0 alone undoes {share(of_head)} of the gap" in found.claims[2]


def test_a_gap_is_no_multiple_of_a_noise_pair_that_was_not_measured(found):
    """Then nothing is said of it."""
    assert "shuffled" not in claims(replace(found, noise=None))[0]


@pytest.mark.parametrize("changes", [{"beyond": around(0.5)}, {"times": around(2.5)}])
def test_a_gap_that_a_noise_pair_reaches_ends_the_answer(found, changes):
    """The claim needs the whole interval above what noise of the same size does, and twice it."""
    times = {"gap_base_nats": changes.get("times", around(9.0))}
    noise = replace(
        found.noise,
        gap_beyond_nats=changes.get("beyond", around(9.0)),
        real_over_noise=found.noise.real_over_noise | times,
    )
    told = replace(found, noise=noise)
    assert NOTHING in claims(told)[1]
    assert NO_SHARE in study_claims(told)[0]


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (Estimate(4.0, Interval(1.4, 9.0), None), "not clearly more than 1.5 times"),
        (Estimate(1.1, Interval(0.9, 1.4), None), "moves base about as far"),
    ],
)
def test_how_far_noise_of_the_same_size_goes_is_what_was_measured(found, times, said):
    """A gap four times as large, with a wide interval, is not called about as far."""
    both = found.noise.real_over_noise | {"gap_base_nats": times}
    told = replace(found, noise=replace(found.noise, real_over_noise=both))
    assert said in claims(told)[1]


def test_a_run_without_a_noise_pair_says_that_it_has_none(found):
    """Its heads are claimed all the same, so that is among what is uncertain."""
    assert "shuffled weight change" not in claims(found)[-1]
    alone = claims(replace(found, noise=None))
    assert "L1H0 alone undoes" in alone[2]
    assert "not compared with that of a shuffled weight change" in alone[-1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_nats": around(0.5)}, "cannot be told apart"),
        ({"base_nats": Estimate(0.7, None, "one group")}, "is not known"),
        ({"base_nats": around(3.0), "left_out_base_pct": 9.0}, "is not known"),
    ],
)
def test_no_gap_and_an_unknown_gap_are_two_things(found, changes, said):
    """Models are alike where that was measured; one group or other tokens show nothing."""
    gap = replace(found.gap, undefined_because="so", **changes)
    assert said in claims(replace(found, gap=gap))[0]


def test_a_repair_that_the_noise_pairs_map_reaches_is_not_divided(found):
    """Whatever it is in nats."""
    told = replace(found, noise=replace(found.noise, delta_beyond_nats=around(0.5)))
    (only,) = study_claims(told)
    assert NO_SHARE in only
    assert "noise pair" in only


def test_little_is_said_to_be_little(found):
    """A layer that carries next to nothing is not said to undo anything, nor are its heads."""
    little = replace(found.transfer, to_base_pct=around(1), to_tuned_pct=around(2))
    _, layer, heads, *_ = claims(replace(found, transfer=little))
    assert "next to nothing" in layer
    assert "undoes" not in layer
    assert "is not asked" in heads


def test_a_share_whose_interval_reaches_zero_is_not_divided_among_heads(found):
    """Which heads carry it is no question then."""
    none = replace(found.transfer, to_base_pct=around(5, 8))
    assert "is not asked" in claims(replace(found, transfer=none))[2]


@pytest.mark.parametrize(
    ("every", "here", "said"), [(45.0, 40.0, True), (99.0, 40.0, False), (45.0, 60.0, False)]
)
def test_the_rest_is_elsewhere_only_where_there_is_a_rest(found, every, here, said):
    """What all heads of all layers carry says so, unless one layer alone carries more."""
    gap = replace(found.gap, every_layer_to_base_pct=around(every))
    told = replace(found, gap=gap, transfer=replace(found.transfer, to_base_pct=around(here)))
    assert ("the rest is not in what heads say" in claims(told)[1]) is said


@pytest.mark.parametrize(
    ("p_value", "p_min", "said"),
    [
        (0.0001, 0.0001, "clearly less (p < 0.001)"),
        (0.4, 0.0001, "not clearly less (p = 0.4)"),
        (None, None, "on average;"),
        (0.5, 0.5, "on average;"),
    ],
)
def test_few_heads_are_beside_random_ones(found, p_value, p_min, said):
    """Without a test, or with one that could not find anything, nothing is clear."""
    to_base, to_tuned = found.directions
    rows = [replace(row, p_value=p_value, p_value_min=p_min) for row in to_base.coverage]
    told = replace(found, directions=(replace(to_base, coverage=tuple(rows)), to_tuned))
    heads = claims(told)[2].rstrip(".") + ";"
    assert said in heads
    if p_value is None or p_value > 0.05:
        assert " clearly less" not in heads.replace("not clearly less", "")


@pytest.mark.parametrize(("optimism", "is_said"), [(3.0, True), (0.0, False), (None, False)])
def test_a_cross_fitted_share_is_named_as_one(found, optimism, is_said):
    """A head that is not first in every split has the share that other prompts rank it by."""
    to_base, to_tuned = found.directions
    rows = [
        replace(
            row,
            optimism_pct=UNDEFINED if optimism is None else around(optimism),
            cross_fitted_coverage_pct=UNDEFINED if optimism is None else around(91),
        )
        for row in to_base.coverage
        if row.k == 1
    ]
    told = replace(found, directions=(replace(to_base, coverage=tuple(rows)), to_tuned))
    assert ("when ranked on other prompts" in claims(told)[2]) is is_said
    assert ("undoes 91%" in claims(told)[2]) is is_said


def test_heads_that_do_not_carry_most_are_not_called_the_few(found):
    """Then no small set does, and the largest one is named with what it does."""
    to_base, to_tuned = found.directions
    rows = [
        replace(row, coverage_pct=around(20), cross_fitted_coverage_pct=around(20))
        for row in to_base.coverage
    ]
    told = replace(found, directions=(replace(to_base, coverage=tuple(rows)), to_tuned))
    assert claims(told)[2].startswith("No small set of heads carries most of it: the top 2 heads")
    assert "No small set" not in found.claims[2]


def test_heads_that_changed_stand_by_what_they_did_and_apart_by_what_W_O_does(found):
    """The larger effect first, whatever its kind; recoded heads of both sorts are not one group."""
    other = max((h for h in range(1, 16)), key=lambda h: constant(found, h))
    told = with_kind(with_kind(found, "replaced", other), "recoded", 0, function_kept=True)
    kinds = claims(told)[3]
    first, second = sorted((0, other), key=lambda head: -constant(found, head))
    assert kinds.index(f"L1H{first} was") < kinds.index(f"L1H{second} was")
    both = claims(with_kind(told, "recoded", other, function_kept=False))[3]
    assert "L1H0 was recoded" in both
    assert f"L1H{other} was recoded" in both


def constant(found, head):
    return found.ladders[0][f"head{head}"].damage_nats["constant"].value


def test_less_than_nothing_is_not_said_to_be_kept(found):
    """A map that is worse than a constant does harm; one that is about as good keeps nothing."""
    row = found.ladders[0]["head0"]
    for value, said in ((-120, "does harm (-120%"), (-1, "keeps nothing (-1%"), (40, "keeps 40%")):
        changed = replace(row, recovered_pct={**row.recovered_pct, "mapped": around(value, 3)})
        ladder = replace(found.ladders[0], rows=(changed, *found.ladders[0].rows[1:]))
        told = replace(with_kind(found, "replaced"), ladders=(ladder, *found.ladders[1:]))
        assert f"the map {said}" in claims(told)[3]


def test_the_yardstick_of_few_heads_is_not_left_out(found):
    """More than one head that was never compared with random ones is not called the carrier."""
    alone = claims(replace(found, directions=()))[2]
    assert "ranked and scored on the same prompts" in alone
    assert "no larger set was scored on others" in alone


def test_kinds_that_were_not_measured_are_not_named(found):
    """Without a ladder no head is called anything."""
    kinds = claims(replace(found, ladders=()))[3]
    assert "was not measured" in kinds
    assert "unchanged" not in kinds


def with_kind(found, kind, head=0, **changes):
    heads = list(found.kinds.heads)
    heads[head] = replace(heads[head], kind=kind, **changes)
    return replace(found, kinds=replace(found.kinds, heads=tuple(heads)))


@pytest.mark.parametrize(
    ("kept", "said"), [(True, "W_O undoes it"), (False, "W_O does not undo it"), (None, "")]
)
def test_what_W_O_does_is_said_where_it_is_clear(found, kept, said):
    """And not of a head that is not clear."""
    kinds = claims(with_kind(found, "recoded", function_kept=kept))[3]
    assert "the same content in other coordinates" in kinds
    assert [each for each in ("W_O undoes it", "W_O does not undo it") if each in kinds] == (
        [said] if said else []
    )


@pytest.mark.parametrize("kind", ["replaced", "reassigned", "undecided", "unchanged"])
def test_only_a_recoded_head_is_the_same_in_other_coordinates(found, kind):
    """No other kind is."""
    assert "other coordinates" not in claims(with_kind(found, kind))[3]


@pytest.mark.parametrize(
    ("why", "said"),
    [
        (None, "the map works only on the contents it was fitted on"),
        (NOT_ON_NEUTRAL, NOT_ON_NEUTRAL),
    ],
)
def test_a_reassigned_head_is_told_by_the_test_that_it_failed(found, why, said):
    """A map that works on other contents is not said to work only on its own."""
    kinds = claims(with_kind(found, "reassigned", why=why))[3]
    assert f"L1H0 was reassigned ({said}" in kinds


@pytest.mark.parametrize(("kept", "said"), [(-5.0, "keeps nothing of"), (12.0, "keeps 12% of")])
def test_what_shuffled_pairs_keep_is_never_clipped_to_a_number(found, kept, said):
    """Less than nothing is nothing, in words."""
    changed = with_kind(found, "replaced")
    rows = tuple(replace(each, recovered_pct=around(kept)) for each in changed.stand_ins)
    assert f"a map of shuffled pairs {said}" in claims(replace(changed, stand_ins=rows))[3]


@pytest.mark.parametrize(("n_prompts", "is_said"), [(12, False), (60, True)])
def test_few_prompts_that_carry_an_effect_are_few_of_all(found, n_prompts, is_said):
    """Ten of twelve carry it together."""
    told = replace(found, settings=replace(found.settings, n_prompts=n_prompts))
    told = replace(told, transfer=replace(found.transfer, n_eff=10.0))
    assert ("10 of the prompts carry most" in claims(told)[-1]) is is_said


def test_what_is_uncertain_is_said_where_it_is(found):
    """Few contents, few prompts that carry the effect, and heads that are undecided."""
    sure = replace(found.transfer, n_eff=1000.0)
    told = replace(found, transfer=sure, kinds=replace(found.kinds, few_contents=False))
    for head in told.kinds.of("undecided"):
        told = with_kind(told, "unchanged", head)
    last = claims(told)[-1]
    assert "so few contents" not in last
    assert "carry most" not in last
    assert "undecided" not in last
    less = replace(told, transfer=replace(sure, n_eff=3.0))
    assert "3 of the prompts carry most" in claims(less)[-1]
    few = replace(told, kinds=replace(told.kinds, few_contents=True))
    assert "so few contents" in claims(few)[-1]
    unclear = with_kind(told, "undecided", why="it holds the line")
    assert "L1H0 is undecided because it holds the line" in claims(unclear)[-1]


@pytest.mark.parametrize(("n_groups", "is_said"), [(79, True), (80, False)])
def test_intervals_that_few_prompts_make_too_narrow_are_named(found, n_groups, is_said):
    """Of what heads give base, below the number of groups at which they hold what they promise."""
    told = replace(found, settings=replace(found.settings, n_groups=n_groups))
    assert ("what heads give base are a little too narrow" in claims(told)[-1]) == is_said


def test_harm_is_not_called_repair(found):
    """A map that makes it worse takes nothing back, and nothing covers it."""
    harm = replace(found.full, delta=around(-0.3, 0.1), undefined_because=None)
    first, *rest = study_claims(replace(found, full=harm))
    assert "the map does harm: ΔKL(ALL) is -0.3" in first
    assert not any(" cover" in sentence for sentence in rest)


def test_one_strength_says_nothing_of_others(found):
    """That shares depend on the strength is said with two strengths at least."""
    assert any("depend on the strength" in each for each in found.study_claims)
    one = replace(found, alphas=found.alphas[:1])
    assert not any("depend on the strength" in each for each in study_claims(one))


@pytest.mark.parametrize(
    ("less", "said"),
    [
        (around(2), "repairs less there"),
        (around(-2), "MORE there, so it is no control"),
        (around(0.5), "nothing shows that the effect is specific"),
        (undefined("one prompt"), "nothing shows"),
    ],
)
def test_the_control_layer_is_read_from_its_paired_interval(found, less, said):
    """One reading, and no specificity from what is not clear."""
    told = replace(found, control_layer=replace(found.control_layer, less_nats=less))
    (sentence,) = [each for each in study_claims(told) if "Control" in each]
    assert said in sentence
    assert not any("Control" in each for each in study_claims(replace(found, control_layer=None)))


def test_a_share_that_could_be_anything_is_not_a_number():
    """An interval wider than everything, around nothing, determines no share."""
    assert share(around(20, 80)).startswith("an undetermined share")
    assert not share(around(90, 5)).startswith("an undetermined")


def test_p_values_say_that_they_are_small_not_how_small():
    """Below 0.001 they print as that."""
    assert p_text(0.00002) == "p < 0.001"
    assert p_text(0.02) == "p = 0.02"


def test_where_more_than_the_decision_token_is_patched_the_sentences_say_so():
    """What heads do not carry, they do not carry at one token, or at several."""
    base = tiny_model()
    tuned = fine_tuned(base, 0.3)
    with torch.no_grad():
        tuned.unembed.W_U += 0.1 * torch.randn(tuned.unembed.W_U.shape)
    for reading, where in (
        (Reading(), "at this token"),
        (Reading(positions="-2..-1"), "at the patched tokens"),
        (Reading(answer_tokens=2), "at the patched tokens"),
    ):
        pair = pair_of(base, tuned, random_prompts(), reading=reading)
        said = every_claim(analysis_of(pair, beside_noise=False))
        assert f"is not in what heads say {where}" in said


def test_a_noise_pair_without_room_is_left_out_unless_it_was_measured_before(
    tmp_path, monkeypatch, caplog
):
    """It takes a third model; what an earlier run recorded takes none."""
    pair = pair_of(tiny_model(), fine_tuned(tiny_model()), random_prompts())
    activations, patching = PairActivations(pair), Patching(layer=MAIN)
    maps = fit_maps(pair, [MAIN], activations=activations)
    measurer = Measurer(prepared(pair, maps, activations=activations), Store(tmp_path / "records"))

    def measured(room):
        monkeypatch.setattr(noise, "has_room_for", lambda _: room)
        return noise.noise_effects(measurer, activations, patching, Place())

    assert measured(room=False) is None
    assert "no room for a third model" in caplog.text
    first = measured(room=True)
    again = measured(room=False)
    np.testing.assert_array_equal(again.gap_base_nats, first.gap_base_nats)
