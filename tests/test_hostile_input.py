"""Input that means harm, or is merely broken: a value or one clear sentence, never a surprise."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fuzz_readers import small_grid, small_run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from synthetic import resampled
from tiny import Address, pair_of, stored_map, tiny_model, word_tokenizer

from rq4lens.analysis.analyse import analyse
from rq4lens.analysis.effects.table import records
from rq4lens.analysis.rankings.file import read_ranking
from rq4lens.analysis.saved import read_run, write_grid, write_run
from rq4lens.config import RunConfig, config_from, read_config
from rq4lens.disk.files import canonical_json, parse_json, read_json, write_json_atomic
from rq4lens.disk.store import Store, content_key
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.models.prompts.prompt_set import Prompt, PromptSet
from rq4lens.models.prompts.reading import tokenize
from rq4lens.patching.maps.map import LayerMap, load_map

pytestmark = pytest.mark.hostile


def refusal(read, *arguments) -> str:
    """The sentence with which something is refused; it can be printed on any terminal."""
    with pytest.raises(UserError) as caught:
        read(*arguments)
    sentence = str(caught.value)
    assert sentence.isprintable(), "the sentence would act on the terminal"
    assert len(sentence) < 1000
    return sentence


# Prompt files


def row(**changes) -> dict:
    return {"id": "a", "text": "x y", "split": "train"} | changes


def lines(*rows) -> bytes:
    return "\n".join(json.dumps(each, ensure_ascii=False) for each in rows).encode()


KEPT_TEXTS = {
    "NUL": "before\0after",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "template": "{{ 7*7 }} {% include '/etc/passwd' %}",
    "right to left": "abc \u202e cba \u200f\u2066",
    "line separators": "a\u2028b\u2029c\x0bd\x0ce\x85f\x1cg",
    "carriage return": "a\r\nb",
    "terminal escapes": "\x1b[31mred\x1b]0;title\x07",
    "emoji": "👩‍👩‍👧 é \u0301",
    "1 MB": "word " * 200_000,
    "path": "../../etc/passwd",
    "shell": "$(rm -rf /); `id` | & ;",
    "format string": "%s%n {0} {x.__class__}",
    "rich markup": "[bold red]x[/bold red] [link=file:///etc]y[/link]",
    "numbers": "1e999 NaN -0",
    "byte order mark inside": "a\ufeffb",
}


@pytest.mark.parametrize("text", KEPT_TEXTS.values(), ids=KEPT_TEXTS.keys())
def test_any_text_is_kept_letter_for_letter(tmp_path, text):
    """A prompt is data: nothing in it is cut, split, escaped or obeyed."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(lines(row(text=text), row(id="b", split="val")))
    assert PromptSet.from_jsonl(path).texts == (text, "x y")


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n", ""])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path, ending, start):
    """Files of any editor read the same."""
    path = tmp_path / "p.jsonl"
    text = start + json.dumps(row()) + (ending or "\n") + json.dumps(row(id="b")) + ending
    path.write_bytes(text.encode())
    assert PromptSet.from_jsonl(path).ids == ("a", "b")


