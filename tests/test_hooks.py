"""The reference engine: hooks that are there while a patch lasts, and not a moment longer."""

import re

import numpy as np
import pytest
import torch
from tiny import ALPHA, MAIN, TINY_HEADS, TINY_LAYERS, TINY_WIDTH, prepared

from rq4lens.config import Place
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.models.load.lens import z_site
from rq4lens.patching.activations import capture_z
from rq4lens.patching.engines.hooks import HookEngine, patched_heads
from rq4lens.patching.experiment import prepare
from rq4lens.patching.passes import forward_batch
from rq4lens.patching.patch import (
    BASE,
    CONSTANT,
    MAPPED,
    OUTPUT,
    RAW,
    SELF,
    SHIFTED,
    TUNED,
    Patch,
    Sources,
    blend,
    next_token_effects,
)
from rq4lens.patching.patched import patch

PATCH = (Patch(MAIN, HeadSet.of([1], TINY_HEADS), ALPHA, "raw"),)


@pytest.fixture(scope="module")
def model(tiny_pair):
    return tiny_pair.tuned.model


@pytest.fixture(scope="module")
def prompts(tiny_pair):
    return tiny_pair.tokens("tuned", "val")


@pytest.fixture(scope="module")
def batch(prompts):
    return next(prompts.batches(64))


def sources(n_prompts=16, positions=1, heads=TINY_HEADS, width=TINY_WIDTH):
    generator = torch.Generator().manual_seed(0)
    return Sources(
        {(MAIN, "raw"): torch.randn(n_prompts, positions, heads, width, generator=generator)}
    )


def hooks_of(model):
    return [hook for point in model.hook_dict.values() for hook in point.fwd_hooks]


def watching(seen):
    """A hook that notes where it was called and what it saw."""
    return lambda z, hook: seen.append((hook.name, z.clone()))


# --- what stays behind


def test_a_patch_leaves_no_hook_behind(model, batch):
    """While the context lasts there is one hook, at the patched site; afterwards there is none."""
    with patched_heads(model, PATCH, sources(), batch):
        assert len(hooks_of(model)) == len(model.hook_dict[z_site(MAIN)].fwd_hooks) == 1
    assert hooks_of(model) == []


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt, UserError])
def test_no_exception_leaves_a_hook_behind(model, batch, problem):
    """Whatever interrupts a patched forward pass, the model is clean afterwards."""
    with pytest.raises(problem), patched_heads(model, PATCH, sources(), batch):
        raise problem("stop")
    assert hooks_of(model) == []


def test_an_exception_inside_the_hook_leaves_none_behind(model, batch):
    """A source that does not fit is found while the model runs; the model is clean afterwards."""
    wrong = sources(width=3)
    with pytest.raises(UserError), patched_heads(model, PATCH, wrong, batch):
        forward_batch(model, batch)
    assert hooks_of(model) == []


def test_a_patched_run_leaves_the_model_as_it_was(model, batch):
    """The same logits before and after, bit for bit."""
    before = forward_batch(model, batch)
    with patched_heads(model, PATCH, sources(), batch):
        patched = forward_batch(model, batch)
    assert torch.equal(forward_batch(model, batch), before)
    assert not torch.equal(patched, before)


def test_hooks_of_the_user_stay(model, batch):
    """A hook that was there before the patch is there after it."""
    seen = []
    model.add_hook(z_site(0), watching(seen))
    try:
        with patched_heads(model, PATCH, sources(), batch):
            forward_batch(model, batch)
        forward_batch(model, batch)
    finally:
        model.reset_hooks()
    assert [name for name, _ in seen] == [z_site(0)] * 2


def test_patches_nest(model, batch):
    """The inner patch ends with its context, the outer one goes on."""
    inner = (Patch(2, HeadSet.all(TINY_HEADS), 1.0, "raw"),)
    both = Sources({(layer, "raw"): sources()[MAIN, "raw"] for layer in (MAIN, 2)})
    with patched_heads(model, PATCH, both, batch):
        outer_alone = forward_batch(model, batch)
        with patched_heads(model, inner, both, batch):
            assert not torch.equal(forward_batch(model, batch), outer_alone)
        assert torch.equal(forward_batch(model, batch), outer_alone)
    assert hooks_of(model) == []


