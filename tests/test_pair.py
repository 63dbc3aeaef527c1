"""A pair is two models whose heads can be compared, and knows what made it."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from tiny import (
    TINY_HEADS,
    TINY_LAYERS,
    fine_tuned,
    grid_of,
    pair_of,
    random_prompts,
    tiny_model,
    word_tokenizer,
)

from rq4lens.config import Reading, config_from
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.models.load.lens import HookedTransformer
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import (
    ModelCard,
    ModelPair,
    PairMember,
    config_fingerprint,
    tokenizer_fingerprint,
)
from rq4lens.patching.maps.fitting import fit_maps


def resized(**changes):
    """A random model of another shape."""
    return HookedTransformer(replace(tiny_model().cfg, **changes)).eval()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layers": 2}, "n_layers is 3 in the base and 2 in the tuned"),
        ({"n_heads": 2, "rotary_dim": 8}, "n_heads is 4 in the base and 2 in the tuned"),
        ({"d_head": 4, "rotary_dim": 4}, "d_head is 8 in the base and 4 in the tuned"),
    ],
)
@pytest.mark.parametrize("keep_both", [True, False])
def test_models_of_different_shapes_are_refused(changes, said, keep_both):
    """Layers, heads and head width must match, also when models are loaded one after the other."""
    with pytest.raises(UserError, match=said):
        pair = pair_of(tiny_model(), resized(**changes), random_prompts(), keep_both=keep_both)
        fit_maps(pair, [0])


def test_a_vocabulary_of_its_own_is_no_obstacle(tiny_pair):
    """A tuned model with more words and other token ids is compared over its own vocabulary."""
    words = ("new", "words", *reversed(tuple(word_tokenizer().get_vocab())))
    base, tuned = tiny_pair.base.model, resized(d_vocab=14)
    members = [
        PairMember.of(LoadedModel.wrap(base, word_tokenizer())),
        PairMember.of(LoadedModel.wrap(tuned, word_tokenizer(words))),
    ]
    pair = ModelPair("vocabularies", *members, tiny_pair.prompts)
    assert pair.tokens("base", "val").token_ids != pair.tokens("tuned", "val").token_ids
    grid = grid_of(pair, fit_maps(pair, [1]), 1, ks=(1,))
    assert grid.full.KL_raw > 0


def test_a_pair_says_what_it_is(tiny_pair):
    """Layers and heads are those of the models; texts are tokenized by each model's own tokenizer.

    Tokens of a split come in the order of the split.
    """
    assert (tiny_pair.n_layers, tiny_pair.n_heads) == (TINY_LAYERS, TINY_HEADS)
    tokens = tiny_pair.tokens("base", "val")
    assert tokens.ids == tiny_pair.prompts.split("val").ids
    vocabulary = word_tokenizer().get_vocab()
    for row, text in zip(tokens.token_ids, tiny_pair.prompts.split("val").texts, strict=True):
        assert row == tuple(vocabulary[word] for word in text.split())


def test_a_prompt_beyond_the_context_is_refused(tiny_pair):
    """A prompt longer than the model can read is named, not cut or crashed on."""
    model = resized(n_ctx=8)
    pair = pair_of(model, model, tiny_pair.prompts)
    with pytest.raises(UserError, match=r"prompt '\w+' has 9 tokens"):
        fit_maps(pair, [0])


# --- fingerprints


def test_one_changed_weight_is_another_model():
    """The card's weights fingerprint follows the weights and nothing else."""
    base = tiny_model()
    loaded = LoadedModel.wrap(base, word_tokenizer())
    again = LoadedModel.wrap(tiny_model(), word_tokenizer(), source="elsewhere")
    other = tiny_model()
    with torch.no_grad():
        other.blocks[2].mlp.W_out[3, 4] += 1e-6
    changed = LoadedModel.wrap(other, word_tokenizer())
    cards = [ModelCard.of(each) for each in (loaded, again, changed)]
    assert cards[0].weights_fingerprint == cards[1].weights_fingerprint
    assert cards[0].weights_fingerprint != cards[2].weights_fingerprint
    assert cards[0].config_fingerprint == cards[1].config_fingerprint == cards[2].config_fingerprint


@pytest.mark.parametrize(
    "changes", [{"rotary_base": 500.0}, {"eps": 1e-3}, {"act_fn": "relu"}, {"attn_scale": 1.0}]
)
def test_the_same_weights_under_another_configuration_are_another_model(changes):
    """What decides the function beside the weights is in the configuration's fingerprint."""
    assert config_fingerprint(tiny_model()) != config_fingerprint(resized(**changes))


