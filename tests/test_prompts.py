"""Prompts: what a file must say, where it is cut, and how it is batched."""

import json
from dataclasses import replace

import pytest
import torch
from model_zoo import train_tokenizer
from tiny import random_prompts, word_tokenizer

from rq4lens.config import Reading
from rq4lens.errors import UserError
from rq4lens.models.prompts.prompt_set import Prompt, PromptSet, TokenizedPrompts
from rq4lens.models.prompts.reading import tokenize


def prompt(name="a", text="apple date", split="train", group=None):
    return Prompt(name, text, split, group)


def write(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bpe():
    """A byte-level tokenizer that puts `<s>` before every text."""
    return train_tokenizer()


# --- reading


def test_a_file_reads_as_it_was_written(tmp_path):
    """Every key arrives; group and meta may be left out; blank lines say nothing."""
    path = write(
        tmp_path / "p.jsonl",
        {"id": "a", "text": "apple", "split": "train", "group": "g", "meta": {"hops": 2}},
        {"id": "b", "text": "été\u2028date\x0c", "split": "val"},
    )
    path.write_text(path.read_text() + "\n\n")
    read = PromptSet.from_jsonl(path)
    assert read.prompts == (
        Prompt("a", "apple", "train", "g", {"hops": 2}),
        Prompt("b", "été\u2028date\x0c", "val"),
    )


@pytest.mark.parametrize("line_break", ["\u2028", "\x85", "\x0c"])
def test_only_a_newline_ends_a_line(tmp_path, line_break):
    """JSON allows Unicode line separators unescaped inside a text; they end no record."""
    path = tmp_path / "p.jsonl"
    record = {"id": "a", "text": f"apple{line_break}date", "split": "train"}
    text = json.dumps(record, ensure_ascii=False).replace("\\f", "\\u000c")
    path.write_text(text, encoding="utf-8")
    assert PromptSet.from_jsonl(path).texts == (record["text"],)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"p\.jsonl:1 is not JSON"),
        ("[1]", r"p\.jsonl:1 is not an object"),
        ('{"id": "a", "split": "train"}', "no string 'text'"),
        ('{"id": 3, "text": "x", "split": "train"}', "no string 'id'"),
        ('{"id": "a", "text": "x"}', "no string 'split'"),
        ('{"id": "a", "text": "x", "split": "val", "label": 1}', "unknown key 'label'"),
        ('{"id": "a", "text": "x", "split": "val", "group": 1}', "group must be a string"),
        ('{"id": "a", "text": "x", "split": "val", "meta": []}', "meta an object"),
        ('{"id": "a", "text": "  ", "split": "val"}', "prompt 'a' has an empty text"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused(tmp_path, line, said):
    """The sentence names the line and what it lacks."""
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=said):
        PromptSet.from_jsonl(path)


def test_a_missing_file_is_said(tmp_path):
    """A wrong path is one sentence."""
    with pytest.raises(UserError, match=r"nowhere\.jsonl.*does not exist"):
        PromptSet.from_jsonl(tmp_path / "nowhere.jsonl")


# --- splits and leaks


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([prompt("a"), prompt("a", "fig")], "id 'a' stands more than once"),
        (
            [prompt("a"), prompt("b", split="val")],
            r"'a' \(train\) and 'b' \(val\) share their text",
        ),
        (
            [prompt("a", group="g"), prompt("b", "fig", "val", "g")],
            r"'a' \(train\) and 'b' \(val\) share their group",
        ),
        ([prompt("b", split="val"), prompt("a")], "share their text"),
    ],
)
def test_what_maps_are_judged_by_they_were_not_fitted_on(prompts, said):
    """A text or group in both train and val, or an id used twice, is refused."""
    with pytest.raises(UserError, match=said):
        PromptSet(tuple(prompts))


def test_other_splits_may_share_texts_and_groups():
    """Neutral prompts may repeat what is elsewhere: nothing is fitted on them."""
    PromptSet((prompt("a", group="g"), prompt("b", split="neutral", group="g")))


def test_prompts_without_a_group_are_groups_of_their_own():
    """Paraphrases share a group; everything else is its own, named by its id."""
    prompts = PromptSet((prompt("a", group="g"), prompt("b", "fig", group="g"), prompt("c", "elm")))
    assert prompts.groups == ("g", "g", "c")


def test_what_prompts_are_about_is_carried_and_not_read():
    """Contents follow the prompts; naming them makes no other set, as models do not read them."""
    prompts = PromptSet((replace(prompt("a"), content="Peru"), prompt("b", "fig")))
    assert prompts.contents == ("Peru", None)
    assert prompts.without(["a"]).contents == (None,)
    assert prompts.fingerprint == PromptSet((prompt("a"), prompt("b", "fig"))).fingerprint


