"""Prompts from every format are the same prompts; what is missing is one sentence."""

import csv
import json

import datasets
import pytest

from rq4lens.errors import UserError
from rq4lens.models.prompts.prompt_set import Prompt, PromptSet
from rq4lens.models.prompts.record import Message

ROWS = [
    {"id": "a", "text": 'one, "two"\nthree', "split": "train", "group": "g", "offset": 3},
    {
        "id": "b",
        "text": "été 🙂",
        "split": "val",
        "answer": "🙂",
        "marker": "é",
        "content": "seasons",
    },
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
PROMPTS = (
    Prompt("a", 'one, "two"\nthree', "train", "g", offset=3),
    Prompt("b", "été 🙂", "val", answer="🙂", marker="é", content="seasons"),
)


def write_csv(path, rows, columns=None):
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def dataset_of(rows):
    """A dataset has every column in every row."""
    columns = dict.fromkeys(key for row in rows for key in row)
    return datasets.Dataset.from_list([{key: row.get(key) for key in columns} for row in rows])


def write_dataset(path, rows):
    dataset_of(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [("p.jsonl", write_jsonl), ("p.csv", write_csv), ("folder", write_dataset)],
)
def test_every_format_reads_as_the_same_prompts(tmp_path, name, write):
    """JSONL, CSV and a saved dataset with the same rows give the same prompts and fingerprint."""
    read = PromptSet.of(write(tmp_path / name, ROWS))
    assert read.prompts == PROMPTS
    assert read.fingerprint == PromptSet(PROMPTS).fingerprint


def test_lists_read_as_the_same_prompts():
    """A list of objects, a list of prompts, a dataset in memory and a set are one set."""
    wanted = PromptSet(PROMPTS)
    for source in (ROWS, list(PROMPTS), wanted, dataset_of(ROWS)):
        assert PromptSet.of(source) == wanted


def test_the_names_of_a_dataset_are_its_splits():
    """Splits of a dataset need no column, rows no id; other columns are kept as meta."""
    source = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([{"text": "one", "label": 3}]),
            "validation": datasets.Dataset.from_list([{"text": "two", "label": 4}]),
        }
    )
    assert PromptSet.of(source).prompts == (
        Prompt("train-0", "one", "train", meta={"label": 3}),
        Prompt("val-0", "two", "val", meta={"label": 4}),
    )


