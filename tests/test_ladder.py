"""The ladder: its ends, its parts, and the kinds of heads that are told from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import MAIN, TINY_HEADS, pair_of, prepared, random_prompts, tiny_model

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.records import Ladder, LadderRow
from rq4lens.analysis.statistics import bootstrap
from rq4lens.analysis.statistics.bootstrap import (
    Bootstrap,
    Estimate,
    Interval,
    undefined,
)
from rq4lens.analysis.structure.controls import NO_CONTENT, held_out
from rq4lens.analysis.structure.kinds import (
    IDLE_PCT,
    NOT_ON_NEUTRAL,
    KindInputs,
    above,
    head_kinds,
    ladder,
)
from rq4lens.heads import Head
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.patch import BASE, CONSTANT, MAPPED, OUTPUT, SELF, SHIFTED
from rq4lens.validation.attended import AttendedInputs
from rq4lens.validation.planting import Planting, plant

NO_SPREAD = bootstrap.NO_SPREAD
RUNGS = [CONSTANT, BASE, SHIFTED, MAPPED, OUTPUT]
SETS = {f"head{head}": (head,) for head in range(TINY_HEADS)} | {"full": tuple(range(TINY_HEADS))}


def measured_of(tuned, base, prompts=None, alpha=1.0):
    pair = pair_of(base, tuned, prompts or random_prompts(n_train=160, n_val=40))
    return MeasuredSets.of(prepared(pair, fit_maps(pair, [MAIN])), MAIN, alpha)


@pytest.fixture(scope="module")
def planted():
    """Head 0 rotated and undone, head 1 rotated alone, head 2 shifted, head 3 as it was."""
    base = tiny_model()
    pair = plant(base, rotated=[Head(MAIN, 0)], turned=[Head(MAIN, 1)], shifted=[Head(MAIN, 2)])
    measured = measured_of(pair.tuned, base)
    return measured, ladder(measured, SETS, RUNGS, Bootstrap(measured.groups, 300))


def test_a_constant_recovers_nothing_and_the_head_itself_everything(planted):
    """The ends of the ladder are 0 and 100 by definition."""
    measured, _ = planted
    damage = np.concatenate([measured.of_source(each, [(1,)]) for each in (CONSTANT, SELF)])
    ends = Bootstrap(measured.groups, 100).shares(damage[:1], damage)
    assert [end.value for end in ends] == pytest.approx([0, 100], abs=1e-4)


def test_the_rungs_say_what_was_planted(planted):
    """Undone or not: the map knows both rotations, and only `W_O` tells them apart."""
    recovered_pct = [planted[1][f"head{head}"].recovered_pct for head in range(TINY_HEADS)]
    undone, turned, shifted, same = recovered_pct
    assert undone["mapped"].value > 99
    assert turned["mapped"].value > 99
    assert undone["output"].value == pytest.approx(100, abs=1e-3)
    assert turned["output"].value < 90
    assert undone["raw"].value < 90
    assert shifted["shifted"].value == pytest.approx(100, abs=1e-3)
    assert shifted["raw"].value < 90
    assert same["raw"].value == pytest.approx(100, abs=1e-3)


def test_the_raw_damage_has_three_parts(planted):
    """`D(raw)` is interference, information restored and information lost, in that order."""
    for row in planted[1].rows:
        parts = row.interference_nats, row.restored_nats, row.lost_nats
        assert sum(part.value for part in parts) == pytest.approx(row.damage_nats["raw"].value)


def test_what_is_recovered_hardly_depends_on_the_strength(planted):
    """Damage grows with the square of alpha, its shares stay."""
    measured = planted[0].at(0.3)
    weak = ladder(measured, SETS, RUNGS, Bootstrap(measured.groups, 100))
    strong = planted[1]
    for name in ("head1", "head2"):
        assert weak[name].damage_nats["constant"].value < strong[name].damage_nats["constant"].value
        for rung in ("mapped", "shifted"):
            here, there = (each[name].recovered_pct[rung].value for each in (weak, strong))
            assert here == pytest.approx(there, abs=10) or min(here, there) < 50


def test_nothing_is_recovered_of_a_head_that_tells_nothing():
    """Below the idle line a share of the constant's damage is undefined, and why is said."""
    base = tiny_model()
    base.blocks[MAIN].attn.W_O.data[0] = 0
    measured = measured_of(plant(base, rotated=[Head(MAIN, 0)]).tuned, base)
    row = ladder(measured, SETS, RUNGS, Bootstrap(measured.groups, 100))["head0"]
    assert row.recovered_pct["mapped"].value is None
    assert "nothing to recover" in row.recovered_pct["mapped"].reason


