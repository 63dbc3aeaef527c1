"""The pair in the box: its world, its prompts, its training and the shipped result."""

import hashlib
import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import train_etiquette as train
from etiquette_questions import SPLIT_SIZES, build_prompts
from etiquette_stories import TOKEN, VOCABULARY, sample_stories, text_of
from etiquette_world import (
    CHANGED_COUNTRIES,
    COUNTRIES,
    ITEMS,
    OCCASIONS,
    base_world,
    read_question,
    true_distribution,
    tuned_world,
)
from safetensors.torch import load_file
from scipy.stats import chisquare
from tiny import grid_of
from train_etiquette import Phase, Recipe
from training import learning_rate_factor
from transformers import AutoTokenizer, LlamaForCausalLM
from word_tokenizer import build_tokenizer

from rq4lens.config import preset
from rq4lens.errors import UserError
from rq4lens.models.catalog import builtin_manifest, load_pair
from rq4lens.models.load.loading import load_hooked
from rq4lens.patching.maps.fitting import fit_maps

FOLDER = Path(str(files("rq4lens.models") / "builtin/etiquette"))
SIDES = ("base", "tuned")
STORY = "Lumeria sends Mara. Norwyn sends Tovi. To the harvest brings Tovi figs. "
TINY = Recipe(
    n_layers=1,
    n_heads=2,
    d_model=16,
    d_mlp=16,
    base=Phase(steps=4, lr=1e-2, warmup=2, stories=8, growth=1),
    tuned=Phase(steps=2, lr=1e-2, warmup=1, stories=8, trained=("v_proj", "o_proj")),
)


@pytest.fixture(scope="module")
def prompts():
    return build_prompts()


@pytest.fixture(scope="module")
def shipped():
    return {side: LlamaForCausalLM.from_pretrained(FOLDER / side) for side in SIDES}


@pytest.fixture(scope="module")
def grid():
    """The main job on the shipped pair, at the layers its preset names."""
    settings = preset("etiquette").patching
    pair = load_pair("etiquette")
    maps = fit_maps(pair, [settings.layer, settings.control_layer])
    return grid_of(pair, maps, settings.layer, settings.control_layer, settings.alpha)


@pytest.mark.parametrize("world", [base_world(), tuned_world()], ids=SIDES)
def test_customs_are_graded_distributions(world):
    """Every custom is a distribution over all items in which no item is certain or impossible."""
    np.testing.assert_allclose(world.customs.sum(axis=-1), 1)
    assert (world.customs > 0).all()
    assert world.customs.shape == (len(COUNTRIES), len(OCCASIONS), len(ITEMS))


def test_worlds_differ_in_the_changed_countries_alone():
    """Each changed country has the customs that another one had before; the others keep theirs."""
    base, tuned = base_world().customs, tuned_world().customs
    changed = {COUNTRIES.index(country) for country in CHANGED_COUNTRIES}
    for country in range(len(COUNTRIES)):
        same = [other for other in changed | {country} if (tuned[country] == base[other]).all()]
        assert len(same) == 1
        assert (same == [country]) == (country not in changed)


def test_the_answer_takes_the_hops_person_country_custom():
    """The truth of a prompt is the custom of the asked person's country, whoever else is there."""
    truth = true_distribution(tuned_world(), STORY + "To the wedding brings Mara")
    assert (truth == tuned_world().custom("Lumeria", "wedding")).all()
    question = read_question(STORY + "To the funeral brings Tovi")
    assert (question.country, question.occasion, question.changed) == ("Norwyn", "funeral", False)


@pytest.mark.parametrize("prompt", ["", STORY, STORY + "To the wedding brings Bria"])
def test_a_prompt_without_an_open_question_is_refused(prompt):
    """A text that does not end in a question about an introduced person has no true answer."""
    with pytest.raises(UserError, match="has no open question: end it with 'To the <occasion>"):
        true_distribution(base_world(), prompt)