BROKEN_PROMPTS = {
    "UTF-16": (lines(row()).decode().encode("utf-16"), "UTF-8"),
    "Latin-1": (lines(row(text="é")).decode().encode("latin-1"), "UTF-8"),
    "cut inside a character": (lines(row(text="é"))[:-20], "UTF-8|JSON"),
    "binary": (os.urandom(3) + b"\xff\xfe\x00\x01", "UTF-8"),
    "not JSON": (b"hello", "JSON"),
    "cut off": (lines(row())[:-3], "JSON"),
    "NaN": (b'{"id": "a", "text": "x", "split": "val", "meta": {"x": NaN}}', "JSON"),
    "overflow": (b'{"id": "a", "text": "x", "split": "val", "meta": {"x": 1e999}}', "JSON"),
    "deep nesting": (b"[" * 100_000, "JSON"),
    "deep meta": (b'{"meta": ' + b'{"a":' * 50_000, "JSON"),
    "huge number": (b'{"id": ' + b"1" * 5000 + b"}", "JSON"),
    "a list": (b"[1, 2]", "not an object"),
    "a number": (b"7", "not an object"),
    "no id": (lines({"text": "x", "split": "val"}), "no string 'id'"),
    "no text": (lines({"id": "x", "split": "val"}), "no string 'text'"),
    "no split": (lines({"id": "x", "text": "val"}), "no string 'split'"),
    "id of another type": (lines(row(id=7)), "no string 'id'"),
    "text of another type": (lines(row(text=["x"])), "no string 'text'"),
    "split of another type": (lines(row(split=None)), "no string 'split'"),
    "group of another type": (lines(row(group=3)), "group must be a string"),
    "meta of another type": (lines(row(meta="x")), "meta an object"),
    "unknown key": (lines(row(tekst="x")), "unknown key 'tekst'"),
    "hostile key": (lines(row(**{"\u202e\x1b[31m" * 50: "x"})), "unknown key"),
    "empty text": (lines(row(text="")), "empty text"),
    "blank text": (lines(row(text=" \t\u00a0")), "empty text"),
    "empty id": (lines(row(id="")), "0 characters"),
    "endless id": (lines(row(id="x" * 100_000)), "100000 characters"),
    "repeated id": (lines(row(), row(text="z")), "stands more than once"),
    "hostile repeated id": (lines(row(id="\u202e\x1b"), row(id="\u202e\x1b")), "more than once"),
    "text in both splits": (lines(row(), row(id="b", split="val")), "share their text"),
    "group in both splits": (
        lines(row(group="g"), row(id="b", text="other", split="val", group="g")),
        "share their group",
    ),
    "half a character": (b'{"id": "a", "text": "\\ud800", "split": "val"}', "half a character"),
    "half a character in the id": (b'{"id": "\\udfff", "text": "x", "split": "val"}', "half a"),
    "half a character in the group": (
        b'{"id": "a", "text": "x", "split": "val", "group": "\\ud800"}',
        "half a",
    ),
}


@pytest.mark.parametrize(("content", "said"), BROKEN_PROMPTS.values(), ids=BROKEN_PROMPTS.keys())
def test_a_broken_prompt_file_is_refused_in_one_sentence(tmp_path, content, said):
    """The sentence says what is wrong, and prints on any terminal."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        PromptSet.from_jsonl(path)
    refusal(PromptSet.from_jsonl, path)


BROKEN_TABLES = {
    "NUL and a column too many": b"id,text,split\na,\x00,val,\n",
    "a field beyond csv's limit": b"id,text,split\na," + b"x" * 200_000 + b",val\n",
    "quotes that do not match": b'id,text,split\n"""",",\n",,\n',
    "a column twice": b"id,text,split,id\na,x,val,b\n",
    "deep nesting in a cell": b"id,messages,split\na," + b"[" * 100_000 + b",val\n",
    "half a character in a cell": "id,text,split\na,\ud800,val\n".encode("utf-8", "surrogatepass"),
} | {f"not a table: {name}": content for name, (content, _) in BROKEN_PROMPTS.items()}


@pytest.mark.parametrize("content", BROKEN_TABLES.values(), ids=BROKEN_TABLES.keys())
def test_a_broken_csv_file_is_refused_in_one_sentence(tmp_path, content):
    """Whatever the file holds, it is prompts or one sentence; none of these is prompts."""
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    refusal(PromptSet.from_csv, path)


def directory(path: Path) -> Path:
    path.mkdir()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def symlink_loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


def dangling_symlink(path: Path) -> Path:
    path.symlink_to(path.with_name("nowhere"))
    return path


def read_two_heads(path: Path):
    return read_ranking(path, n_heads=2, layer=1)


ODD_PATHS = {
    "missing": lambda path: path,
    "a directory": directory,
    "a pipe": pipe,
    "a symlink to itself": symlink_loop,
    "a dangling symlink": dangling_symlink,
    "a NUL in the name": lambda path: Path(f"{path}\0x"),
    "an endless name": lambda path: path.with_name("x" * 300),
    "a device": lambda _path: Path("/dev/zero"),
    "a hostile name": lambda path: path.with_name("\u202e\x1b[31m"),
}


@pytest.mark.parametrize("make", ODD_PATHS.values(), ids=ODD_PATHS.keys())
@pytest.mark.parametrize(
    "read",
    [
        *(PromptSet.from_jsonl, PromptSet.from_csv, PromptSet.of),
        *(read_json, read_config, load_map, read_run, read_two_heads),
    ],
    ids=lambda read: read.__qualname__,
)
def test_what_is_no_file_is_refused_in_one_sentence(tmp_path, read, make):
    """Whatever stands where a file should be: no reader hangs, follows it or shows a traceback."""
    refusal(read, make(tmp_path / "input"))


