"""Models that load as a TransformerBridge, on whichever line of TransformerLens is installed."""

from __future__ import annotations

import copy
import json
import os
import subprocess

import pytest
import torch
import transformers
from engine_cases import N_HEADS
from few_prompts import few_prompts
from loading_cases import TOLERANCE, hugging_face, refusal
from model_zoo import BRIDGED, ZOO, random_model, save
from tiny import (
    CONTROL,
    MAIN,
    TINY_HEADS,
    grid_of,
    needs_hooked,
    pair_of,
    random_prompts,
    rotated_bridge,
    tiny_bridge,
)
from typer.testing import CliRunner

from rq4lens.cli import app
from rq4lens.config import Patching, Place
from rq4lens.heads import HeadSet
from rq4lens.models.load.architectures import ARCHITECTURES
from rq4lens.models.load.checkpoint import locate
from rq4lens.models.load.lens import HAS_HOOKED, TransformerBridge, named_weights
from rq4lens.models.load.loading import load_hooked
from rq4lens.models.load.size import model_size
from rq4lens.models.pair import ModelCard
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.engines.choice import make_engine
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.noise import shuffled_change
from rq4lens.patching.patch import Patch, Sources

pytest_plugins = ("loading_cases",)

BRIDGE = Place(device="cpu", backend="bridge")
WRONG_IN_3_9 = {"cohere", "cohere2"}
"""Families whose logits TransformerLens 3.9's bridge gets wrong."""
WITHOUT_CACHE_IN_3_9 = {"falcon-alibi", "mpt"}

LENGTHS = (5, 11, 8, 5)
HEADS = (HeadSet.of([0], N_HEADS), HeadSet.of([1, 3], N_HEADS), HeadSet.all(N_HEADS))
OUTPUT_PROJECTIONS = {"o_proj", "dense", "out_proj", "c_proj"}


@pytest.fixture(scope="module")
def prompts():
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randint(4, 300, (n,), generator=draw).tolist() for n in LENGTHS]
    return TokenizedPrompts(tuple("abcd"), tuple(map(tuple, rows)))


def noise_of(model, k_positions=1, seed=5):
    """Something to put in place of heads, of the size of a random model's z."""
    shape = (len(LENGTHS), k_positions, model.cfg.n_heads, model.cfg.d_head)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_loads_as_a_bridge(folders, name):
    """A plain bridge with Hugging Face's logits, known as one, its weights those of the file and
    its size in memory known before.
    """
    folder = folders(name)
    loaded = load_hooked(folder, place=BRIDGE)
    card, size = ModelCard.of(loaded), model_size(locate(folder), backend="bridge")
    assert type(loaded.model) is TransformerBridge
    assert loaded.logit_check_max_abs_diff < TOLERANCE
    assert (card.backend, card.n_heads, card.d_vocab) == ("bridge", ZOO[name].n_heads, 320)
    assert card.n_key_value_heads == (ZOO[name].n_groups or ZOO[name].n_heads)
    assert size.weights.total == sum(each.nbytes for each in hugging_face(folder).parameters())
    assert (size.cfg.n_layers, size.cfg.n_heads) == (card.n_layers, card.n_heads)


def patched_by_hugging_face(model, tokens, patch, source):
    """Log-probabilities at the last token, heads replaced in what the output projection reads."""
    (projection,) = (
        module
        for name, module in model.named_modules()
        if f".{patch.layer}." in name
        and "att" in name
        and name.rpartition(".")[2] in OUTPUT_PROJECTIONS
    )

    def replace(_module, inputs):
        z = inputs[0].unflatten(-1, (N_HEADS, -1)).clone()
        for head in patch.heads:
            z[0, -1, head] += patch.alpha * (source[head] - z[0, -1, head])
        return (z.flatten(-2), *inputs[1:])

    with torch.no_grad(), projection.register_forward_pre_hook(replace):
        return model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)


