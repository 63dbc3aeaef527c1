"""Head cards: attention, writes and direct effects are those of plain hooks on Hugging Face."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import ragged_prompts
from model_zoo import ZOO, save, train_tokenizer
from pair_on_disk import LAYER, write_pair
from synthetic_card import synthetic_card
from tiny import (
    WORDS,
    half_precision,
    pair_of,
    prepared,
    random_prompts,
    tiny_model,
    word_tokenizer,
)
from torch import Tensor

from rq4lens import cli
from rq4lens.analysis.card.card import head_card, head_cards
from rq4lens.analysis.card.fragment import MOST_TOKENS, token_line
from rq4lens.analysis.card.passes import HeadWrites, Readout, through
from rq4lens.analysis.card.reads import NO_TOKEN
from rq4lens.analysis.card.records import Attended, HeadCard, Shifts, TokenShift
from rq4lens.analysis.card.sides import CardInputs
from rq4lens.analysis.card.swaps import next_tokens
from rq4lens.analysis.saved import read_run
from rq4lens.analysis.statistics.bootstrap import Estimate
from rq4lens.analysis.statistics.plain import from_json, to_json
from rq4lens.config import Place, config_from
from rq4lens.disk.run import PER_PROMPT, file_sha256
from rq4lens.errors import UserError
from rq4lens.figures.page import sections
from rq4lens.figures.page.sections import cards_section
from rq4lens.heads import Head, HeadSet
from rq4lens.jobs import run as run_job
from rq4lens.jobs.pages import heads_that_matter, read_cards, write_report_of
from rq4lens.models.load.loading import LoadedModel, load_hooked
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.activations import PairActivations, capture_z
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.decision import decision_states
from rq4lens.patching.engines.hooks import patched_heads
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.passes import forward_batch
from rq4lens.patching.patch import Patch, Sources
from rq4lens.screen.card import card_parts
from rq4lens.screen.terminal import text_of
from rq4lens.validation.planting import Planting, plant

RELATIVE = 1e-4
PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")
"""Names of what Hugging Face calls ``W_O``."""
BEHIND_ATTENTION = {
    "gemma2": "post_attention_layernorm",
    "gemma3": "post_attention_layernorm",
    "olmo2": "post_attention_layernorm",
    "olmo2-grouped": "post_attention_layernorm",
    "olmo3": "post_attention_layernorm",
}
"""Norms through which the attention's output goes before it is added."""

PROMPTS = ragged_prompts()


def one_of(module: Any, names: tuple[str, ...]) -> Any:
    """The submodule that has one of the names."""
    return next(each for name, each in module.named_modules() if name.split(".")[-1] in names)


