"""Loading: a folder computes what Hugging Face computes, with weights that nobody touched."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from loading_cases import (
    TOKENS,
    TOLERANCE,
    difference,
    edit_config,
    flip_a_bit,
    hugging_face,
    refusal,
    same_weights,
)
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
from tiny import needs_hooked
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    OPTConfig,
    SiglipVisionConfig,
)

from rq4lens.config import Place
from rq4lens.errors import UserError
from rq4lens.models.load import fingerprint, huggingface, loading
from rq4lens.models.load.architectures import ARCHITECTURES, Architecture
from rq4lens.models.load.checkpoint import locate
from rq4lens.models.load.conversion import hooked_from
from rq4lens.models.load.devices import Placement
from rq4lens.models.load.fingerprint import files_digest
from rq4lens.models.load.huggingface import load_hugging_face, read_ahead, read_tensors
from rq4lens.models.load.lens import HookedTransformer
from rq4lens.models.load.loading import CHECK_TEXTS, LoadedModel, load_hooked
from rq4lens.models.pair import ModelCard, PairMember

pytest_plugins = ("loading_cases",)


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


@needs_hooked
def test_positions_without_a_formula_end_where_they_are_exact(folders):
    """LongRoPE is exact up to the length of pre-training, so the model ends there."""
    cfg = load_hooked(folders("phi3-grouped-longrope")).model.cfg
    assert cfg.n_ctx == 256


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_every_weight_has_the_type_asked_for(folders, name, dtype):
    """The type holds for every parameter, and the logit check passes in it."""
    place = Place(device="cpu", dtype=str(dtype).removeprefix("torch."))
    loaded = load_hooked(folders(name), place=place)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    assert loaded.model(TOKENS).dtype == loaded.dtype == dtype


def test_no_weight_is_processed(folders):
    """Value biases, norms and the unembedding are the checkpoint's own numbers."""
    model = load_hooked(folders("gpt2")).model
    hf = hugging_face(folders("gpt2")).transformer
    bias = hf.h[0].attn.c_attn.bias.view(3, 4, 8)[2]
    assert torch.equal(model.blocks[0].attn.b_V, bias)
    assert torch.equal(model.blocks[0].ln1.w, hf.h[0].ln_1.weight)
    assert torch.equal(model.W_U, hf.wte.weight.T)


@needs_hooked
def test_conversion_takes_over_the_memory(folders):
    """The matrices of the hooked model are views of Hugging Face's, so that no model is in
    memory twice.
    """
    hf = hugging_face(folders("llama3"))
    theirs = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    here = Placement.in_order(("cpu",) * hf.config.num_hidden_layers)
    model = hooked_from(hf, "LlamaForCausalLM", dtype=torch.float32, placement=here)
    matrices = {n: p for n, p in model.named_parameters() if "W_" in n}
    assert len(matrices) == 2 + 3 * 7
    assert all(p.untyped_storage().data_ptr() in theirs for p in matrices.values())


@needs_hooked
@pytest.mark.parametrize("name", ["llama3", "gemma3", "gptj"])
def test_rotary_tables_are_those_that_each_block_makes(folders, name):
    """They are made once for blocks that have the same, and belong to each of them."""
    blocks = load_hooked(folders(name)).model.blocks
    for block in blocks:
        attn = block.attn
        sizes, base = (attn.cfg.rotary_dim, len(attn.rotary_sin)), attn._rotary_base()
        own = attn.calculate_sin_cos_rotary(*sizes, base=base, dtype=attn.cfg.dtype)
        assert torch.equal(attn.rotary_sin, own[0])
        assert torch.equal(attn.rotary_cos, own[1])
    assert len({block.attn.rotary_sin.data_ptr() for block in blocks}) == len(blocks) > 1


@needs_hooked
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
    assert same_weights(load_hooked(sharded), load_hooked(folders("llama")))


# --- what a model is known by


def test_a_checkpoint_is_known_by_its_files(folders, llama):
    """The same in another folder, another after one bit of one weight, or in another type."""
    one, other = load_hooked(folders("llama")), load_hooked(llama)
    assert one.fingerprint == other.fingerprint
    half = load_hooked(llama, place=Place(device="cpu", dtype="bfloat16"))
    flip_a_bit(llama / "model.safetensors")
    changed = load_hooked(llama)
    assert len({each.fingerprint for each in (one, half, changed)}) == 3