@pytest.mark.parametrize("name", BRIDGED)
def test_families_without_conversion_are_measured_as_by_hugging_face(
    name, tmp_path, tokenizer, prompts
):
    """KL of patched heads through the chosen engine is that of plain hooks on the Hugging Face
    model to 1e-5 nats; what the installed bridge gets wrong is refused when it is loaded.
    """
    folder = save(BRIDGED[name].make(), tokenizer, tmp_path)
    if HAS_HOOKED and name in WRONG_IN_3_9:
        sentence = refusal(folder, place=BRIDGE)
        assert "as a TransformerBridge differs from its Hugging Face model" in sentence
        return
    model, other = load_hooked(folder, place=BRIDGE).model, hugging_face(folder)
    noise, layer = noise_of(model), model.cfg.n_layers - 2
    engine = make_engine(model, prompts)
    assert engine.name == ("hooks" if HAS_HOOKED and name in WITHOUT_CACHE_IN_3_9 else "cached")
    patches = [Patch(layer, heads, alpha, "raw") for heads in HEADS for alpha in (0.3, 1.0)]
    found = engine.effects([(each,) for each in patches], Sources({(layer, "raw"): noise}))
    nothing = Patch(layer, HeadSet.none(N_HEADS), 1.0, "raw")
    for prompt, tokens in enumerate(prompts.token_ids):
        clean = patched_by_hugging_face(other, tokens, nothing, noise[prompt, 0])
        for patch, nats in zip(patches, found.kl_nats[:, prompt], strict=True):
            patched = patched_by_hugging_face(other, tokens, patch, noise[prompt, 0])
            expected = float((patched.exp() * (patched - clean)).sum())
            assert expected > 3e-5
            assert nats == pytest.approx(expected, abs=1e-5)


WROTE = ("gpt2", "gptj", "bloom", "opt", "pythia", "phi3", "llama3", "gemma2", "olmo2", "gpt-oss")
"""Architectures that keep their output matrices in different ways."""


@pytest.mark.parametrize("name", [*WROTE, "falcon", "granite", "nemotron"])
def test_its_own_output_matrix_changes_nothing(name, folders, tmp_path, tokenizer, prompts):
    """A source that goes through the bridge's own ``W_O`` does what the plain patch does: the
    matrix is that of the heads, and what is added arrives where the heads write.
    """
    folder = folders(name) if name in ZOO else save(BRIDGED[name].make(), tokenizer, tmp_path)
    model = load_hooked(folder, place=BRIDGE, check_logits=False).model
    layer = model.cfg.n_layers - 2
    noise = noise_of(model, k_positions=2)
    own = {"own": lambda layer: model.blocks[layer].attn.W_O.detach()}
    sources = Sources({(layer, "raw"): noise, (layer, "own"): noise}, None, own)
    patches = [(Patch(layer, heads, 0.7, name),) for name in ("raw", "own") for heads in HEADS]
    for engine in ("cached", "hooks"):
        measure = make_engine(model, prompts, Patching(k_positions=2), Place(engine=engine))
        found = measure.effects(patches, sources).kl_nats
        raw, through_own = found.reshape(2, len(HEADS), -1)
        assert (measure.name, raw.min() > 1e-4) == (engine, True)
        assert abs(raw - through_own).max() < 1e-5 * max(1.0, raw.max())


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma2", "phi3", "mixtral"])
def test_the_weights_of_a_bridge_are_those_it_computes_with(name, folders, tmp_path, tokenizer):
    """A copy that is given another model's weights, name by name, becomes that model, and leaves
    the first as it was: noise pairs are made so.
    """
    one = load_hooked(folders(name), place=BRIDGE).model
    folder = save(ZOO[name].make(seed=1), tokenizer, tmp_path)
    other = load_hooked(folder, place=BRIDGE).model
    mixed, tokens = copy.deepcopy(one), torch.arange(4, 24)[None]
    weights = dict(named_weights(other))
    with torch.no_grad():
        before = one(tokens)
        for each, parameter in named_weights(mixed):
            parameter.copy_(weights[each])
        assert float((mixed(tokens) - other(tokens)).abs().max()) < TOLERANCE
        assert torch.equal(one(tokens), before)
        noisy = shuffled_change(one, other, seed=0)
        assert float((noisy(tokens) - before).abs().max()) > 0.01
    assert not any("_original_component" in each for each in weights)


def test_what_has_no_heads_everywhere_is_refused(tmp_path, tokenizer):
    """State-space models and models that read both ways have no heads to patch: one sentence."""
    mamba = transformers.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2)
    folder = save(random_model(mamba), tokenizer, tmp_path / "mamba")
    assert "MambaForCausalLM" in refusal(folder, place=BRIDGE)
    bert = transformers.BertConfig(vocab_size=320, hidden_size=48, num_hidden_layers=2)
    folder = save(random_model(bert), tokenizer, tmp_path / "bert")
    assert "BertLMHeadModel cannot be loaded with backend 'bridge'" in refusal(folder, place=BRIDGE)