def with_contents(prompts):
    """What a prompt is about: its last word."""
    return PromptSet(
        tuple(replace(each, content=each.text.split()[-1]) for each in prompts.prompts)
    )


def test_each_content_is_mapped_by_a_map_that_never_saw_it():
    """The same as a map fitted on train prompts from which the content is left out."""
    base = tiny_model()
    prompts = with_contents(random_prompts(n_train=160, n_val=40))
    pair = pair_of(base, plant(base, turned=[Head(MAIN, 1)]).tuned, prompts)
    activations = PairActivations(pair)
    maps = fit_maps(pair, [MAIN], activations=activations)
    found = held_out(prepared(pair, maps, activations=activations), MAIN)
    z = activations.z("base", "val", MAIN)
    contents = np.array(prompts.split("val").contents)
    for content in contents[:3]:
        left = tuple(each for each in prompts.prompts if each.content != content)
        without = fit_maps(pair_of(base, pair.tuned.model, PromptSet(left)), [MAIN])[MAIN]
        asked = torch.from_numpy(contents == content)
        assert torch.allclose(found[asked], without(z[asked]), atol=1e-5)


def test_prompts_without_content_hold_out_none(planted):
    """Why there is no such rung is said."""
    found = held_out(planted[0].experiment, MAIN)
    assert found == NO_CONTENT


# --- kinds, from numbers worked out by hand ---


def clear(value, width=2.0):
    value = float(value)
    return Estimate(value, Interval(value - width, value + width))


def row_of(name="head0", *, constant=1.0, **recovered_pct):
    """A row of a ladder by what is recovered in percent, each clear unless an estimate."""
    told = {"raw": 0.0, "shifted": 0.0, "mapped": 0.0, "output": 0.0} | recovered_pct
    values = {k: v if isinstance(v, Estimate) else clear(v) for k, v in told.items()}
    values["constant"] = Estimate(0.0, None, NO_SPREAD)
    damage = {k: clear(constant * (1 - (v.value or 0) / 100), 0.001) for k, v in values.items()}
    nothing = undefined("not asked")
    return LadderRow(name, (0,), 1.0, damage, values, nothing, nothing, nothing)


def kind_of(row, neutral="the pair has no neutral prompts", over_shift=1.0, **given):
    inputs = KindInputs(
        ladder=Ladder((row,), given.pop("line", 0.01), "rule"),
        neutral=neutral,
        map_over_shift_nats=(clear(over_shift, 0.1),),
        leave_one_out_nats=(given.pop("left_out", clear(0.0, 0.001)),),
        **given,
    )
    return head_kinds(inputs).heads[0]


def elsewhere(**recovered_pct):
    return Ladder((row_of(**recovered_pct),), 0.01, "rule")


RECODED = {"mapped": 95.0, "held_out": 90.0}


@pytest.mark.parametrize(
    ("row", "neutral", "kind"),
    [
        (row_of(raw=95), "none", "unchanged"),
        (row_of(shifted=95), "none", "shifted"),
        (row_of(mapped=20), "none", "replaced"),
        (row_of(mapped=-40), "none", "replaced"),
        (row_of(**RECODED), elsewhere(mapped=90), "recoded"),
        (row_of(**RECODED), elsewhere(mapped=10), "reassigned"),
        (row_of(mapped=95, held_out=10), elsewhere(mapped=90), "reassigned"),
        (row_of(mapped=95, held_out=10), "none", "reassigned"),
        (row_of(**RECODED), "none", "undecided"),
        (row_of(mapped=95), elsewhere(mapped=90), "undecided"),
        (row_of(raw=clear(90)), "none", "undecided"),
        (row_of(shifted=clear(91)), "none", "undecided"),
        (row_of(mapped=clear(50)), "none", "undecided"),
        (row_of(mapped=95, held_out=clear(50)), elsewhere(mapped=90), "undecided"),
        (row_of(mapped=95, held_out=10), elsewhere(mapped=clear(50)), "reassigned"),
    ],
)
def test_kinds_follow_the_ladder_in_their_order(row, neutral, kind):
    """Each rung by its whole interval; an interval that holds the line leaves it undecided."""
    found = kind_of(row, neutral)
    assert found.kind == kind
    if kind != "reassigned":
        assert (found.why is not None) == (kind == "undecided")


