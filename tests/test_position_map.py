"""The position map: laws, plain hooks, files, figure and command; positions by Hugging Face."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from model_zoo import ZOO, save, train_tokenizer
from pair_on_disk import write_pair
from tiny import ALPHA, MAIN, TINY_HEADS, TINY_LAYERS, needs_hooked, random_prompts
from transformers import AutoModelForCausalLM

import rq4lens as rq
from rq4lens.analysis.saved import read_positions, write_positions
from rq4lens.cli import main
from rq4lens.config import Effort, Patching, Reading, config_from
from rq4lens.disk.run import PER_PROMPT, POSITIONS, REPORT
from rq4lens.errors import UserError
from rq4lens.figures.heatmaps import position_map as drawn
from rq4lens.heads import HeadSet
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.patching.experiment import prepare
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.patch import BASE, RAW, TUNED, Patch

LAST = TINY_LAYERS - 1
FULL = tuple(range(TINY_HEADS))


def with_subjects(prompts, *, all_of=("train", "val")):
    """The prompts, their second word as their subject."""
    named = [
        replace(each, subject=each.text.split()[1] if each.split in all_of else None)
        for each in prompts
    ]
    return PromptSet(tuple(named))


def pair_on(tiny_pair, prompts):
    return rq.ModelPair(tiny_pair.base, tiny_pair.tuned, prompts)


def grid_on(pair, layer=MAIN):
    few = Effort(resamples=200)
    maps = rq.fit_maps(pair, layer)
    return rq.run_grid(
        pair, maps, layer, alpha=ALPHA, settings=Patching(k=(1,), random_seeds=(0,)), effort=few
    )


def refusal(make, *arguments, **named):
    with pytest.raises(UserError) as caught:
        make(*arguments, **named)
    said = str(caught.value)
    assert said.count(". ") == 0
    return said


@pytest.fixture(scope="module")
def pair(tiny_pair):
    return pair_on(tiny_pair, with_subjects(random_prompts()))


@pytest.fixture(scope="module")
def grid(pair):
    return grid_on(pair)


@pytest.fixture(scope="module")
def mapped(pair, grid):
    return rq.position_map(grid, 3, pair=pair)


# --- laws


def test_the_last_position_is_the_runs_own(mapped, grid):
    """At the decision token the map holds the numbers of the run, of the layer and each head."""
    for cond in ("full", *(f"head{head}" for head in FULL)):
        for ours, theirs in zip(mapped[-1].grid[cond].rows, grid[cond].rows, strict=True):
            np.testing.assert_allclose(ours.kl_nats, theirs.kl_nats, atol=1e-6)
            left = (ours.gap_left_nats, theirs.gap_left_nats)
            np.testing.assert_allclose(*left, atol=1e-5)


def test_no_later_layer_reads_an_earlier_token_of_the_last_one(pair):
    """A patch in the last layer at any token before the decision token changes nothing."""
    found = rq.position_map(grid_on(pair, LAST), 2, pair=pair)
    assert np.abs(found[-2].per_prompt("delta")).max() < 1e-9
    assert np.abs(found[-2].per_prompt("to_base")).max() < 1e-2
    assert np.abs(found[-1].per_prompt("to_base")[0]).max() > 1


def hooked_log_probs(model, tokens, layer, at, source=None):
    """Log-probabilities behind the last token, heads replaced at some tokens by native hooks."""

    def put(z, hook):  # noqa: ARG001
        z[0, at] = source
        return z

    hooks = [] if source is None else [(f"blocks.{layer}.attn.hook_z", put)]
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=hooks)
    return logits[0, -1].double().log_softmax(-1)


def kl(p, q):
    return float((p.exp() * (p - q)).sum())


@needs_hooked
@pytest.mark.parametrize("role", ["subject", "-3", "-2"])
def test_each_position_equals_plain_hooks(pair, mapped, role):
    """Raw patches and both directions of the whole layer, at each token, prompt by prompt."""
    at_role = mapped[role].grid.full
    models = {side: pair.member(side).model for side in ("base", "tuned")}
    for row, tokens in enumerate(pair.tokens("tuned", "val").token_ids):
        # Of several the last subject is meant; a word is a token.
        last = max(place for place, token in enumerate(tokens) if token == tokens[1])
        at = [last if role == "subject" else len(tokens) + int(role)]
        z = {
            side: model.run_with_cache(torch.tensor([tokens]))[1][f"blocks.{MAIN}.attn.hook_z"]
            for side, model in models.items()
        }
        clean = {side: hooked_log_probs(model, tokens, MAIN, at) for side, model in models.items()}
        for here, there, found in (
            ("tuned", "base", at_role.transfer.into_tuned),
            ("base", "tuned", at_role.transfer.into_base),
        ):
            patched = hooked_log_probs(models[here], tokens, MAIN, at, z[there][0, at])
            assert found.gap_left_nats[row] == pytest.approx(kl(clean[there], patched), abs=1e-5)
        blended = (1 - ALPHA) * z["tuned"][0, at] + ALPHA * z["base"][0, at]
        patched = hooked_log_probs(models["tuned"], tokens, MAIN, at, blended)
        assert at_role.kl_raw_nats[row] == pytest.approx(kl(patched, clean["tuned"]), abs=1e-5)


def test_a_share_of_all_prompts_is_the_ratio_of_their_means(mapped):
    """Estimates have intervals; a prompt's own share is of its own gap, and ΔKL a plain mean."""
    position = mapped[-2]
    gap = position.grid["none"].transfer.left_nats("to_base")
    for label, record, shares, deltas in zip(
        mapped.labels,
        position.layer_and_heads,
        position.per_prompt("to_base"),
        position.per_prompt("delta"),
        strict=True,
    ):
        assert record.to_base_pct.value == pytest.approx((shares * gap).sum() / gap.sum()), label
        assert record.delta.value == pytest.approx(deltas.mean())
        assert record.to_base_pct.interval is not None