def test_a_family_without_conversion_names_the_other_backend(tmp_path, tokenizer):
    """Where there is no conversion the sentence says that there is a bridge; without a
    HookedTransformer, that there is none.
    """
    folder = save(BRIDGED["granite"].make(), tokenizer, tmp_path)
    sentence = refusal(folder, place=Place(device="cpu", backend="hooked"))
    assert "backend 'bridge'" in sentence
    assert ("GraniteForCausalLM cannot be loaded" in sentence) == HAS_HOOKED
    assert all(name in sentence for name in ARCHITECTURES) == HAS_HOOKED


@pytest.mark.parametrize("k_positions", [1, 3])
def test_a_cache_of_nothing(k_positions, folders):
    """Prompts that are no longer than what is patched have no keys to share."""
    model = load_hooked(folders("mistral"), place=BRIDGE).model
    short = TokenizedPrompts(("a", "b"), ((5, 6, 7)[:k_positions], (8, 9, 10)[:k_positions]))
    settings = Patching(k_positions=k_positions)
    noise = noise_of(model, k_positions)[: len(short)]
    patches, sources = [(Patch(1, HEADS[1], 0.5, "raw"),)], Sources({(1, "raw"): noise})
    engine = make_engine(model, short, settings)
    assert engine.name == "cached"
    expected = HookEngine(model, short, settings).effects(patches, sources).kl_nats
    assert abs(engine.effects(patches, sources).kl_nats - expected).max() < 1e-5


def test_rotated_heads_of_a_bridge_are_found_and_explained():
    """The gauge law: rotated value spaces are found first, the fitted map explains them, and every
    other head reads 0.
    """
    base = tiny_bridge()
    pair = pair_of(base, rotated_bridge(base, MAIN, [1, 2]), random_prompts())
    maps = fit_maps(pair, [MAIN, CONTROL], "procrustes")
    grid = grid_of(pair, maps, MAIN, CONTROL, ks=(2,))
    assert set(grid.ranking.top(2)) == {1, 2}
    for head in range(TINY_HEADS):
        single = grid.single(head)
        if head in {1, 2}:
            assert single.KL_raw > 1e-5
            assert single.KL_mapped < min(1e-6, 1e-2 * single.KL_raw)
        else:
            assert single.KL_raw < 1e-9
    assert grid.control.KL_raw < 1e-9


DEMO = ("run", "--pair", "etiquette", "--analysis", "grid", "--resamples", "100", "--device", "cpu")
NATS = ("KL_raw_mean", "KL_mapped_mean", "delta", "gap_base_nats", "gap_tuned_nats")


def same_numbers(one, other):
    """Whether two runs found the same in nats, condition by condition."""
    read = [json.loads((folder / "rq4_results.json").read_text()) for folder in (one, other)]
    a, b = ({record["cond"]: record for record in records} for records in read)
    assert a.keys() == b.keys()
    assert len(a) > 20
    for cond, record in a.items():
        for name in NATS:
            assert (record[name] is None) == (b[cond][name] is None)
            assert record[name] is None or record[name] == pytest.approx(b[cond][name], abs=1e-6)


@needs_hooked
@pytest.mark.slow
def test_the_built_in_pair_has_the_same_numbers_as_bridges(tmp_path):
    """The main job through bridges and their cache is that through HookedTransformers and the
    suffix engine, to 1e-6 nats.
    """
    prompts = str(few_prompts(tmp_path))
    for backend in ("hooked", "bridge"):
        where = ("--prompts", prompts, "--backend", backend, "--out", str(tmp_path / backend))
        arguments = [*DEMO, *where]
        assert CliRunner().invoke(app, arguments).exit_code == 0
    same_numbers(tmp_path / "hooked", tmp_path / "bridge")


@pytest.mark.slow
@pytest.mark.skipif("OTHER_LINE" not in os.environ, reason="`make test-lens4` names the other one")
def test_both_lines_of_transformer_lens_have_the_same_numbers(tmp_path):
    """The main job of the built-in pair under the interpreter that ``OTHER_LINE`` names, which has
    another TransformerLens, finds the same to 1e-6 nats.
    """
    assert CliRunner().invoke(app, [*DEMO, "--out", str(tmp_path / "here")]).exit_code == 0
    command = [os.environ["OTHER_LINE"], "-m", "rq4lens", *DEMO, "--out", str(tmp_path / "there")]
    subprocess.run(command, check=True, capture_output=True)
    runs = [json.loads((tmp_path / each / "run.json").read_text()) for each in ("here", "there")]
    versions = [run["libraries"]["transformer-lens"].split(".")[0] for run in runs]
    assert sorted(versions) == ["3", "4"]
    same_numbers(tmp_path / "here", tmp_path / "there")
