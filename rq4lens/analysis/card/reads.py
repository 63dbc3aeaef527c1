"""What heads attend to: attention by role and by token text, and how far two patterns are apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Int
from numpy import ndarray
from scipy.sparse import csr_array
from scipy.spatial.distance import jensenshannon

from rq4lens.analysis.card.records import Attended, Role, TextShare
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate

N_TEXTS = 12
"""Token texts that a card names."""

OTHER_TOKENS = "the models read some prompts as other tokens, so no position stands for another"

NO_TOKEN = "no token (attention sink)"


@dataclass(frozen=True)
class ReadTexts:
    """The prompts as one model reads them: token texts, and which of them have which role."""

    texts: tuple[tuple[str, ...], ...]
    roles: Mapping[str, Bool[ndarray, "prompt pos"]]
    there: Bool[ndarray, "prompt pos"]

    @classmethod
    def of(cls, token_ids: Sequence[Sequence[int]], text_of: Callable[[int], str]) -> ReadTexts:
        """Prompts whose last tokens decide, padded."""
        texts = tuple(tuple(map(text_of, tokens)) for tokens in token_ids)
        lengths = np.array([[len(tokens)] for tokens in token_ids])
        at = np.arange(lengths.max())[None]
        there = at < lengths
        padded: Int[ndarray, "prompt pos"] = np.full(there.shape, -1)
        padded[there] = [token for tokens in token_ids for token in tokens]
        last = lengths - 1
        same = (padded == np.take_along_axis(padded, last, axis=1)) & (at < last)
        behind = np.zeros_like(same)
        behind[:, 1:] = same[:, :-1] & (at[:, 1:] < last)
        roles = {
            "first token": np.broadcast_to(at == 0, same.shape),
            "itself": at == last,
            "previous position": at == last - 1,
            "same token earlier": same,
            "behind the same token": behind,
        }
        return cls(texts, roles, there)


@dataclass(frozen=True)
class PatternReader:
    """The attention of some heads from the last token of each prompt; sinks take what is left."""

    read: ReadTexts
    pattern: Float64[ndarray, "head prompt pos"]
    has_sinks: bool

    @cached_property
    def roles(self) -> dict[str, Float64[ndarray, "head prompt"]]:
        """How much of the attention goes to tokens of each role."""
        found = {name: (self.pattern * mask).sum(-1) for name, mask in self.read.roles.items()}
        return found | ({NO_TOKEN: 1 - self.pattern.sum(-1)} if self.has_sinks else {})

    def attended(self, head: int, prompt: int) -> Attended:
        """The tokens of a prompt and one head's attention to them."""
        tokens = self.read.texts[prompt]
        share = self.pattern[head, prompt, : len(tokens)].tolist()
        return Attended(tokens, tuple(float(f"{each:.3g}") for each in share))

    def by_text(self, number: Mapping[str, int]) -> Float64[ndarray, "head text"]:
        """Mean share of the attention, in percent, that goes to each of numbered token texts."""
        texts = [number[text] for tokens in self.read.texts for text in tokens]
        n_tokens, n_prompts = len(texts), len(self.read.texts)
        share = 100 / n_prompts * self.pattern[:, self.read.there]
        each = csr_array((np.ones(n_tokens), (texts, range(n_tokens))), (len(number), n_tokens))
        return np.ascontiguousarray((each @ share.T).T)


def roles_of(
    base: PatternReader, tuned: PatternReader, bootstrap: Bootstrap
) -> list[tuple[Role, ...]]:
    """Attention of each head by role in both models, most changed first."""
    names = list({**base.roles, **tuned.roles})
    n_heads, n_prompts, _ = base.pattern.shape
    nothing = np.zeros((n_heads, n_prompts))
    before, after = (
        100 * np.stack([model.roles.get(name, nothing) for name in names], axis=1)
        for model in (base, tuned)
    )
    changes = bootstrap.estimate((after - before).reshape(-1, n_prompts))
    means = zip(before.mean(-1).ravel().tolist(), after.mean(-1).ravel().tolist(), strict=True)
    roles = [
        Role(name, *both, change)
        for name, both, change in zip(names * n_heads, means, changes, strict=True)
    ]
    of_head = [roles[start : start + len(names)] for start in range(0, len(roles), len(names))]
    return [tuple(sorted(each, key=lambda r: -abs(r.tuned_pct - r.base_pct))) for each in of_head]


def text_shares(base: PatternReader, tuned: PatternReader) -> list[tuple[TextShare, ...]]:
    """Attention of each head by token text in both models, most changed first."""
    holding = [{*one, *other} for one, other in zip(base.read.texts, tuned.read.texts, strict=True)]
    n_prompts = Counter(text for texts in holding for text in texts)
    names = sorted(n_prompts)
    number = {text: at for at, text in enumerate(names)}
    of_base, of_tuned = base.by_text(number), tuned.by_text(number)
    most = np.argsort(-np.abs(of_tuned - of_base), axis=-1, kind="stable")[:, :N_TEXTS]
    return [
        tuple(
            TextShare(names[at], n_prompts[names[at]], float(before[at]), float(after[at]))
            for at in some
        )
        for some, before, after in zip(most, of_base, of_tuned, strict=True)
    ]


def distances(base: PatternReader, tuned: PatternReader, bootstrap: Bootstrap) -> list[Estimate]:
    """Mean Jensen-Shannon distance, from 0 to 1, between both patterns of each head."""
    apart = jensenshannon(base.pattern, tuned.pattern, base=2, axis=-1)
    # Rounding can push the divergence of patterns that are nearly equal below 0.
    return bootstrap.estimate(np.nan_to_num(apart))
