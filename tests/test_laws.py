"""The laws of the method page, on pairs whose numbers are known and on ones like real ones."""

import json
import math
import random

import numpy as np
import pytest
import torch
from synthetic import resampled
from tiny import (
    ALPHA,
    CONTROL,
    FAST,
    MAIN,
    TINY_HEADS,
    TINY_LAYERS,
    fine_tuned,
    grid_of,
    kl_nats,
    needs_hooked,
    pair_of,
    prepared,
    random_prompts,
    rotated_bridge,
    tiny_model,
)

from rq4lens.analysis.effects.table import records
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.config import Place
from rq4lens.disk.store import Store
from rq4lens.heads import Head, HeadSet
from rq4lens.models.load.lens import HAS_HOOKED, HookedTransformer, HookedTransformerConfig
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import PromptSet, TokenizedPrompts
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.hooks import HookEngine, patched_heads
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.passes import forward_batch
from rq4lens.patching.patch import MAPPED, RAW, SELF, Patch, Sources
from rq4lens.validation.planting import Planting, plant

ENGINES = (FAST, "hooks")
ROUNDING_NATS = 1e-6
"""What two ways to compute one number may differ by in float32."""

SETS = [HeadSet.of(heads, TINY_HEADS) for heads in ([0], [2], [1, 3], [0, 1, 2, 3])]


# --- law 0: the definition, worked out without any model library ---------------------------------


