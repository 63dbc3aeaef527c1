"""Load a Hugging Face folder or hub id, with untouched weights, as a model that can be patched.

``HookedTransformer.from_pretrained`` refuses every name that is not on its list, so the parts are
put together here: the configuration from the folder, the weights from the Hugging Face model
through TransformerLens' own conversions, the tokenizer from the folder. A ``TransformerBridge``
runs the Hugging Face model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rq4lens.config import Place
from rq4lens.disk.files import short_reason
from rq4lens.disk.store import content_key
from rq4lens.errors import UserError
from rq4lens.models.load.adapters import base_of, merged, with_adapter
from rq4lens.models.load.checkpoint import Checkpoint, explained, locate
from rq4lens.models.load.conversion import give_tokenizer, hooked_from
from rq4lens.models.load.devices import Placement, chosen_devices
from rq4lens.models.load.fingerprint import files_digest, weights_fingerprint
from rq4lens.models.load.huggingface import (
    device_map_of,
    load_hugging_face,
    load_tokenizer,
    read_ahead,
    require_finite,
    skeleton_of,
)
from rq4lens.models.load.lens import HookedModel, bridge_from, chosen_backend
from rq4lens.models.load.size import estimate_memory, model_size


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for patching, and where it came from.

    Attributes:
        model: The model; its weights are those of the checkpoint, never processed.
        tokenizer: The checkpoint's own tokenizer, unchanged.
        source: Folder or hub id, or ``"in memory"``.
        revision: The exact commit of a hub id; None for a folder.
        dtype: Type of the weights.
        trust_remote_code: Whether code from the checkpoint was allowed to run.
        architecture: Name in ``config.json``, as ``LlamaForCausalLM``.
        adapter_base: Where the base model of a merged adapter came from; None without adapter.
        files: The fingerprint of the files that were loaded, ready soon; None for a model that
            came as an object.
        logit_check_max_abs_diff: Largest logit difference to the Hugging Face model on
            ``CHECK_TEXTS``, with an adapter not merged; None when the check was not made.
    """

    model: HookedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    dtype: torch.dtype
    architecture: str
    source: str = "in memory"
    revision: str | None = None
    trust_remote_code: bool = False
    logit_check_max_abs_diff: float | None = None
    adapter_base: str | None = None
    files: Future[str] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE3 of what the weights are; independent of the path.

        That is the files and what was done with them, or names, shapes, types and bytes of an
        object's weights.
        """
        if self.files is None:
            return weights_fingerprint(self.model)
        # An adapter is merged where the model is, and each kind of device rounds in its own way.
        merged_on = next(self.model.parameters()).device.type if self.adapter_base else None
        made = [self.files.result(), str(self.dtype), self.trust_remote_code, merged_on]
        return content_key({"made_from": made})

    @classmethod
    def wrap(
        cls,
        model: HookedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        source: str = "in memory",
    ) -> LoadedModel:
        """Accept a model that is already loaded.

        Args:
            model: A ``HookedTransformer`` from ``from_pretrained_no_processing``, or a
                ``TransformerBridge`` as it was booted.
            tokenizer: Its tokenizer.
            source: A name for it in results.

        Returns:
            The model itself, not a copy.

        Raises:
            UserError: Its weights were processed on load.
        """
        cfg = model.cfg
        named = getattr(cfg, "original_architecture", None)
        folded = named is not None and str(cfg.normalization_type).endswith("Pre")
        if folded or getattr(model, "_weights_processed", False):
            raise UserError(
                "The weights of this model were processed on load, which changes z; load it with "
                "rq4lens.load_hooked or HookedTransformer.from_pretrained_no_processing, or use a "
                "TransformerBridge as it was booted."
            )
        architecture = named or getattr(cfg, "architecture", None) or "custom"
        return cls(model, tokenizer, cfg.dtype, architecture, source)


def load_hooked(
    source: str | Path,
    *,
    revision: str | None = None,
    place: Place | None = None,
    trust_remote_code: bool = False,
    check_logits: bool = True,
) -> LoadedModel:
    """Load a checkpoint without processing its weights.

    >>> from importlib.resources import files
    >>> base = files("rq4lens.models") / "builtin/etiquette/base"
    >>> rq.load_hooked(str(base)).model.cfg.n_heads
    16

    Args:
        source: A Hugging Face folder, a hub id, or either of these with a PEFT adapter.
        revision: Commit, branch or tag of a hub id.
        place: Device or devices of the model, and its number format; when left out, the CPU and
            float32. ``n_devices`` spreads the layers evenly over GPUs, in order; ``device_map`` is
            ``"auto"`` for all GPUs, each by what is free on it, or GPUs by name, as
            ``"cuda:0,cuda:2"``. ``backend`` is ``"hooked"`` for a ``HookedTransformer``,
            ``"bridge"`` for a ``TransformerBridge``; left out, the first where TransformerLens
            has it.
        trust_remote_code: Allow code that the checkpoint brings along to run.
        check_logits: Compare with the Hugging Face model on two prompts.

    Returns:
        The model with its tokenizer and provenance.

    Raises:
        UserError: The checkpoint cannot be loaded, or its logits differ from Hugging Face.
    """
    place = place or Place(device="cpu")
    devices = chosen_devices(place)
    dtype = getattr(torch, place.dtype)
    asked = locate(source, revision, trust_remote_code=trust_remote_code)
    weights = base_of(asked) if asked.is_adapter else asked
    backend = chosen_backend(place.backend)
    size = model_size(asked, dtype, backend)
    estimate = estimate_memory(size, devices)
    estimate.require_fit()
    used = estimate.placement.devices
    if backend == "bridge" and len(used) > 1:
        raise UserError(
            f"backend 'bridge' cannot be spread over {', '.join(map(str, used))}; load it on one "
            "device, or use backend 'hooked'."
        )
    tokenizer = load_own_tokenizer(asked)
    tensors = read_ahead(weights, estimate.placement.entry, dtype) if len(used) == 1 else None
    files = files_digest(asked)
    places = _hugging_face_places(weights, estimate.placement, merged=asked.is_adapter)
    hf_model = load_hugging_face(weights, dtype=dtype, device_map=places, tensors=tensors)
    del tensors
    if asked.is_adapter:
        hf_model = with_adapter(hf_model, asked)
    tokens = check_tokens(tokenizer, hf_model.config)
    expected = hugging_face_logits(hf_model, tokens) if check_logits else None
    if asked.is_adapter:
        hf_model = merged(hf_model, asked)
    require_finite(hf_model, asked.source)
    if backend == "bridge":
        model = bridge_from(hf_model, size.architecture, tokens[0])
    else:
        model = hooked_from(hf_model, size.architecture, dtype=dtype, placement=estimate.placement)
    del hf_model
    give_tokenizer(model, tokenizer)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        source=asked.source,
        revision=asked.revision,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        architecture=size.architecture,
        logit_check_max_abs_diff=(
            require_same_logits(model, tokens, expected, asked.source) if expected else None
        ),
        adapter_base=weights.source if asked.is_adapter else None,
        files=files,
    )


def load_own_tokenizer(asked: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; an adapter without one reads as its base does."""
    return load_tokenizer(base_of(asked) if asked.is_adapter and not asked.has_tokenizer else asked)