@pytest.mark.parametrize(("held_out", "why"), [(10, None), (90, NOT_ON_NEUTRAL)])
def test_a_reassigned_head_names_neutral_prompts_where_they_alone_tell(held_out, why):
    """One that fails on other contents works on its own alone, whatever it does elsewhere."""
    found = kind_of(row_of(mapped=95, held_out=held_out), elsewhere(mapped=10))
    assert (found.kind, found.why) == ("reassigned", why)


def test_a_head_is_idle_where_nothing_it_does_is_above_the_line():
    """Constant, raw and leaving it out all below; any of the three above is no idle head."""
    small = row_of(constant=0.001, raw=50)
    assert kind_of(small).kind == "idle"
    assert kind_of(small, left_out=clear(0.5, 0.1)).kind != "idle"
    loud = replace(small, damage_nats=small.damage_nats | {"raw": clear(1.0, 0.1)})
    assert kind_of(loud).kind != "idle"


def test_a_map_that_does_no_better_than_a_shift_recodes_nothing():
    """What a shift of the mean explains is no change of coordinates."""
    row = row_of(shifted=70, **RECODED)
    assert kind_of(row, elsewhere(mapped=90), over_shift=1.0).kind == "recoded"
    assert kind_of(row, elsewhere(mapped=90), over_shift=0.05).kind == "undecided"


@pytest.mark.parametrize(("output", "kept"), [(95.0, True), (20.0, False), (clear(90.0), None)])
def test_the_output_says_whether_the_function_is_kept(output, kept):
    """`W_O` undoes the recoding, or not, or that is not clear."""
    row = row_of(output=output, **RECODED)
    assert kind_of(row, elsewhere(mapped=90)).function_kept is kept
    assert kind_of(row_of(mapped=20, output=output)).function_kept is None


def test_a_map_that_does_harm_where_a_constant_does_nothing_holds_only_at_home():
    """On neutral prompts that ask nothing of the head, only damage counts."""
    idle_there = row_of(constant=0.001)
    nothing = {**idle_there.recovered_pct, "mapped": undefined("idle there")}
    quiet = replace(idle_there, recovered_pct=nothing)
    harmful = replace(quiet, damage_nats=quiet.damage_nats | {"mapped": clear(0.3, 0.01)})
    row = row_of(**RECODED)
    assert kind_of(row, Ladder((quiet,), 0.01, "rule")).kind == "recoded"
    assert kind_of(row, Ladder((harmful,), 0.01, "rule")).kind == "reassigned"


def test_a_line_is_passed_by_a_whole_interval():
    """Above, below, or neither; what has no spread needs no interval."""
    assert above(clear(95), 90.0) is True
    assert above(clear(85), 90.0) is False
    assert above(clear(90), 90.0) is None
    assert above(Estimate(95.0, None, NO_SPREAD), 90.0) is True
    assert above(Estimate(95.0, None, "one prompt"), 90.0) is None
    assert above(None, 90.0) is None


def test_the_idle_line_is_a_share_of_the_layers_joint_effect(planted):
    """And never below ten noise floors."""
    measured, found = planted
    joint = max(found["full"].damage_nats[each].value for each in ("constant", "raw"))
    assert found.idle_below_nats == pytest.approx(IDLE_PCT / 100 * joint)
    loud = ladder(measured, SETS, RUNGS, Bootstrap(measured.groups, 50), noise_floor_nats=1.0)
    assert loud.idle_below_nats == pytest.approx(10)


def test_new_content_in_place_of_the_old_is_not_recovered():
    """What the map was fitted on says nothing of it: about as good as a constant."""
    base = tiny_model()
    prompts = random_prompts(n_train=160, n_val=40)
    attended = AttendedInputs.of(base, pair_of(base, base, prompts).tokens("base", "train"), MAIN)
    tuned = plant(base, replaced=[Head(MAIN, 1)], how=Planting(attended=attended)).tuned
    measured = measured_of(tuned, base, prompts)
    row = ladder(measured, SETS, RUNGS, Bootstrap(measured.groups, 100))["head1"]
    assert abs(row.recovered_pct["mapped"].value) < 25
