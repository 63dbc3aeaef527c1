"""Transfer: its laws, written-down programs, plain Hugging Face models, and a real pair."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_on_disk import write_pair
from tiny import (
    MAIN,
    TINY_HEADS,
    TINY_LAYERS,
    WORDS,
    grid_of,
    pair_of,
    prepared,
    random_prompts,
    tiny_model,
    word_tokenizer,
)
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoModelForCausalLM

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.effects.table import effective_number, gap_of, records
from rq4lens.analysis.rankings.compared import rank_heads
from rq4lens.heads import HeadSet
from rq4lens.models.catalog import load_pair
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import ModelPair, PairMember
from rq4lens.models.prompts.prompt_set import Prompt, PromptSet
from rq4lens.patching.experiment import prepare
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.metrics import Metric
from rq4lens.patching.patch import (
    BASE,
    CONSTANT,
    MAPPED,
    OTHERS,
    OUTPUT,
    OWN,
    RAW,
    SHIFTED,
    TUNED,
    Patch,
)

LAST = TINY_LAYERS - 1
TRANSFERS = ("to_base_pct", "to_tuned_pct")


def gap(grid):
    return gap_of(grid)


def table(grid):
    """The records of the grid, by condition."""
    return {record.cond: record for record in records(grid)}


def small_grid(pair, layer=MAIN, **settings):
    return grid_of(pair, fit_maps(pair, [layer]), layer, ks=(1, 2), **settings)


# --- laws -----------------------------------------------------------------------------------------


def test_nothing_carries_nothing(tiny_grid):
    """`NONE` leaves the very gap, and its transfer is 0 both ways."""
    found = table(tiny_grid)["none"]
    assert [getattr(found, name).value for name in TRANSFERS] == [0.0, 0.0]
    assert found.flipped_pct.value == 0
    assert found.as_base_pct.value == 0


def other_heads_of(base, heads, layer=LAST, size=1.0):
    """A copy whose heads read something else; what they write goes through the same `W_O`."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in ("W_Q", "W_K", "W_V", "b_V"):
            weight = getattr(tuned.blocks[layer].attn, name)
            for head in heads:
                new = torch.randn(weight[head].shape, generator=generator)
                weight[head] += size * 0.3 * new.to(weight)
    return tuned


@pytest.mark.parametrize("engine", ["suffix", "hooks"])
@pytest.mark.parametrize("heads", [(2,), (0, 3)])
def test_the_heads_that_differ_carry_everything_and_no_other_head_anything(heads, engine):
    """Models that differ in heads `S` of the last layer alone: `S` carries 100%, the rest 0%."""
    base = tiny_model()
    pair = pair_of(base, other_heads_of(base, heads), random_prompts())
    experiment = prepared(pair, fit_maps(pair, [LAST]), engine=engine)
    measured = MeasuredSets.of(experiment, LAST, 1.0)
    others = [(head,) for head in range(TINY_HEADS) if head not in heads]
    for direction in ("to_base", "to_tuned"):
        before, left = measured.transfer(direction).kl_nats([heads, *others])
        carried = 100 * (1 - left.mean(-1) / before.mean(-1))
        assert carried[0] == pytest.approx(100, abs=1e-4)
        assert carried[1:] == pytest.approx(0, abs=1e-4)


def test_swapping_the_models_swaps_the_columns(tiny_pair):
    """What base is to tuned, tuned is to base: gaps and both directions change places."""
    swapped = pair_of(tiny_pair.tuned.model, tiny_pair.base.model, tiny_pair.prompts)
    one, other = (small_grid(pair) for pair in (tiny_pair, swapped))
    rows, back = table(one), table(other)
    for name in ("full", "none", *(f"head{head}" for head in range(TINY_HEADS))):
        pairs = [("to_base_pct", "to_tuned_pct"), ("gap_base_nats", "gap_tuned_nats")]
        for here, there in (*pairs, *(pair[::-1] for pair in pairs)):
            found, expected = getattr(rows[name], here), getattr(back[name], there)
            assert found.value == pytest.approx(expected.value, rel=1e-4, abs=1e-4)
    here, there = gap(one), gap(other)
    assert here.every_layer_to_base_pct.value == pytest.approx(
        there.every_layer_to_tuned_pct.value, abs=1e-3
    )
    assert here.answers_differ_pct.value == pytest.approx(there.answers_differ_pct.value)