def test_an_empty_prompt_file_says_which_split_is_missing(tmp_path):
    """No prompts is not a crash later on: the first use of a split says so."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no prompt has split 'val'"):
        PromptSet.from_jsonl(path).split("val")


@pytest.mark.parametrize("text", KEPT_TEXTS.values(), ids=KEPT_TEXTS.keys())
def test_any_text_can_be_tokenized(text):
    """Tokenizing hostile text gives tokens that end in the decision token."""
    tokens = tokenize(PromptSet((Prompt("a", text, "val"),)), word_tokenizer())
    assert len(tokens.token_ids[0]) >= 1


def test_a_prompt_longer_than_the_context_is_refused():
    """A prompt that does not fit the model is said, with its id, before anything is computed."""
    model = tiny_model()
    fits = Prompt("fits", " ".join(["apple"] * model.cfg.n_ctx), "val")
    long = Prompt("too long", " ".join(["apple"] * (model.cfg.n_ctx + 1)), "train")
    pair = pair_of(model, model, PromptSet((fits, long)))
    assert len(pair.tokens("base", "val")) == 1
    with pytest.raises(UserError, match="'too long' has 17 tokens"):
        pair.tokens("base", "train")


# Head sets


@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
@settings(max_examples=300, deadline=None)
def test_every_head_set_reads_back_from_its_own_spelling(case):
    """Writing and reading a head set is the identity."""
    n_heads, indices = case
    heads = HeadSet.of(indices, n_heads)
    assert HeadSet.parse(str(heads), n_heads) == heads


@given(st.lists(st.integers(0, 31), min_size=1, max_size=40), st.randoms())
@settings(max_examples=200, deadline=None)
def test_order_repetition_and_blanks_do_not_matter(indices, rng):
    """Two specs that name the same heads give equal sets."""
    shuffled = indices + indices[:3]
    rng.shuffle(shuffled)
    spec = " , ".join(map(str, shuffled))
    assert HeadSet.parse(spec, 32) == HeadSet.of(indices, 32)


@given(st.text(max_size=30))
@settings(max_examples=500, deadline=None)
def test_any_text_is_a_head_set_or_a_sentence(text):
    """The grammar has no third outcome."""
    try:
        HeadSet.parse(text, 8)
    except UserError as refused:
        assert str(refused).isprintable()


@pytest.mark.parametrize(
    "spec",
    [
        "", ",", "-1", "1-", "3-1", "8", "0-8", "1,,2", "1.5", "0x1", "1e3", "all,1", "NONE,3",
        "\u0663", "²", "1\u202e2", "9" * 400, "0-" + "9" * 9, "1;2", "1 2", "\0", "head3", "*",
        "1," * 10_000 + "x", "--", "0--1", "+1", "ΑLL",
    ],
)  # fmt: skip
def test_what_is_no_head_set_is_refused(spec):
    """Each refusal is one printable sentence of sane length."""
    refusal(HeadSet.parse, spec, 8)


# JSON


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
@settings(max_examples=300, deadline=None)
def test_json_values_survive_the_trip(value):
    """Canonical JSON reads back as the same value, floats to the last bit."""
    assert parse_json(canonical_json(value)) == value
    assert canonical_json(parse_json(canonical_json(value))) == canonical_json(value)


@given(value=json_values)
@settings(max_examples=50, deadline=None)
def test_json_files_survive_the_trip(tmp_path_factory, value):
    """What is written is what is read."""
    path = tmp_path_factory.mktemp("json") / "v.json"
    write_json_atomic(path, value)
    assert read_json(path) == value


@given(st.dictionaries(st.text(), json_values, max_size=4))
@settings(max_examples=100, deadline=None)
def test_keys_follow_from_the_content_alone(values):
    """The order in which ingredients are given does not matter."""
    backwards = dict(reversed(list(values.items())))
    assert content_key(values) == content_key(backwards)


# Configuration


configurations = st.fixed_dictionaries(
    {},
    optional={
        "layer": st.integers(0, 99),
        "alpha": st.floats(0, 1),
        "k": st.lists(st.integers(1, 64), unique=True, max_size=5),
        "random_seeds": st.lists(st.integers(0, 99), unique=True, max_size=5),
        "rank_by": st.sampled_from(["delta", "drop_pct"]),
        "split": st.text(),
        "pair": st.text(),
        "keep_both": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
    },
)


@given(configurations)
@settings(max_examples=200, deadline=None)
def test_a_configuration_survives_the_trip(values):
    """What `run.json` says is the configuration that ran."""
    config = config_from(values)
    written = json.loads(json.dumps(config.flat()))
    assert config_from(written) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("aplha = 0.3", "did you mean 'alpha'"),
        ("control-layer = 3", "did you mean 'control_layer'"),
        ("[layer]\nx = 1", "layer"),
        ("alpha = 1.5", "alpha"),
        ("alpha = nan", "alpha"),
        ("alpha = inf", "alpha"),
        ("alpha = '0.3; rm -rf /'", "alpha"),
        ("layer = -1", "layer"),
        ("layer = 1.5", "layer"),
        ("layer = 1" + "0" * 5000, "cannot be read as TOML|layer"),
        ("k = [1, 1]", "k"),
        ("k = 'x'", "k"),
        ("k = [[1]]", "k"),
        ("map_kind = 'neural'", "map_kind"),
        ("engine = 'fastest'", "engine"),
        ("dtype = 'int8'", "dtype"),
        ("seed = true\nseed = false", "cannot be read as TOML"),
        ("= 1", "cannot be read as TOML"),
        ("x = [" + "[" * 5000, "cannot be read as TOML"),
        ("\0", "cannot be read as TOML"),
        ("'\u202e' = 1", "unknown key"),
        ("__class__ = 1", "unknown key"),
        ("model_config = 1", "unknown key"),
    ],
)
def test_a_wrong_configuration_names_the_value(tmp_path, text, said):
    """TOML that does not fit is refused with the value, and the nearest key where one is near."""
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_config(path)
    refusal(read_config, path)


def test_repeating_a_strangers_run_does_not_run_a_strangers_code(tmp_path):
    """`trust_remote_code` in a run.json is not obeyed: only who runs can allow it."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": {"trust_remote_code": True, "base": "evil/model"}}))
    assert read_config(path).pair.trust_remote_code is False
    assert RunConfig().pair.trust_remote_code is False


