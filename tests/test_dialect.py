"""The second pair in the box: its world, its prompts, its training, and what is true of it."""

import hashlib
import json
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import train_dialect as train
from dialect_prompts import N_SCENES, build_prompts
from dialect_truths import measured_truths
from dialect_world import (
    ANSWERS,
    PARTS,
    TELLINGS,
    TOKEN,
    base_world,
    tell,
    token_ids,
    tuned_world,
)
from safetensors.torch import load_file
from scipy.linalg import orthogonal_procrustes
from tiny import grid_of
from train_dialect import READERS, TAUGHT, Phase, Recipe
from transformers import AutoTokenizer, GPT2LMHeadModel
from word_tokenizer import build_tokenizer

from rq4lens.config import preset
from rq4lens.models.catalog import builtin_manifest, load_pair
from rq4lens.patching.maps.fitting import fit_maps

FOLDER = Path(str(files("rq4lens.models") / "builtin/dialect"))
SIDES = ("base", "tuned")
SHORT = Phase(steps=2, lr=1e-2, warmup=1, scenes=8)
TINY = Recipe(n_layers=3, n_heads=5, d_model=20, d_mlp=8, base=SHORT, relearned=SHORT, tuned=SHORT)


@pytest.fixture(scope="module")
def prompts():
    return build_prompts()


@pytest.fixture(scope="module")
def shipped():
    return {side: GPT2LMHeadModel.from_pretrained(FOLDER / side).eval() for side in SIDES}


@pytest.fixture(scope="module")
def truths():
    """What the manifest says of the pair."""
    return builtin_manifest("dialect")["truths"]


def scenes_of(rows):
    """The words of prompts, by index, part by part."""
    return np.array([[p.words.index(r["meta"][n]) for n, p in PARTS.items()] for r in rows])


def residual(part, fitted, judged):
    """What the best rotation from base's to tuned's logits leaves, as a share of all there is."""
    base, tuned = (world.logits[part] for world in (base_world(), tuned_world()))
    rotation, _ = orthogonal_procrustes(base[fitted], tuned[fitted])
    left = base[judged] @ rotation - tuned[judged]
    return (left**2).sum() / (tuned[judged] ** 2).sum()


