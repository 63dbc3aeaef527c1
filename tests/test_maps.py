"""Maps: each kind finds what it can express, is judged on held-out prompts, and is kept safely."""

import json
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group
from sklearn.model_selection import GroupKFold, GroupShuffleSplit
from slow_maps import slow_fit
from tiny import (
    TINY_HEADS,
    TINY_WIDTH,
    Address,
    fine_tuned,
    pair_of,
    random_prompts,
    stored_map,
    tiny_model,
)

from rq4lens.config import RunConfig
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.heads import Head
from rq4lens.jobs.bench import Bench
from rq4lens.models.prompts.prompt_set import PromptSet
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.maps.fitting import (
    FitData,
    cka,
    fit_maps,
    fit_qualities,
    fit_subsets,
    group_split,
    maps_from,
    mean_cosine,
    r2,
    refit,
)
from rq4lens.patching.maps.kinds import (
    LOW_RANK,
    fit_block,
    group_folds,
    polar_by_newton,
    polar_factor,
)
from rq4lens.patching.maps.map import (
    MAP_KINDS,
    LayerMap,
    from_blocks,
    get_map,
    load_map,
    to_blocks,
)
from rq4lens.validation.planting import plant

WIDTH, N_FIT, N_HELD = 16, 300, 100
FEW = "ignore:the map of layer"

rng = np.random.default_rng(0)
ROTATION = ortho_group.rvs(WIDTH, random_state=1)
SHIFT = rng.normal(size=WIDTH)
MATRIX = rng.normal(size=(WIDTH, WIDTH))
RANK_TWO = rng.normal(size=(WIDTH, 2)) @ rng.normal(size=(2, WIDTH)) / 4
SOURCE = rng.normal(size=(N_FIT + N_HELD, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH)) + 1.0

TRUTHS = {
    "the same": (np.eye(WIDTH), 0 * SHIFT),
    "a shift": (np.eye(WIDTH), SHIFT),
    "a spread": (np.diag(rng.uniform(0.3, 3, WIDTH)), SHIFT),
    "a rotation": (ROTATION, SHIFT),
    "a scaled rotation": (2.5 * ROTATION, SHIFT),
    "a correction of rank 2": (np.eye(WIDTH) + RANK_TWO, SHIFT),
    "anything linear": (MATRIX, SHIFT),
}
EXPRESSES = {
    "identity": {"the same"},
    "mean_shift": {"the same", "a shift"},
    "moments": {"the same", "a shift", "a spread"},
    "procrustes": {"the same", "a shift", "a rotation"},
    "procrustes_scaled": {"the same", "a shift", "a rotation", "a scaled rotation"},
    "low_rank": {"the same", "a shift", "a correction of rank 2"},
    "ridge": set(TRUTHS),
}


def alone(n):
    """Every row a group of its own."""
    return np.array([f"g{i}" for i in range(n)])


def fitted(kind, x, y, groups):
    """The fit of one block, as numpy's arrays."""
    fit = fit_block(kind, x, y, groups)
    return SimpleNamespace(weight=fit.weight.numpy(), bias=fit.bias.numpy(), details=fit.details)


def heads(*blocks):
    """Rows of one or more heads, as diagnostics take them."""
    return torch.from_numpy(np.stack(blocks, axis=1))


# --- kinds


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("kind", MAP_KINDS)
def test_a_kind_finds_exactly_what_it_can_express(kind, truth):
    """Planted `y = x W + b`: held-out R² is 1 for what the kind can express, and less otherwise."""
    weight, bias = TRUTHS[truth]
    target = SOURCE @ weight + bias
    fit = fitted(kind, SOURCE[:N_FIT], target[:N_FIT], alone(N_FIT))
    found = r2(heads(SOURCE[N_FIT:] @ fit.weight + fit.bias), heads(target[N_FIT:]))
    if truth in EXPRESSES[kind]:
        assert found > 0.9999
        np.testing.assert_allclose(fit.weight, weight, atol=1e-3)
        np.testing.assert_allclose(fit.bias, bias, atol=1e-2)
    else:
        assert found < 0.99