@pytest.mark.parametrize("direction", ("to_base", "to_tuned"))
def test_a_ranking_by_a_direction_is_by_that_one_wherever_it_is_asked(tiny_pair, direction):
    """Of head sets that are measured in the other direction, too."""
    measured = MeasuredSets.of(prepare(tiny_pair, fit_maps(tiny_pair, MAIN)), MAIN, 0.3)
    expected = rank_heads(direction, measured)
    for other in ("to_base", "to_tuned"):
        assert rank_heads(direction, measured.transfer(other)) == expected


def test_identical_models_have_no_gap_to_share(tiny_pair):
    """Transfer is undefined, with the reason, and no answer differs."""
    base = tiny_pair.base.model
    grid = small_grid(pair_of(base, copy.deepcopy(base), tiny_pair.prompts))
    assert "answer alike" in gap(grid).undefined_because
    for record in table(grid).values():
        assert record.to_base_pct.value is None
        assert record.to_base_pct.reason
    assert table(grid)["full"].flipped_pct.value == 0


@torch.no_grad()
def test_all_heads_of_all_layers_are_each_layers_own_clean_activations(tiny_pair):
    """`every_layer` is what hooks at every layer at once give; with one layer it is that layer."""
    grid = small_grid(tiny_pair)
    base, tuned = (tiny_pair.member(side).model for side in ("base", "tuned"))
    for row, number in zip(tiny_pair.tokens("tuned", "val").token_ids, range(4), strict=False):
        tokens = torch.tensor([row])
        p = base(tokens)[0, -1].log_softmax(-1)
        z = base.run_with_cache(tokens)[1]

        def put(value, hook, z=z):
            value[:, -1] = z[hook.name][:, -1]
            return value

        hooks = [(f"blocks.{layer}.attn.hook_z", put) for layer in range(TINY_LAYERS)]
        q = tuned.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1].log_softmax(-1)
        expected = float((p.exp() * (p - q)).sum())
        assert grid.every_layer.left_nats("to_base")[number] == pytest.approx(expected, abs=1e-5)


def test_answers_that_change_and_go_back_are_counted(tiny_grid):
    """`flipped` is a new most likely token; `as_base` is base's, where the two differed."""
    own = tiny_grid["none"].transfer.answer_is
    differ = own < OWN + OTHERS
    rows = table(tiny_grid)
    for name in ("full", "none", "head0", "head2", "top2"):
        row, answers = rows[name], tiny_grid[name].transfer.answer_is
        assert row.flipped_pct.value == pytest.approx(100 * np.isin(answers, [0, 2]).mean())
        back = np.isin(answers[differ], [2, 3])
        assert row.as_base_pct.value == pytest.approx(100 * back.mean())


def test_a_few_prompts_that_carry_everything_are_counted_as_few():
    """`(Σ d)² / Σ d²`: equal effects count each, one large effect counts once."""
    assert effective_number(np.full(40, 0.2)) == pytest.approx(40)
    assert effective_number(np.r_[1.0, np.zeros(39)]) == pytest.approx(1)
    assert effective_number(np.zeros(40)) is None


# --- vocabularies that differ ---------------------------------------------------------------------

OTHER_WORDS = (*reversed(WORDS[:-1]), "melon")
"""The same words in another order, but one that base does not know; base knows one more."""


