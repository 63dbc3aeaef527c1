"""Reading: one template, one tokenization, one BOS, one decision token."""

import copy
from itertools import pairwise

import pytest
from model_zoo import CORPUS, KAZAKH, train_tokenizer
from tiny import word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rq4lens.config import Reading
from rq4lens.errors import UserError
from rq4lens.models.prompts.prompt_set import Prompt, PromptSet
from rq4lens.models.prompts.reading import read_prompt, tokenize
from rq4lens.models.prompts.record import Message, chat_text

TEXT = "A small library opened at the edge of the town."


def chat(*contents, **more):
    roles = ("system", "user", "assistant", "user")
    said = tuple(Message(role, content) for role, content in zip(roles, contents, strict=False))
    return Prompt("a", chat_text(said), "val", messages=said, **more)


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def trimming(tokenizer):
    """The same tokenizer with spans that leave whitespace out, as those of Llama 3 do."""
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    return other


def sentence_piece_like():
    """A tokenizer that writes spaces as ▁ and puts one first, as those of Llama 2 and Gemma do."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator([*CORPUS, TEXT, "🙂\n\t:"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer()


@pytest.fixture(scope="module")
def tokenizers(bpe):
    """Tokenizers that split and count in different ways."""
    return {
        "english": bpe,
        "kazakh": train_tokenizer(KAZAKH),
        "spans without spaces": trimming(bpe),
        "spaces as letters": sentence_piece_like(),
    }


KINDS = ("english", "kazakh", "spans without spaces", "spaces as letters")


def read(text, tokenizer, rule, shared=None, **asked):
    return read_prompt(
        Prompt("a", text, "val", **asked), tokenizer, Reading(decision_rule=rule, marker=shared)
    )


def read_text(each):
    """What a model has read when it decides."""
    return each.rendered.text[: each.spans[each.decision][1]]


# --- chats


def test_a_chat_is_what_hugging_face_makes_of_it(bpe):
    """Rendered and tokenized by us is rendered and tokenized by the library in one go."""
    prompt = chat("Be brief.", "the river", "a mill", "and the town?")
    (tokens,) = tokenize(PromptSet((prompt,)), bpe).token_ids
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    expected = bpe.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(tokens) == expected
    assert tokens.count(bpe.bos_token_id) == 1


def test_a_template_without_bos_is_given_none(bpe):
    """The template holds all special tokens of a chat, as where the library tokenizes it."""
    bare = with_template(bpe, bpe.chat_template.replace("{{ bos_token }}", ""))
    prompts = PromptSet((chat("Be brief.", "the river"),))
    (with_bos,), (without,) = (tokenize(prompts, each).token_ids for each in (bpe, bare))
    assert with_bos == (bpe.bos_token_id, *without)


def test_a_second_bos_is_refused(bpe):
    """Two BOS tokens at the start are said, from a text or a template."""
    doubled = with_template(bpe, "{{ bos_token }}" + bpe.chat_template)
    for prompt, tokenizer in ((chat("x", "y"), doubled), (Prompt("a", "<s><s>x", "val"), bpe)):
        with pytest.raises(UserError, match="prompt 'a' starts with '<s>' more than once"):
            tokenize(PromptSet((prompt,)), tokenizer)


def test_what_a_template_refuses_is_one_sentence(bpe):
    """No template, or one that raises."""
    strict = with_template(bpe, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"refuses prompt 'a' \(roles must alternate\)"):
        tokenize(PromptSet((chat("x", "y"),)), strict)
    with pytest.raises(UserError, match=r"prompt 'a' is a chat, but .* has no chat template"):
        tokenize(PromptSet((chat("x", "y"),)), with_template(bpe, None))


def test_templates_are_told_one_date(bpe):
    """A template that asks for the date gets the same one every day."""
    dated = with_template(bpe, "{{ date_string }}{{ messages[0].content }}")
    assert "26 Jul 2024" in read_prompt(chat("x"), dated, Reading()).rendered.text


@pytest.mark.parametrize("content", ["user", "{{ x }}", "</s>", "a\n\nb", "mill mill", " padded "])
@pytest.mark.parametrize("trims", [True, False])
def test_messages_are_found_in_their_template(bpe, content, trims):
    """Each message is where its own letters are, also if it is a word of the template."""
    filled = bpe.chat_template.replace("content']", "content'] | trim") if trims else None
    tokenizer = with_template(bpe, filled) if trims else bpe
    prompt = chat("Be brief.", content, "mill", content)
    rendered = read_prompt(prompt, tokenizer, Reading()).rendered
    for part in rendered.parts:
        found = rendered.text[part.rendered : part.rendered + part.length]
        assert found == prompt.text[part.text : part.text + part.length]
    lengths = [len(m.content.strip() if trims else m.content) for m in prompt.messages]
    assert [part.length for part in rendered.parts] == lengths
    assert rendered.place(len(rendered.text)) == (
        rendered.parts[-1].text + rendered.parts[-1].length,
        True,
    )


def test_a_template_that_changes_a_message_has_no_places(bpe):
    """Without the message's own letters no character can be found, and that is said."""
    shouting = with_template(bpe, "{{ messages[1].content | upper }}")
    prompt = chat("x", "the river", marker="river")
    assert read_prompt(prompt, shouting, Reading()).decision_end is None
    with pytest.raises(UserError, match="does not hold the messages of prompt 'a'"):
        read_prompt(prompt, shouting, Reading(decision_rule="marker"))


