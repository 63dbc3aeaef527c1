"""The audit: what two models do not read alike is found, and what they read alike is not."""

import copy
import json
from dataclasses import replace

import pytest
from model_zoo import CORPUS, KAZAKH, train_tokenizer
from tokenizers import Tokenizer, normalizers, processors
from transformers import AutoTokenizer

from rq4lens.config import Reading
from rq4lens.models.prompts.audit import audit_prompts, lacking
from rq4lens.models.prompts.prompt_set import Prompt, PromptSet
from rq4lens.models.prompts.reading import ReadingLimits, tokenize
from rq4lens.models.prompts.record import Message, chat_text
from rq4lens.screen.audit import WIDTHS, audit_parts
from rq4lens.screen.terminal import text_of

TEXTS = ("A small library opened at the edge", "the lazy dog jumps over a river")
FAMILY = "👩\u200d👩\u200d👧"


def audit_text(*found, **how):
    return text_of(audit_parts(*found, **how), **WIDTHS)


@pytest.fixture(scope="module")
def bpe():
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


@pytest.fixture(scope="module")
def kazakh():
    return train_tokenizer(KAZAKH)


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def chat(*contents, name="c"):
    roles = ("system", "user", "assistant", "user")
    said = tuple(Message(role, content) for role, content in zip(roles, contents, strict=False))
    return Prompt(name, chat_text(said), "val", messages=said)


def plain(*texts, **asked):
    return tuple(Prompt(f"p{n}", text, "val", **asked) for n, text in enumerate(texts))


def audited(prompts, base, tuned, reading=None):
    """The audit, which must be of the tokens that a run would use."""
    audit = audit_prompts(PromptSet(tuple(prompts)), {"base": base, "tuned": tuned}, reading)
    json.dumps(audit.to_dict(), allow_nan=False)
    return audit


def only(audit):
    (prompt,) = audit.prompts
    return prompt


CHATS = (chat("Be brief.", "Where is the river?"), *plain(*TEXTS))


# --- what is alike


def test_one_tokenizer_reads_alike(bpe):
    """The same tokenizer on both sides aligns everywhere and has nothing to note."""
    audit = audited(CHATS, bpe, bpe)
    assert audit.share_aligned_pct == 100.0
    assert audit.misaligned == ()
    assert audit.warning is None
    assert all(not each.notes for each in audit.prompts)


def test_another_vocabulary_and_template_still_decide_at_one_place(bpe, kazakh):
    """Other tokens of the same text align: they end at the same character, whatever is around."""
    other = with_template(
        kazakh,
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    audit = audited(CHATS, bpe, other)
    assert audit.misaligned == ()
    for each in audit.prompts:
        assert each.sides["base"].text_end == each.sides["tuned"].text_end


def test_the_tokens_shown_are_those_that_are_read(bpe, kazakh):
    """Length, decision token and what is cut agree with the tokens that the models are given."""
    reading = Reading(decision_rule="marker", marker="library", max_tokens=6)
    prompts = PromptSet(plain(TEXTS[0]))
    audit = only(audited(prompts, bpe, kazakh, reading))
    for side, tokenizer in (("base", bpe), ("tuned", kazakh)):
        tokens = tokenize(prompts, tokenizer, reading)
        shown = audit.sides[side]
        assert shown.n_tokens == len(tokens.token_ids[0]) == 6
        assert shown.n_dropped == tokens.n_dropped[0] > 0
        assert shown.decision == tokenizer.decode(tokens.token_ids[0][-1:])


# --- six planted misalignments


def test_a_double_bos_is_found(bpe):
    """A template, or a text, that writes the BOS twice."""
    doubled = with_template(bpe, "{{ bos_token }}" + bpe.chat_template)
    assert only(audited(CHATS[:1], bpe, doubled)).problems == (
        "tuned: it starts with 2 BOS tokens",
    )
    assert only(audited(plain("<s><s>a mill"), bpe, bpe)).problems == (
        "both: it starts with 2 BOS tokens",
    )


def test_a_truncated_template_is_found(bpe):
    """A template that loses part of a message, and one whose start is cut off."""
    losing = with_template(bpe, bpe.chat_template.replace("['content']", "['content'][:9]"))
    said = only(audited(CHATS[:1], bpe, losing)).problems
    assert said == ("tuned: its chat template does not hold the messages as they were written",)
    (cut,) = only(audited(CHATS[:1], bpe, bpe, Reading(max_tokens=10))).problems
    assert cut.startswith("both: the start of its chat template is cut off")


def test_a_different_split_of_the_last_word_is_found(kazakh):
    """Where the tokens end apart the prompt does not align; where they end together it is noted."""
    (prompt,) = plain("the old library")
    words = train_tokenizer(vocabulary=600)
    apart = only(audited([prompt], words, kazakh, Reading(decision_rule="marker", marker="lib")))
    assert not apart.aligned
    assert "decided at different places: base after character 15 at ' library'" in apart.problems[0]
    together = only(audited([prompt], words, kazakh))
    assert together.aligned
    assert "the last word is split differently: base ends in ' library'" in together.notes[0]


@pytest.mark.parametrize("where", ["text", "tokenizer"])
def test_a_trailing_pad_is_found(bpe, where):
    """Padding in the text, or added by the tokenizer; `last_content` passes over it."""
    padding = copy.deepcopy(bpe)
    padding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <pad>", special_tokens=[("<s>", 0), ("<pad>", bpe.pad_token_id)]
    )
    text, tokenizer = ("a mill<pad>", bpe) if where == "text" else ("a mill", padding)
    said = only(audited(plain(text), bpe, tokenizer)).problems
    whose = "both" if where == "text" else "tuned"
    assert f"{whose}: padding '<pad>' stands among its tokens and is decided at it" in said
    assert (
        audited(plain(text), bpe, tokenizer, Reading(decision_rule="last_content")).misaligned == ()
    )