# --- what is patched


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("k_positions", [1, 3])
def test_only_the_named_heads_and_positions_change(model, prompts, padding_side, k_positions):
    """`z'` is the blend at the heads and last positions of the patch, and `z` everywhere else."""
    (batch,) = prompts.placed(k_positions).batches(64, padding_side)
    values = sources(positions=k_positions)
    seen = []
    look = [(z_site(MAIN), watching(seen))]
    with model.hooks(fwd_hooks=look):
        forward_batch(model, batch)
    with patched_heads(model, PATCH, values, batch), model.hooks(fwd_hooks=look):
        forward_batch(model, batch)
    (_, before), (_, after) = seen
    expected = before.clone()
    for row, positions in enumerate(batch.patched.at):
        for index, position in enumerate(positions):
            source = values[MAIN, "raw"][batch.rows[row], index, 1]
            old = before[row, position, 1]
            expected[row, position, 1] = (1 - ALPHA) * old + ALPHA * source
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=0)


def test_the_blend_is_exact_at_both_ends():
    """α = 0 gives z and α = 1 gives the source, bit for bit, and a source equal to z gives z."""
    z, source = torch.randn(5, 4, 3), 1000 * torch.randn(5, 4, 3)
    mask = torch.tensor(HeadSet.of([0, 2], 4).mask, dtype=torch.bool)
    assert torch.equal(blend(z, source, mask, 0.0), z)
    full = blend(z, source, mask, 1.0)
    assert torch.equal(full[:, [0, 2]], source[:, [0, 2]])
    assert torch.equal(full[:, [1, 3]], z[:, [1, 3]])
    assert torch.equal(blend(z, z, mask, 0.3), z)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), float("inf")])
def test_alpha_is_a_blend_strength(alpha):
    """Anything outside [0, 1] is refused."""
    with pytest.raises(UserError, match="is not a blend strength"):
        Patch(0, HeadSet.none(4), alpha, "raw")


# --- what does not fit


@pytest.mark.parametrize(
    ("wrong", "shape"),
    [
        ({"n_prompts": 15}, r"\(15, 1, 4, 8\)"),
        ({"n_prompts": 17}, r"\(17, 1, 4, 8\)"),
        ({"positions": 2}, r"\(16, 2, 4, 8\)"),
        ({"heads": 3}, r"\(16, 1, 3, 8\)"),
        ({"width": 4}, r"\(16, 1, 4, 4\)"),
    ],
)
def test_a_source_that_does_not_fit_is_named(model, prompts, wrong, shape):
    """The sentence names the hook, its layer, the site's shape and the source's."""
    with pytest.raises(
        UserError,
        match=rf"source 'raw' into blocks\.{MAIN}\.attn\.hook_z.*\(16, 1, 4, 8\).*source {shape}",
    ):
        HookEngine(model, prompts).effects([PATCH], sources(**wrong))
    assert hooks_of(model) == []


def test_sources_of_other_prompts_are_refused():
    """All sources of an experiment belong to the same prompts and positions."""
    with pytest.raises(UserError, match="sources disagree on prompts and positions"):
        Sources({(0, "raw"): torch.zeros(3, 1, 4, 8), (0, "mapped"): torch.zeros(4, 1, 4, 8)})


def test_a_missing_source_is_named(model, prompts):
    """The sentence names what was asked for and what there is."""
    patch = Patch(MAIN, HeadSet.of([0], TINY_HEADS), 0.3, "mapped")
    with pytest.raises(UserError, match=rf"source 'mapped' at layer {MAIN}: there are 'raw' at"):
        HookEngine(model, prompts).effects([(patch,)], sources())


def test_every_source_is_named(tiny_pair, tiny_maps):
    """Those that are made when they are asked for stand in the sentence beside those of maps."""
    experiment = prepare(tiny_pair, tiny_maps)
    every = [RAW, MAPPED, BASE, SELF, TUNED, CONSTANT, SHIFTED, OUTPUT]
    with (
        pytest.raises(UserError, match="source 'banana'") as said,
        patch(experiment, MAIN, "0", source="banana"),
    ):
        pass
    assert list(dict.fromkeys(re.findall(r"'(\w+)'", str(said.value))))[1:] == every
    for source in every:
        with patch(experiment, MAIN, "0", source=source) as patched:
            assert torch.isfinite(patched.logits()).all()