@dataclass
class HuggingFace:
    """A model of Hugging Face in float64, with hooks where a card looks."""

    model: Any
    name: str
    layer: int

    def __post_init__(self) -> None:
        decoder = self.model.get_decoder() if hasattr(self.model, "get_decoder") else None
        inner = decoder or self.model.base_model
        blocks = next(m for m in inner.modules() if isinstance(m, torch.nn.ModuleList))
        self.block = blocks[self.layer]
        attention = next(
            each
            for name, each in self.block.named_modules()
            if name.split(".")[-1] in ("self_attn", "attn", "attention", "self_attention")
        )
        attention = getattr(attention, "attention", attention)
        self.projection = one_of(attention, PROJECTIONS)
        after = BEHIND_ATTENTION.get(self.name)
        self.after = getattr(self.block, after) if after else None
        norms = [
            each
            for name, each in inner.named_children()
            if name in ("norm", "ln_f", "final_layer_norm", "final_layernorm")
        ]
        self.final = norms[0]
        self.cap = getattr(self.model.config, "final_logit_softcapping", None)

    @torch.no_grad()
    def run(self, tokens: tuple[int, ...]) -> dict[str, Tensor]:
        """What passes at the last token."""
        seen: dict[str, Tensor] = {}
        hooks = [
            self.projection.register_forward_pre_hook(
                lambda _, args: seen.__setitem__("z", args[0][0, -1])
            ),
            self.final.register_forward_pre_hook(
                lambda _, args: seen.__setitem__("resid", args[0][0, -1])
            ),
        ]
        out = self.model(torch.tensor([tokens]), output_attentions=True)
        for hook in hooks:
            hook.remove()
        seen |= {"logits": out.logits[0, -1], "pattern": out.attentions[self.layer][0, :, -1]}
        return seen

    def weight(self) -> Tensor:
        """``W_O`` as ``[head d_head d_model]``."""
        weight = self.projection.weight
        if type(self.projection).__name__ != "Conv1D":
            weight = weight.T
        return weight.reshape(ZOO[self.name].n_heads, -1, weight.shape[-1])

    def unembed(self, normed: Tensor) -> Tensor:
        """Logits of normed vectors, as the model's own head makes them."""
        return self.model.get_output_embeddings()(normed)

    def frozen(self, norm: Any, vector: Tensor, at: Tensor) -> Tensor:
        """A vector through a norm with the scale that it has at other activations, no bias."""
        if norm is None:
            return vector
        bias = getattr(norm, "bias", None)
        bias = torch.zeros_like(at) if bias is None else bias
        if "LayerNorm" in type(norm).__name__:
            at, vector = at - at.mean(), vector - vector.mean()
        return vector * (norm(at) - bias) / at


