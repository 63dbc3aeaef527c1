"""Loading: a folder computes what Hugging Face computes, or says in one sentence why it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from huggingface_hub import errors as hub
from model_zoo import (
    CHAT_TEMPLATE,
    CORPUS,
    KAZAKH,
    LLAMA3_ROPE,
    ZOO,
    random_model,
    save,
    train_tokenizer,
)
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    OPTConfig,
    SiglipVisionConfig,
)

from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.models import checkpoint, loading, memory
from rq4lens.models.architectures import ARCHITECTURES, Architecture
from rq4lens.models.conversion import hooked_from
from rq4lens.models.loading import LoadedModel, load_hooked
from rq4lens.models.memory import estimate_memory
from rq4lens.models.pair import ModelCard
from rq4lens.models.parity import CHECK_TEXTS
from rq4lens.models.prompts import TokenizedPrompts
from rq4lens.patching.engines import make_engine
from rq4lens.patching.hooks import HookEngine
from rq4lens.patching.patch import Patch, Sources

TOKENS = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(7))
TOLERANCE = 1e-4
LAST_SITE = "blocks.1.attn.hook_z"


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer):
    """Each tiny model as a folder, saved when first asked for."""
    root = tmp_path_factory.mktemp("zoo")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else save(ZOO[name].make(), tokenizer, path)

    return folder


@pytest.fixture
def llama(folders, tmp_path):
    """A copy of the Llama folder that a test may damage."""
    return Path(shutil.copytree(folders("llama"), tmp_path / "llama"))


def hugging_face(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def difference(model, other, tokens=TOKENS):
    logits = other(tokens)
    logits = getattr(logits, "logits", logits)
    return float((model(tokens, padding_side="right") - logits).abs().max())


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def refusal(source, **options) -> str:
    """The sentence with which a source is refused."""
    with pytest.raises(UserError) as caught:
        load_hooked(source, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


# --- the same function -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_logits_are_those_of_hugging_face(folders, name):
    """A folder of any supported architecture loads to a model with Hugging Face's logits, and
    with the heads, key/value heads and vocabulary that its configuration states.
    """
    loaded = load_hooked(folders(name))
    cfg = loaded.model.cfg
    assert difference(loaded.model, hugging_face(folders(name))) < TOLERANCE
    assert loaded.logit_check_max_abs_diff < TOLERANCE
    assert (cfg.n_heads, cfg.d_vocab) == (ZOO[name].n_heads, 320)
    assert (cfg.n_key_value_heads or cfg.n_heads) == (ZOO[name].n_groups or ZOO[name].n_heads)


def test_the_zoo_covers_the_table():
    """Every architecture that is offered has a tiny model that proves it."""
    made = {
        AutoModelForCausalLM.from_config(entry.config()).__class__.__name__
        for entry in ZOO.values()
    }
    assert made | {"Gemma3ForConditionalGeneration"} == set(ARCHITECTURES)


def test_text_half_of_a_multimodal_checkpoint(tmp_path, tokenizer):
    """A Gemma-3 with a vision tower loads as its language model."""
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = Gemma3Config(
        text_config=ZOO["gemma3"].config(),
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=300,
        eoi_token_index=301,
        image_token_index=302,
    )
    folder = save(Gemma3ForConditionalGeneration(config), tokenizer, tmp_path)
    text_tokens = TOKENS.clamp(max=299)
    assert difference(load_hooked(folder).model, hugging_face(folder), text_tokens) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "old"),
    [
        (
            "llama3",
            {
                "rope_parameters": ...,
                "rope_theta": 10000.0,
                "rope_scaling": {"type": "llama3"}
                | {k: v for k, v in LLAMA3_ROPE.items() if k not in ("rope_type", "rope_theta")},
            },
        ),
        ("pythia", {"rope_parameters": ..., "rotary_pct": 0.25, "rotary_emb_base": 10000}),
        ("gemma2", {"rope_parameters": ..., "rope_theta": 10000.0, "layer_types": ...}),
        ("mistral", {"rope_parameters": ..., "rope_theta": 5000.0, "head_dim": ...}),
        ("gpt2", {"architectures": ...}),
    ],
)
def test_configurations_of_older_releases(folders, tmp_path, name, old):
    """A config.json as transformers 4 wrote it means the same, and so does a missing
    ``architectures``.
    """
    folder = Path(shutil.copytree(folders(name), tmp_path / name))
    edit_config(folder, **old)
    assert difference(load_hooked(folder).model, hugging_face(folder)) < TOLERANCE


def test_positions_without_a_formula_end_where_they_are_exact(folders):
    """LongRoPE is exact up to the length of pre-training, so the model ends there."""
    cfg = load_hooked(folders("phi3-grouped-longrope")).model.cfg
    assert cfg.n_ctx == 256


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_every_weight_has_the_type_asked_for(folders, name, dtype):
    """The type holds for every parameter, and the logit check passes in it."""
    loaded = load_hooked(folders(name), dtype=dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    assert loaded.model(TOKENS).dtype == loaded.dtype == dtype


# --- untouched weights, one copy ---------------------------------------------------------------


def test_no_weight_is_processed(folders):
    """Value biases, norms and the unembedding are the checkpoint's own numbers."""
    model = load_hooked(folders("gpt2")).model
    hf = hugging_face(folders("gpt2")).transformer
    bias = hf.h[0].attn.c_attn.bias.view(3, 4, 8)[2]
    assert torch.equal(model.blocks[0].attn.b_V, bias)
    assert torch.equal(model.blocks[0].ln1.w, hf.h[0].ln_1.weight)
    assert torch.equal(model.W_U, hf.wte.weight.T)


