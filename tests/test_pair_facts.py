"""What a pair is: the gap, the tokens and each matrix's change are those of plain models."""

import json

import pytest
import torch
from pair_on_disk import write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from rq4lens.config import config_from
from rq4lens.errors import UserError
from rq4lens.jobs import audit as audit_job
from rq4lens.jobs import run as run_job
from rq4lens.jobs.audit import audit_pair
from rq4lens.models.catalog import checkpoints_of, load_pair
from rq4lens.models.weights import WeightChange, changes_in_files, together
from rq4lens.screen.audit import WIDTHS, audit_parts
from rq4lens.screen.terminal import text_of


def audit_text(*found, **how):
    return text_of(audit_parts(*found, **how), **WIDTHS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The settings of a pair on disk, in whose fine-tune attention alone changed."""
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def found(folders):
    return audit_pair(config_from(folders))


def plain(folders, side):
    """A model of the pair as Hugging Face loads it."""
    return AutoModelForCausalLM.from_pretrained(folders[side])


def test_each_matrix_changed_as_its_files_say(folders):
    """Relative change and cosine of every matrix of every layer, worked out by hand."""
    base, tuned = (plain(folders, side).state_dict() for side in ("base", "tuned"))
    source = config_from(folders).pair
    changes = changes_in_files(*checkpoints_of(source).values())
    assert {(each.layer, each.matrix) for each in changes} >= {
        *((layer, f"self_attn.{name}_proj") for layer in range(3) for name in "qkvo"),
        *((layer, "mlp.up_proj") for layer in range(3)),
        (None, "model.embed_tokens"),
    }
    for each in changes:
        start = "model.layers." if each.layer is not None else ""
        layer = "" if each.layer is None else f"{each.layer}."
        one, other = (part[f"{start}{layer}{each.matrix}.weight"] for part in (base, tuned))
        assert each.relative_change == pytest.approx(float((other - one).norm() / one.norm()))
        angle = torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert each.cosine == pytest.approx(float(angle), rel=1e-5)
        assert (each.relative_change > 0) is ("self_attn" in each.matrix)


def test_files_and_models_in_memory_say_the_same(folders, found):
    """Whatever TransformerLens calls a matrix, all of them together changed as much."""
    source = config_from(folders).pair
    of_files = changes_in_files(*checkpoints_of(source).values())
    in_files = together([each for each in of_files if each.layer is not None]).relative_change
    sums = [each for each in found.facts.weights if each["layer"] is not None]
    assert {each["matrix"] for each in sums} >= {"attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O"}
    assert not any("b_" in each["matrix"] for each in sums)
    assert in_files == pytest.approx(whole_of(folders), rel=1e-5)


def whole_of(folders):
    """The relative change of all matrices of all layers, of models in memory."""
    pair = load_pair(base=folders["base"], tuned=folders["tuned"], prompts=folders["prompts"])
    for side in ("base", "tuned"):
        pair.use(side).model.eval()
    return together(
        [each for each in pair.weight_changes if each.layer is not None]
    ).relative_change


@torch.no_grad()
def test_the_gap_and_the_answers_are_those_of_plain_models(folders, found):
    """Both directions in nats, and how often the most likely tokens differ."""
    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    rows = [json.loads(line) for line in open(folders["prompts"], encoding="utf-8")]  # noqa: PTH123, SIM115
    texts = [row["text"] for row in rows if row["split"] == "val"]
    said = [
        torch.stack(
            [
                model(**tokenizer(text, return_tensors="pt")).logits[0, -1].log_softmax(-1)
                for text in texts
            ]
        )
        for model in (plain(folders, side) for side in ("base", "tuned"))
    ]
    base, tuned = said
    facts = found.facts
    there = float((base.exp() * (base - tuned)).sum(-1).mean())
    back = float((tuned.exp() * (tuned - base)).sum(-1).mean())
    assert facts.gap_base_nats.value == pytest.approx(there, rel=1e-3)
    assert facts.gap_tuned_nats.value == pytest.approx(back, rel=1e-3)
    differ = 100 * float((base.argmax(-1) != tuned.argmax(-1)).double().mean())
    assert facts.answers_differ_pct.value == pytest.approx(differ)
    assert (facts.same_tokenizer, facts.n_same_tokens) == (True, len(rows))
    assert facts.warning is None


def test_models_that_look_unrelated_are_warned_of(found):
    """By the cosine of their weights, in plain words, on the screen and in the file."""
    unrelated = found._replace(
        facts=type(found.facts)(**{**vars(found.facts), "weight_cosine": 0.01})
    )
    said = audit_text(*unrelated)
    assert "WARNING: the two models look unrelated" in said
    assert "look unrelated" in unrelated.to_dict()["pair"]["warning"]
    assert "unrelated" not in audit_text(*found)


def test_large_models_are_left_alone_unless_asked_for(folders, monkeypatch):
    """Then their files are read, or they are loaded, and nothing else is said to be measured."""
    config = config_from(folders)
    monkeypatch.setattr(audit_job, "CHEAP_BYTES", 0)
    left = audit_pair(config)
    assert left.facts is None
    assert "--compare weights" in audit_text(*left)
    assert left.to_dict()["pair"] is None
    weights = audit_pair(config, "weights")
    assert weights.facts.gap_base_nats.value is None
    assert weights.facts.relative_weight_change > 0
    assert audit_pair(config, "none").facts is None


def test_what_cannot_be_compared_does_not_stop_the_audit(folders, tmp_path):
    """Prompts of one split leave no gap: unasked it is said, asked for it is refused."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"id": "a", "text": "the mill", "split": "train"}))
    config = config_from({**folders, "prompts": str(path)})
    assert "no prompt has split 'val'" in audit_pair(config).why_not
    with pytest.raises(UserError, match="no prompt has split 'val'"):
        audit_pair(config, "models")


def test_experts_of_a_layer_are_one_matrix():
    """Sums add up, so that any number of matrices has one change."""
    parts = [
        WeightChange(0, "up", (1.0, 1.0, 1.0, 0.0)),
        WeightChange(0, "up", (3.0, 3.0, 2.0, 2.0)),
    ]
    whole = together(parts)
    assert whole.relative_change == pytest.approx((2 / 4) ** 0.5)
    assert whole.cosine == pytest.approx(3 / 4)
    assert together([]) is None


def test_a_run_says_what_the_pair_is_and_says_it_again(folders, tmp_path):
    """In its summary, its file and its report; a repeated run does not load base for it."""
    config = config_from({**folders, "analysis": "grid", "k": [1]})
    first = run_job.run(config, tmp_path / "run")
    facts = first.run["pair"]
    assert facts["relative_weight_change"] > 0
    assert len([each for each in facts["weights"] if each["layer"] == 1]) >= 4
    assert "weights: changed by" in first.summary
    assert 'id="pair"' in (tmp_path / "run" / "report.html").read_text("utf-8")
    again = run_job.run(config, tmp_path / "run")
    assert not again.run["base_loaded"]
    assert again.run["pair"] == facts