# Ranking files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"head": 0, "score": 1}]', "no score for head 1"),
        ('[[0, 1], [0, 2]]', "twice"),
        ('[[0, 1], [1, 2], [2, 3]]', "head 2"),
        ('[[0, 1], [-1, 2]]', "head -1"),
        ('{"0": 1, "x": 2}', "whole number"),
        ('{"0": 1, "1": null}', "write a number"),
        ('{"0": 1, "1": "0.5"}', "write a number"),
        ('{"0": 1, "1": true}', "write a number"),
        ('{"0": 1, "1": NaN}', "write a number|JSON"),
        ('{"0": 1, "1": 1e999}', "write a number|JSON"),
        ('{"0": 1, "\\u0661": 2}', "whole number"),
        ('[[0.0, 1], [1.0, 2]]', "whole number"),
        ('[[true, 1], [false, 2]]', "whole number"),
        ("7", "neither a list nor an object"),
        ("[[0]]", "write"),
        ("[" * 100_000, "JSON"),
        ("", "JSON"),
        ('{"0": 1, "1": ' + "9" * 4000 + "}", "write a number"),
    ],
)  # fmt: skip
def test_a_ranking_file_with_wrong_heads_or_scores_is_refused(tmp_path, content, said):
    """Every head once, every score a finite number."""
    path = tmp_path / "ranking.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_ranking(path, n_heads=2, layer=1)


# Maps


MAP = LayerMap(1, "procrustes", "head", torch.eye(3).repeat(2, 1, 1), torch.zeros(2, 3), 2)


@pytest.fixture
def map_file(tmp_path):
    return stored_map(tmp_path, MAP).with_suffix(".safetensors")


def tensors(**changes):
    """Other tensors, with the checksum that they have."""

    def change(path: Path) -> None:
        values = {"weight": MAP.weight, "bias": MAP.bias} | changes
        some = {name: value for name, value in values.items() if value is not None}
        Store(path.parent).put_tensors(Address(MAP), some, MAP.to_dict())

    return change


def other_numbers(path: Path) -> None:
    save_file({"weight": MAP.weight, "bias": torch.ones(2, 3)}, path)


def description(**changes):
    """Another description, with the checksum that it has."""

    def change(path: Path) -> None:
        store = Store(path.parent)
        store.put(Address(MAP), store.get(Address(MAP)) | changes)

    return change