def test_a_file_is_known_by_all_of_its_content(llama):
    """By a bit at its start, in its middle or at its end."""
    path, prints = llama / "model.safetensors", [files_digest(locate(llama)).result()]
    for at in (1, path.stat().st_size // 2, -1):
        flip_a_bit(path, at)
        prints.append(files_digest(locate(llama)).result())
        flip_a_bit(path, at)
    assert len(set(prints)) == 4
    assert files_digest(locate(llama)).result() == prints[0]


def test_a_checkpoint_is_read_once_for_its_fingerprint(llama, monkeypatch):
    """Neither a second load nor a card reads it again, and nothing reads the weights in memory."""
    read = []
    digest = fingerprint._file_digest
    monkeypatch.setattr(
        fingerprint, "_file_digest", lambda path: read.append(path.name) or digest(path)
    )
    monkeypatch.setattr(loading, "weights_fingerprint", pytest.fail)
    for _ in range(2):
        ModelCard.of(load_hooked(llama))
    files_digest(locate(llama)).result()
    assert sorted(read) == sorted({*read})
    assert "model.safetensors" in read
    (llama / "config.json").touch()
    files_digest(locate(llama)).result()
    assert len(read) == 2 * len({*read})


def test_a_checkpoint_is_read_beside_its_loading(llama, monkeypatch):
    """The files wait until the model is there; loading would wait for them in vain."""
    loaded = threading.Event()
    load, digest = loading.load_hugging_face, fingerprint._file_digest

    def load_first(*args, **how):
        model = load(*args, **how)
        loaded.set()
        return model

    def after_loading(path):
        assert loaded.wait(timeout=60)
        return digest(path)

    monkeypatch.setattr(loading, "load_hugging_face", load_first)
    monkeypatch.setattr(fingerprint, "_file_digest", after_loading)
    assert len(load_hooked(llama).fingerprint) == 64


@pytest.mark.parametrize("name", ZOO)
def test_weights_that_are_read_ahead_are_those_of_the_files(folders, name, monkeypatch):
    """On a GPU they are on their way while transformers still looks at the configuration."""
    monkeypatch.setattr(huggingface, "PIECE_BYTES", 1000)  # some tensors take several, most one
    checkpoint, dtype = locate(folders(name)), torch.float32
    assert read_ahead(checkpoint, torch.device("cpu"), dtype) is None
    with ThreadPoolExecutor() as pool:
        ahead = pool.submit(read_tensors, checkpoint, torch.device("cpu"))
        found = load_hugging_face(checkpoint, dtype=dtype, tensors=ahead)
    expected = load_hugging_face(checkpoint, dtype=dtype)
    assert type(found) is type(expected)
    for values in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(found, values)(), getattr(expected, values)(), strict=True)
        for (weight, value), (same_weight, same_value) in pairs:
            assert weight == same_weight
            assert value.dtype == same_value.dtype
            assert torch.equal(value, same_value), weight
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.name_or_path == expected.name_or_path
    assert found.training is expected.training is False


@pytest.mark.parametrize("n_bytes", [0, -100])
def test_damaged_weights_are_refused_when_they_are_read_ahead(llama, n_bytes):
    """What goes wrong on another thread is said where the model is asked for."""
    checkpoint, path = locate(llama), llama / "model.safetensors"
    _ = checkpoint.tensors
    path.write_bytes(path.read_bytes()[:n_bytes])
    with ThreadPoolExecutor() as pool:
        ahead = pool.submit(read_tensors, checkpoint, torch.device("cpu"))
        with pytest.raises(UserError, match=r"cannot be read .*; restore the folder"):
            load_hugging_face(checkpoint, dtype=torch.float32, tensors=ahead)


def test_an_object_is_known_by_its_weights(folders):
    """What may have been changed since it was loaded is not taken for its files."""
    loaded = load_hooked(folders("llama"))
    prints = [LoadedModel.wrap(loaded.model, loaded.tokenizer).fingerprint]
    assert PairMember.of(loaded).card.weights_fingerprint == prints[0]
    weight = loaded.model.blocks[2].attn.W_O
    weight.data[1, 2, 3] = torch.nextafter(weight.data[1, 2, 3], torch.tensor(9.0))
    prints.append(LoadedModel.wrap(loaded.model, loaded.tokenizer).fingerprint)
    assert PairMember.of(loaded).card.weights_fingerprint == prints[1] != prints[0]


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


@needs_hooked
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


@needs_hooked
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


def test_devices_that_are_not_there_are_refused(folders):
    """More GPUs than there are, or several devices of a kind that has one, are refused."""
    n_gpus = torch.cuda.device_count()
    sentence = refusal(folders("llama"), place=Place(device="cuda", n_devices=n_gpus + 1))
    expected = f"this machine has {n_gpus}" if n_gpus else "device 'cuda' cannot be used here"
    assert expected in sentence
    assert "n_devices=2" in refusal(folders("llama"), place=Place(device="cpu", n_devices=2))
    assert "device 'gpu' cannot be used here" in refusal(
        folders("llama"), place=Place(device="gpu")
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma2"])
def test_two_gpus_are_one_model(folders, name):
    """A model whose layers lie on two GPUs has the logits of the model on one."""
    spread = load_hooked(folders(name), place=Place(device="cuda", n_devices=2)).model
    one = load_hooked(folders(name), place=Place(device="cuda")).model
    assert {parameter.device.index for parameter in spread.parameters()} == {0, 1}
    with torch.no_grad():
        gap = spread(TOKENS).cpu() - one(TOKENS).cpu()
    assert float(gap.abs().max()) < TOLERANCE


def test_the_zoo_is_what_transformers_makes(folders):
    """Every tiny folder is read by transformers itself, tokenizer and all."""
    config = AutoConfig.from_pretrained(folders("qwen3"))
    assert config.architectures == ["Qwen3ForCausalLM"]
    tokens = AutoTokenizer.from_pretrained(folders("qwen3"))(CHECK_TEXTS[1]).input_ids
    assert tokens[0] == 0
    assert max(tokens) < config.vocab_size


@needs_hooked
def test_a_hooked_transformer_comes_out(folders):
    """What comes out is TransformerLens' own model, in evaluation mode."""
    loaded = load_hooked(str(folders("llama")))
    assert type(loaded.model) is HookedTransformer
    assert not loaded.model.training
    assert loaded.source == str(folders("llama"))