def with_other_words(likely: float) -> ModelPair:
    """A pair of different vocabularies; `likely` is the bias of the words of one model alone."""
    base = tiny_model()
    tuned = other_heads_of(base, (1, 2), layer=MAIN)
    with torch.no_grad():
        ids = [WORDS.index(word) for word in OTHER_WORDS[:-1]] + [len(WORDS) - 1]
        for model in (base, tuned):
            model.unembed.b_U[-1] += likely
        for name, axis in (("embed.W_E", 0), ("unembed.W_U", 1), ("unembed.b_U", 0)):
            weight = tuned.get_parameter(name)
            weight.copy_(weight.index_select(axis, torch.tensor(ids)))
    prompts = random_prompts(WORDS[:-1])
    members = [
        PairMember.of(LoadedModel.wrap(model, word_tokenizer(words)))
        for model, words in ((base, WORDS), (tuned, OTHER_WORDS))
    ]
    return ModelPair(*members, prompts, name="other words")


def test_vocabularies_that_differ_are_compared_over_the_words_of_both():
    """By the same string, renormalised; the probability of the rest is said."""
    pair = with_other_words(likely=-8.0)
    grid, n_shared = small_grid(pair), len(WORDS) - 1
    same = torch.tensor([OTHER_WORDS.index(word) for word in WORDS[:n_shared]])
    gaps, left_out = [], []
    for own, other in zip(
        pair.tokens("base", "val").token_ids, pair.tokens("tuned", "val").token_ids, strict=True
    ):
        p = pair.base.model(torch.tensor([own]))[0, -1].double().softmax(-1)
        q = pair.tuned.model(torch.tensor([other]))[0, -1].double().softmax(-1)
        left_out.append([float(p[n_shared]), float(q[n_shared])])
        p, q = p[:n_shared] / p[:n_shared].sum(), q[same] / q[same].sum()
        gaps.append([float((p * (p / q).log()).sum()), float((q * (q / p).log()).sum())])
    found = grid["none"].transfer
    np.testing.assert_allclose(found.left_nats("to_base"), np.array(gaps)[:, 0], atol=1e-5)
    np.testing.assert_allclose(found.left_nats("to_tuned"), np.array(gaps)[:, 1], atol=1e-5)
    base_pct, tuned_pct = 100 * np.mean(left_out, 0)
    assert grid.compared.left_out_base_pct == pytest.approx(base_pct, rel=1e-3)
    assert grid.compared.left_out_tuned_pct == pytest.approx(tuned_pct, rel=1e-3)
    assert gap(grid).undefined_because is None
    assert table(grid)["full"].to_base_pct.value is not None


def test_too_much_probability_on_words_of_one_model_alone_is_no_comparison():
    """Above 5% nothing is a share of the gap, and the reason names the number."""
    grid = small_grid(with_other_words(likely=2.0))
    assert max(grid.compared.left_out_base_pct, grid.compared.left_out_tuned_pct) > 5
    assert "only one of their vocabularies has" in gap(grid).undefined_because
    assert table(grid)["full"].to_base_pct.value is None


# --- two programs ---------------------------------------------------------------------------------

LETTERS, LENGTH = ("a", "b", "c", "d"), 6
N_LAYERS, N_HEADS, WIDTH = 2, 3, len(LETTERS) + LENGTH
PROGRAM = (("previous", "first", "everywhere"), ("same letter", "previous", "itself"))
"""What each head of each layer selects; what it finds there it writes where it alone writes."""
READS_A_HEAD = (1, 2)
"""This head reads what the last head of layer 0 wrote; all others read letters."""


@cache
def selector(name: str) -> torch.Tensor:
    """Queries by keys, over letters and then positions."""
    matrix, positions = torch.zeros(WIDTH, WIDTH), range(LENGTH)
    letter = len(LETTERS)
    for at in positions:
        chosen = {"previous": max(at - 1, 0), "first": 0, "itself": at}.get(name)
        if chosen is not None:
            matrix[letter + at, letter + chosen] = 1
    if name == "same letter":
        matrix[:letter, :letter] = torch.eye(letter)
    return matrix


def place_of(layer: int, head: int) -> slice:
    start = WIDTH + len(LETTERS) * (N_HEADS * layer + head)
    return slice(start, start + len(LETTERS))