WRONG_MAPS = {
    "another shape": tensors(weight=torch.eye(3)[None]),
    "not square": tensors(weight=torch.zeros(2, 3, 4)),
    "too many axes": tensors(weight=torch.zeros(2, 3, 3, 1)),
    "float64": tensors(weight=torch.eye(3).repeat(2, 1, 1).double()),
    "integers": tensors(weight=torch.ones(2, 3, 3, dtype=torch.int32)),
    "NaN": tensors(weight=torch.full((2, 3, 3), torch.nan)),
    "infinity": tensors(bias=torch.full((2, 3), torch.inf)),
    "other numbers": other_numbers,
    "no bias": tensors(bias=None),
    "bias of another shape": tensors(bias=torch.zeros(3)),
    "empty": lambda p: p.write_bytes(b""),
    "cut off": lambda p: p.write_bytes(p.read_bytes()[:-4]),
    "endless header": lambda p: p.write_bytes(struct.pack("<Q", 2**63) + b"{}"),
    "a pickle": lambda p: p.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "a zip": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)),
    "no description": lambda p: p.with_suffix(".json").unlink(),
    "description is a list": lambda p: p.with_suffix(".json").write_text("[]"),
    "description cut off": lambda p: p.with_suffix(".json").write_text("{"),
    "more heads than tensors": description(n_heads=3),
    "heads of another type": description(n_heads="2"),
    "another scope": description(scope="layer"),
    "unknown kind": description(kind="neural"),
    "kind of another type": description(kind=["procrustes"]),
    "wrong diagnostics": description(diagnostics=[{"head": 0}]),
    "another checksum": description(sha256="0" * 64),
}


@pytest.mark.parametrize("change", WRONG_MAPS.values(), ids=WRONG_MAPS.keys())
def test_a_map_that_is_not_what_was_written_is_refused(map_file, change):
    """Shape, type, finiteness and checksum are checked after loading."""
    assert load_map(map_file).n_heads == 2
    change(map_file)
    refusal(load_map, map_file)


# Finished runs


@pytest.fixture
def run(tmp_path):
    grid = small_grid()
    folder = tmp_path / "run"
    folder.mkdir()
    write_grid(folder, grid, records(resampled(grid, 100)))
    write_run(folder, analyse(resampled(grid, 100)), small_run(grid), "")
    return folder


def run_json(**changes):
    def change(folder: Path) -> None:
        path = folder / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def run_settings(**changes):
    def change(folder: Path) -> None:
        path = folder / "run.json"
        run = json.loads(path.read_text())
        run["settings"] |= changes
        path.write_text(json.dumps(run))

    return change


def table(edit):
    def change(folder: Path) -> None:
        path = folder / "per_prompt.parquet"
        edit(pd.read_parquet(path)).to_parquet(path, index=False)

    return change


def with_nan(frame):
    frame.loc[3, "kl"] = np.nan
    return frame


WRONG_RUNS = {
    "another version": run_json(format=999),
    "no version": run_json(format=None),
    "no settings": run_json(settings=None),
    "settings of another type": run_json(settings=[1]),
    "noise floor of another type": run_json(noise_floor_nats="x"),
    "heads of another type": run_settings(n_heads="many"),
    "a billion heads": run_settings(n_heads=10**9),
    "no heads": run_settings(n_heads=0),
    "more heads than measured": run_settings(n_heads=3),
    "unknown score": run_settings(rank_by="luck"),
    "no run.json": lambda f: (f / "run.json").unlink(),
    "no results": lambda f: (f / "rq4_results.json").unlink(),
    "no table": lambda f: (f / "per_prompt.parquet").unlink(),
    "no analysis": lambda f: (f / "analysis.json").unlink(),
    "analysis of another type": lambda f: (f / "analysis.json").write_text("[]"),
    "results of another run": lambda f: (f / "rq4_results.json").write_text("[]"),
    "results of another type": lambda f: (f / "rq4_results.json").write_text("7"),
    "table cut off": lambda f: (f / "per_prompt.parquet").write_bytes(b"PAR1"),
    "table is a pickle": lambda f: (f / "per_prompt.parquet").write_bytes(b"\x80\x04N."),
    "table with NaN": table(with_nan),
    "table with a prompt twice": table(lambda t: pd.concat([t, t.iloc[:1]])),
    "table with a prompt missing": table(lambda t: t.iloc[1:]),
    "table without a column": table(lambda t: t.drop(columns="kl")),
    "table without a condition": table(lambda t: t[t["cond"] != "head1"]),
    "table with wrong heads": table(lambda t: t.assign(heads="99")),
    "table with text for numbers": table(lambda t: t.assign(kl="x")),
    "empty table": table(lambda t: t.iloc[:0]),
}


@pytest.mark.parametrize("change", WRONG_RUNS.values(), ids=WRONG_RUNS.keys())
def test_a_run_that_is_not_what_was_written_is_refused(run, change):
    """Results that are damaged, incomplete or of another version are not opened."""
    assert read_run(run).grid.n_heads == 2
    change(run)
    refusal(read_run, run)