@pytest.mark.parametrize(
    ("special", "general"),
    [
        ("identity", "mean_shift"),
        ("mean_shift", "procrustes"),
        ("procrustes", "procrustes_scaled"),
        ("procrustes_scaled", "ridge"),
        ("mean_shift", "low_rank"),
        ("low_rank", "ridge"),
        ("moments", "ridge"),
    ],
)
def test_a_kind_is_no_better_than_its_generalisation(special, general):
    """On the rows of the fit, a kind's error is at least that of a kind that contains it."""
    target = SOURCE @ MATRIX + SHIFT + rng.normal(size=SOURCE.shape)
    errors = []
    for kind in (special, general):
        fit = fitted(kind, SOURCE, target, alone(len(SOURCE)))
        errors.append(((target - SOURCE @ fit.weight - fit.bias) ** 2).sum())
    assert errors[0] >= errors[1]


@pytest.mark.parametrize("kind", ["procrustes", "procrustes_scaled"])
def test_procrustes_turns_and_scales_alone(kind):
    """`W` is orthogonal up to its scale, whatever the target is."""
    fit = fitted(kind, SOURCE, SOURCE @ MATRIX, alone(len(SOURCE)))
    scale = fit.details.get("scale", 1.0)
    np.testing.assert_allclose(fit.weight @ fit.weight.T, scale**2 * np.eye(WIDTH), atol=1e-9)


def test_low_rank_corrects_the_identity():
    """`W - 1` has the stated rank, whatever the target is."""
    fit = fitted("low_rank", SOURCE, SOURCE @ MATRIX, alone(len(SOURCE)))
    spread = np.linalg.svd(fit.weight - np.eye(WIDTH), compute_uv=False)
    assert fit.details["rank"] == LOW_RANK
    assert (spread[LOW_RANK:] < 1e-9 * spread[0]).all()


def test_ridge_shrinks_where_there_is_only_noise():
    """A target that has nothing to do with the source gets a strong penalty and a small `W`."""
    noise = rng.normal(size=(60, WIDTH))
    source = SOURCE[:60]
    least_squares = np.linalg.lstsq(source - source.mean(0), noise - noise.mean(0), rcond=None)[0]
    fit = fitted("ridge", source, noise, alone(60))
    assert np.linalg.norm(fit.weight) < 0.2 * np.linalg.norm(least_squares)


def test_the_strength_of_ridge_is_chosen_across_groups():
    """Copies of a row are no evidence: paraphrases stay on one side of every fold.

    The target is noise that ten paraphrases share; leaving out one row at a time would find it in
    its copies and hardly penalise.
    """
    source = np.repeat(rng.normal(size=(20, WIDTH)), 10, axis=0)
    target = np.repeat(rng.normal(size=(20, WIDTH)), 10, axis=0)
    grouped = fitted("ridge", source, target, np.repeat(alone(20), 10))
    ungrouped = fitted("ridge", source, target, alone(200))
    assert grouped.details["strength"] > 100 * ungrouped.details["strength"]


def test_ridge_is_the_textbook_solution():
    """`W = (xᵀx + λ)⁻¹ xᵀy` on centred rows, with the strength that held-out groups prefer."""
    groups = np.repeat(alone(30), 2)
    source = SOURCE[:60]
    target = source @ MATRIX + 3 * rng.normal(size=(60, WIDTH))
    fit = fitted("ridge", source, target, groups)
    x, y = source - source.mean(0), target - target.mean(0)

    def solve(x, y, strength):
        return np.linalg.solve(x.T @ x + strength * np.eye(WIDTH), x.T @ y)

    def error(strength):
        """Squared error on held-out groups, fold by fold."""
        return sum(
            ((y[held] - x[held] @ solve(x[kept], y[kept], strength)) ** 2).sum()
            for kept, held in GroupKFold(5).split(x, groups=groups)
        )

    strength = fit.details["strength"]
    np.testing.assert_allclose(fit.weight, solve(x, y, strength), atol=1e-8)
    assert error(strength) <= min(error(strength / 4), error(strength * 4))