def compiled(program) -> HookedTransformer:
    """The program as weights: one-hot letters and positions, a place for what each head finds."""
    cfg = HookedTransformerConfig(
        n_layers=N_LAYERS,
        d_model=WIDTH + len(LETTERS) * N_LAYERS * N_HEADS,
        n_ctx=LENGTH,
        d_head=WIDTH,
        n_heads=N_HEADS,
        d_vocab=len(LETTERS),
        attn_only=True,
        normalization_type=None,
        device="cpu",
        dtype=torch.float64,
    )
    model = HookedTransformer(cfg).eval()
    n = len(LETTERS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:, :n] = torch.eye(n)
        model.pos_embed.W_pos[:, n:WIDTH] = torch.eye(LENGTH)
        for layer, head in itertools.product(range(N_LAYERS), range(N_HEADS)):
            attention, own = model.blocks[layer].attn, place_of(layer, head)
            attention.W_Q[head, :WIDTH] = 300 * selector(program[layer][head])
            attention.W_K[head, :WIDTH] = torch.eye(WIDTH)
            read = place_of(0, N_HEADS - 1) if (layer, head) == READS_A_HEAD else slice(0, n)
            attention.W_V[head, read, :n] = torch.eye(n)
            attention.W_O[head, :n, own] = torch.eye(n)
            # Every head speaks for another letter than the one it found.
            turned = torch.eye(n).roll(N_HEADS * layer + head, 1)
            model.unembed.W_U[own] = (1 + 0.3 * head + 0.2 * layer) * turned
    return model


def spelled() -> PromptSet:
    rng = np.random.default_rng(0)
    words = list(itertools.product(LETTERS, repeat=LENGTH))
    chosen = [" ".join(words[at]) for at in rng.permutation(len(words))[:60]]
    splits = ["train"] * 40 + ["val"] * 20
    rows = enumerate(zip(chosen, splits, strict=True))
    return PromptSet(tuple(Prompt(f"p{at}", text, split) for at, (text, split) in rows))


@pytest.mark.parametrize(
    "named", [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)], ids="L{0[0]}H{0[1]}".format
)
def test_all_transfer_is_on_the_head_whose_selector_differs(named):
    """Two programs that differ in what one head selects: it carries 100%, every other head 0%."""
    layer, head = named
    other = [list(row) for row in PROGRAM]
    other[layer][head] = "itself" if PROGRAM[layer][head] in {"previous", "first"} else "first"
    pair = pair_of(compiled(PROGRAM), compiled(other), spelled(), LETTERS)
    experiment = prepared(pair, fit_maps(pair, range(N_LAYERS)))
    for at, direction in itertools.product(range(N_LAYERS), ("to_base", "to_tuned")):
        sets = MeasuredSets.of(experiment, at, 1.0).transfer(direction)
        before, left = sets.kl_nats(sets.singles)
        assert before.mean() > 0.01
        carried = 100 * (1 - left.mean(-1) / before.mean(-1))
        expected = [100.0 * ((at, each) == named) for each in range(N_HEADS)]
        assert carried == pytest.approx(expected, abs=1e-4)


# --- plain Hugging Face models --------------------------------------------------------------------