def test_columns_that_are_no_plain_values_are_left_alone():
    """A picture beside the text, which reading the row would open, is neither opened nor kept."""
    rows = {"text": ["one"], "image": [{"bytes": b"no picture", "path": None}], "label": [1]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    assert PromptSet.of({"val": dataset}).prompts == (
        Prompt("val-0", "one", "val", meta={"label": 1}),
    )


def test_plain_strings_are_prompts_of_a_named_split():
    """Strings by split, or a list of strings with its split."""
    both = PromptSet.of({"train": ["one"], "val": ["two"]})
    assert both.prompts == (Prompt("train-0", "one", "train"), Prompt("val-0", "two", "val"))
    assert PromptSet.of(["two"], split="val").prompts == both.split("val").prompts
    with pytest.raises(UserError, match="a list of plain strings says no split"):
        PromptSet.of(["two"])


@pytest.mark.parametrize(
    ("name", "write"),
    [("p.jsonl", write_jsonl), ("folder", write_dataset)],
)
def test_chats_are_read_from_files(tmp_path, name, write):
    """Messages arrive in order; the text of a chat is what is said in it."""
    rows = [{"id": "a", "messages": CHAT, "split": "val"}]
    (prompt,) = PromptSet.of(write(tmp_path / name, rows))
    assert prompt.messages == (Message("system", "Be brief."), Message("user", "Where?"))
    assert prompt.text == "Be brief.\nWhere?"


def test_chats_are_read_from_csv_as_json(tmp_path):
    """A cell of messages or meta holds JSON; an empty one says nothing."""
    rows = [
        {"id": "a", "messages": json.dumps(CHAT), "split": "val", "meta": '{"hops": 2}'},
        {"id": "b", "messages": "", "text": "plain", "split": "val", "meta": ""},
    ]
    chat, plain = PromptSet.from_csv(write_csv(tmp_path / "p.csv", rows))
    assert chat.messages == (Message("system", "Be brief."), Message("user", "Where?"))
    assert chat.meta == {"hops": 2}
    assert plain == Prompt("b", "plain", "val")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "x", "messages": CHAT}, "has both text and messages"),
        ({}, "has no string 'text'"),
        ({"messages": []}, "messages must be a list like"),
        ({"messages": "hello"}, "messages must be a list like"),
        ({"messages": [{"role": "user"}]}, "each message must have role and content"),
        ({"messages": [CHAT[0] | {"name": "x"}]}, "role and content, and nothing else"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "unknown role 'judge': allowed are"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of the user message must be"),
        ({"text": "x", "answer": ""}, "answer must be a string of the text"),
        ({"text": "x", "marker": 3}, "marker must be a string of the text"),
        ({"text": "x", "content": ""}, "content must say in a string"),
        ({"text": "x", "content": 3}, "content must say in a string"),
        ({"text": "x", "offset": -1}, "offset must be the index of a character"),
        ({"text": "x", "offset": True}, "offset must be the index of a character"),
    ],
)
def test_a_record_that_is_no_prompt_is_refused(record, said):
    """The sentence names the place and what it lacks, whatever the format."""
    with pytest.raises(UserError, match=f"prompt 0 of the list.*{said}"):
        PromptSet.of([{"id": "a", "split": "val"} | record])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,split\na,val\n", r"p\.csv has no column 'text'"),
        ("text,split\nx,val\n", r"p\.csv has no column 'id'"),
        ("", r"p\.csv has no column 'id'"),
        ("id,text,split\na,x,val,y\n", r"p\.csv:2 has more or fewer cells"),
        ("id,text,split\na,x\n", r"p\.csv:2 has more or fewer cells"),
        ('id,text,split\na,"x\n', r"p\.csv:\d is not CSV"),
        ("id,text,split\na,,val\n", r"p\.csv:2 has no string 'text'"),
        ("id,text,split,tekst\na,x,val,y\n", r"p\.csv:2 has unknown key 'tekst'"),
        ("id,text,split,offset\na,x,val,many\n", r"p\.csv:2: offset must be the index"),
        ("id,messages,split\na,hello,val\n", r"p\.csv:2, column 'messages', is not JSON"),
    ],
)
def test_a_csv_file_that_holds_no_prompts_is_refused(tmp_path, text, said):
    """The sentence names the line, or the column that is missing."""
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        PromptSet.of(path)


def test_a_folder_or_object_that_is_no_dataset_is_refused(tmp_path):
    """One sentence that says what to give instead."""
    with pytest.raises(UserError, match=r"is no Hugging Face dataset.*save_to_disk"):
        PromptSet.of(tmp_path)
    with pytest.raises(UserError, match="prompts cannot be a int"):
        PromptSet.of(3)
    with pytest.raises(UserError, match="the dataset has no column 'text'"):
        PromptSet.of(datasets.Dataset.from_list([{"prompt": "x"}]))
    with pytest.raises(UserError, match="row 0 is a int"):
        PromptSet.of({"val": [3]})


def test_what_a_prompt_asks_for_is_in_the_fingerprint():
    """Another answer, offset, marker or message is another set."""
    plain = Prompt("a", "x y", "val")
    others = [
        Prompt("a", "x y", "val", answer="y"),
        Prompt("a", "x y", "val", marker="y"),
        Prompt("a", "x y", "val", offset=1),
        Prompt("a", "x y", "val", messages=(Message("user", "x y"),)),
        Prompt("a", "x y", "val", messages=(Message("system", "x y"),)),
    ]
    assert len({PromptSet((each,)).fingerprint for each in (plain, *others)}) == 6