def test_conversion_takes_over_the_memory(folders):
    """The matrices of the hooked model are views of Hugging Face's, so that no model is in
    memory twice.
    """
    hf = hugging_face(folders("llama3"))
    theirs = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    model = hooked_from(hf, "LlamaForCausalLM", dtype=torch.float32)
    matrices = {n: p for n, p in model.named_parameters() if "W_" in n}
    assert len(matrices) == 2 + 3 * 7
    assert all(p.untyped_storage().data_ptr() in theirs for p in matrices.values())


def test_tied_embeddings_are_untied(folders):
    """Editing the unembedding of a checkpoint with tied embeddings leaves the embedding alone."""
    model = load_hooked(folders("gpt2")).model
    before = model.W_E.detach().clone()
    model.W_U.data.zero_()
    assert torch.equal(model.W_E, before)


def test_a_long_context_costs_nothing(folders, tmp_path):
    """A context of 131072 tokens allocates no mask or rotary table of that length."""
    folder = Path(shutil.copytree(folders("llama3"), tmp_path / "long"))
    edit_config(folder, max_position_embeddings=131072)
    model = load_hooked(folder).model
    assert model.cfg.n_ctx == 131072
    assert sum(buffer.numel() for buffer in model.buffers()) < 1e6


def test_shards_are_one_checkpoint(folders, tmp_path, tokenizer):
    """A checkpoint in shards has the weights of the checkpoint in one file."""
    sharded = save(ZOO["llama"].make(), tokenizer, tmp_path, max_shard_size="40KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert load_hooked(sharded).fingerprint == load_hooked(folders("llama")).fingerprint


def test_fingerprint_follows_the_weights_alone(folders, llama):
    """The fingerprint is the same in another folder, and another after the smallest change."""
    one, other = load_hooked(folders("llama")), load_hooked(llama)
    assert one.fingerprint == other.fingerprint
    weight = other.model.blocks[2].attn.W_O
    nudged = torch.nextafter(weight.data[1, 2, 3], torch.tensor(9.0))
    weight.data[1, 2, 3] = nudged
    changed = LoadedModel.wrap(other.model, other.tokenizer)
    assert changed.fingerprint != one.fingerprint


# --- tokenizer and vocabulary ------------------------------------------------------------------


def test_a_fine_tune_keeps_its_own_vocabulary_and_tokenizer(folders, tmp_path):
    """A fine-tune with more tokens and another tokenizer loads with both of its own."""
    own = train_tokenizer((*CORPUS, *KAZAKH), vocabulary=340)
    hf = ZOO["llama"].make()
    hf.resize_token_embeddings(len(own) + 4)
    folder = save(hf, own, tmp_path)
    loaded, base = load_hooked(folder), load_hooked(folders("llama"))
    assert loaded.model.cfg.d_vocab == len(own) + 4 > base.model.cfg.d_vocab
    assert loaded.model.W_U.shape[-1] == loaded.model.cfg.d_vocab
    text = "Қалайсың, әлем?"
    assert loaded.tokenizer(text).input_ids == own(text).input_ids
    assert loaded.tokenizer(text).input_ids != base.tokenizer(text).input_ids


def test_the_tokenizer_comes_unchanged(llama):
    """Nothing is set on the tokenizer: not its padding side, not a padding token; the model's
    own methods work on a copy.
    """
    path = llama / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"padding_side": "left"}
    path.write_text(json.dumps(settings))
    loaded = load_hooked(llama)
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.tokenizer.pad_token is None
    assert loaded.tokenizer.chat_template == CHAT_TEMPLATE
    assert loaded.model.tokenizer.padding_side == "right"
    ids = loaded.tokenizer(CHECK_TEXTS[0]).input_ids
    assert loaded.model.to_tokens(CHECK_TEXTS[0], prepend_bos=True)[0].tolist() == ids