def load(name: str, folder) -> tuple[Any, Any]:
    """A tiny random model of an architecture: as Hugging Face has it, and as this package does."""
    model = ZOO[name].make()
    save(model, train_tokenizer(), folder)
    hooked = load_hooked(folder, check_logits=False).model
    model.set_attn_implementation("eager")
    # Experts of Hugging Face multiply in float32 at most.
    return (model if hasattr(model.config, "num_experts_per_tok") else model.double()), hooked


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether numbers agree to 1e-4 of the largest of them."""
    apart = (found.detach() - expected.detach()).abs().max() / expected.detach().abs().max()
    return float(apart) < RELATIVE


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("engine", ["suffix", "hooks"])
def test_reads_writes_and_direct_effects_are_those_of_hugging_face(name, layer, engine, tmp_path):
    """Every architecture: grouped heads, soft caps, windows, parallel blocks, norms and biases."""
    plain, hooked = load(name, tmp_path)
    hugging = HuggingFace(plain, name, layer)
    place = Place(engine=engine, batch_size=4)
    states = decision_states(make_engine(hooked, PROMPTS, place=place), [layer])
    block, readout = hooked.blocks[layer], Readout.of(hooked, states.resid).beside_heads()
    writes = HeadWrites.of(block, states.z[layer])
    other = HeadWrites.of(block, states.z[layer].roll(1, 0))
    with torch.no_grad():
        direct = readout.direct(writes.in_stream)
        changed = readout.log_probs(writes.changes(other))
    seen = [hugging.run(tokens) for tokens in PROMPTS.token_ids]
    weight = hugging.weight()
    for row, at in enumerate(seen):
        length = len(PROMPTS.token_ids[row])
        assert close(states.pattern[layer][row, :, :length], at["pattern"])
        assert float(states.pattern[layer][row, :, length:].abs().sum()) == 0
        each = torch.einsum("hd,hdm->hm", at["z"].reshape(4, -1), weight)
        swapped = torch.einsum("hd,hdm->hm", seen[row - 1]["z"].reshape(4, -1), weight)
        whole = hugging.projection(at["z"])
        for head in range(4):
            added = hugging.frozen(hugging.after, each[head], whole)
            normed = hugging.frozen(hugging.final, added, at["resid"])
            expected = hugging.unembed(normed) - hugging.unembed(torch.zeros_like(normed))
            assert close(direct[row, head], expected)
            after = whole + swapped[head] - each[head]
            norm = hugging.after or (lambda value: value)
            resid = at["resid"] + norm(after) - norm(whole)
            logits = hugging.unembed(hugging.final(resid))
            logits = (
                logits if hugging.cap is None else hugging.cap * torch.tanh(logits / hugging.cap)
            )
            assert close(changed[row, head], logits.log_softmax(-1))


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_all_writes_add_up_to_the_logits(name, tmp_path):
    """Heads, MLPs, embedding and biases, each by its direct effect, make the clean logits."""
    hooked = load(name, tmp_path)[1]
    layers = list(range(hooked.cfg.n_layers))
    states = decision_states(make_engine(hooked, PROMPTS), layers)
    batch = next(PROMPTS.batches(len(PROMPTS)))
    logits, cache = hooked.run_with_cache(batch.tokens, padding_side="right", return_type="logits")
    here = torch.arange(len(batch.rows)), batch.decision
    order = batch.rows.argsort()
    readout = Readout.of(hooked, states.resid)
    total = readout.direct(cache["blocks.0.hook_resid_pre"][here][order])
    for layer in layers:
        block = hooked.blocks[layer]
        writes = HeadWrites.of(block, states.z[layer])
        total += readout.beside_heads().direct(writes.in_stream).sum(1)
        whole = writes.whole[:, 0]
        bias = through(writes.norm, block.attn.b_O.expand_as(whole), whole)
        bias = bias if getattr(writes.norm, "b", None) is None else bias + writes.norm.b
        total += readout.direct(bias)
        total += readout.direct(cache[f"blocks.{layer}.hook_mlp_out"][here][order])
    total += hooked.b_U
    if getattr(hooked.ln_final, "b", None) is not None:
        total += hooked.ln_final.b @ hooked.W_U
    if hooked.cfg.output_logits_soft_cap > 0:
        cap = hooked.cfg.output_logits_soft_cap
        total = cap * torch.tanh(total / cap)
    expected = logits[here][order]
    assert float((total - expected).abs().max() / expected.abs().max()) < 1e-3


def planted_card(weights):
    """The card of a head whose weights of these names are new."""
    how = Planting(weights=weights, strength=2.0)
    planted = plant(tiny_model(), rewired=[Head(1, 2)], how=how)
    return head_card(pair_of(planted.base, planted.tuned, random_prompts()), "L1H2", n_prompts=4)


def test_a_head_that_attends_elsewhere_is_seen_under_reads():
    """New queries and keys change what is read; what is written of it stays."""
    card = planted_card(("W_Q", "W_K"))
    assert card.reads.distance.interval.low > 0.1
    assert card.reads.output_change_pct.interval.low > 20
    assert card.writes.output_change_pct.value < 1e-3


def test_a_head_that_writes_something_else_is_seen_under_writes():
    """New values and outputs change what is written; what is read stays."""
    card = planted_card(("W_V", "W_O"))
    assert card.reads.distance.value < 1e-6
    assert card.reads.output_change_pct.value < 1e-3
    assert card.writes.output_change_pct.interval.low > 20


def test_a_rotated_head_keeps_what_it_reads_and_what_it_writes():
    """Other coordinates inside a head change no attention and no output."""
    planted = plant(tiny_model(), rotated=[Head(1, 2)])
    card = head_card(pair_of(planted.base, planted.tuned, random_prompts()), "L1H2")
    assert card.reads.distance.value < 1e-6
    assert card.writes.output_change_pct.value < 1e-2
    assert card.carried.to_base_pct.value is None
    assert "gap" in card.carried.to_base_pct.reason


def test_other_vocabularies_leave_nulls_with_their_reasons():
    """What is compared token by token is not there; each model's own reading and writing is."""
    base, tuned = (
        LoadedModel.wrap(tiny_model(seed), word_tokenizer(words))
        for seed, words in ((0, WORDS), (1, WORDS[::-1]))
    )
    card = head_card(ModelPair(base, tuned, random_prompts()), "L1H2", n_prompts=2)
    for each in (*vars(card.carried).values(), card.reads.distance, card.writes.output_change_pct):
        if isinstance(each, Estimate):
            assert each.value is None
            assert "other" in each.reason
    assert card.writes.change is None
    assert "vocabular" in card.writes.reasons["change"]
    for decision in card.decides:
        assert decision.closed_nats is None
        assert "vocabular" in decision.reasons["closed_nats"]
        assert decision.next_tokens.base
        assert decision.next_tokens.tuned_with_base_head
    assert card.writes.base.raised
    assert card.writes.tuned.raised
    json.dumps(to_json(card), allow_nan=False)
    assert "other" in text_of(card_parts(card))


