"""One measurer: whatever asks for an effect, each patch is measured once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from games import Game, noisy_game
from tiny import (
    ALPHA,
    MAIN,
    TINY_HEADS,
    WORDS,
    fine_tuned,
    grid_of,
    pair_of,
    prepared,
    random_prompts,
    tiny_model,
)

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.config import Patching
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.patching import measured as measured_module
from rq4lens.patching.experiment import prepare
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.measured import Measurer
from rq4lens.patching.patch import MAPPED, RAW, Patch


def patches(*heads, alpha=ALPHA, source=RAW, layer=MAIN, n_heads=TINY_HEADS):
    """Patches of one layer, strength and source."""
    return [Patch(layer, HeadSet.of(each, n_heads), alpha, source) for each in heads]


@pytest.fixture
def asked(monkeypatch):
    """The patches that were measured, call by call."""
    calls, measure = [], Measurer._measured

    def watched(self, patches, progress):
        calls.append(list(patches))
        return measure(self, patches, progress)

    monkeypatch.setattr(Measurer, "_measured", watched)
    return calls


def stores(folder):
    return Store(folder / "conditions"), Store(folder / "measured")


def test_effects_are_those_of_the_experiment(tiny_pair, tiny_maps):
    """The order that was asked for, repetitions included; nothing at all is no error."""
    experiment = prepared(tiny_pair, tiny_maps)
    wanted = [*patches([0], [1, 2], [0]), *patches([3], source=MAPPED)]
    found, expected = Measurer(experiment).effects(wanted), experiment.effects(wanted)
    np.testing.assert_allclose(found.kl_nats, expected.kl_nats, atol=1e-12)
    np.testing.assert_allclose(
        found.answer_logprob_change_nats, expected.answer_logprob_change_nats, atol=1e-9
    )
    assert Measurer(experiment).effects([]).kl_nats.shape == (0, len(experiment.groups))


def test_all_views_share_what_is_known(asked):
    """Another view of the layer, or another strength, measures what is new to all of them."""
    measurer = Measurer(Game(np.ones((4, 2))))
    sets = MeasuredSets.of(measurer, 1, 0.3)
    sets.require([(0,), (1,)])
    MeasuredSets.of(measurer, 1, 0.3).require([(1,), (2,)])
    sets.at(0.5).require([(1,)])
    measured = [patch for call in asked for patch in call]
    assert len(measured) == len(set(measured)) == 2 * 4
    assert sets.n_measured == 3


def test_what_stands_in_place_of_the_map_is_measured_beside_the_raw_patch(
    tiny_pair, tiny_maps, asked
):
    """Both sides of a control go through the same products, so that rounding cancels."""
    sets = MeasuredSets.of(prepared(tiny_pair, tiny_maps), MAIN, ALPHA)
    sets.require([sets.everything])
    z = sets.experiment.sources[MAIN, MAPPED]
    others = (replace(sets.also({n: s}), mapped=n) for n, s in (("twice", 2 * z), ("again", z)))
    twice, again, own = (each.delta_nats([sets.everything]) for each in (*others, sets))
    assert np.array_equal(again, own)
    assert not np.array_equal(twice, own)
    everything = range(TINY_HEADS)
    assert asked[1] == [*patches(everything), *patches(everything, source="twice")]


def test_a_source_that_was_replaced_is_measured_again(tiny_pair, tiny_maps, tmp_path):
    """Neither memory nor disk takes one source for another of the same name."""
    measurer = Measurer(prepared(tiny_pair, tiny_maps), *stores(tmp_path))
    wanted = patches([0], source=MAPPED) + patches([0])
    before = measurer.effects(wanted).kl_nats
    z = measurer.experiment.sources[MAIN, RAW]
    for name in (RAW, MAPPED, "more"):
        for scale in (2, 3):
            other = measurer.with_sources({(MAIN, name): scale * z})
            asked_for = patches([0], source=name)
            found = other.effects(asked_for).kl_nats
            assert np.array_equal(found, other.experiment.effects(asked_for).kl_nats)
    assert np.array_equal(measurer.effects(wanted).kl_nats, before)


def test_head_sets_come_back_from_disk_to_the_bit(tiny_pair, tiny_maps, tmp_path, asked):
    """A second process measures nothing and has the same numbers."""
    experiment = prepared(tiny_pair, tiny_maps)
    grid = grid_of(tiny_pair, tiny_maps, MAIN, alpha=ALPHA, ks=(1,), experiment=experiment)
    asked.clear()
    found = []
    for _ in range(2):
        sets = MeasuredSets.of_grid(grid, Measurer(experiment, *stores(tmp_path)))
        found.append(np.stack(sets.kl_nats([*sets.singles, *sets.pairs])))
    assert np.array_equal(*found)
    assert len(asked) == 1  # the grid has the single heads, the first of both the pairs
    assert [p.source for p in asked[0]] == [RAW] * 6 + [MAPPED] * 6
    assert not list((tmp_path / "conditions").glob("*"))


@pytest.mark.parametrize("change", ["prompts", "alpha", "map", "direction", "sets"])
def test_a_file_of_head_sets_serves_its_own_experiment_alone(
    tiny_pair, tiny_maps, tmp_path, change
):
    """Fewer prompts, another strength, map, direction or list of sets: measured, not taken."""
    wanted = patches([0], [1], source=MAPPED)
    Measurer(prepared(tiny_pair, tiny_maps), *stores(tmp_path)).require(wanted)
    maps = fit_maps(tiny_pair, [MAIN], "ridge") if change == "map" else tiny_maps
    settings = Patching(kl_direction="clean||patched") if change == "direction" else Patching()
    rows = [2, 0, 1] if change == "prompts" else None
    wanted = {
        "alpha": patches([0], [1], source=MAPPED, alpha=0.5),
        "sets": wanted[::-1],
    }.get(change, wanted)
    experiment = prepare(tiny_pair, maps, settings, rows=rows)
    store = Store(tmp_path / "measured")
    Measurer(experiment, None, store).require(wanted)
    assert (store.counters.reused, store.counters.computed) == (0, 1)


def test_chunks_are_cut_from_what_is_asked_for(asked, monkeypatch):
    """So many together, in the order in which they were asked for, raw before mapped."""
    monkeypatch.setattr(measured_module, "MEASURED_TOGETHER", 4)
    sets = MeasuredSets.of(noisy_game([1.0, 2.0, 3.0], 5), 1, 0.3)
    sets.require(sets.singles)
    assert [[(p.heads.indices, p.source) for p in call] for call in asked] == [
        [((0,), RAW), ((1,), RAW), ((0,), MAPPED), ((1,), MAPPED)],
        [((2,), RAW), ((2,), MAPPED)],
    ]


@pytest.mark.parametrize(("side", "split"), [("base", "train"), ("base", "val"), ("tuned", "val")])
@pytest.mark.parametrize("engine", ["suffix", "hooks"])
def test_a_number_that_overflows_names_its_prompt_and_model(side, split, engine):
    """One word that a format cannot hold is a sentence with the remedy, wherever it is read."""
    *others, hot = WORDS
    base = tiny_model()
    models = {"base": base, "tuned": fine_tuned(base)}
    prompts = random_prompts(others).prompts
    chosen = next(prompt for prompt in prompts if prompt.split == split)
    heated = (replace(p, text=f"{hot} {p.text}") if p is chosen else p for p in prompts)
    with torch.no_grad():
        models[side].embed.W_E[WORDS.index(hot)] = torch.inf
    pair = pair_of(**models, prompts=PromptSet(tuple(heated)))
    said = f"the {side} model computes .* float32 on prompt '{chosen.id}': .*--dtype bfloat16"
    with pytest.raises(UserError, match=said):
        prepared(pair, fit_maps(pair, [MAIN]), engine=engine).effects(patches([0]))