# --- adapters ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def adapter(folders, tmp_path_factory, tokenizer):
    """A LoRA adapter on the Llama folder, and the folder of its merged model."""
    peft = pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("lora")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(hugging_face(folders("llama")), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(root / "adapter")
    save(adapted.merge_and_unload(), tokenizer, root / "merged")
    return root / "adapter", root / "merged"


def test_an_adapter_is_its_merged_model(adapter, folders):
    """A LoRA folder loads to the same weights as its merged model, takes the tokenizer of its
    base when it has none, and names that base.
    """
    folder, merged = adapter
    loaded = load_hooked(folder)
    assert loaded.fingerprint == load_hooked(merged).fingerprint
    assert loaded.fingerprint != load_hooked(folders("llama")).fingerprint
    assert loaded.adapter_base == str(folders("llama"))
    assert loaded.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(merged).get_vocab()


def test_an_adapter_may_bring_tokens(folders, tmp_path, tokenizer):
    """An adapter trained with added tokens grows the base model's vocabulary."""
    peft = pytest.importorskip("peft")
    base = hugging_face(folders("llama"))
    base.resize_token_embeddings(330)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    save(adapted.merge_and_unload(), tokenizer, tmp_path / "merged")
    loaded = load_hooked(tmp_path / "adapter")
    assert loaded.model.cfg.d_vocab == 330
    assert loaded.fingerprint == load_hooked(tmp_path / "merged").fingerprint


def test_adapters_that_cannot_be_merged_are_refused(adapter, folders, tmp_path):
    """A pickled adapter, one without a base and one that adds virtual tokens: one sentence each."""
    peft = pytest.importorskip("peft")
    pickled, baseless, prompts = (tmp_path / name for name in ("pickled", "baseless", "prompts"))
    for copy in (pickled, baseless):
        shutil.copytree(adapter[0], copy)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "adapter_model.bin, which is not safetensors" in refusal(pickled)
    settings = baseless / "adapter_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": "/no/such/base"})
    )
    assert "There is no folder /no/such/base" in refusal(baseless)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(hugging_face(folders("llama")), config).save_pretrained(prompts)
    assert "PromptTuning adapter" in refusal(prompts)


# --- already loaded models ---------------------------------------------------------------------


def test_wrapping_is_the_model_itself(folders):
    """An already loaded model is accepted without a copy, with a fingerprint of its weights."""
    loaded = load_hooked(folders("pythia"))
    wrapped = LoadedModel.wrap(loaded.model, loaded.tokenizer)
    assert wrapped.model is loaded.model
    assert wrapped.fingerprint == loaded.fingerprint
    assert wrapped.architecture == "GPTNeoXForCausalLM"
    assert wrapped.logit_check_max_abs_diff is None


def read_and_patch(model):
    """Z of one layer, and the logits after head 2 is silenced at the last position."""
    seen = []

    def silence(z, hook):  # noqa: ARG001
        seen.append(z.detach().clone())
        z = z.clone()
        z[:, -1, 2] = 0.0
        return z

    with torch.no_grad():
        return model.run_with_hooks(TOKENS, fwd_hooks=[(LAST_SITE, silence)]), seen[0]