# --- decision rules


@pytest.mark.parametrize("kind", KINDS)
def test_a_marker_is_found_in_every_tokenization(tokenizers, kind):
    """The token that holds the marker's last character decides, at its last occurrence."""
    each = read("the town, the town: here", tokenizers[kind], "marker", "town")
    start, stop = each.spans[each.decision]
    assert start <= 17 < stop
    assert each.kept == each.tokens[: each.decision + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompts_own_marker_wins(tokenizers, kind):
    """A marker of the prompt replaces the one that all share."""
    own = read(TEXT, tokenizers[kind], "marker", "town", marker="library")
    assert own.decision == read(TEXT, tokenizers[kind], "marker", "library").decision


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", range(0, len(TEXT), 5))
def test_an_offset_is_the_token_that_holds_it(tokenizers, kind, offset):
    """Of all tokens exactly the decision token holds the character."""
    each = read(TEXT, tokenizers[kind], "offset", offset=offset)
    holding = [n for n, span in enumerate(each.spans) if span and span[0] <= offset < span[1]]
    assert holding == [each.decision]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["town", "library", "🙂"])
def test_the_token_before_the_answer_knows_nothing_of_it(tokenizers, kind, answer):
    """The decision token ends where the answer's first token, with its space, begins."""
    text = f"{TEXT} Where? The {answer} ?"
    each = read(text, tokenizers[kind], "before_answer", answer=answer)
    at = text.rindex(answer)
    assert at - 1 <= len(read_text(each)) <= at
    assert each.spans[each.decision + 1][1] > at


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_a_text_cover_it(tokenizers, kind):
    """Spans follow each other without a gap or overlap, whitespace included."""
    text = "A  small library.\n\nOpened at the\tedge "
    spans = [span for span in read(text, tokenizers[kind], "last").spans if span is not None]
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    assert all(one[1] == other[0] for one, other in pairwise(spans))


def test_spans_without_whitespace_stay_so_where_no_token_has_it():
    """A tokenizer that throws spaces away has tokens of letters alone."""
    each = read("bread  date elm", word_tokenizer(), "last")
    assert each.spans == ((0, 5), (7, 11), (12, 15))


def test_markers_of_a_chat_are_found_in_its_messages(bpe):
    """A word of the template is no marker; one of a message is, whatever the template."""
    other = with_template(bpe, "[{{ messages[0].content }}] ({{ messages[1].content }}) user:")
    prompt = chat("the user reads", "the river and the mill")
    for tokenizer in (bpe, other):
        each = read_prompt(prompt, tokenizer, Reading(decision_rule="marker", marker="user"))
        assert read_text(each).endswith("the user")
        assert each.decision_end == (8, False)