@pytest.mark.parametrize("n_key_value_heads", [None, 2])
@pytest.mark.parametrize("engine", ["suffix", "hooks"])
def test_values_under_the_models_own_attention_are_z(n_key_value_heads, engine):
    """What a card calls values under an attention is what the model computes."""
    model = tiny_model(n_key_value_heads=n_key_value_heads)
    prompts = TokenizedPrompts(("a", "b", "c"), ((1, 2, 3, 4), (5, 6), (7,)))
    engines = [
        make_engine(model, prompts, place=Place(engine=engine, batch_size=size)) for size in (3, 1)
    ]
    own = decision_states(engines[0], [1])
    again = decision_states(engines[1], [1], own.pattern)
    assert torch.allclose(again.z_elsewhere[1], own.z[1], atol=1e-6)


def test_half_precision_has_no_sink_and_no_gap():
    """Rounding of a pattern is not attention to nothing, and both models of a pair are one."""
    model = half_precision(tiny_model())
    card = head_card(pair_of(model, model, random_prompts()), "L1H0", n_prompts=2)
    assert NO_TOKEN not in {role.name for role in card.reads.roles}
    assert card.reads.distance.value == 0
    assert card.writes.output_change_pct.value < 1
    assert card.carried.to_base_pct.value is None


@pytest.fixture(scope="module")
def etiquette_cards(etiquette):
    """Two cards of the pair in the box: the head that carries the change, and one that does not."""
    inputs = CardInputs(etiquette)
    return list(head_cards(inputs, [Head(1, 0), Head(1, 3)], 4))


@torch.no_grad()
def test_transfer_and_next_tokens_are_those_of_patched_forward_passes(etiquette, etiquette_cards):
    """Each number of a prompt follows from full forward passes with native hooks."""
    card, tuned = etiquette_cards[0], etiquette.tuned.model
    name = card.decides[0].prompt
    tokens = {side: etiquette.tokens(side, "val") for side in ("base", "tuned")}
    row = tokens["tuned"].ids.index(name)
    one = {side: each.some([row]) for side, each in tokens.items()}
    z = capture_z(etiquette.base.model, one["base"], [1])[1]
    batch = next(one["tuned"].batches(1))
    base = forward_batch(etiquette.base.model, batch)[0, -1].log_softmax(-1)
    clean = forward_batch(tuned, batch)[0, -1].log_softmax(-1)
    patch = Patch(1, HeadSet.of([0], 16), 1.0, "raw")
    with patched_heads(tuned, (patch,), Sources({(1, "raw"): z}), batch):
        patched = forward_batch(tuned, batch)[0, -1].log_softmax(-1)
    closed = (base.exp() * (patched - clean)).sum()
    assert card.decides[0].closed_nats == pytest.approx(float(closed), rel=1e-3)
    likeliest = card.decides[0].next_tokens.tuned_with_base_head[0]
    assert likeliest.probability == pytest.approx(float(patched.exp().max()), rel=1e-3)
    assert likeliest.token == etiquette.tuned.tokenizer.decode([int(patched.argmax())])