@pytest.mark.parametrize("name", ZOO)
def test_a_bridge_answers_to_the_same_hooks(folders, name):
    """A TransformerBridge of the same folder has the same z at the same name and shape, and the
    same logits when a head is patched there.
    """
    bridge = TransformerBridge.boot_transformers(str(folders(name)), device="cpu")
    wrapped = LoadedModel.wrap(bridge, bridge.tokenizer)
    of_bridge, z_bridge = read_and_patch(wrapped.model)
    of_hooked, z_hooked = read_and_patch(load_hooked(folders(name)).model)
    assert z_bridge.shape == z_hooked.shape
    assert float((z_bridge - z_hooked).abs().max()) < TOLERANCE
    assert float((of_bridge - of_hooked).abs().max()) < TOLERANCE
    assert len(wrapped.fingerprint) == 64


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma2"])
def test_bridges_are_measured_like_hooked_transformers(folders, name, padding_side):
    """The engine that is chosen for a bridge gives the effects that the native hooks of the
    HookedTransformer give, whichever side the prompts are padded on.
    """
    prompts = TokenizedPrompts(
        ids=("a", "b", "c"),
        token_ids=tuple(tuple(TOKENS[0, :n].tolist()) for n in (5, 11, 8)),
    )
    bridge = TransformerBridge.boot_transformers(str(folders(name)), device="cpu")
    wrapped = LoadedModel.wrap(bridge, bridge.tokenizer)
    model = load_hooked(folders(name)).model
    noise = torch.randn(3, 1, 4, model.cfg.d_head, generator=torch.Generator().manual_seed(5))
    sources = Sources({(1, "raw"): noise})
    patches = [(Patch(1, HeadSet.of(heads, 4), 0.7, "raw"),) for heads in ([0], [1, 3])]
    assert make_engine(wrapped.model, prompts).name == "hooks"
    of_bridge, of_hooked = (
        HookEngine(one, prompts, padding_side=padding_side).effects(patches, sources)
        for one in (wrapped.model, model)
    )
    assert of_hooked.kl_nats.min() > 0
    assert abs(of_bridge.kl_nats - of_hooked.kl_nats).max() < 1e-5
    assert ModelCard.of(wrapped).n_heads == ModelCard.of(load_hooked(folders(name))).n_heads


def test_processed_weights_are_refused(folders):
    """Weights that were folded or centred on load are refused, in both kinds of model."""
    loaded = load_hooked(folders("gpt2"))
    loaded.model.process_weights_()
    with pytest.raises(UserError, match="processed on load"):
        LoadedModel.wrap(loaded.model, loaded.tokenizer)
    bridge = TransformerBridge.boot_transformers(str(folders("gpt2")), device="cpu")
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(UserError, match="processed on load"):
        LoadedModel.wrap(bridge, loaded.tokenizer)


# --- the check at load time --------------------------------------------------------------------


def test_a_wrong_conversion_is_refused(folders, monkeypatch):
    """A model that differs from Hugging Face is refused with the largest difference, unless the
    check is switched off.
    """
    right = ARCHITECTURES["LlamaForCausalLM"]

    def wrong(hf):
        return right.config(hf) | {"rotary_base": 9000.0}

    monkeypatch.setitem(ARCHITECTURES, "LlamaForCausalLM", Architecture(wrong, right.weights))
    sentence = refusal(folders("llama"))
    loaded = load_hooked(folders("llama"), check_logits=False)
    assert loaded.logit_check_max_abs_diff is None
    tokens = [torch.tensor([loaded.tokenizer(text).input_ids[:256]]) for text in CHECK_TEXTS]
    hf = hugging_face(folders("llama"))
    largest = max(difference(loaded.model, hf, row) for row in tokens)
    assert f"by up to {largest:.3g} in a logit" in sentence


def test_a_variant_without_counterpart_is_refused(llama, tmp_path, tokenizer):
    """What TransformerLens cannot compute is named before anything is converted."""
    edit_config(llama, rope_parameters={"rope_type": "proportional", "rope_theta": 1e4})
    assert "rope_type 'proportional'" in refusal(llama)
    config = OPTConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=48,
        num_attention_heads=4,
        max_position_embeddings=300,
        do_layer_norm_before=False,
        word_embed_proj_dim=32,
    )
    opt = save(random_model(config), tokenizer, tmp_path / "opt")
    assert "do_layer_norm_before=False" in refusal(opt)


