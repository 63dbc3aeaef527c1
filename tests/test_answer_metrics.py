"""Metrics of the answer: their laws, plain formulas, other engines, files, and a user's own."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from pair_on_disk import write_pair
from tiny import (
    FAST,
    MAIN,
    TINY_HEADS,
    TINY_LAYERS,
    WORDS,
    grid_of,
    needs_hooked,
    pair_of,
    prepared,
    random_prompts,
    tiny_model,
    word_tokenizer,
)

from rq4lens.analysis.analyse import analyse
from rq4lens.analysis.effects.table import metric_summary, ranking_rows, records
from rq4lens.analysis.statistics.plain import from_json, to_json
from rq4lens.config import AnalysisEffort, Patching, Reading, config_from
from rq4lens.disk.run import grid_of_table, per_prompt_table
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.jobs.run import run as run_job
from rq4lens.jobs.sweep import sweep_layers
from rq4lens.models.catalog import load_pair
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.experiment import prepare
from rq4lens.patching.grid import measure_grid, run_grid
from rq4lens.patching.keys import measured_parts
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.measured import Measurer
from rq4lens.patching.metrics import METRICS, Metric
from rq4lens.patching.patch import BASE, MAPPED, RAW, TUNED, Patch

LAST = TINY_LAYERS - 1
NAMES = tuple(METRICS)


@torch.no_grad()
def asked_prompts(base, tuned):
    """The random prompts: the answer is the word that tuned raises most, the foil the least.

    So the models differ in every metric that counts them, and no share is left undefined.
    """
    rows = []
    for prompt in random_prompts():
        tokens = torch.tensor([word_tokenizer()(prompt.text)["input_ids"]])
        raised = (tuned(tokens) - base(tokens))[0, -1]
        answer, foil = WORDS[int(raised.argmax())], WORDS[int(raised.argmin())]
        row = {name: getattr(prompt, name) for name in ("id", "text", "split")}
        rows.append({**row, "answer": f" {answer}", "foil": f" {foil}"})
    return PromptSet.of(rows)


@pytest.fixture(scope="module")
def asked_pair(tiny_pair):
    models = [tiny_pair.member(side).model for side in ("base", "tuned")]
    return pair_of(*models, asked_prompts(*models))


@pytest.fixture(scope="module")
def asked_maps(asked_pair):
    return fit_maps(asked_pair, [MAIN])


@pytest.fixture(scope="module")
def asked_grid(asked_pair, asked_maps):
    return grid_of(asked_pair, asked_maps, MAIN, ks=(1, 2), metric="logit_difference")


def table(grid):
    return {record.cond: record for record in records(grid)}


def refusal(make, *arguments, **named):
    with pytest.raises(UserError) as caught:
        make(*arguments, **named)
    return str(caught.value)


# --- laws


@needs_hooked
@pytest.mark.parametrize("name", NAMES)
def test_a_last_layer_that_differs_alone_carries_all_of_the_metric(name):
    """Models that differ in one layer's heads: all of it carries 100% both ways, nothing 0."""
    base = tiny_model()
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for which in ("W_Q", "W_V"):
            weight = getattr(tuned.blocks[LAST].attn, which)
            weight += 0.5 * torch.randn(weight.shape, generator=generator)
    pair = pair_of(base, tuned, asked_prompts(base, tuned))
    grid = grid_of(pair, fit_maps(pair, [LAST]), LAST, ks=(1,), metric=name)
    clean, full = grid["none"].transfer, grid.full.transfer
    assert np.abs(clean.into_tuned.metric - clean.into_base.metric).sum() > 0
    assert full.into_tuned.metric == pytest.approx(clean.into_base.metric, abs=1e-4)
    assert full.into_base.metric == pytest.approx(clean.into_tuned.metric, abs=1e-4)
    rows = table(grid)
    assert rows["full"].metric_pct.value == pytest.approx(100, abs=1e-2)
    assert rows["full"].metric_to_tuned_pct.value == pytest.approx(100, abs=1e-2)
    assert rows["none"].metric_pct.value == rows["none"].metric_to_tuned_pct.value == 0
    assert rows["none"].metric.raw_change.value == rows["self"].metric.raw_change.value == 0