@pytest.mark.parametrize("kind", sorted(set(MAP_KINDS) - {"identity", "mean_shift", "procrustes"}))
def test_a_source_that_never_varies_maps_to_the_target_mean(kind):
    """A dead head gives the mean of the target and no number that is not finite."""
    source, target = np.ones((40, WIDTH)), SOURCE[:40]
    fit = fitted(kind, source, target, alone(40))
    mapped = source @ fit.weight + fit.bias
    np.testing.assert_allclose(mapped, np.tile(target.mean(0), (40, 1)), atol=1e-9)


# --- all at once, and parts of the rows

HEADS = 3


def many(n_rows, per_group):
    """Rows of three heads with spreads that fall to a hundredth, and a noisy target."""
    mix = rng.normal(size=(HEADS, WIDTH, WIDTH)) * np.logspace(0, -2, WIDTH)
    x = np.einsum("nhi,hij->nhj", rng.normal(size=(n_rows, HEADS, WIDTH)), mix) + 1.0
    turned = np.einsum("nhi,hij->nhj", x, np.eye(WIDTH) + rng.normal(size=mix.shape) / 5)
    y = turned + 0.3 * rng.normal(size=x.shape)
    groups = np.array([f"g{row // per_group}" for row in range(n_rows)])
    return FitData(torch.from_numpy(x), torch.from_numpy(y), groups)


def slow(kind, data, rows):
    """The slow reference on some rows, head by head: weights, biases, strengths."""
    x, y = data.x[rows].numpy(), data.y[rows].numpy()
    fits = [slow_fit(kind, x[:, h], y[:, h], data.groups[rows]) for h in range(x.shape[1])]
    return tuple(map(np.array, zip(*fits, strict=True)))


@pytest.mark.parametrize("per_group", [1, 4])
@pytest.mark.parametrize("kind", MAP_KINDS)
def test_a_fit_is_that_of_the_slow_reference(kind, per_group):
    """All rows, most of them (downdated sums) and few of them: scipy's numbers, head by head."""
    data = many(120, per_group)
    every = np.arange(120)
    subsets = [every, every[every % 7 > 0], every[every % 3 == 0]]
    for rows, fit in zip(subsets, fit_subsets(kind, data, subsets), strict=True):
        weight, bias, strength = slow(kind, data, rows)
        np.testing.assert_allclose(fit.weight, weight, atol=1e-9 * abs(weight).max())
        np.testing.assert_allclose(fit.bias, bias, atol=1e-8)
        if "strength" in fit.details:
            np.testing.assert_allclose(fit.details["strength"], strength.astype(float))


@pytest.mark.parametrize("per_group", [1, 4])
@pytest.mark.parametrize("kind", sorted({*MAP_KINDS} - {"procrustes", "procrustes_scaled"}))
def test_few_rows_fit_like_the_slow_reference(kind, per_group):
    """Fewer rows than the map is wide, as a whole layer has."""
    data = many(WIDTH - 4, per_group)
    (fit,) = fit_subsets(kind, data, [np.arange(WIDTH - 4)])
    weight, bias, _ = slow(kind, data, np.arange(WIDTH - 4))
    np.testing.assert_allclose(fit.weight, weight, atol=1e-8)
    np.testing.assert_allclose(fit.bias, bias, atol=1e-8)


def test_a_rotation_of_few_rows_is_settled_where_they_are():
    """What no row shows may be turned anyhow; where rows lie, the reference is met."""
    data, rows = many(WIDTH - 4, 1), np.arange(WIDTH - 4)
    (fit,) = fit_subsets("procrustes", data, [rows])
    weight, bias, _ = slow("procrustes", data, rows)
    expected = np.einsum("nhi,hij->nhj", data.x.numpy(), weight) + bias
    np.testing.assert_allclose(fit(data.x), expected, atol=1e-8)


def test_a_layer_is_fitted_as_one():
    """Scope `layer` is one block of all heads side by side."""
    data, rows = many(120, 4), np.arange(120)
    (fit,) = fit_subsets("ridge", data, [rows], scope="layer")
    weight, bias, _ = slow_fit(
        "ridge", *(z.flatten(1).numpy() for z in (data.x, data.y)), data.groups
    )
    np.testing.assert_allclose(fit.weight[0], weight, atol=1e-9)
    np.testing.assert_allclose(fit.bias[0], bias, atol=1e-8)


