"""Load a Hugging Face folder or hub id as a ``HookedTransformer`` with untouched weights.

``HookedTransformer.from_pretrained`` refuses every name that is not on its list, so the parts are
put together here: the configuration from the folder, the weights from the Hugging Face model
through TransformerLens' own conversions, the tokenizer from the folder. No weight is processed:
folding ``b_V`` away would shift z, and refactoring W_V and W_O would change its basis.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rq4lens.errors import UserError
from rq4lens.models.architectures import ARCHITECTURES, StateDict

CHECK_TEXTS = ("The quick brown fox jumps over the lazy dog.", "In 1999, 3 + 4 = 7; what is next?")
"""The two prompts on which a loaded model must agree with its Hugging Face original."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for patching, and where it came from.

    Attributes:
        model: The model; its weights are those of the checkpoint, never processed.
        tokenizer: The checkpoint's own tokenizer, unchanged.
        source: Folder or hub id.
        revision: Commit, branch or tag of a hub id; None means the default branch.
        dtype: Type of the weights.
        trust_remote_code: Whether code from the checkpoint was allowed to run.
        architecture: Name in ``config.json``, as ``LlamaForCausalLM``.
        logit_check_max_abs_diff: Largest logit difference to the Hugging Face model on
            ``CHECK_TEXTS``; None when the check was not asked for.
    """

    model: HookedTransformer
    tokenizer: PreTrainedTokenizerBase
    source: str
    revision: str | None
    dtype: torch.dtype
    trust_remote_code: bool
    architecture: str
    logit_check_max_abs_diff: float | None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights' names, shapes, types and bytes; independent of the path."""
        return weights_fingerprint(self.model)


def weights_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over name, shape, type and bytes of every parameter, in order of name.

    Args:
        model: Any module.

    Returns:
        64 hexadecimal digits that depend on the weights alone.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}|".encode())
        data = parameter.detach().cpu().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_hooked(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    check_logits: bool = True,
) -> LoadedModel:
    """Load a checkpoint as a ``HookedTransformer`` without processing its weights.

    Args:
        source: A Hugging Face folder or hub id.
        revision: Commit, branch or tag of a hub id.
        device: Where the model goes, as ``"cpu"`` or ``"cuda"``.
        dtype: Type of the weights.
        trust_remote_code: Allow code that the checkpoint brings along to run.
        check_logits: Compare with the Hugging Face model on two prompts.

    Returns:
        The model with its tokenizer and provenance.

    Raises:
        UserError: The checkpoint cannot be loaded, or its logits differ from Hugging Face.
    """
    origin = {"revision": revision, "trust_remote_code": trust_remote_code}
    hf_config = AutoConfig.from_pretrained(str(source), **origin)
    architecture = hf_config.architectures[0]
    tokenizer = AutoTokenizer.from_pretrained(str(source), **origin)
    hf_model = AutoModelForCausalLM.from_pretrained(
        str(source), dtype=dtype, use_safetensors=True, **origin
    ).eval()
    expected = _hf_logits(hf_model, tokenizer) if check_logits else None
    model = _hooked_from_hf(hf_model, architecture, device, dtype)
    del hf_model
    _attach_tokenizer(model, tokenizer)
    difference = None if expected is None else _logit_difference(model, tokenizer, expected)
    if difference is not None and difference > 1e-3:
        raise UserError(
            f"{source} as a HookedTransformer differs from its Hugging Face model by up to "
            f"{difference:.3g} in the logits."
        )
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        source=str(source),
        revision=revision,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        architecture=architecture,
        logit_check_max_abs_diff=difference,
    )


@torch.no_grad()
def _hooked_from_hf(
    hf_model: Any, architecture: str, device: str, dtype: torch.dtype
) -> HookedTransformer:
    entry = ARCHITECTURES[architecture]
    cfg = HookedTransformerConfig(
        **entry.config(hf_model.config),
        original_architecture=architecture,
        dtype=dtype,
        device="cpu",
        init_weights=False,
    )
    model = HookedTransformer(cfg, move_to_device=False)
    _assign(model, entry.weights(hf_model, cfg))
    cfg.device = device
    model.move_model_modules_to_device()
    return model.eval()


def _assign(model: HookedTransformer, weights: StateDict) -> None:
    """Let the model's parameters be the converted tensors themselves, without a second copy."""
    result = model.load_state_dict(weights, strict=False, assign=True)
    lost = [name for name in result.missing_keys if "W_" in name.rsplit(".", 1)[-1]]
    if lost or result.unexpected_keys:
        raise UserError(f"The conversion left out {lost} and left over {result.unexpected_keys}.")


def _attach_tokenizer(model: HookedTransformer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model a tokenizer of its own: TransformerLens changes the padding side of it."""
    own = copy.deepcopy(tokenizer)
    own.padding_side = "right"
    model.tokenizer = own


def _check_tokens(tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    return [torch.tensor([tokenizer(text)["input_ids"]]) for text in CHECK_TEXTS]


@torch.no_grad()
def _hf_logits(
    hf_model: Any, tokenizer: PreTrainedTokenizerBase
) -> list[Float[Tensor, "1 pos vocab"]]:
    rows = _check_tokens(tokenizer)
    return [hf_model(input_ids=tokens.to(hf_model.device)).logits.cpu() for tokens in rows]


@torch.no_grad()
def _logit_difference(
    model: HookedTransformer, tokenizer: PreTrainedTokenizerBase, expected: Sequence[Tensor]
) -> float:
    """Largest absolute logit difference over the two check prompts."""
    got = [model(tokens, padding_side="right").cpu() for tokens in _check_tokens(tokenizer)]
    return max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))
