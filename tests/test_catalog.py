"""Pairs by name and by path: every setting arrives, and what is missing is said."""

import json
from pathlib import Path

import pytest
import torch
from pair_on_disk import write_pair

from rq4lens.config import PairSource, Patching, Place, Reading, preset
from rq4lens.errors import UserError
from rq4lens.models.catalog import (
    _over,
    audit_of,
    builtin_manifest,
    holds_both,
    load_pair,
    resolve_device,
)
from rq4lens.models.load.checkpoint import locate
from rq4lens.models.load.size import model_size
from rq4lens.models.prompts.prompt_set import PromptSet


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The models and prompts of a pair of one's own."""
    written = write_pair(tmp_path_factory.mktemp("own"))
    return {name: written[name] for name in ("base", "tuned", "prompts")}


def test_the_built_in_pair_comes_with_everything(etiquette):
    """Models, prompts and layers to compare, without any path."""
    assert etiquette.name == "etiquette"
    patching = preset("etiquette").patching
    assert patching.layer != patching.control_layer
    assert etiquette.n_heads == 16
    assert set(etiquette.prompts.splits) >= {"train", "val", "neutral"}
    assert etiquette.base.card.source == "etiquette/base (built in)"
    assert builtin_manifest()["prompts"]["val"]["n"] == len(etiquette.prompts.split("val"))


def test_a_pair_of_ones_own_is_three_paths(own):
    """Base, tuned and prompts; layers are the user's to choose."""
    pair = load_pair(**own, place=Place(device="cpu"))
    assert pair.name == "base and tuned"
    assert pair.base.card.source == own["base"]
    assert pair.base.card.logit_check_max_abs_diff < 1e-4
    assert pair.base.card.weights_fingerprint != pair.tuned.card.weights_fingerprint


def test_settings_reach_the_models(own):
    """dtype, decision rule and `keep_both` are those that were given."""
    place = Place(dtype="float64", keep_both=False)
    pair = load_pair(**own, reading=Reading(decision_rule="last_content"), place=place)
    assert pair.tuned.card.dtype == "float64"
    assert next(pair.use("base").model.parameters()).dtype == torch.float64
    assert (pair.reading.label, pair.keep_both) == ("last_content", False)


@pytest.mark.parametrize(("free_gigabytes", "both"), [(1.0, True), (1e-4, False)])
def test_short_memory_holds_one_model_at_a_time(own, monkeypatch, caplog, free_gigabytes, both):
    """Left open, it is decided by what the files say and what is free; asked for, it is done."""
    free = int(free_gigabytes * 1e9)
    monkeypatch.setattr("rq4lens.models.catalog.free_bytes", lambda *_: free)
    needed = sum(model_size(locate(own[side])).weights.total for side in ("base", "tuned"))
    assert (needed <= 0.7 * free) is both
    assert holds_both(PairSource(**own), Place()) is both
    assert ("one is held at a time" in caplog.text) is not both


def test_what_was_asked_for_is_kept(own, monkeypatch):
    """`keep_both` is obeyed whatever is free."""
    monkeypatch.setattr("rq4lens.models.catalog.size_of", pytest.fail)
    assert load_pair(**own, place=Place(keep_both=True)).keep_both
    assert not load_pair(**own, place=Place(keep_both=False)).keep_both


def test_prompts_may_be_in_memory(own):
    """A list by split, prompts, or a path that is no string: whatever `PromptSet.of` takes."""
    lists = {"train": ["apple date", "elm fig"], "val": ["bread cheese"]}
    wanted = PromptSet.of(lists)
    assert load_pair(**own | {"prompts": lists}).prompts == wanted
    assert load_pair(**own | {"prompts": wanted}).prompts == wanted
    from_file = load_pair(**own | {"prompts": Path(own["prompts"])})
    assert from_file.prompts == PromptSet.of(own["prompts"])


def test_a_pair_is_audited_by_its_own_reading(own):
    """The audit of a pair is of its prompts, its tokenizers and its decision rule."""
    pair = load_pair(**own, reading=Reading(decision_rule="last_content"))
    audit = pair.audit()
    assert audit.reading == "last_content"
    assert tuple(each.id for each in audit.prompts) == pair.prompts.ids
    assert audit.share_aligned_pct == 100.0


@pytest.mark.parametrize("excludes", [False, True])
def test_a_prompt_that_a_run_refuses_is_found_before(own, tmp_path, excludes):
    """One that is too long is refused, not left out, however many others align."""
    rows = [{"id": f"t{n}", "split": "train", "text": f"apple {n}"} for n in range(30)]
    rows += [{"id": "long", "split": "validation", "text": "apple " * 2000}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = PairSource(base=own["base"], tuned=own["tuned"], prompts=str(tmp_path / "p.jsonl"))
    audit = audit_of(source, Reading(exclude_misaligned=excludes))
    assert audit.lacking == ("a run refuses prompt 'long': it does not fit both models",)
    assert audit.excluded == ()


def test_the_same_folder_twice_is_a_null_pair(own):
    """Fingerprints follow the content, so two loads of one folder are one model."""
    pair = load_pair(base=own["base"], tuned=own["base"], prompts=own["prompts"])
    assert pair.base.card.weights_fingerprint == pair.tuned.card.weights_fingerprint
    assert pair.base.card.config_fingerprint == pair.tuned.card.config_fingerprint


@pytest.mark.parametrize(
    ("name", "left_out", "said"),
    [
        ("nope", (), "pair 'nope' does not exist"),
        (None, ("base",), "no base model is named"),
        (None, ("tuned",), "no tuned model is named"),
        (
            None,
            ("base", "tuned", "prompts"),
            r"no base model is named: choose a pair, .*--pair; in P",
        ),
        (None, ("prompts",), "pair 'base and tuned' needs your prompts: give a JSONL file"),
        ("cultural", ("prompts",), r"needs your prompts \(a JSONL file of cultural questions"),
    ],
)
def test_what_is_missing_is_said(own, name, left_out, said):
    """One sentence that names the option to give."""
    with pytest.raises(UserError, match=said):
        load_pair(name, **{key: value for key, value in own.items() if key not in left_out})


def test_what_is_set_replaces_the_preset_alone():
    """A setting beside a preset's name replaces that one; the preset's others stay."""
    start = preset("cultural").place
    assert start.dtype == "bfloat16"
    assert _over(start, Place(device="cpu")) == start.but(device="cpu")
    assert _over(start, Place(dtype="float32")).dtype == "float32"


def test_a_setting_that_does_not_exist_is_refused():
    """Settings in Python pass the same checks as a file."""
    with pytest.raises(UserError, match="unknown key 'lyer': did you mean 'layer'"):
        Patching(lyer=2)


def test_a_device_is_one_that_computes():
    """`auto` is a device of this machine; what is none is refused in one sentence."""
    assert resolve_device("auto") in {"cpu", "cuda"}
    assert resolve_device("cpu") == "cpu"
    for device in ("warp", "cuda:99", "meta", ""):
        with pytest.raises(UserError, match=f"device '{device}' cannot be used here"):
            resolve_device(device)