# --- which positions, which prompts


def test_positions_are_those_that_every_measured_prompt_has(pair, grid, mapped):
    """The last ones in the order of the text, after the subject; never more than there are."""
    assert mapped.roles == ("subject", "-3", "-2", "-1")
    shortest = min(map(len, pair.tokens("tuned", "val").token_ids))
    every = rq.position_map(grid, "all", pair=pair)
    assert every.roles[1:] == tuple(f"-{at}" for at in range(shortest, 0, -1))
    assert rq.position_map(grid, 99, pair=pair).roles == every.roles
    assert len(every.to_dataframe()) == len(every.roles) * (1 + TINY_HEADS)


def test_one_prompt_is_mapped_to_its_first_token(pair, grid, mapped):
    """A long prompt alone has more positions; where a train prompt has none, it is left out."""
    ids, tokens = pair.tokens("tuned", "val").ids, pair.tokens("tuned", "val").token_ids
    longest = max(range(len(ids)), key=lambda row: len(tokens[row]))
    one = rq.position_map(grid, "all", [ids[longest]], pair=pair)
    assert len(one.roles) == 1 + len(tokens[longest])
    assert one.grid.prompt_ids == (ids[longest],)
    lengths = [len(each) for each in pair.tokens("tuned", "train").token_ids]
    assert one[one.roles[1]].n_train == sum(n >= len(tokens[longest]) for n in lengths)
    words = pair.prompts.of_ids([ids[longest]]).texts[0].split()
    assert [one[role].texts[0].strip() for role in one.roles[1:]] == words
    of_all = mapped[-2].per_prompt("to_base")[:, longest]
    np.testing.assert_allclose(one[-2].per_prompt("to_base")[:, 0], of_all, atol=1e-2)


@pytest.mark.parametrize("splits", [("train",), ("val",), ()])
def test_a_subject_is_a_position_where_every_prompt_names_one(tiny_pair, splits):
    """Measured ones all, and train ones to fit a map on."""
    pair = pair_on(tiny_pair, with_subjects(random_prompts(), all_of=splits))
    assert rq.position_map(grid_on(pair), 1, pair=pair).roles == ("-1",)


@pytest.mark.parametrize("positions", [0, -3, True, "some"])
def test_no_number_of_tokens_is_refused(pair, grid, positions):
    """The value, what is allowed and an example."""
    assert repr(positions) in refusal(rq.position_map, grid, positions, pair=pair)


def test_what_does_not_fit_is_refused(pair, grid, tiny_pair, mapped):
    """An unknown prompt, a grid without its pair, another pair."""
    assert "'nope'" in refusal(rq.position_map, grid, 1, ["nope"], pair=pair)
    assert "pair=" in refusal(rq.position_map, grid)
    other = pair_on(tiny_pair, random_prompts(n_val=3))
    assert "other prompts" in refusal(rq.position_map, grid, pair=other)
    assert "was not mapped" in refusal(mapped.__getitem__, -9)
    assert "was not measured" in refusal(mapped.row_of, "nope")


