"""Adapters: a LoRA folder is its merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from loading_cases import flip_a_bit, hugging_face, refusal, same_weights
from model_zoo import ZOO, random_model, save
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rq4lens.models.load.adapters import other_base
from rq4lens.models.load.checkpoint import locate
from rq4lens.models.load.loading import load_hooked

pytest_plugins = ("loading_cases",)


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
    assert same_weights(loaded, load_hooked(merged))
    assert not same_weights(loaded, load_hooked(folders("llama")))
    assert loaded.fingerprint == load_hooked(folder).fingerprint
    assert loaded.adapter_base == str(folders("llama"))
    assert loaded.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(merged).get_vocab()


def test_an_adapter_is_known_by_its_files_and_those_of_its_base(adapter, folders, tmp_path):
    """One bit in either of them is another model."""
    folder, base = (
        Path(shutil.copytree(each, tmp_path / each.name)) for each in (adapter[0], folders("llama"))
    )
    settings = folder / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(folders("llama")), str(base)))
    prints = [load_hooked(folder).fingerprint]
    for file in (folder / "adapter_model.safetensors", base / "model.safetensors"):
        flip_a_bit(file)
        prints.append(load_hooked(folder).fingerprint)
    assert len({*prints}) == 3


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
    assert same_weights(loaded, load_hooked(tmp_path / "merged"))


def trained(model, **settings):
    """An adapter on a model, each of its weights away from where it starts."""
    peft = pytest.importorskip("peft")
    settings = {"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapted.eval()


@torch.no_grad()
def same_logits(folder, adapted, tokens):
    """Whether a folder loads as the model that was trained, before anything is merged."""
    expected = adapted(input_ids=tokens).logits
    difference = (load_hooked(folder).model(tokens) - expected).abs().max()
    assert difference <= 1e-4 * expected.abs().max()


TOKENS = torch.tensor([[3, 5, 8, 13, 21, 34]])


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [3, 8]},
    ],
    ids=str,
)
def test_a_change_of_a_tied_matrix_stays_where_it_was_trained(tmp_path, tokenizer, settings):
    """Embedding and output layer may share a matrix; the adapter of one does not change both."""
    config = ZOO["llama"].config()
    config.tie_word_embeddings = True
    base = save(random_model(config), tokenizer, tmp_path / "base")
    adapted = trained(hugging_face(base), **settings)
    adapted.save_pretrained(tmp_path / "adapter")
    same_logits(tmp_path / "adapter", adapted, TOKENS)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [328, 329]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_added_tokens_are_read_wherever_peft_saved_them(folders, tmp_path, settings):
    """PEFT reloads each of these on the grown base, to the model that was trained."""
    base = hugging_face(folders("llama"))
    base.resize_token_embeddings(330)
    adapted = trained(base, **settings)
    adapted.save_pretrained(tmp_path / "adapter")
    same_logits(tmp_path / "adapter", adapted, torch.tensor([[3, 328, 8, 329, 21, 34]]))


def test_a_merge_that_is_another_model_is_refused(adapter, monkeypatch):
    """The load-time check compares with the adapter before it was merged."""
    from peft.tuners.lora import LoraModel  # noqa: PLC0415

    monkeypatch.setattr(LoraModel, "merge_and_unload", LoraModel.unload)
    assert "differs from its Hugging Face model" in refusal(adapter[0])


def test_a_start_by_chance_is_refused(folders, tmp_path):
    """PEFT would compute another base at every load."""
    start = trained(hugging_face(folders("llama")), init_lora_weights="pissa_niter_4")
    start.save_pretrained(tmp_path)
    assert "'pissa_niter_4'" in refusal(tmp_path)


def test_a_base_beside_the_adapter_comes_first(adapter, folders, tmp_path, monkeypatch):
    """A relative base is looked for in the adapter's folder, wherever one stands."""
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    shutil.copytree(folders("llama"), folder / "base")
    settings = json.loads((folder / "adapter_config.json").read_text())
    for base in ("base", "../adapter/base"):
        (folder / "adapter_config.json").write_text(
            json.dumps(settings | {"base_model_name_or_path": base})
        )
        monkeypatch.chdir(folders("llama").parent)
        assert load_hooked(folder).adapter_base == str(folder / base)


def test_another_base_than_the_adapters_own_is_said(adapter, folders, tmp_path):
    """The same numbers elsewhere are the same base; other numbers are named."""
    own = locate(adapter[0])
    copy = shutil.copytree(folders("llama"), tmp_path / "copy")
    assert other_base(own, locate(copy)) is None
    said = other_base(own, locate(adapter[1]))
    assert f"was trained on {folders('llama')}" in said
    assert f"base model {adapter[1]}" in said
    assert other_base(own, own) is not None


@pytest.mark.filterwarnings("error")
def test_a_refusal_is_one_sentence_without_warnings(adapter, tmp_path):
    """PEFT warns of weights that are missing; the sentence names the file that lacks them."""
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if "lora_B" not in name},
        folder / "adapter_model.safetensors",
    )
    assert "adapter_model.safetensors lacks" in refusal(folder)


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
