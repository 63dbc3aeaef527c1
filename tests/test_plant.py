"""What is planted is what the truth says, and nothing else."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LinearRegression
from tiny import pair_of, random_prompts, tiny_model

from rq4lens.errors import UserError
from rq4lens.heads import Head
from rq4lens.models.load.lens import HookedTransformer, HookedTransformerConfig
from rq4lens.validation.attended import AttendedInputs
from rq4lens.validation.planting import CHANGE_KINDS, WEIGHTS, Planting, plant, unrelated

N_HEADS, N_LAYERS, D_HEAD = 4, 3, 5
LAYER = 1


def model_of(n_key_value_heads: int | None, seed: int = 0) -> HookedTransformer:
    torch.manual_seed(seed)
    cfg = HookedTransformerConfig(
        n_layers=N_LAYERS,
        d_model=20,
        n_ctx=12,
        d_head=D_HEAD,
        n_heads=N_HEADS,
        n_key_value_heads=n_key_value_heads,
        d_vocab=17,
        act_fn="gelu",
        normalization_type="LN",
        device="cpu",
        init_mode="xavier_normal",
    )
    model = HookedTransformer(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "b_" in name:
                parameter.normal_()
    return model.eval()


@pytest.fixture(scope="module", params=[None, 2, 1], ids=["all heads", "grouped", "one value head"])
def base(request):
    return model_of(request.param)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 17, (6, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, tokens):
    return model(tokens)


@torch.no_grad()
def z(model, tokens, layer=LAYER):
    return model.run_with_cache(tokens)[1][f"blocks.{layer}.attn.hook_z"]


def of_layer(*indices, layer=LAYER):
    return [Head(layer, index) for index in indices]


PLAIN_KINDS = [kind for kind in CHANGE_KINDS if kind != "replaced"]
"""Kinds that need no look at what heads attend to."""


def unchanged(pair):
    return [h for h in range(N_HEADS) if h not in pair.changed_heads(LAYER)]


@pytest.mark.parametrize("kind", ["rotated", "scaled"])
def test_a_change_of_coordinates_keeps_the_function(base, tokens, kind):
    """Rotating or scaling value spaces changes no logit by more than 1e-5."""
    heads = [*of_layer(1), *of_layer(0, 3, layer=2)]
    pair = plant(base, **{kind: heads})
    assert torch.allclose(logits(pair.tuned, tokens), logits(base, tokens), atol=1e-5)
    assert set(heads) <= set(pair.truth)


def test_a_rotated_head_reads_as_the_recorded_rotation(base, tokens):
    """`z_t = z_b R` with the R of the truth, R orthogonal, at every head that shares it."""
    pair = plant(base, rotated=of_layer(2))
    (change,) = pair.changes
    rotation = change.rotation
    identity = torch.eye(D_HEAD, dtype=rotation.dtype)
    torch.testing.assert_close(rotation @ rotation.T, identity, atol=1e-12, rtol=0)
    for head in pair.changed_heads(LAYER):
        expected = z(base, tokens)[:, :, head] @ rotation.float()
        torch.testing.assert_close(z(pair.tuned, tokens)[:, :, head], expected, atol=1e-5, rtol=0)


def test_a_turned_head_reads_as_rotated_and_writes_as_before(base, tokens):
    """`z_t = z_b R` and `W_O` as it was: the function changes."""
    pair = plant(base, turned=of_layer(2))
    (change,) = pair.changes
    expected = z(base, tokens)[:, :, 2] @ change.rotation.float()
    torch.testing.assert_close(z(pair.tuned, tokens)[:, :, 2], expected, atol=1e-5, rtol=0)
    assert torch.equal(pair.tuned.blocks[LAYER].attn.W_O, base.blocks[LAYER].attn.W_O)
    assert not torch.allclose(logits(pair.tuned, tokens), logits(base, tokens), atol=1e-3)


def test_an_unrelated_model_has_the_same_entries_elsewhere(base):
    """Sizes stay, directions do not: the cosine of each matrix is near 0."""
    other = unrelated(base, seed=1).tuned.state_dict()
    for name, weight in base.state_dict().items():
        if name not in dict(base.named_parameters()):
            continue
        assert torch.equal(weight.flatten().sort().values, other[name].flatten().sort().values)
        if weight.dim() > 1 and "b_" not in name and weight.numel() > 300:
            cosine = torch.cosine_similarity(weight.flatten(), other[name].flatten(), dim=0)
            assert abs(float(cosine)) < 0.25, name


def test_a_scaled_head_reads_as_the_recorded_scale(base, tokens):
    """`z_t = s z_b` with `s = 1 + strength`."""
    pair = plant(base, scaled=of_layer(2), how=Planting(strength=0.5))
    assert pair.changes[0].scale == 1.5
    heads = list(pair.changed_heads(LAYER))
    expected = 1.5 * z(base, tokens)[:, :, heads]
    torch.testing.assert_close(z(pair.tuned, tokens)[:, :, heads], expected, atol=1e-5, rtol=0)


def test_a_shifted_head_reads_as_the_recorded_shift(base, tokens):
    """`z_t = z_b + v`: attention rows sum to one. `|v| = strength |W_V|`."""
    pair = plant(base, shifted=of_layer(2), how=Planting(strength=0.25))
    shift = pair.changes[0].shift
    head = 2
    expected = z(base, tokens)[:, :, head] + shift.float()
    torch.testing.assert_close(z(pair.tuned, tokens)[:, :, head], expected, atol=1e-5, rtol=0)
    norm = base.blocks[LAYER].attn.W_V[head].double().norm()
    torch.testing.assert_close(shift.norm(), 0.25 * norm)


def test_a_rewired_head_does_something_else(base, tokens):
    """New content changes the head's activations and the model's function."""
    pair = plant(base, rewired=of_layer(2))
    assert not torch.allclose(logits(pair.tuned, tokens), logits(base, tokens), atol=1e-3)
    assert not torch.allclose(z(pair.tuned, tokens)[:, :, 2], z(base, tokens)[:, :, 2], atol=1e-3)


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_every_other_head_is_untouched(base, tokens, kind):
    """Heads outside the truth read bit for bit as before, in the layer and before it."""
    pair = plant(base, **{kind: of_layer(2)})
    others = unchanged(pair)
    assert torch.equal(z(pair.tuned, tokens)[:, :, others], z(base, tokens)[:, :, others])
    assert torch.equal(z(pair.tuned, tokens, 0), z(base, tokens, 0))


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_the_truth_names_exactly_the_heads_that_read_differently(base, tokens, kind):
    """With shared value heads the truth is the whole group, no more and no less."""
    pair = plant(base, **{kind: of_layer(2)})
    moved = (z(pair.tuned, tokens) - z(base, tokens)).abs().amax(dim=(0, 1, 3)) > 1e-4
    assert [h for h in range(N_HEADS) if moved[h]] == list(pair.changed_heads(LAYER))
    assert set(pair.truth.values()) == {kind}


def test_new_queries_belong_to_one_head_alone(base, tokens):
    """Rewiring only `W_Q` of a head leaves the heads that share its value head alone."""
    pair = plant(base, rewired=of_layer(2), how=Planting(weights=["W_Q"]))
    assert pair.truth == {Head(LAYER, 2): "rewired"}
    moved = (z(pair.tuned, tokens) - z(base, tokens)).abs().amax(dim=(0, 1, 3)) > 1e-4
    assert moved.tolist() == [False, False, True, False]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_new_content_has_the_stated_size_and_rank(weight):
    """`|W' - W| = strength |W|` in Frobenius norm, with the stated rank."""
    base = model_of(None)
    pair = plant(base, rewired=of_layer(2), how=Planting(weights=[weight], strength=0.5, rank=2))
    old, new = (getattr(m.blocks[LAYER].attn, weight)[2].double() for m in (base, pair.tuned))
    torch.testing.assert_close((new - old).norm(), 0.5 * old.norm(), rtol=1e-5, atol=0)
    singular = torch.linalg.svdvals(new - old)
    assert singular[1] > 1e-3
    assert singular[2] < 1e-5


def test_drift_moves_every_parameter_by_its_share(base):
    """Each parameter moves by `drift` times its own norm."""
    pair = plant(base, how=Planting(drift=0.01))
    tuned = dict(pair.tuned.named_parameters())
    for name, old in base.named_parameters():
        moved = (tuned[name] - old).double().norm()
        torch.testing.assert_close(moved, 0.01 * old.double().norm(), rtol=1e-3, atol=1e-12)
    assert pair.truth == {}


def test_the_base_model_is_never_changed(base):
    """Planting works on a copy."""
    before = {name: value.clone() for name, value in base.named_parameters()}
    plant(base, rotated=of_layer(0), rewired=of_layer(2, layer=2), how=Planting(drift=0.1))
    assert all(torch.equal(before[name], value) for name, value in base.named_parameters())


def test_nothing_planted_is_a_null_pair(base, tokens):
    """Without changes the copy gives the very same logits, and the truth is empty."""
    pair = plant(base)
    assert torch.equal(logits(pair.tuned, tokens), logits(base, tokens))
    assert pair.truth == {}


def test_the_seed_decides_everything(base):
    """Equal seeds give equal models; different seeds do not."""
    models = [
        plant(base, rotated=of_layer(1), how=Planting(drift=0.1, seed=s)).tuned for s in (3, 3, 4)
    ]
    same, again, other = (m.blocks[LAYER].attn.W_O for m in models)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_one_more_plant_leaves_the_others_as_they_are():
    """Each change has its own random numbers."""
    base = model_of(None)
    alone = plant(base, rotated=of_layer(1))
    beside = plant(base, rotated=of_layer(1, 3), scaled=of_layer(0))
    assert torch.equal(
        alone.tuned.blocks[LAYER].attn.W_V[1], beside.tuned.blocks[LAYER].attn.W_V[1]
    )


def test_order_and_repetition_of_heads_do_not_matter(base):
    """A head named twice, or in another order, is changed once and in the same way."""
    one = plant(base, rotated=of_layer(0, 3)).tuned.blocks[LAYER].attn.W_V
    other = plant(base, rotated=of_layer(3, 0, 3)).tuned.blocks[LAYER].attn.W_V
    assert torch.equal(one, other)


def test_heads_may_be_labels(base):
    """A head is named as everywhere else."""
    how = Planting(strength=0.5)
    labelled, named = (
        plant(base, how=how, scaled=["L1H3"]),
        plant(base, how=how, scaled=[Head(1, 3)]),
    )
    assert labelled.truth == named.truth
    with pytest.raises(UserError, match="'L1' is no head"):
        plant(base, how=how, scaled=["L1"])


def test_the_truth_is_json():
    """The record of a planted pair can be written with every result."""
    pair = plant(
        model_of(2), rotated=of_layer(0), scaled=of_layer(2), how=Planting(strength=0.5, seed=9)
    )
    none = {"weights": []}
    assert pair.to_dict() == {
        "changes": [
            {"kind": "rotated", "heads": ["L1H0", "L1H1"], "scale": None, **none},
            {"kind": "scaled", "heads": ["L1H2", "L1H3"], "scale": 1.5, **none},
        ],
        "drift": 0.0,
        "strength": 0.5,
        "seed": 9,
    }


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rotated": [Head(9, 0)]}, "L9H0 does not exist"),
        ({"scaled": [Head(0, 4)]}, "L0H4 does not exist"),
        ({"scaled": [Head(0, -1)]}, "does not exist"),
        ({"rotated": of_layer(0), "scaled": of_layer(0)}, "changed twice"),
        ({"rotated": of_layer(0), "shifted": of_layer(1)}, "changed twice"),
        ({"drift": -0.1}, "drift -0.1"),
        ({"drift": float("nan")}, "drift nan"),
        ({"strength": float("inf")}, "strength inf"),
        ({"rank": 0}, "rank 0"),
        ({"rank": 99}, "rank 99"),
    ],
)
def test_what_cannot_be_planted_is_said(asked, said):
    """Bad input is one clear sentence; heads 0 and 1 share a value head here."""
    with pytest.raises(UserError, match=said):
        heads = {kind: asked.pop(kind) for kind in CHANGE_KINDS if kind in asked}
        plant(model_of(2), **heads, how=Planting(**asked))


# Rewired so that no linear map explains it


@pytest.fixture(scope="module")
def prompts():
    """Prompts of several lengths, as both models read them."""
    pair = pair_of(tiny_model(), tiny_model(), random_prompts(n_train=96, n_val=8))
    return pair.tokens("base", "train")


def attended_of(model, prompts, layer=LAYER):
    return AttendedInputs.of(model, prompts, layer, batch_size=20)


@pytest.mark.parametrize("n_key_value_heads", [None, 4])
def test_attended_inputs_times_values_are_the_activations(n_key_value_heads, prompts):
    """`z = x W_V + b_V` for each head, also where heads share a value head."""
    model = tiny_model(n_key_value_heads=n_key_value_heads)
    attended, attention = attended_of(model, prompts), model.blocks[LAYER].attn
    for head in range(model.cfg.n_heads):
        expected = attended.x[:, head] @ attention.W_V[head].double() + attention.b_V[head]
        torch.testing.assert_close(attended.z[:, head], expected, atol=1e-5, rtol=1e-4)


def explained_pct(old, new):
    """Share of a change that least squares with an intercept explains, by scikit-learn."""
    fit = LinearRegression().fit(old, new - old)
    left = ((new - old - fit.predict(old)) ** 2).sum()
    return float(100 * (1 - left / ((new - old) ** 2).sum()))


@pytest.mark.parametrize("n_key_value_heads", [None, 4])
def test_new_values_are_what_no_linear_map_explains(n_key_value_heads, prompts):
    """Unread content has mean zero, is uncorrelated with z, and varies as far as z did.

    Content at random is explained by more than half: it reads the same inputs.
    """
    base = tiny_model(n_key_value_heads=n_key_value_heads)
    attended = attended_of(base, prompts)
    found = {}
    for given in (attended, None):
        pair = plant(
            base, rewired=of_layer(2), how=Planting(weights=["W_V", "W_O"], attended=given)
        )
        new = attended_of(pair.tuned, prompts).z
        for head in pair.changed_heads(LAYER):
            found[given is None, head] = explained_pct(attended.z[:, head], new[:, head])
    assert all(pct < 0.1 for (random, _), pct in found.items() if not random)
    assert all(pct > 25 for (random, _), pct in found.items() if random)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("n_key_value_heads", [None, 4])
def test_a_replaced_head_says_something_else_in_place_of_the_old(
    n_key_value_heads, strength, prompts
):
    """No linear map of the old `z` explains the new; its mean stays, its spread is the strength."""
    base = tiny_model(n_key_value_heads=n_key_value_heads)
    attended = attended_of(base, prompts)
    how = Planting(attended=attended, strength=strength)
    pair = plant(base, replaced=of_layer(2), how=how)
    new, old = attended_of(pair.tuned, prompts).z[:, 2], attended.z[:, 2]
    fit = LinearRegression().fit(old, new)
    left = new - torch.from_numpy(fit.predict(old))
    spread = new - new.mean(0)
    assert float((left**2).sum() / (spread**2).sum()) > 0.99
    torch.testing.assert_close(new.mean(0), old.mean(0), atol=1e-4, rtol=1e-3)
    ratio = float(spread.norm() / (old - old.mean(0)).norm())
    assert ratio == pytest.approx(strength, rel=1e-3)
    assert pair.truth == {Head(LAYER, 2): "replaced"}


def test_a_kind_of_change_that_is_none_is_said():
    """The kinds there are stand in the sentence."""
    with pytest.raises(UserError, match="cannot be bent: plant rotated, scaled"):
        plant(tiny_model(), bent=of_layer(1))


def test_a_replaced_head_needs_to_know_what_is_not_read():
    """Without attended inputs it is refused in one sentence."""
    with pytest.raises(UserError, match="AttendedInputs"):
        plant(tiny_model(), replaced=of_layer(2))


def test_attended_inputs_of_another_layer_are_refused(prompts):
    """What another layer attends to says nothing of this one."""
    base = tiny_model()
    with pytest.raises(UserError, match="not of layer 0"):
        plant(base, rewired=of_layer(1), how=Planting(attended=attended_of(base, prompts, layer=0)))


def test_a_head_that_reads_the_same_everywhere_cannot_be_rewired_by_its_values(prompts):
    """Nothing goes along with the prompt: there is nothing that new values could read."""
    base = tiny_model()
    with torch.no_grad():
        base.blocks[0].attn.W_V[1] = 0
    with pytest.raises(UserError, match="read the same on every prompt"):
        plant(
            base,
            rewired=[Head(0, 1)],
            how=Planting(weights=["W_V"], attended=attended_of(base, prompts, 0)),
        )
