"""Validation: planted heads are found, null experiments are not, and the table says which."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from games import GRADIENT_METHODS
from pair_on_disk import write_pair
from scipy.stats import binomtest
from tiny import random_prompts, tiny_model, word_tokenizer

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.methods import METHODS
from rq4lens.cluster.launch import run_validation
from rq4lens.cluster.many import Cluster
from rq4lens.config import Reading, config_from
from rq4lens.disk.store import Store, content_key
from rq4lens.errors import UserError
from rq4lens.models.catalog import load_pair
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.patching.activations import PairActivations
from rq4lens.results import TRANSFERS, HeadRanking
from rq4lens.validation.scenarios import (
    LEVEL,
    SCENARIOS,
    UNDONE,
    Scenario,
    is_right,
)
from rq4lens.validation.suite import (
    Suite,
    ValidationRequest,
    ValidationSettings,
    base_of,
    validate,
    validation_text,
)

EXACT = [method for method in METHODS if method not in {*GRADIENT_METHODS, *TRANSFERS}]
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def tiny_base() -> LoadedModel:
    return LoadedModel.wrap(tiny_model(), word_tokenizer())


def tiny_prompts(n_train=96, n_val=24, n_neutral=16):
    """Prompts that name their content, their last word; some of them are neutral."""
    drawn = random_prompts(n_train=n_train, n_val=n_val + n_neutral).prompts
    splits = [*["train"] * n_train, *["val"] * n_val, *["neutral"] * n_neutral]
    return PromptSet(
        tuple(
            replace(each, split=split, group=None, content=each.text.split()[-1])
            for each, split in zip(drawn, splits, strict=True)
        )
    )


def small(methods, scenarios=("rotated",), store=None, **settings):
    chosen = [BY_NAME[name] for name in scenarios]
    given = {"pairs": 2, "drift": 0.002} | settings
    asked = ValidationSettings(methods=methods, scenarios=chosen, **given)
    return validate(tiny_base(), tiny_prompts(), asked, store=store)


@pytest.fixture(scope="module")
def built_in(tokenized_once):  # noqa: ARG001 - its prompts are the same for each planted pair
    pair = load_pair("etiquette")
    return validate(
        pair.use("base").loaded,
        pair.prompts,
        ValidationSettings(
            methods=["delta", "kl_raw"], n_train=160, n_val=48, n_val_kinds=96, pairs=2
        ),
    )


def verdicts(validation, scenario, truth) -> dict[str, int]:
    return {
        verdict: n
        for (name, of, verdict), n in validation.kinds.items()
        if (name, of) == (scenario, truth)
    }


def test_exact_methods_recover_rotated_heads():
    """Every exact method puts rotated heads first: average precision and AUROC are 1."""
    for recovery in small(EXACT, ("rotated", "rotated beside replaced")).recoveries:
        if recovery.scenario == "rotated" or recovery.method == "drop_pct":
            assert recovery.average_precision == pytest.approx((1, 1)), recovery
            assert recovery.auroc == pytest.approx((1, 1)), recovery


@pytest.mark.slow
def test_on_the_model_in_the_box_planted_heads_are_found(built_in):
    """Heads that a map puts right are ranked first by ΔKL, replaced ones by the raw damage."""
    found = {(r.scenario, r.method): r.average_precision for r in built_in.recoveries}
    for scenario in ("rotated", "scaled", "turned", "shifted"):
        assert found[scenario, "delta"] == pytest.approx((1, 1))
    assert found["replaced", "kl_raw"] == pytest.approx((1, 1))


@pytest.mark.slow
def test_on_the_model_in_the_box_no_word_is_wrong(built_in):
    """Heads are called what they are or nothing, and nothing is claimed where nothing is."""
    wrong = {key: n for key, n in built_in.kinds.items() if is_right(*key[1:]) is False}
    assert wrong == {}
    assert {name: n for name, (n, _) in built_in.claimed.items()} == {
        "noise of every weight": 0,
        "unrelated models": 0,
    }


@pytest.fixture(scope="module")
def twenty(tokenized_once):  # noqa: ARG001 - its prompts are the same for each planted pair
    """Twenty seeded pairs of every scenario, on a small base; no method is judged on them."""
    asked = ValidationSettings(methods=[], pairs=20)
    return validate(tiny_base(), tiny_prompts(n_train=160, n_val=64, n_neutral=32), asked)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rotated", "turned", "shifted", "replaced", "untouched"])
def test_of_twenty_pairs_no_head_has_a_wrong_word(twenty, kind):
    """Each kind gets its word, or none; most get it."""
    told = {True: 0, None: 0, False: 0}
    for (_, truth, verdict), n in twenty.kinds.items():
        if truth == kind:
            told[is_right(truth, verdict)] += n
    assert told[False] == 0
    assert told[True] >= 0.75 * sum(told.values())


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["noise of every weight", "unrelated models"])
def test_of_twenty_pairs_without_a_finding_none_is_claimed(twenty, scenario):
    """Noise and unrelated models: 0 of 20, neither about heads nor about the map's repair."""
    assert twenty.claimed[scenario] == (0, 20)


