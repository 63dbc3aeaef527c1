"""What of a prompt is patched and which answers are asked for: places, tokens, and their match."""

from __future__ import annotations

import json
import re
import sys

import pytest
from model_zoo import KAZAKH, train_tokenizer
from tiny import pair_of, random_prompts, tiny_model

from rq4lens.cli import main
from rq4lens.config import Patching, Reading, RunConfig
from rq4lens.errors import UserError
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.audit import audit_prompts
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.models.prompts.reading import tokenize
from rq4lens.patching.activations import PairActivations
from rq4lens.screen.audit import WIDTHS, audit_parts
from rq4lens.screen.terminal import text_of

TEXT = "the lazy dog jumps over a river"
CHAT = [{"role": "user", "content": "Where is the river?"}]


def audit_text(*found, **how):
    return text_of(audit_parts(*found, **how), **WIDTHS)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer()


@pytest.fixture(scope="module")
def kazakh():
    return train_tokenizer(KAZAKH)


def one(**fields):
    body = {} if "messages" in fields else {"text": TEXT}
    return PromptSet.of([{"id": "a", "split": "val", **body, **fields}])


def patched_text(tokenizer, tokens):
    return "".join(tokenizer.decode([tokens.token_ids[0][at]]) for at in tokens.spots[0])


def refusal(make, *arguments, **named):
    with pytest.raises(UserError) as caught:
        make(*arguments, **named)
    return str(caught.value)


# --- patched tokens


def test_without_a_word_of_places_nothing_is_new(bpe):
    """Defaults name no spots, and answers change no fingerprint of what is computed."""
    plain, asked = tokenize(one(), bpe), tokenize(one(answer=" quietly", foil=" dog"), bpe)
    assert not any((*plain.spots, *plain.answers, *plain.foils))
    assert plain.fingerprint == asked.fingerprint
    assert tokenize(one(), bpe, Reading(positions="all")).fingerprint != plain.fingerprint
    assert Reading().label == "last"


@pytest.mark.parametrize("subject", ["dog", [9, 12]])
def test_a_subject_is_every_token_that_holds_a_character_of_it(bpe, subject):
    """By its text or by its characters; a token that it covers in half is taken whole."""
    tokens = tokenize(one(subject=subject), bpe, Reading(positions="subject"))
    assert patched_text(bpe, tokens).strip() == "dog"
    half = tokenize(one(subject=[11, 12]), bpe, Reading(positions="subject"))
    (at,) = half.spots[0]
    assert at == tokens.spots[0][-1]


def test_of_several_the_last_subject_before_the_decision_is_meant(bpe):
    """What stands behind the decision token is not read, and not patched."""
    prompts = one(text="a dog and a dog saw a dog", subject="dog", answer="dog")
    reading = Reading(decision_rule="before_answer", positions="subject")
    tokens = tokenize(prompts, bpe, reading)
    shown = bpe.decode(tokens.token_ids[0][: tokens.spots[0][-1] + 1])
    assert shown.removeprefix("<s>").strip() == "a dog and a dog"


def test_a_subject_of_a_chat_is_found_inside_its_template(bpe):
    """The span is of what the messages say; the template around it moves nothing."""
    reading = Reading(positions="subject")
    tokens = tokenize(one(messages=CHAT, subject="the river"), bpe, reading)
    assert patched_text(bpe, tokens).strip() == "the river"


def test_a_range_counts_back_from_the_decision_token(bpe):
    """-1 is the decision token, wherever the rule puts it."""
    for rule in ({}, {"decision_rule": "marker", "marker": "over"}):
        tokens = tokenize(one(), bpe, Reading(positions="-3..-2", **rule))
        n = len(tokens.token_ids[0])
        assert tokens.spots == ((n - 3, n - 2),)


def test_all_is_every_token_but_the_bos(bpe):
    """Those of the template too; of a prompt that is cut, what is left of it."""
    tokens = tokenize(one(messages=CHAT), bpe, Reading(positions="all"))
    assert tokens.spots == (tuple(range(1, len(tokens.token_ids[0]))),)
    cut = tokenize(one(), bpe, Reading(positions="all", max_tokens=5))
    assert cut.spots == ((1, 2, 3, 4),)


def test_spots_are_places_of_what_is_left_of_a_cut_prompt(bpe):
    """A subject near the end is found behind the cut, at the tokens of its own text."""
    reading = Reading(positions="subject", max_tokens=6)
    assert patched_text(bpe, tokenize(one(subject="river"), bpe, reading)).strip() == "river"