class Plain:
    """A pair of Hugging Face models, patched before the output projection by plain hooks."""

    def __init__(self, settings: dict[str, Any], pair: ModelPair) -> None:
        self.models = {
            side: AutoModelForCausalLM.from_pretrained(settings[side], dtype=torch.float64).eval()
            for side in ("base", "tuned")
        }
        config = self.models["base"].config
        self.n_heads, self.d_head = config.num_attention_heads, config.head_dim
        self.prompts = {split: pair.tokens("base", split).token_ids for split in ("train", "val")}

    def projection(self, side, layer):
        """The output projection, whose input the heads are."""
        return self.models[side].model.layers[layer].self_attn.o_proj

    @torch.no_grad()
    def run(self, side, tokens, patches=()):
        """Log-probabilities at the last token, and every layer's heads there.

        Patches are functions of the heads of a layer, by layer.
        """
        seen, handles = {}, []
        for layer in range(len(self.models[side].model.layers)):

            def hook(_module, given, layer=layer):
                (z,) = given
                heads = z[0, -1].view(self.n_heads, self.d_head)
                seen[layer] = heads.clone()
                if layer in dict(patches):
                    heads.copy_(dict(patches)[layer](seen[layer]))

            handles.append(self.projection(side, layer).register_forward_pre_hook(hook))
        logits = self.models[side](torch.tensor([tokens])).logits[0, -1]
        for handle in handles:
            handle.remove()
        return logits.log_softmax(-1), seen

    def means(self, side, layer):
        """The heads' mean over train prompts."""
        return torch.stack([self.run(side, t)[1][layer] for t in self.prompts["train"]]).mean(0)

    def put(self, heads, source):
        """A patch of some heads."""

        def patched(z):
            z = z.clone()
            z[list(heads)] = source[list(heads)]
            return z

        return patched


def kl(p, q):
    return float((p.exp() * (p - q)).sum())


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    settings = write_pair(tmp_path_factory.mktemp("pair"))
    pair = load_pair(**{name: settings[name] for name in ("base", "tuned", "prompts")})
    return pair, Plain(settings, pair)


SETS = ((2,), (0, 5), tuple(range(8)))


def test_transfer_is_that_of_plain_models(on_disk):
    """Both directions, some heads, a layer and every layer: hooks on Hugging Face models agree."""
    pair, plain = on_disk
    layer = MAIN
    grid = grid_of(pair, fit_maps(pair, [layer]), layer, ks=(1,))
    measured = MeasuredSets.of(prepared(pair, fit_maps(pair, [layer])), layer, 1.0)
    for here, there, direction in (("base", "tuned", "to_tuned"), ("tuned", "base", "to_base")):
        before, left = measured.transfer(direction).kl_nats(SETS)
        for number, tokens in enumerate(plain.prompts["val"]):
            own, _ = plain.run(here, tokens)
            target, z = plain.run(there, tokens)
            assert before[0, number] == pytest.approx(kl(target, own), abs=1e-5)
            for at, heads in enumerate(SETS):
                found, _ = plain.run(here, tokens, {layer: plain.put(heads, z[layer])})
                assert left[at, number] == pytest.approx(kl(target, found), abs=1e-5)
            every = {each: plain.put(range(8), z[each]) for each in z}
            found, _ = plain.run(here, tokens, every)
            expected = grid.every_layer.left_nats(direction)[number]
            assert expected == pytest.approx(kl(target, found), abs=1e-5)


def test_the_rungs_of_the_ladder_are_those_of_plain_models(on_disk):
    """Constant, base, shifted and base's own output: `KL(patched || tuned)` by plain hooks."""
    pair, plain = on_disk
    layer = MAIN
    measured = MeasuredSets.of(prepared(pair, fit_maps(pair, [layer])), layer, 1.0)
    mean = {side: plain.means(side, layer) for side in ("base", "tuned")}
    W_O = {
        side: plain.projection(side, layer).weight.T.view(plain.n_heads, plain.d_head, -1)
        for side in ("base", "tuned")
    }
    found = {each: measured.of_source(each, SETS) for each in ("base", CONSTANT, SHIFTED, OUTPUT)}
    for number, tokens in enumerate(plain.prompts["val"]):
        clean, _ = plain.run("tuned", tokens)
        z_base = plain.run("base", tokens)[1][layer]
        sources = {"base": z_base, CONSTANT: mean["tuned"]}
        sources[SHIFTED] = z_base - mean["base"] + mean["tuned"]
        for at, heads in enumerate(SETS):
            for name, source in sources.items():
                patched, _ = plain.run("tuned", tokens, {layer: plain.put(heads, source)})
                assert found[name][at, number] == pytest.approx(kl(patched, clean), abs=1e-5)
            written = torch.einsum(
                "hd,hdm->m", z_base[list(heads)], W_O["base"][list(heads)]
            ) - torch.einsum("hd,hdm->m", z_base[list(heads)], W_O["tuned"][list(heads)])

            def add(_module, _given, out, written=written):
                out[0, -1] += written
                return out

            handle = plain.projection("tuned", layer).register_forward_hook(add)
            patched, _ = plain.run("tuned", tokens, {layer: plain.put(heads, z_base)})
            handle.remove()
            assert found[OUTPUT][at, number] == pytest.approx(kl(patched, clean), abs=1e-5)


