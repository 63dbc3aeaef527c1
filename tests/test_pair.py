"""A pair is two models whose heads can be compared, and knows what made it."""

import gc
import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

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

from rq4lens.config import Effort, Patching, Reading, RunConfig, config_from
from rq4lens.errors import UserError
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.run import run
from rq4lens.jobs.sweep import sweep_layers
from rq4lens.models.catalog import load_pair
from rq4lens.models.load.lens import HookedTransformer
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import (
    ModelCard,
    ModelPair,
    PairMember,
    config_fingerprint,
    tokenizer_fingerprint,
)
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.models.prompts.record import Prompt
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
    base, tuned = tiny_pair.base.model, resized(d_vocab=14, d_vocab_out=14)
    members = [
        PairMember.of(base, word_tokenizer()),
        PairMember.of(tuned, word_tokenizer(words)),
    ]
    pair = ModelPair(*members, tiny_pair.prompts)
    assert pair.tokens("base", "val").token_ids != pair.tokens("tuned", "val").token_ids
    grid = grid_of(pair, fit_maps(pair, [1]), 1, ks=(1,))
    assert grid.full.KL_raw > 0
    # Every word of base is one of tuned; the two new words are left out.
    assert grid.compared.left_out_base_pct == pytest.approx(0, abs=1e-5)
    assert grid.compared.left_out_tuned_pct > 0


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
        ModelPair(loaded, loaded, prompts, reading=Reading(decision_rule=rule))
        .tokens("base", "val")
        .fingerprint
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
    return shelf, ModelPair(*members, random_prompts(), keep_both=keep_both)


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
    # Then each direction of transfer asks for its own model, for the fixed sets and the top ones.
    assert shelf.loads[:3] == ["base", "tuned", "base"]
    assert len(shelf.loads) <= 9


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


# --- in memory


def with_tokenizer(model):
    """A model as TransformerLens gives it, its tokenizer with it."""
    model.tokenizer = word_tokenizer()
    return model


def as_dicts(prompts):
    return [
        {"id": each.id, "text": each.text, "split": each.split}
        | ({} if each.group is None else {"group": each.group})
        for each in prompts
    ]


@pytest.mark.parametrize("form", [lambda p: p, as_dicts, PromptSet.to_dataframe])
@pytest.mark.parametrize("make", [ModelPair, load_pair])
def test_two_models_in_memory_are_a_pair(tiny_grid, tiny_pair, make, form):
    """Models as they are, and prompts in whatever holds them, give the numbers of the pair."""
    models = [with_tokenizer(each.model) for each in (tiny_pair.base, tiny_pair.tuned)]
    pair = make(*models, form(tiny_pair.prompts))
    assert pair.base.model is tiny_pair.base.model
    assert pair.prompts == tiny_pair.prompts
    grid = grid_of(pair, fit_maps(pair, 1), 1, ks=(1, 2, 4))
    assert grid.full.KL_raw == pytest.approx(tiny_grid.full.KL_raw, abs=1e-9)
    assert grid.full.KL_mapped == pytest.approx(tiny_grid.full.KL_mapped, abs=1e-9)


def test_a_tokenizer_may_be_given(tiny_pair):
    """Models without a tokenizer take the one beside them."""
    models = tiny_model(), fine_tuned(tiny_model())
    with pytest.raises(UserError, match=r"has no tokenizer: give one with tokenizer=\.\.\."):
        ModelPair(*models, tiny_pair.prompts)
    pair = ModelPair(*models, tiny_pair.prompts, tokenizer=word_tokenizer())
    assert pair.tokens("base", "val").token_ids == tiny_pair.tokens("base", "val").token_ids


def test_chats_survive_a_table():
    """A DataFrame of prompts is read as the prompts it was made of; empty cells say nothing."""
    prompts = PromptSet.of(
        [
            {"id": "a", "split": "train", "messages": [{"role": "user", "content": "apple"}]},
            {"id": "b", "split": "val", "text": "bread", "offset": 0, "meta": {"of": "x"}},
            {"id": "c", "split": "val", "text": "fig", "answer": "f", "content": "fruit"},
        ]
    )
    assert PromptSet.of(prompts.to_dataframe()) == prompts


def test_misaligned_prompts_are_left_out_in_memory_too(tiny_pair):
    """`exclude_misaligned` is a matter of the pair, wherever its models come from."""
    prompts = PromptSet((*tiny_pair.prompts, Prompt("odd", "nonsense apple", "val")))
    other = word_tokenizer(("<unk>", *tuple(word_tokenizer().get_vocab())))
    model = resized(d_vocab=13, d_vocab_out=13)
    members = PairMember.of(tiny_pair.base.model, word_tokenizer()), PairMember.of(model, other)
    pair = ModelPair(*members, prompts, reading=Reading(exclude_misaligned=True))
    assert set(pair.audit().misaligned) == {each.id for each in pair.excluded}
    assert len(pair.prompts) + len(pair.excluded) == len(prompts)