@pytest.mark.parametrize(
    ("patches", "said"),
    [
        ([Patch(TINY_LAYERS, HeadSet.all(TINY_HEADS), 0.3, "raw")], "layer 3 does not exist"),
        ([Patch(-1, HeadSet.all(TINY_HEADS), 0.3, "raw")], "layer -1 does not exist"),
        ([Patch(MAIN, HeadSet.all(5), 0.3, "raw")], "made for 5 heads"),
        (
            [Patch(MAIN, HeadSet.of([h], TINY_HEADS), 0.3, "raw") for h in (0, 1)],
            "patches layer 1 twice",
        ),
    ],
)
def test_an_intervention_that_does_not_fit_is_refused(model, prompts, patches, said):
    """A layer, head set or combination that the model cannot take is said before anything runs."""
    with pytest.raises(UserError, match=said):
        HookEngine(model, prompts).effects([tuple(patches)], sources())


@pytest.mark.parametrize("k_positions", [0, 4])
def test_positions_that_a_prompt_does_not_have_are_refused(model, prompts, k_positions):
    """K is at least 1 and at most the shortest prompt's length."""
    shortest = min(len(tokens) for tokens in prompts.token_ids)
    assert shortest == 3
    with pytest.raises(UserError, match=f"k_positions {k_positions} does not fit.*has 3 tokens"):
        capture_z(model, prompts, [0], k_positions=k_positions)


@pytest.mark.parametrize(
    ("layers", "said"), [([], "no layer"), ([3], "layer 3"), ([-1], "layer -1")]
)
def test_layers_that_do_not_exist_are_refused(model, prompts, layers, said):
    """Capturing names the layers that there are."""
    with pytest.raises(UserError, match=said):
        capture_z(model, prompts, layers)


# --- what is read


@pytest.mark.parametrize("k_positions", [1, 3])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_captured_z_is_that_of_each_prompt_alone(model, prompts, padding_side, k_positions):
    """`[prompt position head d_head]`, the decision token last, as an unpadded pass gives it."""
    captured = capture_z(
        model, prompts, [0, 2], k_positions=k_positions, batch_size=5, padding_side=padding_side
    )
    for row, tokens in enumerate(prompts.token_ids):
        _, cache = model.run_with_cache(torch.tensor([tokens]))
        for layer in (0, 2):
            alone = cache[z_site(layer)][0, -k_positions:]
            torch.testing.assert_close(captured[layer][row], alone, atol=1e-5, rtol=0)


def test_capturing_ends_with_the_last_layer(model, prompts):
    """Nothing above the deepest layer asked for is computed."""
    ran = []
    watch = [(z_site(layer), watching(ran)) for layer in range(3)]
    with model.hooks(fwd_hooks=watch):
        capture_z(model, prompts, [0, 1], batch_size=64)
    assert [name for name, _ in ran] == [z_site(0), z_site(1)]


# --- the divergence


def test_the_divergence_is_the_textbook_sum():
    """`Σ p (ln p - ln q)`, one way and the other, in nats."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 3, 7))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (one, other))
    forward = next_token_effects(torch.tensor(one), torch.tensor(other))[0]
    backward = next_token_effects(torch.tensor(one), torch.tensor(other), "clean||patched")[0]
    np.testing.assert_allclose(forward, (p * np.log(p / q)).sum(-1), atol=1e-12)
    np.testing.assert_allclose(backward, (q * np.log(q / p)).sum(-1), atol=1e-12)


def test_the_divergence_of_one_distribution_from_itself_is_zero():
    """Equal logits, and logits that differ by a constant, diverge by nothing."""
    logits = torch.randn(4, 9)
    assert (next_token_effects(logits, logits)[0] == 0).all()
    torch.testing.assert_close(
        next_token_effects(logits + 3, logits)[0], torch.zeros(4).double(), atol=1e-6, rtol=0
    )


def test_a_masked_word_adds_nothing():
    """A logit of minus infinity on both sides leaves the divergence of the other words."""
    one, other = torch.randn(2, 5)
    masked = [torch.cat([x, torch.tensor([-torch.inf])]) for x in (one, other)]
    torch.testing.assert_close(next_token_effects(*masked)[0], next_token_effects(one, other)[0])


def test_tiny_divergences_are_not_lost_to_rounding():
    """A logit moved by ε in float32 gives `½ p (1 - p) ε²`, far below float32's own resolution."""
    clean = torch.zeros(4)
    patched = clean.clone()
    patched[0] = 1e-4
    expected = 0.5 * 0.25 * 0.75 * 1e-8
    assert float(next_token_effects(patched, clean)[0]) == pytest.approx(expected, rel=1e-3)