def test_the_place_of_a_model_does_not_matter():
    """Device, name and seed are no part of the configuration's fingerprint."""
    moved = tiny_model()
    moved.cfg.device, moved.cfg.model_name, moved.cfg.seed = "cuda", "other", 3
    assert config_fingerprint(moved) == config_fingerprint(tiny_model())


def test_another_word_order_is_another_tokenizer():
    """The tokenizer's fingerprint is of its vocabulary, special tokens and chat template."""
    one, same, other, template = (word_tokenizer(("a", "b")) for _ in range(4))
    other = word_tokenizer(("b", "a"))
    template.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(same)
    assert len({tokenizer_fingerprint(each) for each in (one, other, template)}) == 3


def test_another_decision_rule_is_another_token_fingerprint():
    """Cutting the same texts elsewhere gives other tokens, and so other results."""
    prompts, tokenizer = random_prompts(), word_tokenizer()
    tokenizer.add_special_tokens({"eos_token": prompts.split("val").texts[0].split()[-1]})
    loaded = LoadedModel.wrap(tiny_model(), tokenizer)
    fingerprints = [
        ModelPair(
            "x",
            PairMember.of(loaded),
            PairMember.of(loaded),
            prompts,
            reading=Reading(decision_rule=rule),
        ).token_fingerprint("base", "val")
        for rule in ("last", "last_content")
    ]
    assert fingerprints[0] != fingerprints[1]


# --- one after the other


class Shelf:
    """Loads models on demand and counts how many are alive."""

    def __init__(self):
        self.loads = []
        self.alive = weakref.WeakSet()
        self.most_alive = 0

    def member(self, name, make):
        """A member that is loaded when it is first used."""

        def load():
            model = make()
            self.loads.append(name)
            self.alive.add(model)
            gc.collect()
            self.most_alive = max(self.most_alive, len(self.alive))
            return LoadedModel.wrap(model, word_tokenizer(), source=f"{name} in memory")

        return PairMember(load)


def shelf_pair(keep_both):
    shelf = Shelf()
    members = [
        shelf.member("base", tiny_model),
        shelf.member("tuned", lambda: fine_tuned(tiny_model())),
    ]
    return shelf, ModelPair("shelf", *members, random_prompts(), keep_both=keep_both)


def test_models_that_may_not_stay_together_never_do(tiny_grid):
    """With `keep_both=False` one model is alive at a time, and no number changes."""
    shelf, pair = shelf_pair(keep_both=False)
    grid = grid_of(pair, fit_maps(pair, [1, 0]), 1, 0, 0.3, ks=(1, 2, 4))
    assert shelf.most_alive == 1
    for name, condition in tiny_grid.conditions.items():
        assert grid[name].KL_raw == pytest.approx(condition.KL_raw, abs=1e-9)
        assert grid[name].KL_mapped == pytest.approx(condition.KL_mapped, abs=1e-9)


def test_a_run_loads_each_model_once_even_when_they_may_not_stay():
    """The stages of a run ask for all of base before any of tuned."""
    shelf, pair = shelf_pair(keep_both=False)
    bench = Bench(config_from({"layer": 1, "control_layer": 0}))
    bench.pair = pair
    experiment = bench.measurer([1, 0]).experiment
    grid_of(pair, experiment.maps, 1, 0, ks=(1, 2), experiment=experiment)
    assert shelf.loads == ["base", "tuned"]


def test_models_that_may_stay_are_loaded_once():
    """With `keep_both=True` each model is loaded once, whatever is done with the pair."""
    shelf, pair = shelf_pair(keep_both=True)
    grid_of(pair, fit_maps(pair, [1, 0]), 1, 0, 0.3, ks=(1, 2))
    assert sorted(shelf.loads) == ["base", "tuned"]


def test_what_is_known_of_a_model_stays_after_its_release():
    """A released member still has its card, and is loaded again when it is used."""
    shelf, pair = shelf_pair(keep_both=True)
    card = pair.base.card
    pair.base.release()
    assert pair.base.card == card
    assert shelf.loads.count("base") == 1
    assert pair.base.model.cfg.n_layers == TINY_LAYERS
    assert shelf.loads.count("base") == 2


def test_releasing_what_was_never_loaded_loads_nothing():
    """Letting go costs nothing."""
    shelf = Shelf()
    shelf.member("base", tiny_model).release()
    assert shelf.loads == []