def test_a_missing_generation_prompt_is_found(bpe):
    """A template that ends with the user's words, not where the model is to answer."""
    silent = with_template(bpe, bpe.chat_template.partition("{% if add_gen")[0])
    said = only(audited(CHATS[:1], bpe, silent)).problems
    assert "tuned: its chat template adds no generation prompt" in said
    assert "tuned: it is decided at the end-of-text token '</s>'" in said


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role != 'assistant' %}[Q] {{ m.content }} [/Q]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>",
    ],
    ids=["a closing tag", "a header that is always written"],
)
def test_a_template_that_needs_no_generation_prompt_is_sound(bpe, template):
    """The model answers right where the text ends; behind its own closed turn it does not."""
    sound = with_template(bpe, "{{ bos_token }}" + template)
    assert only(audited(CHATS[:1], sound, sound)).aligned
    answered = chat("Be brief.", "Where?", "There.")
    silent = with_template(bpe, bpe.chat_template.partition("{% if add_gen")[0])
    said = only(audited([answered], silent, silent)).problems
    assert "both: its chat template adds no generation prompt" in said


@pytest.mark.parametrize(
    ("text", "reading", "said"),
    [
        (f"a {FAMILY} mill", {"offset": 2}, "cuts the character"),
        ("a 👍🏽 mill", {"offset": 2}, "cuts the character"),
        ("a 🇰🇿 mill", {"offset": 2}, "cuts the character"),
        ("a mill \ufffd", None, "decided at half a character"),
    ],
)
def test_an_emoji_cut_in_two_is_found(bpe, kazakh, text, reading, said):
    """Inside a joined emoji, before a skin tone, between the letters of a flag, or cut before."""
    rule = Reading(decision_rule="offset") if reading else None
    problems = only(audited(plain(text, **(reading or {})), bpe, kazakh, rule)).problems
    assert sum(each.startswith("both: ") and said in each for each in problems) == 1


def test_a_token_that_ends_inside_an_emoji_is_found():
    """Bytes of one emoji in several tokens: one that is decided at, or cut at, before the last."""
    merged = train_tokenizer(("🙂!",) * 9 + CORPUS, vocabulary=264)
    tokens = merged("a 🙂")["input_ids"]
    assert len(tokens) > 4  # the emoji is several tokens
    cut = only(audited(plain("a 🙂"), merged, merged, Reading(max_tokens=3)))
    assert cut.problems == ("both: the cut on the left goes through a character",)


def test_whole_emoji_align(bpe, kazakh):
    """A whole emoji is one character, however many tokens or code points it has."""
    texts = (f"a {FAMILY}", "a 👍🏽", "two flags 🇰🇿🇫🇷", "a 🙂", "e\u0301")
    assert audited(plain(*texts), bpe, kazakh).misaligned == ()
    flags = plain("🇰🇿🇫🇷 mill", offset=1)
    assert audited(flags, bpe, kazakh, Reading(decision_rule="offset")).misaligned == ()


# --- what else can go wrong


def test_text_and_template_are_different_places(bpe, kazakh):
    """One model decides at the last word, the other behind it in its template."""
    other = with_template(
        kazakh, "{{ bos_token }}{{ messages[0].content }}\n{{ messages[1].content }}: answer"
    )
    (problem,) = only(
        audited(CHATS[:1], bpe, other, Reading(decision_rule="last_content"))
    ).problems
    assert "base in the text" in problem
    assert "tuned in its chat template" in problem


def test_cuts_on_the_left_must_meet(bpe, kazakh):
    """So many tokens of each vocabulary are different stretches of text."""
    (problem,) = only(audited(plain(TEXTS[0]), bpe, kazakh, Reading(max_tokens=8))).problems
    assert "cut on the left at different places" in problem


def test_prompts_that_cannot_be_read_are_named(bpe):
    """A prompt without its marker is a finding with its reason, not the end of the audit."""
    audit = audited(plain(*TEXTS), bpe, bpe, Reading(decision_rule="marker", marker="library"))
    assert audit.misaligned == ("p1",)
    assert "the marker 'library' does not stand in prompt 'p1'" in audit.prompts[1].problems[0]
    assert audit.share_aligned_pct == 50.0