@pytest.mark.parametrize(
    ("rule", "asked", "said"),
    [
        ("marker", {}, "prompt 'a' has no marker"),
        ("marker", {"marker": "mill"}, "the marker 'mill' does not stand in prompt 'a'"),
        ("before_answer", {}, "prompt 'a' has no answer"),
        ("before_answer", {"answer": "mill"}, "the answer 'mill' does not stand in prompt 'a'"),
        ("before_answer", {"answer": "A small"}, "prompt 'a' starts with its answer"),
        ("offset", {}, "prompt 'a' has no offset"),
        ("offset", {"offset": 99}, "offset 99 of prompt 'a' lies behind its text of 47 characters"),
    ],
)
def test_what_cannot_be_decided_is_one_sentence(bpe, rule, asked, said):
    """The sentence names the prompt and what it lacks."""
    with pytest.raises(UserError, match=said):
        read(TEXT, bpe, rule, **asked)


def test_a_marker_without_its_rule_is_refused():
    """A marker that nothing looks for would be silently ignored."""
    with pytest.raises(UserError, match="marker 'x' is given, but the decision rule is 'last'"):
        Reading(decision_rule="last", marker="x")
    with pytest.raises(UserError, match="the marker is empty"):
        Reading(decision_rule="marker", marker="")


def test_a_slow_tokenizer_has_no_characters():
    """Rules of characters need spans; the others do without."""

    class Slow:
        is_fast, bos_token, bos_token_id = False, None, None
        all_special_ids, added_tokens_decoder = (), {}

        def __call__(self, text, **_):
            return {"input_ids": [ord(letter) for letter in text]}

    assert read("ab", Slow(), "last_content").kept == (97, 98)
    with pytest.raises(UserError, match="needs a tokenizer that tells the characters"):
        read("ab", Slow(), "marker", "a")


def test_every_special_token_is_outside_the_content(bpe):
    """`last_content` passes over role tokens too, not only BOS and EOS."""
    prompt = chat("Be brief.", "the river")
    each = read_prompt(prompt, bpe, Reading(decision_rule="last_content"))
    assert read_text(each).endswith("the river")
    assert each.decision_end == (len(prompt.text), False)


# --- truncation


@pytest.mark.parametrize("most", [1, 2, 5, 99])
def test_long_prompts_lose_their_start_but_not_their_bos(bpe, most):
    """At most so many tokens are left: the BOS and the last ones; the rest is counted."""
    prompts = PromptSet((Prompt("a", TEXT, "val"),))
    (whole,) = tokenize(prompts, bpe).token_ids
    cut = tokenize(prompts, bpe, Reading(max_tokens=most))
    (tokens,) = cut.token_ids
    assert len(tokens) == min(len(whole), max(most, 2))
    assert tokens[0] == bpe.bos_token_id
    assert tokens[1:] == whole[len(whole) - len(tokens) + 1 :]
    assert cut.n_dropped == (len(whole) - len(tokens),)


def test_the_cut_is_made_before_the_decision_token(bpe):
    """What stands behind the decision token takes no room."""
    each = read_prompt(
        Prompt("a", TEXT, "val"),
        bpe,
        Reading(decision_rule="marker", marker="library", max_tokens=4),
    )
    assert len(each.kept) == 4
    assert each.kept[-1] == each.tokens[each.decision]


def test_the_label_tells_every_reading_apart():
    """Rule, marker and length are in what results call the rule."""
    readings = [
        Reading(),
        Reading(decision_rule="last_content"),
        Reading(decision_rule="marker"),
        Reading(decision_rule="marker", marker="x"),
        Reading(decision_rule="marker", marker="y"),
        Reading(max_tokens=3),
        Reading(max_tokens=4),
    ]
    assert len({each.label for each in readings}) == len(readings)
    assert readings[0].label == "last"


def test_words_of_a_word_tokenizer_are_found():
    """A tokenizer without BOS, spaces or bytes has the same rules."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    each = read("bread date elm fig", tokenizer, "before_answer", answer="elm")
    assert tokenizer.decode(each.kept) == "bread date"