# --- figure, files, command


def test_the_figure_has_a_row_a_head_and_a_column_a_position(mapped):
    """A switch between both directions and ΔKL; the tokens of one prompt stand below it."""
    figure = drawn(mapped)
    (trace,) = figure.data
    assert list(trace.y) == list(mapped.labels)
    expected = [[each.to_base_pct.value for each in p.layer_and_heads] for p in mapped.positions]
    np.testing.assert_allclose(np.array(trace.z).T, expected)
    labels = [button.label for button in figure.layout.updatemenus[0].buttons]
    assert labels == ["undoes", "gives base", "ΔKL"]
    prompt = mapped.grid.prompt_ids[3]
    one = drawn(mapped, prompt=prompt, quantity="to_tuned")
    for position, text in zip(mapped.positions, one.layout.xaxis.ticktext, strict=True):
        assert text == f"{position.role}  {position.texts[3].strip()}"
    np.testing.assert_allclose(one.data[0].z, mapped.per_prompt("to_tuned")[..., 3].T)
    assert "no quantity" in refusal(drawn, mapped, quantity="size")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = config_from(write_pair(tmp_path_factory.mktemp("pair")))
    directory = tmp_path_factory.mktemp("runs") / "run"
    return rq.run(config, directory)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["rq4lens", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_the_command_writes_a_map_that_reads_back(finished, monkeypatch, capsys):
    """A table on the console; the file holds every number; the report has a section."""
    directory = finished.directory
    assert "Token by token" not in (directory / REPORT).read_text("utf-8")
    assert finished.positions is None
    assert command(monkeypatch, "positions", directory, "--last", 2) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line[:2] in ("-1", "-2")] == [
        "-2",
        "-1",
    ]
    saved, again = finished.positions, rq.position_map(finished, 2)
    assert saved.to_dataframe().equals(again.to_dataframe())
    assert [each.texts for each in saved.positions] == [each.texts for each in again.positions]
    for quantity in ("to_base", "to_tuned", "delta"):
        np.testing.assert_array_equal(saved.per_prompt(quantity), again.per_prompt(quantity))
    assert "Token by token" in (directory / REPORT).read_text("utf-8")
    json.loads((directory / POSITIONS).read_text("utf-8"), parse_constant=pytest.fail)


def test_a_map_of_another_run_is_not_shown(mapped, tmp_path):
    """One that was measured beside other numbers is none; a damaged one is one sentence."""
    (tmp_path / PER_PROMPT).write_bytes(b"one")
    write_positions(tmp_path, mapped)
    assert read_positions(tmp_path).to_dataframe().equals(mapped.to_dataframe())
    (tmp_path / PER_PROMPT).write_bytes(b"other")
    assert read_positions(tmp_path) is None
    (tmp_path / POSITIONS).write_text('{"of": 1}')
    (tmp_path / PER_PROMPT).write_bytes(b"one")
    assert read_positions(tmp_path) is None
    record = {"of": "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"}
    (tmp_path / POSITIONS).write_text(json.dumps(record))
    assert "is damaged" in refusal(read_positions, tmp_path)