# --- hub ids -----------------------------------------------------------------------------------


@pytest.fixture
def hub_raises(monkeypatch):
    """Let every fetch from the hub fail in a given way."""

    def set_error(error):
        def fetch(*_args, **_options):
            raise error

        monkeypatch.setattr(checkpoint, "snapshot_download", fetch)

    return set_error


def test_a_hub_id_is_a_folder_with_a_commit(folders, tmp_path, monkeypatch):
    """A hub id loads what its snapshot holds and records the exact commit; only safetensors, and
    only files of the top folder, are asked for.
    """
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = Path(shutil.copytree(folders("qwen2"), tmp_path / "snapshots" / commit))
    asked = []

    def fetch(source, *, revision, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        assert (source, revision, ignore_patterns) == ("org/tuned", "v2", ["*/*"])
        return str(snapshot)

    monkeypatch.setattr(checkpoint, "snapshot_download", fetch)
    loaded = load_hooked("org/tuned", revision="v2")
    assert (loaded.source, loaded.revision) == ("org/tuned", commit)
    assert loaded.fingerprint == load_hooked(folders("qwen2")).fingerprint
    assert {name for name in asked if "safetensors" in name} == {"model.safetensors"}
    assert not [name for name in asked if name.endswith((".bin", ".pt", ".pth"))]


class _Response:
    status_code = 403
    headers = MappingProxyType({})
    request = None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub.GatedRepoError("no", response=_Response()), "is gated"),
        (hub.RepositoryNotFoundError("no", response=_Response()), "neither a folder here nor"),
        (hub.RevisionNotFoundError("no", response=_Response()), "has no revision 'v9'"),
        (hub.LocalEntryNotFoundError("no"), "the hub could not be reached"),
        (hub.OfflineModeIsEnabled("no"), "the hub could not be reached"),
        (ConnectionError("no"), "the hub could not be reached"),
        (hub.HFValidationError("no"), "well-formed hub id"),
    ],
)
def test_the_hub_says_no(hub_raises, error, said):
    """A gated or missing repository, a missing revision, no network, a malformed id: one
    sentence each, with what to do.
    """
    hub_raises(error)
    sentence = refusal("meta-llama/Llama-3.1-8B-Instruct", revision="v9")
    assert said in sentence
    assert sentence.startswith("meta-llama/Llama-3.1-8B-Instruct ")


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "a/b/c", Path("missing")])
def test_a_wrong_path_is_refused(path):
    """What can only be meant as a path is never looked up on the hub."""
    assert f"There is no folder {path}" in refusal(path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, llama):
    """A folder without a configuration, or with a broken one, is named with the fix."""
    assert "has no config.json" in refusal(tmp_path)
    (llama / "config.json").write_text("{")
    assert "not valid JSON" in refusal(llama)


def test_an_unsupported_architecture_is_refused(llama):
    """An architecture without conversion is named together with every one that loads."""
    edit_config(llama, architectures=["MambaForCausalLM"], model_type="mamba")
    sentence = refusal(llama)
    assert "MambaForCausalLM" in sentence
    assert all(name in sentence for name in ARCHITECTURES)


def test_a_quantized_checkpoint_is_refused(llama):
    """A quantized checkpoint is refused by the name of its method."""
    edit_config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantized with gptq" in refusal(llama)


def test_a_pickled_checkpoint_is_refused(llama):
    """A checkpoint of pickled weights alone is refused, unread."""
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"would run code")
    assert "pytorch_model.bin, which is not safetensors" in refusal(llama)


def test_missing_parts_are_refused(llama, tmp_path, tokenizer):
    """A missing shard, missing weights and a missing tokenizer are named."""
    sharded = save(ZOO["llama"].make(), tokenizer, tmp_path / "sharded", max_shard_size="40KB")
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(sharded)
    headless = save(ZOO["llama"].make().model, tokenizer, tmp_path / "headless")
    edit_config(headless, architectures=["LlamaForCausalLM"])
    assert "lm_head.weight" in refusal(headless)
    for file in llama.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refusal(llama)


def test_weights_of_another_shape_are_refused(llama):
    """Weights that do not have the shapes of their configuration are refused."""
    edit_config(llama, intermediate_size=64)
    assert "cannot be read" in refusal(llama)


