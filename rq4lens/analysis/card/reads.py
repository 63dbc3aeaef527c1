"""What heads attend to: attention by role and by token text, and how far two patterns are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from numpy import ndarray
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from rq4lens.analysis.card.records import Attended, Role, TextShare
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate

N_TEXTS = 12
"""Token texts that a card names."""

OTHER_TOKENS = "the models read some prompts as other tokens, so no position stands for another"

NO_TOKEN = "no token (attention sink)"


@dataclass(frozen=True)
class HeadReader:
    """The prompts as one model reads them, padded, and the attention of some heads over them."""

    texts: tuple[tuple[str, ...], ...]
    pattern: Float64[ndarray, "head prompt pos"]
    roles: Mapping[str, Float64[ndarray, "head prompt"]]

    @classmethod
    def of(
        cls,
        token_ids: Sequence[Sequence[int]],
        text_of: Mapping[int, str],
        pattern: Float[Tensor, "prompt head pos"],
        *,
        has_sinks: bool,
    ) -> HeadReader:
        """Attention from the last token of each prompt; a sink takes what no token gets."""
        share = pattern.double().transpose(0, 1).numpy()
        texts = tuple(tuple(text_of[each] for each in tokens) for tokens in token_ids)
        roles = {
            name: (share * mask).sum(-1)
            for name, mask in _role_masks(token_ids, share.shape[-1]).items()
        }
        if has_sinks:
            roles[NO_TOKEN] = 1 - share.sum(-1)
        return cls(texts, share, roles)

    def attended(self, head: int, prompt: int) -> Attended:
        """The tokens of a prompt and one head's attention to them."""
        tokens = self.texts[prompt]
        share = self.pattern[head, prompt, : len(tokens)]
        return Attended(tokens, tuple(float(f"{each:.3g}") for each in share))

    def by_text(self, head: int) -> dict[str, float]:
        """Mean share of one head's attention that goes to each token text."""
        found: dict[str, float] = {}
        for tokens, share in zip(self.texts, self.pattern[head].tolist(), strict=True):
            for text, each in zip(tokens, share, strict=False):
                found[text] = found.get(text, 0.0) + each / len(self.texts)
        return found


def _role_masks(
    token_ids: Sequence[Sequence[int]], n_pos: int
) -> dict[str, Bool[ndarray, "prompt pos"]]:
    padded: Int[ndarray, "prompt pos"] = np.full((len(token_ids), n_pos), -1)
    for row, tokens in enumerate(token_ids):
        padded[row, : len(tokens)] = tokens
    last = np.array([[len(tokens) - 1] for tokens in token_ids])
    at = np.arange(n_pos)[None]
    same = (padded == np.take_along_axis(padded, last, axis=1)) & (at < last)
    behind = np.zeros_like(same)
    behind[:, 1:] = same[:, :-1] & (at[:, 1:] < last)
    return {
        "first token": np.broadcast_to(at == 0, same.shape),
        "itself": at == last,
        "previous position": at == last - 1,
        "same token earlier": same,
        "behind the same token": behind,
    }


def roles_of(base: HeadReader, tuned: HeadReader, bootstrap: Bootstrap) -> list[tuple[Role, ...]]:
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


def text_shares(base: HeadReader, tuned: HeadReader, head: int) -> tuple[TextShare, ...]:
    """Attention by token text in both models, most changed first."""
    of_base, of_tuned = base.by_text(head), tuned.by_text(head)
    holding: dict[str, int] = {}
    for one, other in zip(base.texts, tuned.texts, strict=True):
        for text in {*one, *other}:
            holding[text] = holding.get(text, 0) + 1
    shares = [
        TextShare(text, n, 100 * of_base.get(text, 0.0), 100 * of_tuned.get(text, 0.0))
        for text, n in holding.items()
    ]
    return tuple(sorted(shares, key=lambda each: -abs(each.change_pct))[:N_TEXTS])


def distances(base: HeadReader, tuned: HeadReader, bootstrap: Bootstrap) -> list[Estimate]:
    """Mean Jensen-Shannon distance, from 0 to 1, between both patterns of each head."""
    apart = jensenshannon(base.pattern, tuned.pattern, base=2, axis=-1)
    # Rounding can push the divergence of patterns that are nearly equal below 0.
    return bootstrap.estimate(np.nan_to_num(apart))