def test_a_template_that_follows_the_date_is_noted(bpe):
    """Its tokens change from day to day."""
    dated = with_template(bpe, "{{ strftime_now('%d') }}" + bpe.chat_template)
    assert audited(CHATS, bpe, dated).notes == (
        "the tuned chat template writes today's date: tokens change from day to day",
    )


# --- share, warning, text


@pytest.mark.parametrize(("n_bad", "warns"), [(0, False), (1, False), (2, True), (20, True)])
def test_less_than_95_percent_is_a_warning(bpe, n_bad, warns):
    """Of 20 prompts one may differ; the warning says how many and what to do."""
    texts = [f"{n} mills" + "<pad>" * (n < n_bad) for n in range(20)]
    audit = audited(plain(*texts), bpe, bpe)
    assert audit.share_aligned_pct == 100 * (20 - n_bad) / 20
    assert (audit.warning is not None) == warns
    if warns:
        assert f"only {20 - n_bad} of 20 prompts" in audit.warning


def test_a_cause_is_one_line(bpe):
    """However many prompts it holds for: their number, the first five, and what it is."""
    prompts = plain(*(f"{n} mills" + "<pad>" * (n > 1) for n in range(40)))
    audit = audited(prompts, bpe, bpe)
    (line,) = (each for each in audit_text(audit).splitlines() if each.startswith("DIFFERS: "))
    assert "38 prompts (p2, p3, p4, p5, p6 and 33 more): both: padding" in line
    assert "both: padding '<pad>' stands among its tokens" in audit.warning


def test_other_tokens_for_the_same_text_are_counted(bpe, kazakh):
    """Two vocabularies may align at every prompt, and be the same ids at none."""
    audit = audited(plain(TEXTS[0]), bpe, kazakh)
    assert audit.misaligned == ()
    assert audit.n_same_tokens == 0
    assert "0 of them are the same token ids for both models" in audit_text(audit)
    assert audited(plain(*TEXTS), bpe, bpe).n_same_tokens == 2


def test_what_a_run_refuses_is_found(bpe):
    """A prompt that one model cannot hold, and a split that every run needs."""
    prompts = PromptSet(plain(*TEXTS))
    short = ReadingLimits(n_ctx=3, d_vocab=10_000)
    audit = audit_prompts(prompts, {"base": bpe, "tuned": bpe}, None, {"tuned": short})
    assert audit.misaligned == ("p0", "p1")
    assert "but the tuned model reads at most 3" in audit.prompts[0].problems[0]
    assert lacking(prompts) == (
        "no prompt has split 'train', which a run needs: the splits are val",
    )


def test_leaving_out_every_prompt_is_not_enough(bpe):
    """Where nothing aligns there is nothing to measure, whatever is left out."""
    audit = audited(plain("a<pad>"), bpe, bpe)
    assert not replace(audit, excluded=audit.misaligned).enough


def test_a_tokenizer_that_is_not_its_file_is_said(tmp_path):
    """Transformers may make another tokenizer of tokenizer.json than the file describes."""
    saved = train_tokenizer()
    saved.save_pretrained(tmp_path)
    as_written = AutoTokenizer.from_pretrained(tmp_path)
    assert audited(plain(*TEXTS), as_written, as_written).warning is None
    text = (tmp_path / "tokenizer.json").read_text()
    own = Tokenizer.from_str(text)
    own.normalizer = normalizers.Lowercase()
    own.save(str(tmp_path / "tokenizer.json"))
    audit = audited(plain(*TEXTS), as_written, saved)
    assert [each.misread_by for each in audit.prompts] == [("base",), ()]
    assert audit.misaligned == ()
    assert "reads 1 of 2 prompts, as 'p0'," in audit.warning
    assert "the tokenizer.json of base stands for" in audit.warning


def test_the_text_names_every_prompt_that_differs(bpe):
    """Tokens around the decision token, where they end, and why a prompt does not align."""
    prompts = plain(*TEXTS, "a mill<pad>", *(f"{n} mills" for n in range(9)))
    text = audit_text(audited(prompts, bpe, bpe))
    assert "A| small| library" not in text  # only the last tokens are shown
    assert "[<pad>]" in text
    assert "padding" in text
    assert "11 of 12 prompts align (91.7%), decided by rule: last" in text
    assert "DIFFERS: 1 prompt (p2): both: padding" in text
    assert "6 more prompts are not shown; --all shows them." in text
    assert "WARNING" in text
    everything = audit_text(audited(prompts, bpe, bpe), every_prompt=True)
    assert all(each.id in everything for each in prompts)


def test_the_text_is_plain(bpe):
    """Control characters and markup of a prompt are shown, not obeyed."""
    text = audit_text(audited(plain("a [bold]\x1b[31mill\n"), bpe, bpe))
    assert "\x1b" not in text
    assert "\\n" in text