def test_swapping_the_models_swaps_both_directions(asked_pair, asked_grid):
    """What base is to tuned, tuned is to base: both directions of the metric change places."""
    swapped = pair_of(asked_pair.tuned.model, asked_pair.base.model, asked_pair.prompts)
    back = grid_of(swapped, fit_maps(swapped, [MAIN]), MAIN, ks=(1,), metric="logit_difference")
    for cond in ("full", "head0", "head2"):
        here, there = table(asked_grid)[cond], table(back)[cond]
        assert here.metric_pct.value is not None
        assert here.metric_pct.value == pytest.approx(there.metric_to_tuned_pct.value, abs=1e-3)
        assert here.metric_to_tuned_pct.value == pytest.approx(there.metric_pct.value, abs=1e-3)
    one, other = map(metric_summary, (asked_grid, back))
    assert one.base.value == pytest.approx(other.tuned.value, abs=1e-5)
    assert one.difference.value == pytest.approx(-other.difference.value, abs=1e-5)


def test_identical_models_have_no_difference_to_share(asked_pair):
    """Shares are undefined, with the reason, and nothing changes."""
    base = asked_pair.base.model
    pair = pair_of(base, copy.deepcopy(base), asked_pair.prompts)
    grid = grid_of(pair, fit_maps(pair, [MAIN]), MAIN, ks=(1,), metric="logit_difference")
    record = table(grid)["full"]
    assert record.metric_pct.value is None
    assert "answer alike" in record.metric_pct.reason
    assert record.metric.raw_change.value == pytest.approx(0, abs=1e-6)


def test_a_metric_changes_no_other_number(asked_pair, asked_maps, asked_grid):
    """Divergences and transfer are those of a run without it, to the bit."""
    plain = grid_of(asked_pair, asked_maps, MAIN, ks=(1, 2))
    assert plain["none"].transfer.into_tuned.metric is None
    for cond in ("full", "head0", "none", "self"):
        for with_it, without in zip(asked_grid[cond].rows, plain[cond].rows, strict=True):
            for name in ("kl_nats", "answer_logprob_change_nats", "gap_left_nats", "answer_is"):
                assert np.array_equal(getattr(with_it, name), getattr(without, name))


# --- formulas


@torch.no_grad()
@pytest.mark.parametrize("engine", [FAST, "hooks"])
def test_the_metrics_are_those_of_plain_hooks(asked_pair, asked_maps, engine):
    """Each metric, written out over the logits of the patched models, both ways, on each engine."""
    heads, layer = [0, 2], MAIN
    patches = [Patch(layer, HeadSet.of(heads, TINY_HEADS), 1.0, source) for source in (BASE, TUNED)]
    found = {
        name: prepared(asked_pair, asked_maps, engine=engine, metric=name).effects(patches).metric
        for name in NAMES
    }
    models = {side: asked_pair.member(side).model for side in ("base", "tuned")}
    tokens = asked_pair.tokens("tuned", "val")
    for prompt, (read, answer, foil) in enumerate(
        zip(tokens.token_ids, tokens.answers, tokens.foils, strict=True)
    ):
        row = torch.tensor([read])
        for at, (into, source) in enumerate((("tuned", "base"), ("base", "tuned"))):
            z = models[source].run_with_cache(row)[1][f"blocks.{layer}.attn.hook_z"]

            def put(value, hook, z=z):  # noqa: ARG001
                value = value.clone()
                value[:, -1, heads] = z[:, -1, heads]
                return value

            hooks = [(f"blocks.{layer}.attn.hook_z", put)]
            logits = models[into].run_with_hooks(row, fwd_hooks=hooks)[0, -1].double()
            margin = float(logits[answer[0]] - logits[foil[0]])
            log_prob = float(logits.log_softmax(-1)[answer[0]])
            assert found["answer_logprob"][at, prompt] == pytest.approx(log_prob, abs=1e-5)
            assert found["logit_difference"][at, prompt] == pytest.approx(margin, abs=1e-5)
            assert found["accuracy"][at, prompt] == float(margin > 0)