def test_a_split_keeps_the_order_of_the_file():
    """Splitting picks prompts and changes nothing about them."""
    prompts = random_prompts()
    val = prompts.split("val")
    assert val.ids == tuple(p.id for p in prompts.prompts if p.split == "val")
    assert prompts.splits == ("train", "val")
    with pytest.raises(UserError, match="no prompt has split 'test': the splits are train, val"):
        prompts.split("test")


@pytest.mark.parametrize(
    "other",
    [
        [prompt("b")],
        [prompt(text="fig")],
        [prompt(split="val")],
        [prompt(group="g")],
        [prompt(), prompt("b", "fig")],
    ],
)
def test_the_fingerprint_is_of_everything_that_matters(other):
    """Another id, text, split, group or number of prompts is another fingerprint."""
    assert PromptSet((prompt(),)).fingerprint == PromptSet((prompt(),)).fingerprint
    assert PromptSet((prompt(),)).fingerprint != PromptSet(tuple(other)).fingerprint


def test_the_fingerprint_knows_the_order():
    """Per-prompt numbers are stored in prompt order, so another order is another set."""
    one, other = prompt("a"), prompt("b", "fig")
    assert PromptSet((one, other)).fingerprint != PromptSet((other, one)).fingerprint


# --- the decision token


def test_the_last_token_decides():
    """`last` keeps every token: the decision token is the last one."""
    tokens = tokenize(PromptSet((prompt(text="bread date elm"),)), word_tokenizer())
    assert tokens.token_ids == ((1, 3, 4),)


def test_the_last_content_token_decides(bpe):
    """`last_content` cuts after the last token that is no special one."""
    texts = PromptSet((prompt(text="a library</s></s>"), prompt("b", "a mill")))
    last, content = (
        tokenize(texts, bpe, Reading(decision_rule=rule)) for rule in ("last", "last_content")
    )
    assert last.token_ids[0][-2:] == (bpe.eos_token_id,) * 2
    assert content.token_ids[0] == last.token_ids[0][:-2]
    assert content.token_ids[1] == last.token_ids[1]


def test_a_prompt_of_special_tokens_alone_is_refused(bpe):
    """There is nothing to decide at."""
    with pytest.raises(UserError, match="prompt 'a' has no token to decide at"):
        tokenize(PromptSet((prompt(text="<s></s>"),)), bpe, Reading(decision_rule="last_content"))


def test_a_rendered_prompt_is_not_given_a_second_bos(bpe):
    """A text gets one BOS; a rendered chat template brings its own and gets no other."""
    chat = bpe.apply_chat_template(
        [{"role": "user", "content": "the river"}], tokenize=False, add_generation_prompt=True
    )
    tokens = tokenize(PromptSet((prompt(text=chat), prompt("b", "the river"))), bpe)
    for row in tokens.token_ids:
        assert row[0] == bpe.bos_token_id
        assert row.count(bpe.bos_token_id) == 1
    assert bpe.decode(tokens.token_ids[0]) == chat


# --- batches


@pytest.fixture(scope="module")
def tokens():
    return tokenize(random_prompts().split("train"), word_tokenizer())


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_hold_every_prompt_once(tokens, batch_size, padding_side):
    """Each row is its prompt, filled up on the named side; the mask says which part is padding."""
    seen = []
    for batch in tokens.batches(batch_size, padding_side):
        assert len(batch.rows) <= batch_size
        for index, row in enumerate(batch.rows.tolist()):
            seen.append(row)
            kept = batch.tokens[index][batch.attention_mask[index].bool()]
            assert tuple(kept.tolist()) == tokens.token_ids[row]
            steps = batch.attention_mask[index].diff()
            assert (steps <= 0).all() if padding_side == "right" else (steps >= 0).all()
    assert sorted(seen) == list(range(len(tokens)))


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_the_decision_index_is_the_last_token(tokens, padding_side):
    """The token at the decision index is the prompt's last one, whichever side is padded."""
    for batch in tokens.batches(7, padding_side):
        picked = batch.tokens[torch.arange(len(batch.rows)), batch.decision]
        assert picked.tolist() == [tokens.token_ids[row][-1] for row in batch.rows]
        lengths = [len(tokens.token_ids[row]) for row in batch.rows]
        assert batch.lengths.tolist() == lengths


def test_batches_waste_little_padding(tokens):
    """Prompts of similar length share a batch: lengths never fall from one to the next."""
    lengths = [length for batch in tokens.batches(5) for length in batch.lengths.tolist()]
    assert lengths == sorted(lengths)


def test_the_token_fingerprint_is_of_ids_and_tokens():
    """Another token, another cut or another id is another fingerprint."""
    fingerprints = {
        TokenizedPrompts(ids, tokens).fingerprint
        for ids, tokens in [
            (("a", "b"), ((1, 2), (3,))),
            (("a", "b"), ((1,), (2, 3))),
            (("a", "b"), ((1, 2), (4,))),
            (("a", "c"), ((1, 2), (3,))),
        ]
    }
    assert len(fingerprints) == 4