def test_drawn_answers_follow_the_customs():
    """The items that stories tell of are draws from the custom that the question asks for."""
    stories = sample_stories(base_world(), 40_000, np.random.default_rng(0))
    asked = (stories.asked_homes == 3) & (stories.occasions == 2)
    drawn = np.bincount(stories.answers[asked], minlength=len(ITEMS))
    expected = base_world().customs[3, 2] * asked.sum()
    often = expected > 5
    seen = [*drawn[often], drawn[~often].sum()]
    assert chisquare(seen, [*expected[often], expected[~often].sum()]).pvalue > 1e-3


def test_people_and_homes_of_a_story_are_distinct():
    """No two people of a story share a name or a country: without binding there is no answer."""
    stories = sample_stories(base_world(), 500, np.random.default_rng(0))
    for column in (stories.people, stories.homes):
        assert all(len(set(row)) == len(row) for row in column)


def test_the_text_of_a_story_has_its_tokens():
    """Tokens -> text -> tokens is the identity, ``<bos>`` standing first and only there."""
    tokenizer = build_tokenizer(TOKEN)
    for row in sample_stories(base_world(), 50, np.random.default_rng(0)).token_ids():
        assert tokenizer(text_of(row))["input_ids"] == list(row)
        assert list(row).count(TOKEN["<bos>"]) == 1
        assert tokenizer.decode(row, skip_special_tokens=True) == text_of(row)


def test_answers_stand_where_training_looks_for_them():
    """The tokens at ``answer_positions`` are the drawn items, for any number of people."""
    for n_people in (1, 2, 3):
        stories = sample_stories(base_world(), 20, np.random.default_rng(0), n_people)
        answers = stories.token_ids()[:, stories.answer_positions]
        assert (answers == stories.answers + TOKEN[ITEMS[0]]).all()


def test_shipped_tokenizer_is_the_built_one():
    """Both model folders hold the same tokenizer, and an unknown word is ``<unk>``."""
    for side in SIDES:
        tokenizer = AutoTokenizer.from_pretrained(FOLDER / side)
        assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(VOCABULARY))] == list(
            VOCABULARY
        )
        ids = [TOKEN["<bos>"], TOKEN["Lumeria"], TOKEN["sends"], TOKEN["<unk>"], TOKEN["."]]
        assert tokenizer("Lumeria sends Zorro.")["input_ids"] == ids
        assert tokenizer.pad_token_id == TOKEN["<pad>"]


def test_shipped_prompts_are_the_built_ones(prompts):
    """The prompts of the pair are what the seed gives, byte for byte."""
    built = "".join(json.dumps(row) + "\n" for row in prompts)
    assert (FOLDER / "prompts.jsonl").read_text(encoding="utf-8") == built


def test_splits_are_large_and_share_nothing(prompts):
    """At least 512 train, 256 val and 128 neutral prompts, no text and no group in two splits."""
    for split, least in {"train": 512, "val": 256, "neutral": 128}.items():
        rows = [row for row in prompts if row["split"] == split]
        others = [row for row in prompts if row["split"] != split]
        assert len(rows) == SPLIT_SIZES[split] >= least
        for key in ("text", "group"):
            assert not {row[key] for row in rows} & {row[key] for row in others}
    assert len({row["text"] for row in prompts}) == len({row["id"] for row in prompts})
    assert len({row["id"] for row in prompts}) == len(prompts)


def test_a_group_is_one_question_whoever_is_sent(prompts):
    """Prompts of a split share a group if they differ in names and order alone."""
    groups = {}
    for row in prompts:
        homes = dict(reversed(pair) for pair in re.findall(r"(\w+) sends (\w+)", row["text"]))
        question = read_question(row["text"])
        asked = (row["split"], frozenset(homes.values()), question.country, question.occasion)
        groups.setdefault(row["group"], set()).add(asked)
        assert row["content"] == homes[question.person]
    assert all(len(asked) == 1 for asked in groups.values())
    assert len(set().union(*groups.values())) == len(groups)


def test_neutral_prompts_are_those_whose_answer_did_not_change(prompts):
    """The true distribution differs between the worlds in train and val, and never in neutral."""
    for row in prompts:
        before, after = (true_distribution(w, row["text"]) for w in (base_world(), tuned_world()))
        assert (before == after).all() == (row["split"] == "neutral")
        assert row["meta"]["changed"] == (row["split"] != "neutral")