@pytest.mark.slow
def test_null_experiments_alarm_at_the_promised_rate(built_in, twenty):
    """Where two equally wrong maps are compared, 5% of experiments at most find something."""
    alarms, nulls = (
        getattr(twenty.false_alarms, name) + getattr(built_in.false_alarms, name)
        for name in ("n_alarms", "n_nulls")
    )
    assert nulls >= 200
    assert binomtest(alarms, nulls, LEVEL, alternative="greater").pvalue > 0.01


def test_a_ranking_that_knows_nothing_is_found_out():
    """One's own method is judged as well; heads in index order are not the planted ones."""

    def by_index(measured: MeasuredSets) -> HeadRanking:
        scores = [-float(head) for head in range(measured.n_heads)]
        return HeadRanking.from_scores(scores, method="index", layer=1, alpha=None)

    (recovery,) = small([by_index], pairs=8).recoveries
    assert recovery.method == "by_index"
    assert sum(recovery.average_precision) / 8 < 0.9


def test_the_seed_decides_everything():
    """Equal seeds give equal results; another seed plants elsewhere."""
    one, again, other = (small(["attribution"], seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one.recoveries != other.recoveries


def test_drift_alone_is_no_planted_head():
    """What was planted is the truth, however far everything else drifted."""
    validation = small([], drift=0.1)
    truths = {truth for _, truth, _ in validation.kinds}
    assert truths == {"rotated", "untouched"}


def test_heads_that_share_a_value_head_are_planted_together(tmp_path):
    """With grouped-query attention the truth names whole groups, and they are found."""
    settings = write_pair(tmp_path)
    base, prompts = base_of(config_from({"base": settings["base"], "prompts": settings["prompts"]}))
    assert base.model.cfg.n_key_value_heads == 4
    validation = validate(
        base,
        prompts,
        ValidationSettings(methods=["delta"], pairs=2, drift=0.0, scenarios=[BY_NAME["rotated"]]),
    )
    rotated = verdicts(validation, "rotated", "rotated")
    assert sum(rotated.values()) == 2 * 2 * 2  # two pairs, two value heads, two heads on each
    assert validation.recoveries[0].average_precision == pytest.approx((1, 1))


def test_a_change_that_does_nothing_is_listed_apart():
    """Heads whose output is cut off are rotated like others, yet idle is what they are."""
    base = tiny_base()
    for block in base.model.blocks:
        block.attn.W_O.data[:3] = 0
    validation = validate(
        base,
        tiny_prompts(),
        ValidationSettings(methods=["delta"], pairs=3, drift=0.0, scenarios=[BY_NAME["rotated"]]),
    )
    assert set(verdicts(validation, "rotated", "rotated, too small")) == {"idle"}
    assert set(verdicts(validation, "rotated", "rotated")) <= {UNDONE, "recoded"}


def test_kinds_are_told_on_more_prompts_than_the_methods_see():
    """What the methods see is unchanged by prompts that serve the kinds alone."""
    few, many = (small(["kl_raw"], n_val=8, n_val_kinds=n) for n in (8, 24))
    assert few.recoveries == many.recoveries
    assert [v.settings["val_prompts"] for v in (few, many)] == [8, 8]
    assert [v.settings["val_prompts_of_kinds"] for v in (few, many)] == [8, 24]


def test_layers_are_those_that_were_asked_for():
    """A named layer is planted in, whatever would have been drawn."""
    layers = [small(["delta"], layers=[layer], drift=0.0) for layer in (0, 2)]
    assert all(v.recoveries[0].average_precision == pytest.approx((1, 1)) for v in layers)


def test_the_result_is_a_table_and_json(tmp_path):
    """A base model alone is enough: no tuned model is named or loaded."""
    settings = write_pair(tmp_path)
    config = config_from({"base": settings["base"], "prompts": settings["prompts"]})
    out = tmp_path / "v.json"
    request = ValidationRequest(config, ("delta", "kl_raw"), layer=1, pairs=1)
    text = run_validation(request, out)
    assert text.count("| delta | 1.00 (1.00)") == 2  # average precision, and AUROC
    assert "promised 5%" in text
    saved = json.loads(out.read_text())
    assert {row["method"] for row in saved["recoveries"]} == {"delta", "kl_raw"}
    assert saved["false_alarms"]["n_nulls"] == 4 * len(SCENARIOS)
    assert [each["scenario"] for each in saved["planted"]] == [each.name for each in SCENARIOS]
    (replaced,) = (each for each in saved["planted"] if each["chosen"]["among"] == "mattering")
    assert min(replaced["chosen"]["base_cost_nats"].values()) > 0
    assert saved["claimed"]["unrelated models"] == {"n_claims": 0, "n_pairs": 1}


def test_a_validation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Planted pairs are kept by their content: only the lost one is planted again."""
    store = Store(tmp_path)
    whole = small(["delta"], store=store)
    assert store.counters.computed == 2
    next(tmp_path.glob("rotated_1_*")).unlink()
    planted = []
    trial = Suite.trial
    monkeypatch.setattr(
        Suite, "trial", lambda self, s, n: planted.append((s.name, n)) or trial(self, s, n)
    )
    assert small(["delta"], store=store) == whole
    assert planted == [("rotated", 1)]


def test_planted_pairs_are_addressed_by_all_that_can_change_them():
    """Every setting of a suite but the number of its pairs, and every part of a scenario."""
    own = Scenario("own", {"rotated": 2}, "rotated")
    others = [
        *({"seed": 1}, {"alpha": 0.5}, {"drift": 0.5}, {"strength": 2.0}, {"layers": [1]}),
        *(
            {"methods": ["kl_raw"]},
            {"n_train": 40},
            {"n_val": 12},
            {"n_val": 12, "n_val_kinds": 20},
            {"reading": Reading()},
        ),
        {"scenarios": [replace(own, planted={"rotated": 1})]},
        {"scenarios": [replace(own, strengths=(0.5,))]},
    ]
    base, prompts = tiny_base(), tiny_prompts()

    def key(number=0, **settings):
        asked = ValidationSettings(**{"methods": ["delta"], "scenarios": [own]} | settings)
        suite = Suite(base, prompts, asked)
        return content_key(suite._ingredients(asked.scenarios[0], number).to_dict())

    keys = [key(), key(1), *(key(**each) for each in others)]
    assert len(set(keys)) == len(keys)
    assert key(pairs=9) == keys[0]


def test_a_method_of_ones_own_is_not_kept(tmp_path):
    """Nothing tells when a function changes, so what it said is never looked up."""

    def by_index(measured: MeasuredSets) -> HeadRanking:
        raise AssertionError(measured)

    with pytest.raises(UserError, match="'by_index' says cannot be kept"):
        small([by_index], store=Store(tmp_path))


def test_a_cluster_needs_a_folder_to_meet_in(tmp_path):
    """`validate --cluster` without `--out` is refused before anything is loaded."""
    config = config_from({"base": str(tmp_path), "prompts": "p.jsonl"})
    with pytest.raises(UserError, match="with --out FILE"):
        run_validation(ValidationRequest(config), cluster=Cluster())


def test_a_scenario_of_ones_own():
    """Any mixture of changes can be planted."""
    both = Scenario("both", {"rotated": 1, "scaled": 1}, "scaled")
    validation = validate(
        tiny_base(),
        tiny_prompts(),
        ValidationSettings(methods=["delta"], pairs=1, scenarios=[both], drift=0.0),
    )
    assert {truth for _, truth, _ in validation.kinds} == {"rotated", "scaled", "untouched"}
    assert "both" in validation_text(validation)


@pytest.mark.parametrize("answer_tokens", [1, 3])
def test_what_planted_pairs_share_is_what_base_gives_in_each(answer_tokens):
    """Where the tuned model decides what is compared, nothing of another pair is taken over."""
    asked = ValidationSettings(
        methods=["delta"],
        n_train=24,
        n_val=8,
        n_val_kinds=8,
        strength=3.0,
        scenarios=[BY_NAME["rotated"]],
        reading=Reading(answer_tokens=answer_tokens),
    )
    suite = Suite(tiny_base(), tiny_prompts(24, 8, 8), asked)
    for number in range(2):
        shared = suite.trial(BY_NAME["rotated"], number).activations
        fresh = PairActivations(shared.pair)
        for split in shared.pair.prompts.splits:
            assert shared.read("base", split) == fresh.read("base", split)
            found, expected = (each.log_probs("base", split) for each in (shared, fresh))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"methods": ["luck"]}, "'luck' does not exist"),
        ({"methods": ["delta"], "pairs": 0}, "at least 1"),
        ({"methods": ["delta"], "layers": [99]}, "layer 99"),
        (
            {"reading": Reading(decision_rule="marker", marker="nowhere")},
            "marker 'nowhere' does not stand in prompt",
        ),
    ],
)
def test_what_cannot_be_validated_is_said(settings, said):
    """One clear sentence."""
    with pytest.raises(UserError, match=said):
        small(**{"methods": ["delta"], **settings})


def test_prompts_are_read_as_the_configuration_says(tmp_path):
    """The decision rule of a pair's settings holds for planted pairs too."""
    settings = write_pair(tmp_path)
    own = {name: settings[name] for name in ("base", "prompts")}
    config = config_from(own | {"decision_rule": "marker", "marker": "nowhere"})
    with pytest.raises(UserError, match="marker 'nowhere' does not stand in prompt"):
        run_validation(ValidationRequest(config, ("delta",), layer=1, pairs=1))


def test_a_layer_with_too_few_value_heads_is_said():
    """Where two value heads serve all heads, planting one leaves too little to tell it from."""
    base = LoadedModel.wrap(tiny_model(n_key_value_heads=2), word_tokenizer())
    with pytest.raises(UserError, match="fewer than 4 value heads"):
        validate(base, tiny_prompts(), ValidationSettings(methods=["delta"]))