def test_fast_engines_give_the_metric_of_hooks(asked_pair, asked_maps):
    """Every kind of patch of a grid, in rows beside each other, to 1e-5."""
    patches = [
        Patch(MAIN, HeadSet.of(heads, TINY_HEADS), alpha, source)
        for heads in ((), (1,), (0, 3), range(TINY_HEADS))
        for alpha, source in ((0.3, RAW), (0.3, MAPPED), (1.0, BASE), (1.0, TUNED))
    ]
    for name in ("answer_logprob", "logit_difference"):
        one, other = (
            prepared(asked_pair, asked_maps, engine=engine, metric=name).effects(patches).metric
            for engine in (FAST, "hooks")
        )
        assert one == pytest.approx(other, abs=1e-5)


def test_without_an_answer_the_tuned_models_own_is_meant(tiny_pair, tiny_maps):
    """In both models the same token: the most likely one of the clean tuned model."""
    experiment = prepared(tiny_pair, tiny_maps, metric="answer_logprob")
    nothing = [Patch(MAIN, HeadSet.none(TINY_HEADS), 1.0, source) for source in (BASE, TUNED)]
    found = experiment.effects(nothing).metric
    for prompt, read in enumerate(tiny_pair.tokens("tuned", "val").token_ids):
        with torch.no_grad():
            tuned, base = (
                tiny_pair.member(side).model(torch.tensor([read]))[0, -1].double().log_softmax(-1)
                for side in ("tuned", "base")
            )
        best = int(tuned.argmax())
        assert found[0, prompt] == pytest.approx(float(tuned[best]), abs=1e-5)
        assert found[1, prompt] == pytest.approx(float(base[best]), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("engine", [FAST, "hooks"])
@pytest.mark.parametrize("positions", ["decision", "subject"])
def test_an_answer_of_several_tokens_is_summed_over_them(tiny_pair, engine, positions):
    """Each token behind those before it, shorter answers too, whatever is patched before them."""
    rows = [
        {
            "id": p.id,
            "text": p.text,
            "split": p.split,
            "answer": " " + " ".join(WORDS[n % 5 : n % 5 + 1 + n % 3]),
            "subject": p.text.split()[n % 2],
        }
        for n, p in enumerate(random_prompts())
    ]
    reading = Reading(positions=positions, answer_tokens=2)
    models = {side: tiny_pair.member(side).model for side in ("base", "tuned")}
    pair = pair_of(models["base"], models["tuned"], PromptSet.of(rows), reading=reading)
    heads = [1, 3]
    patches = [Patch(MAIN, HeadSet.of(heads, TINY_HEADS), 1.0, each) for each in (BASE, TUNED)]
    maps = fit_maps(pair, [MAIN])
    found = prepared(pair, maps, engine=engine, metric="answer_logprob").effects(patches).metric
    read = pair.tokens("tuned", "val")
    for prompt, (tokens, answer) in enumerate(zip(read.token_ids, read.answers, strict=True)):
        said, decision = answer[:2], len(tokens) - 1
        row = torch.tensor([[*tokens, *said[:-1]]])
        compared = list(range(decision, row.shape[1]))
        at = compared if positions == "decision" else list(read.spots[prompt])
        if at[-1] == decision:
            at = sorted({*at, *compared})
        for number, (into, source) in enumerate((("tuned", "base"), ("base", "tuned"))):
            z = models[source].run_with_cache(row)[1][f"blocks.{MAIN}.attn.hook_z"]

            def put(value, hook, z=z, at=at):  # noqa: ARG001
                value = value.clone()
                for place in at:
                    value[:, place, heads] = z[:, place, heads]
                return value

            hooks = [(f"blocks.{MAIN}.attn.hook_z", put)]
            logits = models[into].run_with_hooks(row, fwd_hooks=hooks)[0].double()
            log_probs = logits[compared].log_softmax(-1)
            expected = sum(float(log_probs[n, token]) for n, token in enumerate(said))
            assert found[number, prompt] == pytest.approx(expected, abs=1e-5)


# --- rankings, tables, curves, files


def test_the_metric_ranks_heads_unless_another_score_does(asked_grid):
    """By the share of the way to base, from the grid's own rows."""
    assert Patching(metric="accuracy").rank_by == "metric"
    assert Patching(metric="accuracy", rank_by="delta").rank_by == "delta"
    clean = asked_grid["none"].transfer
    tuned, base = clean.into_tuned.metric.mean(), clean.into_base.metric.mean()
    shares = [
        100 * (tuned - single.transfer.into_tuned.metric.mean()) / (tuned - base)
        for single in asked_grid.singles
    ]
    ranking = asked_grid.ranking
    assert ranking.method == "metric"
    assert list(ranking.heads) == list(np.argsort(-np.array(shares), kind="stable"))
    assert ranking.scores == pytest.approx(sorted(shares, reverse=True))
    rows = ranking_rows(asked_grid)
    assert [row["metric_pct"] for row in rows] == pytest.approx(list(ranking.scores))


def test_curves_of_the_metric_end_where_its_table_does(asked_pair, asked_maps):
    """At k heads the curve is the metric's share of the top k, in both directions."""
    settings = Patching(layer=MAIN, k=(1, 2), metric="answer_logprob")
    measurer = Measurer(prepare(asked_pair, asked_maps, settings))
    grid = measure_grid(measurer, settings)
    effort = AnalysisEffort(n_random_sets=4, random_ks=(1, 2), methods=("delta",), alphas=(0.3,))
    analysis = analyse(grid, measurer, effort)
    by_name = {each.direction: each for each in analysis.directions}
    assert set(by_name) == {"to_base", "to_tuned", "metric", "metric_to_tuned"}
    full = table(grid)["full"]
    for name, field in (("metric", "metric_pct"), ("metric_to_tuned", "metric_to_tuned_pct")):
        value = getattr(full, field).value
        last = by_name[name].curves[0].coverage_pct[-1].value
        assert last == pytest.approx(value)
    summary = analysis.metric
    assert summary.difference.value == pytest.approx(summary.tuned.value - summary.base.value)
    again = from_json(type(analysis), to_json(analysis))
    assert again.metric == summary


def test_the_metric_goes_through_files_and_back(asked_grid, asked_pair, asked_maps, tmp_path):
    """The table of every prompt's numbers, the records, and a store that a second run finds."""
    again = grid_of_table(asked_grid.settings, per_prompt_table(asked_grid), noise_floor_nats=0.0)
    for cond in ("full", "none"):
        for one, other in zip(asked_grid[cond].rows, again[cond].rows, strict=True):
            assert np.array_equal(one.metric, other.metric)
    record = records(asked_grid)[0]
    assert from_json(type(record), to_json(record)) == record
    settings = Patching(layer=MAIN, k=(1,), metric="logit_difference")
    stores = [Store(tmp_path / "conditions") for _ in range(2)]
    grids = [
        measure_grid(Measurer(prepare(asked_pair, asked_maps, settings), store), settings)
        for store in stores
    ]
    assert stores[1].counters.computed == 0
    assert np.array_equal(grids[0].full.raw.metric, grids[1].full.raw.metric)


def test_the_metric_is_part_of_every_key_and_its_absence_of_none():
    """What was stored of a run without one is found again, and serves no run with one."""
    keys = [measured_parts(Patching(metric=name)) for name in ("kl", *NAMES)]
    assert "metric" not in keys[0]
    assert len({str(key) for key in keys}) == len(keys)


# --- a user's own


def test_a_metric_may_be_any_function_of_the_logits(asked_pair, asked_maps, asked_grid):
    """Written by hand as the built-in one, it gives its numbers; it ranks, and names the grid."""

    def margin(logits, clean_logits, answer, foil):
        assert logits.ndim == 3
        assert clean_logits.shape == logits.shape[1:]
        return logits[:, 0, answer[0]] - logits[:, 0, foil[0]]

    own = Metric("margin", margin)
    settings = Patching(k=(1, 2))
    grid = run_grid(asked_pair, asked_maps, MAIN, settings=settings, metric=own)
    assert grid.settings.patching.metric == "own:margin"
    assert grid.ranking.method == "metric"
    assert grid.ranking.heads == asked_grid.ranking.heads
    for cond in ("full", "head1"):
        for one, other in zip(grid[cond].rows, asked_grid[cond].rows, strict=True):
            assert one.metric == pytest.approx(other.metric, abs=1e-5)


def test_a_metric_knows_the_clean_logits_of_its_model(tiny_pair, tiny_maps):
    """Nothing patched is no distance from them, whatever else is patched."""

    def moved(logits, clean_logits, answer, foil):  # noqa: ARG001
        return (logits - clean_logits).abs().amax((1, 2))

    experiment = prepare(tiny_pair, tiny_maps, metric=Metric("moved", moved))
    patches = [
        Patch(MAIN, heads, 1.0, source)
        for source in (BASE, TUNED)
        for heads in (HeadSet.none(TINY_HEADS), HeadSet.all(TINY_HEADS))
    ]
    found = experiment.effects(patches).metric
    assert found[[0, 2]] == pytest.approx(0, abs=1e-5)
    assert (found[[1, 3]] > 1e-3).all()


# --- what is refused


def without(field, prompts):
    kept = {"id", "text", "split", "answer", "foil"} - {field}
    rows = [{name: getattr(p, name) for name in kept} for p in prompts]
    return PromptSet.of(rows)


REFUSED = {
    "no foil": (lambda prompts: without("foil", prompts), "and 15 more have none: give it as 'fo"),
    "no answer": (lambda prompts: without("answer", prompts), "and 15 more have none"),
    "one without": (
        lambda prompts: PromptSet(
            tuple(replace(p, foil=None) if p.id == "p48" else p for p in prompts)
        ),
        "prompt 'p48' has none",
    ),
    "same start": (
        lambda prompts: PromptSet.of(
            [
                {"id": p.id, "text": p.text, "split": p.split, "answer": " fig", "foil": " fig"}
                for p in prompts
            ]
        ),
        "the same",
    ),
}


@pytest.mark.parametrize("metric", ["logit_difference", "accuracy"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_metric_refuses_prompts_that_lack_what_it_needs(asked_pair, asked_maps, case, metric):
    """By the first one's name, before anything is measured."""
    change, expected = REFUSED[case]
    pair = pair_of(asked_pair.base.model, asked_pair.tuned.model, change(asked_pair.prompts))
    said = refusal(prepared, pair, asked_maps, metric=metric)
    assert expected in said
    assert repr(pair.prompts.split("val").ids[0]) in said


@pytest.mark.parametrize("how", ["in memory", "from disk"])
def test_prompts_without_answers_are_refused_before_any_work(tmp_path, monkeypatch, how):
    """No model is loaded or run, and nothing is written."""
    pair, values = None, write_pair(tmp_path)
    if how == "in memory":
        pair = load_pair(**{name: values[name] for name in ("base", "tuned", "prompts")})
    for work in ("models.catalog._load", "patching.activations.PairActivations.capture"):
        monkeypatch.setattr(f"rq4lens.{work}", lambda *_, **__: pytest.fail("there was work"))
    config = config_from({**values, "metric": "logit_difference"})
    said = refusal(run_job, config, tmp_path / "run", pair=pair)
    assert "needs the answer of each prompt, and prompts" in said
    assert not (tmp_path / "run").exists()
    assert "needs the answer" in refusal(sweep_layers, config, tmp_path / "run", pair=pair)
    if pair is not None:
        monkeypatch.undo()
        maps = fit_maps(pair, MAIN)
        monkeypatch.setattr(PairActivations, "capture", lambda *_, **__: pytest.fail("a pass"))
        assert "needs the answer" in refusal(run_grid, pair, maps, MAIN, metric="accuracy")


def test_a_metric_may_be_named(asked_pair, asked_maps, asked_grid):
    """By the word of the command line, it is the metric of the settings."""
    named = run_grid(
        asked_pair, asked_maps, MAIN, settings=Patching(k=(1, 2)), metric="logit_difference"
    )
    assert named.settings.patching == asked_grid.settings.patching.but(
        **named.settings.patching.model_dump(include={"control_layer", "alpha"})
    )
    assert named.ranking.heads == asked_grid.ranking.heads
    experiment = prepare(asked_pair, asked_maps, metric="answer_logprob")
    assert experiment.settings.metric == "answer_logprob"


def test_a_function_that_gives_no_number_a_row_is_refused(tiny_pair, tiny_maps):
    """With the shapes of both."""
    metric = Metric("flat", lambda logits, clean, answer, foil: logits.sum())  # noqa: ARG005
    patch = Patch(MAIN, HeadSet.all(TINY_HEADS), 1.0, RAW)
    said = refusal(prepare(tiny_pair, tiny_maps, metric=metric).effects, [patch])
    assert "return one number a row" in said


def test_a_setting_can_hold_no_function(tiny_pair, tiny_maps):
    """The name of a metric of one's own, without it."""
    assert "rq.Metric" in refusal(prepared, tiny_pair, tiny_maps, metric="own:margin")