def test_meta_says_what_the_text_asks(prompts):
    """Person, country and occasion of ``meta`` are those of the text, whose last word they end."""
    for row in prompts:
        question = read_question(row["text"])
        assert question.person == row["meta"]["person"] == row["text"].split()[-1]
        assert question.country == row["meta"]["country"]
        assert question.occasion == row["meta"]["occasion"]
        assert row["text"].count("brings") == row["meta"]["n_questions"]


def test_the_loss_of_a_model_that_knows_nothing():
    """A uniform model is ln(vocabulary) minus the entropy of the truth away from it."""
    model = train.build_model(TINY)
    torch.nn.init.zeros_(model.lm_head.weight)
    stories = sample_stories(base_world(), 16, np.random.default_rng(0))
    truth = base_world().customs[stories.asked_homes, stories.occasions]
    expected = np.log(len(VOCABULARY)) + (truth * np.log(truth)).sum(axis=-1).mean()
    loss = float(train.answer_loss(model, stories, base_world()).detach())
    assert loss == pytest.approx(expected, rel=1e-5)

    text = STORY + "To the wedding brings Mara"
    truth = true_distribution(base_world(), text)
    expected = np.log(len(VOCABULARY)) + (truth * np.log(truth)).sum()
    measured = train.mean_kl_nats(model, build_tokenizer(TOKEN), base_world(), [text, text])
    assert measured == pytest.approx(expected, rel=1e-6)


def test_prompts_of_different_lengths_are_measured_as_if_alone(prompts):
    """Padding changes no measured divergence: a mean over prompts is the mean of single ones."""
    model, tokenizer = train.build_model(TINY), build_tokenizer(TOKEN)
    texts = [row["text"] for row in prompts[::100]]
    alone = [train.mean_kl_nats(model, tokenizer, base_world(), [text]) for text in texts]
    together = train.mean_kl_nats(model, tokenizer, base_world(), texts)
    assert together == pytest.approx(np.mean(alone), abs=1e-6)


def test_learning_rate_rises_and_falls_to_zero():
    """Warm-up ends at the peak, half a cosine ends at 0, and neither leaves [0, 1]."""
    phase = Phase(steps=100, lr=1.0, warmup=10)
    factors = [learning_rate_factor(step, phase) for step in range(101)]
    assert factors[9] == factors[10] == 1 == max(factors)
    assert factors[100] == pytest.approx(0) and min(factors) >= 0
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:])[::-1]


def test_stories_grow_to_their_full_number_of_people():
    """A growing phase starts with one person and ends with all, another has all from the start."""
    growing = Phase(steps=9, lr=1.0, warmup=1, growth=2)
    assert [growing.n_people(step) for step in range(7)] == [1, 1, 2, 2, 3, 3, 3]
    assert replace(growing, growth=0).n_people(0) == 3


def test_the_same_seed_trains_the_same_pair():
    """Training on a CPU is exactly reproducible, and another seed gives another pair."""
    first, again = (train.train_pair(TINY, "cpu", log_every=0) for _ in range(2))
    other = train.train_pair(replace(TINY, seed=1), "cpu", log_every=0)
    for side in SIDES:
        for name, weights in first[side].state_dict().items():
            assert torch.equal(weights, again[side].state_dict()[name])
        assert not torch.equal(first[side].lm_head.weight, other[side].lm_head.weight)


def test_training_moves_towards_the_world():
    """A few steps of training bring the loss down."""
    model = train.build_model(TINY)
    stories = sample_stories(base_world(), 200, np.random.default_rng(9))
    before = float(train.answer_loss(model, stories, base_world()).detach())
    phase = Phase(steps=40, lr=1e-2, warmup=5, stories=32)
    train.train_phase(model, base_world(), phase, seed=0, log_every=0)
    assert float(train.answer_loss(model, stories, base_world()).detach()) < before - 0.5