@pytest.fixture(scope="module", params=ENGINES)
def micro_experiment(micro, request):
    pair = micro[2]
    return prepared(pair, fit_maps(pair, [0, 1]), engine=request.param)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("heads", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_divergence_is_the_formula(micro, micro_experiment, layer, heads, alpha):
    """`KL(p_patched || p_clean)` with `z'_h = (1-α) z_t,h + α ẑ_h`, raw and mapped, in numpy."""
    base, tuned, _ = micro
    layer_map = micro_experiment.maps[layer]
    weight, bias = layer_map.weight.double().numpy(), layer_map.bias.double().numpy()
    raw, mapped = micro_experiment.measure(layer, [HeadSet.of(heads, 2)], alpha)
    for index, tokens in enumerate(micro_experiment.prompts.token_ids):
        z_b, z_t = base.z(tokens, layer), tuned.z(tokens, layer)
        z_mapped = np.einsum("hi,hij->hj", z_b, weight) + bias
        for source, found in ((z_b, raw.kl_nats), (z_mapped, mapped.kl_nats)):
            z = z_t.copy()
            z[list(heads)] = (1 - alpha) * z_t[list(heads)] + alpha * source[list(heads)]
            expected = kl_nats(tuned.logits(tokens, {layer: z}), tuned.logits(tokens))
            assert found[0, index] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("direction", ["patched||clean", "clean||patched"])
def test_the_direction_of_the_divergence_is_the_named_one(micro, direction):
    """`clean||patched` is `KL(p_clean || p_patched)`, and the two differ."""
    base, tuned, pair = micro
    maps = fit_maps(pair, [1])
    raw, _ = prepared(pair, maps, kl_direction=direction).measure(1, [HeadSet.all(2)], 1.0)
    for index, tokens in enumerate(pair.tokens("tuned", "val").token_ids):
        patched, clean = tuned.logits(tokens, {1: base.z(tokens, 1)}), tuned.logits(tokens)
        order = (patched, clean) if direction == "patched||clean" else (clean, patched)
        assert raw.kl_nats[0, index] == pytest.approx(kl_nats(*order), abs=1e-12)


def test_the_answer_is_the_clean_models_most_likely_token(micro):
    """The log-probability change is that of the clean top token, patched minus clean."""
    base, tuned, pair = micro
    raw, _ = prepared(pair, fit_maps(pair, [1])).measure(1, [HeadSet.of([0], 2)], 1.0)
    for index, tokens in enumerate(pair.tokens("tuned", "val").token_ids):
        z = tuned.z(tokens, 1)
        z[0] = base.z(tokens, 1)[0]
        patched, clean = (
            x - np.log(np.exp(x).sum())
            for x in (tuned.logits(tokens, {1: z}), tuned.logits(tokens))
        )
        expected = patched[clean.argmax()] - clean.max()
        found = raw.answer_logprob_change_nats[0, index]
        assert found == pytest.approx(expected, abs=1e-12)


@needs_hooked
@pytest.mark.parametrize(("alpha", "left"), [(0.0, 2.0), (0.5, 1.5), (1.0, 1.0)])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_case_for_pencil_and_paper(alpha, left, engine):
    """One token, one head that adds 1 to the logit of word 0 in tuned and nothing in base.

    The clean logits are `(2, 0)`, the patched ones `(2 - α, 0)`.
    """
    base, tuned = (one_token_model(value) for value in (0.0, 1.0))
    prompts = TokenizedPrompts(("p",), ((0,),))
    sources = Sources({(0, RAW): torch.zeros(1, 1, 2, 1)})
    assert HookEngine(base, prompts).clean_z(0).flatten().tolist() == [0.0, 0.0]
    patch = Patch(0, HeadSet.of([0], 2), alpha, RAW)
    effects = make_engine(tuned, prompts, place=Place(engine=engine)).effects([(patch,)], sources)
    p, q = 1 / (1 + math.exp(-left)), 1 / (1 + math.exp(-2))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert effects.kl_nats[0, 0] == pytest.approx(expected, abs=1e-7)
    assert effects.answer_logprob_change_nats[0, 0] == pytest.approx(math.log(p / q), abs=1e-7)


def one_token_model(value: float) -> HookedTransformer:
    """Two words, two heads of width 1; head 0 writes `value` for word 0, head 1 writes nothing."""
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=2,
        n_ctx=2,
        d_head=1,
        n_heads=2,
        d_vocab=2,
        attn_only=True,
        normalization_type=None,
        device="cpu",
    )
    model = HookedTransformer(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E.copy_(torch.eye(2))
        model.unembed.W_U.copy_(torch.eye(2))
        model.blocks[0].attn.W_V[0] = torch.tensor([[value], [0.0]])
        model.blocks[0].attn.W_O[0] = torch.tensor([[1.0, 0.0]])
    return model


# --- law 1: what changes nothing -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "alpha", "source"),
    [("ALL", 0.0, RAW), ("NONE", 1.0, RAW), ("ALL", 1.0, SELF), ("1,2", 0.3, SELF)],
)
def test_what_changes_nothing_reads_zero(tiny_experiment, heads, alpha, source):
    """`α = 0`, `NONE` and patching the tuned model into itself leave the distribution unchanged."""
    chosen = HeadSet.parse(heads, TINY_HEADS)
    for effects in tiny_experiment.measure(MAIN, [chosen], alpha, raw=source, mapped=source):
        np.testing.assert_allclose(effects.kl_nats, 0, atol=1e-12)
        np.testing.assert_allclose(effects.answer_logprob_change_nats, 0, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_identical_models_differ_nowhere(tiny_pair, engine):
    """With base = tuned every `KL_raw` and `ΔKL` of the grid is 0, and coverage is undefined."""
    same = pair_of(tiny_pair.base.model, tiny_pair.base.model, tiny_pair.prompts)
    maps = fit_maps(same, [MAIN, CONTROL])
    grid = grid_of(same, maps, MAIN, CONTROL, ALPHA, ks=(1, 2), engine=engine)
    for condition in grid.conditions.values():
        np.testing.assert_allclose(condition.kl_raw_nats, 0, atol=1e-12)
        np.testing.assert_allclose(condition.delta_nats, 0, atol=1e-12)
    for record in to_json(records(resampled(grid, 100))):
        assert record["coverage_pct"] is None
        assert record["coverage_pct_reason"]


# --- law 2: specs and coverage -------------------------------------------------------------------


def test_order_and_repetition_in_a_spec_do_not_matter(tiny_experiment):
    """`2,0`, `0,2,2` and `0,2` are one head set with one set of numbers."""
    sets = [HeadSet.parse(spec, TINY_HEADS) for spec in ("0,2", "2,0", "0,2,2")]
    for values in columns(tiny_experiment.measure(MAIN, sets, ALPHA)):
        np.testing.assert_allclose(
            values[1:], values[[0, 0]], atol=1e-12 if HAS_HOOKED else ROUNDING_NATS
        )
    assert len(set(sets)) == 1


def test_all_covers_everything_and_none_covers_nothing(tiny_grid):
    """`coverage(ALL) = 100` and `coverage(NONE) = 0`; all layers at once have no share of one."""
    by_name = {record["cond"]: record for record in to_json(records(resampled(tiny_grid, 200)))}
    assert by_name["full"]["coverage_pct"] == 100
    assert by_name.pop("every_layer")["coverage_pct"] is None
    assert by_name["none"]["coverage_pct"] == 0
    assert by_name["self"]["coverage_pct"] == pytest.approx(0, abs=1e-9)
    delta = {name: condition.delta for name, condition in tiny_grid.conditions.items()}
    for name, record in by_name.items():
        assert record["coverage_pct"] == pytest.approx(100 * delta[name] / delta["full"])


# --- law 3: what a patch writes into the residual stream -----------------------------------------


@pytest.mark.parametrize("which", [pytest.param("micro", marks=needs_hooked), "tiny"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("source", [RAW, MAPPED])
def test_the_patch_adds_what_the_law_says(request, which, padding_side, source):
    """`attn_out' - attn_out = α Σ_{h∈S} (ẑ_h - z_h) W_O[h]` at the decision token, 0 elsewhere."""
    of_which = request.getfixturevalue("micro" if which == "micro" else "tiny_pair")
    pair = of_which[2] if which == "micro" else of_which
    heads = HeadSet.of([1] if which == "micro" else [0, 3], pair.n_heads)
    experiment = prepared(pair, fit_maps(pair, [MAIN]), engine="hooks")
    (batch,) = experiment.prompts.batches(64, padding_side)
    before = attention_output(pair.tuned.model, batch)
    with patched_heads(
        pair.tuned.model, (Patch(MAIN, heads, ALPHA, source),), experiment.sources, batch
    ):
        after = attention_output(pair.tuned.model, batch)
    step = experiment.z(MAIN, source) - experiment.z(MAIN, SELF)
    W_O = pair.tuned.model.blocks[MAIN].attn.W_O
    expected = torch.zeros_like(before)
    expected[torch.arange(len(batch.rows)), batch.decision] = ALPHA * sum(
        step[batch.rows, head] @ W_O[head] for head in heads
    )
    torch.testing.assert_close(after - before, expected, atol=2e-6, rtol=0)
    assert expected.abs().max() > 1e-2


@torch.no_grad()
def attention_output(model, batch):
    seen = {}
    site = f"blocks.{MAIN}.hook_attn_out"
    hook = [(site, lambda value, hook: seen.update({site: value.clone()}))]  # noqa: ARG005
    with model.hooks(fwd_hooks=hook):
        forward_batch(model, batch)
    return seen[site]


# --- law 4: the gauge law ------------------------------------------------------------------------


def gauge_pair(base, layer, heads, prompts):
    planted = plant(base, rotated=[Head(layer, head) for head in heads])
    return planted, pair_of(base, planted.tuned, prompts)


@needs_hooked
@pytest.mark.parametrize("n_key_value_heads", [None, 2], ids=["own value heads", "grouped"])
@pytest.mark.parametrize("engine", ENGINES)
def test_rotated_heads_are_found_and_explained(n_key_value_heads, engine):
    """Rotated value spaces: found first, explained by the map, and every other head reads 0.

    With grouped-query attention the rotation of one value head rotates both heads that share it.
    """
    base = tiny_model(n_key_value_heads=n_key_value_heads)
    planted, pair = gauge_pair(base, MAIN, [1], random_prompts())
    assert_gauge_law(planted, pair, MAIN, CONTROL, engine)


@needs_hooked
def test_rotated_heads_of_the_built_in_model_are_found_and_explained(etiquette):
    """The same on the model in the box: three rotated heads among sixteen that were trained."""
    planted = plant(etiquette.base.model, rotated=[Head(1, head) for head in (0, 2, 12)])
    prompts = PromptSet(
        etiquette.prompts.split("train").prompts[:200] + etiquette.prompts.split("val").prompts[:24]
    )
    tuned = planted.loaded(etiquette.base.loaded)
    pair = ModelPair(etiquette.base, tuned, prompts)
    assert_gauge_law(planted, pair, 1, 4, "suffix")


def assert_gauge_law(planted, pair, layer, control_layer, engine):
    rotated = planted.changed_heads(layer)
    maps = fit_maps(pair, [layer, control_layer], "procrustes")
    for change in planted.changes:
        for head in change.heads:
            found = maps[layer].weight[head.index].double()
            torch.testing.assert_close(found, change.rotation, atol=1e-4, rtol=0)
    grid = grid_of(pair, maps, layer, control_layer, ALPHA, ks=(len(rotated),), engine=engine)
    assert set(grid.ranking.top(len(rotated))) == set(rotated)
    for head, single in enumerate(grid.singles):
        if head in rotated:
            assert single.KL_raw > 1e-5
            assert single.KL_mapped < min(1e-6, 1e-2 * single.KL_raw)
        else:
            assert single.KL_raw < 1e-9
    top = grid[f"top{len(rotated)}"]
    assert top.KL_mapped < 1e-6
    assert top.KL_raw > 1e-5
    assert grid.control.KL_raw < 1e-9


# --- law 5: nothing about how prompts are run changes a number -----------------------------------


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def pair_and_tolerance(request):
    """The tiny pair in each precision, and what rounding may change there, in nats."""
    base = tiny_model(dtype=request.param)
    # Hugging Face's norms and patterns are in float32 whatever the type of the weights.
    in_double = 1e-13 if HAS_HOOKED else 1e-6
    tolerance = {torch.float32: 1e-6, torch.float64: in_double}[request.param]
    return pair_of(base, fine_tuned(base), random_prompts()), tolerance


@pytest.fixture(scope="module")
def reference(pair_and_tolerance):
    """All prompts in one batch through the reference engine, and how to compare with it."""
    pair, tolerance = pair_and_tolerance
    maps = fit_maps(pair, [MAIN])
    experiment = prepared(pair, maps, engine="hooks", batch_size=64)
    expected = experiment.measure(MAIN, SETS, ALPHA)

    def compare(found, rows=slice(None)):
        np.testing.assert_allclose(found, columns(expected)[:, :, rows], atol=tolerance, rtol=0)

    return pair, maps, experiment, compare


def columns(measured):
    """Both columns as one array, ``[kind condition prompt]``."""
    return np.stack([effects.kl_nats for effects in measured])


def delta_nats(measured):
    """`ΔKL` of each condition on each prompt."""
    raw, mapped = measured
    return raw.kl_nats - mapped.kl_nats


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batch_size_does_not_matter(reference, engine, batch_size):
    """Prompts of different lengths give the same numbers alone, in twos and in sevens."""
    pair, maps, _, compare = reference
    experiment = prepared(pair, maps, engine=engine, batch_size=batch_size)
    compare(columns(experiment.measure(MAIN, SETS, ALPHA)))


@pytest.mark.parametrize("batch_size", [3, 64])
def test_padding_side_does_not_matter(reference, batch_size, monkeypatch):
    """Left padding (with a mask) and right padding (without one) give the same numbers."""
    pair, _, experiment, compare = reference
    if not HAS_HOOKED and pair.tuned.model.cfg.dtype == torch.float64:
        pytest.skip("Hugging Face's mask of float64 is infinite in its softmax of float32")
    engine = HookEngine(
        experiment.tuned_model,
        experiment.prompts,
        place=Place(batch_size=batch_size),
        padding_side="left",
    )
    torch.testing.assert_close(
        engine.clean_z(MAIN), experiment.sources[MAIN, SELF], atol=1e-5, rtol=0
    )
    monkeypatch.setitem(experiment.ends._engines, "tuned", engine)
    compare(columns(experiment.measure(MAIN, SETS, ALPHA)))


def shuffled(pair):
    prompts = list(pair.prompts.prompts)
    random.Random(5).shuffle(prompts)
    return pair_of(pair.base.model, pair.tuned.model, PromptSet(tuple(prompts)))


@pytest.mark.parametrize("engine", ENGINES)
def test_prompt_order_does_not_matter(reference, engine):
    """Shuffled prompts give the same number for each prompt, under its own id."""
    pair, maps, before, compare = reference
    experiment = prepared(shuffled(pair), maps, engine=engine, batch_size=5)
    rows = [before.prompt_ids.index(name) for name in experiment.prompt_ids]
    assert rows != sorted(rows)
    compare(columns(experiment.measure(MAIN, SETS, ALPHA)), rows)


def test_prompt_order_does_not_change_a_map(reference):
    """Maps fitted on shuffled train prompts are the same maps, to 1e-5."""
    pair, maps, _, _ = reference
    again = fit_maps(shuffled(pair), [MAIN])[MAIN]
    torch.testing.assert_close(again.weight, maps[MAIN].weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.bias, maps[MAIN].bias, atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_chunking_does_not_matter(reference, engine):
    """Conditions measured one by one, last first, give the numbers of all at once."""
    pair, maps, _, compare = reference
    experiment = prepared(pair, maps, engine=engine)
    parts = [experiment.measure(MAIN, [heads], ALPHA) for heads in reversed(SETS)][::-1]
    compare(np.concatenate([columns(part) for part in parts], axis=1))


# --- law 6: the fast engine is the reference -----------------------------------------------------


@pytest.mark.parametrize("k_positions", [1, 3])
@pytest.mark.parametrize("layer", range(TINY_LAYERS))
def test_the_fast_engine_equals_the_hooks(pair_and_tolerance, layer, k_positions):
    """Every head set, raw and mapped, at every layer, at one and at three patched positions."""
    pair, tolerance = pair_and_tolerance
    activations = PairActivations(pair, k_positions=k_positions)
    maps = fit_maps(pair, [layer], activations=activations)
    fast, slow = (
        prepared(pair, maps, engine=engine, activations=activations) for engine in ENGINES
    )
    assert (fast.engine.name, slow.engine.name) == ENGINES
    found, expected = (columns(each.measure(layer, SETS, ALPHA)) for each in (fast, slow))
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)
    assert expected[0].mean() > 1e-4


def test_the_fast_engine_equals_the_hooks_on_joint_patches(pair_and_tolerance):
    """Patches of two layers in one forward pass: both engines apply both."""
    pair, tolerance = pair_and_tolerance
    maps = fit_maps(pair, [0, 2])
    late = Patch(2, SETS[2], 1.0, MAPPED)
    interventions = [(Patch(0, SETS[1], 0.3, RAW), late), (late,)]
    fast, slow = (
        experiment.engine.effects(interventions, experiment.sources).kl_nats
        for experiment in (prepared(pair, maps, engine=engine) for engine in ENGINES)
    )
    np.testing.assert_allclose(fast, slow, atol=tolerance, rtol=0)
    assert np.abs(slow[0] - slow[1]).max() > 1e-4


# --- law 7: pairs that do not belong together ----------------------------------------------------


class Unpaired(PairActivations):
    """Train activations whose tuned side belongs to other prompts than the base side."""

    def z(self, side, split, layer):
        """The captured activations, the tuned train prompts seven places on."""
        z = super().z(side, split, layer)
        return z.roll(7, dims=0) if (side, split) == ("tuned", "train") else z


def test_shuffled_pairs_destroy_the_maps_advantage(tiny_pair, tiny_maps):
    """A map fitted on base and tuned prompts that do not belong together repairs little."""
    unpaired = fit_maps(tiny_pair, [MAIN], activations=Unpaired(tiny_pair))
    everything = [HeadSet.all(TINY_HEADS)]
    true, shuffled = (
        delta_nats(prepared(tiny_pair, maps).measure(MAIN, everything, ALPHA)).mean()
        for maps in ({MAIN: tiny_maps[MAIN]}, unpaired)
    )
    assert true > 0
    assert shuffled < 0.5 * true


# --- traps ---------------------------------------------------------------------------------------


def test_alpha_is_applied_once(tiny_pair, tiny_maps):
    """A source that is patched at `α` does what its own blend with the tuned z does at 1.

    Were mapped vectors multiplied by alpha before they are blended, the two would differ.
    """
    experiment = prepared(tiny_pair, {MAIN: tiny_maps[MAIN]})
    blends = {
        (MAIN, f"{source} blended"): torch.lerp(
            experiment.sources[MAIN, SELF], experiment.sources[MAIN, source], ALPHA
        )
        for source in (RAW, MAPPED)
    }
    at_alpha = experiment.measure(MAIN, SETS, ALPHA)
    at_one = experiment.with_sources(blends).measure(
        MAIN, SETS, 1.0, raw="raw blended", mapped="mapped blended"
    )
    np.testing.assert_allclose(columns(at_one), columns(at_alpha), atol=ROUNDING_NATS, rtol=0)


def test_sources_are_what_their_names_say(tiny_pair, tiny_maps):
    """`raw` is the base z itself, `mapped` is `M(z_b)`, `self` is the tuned z: none is scaled."""
    experiment = prepared(tiny_pair, tiny_maps)
    activations = PairActivations(tiny_pair)
    for layer in tiny_maps:
        z_b = activations.z("base", "val", layer)
        assert torch.equal(experiment.sources[layer, RAW], z_b)
        expected = torch.einsum("nphi,hij->nphj", z_b, tiny_maps[layer].weight)
        expected = expected + tiny_maps[layer].bias
        torch.testing.assert_close(experiment.sources[layer, MAPPED], expected)
        z_t = activations.z("tuned", "val", layer)
        torch.testing.assert_close(experiment.sources[layer, SELF], z_t, atol=1e-5, rtol=0)


def test_raw_is_never_reported_as_mapped(tiny_pair, tiny_maps, tiny_grid):
    """Both columns of every condition are what the reference measures for their own source.

    The same head set and alpha stand in both; only `none` and `self` may agree.
    """
    experiment = prepared(tiny_pair, tiny_maps, engine="hooks")
    for condition in tiny_grid.conditions.values():
        sources = (SELF, SELF) if condition.cond == "self" else (RAW, MAPPED)
        patches = [(Patch(condition.layer, condition.heads, ALPHA, name),) for name in sources]
        expected = experiment.engine.effects(patches, experiment.sources).kl_nats
        for found, kl in zip(
            (condition.kl_raw_nats, condition.kl_mapped_nats), expected, strict=True
        ):
            np.testing.assert_allclose(found, kl, atol=ROUNDING_NATS, rtol=0)
        if condition.cond not in {"none", "self"}:
            assert np.abs(condition.delta_nats).max() > 1e-6


def test_another_map_changes_the_mapped_column_alone(tiny_pair, tiny_grid):
    """`KL_raw` does not depend on the map; with the identity map both columns are the same."""
    maps = fit_maps(tiny_pair, [MAIN, CONTROL], "identity")
    grid = grid_of(tiny_pair, maps, MAIN, CONTROL, ALPHA, ks=(1,))
    for single, before in zip(grid.singles, tiny_grid.singles, strict=True):
        np.testing.assert_allclose(single.kl_raw_nats, before.kl_raw_nats, atol=1e-12)
        np.testing.assert_allclose(single.kl_mapped_nats, single.kl_raw_nats, atol=1e-12)
        assert single.delta == pytest.approx(0, abs=1e-12)


def test_a_head_that_does_nothing_scores_nothing():
    """A head whose activations are the same in both models covers 0%, not 100%."""
    base, heads = tiny_model(), [1, 2]
    if HAS_HOOKED:
        _, pair = gauge_pair(base, MAIN, heads, random_prompts())
    else:
        pair = pair_of(base, rotated_bridge(base, MAIN, heads), random_prompts())
    grid = grid_of(pair, fit_maps(pair, [MAIN]), MAIN, alpha=ALPHA, ks=(1,))
    by_name = {record["cond"]: record for record in to_json(records(resampled(grid, 200)))}
    for head in range(TINY_HEADS):
        if head not in heads:
            assert abs(by_name[f"head{head}"]["coverage_pct"]) < 0.1
            assert grid.ranking.rank_of(head) > 2


def test_random_sets_are_the_documented_ones(tiny_grid):
    """`rand{k}_s{seed}` patches `sorted(random.Random(seed).sample(range(H), k))`."""
    for k in (1, 2):
        for seed in (0, 1, 2):
            condition = tiny_grid[f"rand{k}_s{seed}"]
            expected = sorted(random.Random(seed).sample(range(TINY_HEADS), k))
            assert list(condition.heads) == expected


def test_the_top_sets_are_the_best_single_heads(tiny_grid):
    """`top{k}` holds the k heads of largest single-head `ΔKL`."""
    order = sorted(range(TINY_HEADS), key=lambda head: -tiny_grid.single(head).delta)
    for k in (1, 2):
        assert set(tiny_grid[f"top{k}"].heads) == set(order[:k])


# --- the trap of the newest file -----------------------------------------------------------------


@pytest.fixture
def two_heads():
    """Two heads whose effects differ much: one rotated, one rewired; and their grid."""
    base = tiny_model()
    if HAS_HOOKED:
        how = Planting(strength=0.5)
        tuned = plant(base, rotated=[Head(MAIN, 0)], rewired=[Head(MAIN, 2)], how=how).tuned
    else:
        tuned = fine_tuned(rotated_bridge(base, MAIN, [0]))
    pair = pair_of(base, tuned, random_prompts())
    maps = fit_maps(pair, [MAIN])
    return lambda store: grid_of(pair, maps, MAIN, alpha=ALPHA, ks=(1, 2), store=store)


def numbers(grid):
    return np.stack(
        [
            values
            for condition in grid.conditions.values()
            for values in (condition.kl_raw_nats, condition.kl_mapped_nats)
        ]
    )


def test_every_head_has_its_own_numbers(two_heads, tmp_path):
    """A second run takes every number from disk and gives each head its own ones again."""
    fresh = two_heads(None)
    first, second = (two_heads(Store(tmp_path)) for _ in range(2))
    assert np.array_equal(numbers(first), numbers(fresh))
    assert np.array_equal(numbers(second), numbers(fresh))
    one, other = second.single(0), second.single(2)
    assert min(one.KL_raw, other.KL_raw, abs(one.KL_raw - other.KL_raw)) > 1e-3
    store = Store(tmp_path)
    two_heads(store)
    assert store.counters.computed == 0


def records_of_head(directory, head):
    return sorted(directory.glob(f"L{MAIN}_heads{head}_*.json"))


def swap(directory):
    for one, other in zip(
        records_of_head(directory, 0), records_of_head(directory, 2), strict=True
    ):
        contents = one.read_bytes(), other.read_bytes()
        one.write_bytes(contents[1])
        other.write_bytes(contents[0])


def copy_newest_over_all(directory):
    newest = records_of_head(directory, 2)[0].read_bytes()
    for path in directory.glob("*.json"):
        path.write_bytes(newest)


def exchange_payloads(directory):
    for one, other in zip(
        records_of_head(directory, 0), records_of_head(directory, 2), strict=True
    ):
        first, second = json.loads(one.read_text()), json.loads(other.read_text())
        first["payload"], second["payload"] = second["payload"], first["payload"]
        one.write_text(json.dumps(first))
        other.write_text(json.dumps(second))


def truncate(directory):
    for path in records_of_head(directory, 0):
        path.write_bytes(path.read_bytes()[:-40])


def change_a_number(directory):
    for path in records_of_head(directory, 0):
        record = json.loads(path.read_text())
        record["payload"]["kl_nats"][0] += 1.0
        path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "damage", [swap, copy_newest_over_all, exchange_payloads, truncate, change_a_number]
)
def test_no_head_is_given_the_numbers_of_another(two_heads, tmp_path, damage):
    """Records that were swapped, copied over each other or changed never reach a result."""
    fresh = numbers(two_heads(None))
    two_heads(Store(tmp_path))
    damage(tmp_path)
    store = Store(tmp_path)
    assert np.array_equal(numbers(two_heads(store)), fresh)
    assert store.counters.set_aside
