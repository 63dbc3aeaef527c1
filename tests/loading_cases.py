"""What the tests of loading share: tiny models as folders, and the sentence of a refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from model_zoo import ZOO, save, train_tokenizer
from transformers import AutoModelForCausalLM

from rq4lens.errors import UserError
from rq4lens.models.load.fingerprint import weights_fingerprint
from rq4lens.models.load.loading import load_hooked

TOKENS = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(7))
TOLERANCE = 1e-4


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


def same_weights(one, other):
    """Whether two loaded models have the same weights, whatever files these came from."""
    return weights_fingerprint(one.model) == weights_fingerprint(other.model)


def flip_a_bit(path: Path, at: int = -3) -> None:
    """Change one bit of a file; of safetensors, the end is a weight."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


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