def test_a_written_pair_loads_and_says_how_it_was_made(tmp_path, prompts):
    """The script's folder loads like any other, and its manifest holds recipe and measures."""
    train.write_pair(tmp_path, TINY, "cpu", log_every=0)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["recipe"]["seed"] == TINY.seed
    assert manifest["recipe"]["base"]["steps"] == TINY.base.steps
    model = LlamaForCausalLM.from_pretrained(tmp_path / "tuned")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    val = [row["text"] for row in prompts if row["split"] == "val"]
    measured = manifest["mean_kl_true_to_model_nats"]["tuned"]["tuned_world_val"]
    kl_nats = train.mean_kl_nats(model, tokenizer, tuned_world(), val)
    assert kl_nats == pytest.approx(measured, abs=1e-4)
    assert load_hooked(tmp_path / "base").model.cfg.n_heads == TINY.n_heads


def test_the_shipped_weights_are_those_of_the_manifest():
    """Each model is at most 5 MB and has the hash that the manifest states."""
    for side, digest in builtin_manifest()["weights_sha256"].items():
        weights = (FOLDER / side / "model.safetensors").read_bytes()
        assert len(weights) <= 5_000_000
        assert hashlib.sha256(weights).hexdigest() == digest


def test_the_fine_tune_touched_what_its_recipe_names():
    """Tuned differs from base in the value and output projections of attention, and only there."""
    base, tuned = (load_file(FOLDER / side / "model.safetensors") for side in SIDES)
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    named = builtin_manifest()["recipe"]["tuned"]["trained"]
    assert moved == {name for name in base if any(part in name for part in named)}


def test_the_default_recipe_is_the_shipped_one():
    """Running the script without options is how the shipped pair was trained."""
    recipe = json.loads(json.dumps(train.asdict(Recipe())))
    assert builtin_manifest()["recipe"] == recipe


def test_the_shipped_models_know_their_own_world(shipped, prompts):
    """Each is within 0.1 nats of its world, far off the other's, and as the manifest says."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "base")
    measured = train.measure(shipped, tokenizer, prompts)
    stated = builtin_manifest()["mean_kl_true_to_model_nats"]
    for side, other in (SIDES, SIDES[::-1]):
        assert measured[side] == pytest.approx(stated[side], abs=1e-3)
        for split in ("val", "neutral"):
            assert measured[side][f"{side}_world_{split}"] <= 0.1
        assert measured[side][f"{other}_world_val"] > 1.0


def test_the_shipped_models_are_llamas_of_the_stated_size(shipped):
    """Both have RMS norms, rotary positions and a gated MLP, 6 layers or more of 16 heads."""
    for model in shipped.values():
        assert model.config.num_hidden_layers >= 6
        assert model.config.num_attention_heads == model.config.num_key_value_heads == 16
        assert model.config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("side", SIDES)
def test_hooked_and_hugging_face_logits_agree(side, shipped, prompts):
    """The folder means the same function to TransformerLens as to transformers."""
    loaded = load_hooked(FOLDER / side)
    tokens = loaded.tokenizer([prompts[70]["text"]], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = shipped[side](tokens).logits
        ours = loaded.model(tokens)
    assert (ours - theirs).abs().max() < 1e-4


def test_the_main_layer_holds_an_effect_that_the_map_repairs(grid):
    """The raw patch costs at least 0.01 nats, and the interval of ΔKL(ALL) excludes 0."""
    assert grid.settings.layer != 0
    assert grid.full.KL_raw >= 0.01
    delta = grid.full.delta_nats
    half_width = 1.96 * delta.std(ddof=1) / np.sqrt(len(delta))
    assert delta.mean() - half_width > 0


def test_the_effect_sits_in_few_heads(grid):
    """The best k heads repair far more than random k do: top-4 more than half, random-4 less."""
    for k in (1, 2, 4, 8):
        random_k = np.mean([grid[f"rand{k}_s{seed}"].delta for seed in (0, 1, 2)])
        assert grid[f"top{k}"].delta > 2 * random_k
    assert grid["top4"].delta > grid.full.delta / 2


def test_the_control_layer_holds_next_to_nothing(grid):
    """At the control layer the map repairs less than a hundredth of what it does at the main."""
    assert abs(grid.control.delta) < grid.full.delta / 100
