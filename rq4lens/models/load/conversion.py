"""Turn a Hugging Face model into a ``HookedTransformer`` without processing or copying weights.

No weight is processed: folding ``b_V`` away would shift z, and refactoring W_V and W_O would
change its basis. The converted tensors are views of the Hugging Face ones and become the
parameters themselves, so that a model is never in memory twice; TransformerLens' own
``load_state_dict`` would copy each of them into a tensor allocated before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rq4lens.errors import UserError
from rq4lens.models.load.architectures import StateDict, find_architecture, write_longrope_tables
from rq4lens.models.load.checkpoint import explained
from rq4lens.models.load.devices import AT_THE_EXIT, Placement, bring_inputs
from rq4lens.models.load.lens import (
    SUPPORTED_ACTIVATIONS,
    AbstractAttention,
    HookedModel,
    HookedTransformer,
    HookedTransformerConfig,
)

CANNOT, USUAL = "TransformerLens cannot convert this {}", "use a checkpoint of the usual form"


@torch.no_grad()
def hooked_from(
    hf_model: Any, architecture: str, *, dtype: torch.dtype, placement: Placement
) -> HookedTransformer:
    """Convert a Hugging Face model; the result takes over its memory."""
    here = str(hf_model.get_input_embeddings().weight.device)
    cfg = hooked_config(
        hf_model.config,
        architecture,
        dtype=dtype,
        device=here,
        n_devices=placement.n_devices_of_formula,
    )
    if len(placement.devices) > 1 and cfg.positional_embedding_type == "alibi":
        raise UserError(
            f"a {architecture} cannot be spread over {', '.join(map(str, placement.devices))}, "
            "because TransformerLens keeps its ALiBi slopes on one of them; load it on one device."
        )
    with init_empty_weights(), _tables_made_once():
        model = HookedTransformer(cfg, move_to_device=False)
    with explained(CANNOT.format(architecture), USUAL):
        weights = find_architecture(architecture).weights(hf_model, cfg)
    _assign(model, _untied({name: _as_type(each, dtype) for name, each in weights.items()}))
    write_longrope_tables(model, hf_model.config)
    _place(model, placement)
    return model.eval()


@contextmanager
def _tables_made_once() -> Iterator[None]:
    """Make rotary tables once for all blocks that have the same.

    TransformerLens makes them anew for each block, the longest part of making a large model.
    """
    make = AbstractAttention.calculate_sin_cos_rotary
    made: dict[Any, tuple[Tensor, Tensor]] = {}

    def made_once(attn: Any, *sizes: Any, **how: Any) -> tuple[Tensor, Tensor]:
        key = (attn.attn_type, sizes, *how.items())
        if key not in made:
            made[key] = make(attn, *sizes, **how)
        sin, cos = made[key]
        return sin.clone(), cos.clone()

    AbstractAttention.calculate_sin_cos_rotary = made_once
    try:
        yield
    finally:
        AbstractAttention.calculate_sin_cos_rotary = make


def hooked_config(
    hf_config: Any, architecture: str, *, dtype: torch.dtype, device: str, n_devices: int = 1
) -> HookedTransformerConfig:
    """The configuration that a Hugging Face configuration means in TransformerLens."""
    with explained(CANNOT.format(architecture), USUAL):
        fields = find_architecture(architecture).config(hf_config)
    if fields["act_fn"] not in SUPPORTED_ACTIVATIONS:
        raise UserError(
            f"The activation function {fields['act_fn']!r} of this checkpoint is unknown to "
            f"TransformerLens; allowed are {', '.join(SUPPORTED_ACTIVATIONS)}."
        )
    return HookedTransformerConfig(
        **fields,
        original_architecture=architecture,
        dtype=dtype,
        device=device,
        n_devices=n_devices,
        init_weights=False,
        default_prepend_bos=False,  # prompts are tokenized before they get here
    )


def hooked_skeleton(cfg: HookedTransformerConfig) -> HookedTransformer:
    """A model without memory for its weights."""
    with torch.device("meta"):
        model = HookedTransformer(cfg, move_to_device=False)
    for parameter in model.parameters():  # some are made in float32, and later filled in this type
        parameter.data = _as_type(parameter.data, cfg.dtype)
    return model


def _as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _untied(weights: StateDict) -> StateDict:
    """Give tensors that share memory their own, so that editing one does not change another."""
    seen: set[int] = set()
    for name, tensor in weights.items():
        weights[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return weights


def _assign(model: HookedTransformer, weights: StateDict) -> None:
    """Make the converted tensors the parameters of a model that has no memory yet."""
    known = model.state_dict().keys()
    surplus = [name for name, tensor in weights.items() if name not in known and tensor.any()]
    model.load_state_dict(
        {name: tensor for name, tensor in weights.items() if name in known},
        strict=False,
        assign=True,
    )
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    lost = [name for name in empty if not _is_bias(name)]
    if surplus or lost:
        raise UserError(
            f"TransformerLens' conversion leaves out {lost or 'nothing'} and leaves over "
            f"{surplus or 'nothing'} of this checkpoint; use one of the usual form."
        )
    for name in empty:  # a bias that the conversion does not mention is none: it is 0
        path, _, leaf = name.rpartition(".")
        zero = torch.zeros_like(model.get_parameter(name), device="cpu")
        setattr(model.get_submodule(path), leaf, torch.nn.Parameter(zero))


def _is_bias(name: str) -> bool:
    leaf = name.rpartition(".")[2].lstrip("_")
    return leaf == "b" or leaf.startswith("b_")


def _place(model: HookedTransformer, placement: Placement) -> None:
    """Put each block where it belongs, and see to it that its input gets there."""
    model.cfg.device = str(placement.entry)
    for block, device in zip(model.blocks, placement.layers, strict=True):
        block.to(device)
        if len(placement.devices) > 1:
            bring_inputs(block)
    for name in AT_THE_EXIT:
        getattr(model, name).to(placement.exit)
    for name in ("embed", "pos_embed"):
        if hasattr(model, name):
            getattr(model, name).to(placement.entry)


def give_tokenizer(model: HookedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model a copy of the tokenizer, for its own methods such as ``to_tokens``.

    A copy, because TransformerLens changes the padding side of the one it holds.
    """
    own = copy.deepcopy(tokenizer)
    own.padding_side = "right"
    if own.pad_token is None:
        own.pad_token = own.eos_token
    model.tokenizer = own
    model.cfg.tokenizer_prepends_bos = len(own.encode("")) > 0