# --- a real pair ----------------------------------------------------------------------------------

REAL = Path(__file__).parent.parent.parent / "shared" / "real"
"""Weights that were made elsewhere, and numbers of them by independent code."""

REAL_LAYERS = {
    0: (0.0158, 0.0144, 0.0131, 0.363, 0.6, 2.6),
    1: (0.0343, 0.0328, 0.0297, 0.749, 8.0, 6.5),
    2: (0.0412, 0.0382, 0.0348, 0.114, 8.9, 2.8),
    3: (0.0858, 0.0858, 0.0809, 0.208, 14.9, 4.6),
    4: (0.0851, 0.0706, 0.0520, 0.120, 21.1, 13.7),
}
"""`KL_raw`, shifted, mapped and constant at strength 1, then both directions of transfer."""


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip("the real pair is not here")
    folders = {"base": REAL / "stories260K", "tuned": REAL / "stories260K-grimm"}
    pair = load_pair(**folders, prompts=REAL / "prompts.jsonl")
    return pair, prepared(pair, fit_maps(pair, range(pair.n_layers)))


def test_a_real_pair_reads_as_independent_code_says(real):
    """The ladder and both directions of every layer, to the digits given."""
    _, experiment = real
    for layer, expected in REAL_LAYERS.items():
        measured = MeasuredSets.of(experiment, layer, 1.0)
        every = [measured.everything]
        damage = [measured.of_source(s, every).mean() for s in (RAW, SHIFTED, MAPPED, CONSTANT)]
        assert damage[:3] == pytest.approx(expected[:3], abs=0.6e-4)
        assert damage[3] == pytest.approx(expected[3], abs=0.6e-3)
        for direction, pct in zip(("to_base", "to_tuned"), expected[4:], strict=True):
            before, left = (each.mean() for each in measured.transfer(direction).kl_nats(every))
            assert round(100 * (1 - left / before), 1) == pct


def test_a_real_pairs_gap_and_what_every_layer_carries(real):
    """0.730 and 0.775 nats apart; all heads of all layers carry 45.4% and 25.4%."""
    pair, experiment = real
    found = gap(grid_of(pair, experiment.maps, 4, experiment=experiment, ks=(1,)))
    assert round(found.base_nats.value, 3) == 0.730
    assert round(found.tuned_nats.value, 3) == 0.775
    assert round(found.every_layer_to_base_pct.value, 1) == 45.4
    assert round(found.every_layer_to_tuned_pct.value, 1) == 25.4


def test_a_metric_is_that_of_plain_models(on_disk):
    """Its value in both directions, of some heads and of a layer: Hugging Face models agree."""
    pair, plain = on_disk
    one, other = 3, 11

    def margin(logits, clean_logits, answer, foil):  # noqa: ARG001
        return logits[:, 0, one] - logits[:, 0, other]

    experiment = prepare(pair, fit_maps(pair, [MAIN]), metric=Metric("margin", margin))
    for here, there, source in (("tuned", "base", BASE), ("base", "tuned", TUNED)):
        patches = [Patch(MAIN, HeadSet.of(heads, 8), 1.0, source) for heads in ((), *SETS)]
        found = experiment.effects(patches).metric
        for number, tokens in enumerate(plain.prompts["val"]):
            z = plain.run(there, tokens)[1][MAIN]
            for at, heads in enumerate(((), *SETS)):
                log_probs, _ = plain.run(here, tokens, {MAIN: plain.put(heads, z)})
                expected = float(log_probs[one] - log_probs[other])
                assert found[at, number] == pytest.approx(expected, abs=1e-5)