@torch.no_grad()
def test_the_likeliest_next_tokens_are_those_of_patched_forward_passes(etiquette):
    """Of base, of tuned, and of tuned with all of base's heads of the layer, prompt by prompt."""
    experiment = prepared(etiquette, fit_maps(etiquette, [1]))
    base = PairActivations(etiquette)
    base.capture("base", "val", [0], to_the_end=True)
    said = next_tokens(experiment, 1, base.log_probs("base", "val"))
    assert list(said) == list(experiment.prompt_ids)
    tokens = etiquette.tokens("tuned", "val").some([5])
    batch = next(tokens.batches(1))
    z = capture_z(etiquette.base.model, etiquette.tokens("base", "val").some([5]), [1])[1]
    patch = (Patch(1, HeadSet.all(16), 1.0, "raw"),)
    expected = {
        "base": forward_batch(etiquette.base.model, batch)[0, -1],
        "tuned": forward_batch(etiquette.tuned.model, batch)[0, -1],
    }
    with patched_heads(etiquette.tuned.model, patch, Sources({(1, "raw"): z}), batch):
        expected["patched"] = forward_batch(etiquette.tuned.model, batch)[0, -1]
    for name, logits in expected.items():
        best = logits.softmax(-1).topk(5)
        found = said[experiment.prompt_ids[5]][name]
        assert [p for _, p in found] == pytest.approx(best.values.tolist(), rel=1e-3, abs=1e-6)
        assert found[0][0] == etiquette.tuned.tokenizer.decode([int(best.indices[0])])


def test_the_head_of_the_changed_customs_carries_them(etiquette_cards):
    """The world's truth: L1H0 carries what changed, through later layers; L1H3 does not."""
    carrier, other = etiquette_cards
    assert carrier.carried.to_base_pct.interval.low > 90
    assert carrier.carried.direct_pct.interval.high < 20
    assert other.carried.to_base_pct.interval.high < 10