SAID = {
    "rq.ModelPair('mine', model, prompts)": "a str is no model of a pair: .*rq.load_pair",
    "rq.ModelPair(model, None, prompts)": "a NoneType is no model",
    "rq.ModelPair(model, model, 3)": "prompts cannot be a int: give .* a DataFrame",
    "rq.load_pair(model, model)": r"rq.ModelPair\(base_model, tuned_model, prompts\)",
    "rq.load_pair(base=model, prompts=prompts)": "rq.ModelPair",
    "rq.PairMember(model)": r"write rq.PairMember.of\(model\)",
    "rq.fit_maps(pair, 'ab')": "'a' is no layer: give its number",
    "rq.run('etiquette', 'runs/x')": "takes no str: give rq.preset",
    "rq.run(rq.RunConfig(), 'runs/x', pair=model)": r"run\(pair=...\) takes no HookedTr.*ModelPair",
    "rq.RunConfig(layer=1)": r"no part layer='1': write patching=rq.Patching\(layer=1\)",
    "rq.RunConfig(patching=rq.Place())": r"no part patching=.*rq.Patching\(layer=1\)",
    "rq.plant(pair)": "takes no ModelPair: give pair.base.model",
    "rq.prepare(model, {})": "takes no HookedTransformer: give rq.load_pair",
    "rq.run_grid(pair, 1, 1)": "takes no int: give rq.fit_maps",
    "rq.run_grid(pair, {}, 1, metric=len)": "takes no .*: give rq.Metric.* or 'answer_logprob'",
    "rq.run_grid(pair, {}, 1, metric='banana')": "metric = 'banana' is not allowed",
    "rq.measure_grid(pair, {}, 1)": r"takes no ModelPair: give rq.prepare\(pair, maps\)",
    "rq.analyse(pair)": r"takes no ModelPair: give rq.run_grid\(",
    "rq.compare_layers(pair)": r"takes no ModelPair: give \{1: rq.run_grid\(",
    "rq.head_card(pair, (1, 0))": r"takes no tuple: give rq.Head\(1, 0\) or 'L1H0'",
    "rq.head_card(model, 'L1H0')": "takes no HookedTransformer: give rq.read_run.* or rq.load_pair",
    "rq.plant(model, turned=[3])": "'3' is no head",
    "grid.ranking_by('tobase')": "unknown score 'tobase': did you mean 'to_base'",
    "grid.ranking_by('banana')": "unknown score 'banana': allowed are delta, drop_pct, .*to_tuned",
    "rq.position_map(model)": "takes no HookedTransformer: give rq.read_run",
    "rq.HeadSet.read(0.5, 4, 1)": "'0.5' is no head set: give heads as '0,2'",
    "rq.HeadSet.read([0, None], 4, 1)": "is no head set",
}
"""What somebody may write first, and what is then said."""

ATTEMPTS = """
import rq4lens as rq
from tiny import random_prompts, tiny_model, word_tokenizer
model, prompts = tiny_model(), random_prompts()
model.tokenizer = word_tokenizer()
pair = rq.ModelPair(model, model, prompts)
grid = rq.run_grid(pair, rq.fit_maps(pair, 1), 1, settings=rq.Patching(k=(1,)))
for attempt in {attempts}:
    try:
        eval(attempt)
    except rq.UserError as problem:
        print(problem)
"""


CHECKED = """
from inspect import isfunction, signature
import rq4lens as rq
from rq4lens.errors import WRITTEN
assert rq.run_grid is rq.run_grid
asked = set()
for function in filter(isfunction, (getattr(rq, name) for name in rq.__all__)):
    for name, parameter in signature(function).parameters.items():
        kinds = {*str(parameter.annotation).split(" | ")} & {*WRITTEN}
        asked |= kinds
        if kinds:
            try:
                function(**{name: object()})
            except rq.UserError as problem:
                print(problem)
assert asked == {*WRITTEN}, {*WRITTEN} - asked
"""


BETWEEN = "and now the types"


@pytest.fixture(scope="module")
def printed():
    """What both scripts print, in an interpreter of their own: pytest would check all types before.

    Each is a list of lines.
    """
    script = f"{ATTEMPTS.format(attempts=list(SAID))}\nprint({BETWEEN!r})\n{CHECKED}"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    return [part.strip().splitlines() for part in done.stdout.split(BETWEEN)]


def test_what_is_no_pair_is_said_in_python(printed):
    """The sentence names what to write in Python, and no flag."""
    lines, _ = printed
    for sentence, said in zip(lines, SAID.values(), strict=True):
        assert re.search(said, sentence)
        assert re.search(r"--\w", sentence) is None


def test_every_public_function_checks_its_types(printed):
    """Each annotation can be looked up, and each type of the list is one that somebody asks for."""
    _, lines = printed
    assert len(lines) > 30
    assert all(re.fullmatch(r"\w+\(\w+=...\) takes no object: give .*\.", each) for each in lines)


CONFIG = RunConfig(
    patching=Patching(layer=1, control_layer=0, k=(1, 2)),
    effort=Effort(analysis="grid", resamples=100),
)


@pytest.mark.usefixtures("no_pages")
def test_a_run_takes_a_pair_in_memory(tiny_pair, tiny_grid, tmp_path):
    """The whole job on two models in memory; its folder is named by a string."""
    done = run(CONFIG, str(tmp_path / "mine"), pair=tiny_pair)
    assert done.grid["head1"].KL_raw == pytest.approx(tiny_grid["head1"].KL_raw, abs=1e-9)
    assert done.run["config"]["pair"] == tiny_pair.name
    again = run(CONFIG, tmp_path / "mine", pair=tiny_pair)
    assert again.run["store"]["computed"] == 0
    base = tiny_pair.base.model
    other = pair_of(base, fine_tuned(base, size=0.2), tiny_pair.prompts)
    with pytest.raises(UserError, match="another tuned model"):
        run(CONFIG, tmp_path / "mine", pair=other)
    assert len(sweep_layers(CONFIG, layers=1, pair=tiny_pair).grids) == 1