BAD = {
    "no subject": ({}, {"positions": "subject"}, "has no subject"),
    "not in the text": ({"subject": "cat"}, {"positions": "subject"}, "does not stand in"),
    "beyond the text": ({"subject": [3, 99]}, {"positions": "subject"}, "no span of its text"),
    "cut off": ({"subject": "lazy"}, {"positions": "subject", "max_tokens": 5}, "is cut off"),
    "behind": (
        {"subject": "river"},
        {"positions": "subject", "decision_rule": "marker", "marker": "dog"},
        "behind its decision token",
    ),
    "too far back": ({}, {"positions": "-99..-1"}, "too few for positions"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_place_that_is_not_there_is_refused_by_the_prompts_name(bpe, case):
    """One sentence, with the prompt's name, before anything is measured."""
    fields, reading, expected = BAD[case]
    said = refusal(tokenize, one(**fields), bpe, Reading(**reading))
    assert expected in said
    assert "'a'" in said
    assert said.count(". ") == 0


@pytest.mark.parametrize("subject", ["", [4], [4, 4], [5, 2], [-1, 3], [0, 1.5], [True, 2], 7, {}])
def test_a_subject_that_is_no_place_is_refused(subject):
    """Neither a text nor the two ends of a span."""
    assert "subject" in refusal(one, subject=subject)


@pytest.mark.parametrize("positions", ["-1..-4", "-2..0", "1..3", "-4", "last", ""])
def test_positions_that_do_not_exist_are_refused(positions):
    """The sentence names the value and what is allowed."""
    said = refusal(Reading, positions=positions)
    assert repr(positions) in said
    assert "decision, subject, all" in said


def test_positions_are_named_once(tiny_pair):
    """k_positions and positions together are one clear error, wherever they meet."""
    reading = Reading(positions="all")
    assert "k_positions 2" in refusal(RunConfig, reading=reading, patching=Patching(k_positions=2))
    pair = ModelPair(tiny_pair.base, tiny_pair.tuned, tiny_pair.prompts, reading=reading)
    assert "k_positions 3" in refusal(PairActivations, pair, k_positions=3)


# --- answers and foils


def test_an_answer_continues_the_prompt(bpe):
    """Behind the decision token, with the tokens that the whole text has there."""
    tokens = tokenize(one(answer=" opened", foil=" was"), bpe)
    whole = tokenize(one(text=TEXT + " opened"), bpe).token_ids[0]
    assert tokens.token_ids[0] + tokens.answers[0] == whole
    assert bpe.decode(tokens.foils[0]) == " was"


def test_before_an_answer_its_own_tokens_in_the_text_are_meant(bpe):
    """The foil takes its place there."""
    text = "a small library opened"
    reading = Reading(decision_rule="before_answer")
    tokens = tokenize(one(text=text, answer="opened", foil="was"), bpe, reading)
    whole, other = (
        tokenize(one(text=each), bpe).token_ids[0] for each in (text, text[:16] + "was")
    )
    assert tokens.token_ids[0] + tokens.answers[0] == whole
    assert tokens.token_ids[0] + tokens.foils[0] == other


def test_an_answer_that_changes_the_tokens_before_it_is_tokenized_alone(bpe):
    """Half a word that the vocabulary joins with the other half; the audit says so."""
    prompts = one(text="a small lib", answer="rary")
    tokens = tokenize(prompts, bpe)
    assert list(tokens.answers[0]) == bpe("rary", add_special_tokens=False)["input_ids"]
    assert "tokenized alone" in audit_text(audit_prompts(prompts, {"base": bpe, "tuned": bpe}))


def test_prompts_without_an_answer_have_none(bpe):
    """An empty place in the list beside those that have one."""
    prompts = PromptSet.of(
        [
            {"id": "a", "text": TEXT, "split": "val", "answer": " of"},
            {"id": "b", "text": "the edge", "split": "val"},
        ]
    )
    tokens = tokenize(prompts, bpe)
    assert tokens.answers[1] == ()
    assert not any(tokens.foils)


def test_an_answer_beyond_the_models_vocabulary_is_refused():
    """As a token of the prompt itself would be."""
    words = ("a", "b", "c", "d", "e", *"fghijklmnop")
    base = tiny_model()
    prompts = PromptSet.of([{"id": "x", "text": "a b", "split": "val", "answer": " z"}])
    pair = pair_of(base, base, prompts, words=(*words, "z"))
    pair.tuned.card.__dict__["d_vocab"] = 8
    assert "'x' has token 16" in refusal(pair.tokens, "tuned", "val")


# --- base and tuned


def on_tokenizers(base, tuned, prompts, reading):
    models = [LoadedModel.wrap(tiny_model(), each, source="memory") for each in (base, tuned)]
    return ModelPair(*models, prompts, reading=reading)


def test_both_models_patch_the_same_text(bpe, kazakh):
    """Other vocabularies: the same number of tokens of a subject, from its last one."""
    prompts, reading = one(subject=[30, 31]), Reading(positions="subject")
    pair = on_tokenizers(bpe, kazakh, prompts, reading)
    audit = pair.audit()
    assert audit.misaligned == ()
    read = audit.prompts[0].sides
    assert all(len(side.pieces["patched"].tokens) == 1 for side in read.values())


@pytest.mark.parametrize("positions", ["subject", "all", "-4..-1"])
def test_what_cannot_be_matched_is_refused_by_name(bpe, kazakh, positions):
    """With the fix; the audit finds it before, and a run may leave such prompts out."""
    prompts, reading = one(subject="dog"), Reading(positions=positions)
    (why,) = audit_prompts(prompts, {"base": bpe, "tuned": kazakh}, reading).prompts[0].problems
    assert "matched one to one" in why
    pair = on_tokenizers(bpe, kazakh, prompts, reading)
    assert refusal(pair.tokens, "tuned", "val") == f"prompt 'a': {why}."


def test_answers_are_compared_token_by_token_where_several_are(bpe, kazakh):
    """One token may differ; of several each must be the same text on both sides."""
    prompts = one(answer=" quietly", foil=" was")
    tokenizers = {"base": bpe, "tuned": kazakh}
    assert audit_prompts(prompts, tokenizers).misaligned == ()
    reading = Reading(answer_tokens=2)
    assert any(
        "token by token" in each
        for each in audit_prompts(prompts, tokenizers, reading).prompts[0].problems
    )


# --- the audit


def test_the_audit_shows_every_answer_foil_and_patched_token(bpe, kazakh):
    """As text, on both sides, with what was taken of them; and all of it as JSON."""
    prompts = one(answer=" quietly", foil=" quite", subject="dog")
    audit = audit_prompts(prompts, {"base": bpe, "tuned": kazakh}, Reading())
    shown = re.sub(" +", " ", audit_text(audit))
    for piece in ("answer", "foil", "patched"):
        assert re.search(rf"^a {piece} ", shown, re.MULTILINE)
    assert "subject, not patched" in shown
    assert "the first is compared" in shown
    assert "start with the same token" in shown
    side = json.loads(json.dumps(audit.to_dict()))["prompts"][0]["base"]
    assert "".join(side["answer"]["tokens"]) == " quietly"
    assert side["answer"]["how"] == "continued"
    assert "".join(side["patched"]["tokens"]).strip() == "dog"


def test_prompts_without_any_have_the_audit_of_before(bpe):
    """No second table, and no new key."""
    audit = audit_prompts(one(), {"base": bpe, "tuned": bpe})
    assert "piece" not in audit_text(audit)
    assert not {"answer", "foil", "patched"} & set(audit.to_dict()["prompts"][0]["base"])


# --- files and the command line


def test_a_csv_file_may_say_a_span(tmp_path):
    """Two numbers in brackets are a span, and any other cell is a text."""
    path = tmp_path / "prompts.csv"
    path.write_text('id,text,split,subject,foil\na,the dog,val,"[4, 7]", cat\nb,a dog,val,dog,\n')
    read = PromptSet.of(path)
    assert [prompt.subject for prompt in read] == [(4, 7), "dog"]
    assert [prompt.foil for prompt in read] == [" cat", None]
    assert PromptSet.of(read.to_dataframe()).prompts == read.prompts


BAD_OPTIONS = {
    "positions": (["--positions", "middle"], "positions = 'middle'"),
    "both": (["--positions", "all", "--k-positions", "2"], "k_positions 2"),
    "answer tokens": (["--answer-tokens", "0"], "answer_tokens = '0'"),
    "metric": (["--metric", "bleu"], "metric = 'bleu'"),
    "nothing to rank by": (["--rank-by", "metric"], "no metric to rank by"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_end_in_one_sentence(tmp_path, monkeypatch, capsys, case):
    """Exit code 2, and nothing is written."""
    options, expected = BAD_OPTIONS[case]
    out = tmp_path / "run"
    given = ["rq4lens", "run", "--pair", "etiquette", "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert expected in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    assert not out.exists()


def test_defaults_name_every_prompt_as_before():
    """A prompt that says nothing new has the fingerprint that it had."""
    prompts = random_prompts()
    assert all(len(prompt.read_values) == 8 for prompt in prompts)
    asked = one(foil=" x", subject="dog").prompts[0].read_values
    assert asked[8:] == (("foil", " x"), ("subject", "dog"))
