"""The word-level tokenizer of the pairs in the box."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def build_tokenizer(token_of: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that puts ``<bos>`` first, once, and decodes to readable text."""
    tokenizer = Tokenizer(models.WordLevel(dict(token_of), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # also parts "Lumeria." in two
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", token_of["<bos>"])]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # spaces between words, none before "."
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
