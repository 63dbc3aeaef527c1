"""The check at load time: a converted model must say what its Hugging Face original says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rq4lens.disk.files import short_reason
from rq4lens.errors import UserError
from rq4lens.models.load.checkpoint import explained
from rq4lens.models.load.lens import HookedModel

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