def _hugging_face_places(
    weights: Checkpoint, placement: Placement, *, merged: bool
) -> dict[str, str] | None:
    """Where Hugging Face reads the weights to; None for the CPU."""
    if len(placement.devices) == 1:
        return {"": str(placement.entry)}
    if merged:
        return None  # PEFT merges on one device; the merged blocks then move one by one
    return device_map_of(skeleton_of(weights), placement)


# The check at load time: a converted model must say what its Hugging Face original says.

CHECK_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1999 a small library opened at the edge of the town, between the river and the old mill. "
    "Its first reader was a child of 7 who asked for a book about stars; the last one, on a rainy "
    "evening 20 years later, was the same person, who brought it back. Nobody had missed it: "
    "the shelf held 3 + 4 = 7 copies, all of them alike. What is the use of a number, she said, "
    "if one may keep what one likes? The librarian smiled, wrote a line into the great ledger,",
)
"""A short and a longer prompt: errors of position grow with the length."""

TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest allowed difference, as a share of the largest logit (of 1 if that is smaller).

Hugging Face computes norms and rotary angles in float32 whatever the type of the weights, so
float64 is held to the same share as float32.
"""

Logits = Sequence[Float[Tensor, "1 _pos vocab"]]

MAX_CHECK_TOKENS = 256


def check_tokens(tokenizer: PreTrainedTokenizerBase, hf_config: Any) -> list[Int[Tensor, "1 _pos"]]:
    """The check prompts as token ids, cut to what the model can read."""
    text_config = hf_config.get_text_config()
    readable = getattr(text_config, "max_position_embeddings", MAX_CHECK_TOKENS)
    n_tokens = min(readable, MAX_CHECK_TOKENS)
    where = f"The tokenizer of {tokenizer.name_or_path}"
    try:
        rows = [tokenizer(text)["input_ids"][:n_tokens] for text in CHECK_TEXTS]
    except Exception as problem:  # its settings may make it fail in any way
        raise UserError(
            f"{where} fails on a plain sentence ({short_reason(problem)}); restore its files."
        ) from problem
    ids = [token for row in rows for token in row]
    if not all(rows) or max(ids) >= text_config.vocab_size:
        raise UserError(
            f"{where} reads plain sentences as tokens up to {max(ids, default=None)}, and the "
            f"model has a vocabulary of {text_config.vocab_size}; save the model's own tokenizer "
            "with it."
        )
    return [torch.tensor([row]) for row in rows]


@torch.no_grad()
def hugging_face_logits(hf_model: Any, tokens: Sequence[Int[Tensor, "1 _pos"]]) -> Logits:
    """Logits of the Hugging Face model."""
    device = next(hf_model.get_input_embeddings().parameters()).device
    what = f"{hf_model.name_or_path} cannot read a plain sentence"
    with explained(what, "restore the config.json that belongs to the weights"):
        return [hf_model(input_ids=row.to(device), use_cache=False).logits.cpu() for row in tokens]


@torch.no_grad()
def require_same_logits(
    model: HookedModel,
    tokens: Sequence[Int[Tensor, "1 _pos"]],
    expected: Logits,
    source: str,
) -> float:
    """Compare a converted model with its original."""
    if not all(bool(row.isfinite().all()) for row in expected):
        raise UserError(
            f"{source} computes logits that are not finite on plain sentences; use weights and a "
            "config.json that belong together, or load it as float32."
        )
    got = [model(row, padding_side="right").cpu().double() for row in tokens]
    pairs = zip(got, expected, strict=True)
    by_position = torch.cat([(a - b.double()).abs().amax(-1).flatten() for a, b in pairs])
    largest = float(by_position.max())
    # Rounding may flip the choice of an expert at a few positions, never at most of them.
    judged = largest if model.cfg.dtype.itemsize > 2 else float(by_position.median())
    largest_logit = max(float(row.abs().max()) for row in expected)
    allowed = TOLERANCES[model.cfg.dtype] * max(1.0, largest_logit)
    if not judged <= allowed:  # written so that NaN is refused too
        raise UserError(
            f"{source} as a {type(model).__name__} differs from its Hugging Face model by up to "
            f"{largest:.3g} in a logit, and {allowed:.3g} is allowed; load it as float32 to "
            "tell rounding from a real mismatch, or pass check_logits=False to use it all the same."
        )
    return largest