def test_one_card_is_that_of_many(etiquette, etiquette_cards):
    """Heads that share a pass do not see each other; only how products are cut rounds."""
    alone, among = head_card(etiquette, "L1H3", n_prompts=4), etiquette_cards[1]
    nats = [[decision.closed_nats for decision in card.decides] for card in (alone, among)]
    assert nats[0] == pytest.approx(nats[1], abs=1e-6)
    without = [[replace(each, closed_nats=0.0) for each in card.decides] for card in (alone, among)]
    assert without[0] == without[1]
    assert alone.writes.change == among.writes.change
    for name in ("to_base_pct", "to_tuned_pct"):
        values = [getattr(each.carried, name).value for each in (alone, among)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_a_card_is_read_back_as_it_was_written(etiquette_cards):
    """JSON keeps all that a card says."""
    for card in etiquette_cards:
        again = from_json(HeadCard, json.loads(json.dumps(to_json(card))))
        assert to_json(again) == to_json(card)
        assert again.decides == card.decides


def test_token_texts_are_escaped(etiquette_cards):
    """A token is a stranger's text: it never becomes markup."""
    bad = "<script>alert(1)</script>&\"'"
    decision = etiquette_cards[0].decides[0]
    read = Attended((bad,), (1.0,))
    shifts = Shifts((TokenShift(bad, 1.0),), (TokenShift(bad, -1.0),))
    decision = replace(decision, prompt=bad, base=read, tuned=read, writes_base=shifts)
    card = replace(etiquette_cards[0], pair=bad, decides=(decision,))
    for html in (card._repr_html_(), cards_section([card])):
        assert "<script" not in html
        assert "alert(1)" in html
    assert "\x1b" not in text_of(card_parts(replace(card, pair="\x1b[31m")))


def test_a_page_leaves_out_what_would_make_it_large(etiquette_cards, monkeypatch):
    """The cards that are left out are named."""
    monkeypatch.setattr(sections, "MOST_CARD_BYTES", len(cards_section(etiquette_cards[:1])))
    html = cards_section(etiquette_cards)
    assert 'id="card-L1H0"' in html
    assert 'id="card-L1H3"' not in html
    assert "Left out, so that the page stays small: L1H3" in html


def test_long_prompts_keep_their_most_attended_tokens():
    """Of many tokens those are shown that either model looks at, and the deciding one."""
    tokens = tuple(f"t{n}" for n in range(200))
    attention = [0.0] * 200
    attention[7] = 1.0
    line = token_line(
        SimpleNamespace(
            base=Attended(tokens, tuple(attention)), tuned=Attended(tokens, (0.005,) * 200)
        ),
        "base",
    )
    assert len(line) == MOST_TOKENS
    assert {"t7", "t199"} <= {text for text, _, _ in line}
    assert line[-1][2], "what was left out before the deciding token is marked"


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("L9H0", "layer 9 does not exist"),
        ("L1H99", "has heads 0 to 15"),
        ("H1", "is no head"),
    ],
)
def test_a_head_that_is_not_there_is_refused(etiquette, head, said):
    """One sentence that says which heads there are."""
    with pytest.raises(UserError, match=said):
        head_card(etiquette, head)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a pair on disk."""
    folder = tmp_path_factory.mktemp("cards")
    config = config_from({**write_pair(folder), "analysis": "grid"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_job, "write_pages", lambda *_: None)
        run_job.run(config, folder / "run")
    return folder / "run"


def command(monkeypatch, capsys, *arguments):
    """What a command prints, and its exit code."""
    monkeypatch.setattr(sys, "argv", ["rq4lens", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    timed = re.compile(r"rq4lens: .*, [0-9.]+ s")  # a slow stage says what it took
    return stopped.value.code, out, "".join(x for x in err.splitlines() if not timed.fullmatch(x))


def test_the_command_says_what_the_function_says(finished, monkeypatch, capsys):
    """From a run directory alone: as text, and as the JSON of the card."""
    run = read_run(finished)
    card = head_card(run, f"L{LAYER}H2", n_prompts=3)
    name = card.head.label
    code, out, err = command(monkeypatch, capsys, "head", finished, name, "--prompts", 3, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == to_json(card)
    assert len(card.decides) == 3
    assert card.numbers.KL_raw == next(
        each.KL_raw_mean for each in read_run(finished).records if each.cond == "head2"
    )
    code, out, _ = command(monkeypatch, capsys, "head", finished, name, "--prompts", 3)
    assert code == 0
    assert out == text_of(card_parts(card))


def test_cards_of_all_heads_lie_in_the_run_and_in_its_report(finished, monkeypatch, capsys):
    """A file a head, and the cards of the main layer in the report."""
    code, out, err = command(monkeypatch, capsys, "head", finished, "--all", "--prompts", 2)
    assert (code, err) == (0, "")
    assert out == f"written to {finished / 'heads'}\n"
    names = {path.stem for path in (finished / "heads").iterdir()}
    assert names == {f"L{layer}H{head}" for layer in range(3) for head in range(8)}
    grid = read_run(finished).grid
    mattering = heads_that_matter(grid)
    assert [each.head for each in read_cards(finished, mattering)] == list(mattering)
    page = write_report_of(finished).read_text("utf-8")
    assert page.count('<details class="card"') == 8
    assert page.index(f'id="card-{mattering[0]}"') < page.index(f'id="card-{mattering[1]}"')


def test_cards_of_another_run_are_not_shown(finished, tmp_path):
    """A folder whose run was made again holds the cards of before: they are left out."""
    run = shutil.copytree(finished, tmp_path / "run")
    card = synthetic_card(Head(LAYER, 0))
    (run / "heads").mkdir(exist_ok=True)
    path = run / "heads" / f"{card.head}.json"
    path.write_text(json.dumps({"of": "another", "card": to_json(card)}))
    assert read_cards(run, [card.head]) == ()
    path.write_text(json.dumps({"of": file_sha256(run / PER_PROMPT), "card": {}}))
    with pytest.raises(UserError, match="is damaged"):
        read_cards(run, [card.head])


@pytest.mark.parametrize("arguments", [(), ("L1H0", "--all")])
def test_one_head_or_all_of_them(finished, monkeypatch, capsys, arguments):
    """Neither and both are refused in a sentence."""
    code, out, err = command(monkeypatch, capsys, "head", finished, *arguments)
    assert (code, out) == (2, "")
    assert "or ask for --all" in err
