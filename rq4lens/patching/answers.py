"""Answers of several tokens: those that the prompts give, else what the tuned model says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from rq4lens.errors import UserError
from rq4lens.models.load.lens import HookedModel
from rq4lens.models.pair import SIDES, ModelPair, Side
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.passes import forward_batch

Answer = tuple[int, ...]


def answers_of(pair: ModelPair, split: str, batch_size: int = 32) -> list[Answer]:
    """The answer to each prompt of a split, in tokens of the tuned model.

    It is the prompt's own, else the tuned model's most likely next tokens, one after the other; as
    many as are compared, or up to the end of the text.
    """
    n_tokens, read = pair.reading.answer_tokens, pair.tokens("tuned", split).decided()
    given = read.answers or [()] * len(read)
    answers = [answer[:n_tokens] for answer in given]
    open_ones = [row for row, answer in enumerate(answers) if not answer]
    if open_ones:
        end = pair.tuned.tokenizer.eos_token_id
        said = greedy(pair.use("tuned").model, read.some(open_ones), n_tokens, batch_size)
        for row, tokens in zip(open_ones, said.tolist(), strict=True):
            answers[row] = tuple(tokens[: tokens.index(end) + 1] if end in tokens else tokens)
    return answers


@torch.no_grad()
def greedy(
    model: HookedModel, prompts: TokenizedPrompts, n_tokens: int, batch_size: int
) -> Int[Tensor, "prompt token"]:
    """The model's most likely next tokens, one after the other."""
    said = torch.empty(len(prompts), n_tokens, dtype=torch.long)
    grown = prompts
    for place in range(n_tokens):
        for batch in grown.batches(batch_size):
            logits = forward_batch(model, batch)
            last = logits[torch.arange(len(logits)), batch.lengths - 1]
            said[batch.rows, place] = last.argmax(-1).cpu()
        new = said[:, : place + 1].tolist()
        both = zip(prompts.token_ids, new, strict=True)
        grown = TokenizedPrompts(prompts.ids, tuple((*read, *tokens) for read, tokens in both))
    return said


def in_tokens_of(
    pair: ModelPair, side: Side, split: str, answers: Sequence[Answer]
) -> Sequence[Answer]:
    """Answers to the prompts of a split in tokens of the tuned model, in those of a model.

    Raises:
        UserError: if the base model lacks a token.
    """
    of_base, of_tuned = (pair.shared_tokens[each] for each in SIDES)
    if side == "tuned" or of_tuned is None or of_base is None:
        return answers
    base = dict(zip(of_tuned.tolist(), of_base.tolist(), strict=True))
    for name, answer in zip(pair.prompts.split(split).ids, answers, strict=True):
        missing = [token for token in answer if token not in base]
        if missing:
            text = pair.tuned.tokenizer.decode(missing[:1])
            raise UserError(
                f"the answer to prompt {name!r} has the token {text!r}, which the base model "
                "lacks: give an answer that both models can say, or compare one token with "
                "--answer-tokens 1."
            )
    return [tuple(base[token] for token in answer) for answer in answers]