def test_code_of_a_checkpoint_does_not_run_unasked(llama, tmp_path):
    """Code that a checkpoint brings along is not run, and the result says so."""
    mark = tmp_path / "ran"
    (llama / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\n")
    edit_config(llama, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Config"})
    loaded = load_hooked(llama)
    assert loaded.trust_remote_code is False
    assert not mark.exists()
    edit_config(llama, model_type="unheard-of")
    assert "trust_remote_code=True" in refusal(llama)
    assert not mark.exists()


def test_devices_that_are_not_there_are_refused(folders):
    """More GPUs than there are, or several devices of a kind that has one, are refused."""
    n_gpus = torch.cuda.device_count()
    sentence = refusal(folders("llama"), device="cuda", n_devices=n_gpus + 1)
    assert f"this machine has {n_gpus}" in sentence
    assert "n_devices=2" in refusal(folders("llama"), n_devices=2)
    assert "device 'gpu' is unknown" in refusal(folders("llama"), device="gpu")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma2"])
def test_two_gpus_are_one_model(folders, name):
    """A model whose layers lie on two GPUs has the logits of the model on one."""
    spread = load_hooked(folders(name), device="cuda", n_devices=2).model
    one = load_hooked(folders(name), device="cuda").model
    assert {parameter.device.index for parameter in spread.parameters()} == {0, 1}
    with torch.no_grad():
        gap = spread(TOKENS).cpu() - one(TOKENS).cpu()
    assert float(gap.abs().max()) < TOLERANCE


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_counts_the_weights(folders, dtype):
    """The estimate is the checkpoint's number of weights times the size of the type."""
    hf = hugging_face(folders("llama3"))
    n_weights = sum(parameter.numel() for parameter in hf.parameters())
    estimate = estimate_memory(folders("llama3"), dtype=dtype)
    assert estimate.weights_bytes == n_weights * dtype.itemsize
    assert estimate.fits


def test_the_estimate_of_a_hub_id_fetches_no_weights(folders, monkeypatch):
    """The size of a hub id comes from its headers; without network, from what was fetched before
    or as a refusal.
    """

    class Metadata:
        parameter_count = MappingProxyType({"BF16": 1000, "F32": 10})

    monkeypatch.setattr(memory, "get_safetensors_metadata", lambda *_args, **_options: Metadata)
    assert estimate_memory("org/tuned", dtype=torch.bfloat16).weights_bytes == 2020

    def unreachable(*_args, **_options):
        raise ConnectionError("no network")

    monkeypatch.setattr(memory, "get_safetensors_metadata", unreachable)
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *_a, **_o: str(folders("llama3")))
    fetched = estimate_memory(folders("llama3"))
    assert estimate_memory("org/tuned").weights_bytes == fetched.weights_bytes
    monkeypatch.setattr(checkpoint, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="could not be reached"):
        estimate_memory("org/tuned")


def test_what_cannot_fit_is_not_started(folders, monkeypatch):
    """A checkpoint larger than the free memory is refused before it is read, with advice."""
    needed = estimate_memory(folders("llama3")).weights_bytes
    monkeypatch.setattr(memory, "free_bytes", lambda *_: needed - 1)
    monkeypatch.setattr(loading, "load_hugging_face", lambda *_args, **_options: pytest.fail())
    assert "load it as bfloat16" in refusal(folders("llama3"))
    monkeypatch.setattr(memory, "free_bytes", lambda *_: needed // 4)
    assert "bfloat16" not in refusal(folders("llama3"))


def test_the_zoo_is_what_transformers_makes(folders):
    """Every tiny folder is read by transformers itself, tokenizer and all."""
    config = AutoConfig.from_pretrained(folders("qwen3"))
    assert config.architectures == ["Qwen3ForCausalLM"]
    tokens = AutoTokenizer.from_pretrained(folders("qwen3"))(CHECK_TEXTS[1]).input_ids
    assert tokens[0] == 0
    assert max(tokens) < config.vocab_size


def test_a_hooked_transformer_comes_out(folders):
    """What comes out is TransformerLens' own model, in evaluation mode."""
    loaded = load_hooked(str(folders("llama")))
    assert type(loaded.model) is HookedTransformer
    assert not loaded.model.training
    assert loaded.source == str(folders("llama"))