def test_the_answers_change_is_that_of_the_clean_top_token():
    """Its log-probability, patched minus clean."""
    clean, patched = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    p = torch.tensor([2.0, 0.0]).softmax(-1)
    expected = float((p[1] / p[0]).log())
    assert float(next_token_effects(patched, clean)[1]) == pytest.approx(expected)


def test_progress_counts_every_row(model, prompts):
    """The rows that are reported add up to prompts times interventions."""
    counted = []
    HookEngine(model, prompts, place=Place(batch_size=5)).effects(
        [PATCH, ()], sources(), counted.append
    )
    assert sum(counted) == 2 * len(prompts)


# --- to look at


@pytest.mark.parametrize("source", ["raw", "mapped", "constant", "shifted", "output", "self"])
@pytest.mark.parametrize("ready", [True, False])
def test_what_is_looked_at_is_what_is_measured(tiny_pair, tiny_maps, prompts, ready, source):
    """The logits of a patched forward pass have the divergence that the experiment measures."""
    experiment = prepared(tiny_pair, tiny_maps)
    heads = HeadSet.of([0, 2], TINY_HEADS)
    expected = experiment.effects([Patch(MAIN, heads, ALPHA, source)]).kl_nats[0]
    clean = HookEngine(tiny_pair.tuned.model, prompts).clean_log_probs()[:, 0]
    with patch(experiment if ready else tiny_pair, MAIN, "0,2", ALPHA, source) as patched:
        kl_nats, _ = next_token_effects(patched.logits(), clean)
        assert patched.prompts.ids == prompts.ids
    assert kl_nats.numpy() == pytest.approx(expected, abs=1e-6)
    assert source == "self" or expected.max() > 1e-5


def test_a_patched_model_is_run_on_its_tokens(tiny_pair):
    """Its tokens are those of the prompts named, in that order; base z stands where it should."""
    ids = tiny_pair.prompts.split("val").ids[5:2:-1]
    base, tuned = tiny_pair.base.model, tiny_pair.tuned.model
    rows = torch.arange(3)
    with patch(tiny_pair, MAIN, "L1H3", prompts=ids) as patched:
        logits, cache = patched.model.run_with_cache(patched.tokens)
        assert torch.allclose(logits[rows, patched.decision], patched.logits())
        table = patched.to_dataframe()
    assert list(table["id"]) == list(patched.prompts.ids) == list(ids)
    assert list(table["text"]) == list(patched.prompts.texts)
    z = cache[z_site(MAIN)][rows, patched.decision]
    own, other = (
        each.run_with_cache(patched.tokens)[1][z_site(MAIN)][rows, patched.decision]
        for each in (tuned, base)
    )
    assert torch.allclose(z[:, 3], other[:, 3], atol=1e-6)
    assert torch.allclose(z[:, :3], own[:, :3], atol=1e-6)
    assert not torch.allclose(own[:, 3], other[:, 3], atol=1e-2)


def test_tuned_activations_go_into_the_base_model(tiny_pair):
    """Source `tuned` patches the other way round."""
    with patch(tiny_pair, MAIN, "ALL", source="tuned") as patched:
        assert patched.model is tiny_pair.base.model
        changed = patched.logits()
    clean = forward_batch(tiny_pair.base.model, patched.batch)
    assert not torch.allclose(changed, clean[torch.arange(16), patched.decision], atol=1e-2)


def test_a_patch_that_is_over_is_over(tiny_pair):
    """No hook stays, also after an exception, and logits are not read from the clean model."""
    with pytest.raises(ZeroDivisionError), patch(tiny_pair, MAIN, [0]) as patched:
        assert len(hooks_of(tiny_pair.tuned.model)) == 1
        raise ZeroDivisionError
    assert hooks_of(tiny_pair.tuned.model) == []
    assert "(off)" in repr(patched)
    with pytest.raises(UserError, match="the patch is off"):
        patched.logits()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"layer": 9}, "layer 9 does not exist"),
        ({"heads": "L0H1"}, "head L0H1 is not of layer 1"),
        ({"alpha": 2.0}, "alpha 2.0 is not a blend strength"),
        ({"source": "nope"}, "no activations for source 'nope'"),
        ({"prompts": ["nope"]}, "there is no prompt 'nope': name ids in a list"),
    ],
)
def test_what_cannot_be_looked_at_is_named(tiny_pair, asked, said):
    """One sentence says what is wrong."""
    with pytest.raises(UserError, match=said), patch(tiny_pair, **{"layer": 1, "heads": 0} | asked):
        pass
