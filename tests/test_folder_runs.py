"""The whole main job by command line, from folders as users have them: real architectures, each
with a tokenizer and chat template of its own, and chats as prompts.
"""

import copy
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from markupsafe import escape
from model_zoo import CORPUS, KAZAKH, ZOO, random_model, save, train_tokenizer
from tiny import prepared, random_prompts
from transformers import LlamaConfig
from typer.testing import CliRunner

from rq4lens.cli import app
from rq4lens.config import Place
from rq4lens.heads import HeadSet
from rq4lens.models.catalog import load_pair
from rq4lens.patching.activations import capture_z
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.maps.fitting import fit_maps

ARCHITECTURES = ("gpt2", "pythia", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
OTHER_VOCABULARY = "llama with a larger vocabulary and another tokenizer"
LAYER, CONTROL, N_TRAIN, N_VAL = 1, 0, 32, 8
QUICK = ("--analysis", "grid", "--resamples", "100", "--k", "1,2", "--random-seeds", "0")
CONDITIONS = {"full", "head0", "head1", "head2", "head3", "top1", "top2", "rand1_s0", "rand2_s0"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass(frozen=True)
class Run:
    """A pair in folders, and the directory of its run."""

    folder: Path
    said: str

    @property
    def directory(self):
        """Where the run is."""
        return self.folder / "run"

    def read(self, name):
        """A JSON file of the run."""
        return json.loads((self.directory / name).read_text(encoding="utf-8"))

    def config(self, side):
        """What a model's folder says of it."""
        return json.loads((self.folder / side / "config.json").read_text(encoding="utf-8"))


def rq4lens(*arguments):
    """What a command prints; it must end well."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 0, result.output
    return result.output


def run_job(folder, *more, out="run"):
    """The main job of the pair in a folder; more options replace those before them."""
    return rq4lens(
        *("run", "--base", folder / "base", "--tuned", folder / "tuned"),
        *("--prompts", folder / "prompts.jsonl", "--layer", LAYER, "--control-layer", CONTROL),
        *("--device", "cpu", *QUICK, "--out", folder / out, *more),
    )


def fine_tuned(base, scale=0.05):
    """A copy whose attention weights moved."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "attn" in name or "attention" in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return tuned


def with_larger_vocabulary(base, n_tokens):
    """The fine-tune learned more tokens: its embeddings grew and its attention moved."""
    config = LlamaConfig(**{**base.config.to_dict(), "vocab_size": n_tokens})
    tuned, grown = fine_tuned(base), random_model(config, seed=3)
    body = {name: value for name, value in tuned.state_dict().items() if "layers" in name}
    grown.load_state_dict(body, strict=False)
    return grown


def write_pair(name, folder):
    """Base, fine-tune and chats as files."""
    tokenizer = train_tokenizer()
    if name == OTHER_VOCABULARY:
        own = train_tokenizer((*KAZAKH, *CORPUS), vocabulary=420)
        own.chat_template = TEMPLATE
        base = ZOO["llama3"].make()
        tuned = with_larger_vocabulary(base, len(own) + 4)
        save(tuned, own, folder / "tuned")
    else:
        base = ZOO[name].make()
        save(fine_tuned(base), tokenizer, folder / "tuned")
    save(base, tokenizer, folder / "base")
    rows = [
        {
            "id": each.id,
            "split": each.split,
            "group": each.group,
            "messages": [
                {"role": "system", "content": "Name a fruit."},
                {"role": "user", "content": f"Қалай {each.text}"},
            ],
        }
        for each in random_prompts(n_train=N_TRAIN, n_val=N_VAL).prompts
    ]
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=[*ARCHITECTURES, OTHER_VOCABULARY])
def run(request, tmp_path_factory):
    """The main job of one pair, run from its folders."""
    folder = tmp_path_factory.mktemp("pair")
    write_pair(request.param, folder)
    return Run(folder, run_job(folder))


def test_every_condition_is_measured(run):
    """Conditions, ranking, per-prompt numbers and pages are there; both checks read 0."""
    records = {record["cond"]: record for record in run.read("rq4_results.json")}
    assert set(records) == CONDITIONS | {"ctrl_full", "none", "self", "every_layer"}
    for name in ("none", "self"):
        assert abs(records[name]["KL_raw_mean"]) < 1e-6
    assert records["full"]["KL_raw_mean"] > 1e-4
    assert {record["n"] for record in records.values()} == {N_VAL}
    ranking = run.read(f"single_head_L{LAYER}_hook_z_alpha0.3.json")
    assert sorted(row["head"] for row in ranking) == [0, 1, 2, 3]
    table = pd.read_parquet(run.directory / "per_prompt.parquet")
    # All layers at once are not mapped, and a model's own activations are no swap.
    assert len(table) == N_VAL * 4 * (len(records) - 1)
    for name in ("summary.txt", "analysis.json", "report.html", "figures/coverage.html"):
        assert (run.directory / name).stat().st_size > 0
    assert "CHECKS (must read 0)" in run.said


def test_heads_are_those_of_the_configuration(run):
    """Layers, heads, grouped value heads, head width and vocabulary of each side."""
    for side, card in run.read("run.json")["models"].items():
        config = run.config(side)
        n_heads = config.get("num_attention_heads", config.get("n_head"))
        width = config.get("hidden_size", config.get("n_embd"))
        assert card["n_heads"] == n_heads
        assert card["n_key_value_heads"] == config.get("num_key_value_heads", n_heads)
        assert card["d_head"] == (config.get("head_dim") or width // n_heads)
        assert card["n_layers"] == config.get("num_hidden_layers", config.get("n_layer"))
        assert card["d_vocab"] == config["vocab_size"]
        assert card["logit_check_max_abs_diff"] < 1e-4


def test_prompts_are_chats_that_align(run):
    """Each side's own template was rendered, with one BOS, and both decide at one place."""
    audit = run.read("audit.json")
    assert audit["share_aligned_pct"] == 100.0
    assert audit["n"] == N_TRAIN + N_VAL
    assert all(each["base"]["in_template"] for each in audit["prompts"])
    assert run.read("run.json")["audit"]["warning"] is None


def test_the_run_verifies(run):
    """Checksums, plan, table, maps, and conditions measured again by the reference engine."""
    said = rq4lens("verify", run.directory, "--sample", "2")
    assert said.splitlines()[-1].startswith("PASS")
    assert "not checked" not in said


def test_another_vocabulary_gives_other_tokens(tmp_path):
    """Where the fine-tune has a tokenizer of its own, each model reads its own tokens."""
    prompts = write_pair(OTHER_VOCABULARY, tmp_path)
    said = rq4lens(
        *("audit", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned"),
        *("--prompts", prompts, "--out", tmp_path / "audit.json"),
    )
    assert f"{N_TRAIN + N_VAL} of {N_TRAIN + N_VAL} prompts align (100.0%)" in said
    for each in json.loads((tmp_path / "audit.json").read_text())["prompts"]:
        assert each["base"]["n_tokens"] != each["tuned"]["n_tokens"]
        assert each["base"]["text_end"] == each["tuned"]["text_end"]


# --- how prompts are run, and how they are read


@pytest.fixture(scope="module", params=["gpt2", OTHER_VOCABULARY])
def small(request, tmp_path_factory):
    """A pair in a folder, run all prompts at once."""
    folder = tmp_path_factory.mktemp("small")
    write_pair(request.param, folder)
    run_job(folder, "--batch-size", "64")
    return folder


def numbers(directory):
    """Every prompt's own numbers by name."""
    table = pd.read_parquet(directory / "per_prompt.parquet")
    return table.set_index(["cond", "kind", "prompt_id"])[["kl", "answer_logprob_change"]]


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batches_and_order_change_no_number(small, batch_size):
    """Another batch size with shuffled prompts: every number of every prompt, to 1e-5 nats.

    Head sets of top-k follow the ranking, which rounding could turn where heads tie; none do here.
    """
    rows = (small / "prompts.jsonl").read_text(encoding="utf-8").split("\n")
    random.Random(batch_size).shuffle(rows)
    shuffled = small / f"shuffled{batch_size}.jsonl"
    shuffled.write_text("\n".join(rows), encoding="utf-8")
    out = f"batch{batch_size}"
    run_job(small, "--prompts", shuffled, "--batch-size", batch_size, out=out)
    whole, other = numbers(small / "run"), numbers(small / out)
    pd.testing.assert_frame_equal(other.loc[whole.index], whole, atol=1e-5, rtol=0)


def test_padding_on_the_left_changes_no_number(small):
    """Activations of both models and effects of every head set, with masks and positions shifted
    by padding on the left, to 1e-5.
    """
    pair = load_pair(
        base=str(small / "base"), tuned=str(small / "tuned"), prompts=small / "prompts.jsonl"
    )
    for side in ("base", "tuned"):
        tokens, model = pair.tokens(side, "val"), pair.use(side).model
        right, left = (
            capture_z(model, tokens, [LAYER], batch_size=3, padding_side=padding)[LAYER]
            for padding in ("right", "left")
        )
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
    experiment = prepared(pair, fit_maps(pair, [LAYER], "mean_shift"))
    engine = HookEngine(
        experiment.tuned_model,
        experiment.prompts,
        place=Place(batch_size=3),
        padding_side="left",
    )
    sets = [HeadSet.all(4), HeadSet.of([2], 4)]
    whole = experiment.measure(LAYER, sets, 0.3)[0].kl_nats
    experiment.ends._engines["tuned"] = engine
    other = experiment.measure(LAYER, sets, 0.3)[0].kl_nats
    np.testing.assert_allclose(other, whole, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    """A pair whose fine-tune splits words otherwise, decided inside a word by most prompts."""
    folder = tmp_path_factory.mktemp("partly")
    write_pair(OTHER_VOCABULARY, folder)
    rows = [
        {"id": each.id, "split": each.split, "text": f"{n}! The old library: {each.text}."}
        for n, each in enumerate(random_prompts(n_train=N_TRAIN, n_val=N_VAL).prompts)
    ]
    for row in rows[1::2]:
        row["marker"] = "!"
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


READING = ("--decision-rule", "marker", "--marker", "The o")


def test_a_run_whose_prompts_do_not_align_says_so(partly):
    """The warning stands in the report and on stderr, and the run keeps the audit."""
    run_job(partly, *READING)
    audit = json.loads((partly / "run" / "audit.json").read_text())
    assert audit["share_aligned_pct"] == 50.0
    assert audit["warning"].startswith("WARNING: only 20 of 40 prompts (50.0%")
    report = (partly / "run" / "report.html").read_text(encoding="utf-8")
    assert "decided at different places: base after character" in audit["warning"]
    assert escape(audit["warning"]) in report
    arguments = ("--base", partly / "base", "--tuned", partly / "tuned", *READING)
    line = ["audit", *arguments, "--prompts", partly / "prompts.jsonl"]
    assert CliRunner().invoke(app, [str(each) for each in line]).exit_code == 1
    assert rq4lens("verify", partly / "run", "--sample", "1").splitlines()[-1].startswith("PASS")


@pytest.mark.usefixtures("no_pages")
def test_prompts_that_do_not_align_can_be_left_out(partly):
    """What is left out is not measured, is listed with its reason, and a repeat leaves it out."""
    run_job(partly, *READING, "--exclude-misaligned", out="aligned")
    audit = json.loads((partly / "aligned" / "audit.json").read_text())
    differs = [each["id"] for each in audit["prompts"] if not each["aligned"]]
    assert audit["excluded"] == differs
    assert len(differs) == 20
    assert all(each["problems"] for each in audit["prompts"] if each["id"] in differs)
    assert audit["warning"] is None
    kept = numbers(partly / "aligned").reset_index()["prompt_id"].unique()
    assert len(kept) == N_VAL // 2
    assert not set(kept) & set(differs)
    assert rq4lens("verify", partly / "aligned").splitlines()[-1].startswith("PASS")


def test_leaving_out_everything_is_refused(partly):
    """If no prompt aligns there is nothing to measure, and the sentence says where to look."""
    result = CliRunner().invoke(
        app,
        [
            *("run", "--base", str(partly / "base"), "--tuned", str(partly / "tuned")),
            *("--prompts", str(partly / "prompts.jsonl"), "--layer", "1"),
            *("--decision-rule", "offset", "--exclude-misaligned", "--k", "1,2"),
            *("--out", str(partly / "none")),
        ],
    )
    assert "none of the 40 prompts is read alike" in str(result.exception)
    assert not (partly / "none").exists()


@pytest.mark.usefixtures("no_pages")
def test_the_cut_on_the_left_is_counted(partly):
    """At most so many tokens are read; how many prompts were cut is in the provenance."""
    run_job(partly, "--max-tokens", "12", out="cut")
    run = json.loads((partly / "cut" / "run.json").read_text())
    assert run["settings"]["decision_rule"] == "last, last 12 tokens"
    assert run["audit"]["n_cut_left"] == {"base": 40, "tuned": 40}
    audit = json.loads((partly / "cut" / "audit.json").read_text())
    assert {each["base"]["n_tokens"] for each in audit["prompts"]} == {12}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "where",
    [
        ("--device", "cuda", "--n-devices", "2"),
        ("--device", "auto", "--device-map", "cuda:1,cuda:0"),
    ],
    ids=["n-devices", "device-map"],
)
def test_a_pair_over_two_gpus_has_the_same_numbers(small, where):
    """Each model spread over two GPUs gives what the CPU gives, to 1e-5 nats, and says where."""
    out = f"spread{len(where)}"
    run_job(small, *where, out=out)
    whole, spread = numbers(small / "run"), numbers(small / out)
    pd.testing.assert_frame_equal(spread.loc[whole.index], whole, atol=1e-5, rtol=0)
    blocks_on = json.loads((small / out / "run.json").read_text())["blocks_on"]
    assert set(blocks_on["tuned"]) == {"cuda:0", "cuda:1"}