BAD = {
    "no number": (["--last", "none"], "'none'"),
    "no prompt": (["--prompt", "nope"], "'nope'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_end_in_one_sentence(finished, monkeypatch, capsys, case):
    """Exit code 2, and no traceback."""
    options, expected = BAD[case]
    assert command(monkeypatch, "positions", finished.directory, *options) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said


# --- answers of several tokens at named positions, by Hugging Face alone


PROJECTIONS = {"o_proj", "dense", "out_proj", "c_proj"}
TEXTS = (
    "the lazy dog jumps over a river",
    "a small library opened near the river",
    "a dog and the small library",
    "over the river and the edge of a dog",
)
N_ANSWER, AT_LAYER = 3, 1


class HuggingFacePair:
    """Two Hugging Face models in float64, patched in what the output projection reads."""

    def __init__(self, folders, tokenizer):
        self.tokenizer = tokenizer
        self.models = {
            side: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
            for side, folder in folders.items()
        }
        self.n_heads = self.models["base"].config.num_attention_heads

    def projection(self, side):
        """The output projection of the layer, whose input the heads are."""
        (found,) = (
            module
            for name, module in self.models[side].named_modules()
            if f".{AT_LAYER}." in name and "att" in name and name.split(".")[-1] in PROJECTIONS
        )
        return found

    @torch.no_grad()
    def run(self, side, tokens, at=(), heads=(), source=None, alpha=1.0):
        """Log-probabilities everywhere and the layer's z, some heads blended at some places."""
        seen = []

        def hook(_module, given):
            z = given[0].unflatten(-1, (self.n_heads, -1)).clone()
            seen.append(z[0].clone())
            for place in at:
                for head in heads:
                    z[0, place, head] += alpha * (source[place, head] - z[0, place, head])
            return (z.flatten(-2), *given[1:])

        with self.projection(side).register_forward_pre_hook(hook):
            logits = self.models[side](torch.tensor([tokens])).logits[0]
        return logits.log_softmax(-1), seen[0]

    def read(self, prompt):
        """The prompt's tokens, those of its subject, and its answer: given, or greedy of tuned."""
        encoded = self.tokenizer(prompt.text, return_offsets_mapping=True)
        start = prompt.text.rindex(prompt.subject)
        end, tokens = start + len(prompt.subject), encoded["input_ids"]
        spans = encoded["offset_mapping"]
        subject = [n for n, (one, other) in enumerate(spans) if one < end and other > start]
        answer = []
        if prompt.answer is not None:
            answer = self.tokenizer(prompt.text + prompt.answer)["input_ids"][len(tokens) :]
        for _ in range(N_ANSWER if not answer else 0):
            log_probs, _ = self.run("tuned", tokens + answer)
            answer.append(int(log_probs[-1].argmax()))
            if answer[-1] == self.tokenizer.eos_token_id:
                break
        return tokens, subject, answer[:N_ANSWER]


@pytest.fixture(scope="module", params=["llama", "gpt2", "pythia"])
def folders(request, tmp_path_factory):
    tokenizer = train_tokenizer()
    base = ZOO[request.param].make()
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    where = tmp_path_factory.mktemp(request.param)
    made = {"base": base, "tuned": tuned}
    return {side: save(each, tokenizer, where / side) for side, each in made.items()}, tokenizer


@pytest.mark.parametrize("positions", ["subject", "-2..-1"])
def test_answers_at_named_positions_are_those_of_hugging_face(folders, positions):
    """Sums over the answer's tokens, patched at the subject, or at the end and in the answer."""
    paths, tokenizer = folders
    subjects, answers = ("dog", "library", "dog", "river"), (" quietly", None, " opened near", None)
    prompts = [
        rq.Prompt(f"p{n}", text, split, subject=subject, answer=answer)
        for split in ("train", "val")
        for n, (text, subject, answer) in enumerate(zip(TEXTS, subjects, answers, strict=True))
        if (n % 2 == 0) or split == "val"
    ]
    prompts = [
        replace(
            each,
            id=f"{each.split}{each.id}",
            text=("so " if each.split == "train" else "") + each.text,
        )
        for each in prompts
    ]
    reading = Reading(positions=positions, answer_tokens=N_ANSWER)
    pair = rq.load_pair(**paths, prompts=prompts, reading=reading)
    plain, heads = HuggingFacePair(paths, tokenizer), (0, 2)
    chosen = HeadSet.of(heads, pair.n_heads)
    experiment = prepare(pair, fit_maps(pair, [AT_LAYER], "mean_shift"), Patching())
    patches = {
        BASE: ("tuned", "base", 1.0),
        RAW: ("tuned", "base", ALPHA),
        TUNED: ("base", "tuned", 1.0),
    }
    found = experiment.effects(
        [Patch(AT_LAYER, chosen, alpha, source) for source, (_, _, alpha) in patches.items()]
    )
    for row, prompt in enumerate(pair.prompts.split("val")):
        tokens, subject, answer = plain.read(prompt)
        whole, compared = (
            tokens + answer[:-1],
            slice(len(tokens) - 1, len(tokens) + len(answer) - 1),
        )
        at = subject if positions == "subject" else range(len(tokens) - 2, len(whole))
        for number, (here, there, alpha) in enumerate(patches.values()):
            run = partial(plain.run, here, whole)
            target, z = plain.run(there, whole)
            patched, clean = run(at, heads, z, alpha)[0], run()[0]
            left = kl(target[compared], patched[compared])
            assert found.kl_nats[number, row] == pytest.approx(
                kl(patched[compared], clean[compared]), abs=1e-5
            )
            assert found.gap_left_nats[number, row] == pytest.approx(left, abs=1e-5)
        assert np.nanmax(found.kl_nats[:, row]) > 2e-5