def test_heads_may_be_paired_with_others():
    """Each place of the second axis is a problem of its own, whatever heads stand there."""
    data = many(120, 1)
    shifted = replace(data, y=data.y.roll(1, dims=1))
    (fit,) = fit_subsets("procrustes", shifted, [np.arange(120)])
    for head in range(HEADS):
        x, y = data.x[:, head].numpy(), data.y[:, (head - 1) % HEADS].numpy()
        np.testing.assert_allclose(fit.weight[head], slow_fit("procrustes", x, y, data.groups)[0])


def test_refitting_fits_the_rows_that_are_given():
    """`refit` and `fit_subsets` are one fit; a map holds it in single precision."""
    data = many(120, 1)
    part = FitData(data.x[:90], data.y[:90], data.groups[:90])
    own = LayerMap(0, "ridge", "head", torch.zeros(3, 16, 16), torch.zeros(3, 16), HEADS)
    (fit,) = fit_subsets("procrustes_scaled", data, [np.arange(90)])
    again = refit(own, part, "procrustes_scaled")
    torch.testing.assert_close(again.weight, fit.weight.float())
    torch.testing.assert_close(again(data.x), fit(data.x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", sorted({*MAP_KINDS} - {"identity", "mean_shift", "procrustes"}))
def test_a_source_that_varies_in_left_out_rows_alone_is_dead(kind):
    """Downdated sums leave no rounding error where a coordinate of the part never varies."""
    data = many(60, 1)
    data.x[:59] = data.x[:1]
    (fit,) = fit_subsets(kind, data, [np.arange(59)])
    means = data.y[:59].mean(0).expand(59, -1, -1)
    torch.testing.assert_close(fit(data.x[:59]), means, rtol=0, atol=1e-9)


def test_a_polar_factor_by_newton_is_that_of_singular_vectors():
    """Over matrices whose singular values fall by ten orders."""
    matrices = torch.from_numpy(rng.normal(size=(5, 32, 32)) * np.logspace(0, -10, 32))
    torch.testing.assert_close(polar_by_newton(matrices), polar_factor(matrices), rtol=0, atol=1e-5)


def test_newton_does_not_pass_for_a_polar_factor_of_a_singular_matrix():
    """Beside a matrix that has none, the others are not harmed."""
    matrices = torch.from_numpy(np.stack([np.zeros((8, 8)), rng.normal(size=(8, 8))]))
    found = polar_by_newton(matrices)
    assert not found[0].isfinite().any()
    torch.testing.assert_close(found[1], polar_factor(matrices)[1])


@pytest.mark.parametrize("n_groups", [5, 6, 40])
def test_splits_are_those_of_scikit_learn(n_groups):
    """The groups that are held out, and the folds of the ridge, row by row."""
    groups = rng.integers(0, n_groups, 90).astype(str)
    for seed in range(5):
        splitter = GroupShuffleSplit(1, test_size=0.2, random_state=seed)
        expected = next(splitter.split(groups, groups=groups))
        np.testing.assert_equal(tuple(group_split(groups, seed)), expected)
    expected = GroupKFold(5).split(groups, groups=groups)
    for fold, other in zip(group_folds(groups), expected, strict=True):
        np.testing.assert_equal(fold, other)


# --- the layer's map


def random_map(scope="head", seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    blocks, width = (3, 4) if scope == "head" else (1, 12)
    values = {
        "layer": 2,
        "kind": "ridge",
        "scope": scope,
        "weight": torch.randn(blocks, width, width, generator=generator),
        "bias": torch.randn(blocks, width, generator=generator),
        "n_heads": 3,
        "ingredients": {"layer": 2, "train": "x"},
        "details": {"train_rows": 9},
    }
    return LayerMap(**(values | changes))


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_a_map_is_affine_in_each_block(scope):
    """`ẑ = z W + b`, per head or over all heads jointly, for any leading axes."""
    layer_map = random_map(scope)
    z = torch.randn(5, 2, 3, 4)
    if scope == "head":
        expected = torch.stack(
            [z[:, :, h] @ layer_map.weight[h] + layer_map.bias[h] for h in range(3)], dim=2
        )
    else:
        joint = z.reshape(5, 2, 12) @ layer_map.weight[0] + layer_map.bias[0]
        expected = joint.reshape(5, 2, 3, 4)
    torch.testing.assert_close(layer_map(z), expected)
    torch.testing.assert_close(layer_map(z[0, 0]), expected[0, 0])


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_blocks_keep_every_number_in_its_place(scope):
    """`from_blocks` is the inverse of `to_blocks`."""
    z = torch.randn(5, 3, 4)
    assert torch.equal(from_blocks(to_blocks(z, scope), 3), z)


def test_half_precision_activations_are_mapped_in_single():
    """bf16 activations are mapped in float32, float64 ones in float64."""
    for given, mapped in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert random_map()(torch.randn(2, 3, 4).to(given)).dtype == mapped


@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("shape", [(2, 2, 4), (2, 3, 5), (2, 4, 3)])
def test_activations_of_another_model_are_refused(scope, shape):
    """The sentence names the map's shape and the one that came."""
    with pytest.raises(UserError, match=r"takes 3 heads of width 4, but the activations are"):
        random_map(scope)(torch.zeros(shape))


def test_a_map_is_frozen():
    """A fitted map cannot be changed."""
    with pytest.raises(FrozenInstanceError):
        random_map().layer = 3


# --- stored maps


def test_a_stored_map_reads_back_as_it_was(tmp_path, tiny_maps):
    """Weights bit for bit, diagnostics, ingredients, details and fingerprint."""
    for layer_map in [*tiny_maps.values(), random_map("layer")]:
        path = stored_map(tmp_path, layer_map)
        for again in (load_map(path), get_map(Store(tmp_path), Address(layer_map))):
            assert torch.equal(again.weight, layer_map.weight)
            assert torch.equal(again.bias, layer_map.bias)
            assert again.fingerprint == layer_map.fingerprint
            assert again.ingredients == layer_map.ingredients
            assert again.to_dict() == layer_map.to_dict()
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_fingerprint_is_of_fit_and_weights():
    """Other weights or other ingredients are another map."""
    one = random_map()
    others = [random_map(seed=1), random_map(ingredients={"train": "y"})]
    assert one.fingerprint == random_map().fingerprint
    assert len({each.fingerprint for each in (one, *others)}) == 3


def damaged(tmp_path, how):
    record = stored_map(tmp_path, random_map())
    path = record.with_suffix(".safetensors")
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "no description":
        record.unlink()
    elif how == "no tensors":
        path.unlink()
    elif how == "another map's tensors":
        other = stored_map(tmp_path / "other", random_map(seed=5)).with_suffix(".safetensors")
        path.write_bytes(other.read_bytes())
    elif how == "not finite":
        stored_map(tmp_path, random_map(bias=torch.full((3, 4), torch.nan)))
    elif how == "another shape":
        stored_map(tmp_path, random_map(n_heads=4))
    elif how == "half precision":
        stored_map(tmp_path, random_map(weight=random_map().weight.half()))
    else:
        layer_map = random_map()
        tensors = {"weight": layer_map.weight, "bias": layer_map.bias}
        values = layer_map.to_dict() | {"kind": "magic"}
        Store(tmp_path).put_tensors(Address(layer_map), tensors, values)
    return path


@pytest.mark.parametrize(
    "how",
    [
        *("cut", "no description", "no tensors", "another map's tensors", "not finite"),
        *("another shape", "half precision", "another kind"),
    ],
)
def test_a_damaged_map_is_one_sentence(tmp_path, how):
    """Whatever happened to the files, the error says that the map is to be deleted or fitted."""
    with pytest.raises(UserError, match="map file"):
        load_map(damaged(tmp_path, how))


@pytest.mark.parametrize("how", ["not finite", "another shape", "half precision", "another kind"])
def test_a_stored_map_that_is_no_map_is_set_aside(tmp_path, how):
    """Even where its checksum agrees."""
    path = damaged(tmp_path, how).with_suffix(".json")
    store = Store(tmp_path)
    assert get_map(store, Address(random_map())) is None
    assert [name for name, _ in store.counters.set_aside] == [path.name]
    assert not path.exists()


# --- diagnostics


def test_r2_is_one_minus_the_unexplained_share():
    """1 for the truth, 0 for the mean, negative for worse; undefined for a constant target."""
    target = np.array([[0.0], [2.0]])
    one = np.ones((2, 1))
    found = r2(heads(target, one, target[::-1], 0 * one), heads(target, target, target, one))
    np.testing.assert_array_equal(found, [1, 0, -3, np.nan])


def test_cosine_is_of_directions():
    """The mean over rows; undefined where a vector is zero."""
    one = np.array([[1.0, 0.0], [0.0, 2.0]])
    found = mean_cosine(heads(3 * one, one[::-1], 0 * one), heads(one, one, one))
    np.testing.assert_allclose(found, [1, 0, np.nan])


def test_cka_does_not_see_rotation_scale_and_shift():
    """1 for a turned, scaled and shifted copy, less for another matrix, NaN for a constant."""
    turned, other = 2 * SOURCE @ ROTATION + SHIFT, SOURCE @ MATRIX
    constant = np.tile(SHIFT, (len(SOURCE), 1))
    found = cka(heads(turned, other, constant), heads(SOURCE, SOURCE, SOURCE))
    assert found[0] == pytest.approx(1)
    assert found[1] < 0.95
    assert found[2].isnan()


def test_what_is_undefined_is_none():
    """A constant head has no R² and no CKA; the heads beside it have theirs."""
    constant = np.ones_like(SOURCE)
    one, other = fit_qualities(heads(SOURCE, constant), heads(SOURCE, constant))
    assert (one.r2, one.cosine, one.cka) == (1, pytest.approx(1), pytest.approx(1))
    assert (other.r2, other.cosine, other.cka) == (None, pytest.approx(1), None)


@pytest.fixture(scope="module")
def rotated_maps():
    """Maps of a pair in which heads 1 and 2 of layer 1 are rotated, and nothing else."""
    base = tiny_model()
    planted = plant(base, rotated=[Head(1, 1), Head(1, 2)])
    pair = pair_of(base, planted.tuned, random_prompts(n_train=80))
    return {kind: fit_maps(pair, [1], kind)[1] for kind in ("identity", "procrustes_scaled")}


def test_the_true_map_predicts_held_out_prompts(rotated_maps):
    """R² is 1 for the map; about 0 or less for the mean and for a map of unpaired prompts."""
    for row in rotated_maps["procrustes_scaled"].diagnostics:
        assert row.fitted.r2 > 0.9999
        assert row.fitted.cosine > 0.9999
        assert row.fitted.cka > 0.9999
        assert row.mean.r2 <= 0
        assert row.shuffled.r2 < 0.2
        assert row.shuffled.r2 < row.fitted.r2


def test_the_identity_predicts_unchanged_heads_alone(rotated_maps):
    """Its R² is 1 at heads that were left alone, and far lower at the rotated ones."""
    for layer_map in rotated_maps.values():
        for row in layer_map.diagnostics:
            assert (row.identity.r2 > 0.9999) == (row.head in {0, 3})
            assert row.head in {0, 3} or row.identity.r2 < 0.5


def test_diagnostics_are_of_prompts_that_were_held_out():
    """A joint ridge-free fit of more numbers than rows is perfect on train and poor held out."""
    base = tiny_model()
    pair = pair_of(base, tiny_model(seed=1), random_prompts(n_train=20))
    with pytest.warns(UserWarning, match="has only 20 train rows"):
        layer_map = fit_maps(pair, [1], "procrustes", scope="layer")[1]
    activations = PairActivations(pair)
    z_b, z_t = (activations.z(side, "train", 1)[:, 0] for side in ("base", "tuned"))
    on_train = r2(*(z.flatten(1).double()[:, None] for z in (layer_map(z_b), z_t)))
    assert layer_map.mean_r2 < on_train - 0.3


# --- fitting a pair


def test_maps_see_train_alone(tiny_pair, tiny_maps):
    """Other validation prompts give the same map with the same fingerprint."""
    train = tiny_pair.prompts.split("train").prompts
    other = random_prompts(seed=9).split("val").prompts
    renamed = tuple(replace(p, id=f"other {p.id}", group=None) for p in other)
    pair = pair_of(tiny_pair.base.model, tiny_pair.tuned.model, PromptSet(train + renamed))
    again = fit_maps(pair, [1])[1]
    assert torch.equal(again.weight, tiny_maps[1].weight)
    assert again.fingerprint == tiny_maps[1].fingerprint


def test_a_map_goes_from_base_to_tuned(tiny_pair):
    """The source is base: the mirrored pair has the inverse rotation."""
    mirrored = pair_of(tiny_pair.tuned.model, tiny_pair.base.model, tiny_pair.prompts)
    there, back = (fit_maps(each, [1], "procrustes")[1].weight for each in (tiny_pair, mirrored))
    torch.testing.assert_close(there, back.transpose(1, 2), atol=1e-4, rtol=0)
    assert not torch.allclose(there, back, atol=0.1)


@pytest.mark.parametrize(("scope", "warns"), [("head", False), ("layer", True)])
def test_few_rows_are_warned_of(tiny_pair, recwarn, scope, warns):
    """48 train rows are enough for maps of width 8, and fewer than twice 32."""
    fit_maps(tiny_pair, [1], scope=scope)
    said = [str(each.message) for each in recwarn if "train rows" in str(each.message)]
    assert len(said) == int(warns)
    assert not warns or "layer 1 is 32 wide and has only 48 train rows" in said[0]


def test_a_map_without_diagnostics_says_so(tiny_pair):
    """Four groups leave nothing to hold out, however many prompts they have."""
    prompts = [
        replace(prompt, group=f"g{index % 4}") if prompt.split == "train" else prompt
        for index, prompt in enumerate(tiny_pair.prompts.prompts)
    ]
    pair = pair_of(tiny_pair.base.model, tiny_pair.tuned.model, PromptSet(tuple(prompts)))
    with pytest.warns(UserWarning, match="layer 1 has no held-out diagnostics.*4 groups"):
        layer_map = fit_maps(pair, [1])[1]
    assert (layer_map.diagnostics, layer_map.mean_cka, layer_map.mean_r2) == ((), None, None)


@pytest.mark.filterwarnings(FEW)
def test_more_positions_are_more_rows(tiny_pair):
    """With K positions every prompt gives K rows, all on one side of the calibration split."""
    activations = PairActivations(tiny_pair, k_positions=3)
    layer_map = fit_maps(tiny_pair, [1], activations=activations)[1]
    assert layer_map.details["train_rows"] == 3 * 48
    assert layer_map.ingredients["k_positions"] == 3


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize("kind", MAP_KINDS)
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_every_kind_fits_a_real_layer(tiny_pair, kind, scope):
    """Each kind gives finite weights of the right shape and one row of diagnostics per head."""
    layer_map = fit_maps(tiny_pair, [1], kind, scope=scope)[1]
    blocks = {"head": TINY_HEADS, "layer": 1}[scope]
    width = TINY_HEADS * TINY_WIDTH // blocks
    assert layer_map.weight.shape == (blocks, width, width)
    assert layer_map.weight.isfinite().all()
    assert [row.head for row in layer_map.diagnostics] == list(range(TINY_HEADS))


# --- reuse


class Forbidden(PairActivations):
    """Activations that nobody may ask for."""

    def capture(self, side, split, layers):
        """Fail if anything is to be captured."""
        assert not list(layers), (side, split)


def kept(pair, folder, kind="procrustes_scaled", layers=(1,), **settings):
    """The maps of a folder; those that it lacks are fitted."""
    activations = settings.pop("activations", None) or PairActivations(pair)
    store = Store(folder, fresh=settings.pop("fresh", False))
    return maps_from(store, activations, layers, kind, **settings)


def test_a_kept_map_is_reused(tiny_pair, tmp_path):
    """The same pair, layer, prompts and kind: nothing is captured or fitted again."""
    first = kept(tiny_pair, tmp_path, "ridge", layers=[1, 0])
    again = kept(tiny_pair, tmp_path, "ridge", layers=[1, 0], activations=Forbidden(tiny_pair))
    assert list(again) == [1, 0]
    assert all(again[layer].fingerprint == first[layer].fingerprint for layer in (1, 0))


def test_what_is_missing_is_fitted(tiny_pair, tmp_path):
    """A second layer is fitted beside the kept one; the kept one stays as it is."""
    one = kept(tiny_pair, tmp_path)
    both = kept(tiny_pair, tmp_path, layers=[1, 2])
    assert both[1].fingerprint == one[1].fingerprint
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_kept_maps_are_those_that_are_fitted(tiny_pair, tmp_path):
    """With and without a folder: the same maps, fitted, kept or read back."""
    fitted = fit_maps(tiny_pair, [1])[1].fingerprint
    assert [kept(tiny_pair, tmp_path)[1].fingerprint for _ in range(2)] == [fitted, fitted]


@pytest.mark.parametrize(
    "change", ["tuned weights", "base weights", "prompts", "kind", "seed", "scope", "positions"]
)
@pytest.mark.filterwarnings(FEW)
def test_no_map_of_something_else_is_reused(tiny_pair, tmp_path, change):
    """Whatever the fit depends on is part of its address."""
    base, tuned, prompts = tiny_pair.base.model, tiny_pair.tuned.model, tiny_pair.prompts
    kept(tiny_pair, tmp_path, "procrustes")
    if change == "tuned weights":
        tuned = fine_tuned(base, seed=3)
    elif change == "base weights":
        base = fine_tuned(base, seed=3)
    elif change == "prompts":
        prompts = random_prompts(seed=5)
    pair = pair_of(base, tuned, prompts)
    activations = PairActivations(pair, k_positions=2 if change == "positions" else 1)
    settings = {
        "kind": "ridge" if change == "kind" else "procrustes",
        "seed": int(change == "seed"),
        "scope": "layer" if change == "scope" else "head",
    }
    kept(pair, tmp_path, activations=activations, **settings)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_map_under_the_name_of_another_is_not_believed(tiny_pair, tmp_path):
    """Files of another pair, renamed to what this pair's map is called, are fitted anew."""
    base = tiny_pair.base.model
    other = pair_of(base, fine_tuned(base, seed=3), tiny_pair.prompts)
    own = kept(tiny_pair, tmp_path)[1]
    kept(other, tmp_path / "other")
    (path,), (foreign,) = tmp_path.glob("*.safetensors"), (tmp_path / "other").glob("*.safetensors")
    for suffix in (".safetensors", ".json"):
        path.with_suffix(suffix).write_bytes(foreign.with_suffix(suffix).read_bytes())
    assert kept(tiny_pair, tmp_path)[1].fingerprint == own.fingerprint


def test_a_kind_that_is_left_out_is_the_default_whatever_was_kept(tiny_pair, tmp_path):
    """What an earlier run left there does not decide what this one measures."""
    for kind in ("moments", "ridge"):
        kept(tiny_pair, tmp_path / "maps", kind)
    bench = Bench(RunConfig(), tmp_path)
    bench.pair = tiny_pair
    taken = bench.maps([1])[1]
    assert taken.kind == "procrustes_scaled"
    assert taken.fingerprint == fit_maps(tiny_pair, [1])[1].fingerprint


def test_an_asked_kind_is_the_one_that_comes(tiny_pair, tmp_path):
    """A better kept map of another kind does not stand in for the kind that was named."""
    kept(tiny_pair, tmp_path, "procrustes_scaled")
    assert kept(tiny_pair, tmp_path, "identity")[1].kind == "identity"


def test_a_damaged_kept_map_is_set_aside_and_fitted_again(tiny_pair, tmp_path):
    """What cannot be believed is renamed, and the fit gives the same map again."""
    first = kept(tiny_pair, tmp_path)[1]
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    again = kept(tiny_pair, tmp_path)[1]
    assert again.fingerprint == first.fingerprint
    assert path.with_name(path.name + ".damaged").exists()
    assert load_map(path).fingerprint == first.fingerprint


def test_fresh_uses_no_kept_map_and_removes_nothing(tiny_pair, tmp_path):
    """`fresh` fits again and replaces; whatever else lies in the folder stays."""
    (tmp_path / "diary.txt").write_text("mine")
    first = kept(tiny_pair, tmp_path)[1]
    with pytest.raises(AssertionError, match="train"):
        kept(tiny_pair, tmp_path, fresh=True, activations=Forbidden(tiny_pair))
    again = kept(tiny_pair, tmp_path, fresh=True)[1]
    assert again.fingerprint == first.fingerprint
    assert (tmp_path / "diary.txt").read_text() == "mine"
