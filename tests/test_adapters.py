"""Adapters: a LoRA folder is its merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from loading_cases import flip_a_bit, hugging_face, refusal, same_weights
from model_zoo import (
    save,
)
from transformers import (
    AutoTokenizer,
)

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