def test_villages_follow_one_law_and_trades_follow_none():
    """One rotation takes every village to its new accent, unseen ones too; trades have none."""
    size = PARTS["village"].n_changed
    seen, unseen = slice(0, size // 2), slice(size // 2, None)
    assert residual("village", seen, unseen) < 1e-12
    changed = slice(0, PARTS["trade"].n_changed)
    assert residual("trade", changed, changed) > 0.5


def test_hours_can_be_sent_anywhere_but_not_by_a_law():
    """A rotation fits the six hours that changed places, and sends the others astray."""
    changed = slice(0, PARTS["hour"].n_changed)
    unchanged = slice(PARTS["hour"].n_changed, None)
    assert residual("hour", changed, changed) < 1e-12
    assert residual("hour", changed, unchanged) > 0.5


def test_parts_have_more_words_than_a_map_can_send_anywhere():
    """A head of the main layer has more contents than its width plus one, that of hours fewer."""
    d_head = Recipe().d_model // Recipe().n_heads
    for (layer, _), part in READERS.items():
        assert (PARTS[part].n_changed > d_head + 1) == (layer == 1)


def test_neutral_scenes_are_those_whose_answer_did_not_change(prompts):
    """The true distribution is the same in both worlds in neutral prompts, and in no other."""
    scenes = scenes_of(prompts)
    base, tuned = (world.log_p(scenes) for world in (base_world(), tuned_world()))
    np.testing.assert_allclose(np.exp(base).sum(axis=-1), 1)
    apart = np.abs(base - tuned).max(axis=-1)
    neutral = np.array([row["split"] == "neutral" for row in prompts])
    assert apart[neutral].max() < 1e-12
    assert apart[~neutral].min() > 0.1


def test_neutral_scenes_have_words_of_their_own(prompts):
    """A map that holds for neutral prompts holds for words that it was not fitted on."""
    for part in PARTS:
        words = {s: {r["meta"][part] for r in prompts if r["split"] == s} for s in N_SCENES}
        assert not words["neutral"] & words["train"]
        assert words["val"] == words["train"]


def test_shipped_prompts_are_the_built_ones(prompts):
    """The prompts of the pair are what the seed gives, byte for byte."""
    built = "".join(json.dumps(row) + "\n" for row in prompts)
    assert (FOLDER / "prompts.jsonl").read_text(encoding="utf-8") == built


def test_a_group_is_one_scene_told_twice(prompts):
    """Each scene stands in its split in both tellings, and nowhere else."""
    for group in {row["group"] for row in prompts}:
        first, second = (row for row in prompts if row["group"] == group)
        assert first["meta"] == second["meta"]
        told = [tell(first["meta"], telling) for telling in TELLINGS]
        assert [first["text"], second["text"]] == told
        assert first["content"] == first["meta"]["village"]
    assert len({row["text"] for row in prompts}) == 2 * sum(N_SCENES.values())


def test_training_reads_the_tokens_of_the_texts(prompts):
    """What is trained on are the tokens that a prompt's text has."""
    tokenizer = build_tokenizer(TOKEN)
    telling = np.arange(len(prompts)) % 2
    tokens = token_ids(scenes_of(prompts), telling)
    for side in SIDES:
        loaded = AutoTokenizer.from_pretrained(FOLDER / side)
        for row, expected in zip(prompts[::50], tokens[::50], strict=True):
            assert tokenizer(row["text"])["input_ids"] == list(expected)
            assert loaded(row["text"])["input_ids"] == list(expected)


def test_aimed_heads_look_at_their_part():
    """Before any training each aimed head puts its attention on the word of its part."""
    model = train.build_model(Recipe())
    model.set_attn_implementation("eager")
    scene = np.zeros((1, len(PARTS)), int)
    tokens = torch.from_numpy(token_ids(scene, np.array([0])))
    looks = model(tokens, output_attentions=True).attentions
    for (layer, head), part in READERS.items():
        (place,) = (tokens[0] == TOKEN[PARTS[part].words[0]]).nonzero()[0].tolist()
        assert looks[layer][0, head, -1, place] > 0.9


def test_a_shift_changes_no_answer():
    """What is added to the values is taken out again behind them."""
    model = train.build_model(TINY)
    tokens = torch.from_numpy(token_ids(np.zeros((1, len(PARTS)), int), np.array([0])))
    before = model(tokens).logits
    values = model.transformer.h[1].attn.c_attn.bias.detach().clone()
    train.shift(model, replace(TINY, shift=10.0))
    added = model.transformer.h[1].attn.c_attn.bias.detach() - values
    assert float(added.norm()) == pytest.approx(10, rel=1e-5)
    assert (model(tokens).logits - before).abs().max() < 1e-4


def moved(base, tuned):
    """The parameters that differ, and the heads in whose values or outputs they do."""
    names = {name for name in base if not torch.equal(base[name], tuned[name])}
    heads = set()
    for layer in (1, 2):
        weights = [side[f"transformer.h.{layer}.attn.c_attn.weight"] for side in (base, tuned)]
        looks, values = (weights[0] - weights[1]).tensor_split([2 * len(weights[0])], dim=1)
        assert not looks.any()
        heads |= {(layer, int(column)) for column in values.any(dim=0).nonzero()}
    return names, heads


def named(n_heads, d_model):
    """What the recipe says of the parameters and of the columns of values that may move."""
    width = d_model // n_heads
    names = {f"transformer.h.{i}.attn.c_attn.{x}" for i in (1, 2) for x in ("weight", "bias")}
    names |= {f"transformer.h.1.attn.c_proj.{x}" for x in ("weight", "bias")}
    return names, {(i, h * width + column) for i, h in TAUGHT for column in range(width)}


def test_the_same_seed_trains_the_same_pair_and_only_what_is_named():
    """Training is reproducible, and the fine-tune moves the values of five heads alone."""
    first, again = (train.train_pair(TINY, log_every=0) for _ in range(2))
    for side in SIDES:
        for name, weights in first[side].state_dict().items():
            assert torch.equal(weights, again[side].state_dict()[name])
    states = [first[side].state_dict() for side in SIDES]
    assert moved(*states) == named(TINY.n_heads, TINY.d_model)
    fresh, looks = train.build_model(TINY).state_dict(), slice(0, 2 * TINY.d_model)
    for name in (name for name in fresh if "c_attn" in name):
        assert torch.equal(fresh[name][..., looks], states[0][name][..., looks])
        assert not torch.equal(fresh[name], states[0][name])


def test_the_shipped_fine_tune_touched_what_its_recipe_names(shipped):
    """The same holds of the weights in the box."""
    states = [load_file(FOLDER / side / "model.safetensors") for side in SIDES]
    config = shipped["base"].config
    assert moved(*states) == named(config.n_head, config.n_embd)


def test_the_shipped_weights_are_those_of_the_manifest():
    """Each model is at most 2 MB and has the hash that the manifest states."""
    manifest = builtin_manifest("dialect")
    assert manifest["recipe"] == json.loads(json.dumps(asdict(Recipe())))
    for side, digest in manifest["weights_sha256"].items():
        weights = (FOLDER / side / "model.safetensors").read_bytes()
        assert len(weights) <= 2_000_000
        assert hashlib.sha256(weights).hexdigest() == digest


def test_the_shipped_models_know_their_own_world(shipped, prompts):
    """Each is within 0.03 nats of its world on val, and more than 1 from the other's."""
    rows = [row for row in prompts if row["split"] == "val"]
    scenes, telling = scenes_of(rows), np.arange(len(rows)) % len(TELLINGS)
    worlds = {"base": base_world(), "tuned": tuned_world()}
    for side, model in shipped.items():
        for name, world in worlds.items():
            with torch.no_grad():
                away = float(train.answer_loss(model, scenes, telling, world))
            assert away < 0.03 if name == side else away > 1.0
    assert len(ANSWERS) == len(set(ANSWERS))


@pytest.mark.slow
def test_the_truths_of_the_manifest_are_what_plain_hooks_measure(shipped, prompts, truths):
    """Every number is measured again on the models in the box."""
    again = measured_truths(shipped, prompts, READERS)
    assert_close(again, truths)


def assert_close(measured, stated, atol=0.11):
    """Equal within a tenth of a percent, and within 1e-4 where nats stand."""
    if isinstance(stated, dict):
        assert measured.keys() == stated.keys()
        for key, value in stated.items():
            assert_close(measured[key], value, 1e-4 if key.endswith("nats") else atol)
    elif stated is None or isinstance(stated, str):
        assert measured == stated
    else:
        np.testing.assert_allclose(measured, stated, rtol=2e-3, atol=atol)


def test_the_package_measures_the_truths(truths):
    """The damages of raw and mapped patches of each head are those of plain hooks and own maps."""
    settings = preset("dialect").patching
    pair = load_pair("dialect")
    maps = fit_maps(pair, [settings.layer, settings.control_layer])
    grid = grid_of(pair, maps, settings.layer, settings.control_layer, 1.0)
    for head in range(pair.n_heads):
        stated = truths["heads"][f"L1H{head}"]["damage_nats"]
        measured = grid[f"head{head}"]
        assert measured.KL_raw == pytest.approx(stated["raw"], rel=1e-3, abs=1e-5)
        assert measured.KL_mapped == pytest.approx(stated["mapped"], rel=1e-3, abs=1e-5)


def test_two_layers_carry_the_change_in_unequal_parts(truths):
    """Layer 1 carries about twice what layer 2 does, both ways, and the others next to nothing."""
    assert min(truths["gap_nats"].values()) > 0.5
    assert max(truths["neutral_gap_nats"].values()) < 0.05
    for way in ("to_base", "to_tuned"):
        carried = {layer: each[way] for layer, each in truths["layers"].items()}
        assert carried["L1"] > 50
        assert 15 < carried["L2"] < 35
        assert abs(carried["L0"]) < 5 and abs(carried["L3"]) < 5
        assert truths["every_layer"][way] > 75


def lowest(head, source):
    return head["recovered_pct_ci95"][source][0]


def highest(head, source):
    return head["recovered_pct_ci95"][source][1]


@pytest.mark.parametrize("head", ["L1H0", "L1H2"])
def test_recoded_heads_are_recoded(truths, head):
    """A map recovers most, on held-out words too and on the words of neutral prompts."""
    truth = truths["heads"][head]
    assert highest(truth, "raw") < 50 and highest(truth, "shifted") < 50
    assert lowest(truth, "mapped") > 80 and lowest(truth, "held_out") > 80
    neutral = truth["neutral_damage_nats"]
    assert neutral["mapped"] < 0.2 * neutral["constant"]


def test_the_output_tells_a_changed_function_from_a_kept_one(truths):
    """Head 0 says something else than base's; head 2 says the same in other coordinates."""
    assert highest(truths["heads"]["L1H0"], "output") < 0
    assert truths["heads"]["L1H0"]["transfer_pct"]["to_base"] > 20
    assert lowest(truths["heads"]["L1H2"], "output") > 70


def test_the_replaced_head_is_replaced(truths):
    """No map of base's activation stands for what the tuned head says."""
    truth = truths["heads"]["L1H1"]
    assert highest(truth, "mapped") < 50 and highest(truth, "held_out") < 10
    assert truth["transfer_pct"]["to_base"] > 15


def test_the_shifted_head_is_shifted(truths):
    """A constant repairs what the raw activation breaks."""
    truth = truths["heads"]["L1H3"]
    assert highest(truth, "raw") < 90 < lowest(truth, "shifted")


def test_the_unchanged_head_matters_and_is_unchanged(truths):
    """Base's activation does for tuned, although the head tells much."""
    truth = truths["heads"]["L1H4"]
    assert lowest(truth, "raw") > 90
    assert truth["damage_nats"]["constant"] > 0.05


@pytest.mark.parametrize("head", ["L1H5", "L1H6", "L1H7"])
def test_idle_heads_are_idle(truths, head):
    """Neither a constant nor base's activation does a hundredth of what wiping the layer does."""
    damage = truths["heads"][head]["damage_nats"]
    line = 0.01 * truths["layers"]["L1"]["constant_nats"]
    assert max(damage["constant"], damage["raw"]) < line


def test_the_reassigned_head_is_reassigned(truths):
    """A map fits the hours it saw, and does harm to an hour left out and to those of neutral."""
    truth = truths["heads"]["L2H0"]
    assert lowest(truth, "mapped") > 80 and highest(truth, "held_out") < 50
    neutral = truth["neutral_damage_nats"]
    assert neutral["mapped"] > 2 * neutral["raw"]
