"""The audit of a pair: whether both models read the prompts alike, and what the pair is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray

from rq4lens.analysis.card.swaps import divergence
from rq4lens.analysis.effects.apart import PairFacts
from rq4lens.analysis.effects.table import MOST_LEFT_OUT_PCT
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate, undefined
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.config import RunConfig
from rq4lens.errors import UserError
from rq4lens.jobs.progress import Stage, silent
from rq4lens.models.catalog import audit_of, checkpoints_of, pair_from, size_of
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.models.prompts.audit import Audit
from rq4lens.models.weights import WeightChange, changes_in_files, together
from rq4lens.patching.activations import PairActivations

Compare = Literal["auto", "none", "weights", "models"]

CHEAP_BYTES = 2e9
"""Models in folders that take less than this together are loaded unasked."""

ADAPTER = "an adapter holds no whole matrices; --compare models merges it"

Apart = tuple[Estimate, Estimate, Estimate]
"""The gap from base, the gap from tuned, and on how many prompts in percent answers differ."""


class PairAudit(NamedTuple):
    """Both findings; ``facts`` is None where the models were not compared, and why."""

    audit: Audit
    facts: PairFacts | None
    why_not: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of ``audit.json``."""
        pair = None if self.facts is None else to_json(self.facts)
        reason = {} if self.why_not is None else {"pair_reason": self.why_not}
        return {**self.audit.to_dict(), "pair": pair, **reason}


def audit_pair(config: RunConfig, compare: Compare = "auto", *, stage: Stage = silent) -> PairAudit:
    """Audit the prompts of a pair, and say how far apart its models are.

    To compare ``"models"`` loads both; ``"weights"`` reads their files, matrix by matrix;
    ``"auto"`` loads small models from folders and leaves others alone.
    """
    audit = audit_of(config.pair, config.reading, config.place)
    if compare == "none":
        return PairAudit(audit, None, "the models were not to be compared")
    try:
        if compare == "auto" and (why := _is_costly(config)):
            return PairAudit(audit, None, why)
        with stage("models", None):
            if compare == "weights":
                return PairAudit(audit, _of_files(config, audit))
            pair = pair_from(config.pair, config.reading, config.place)
            return PairAudit(audit, facts_of(pair, _gap(pair, config), audit))
    except UserError as problem:
        if compare != "auto":
            raise
        return PairAudit(audit, None, str(problem))


def _is_costly(config: RunConfig) -> str | None:
    """Why the models are not loaded unasked."""
    found = checkpoints_of(config.pair, with_weights=False).values()
    needed = sum(size_of(config.pair, side, config.place).weights.total for side in SIDES)
    if needed <= CHEAP_BYTES and all(each.revision is None for each in found):
        return None
    return (
        f"not compared, for the models take {needed / 1e9:.3g} GB: --compare weights reads their "
        "files, --compare models loads them"
    )


def _of_files(config: RunConfig, audit: Audit) -> PairFacts:
    found = checkpoints_of(config.pair)
    reasons: dict[str, str] = {}
    changes: Sequence[WeightChange] = ()
    if any(each.is_adapter for each in found.values()):
        reasons = dict.fromkeys(("relative_weight_change", "weight_cosine"), ADAPTER)
    else:
        changes = changes_in_files(found["base"], found["tuned"])
    pair = pair_from(config.pair, config.reading, config.place.but(keep_both=False))
    return facts_of(pair, _no_gap("only the weights were compared"), audit, changes, reasons)


def facts_of(
    pair: ModelPair,
    gap: Apart,
    audit: Audit,
    changes: Sequence[WeightChange] | None = None,
    reasons: Mapping[str, str] | None = None,
) -> PairFacts:
    """What a pair is: from the gap both ways, the share of other answers, what both models read."""
    changes = pair.weight_changes if changes is None else changes
    whole = together(changes)
    return PairFacts(
        *gap,
        n_prompts=len(audit.prompts),
        n_same_tokens=audit.n_same_tokens,
        n_cut=max(map(audit.n_cut, SIDES)),
        same_tokenizer=pair.same_tokenizer,
        relative_weight_change=whole and whole.relative_change,
        weight_cosine=whole and whole.cosine,
        weights=tuple(each.to_dict() for each in changes),
        reasons=reasons or {},
    )


def _gap(pair: ModelPair, config: RunConfig) -> Apart:
    """The gap both ways, and how often the most likely next tokens differ."""
    split, effort = config.patching.split, config.effort
    groups = pair.prompts.split(split).groups
    activations = PairActivations(pair, batch_size=config.place.prompts_per_pass)
    for side in SIDES:
        activations.capture(side, split, [0], to_the_end=True)
    found = {side: activations.log_probs(side, split).double() for side in SIDES}
    prompts = activations.read("tuned", split)
    for side, every in found.items():
        ids = pair.shared_tokens[side]
        if ids is not None:
            inside = every[..., ids].logsumexp(-1, keepdim=True)
            if float(100 * (1 - inside[prompts.is_compared].exp()).mean()) > MOST_LEFT_OUT_PCT:
                why = f"more than {MOST_LEFT_OUT_PCT:g}% of {side}'s probability lies on tokens"
                return _no_gap(f"{why} that the other model lacks")
            found[side] = every[..., ids] - inside
    base, tuned = found.values()
    first = torch.arange(len(prompts)), prompts.is_compared.int().argmax(-1)
    differ = (base.argmax(-1) != tuned.argmax(-1))[first].double().numpy()
    there, back = divergence(base, tuned).sum(1), divergence(tuned, base).sum(1)
    values: Float64[ndarray, "quantity prompt"] = np.stack([there, back, 100 * differ])
    to_base, to_tuned, other = Bootstrap(groups, effort.resamples, effort.seed).estimate(values)
    return to_base, to_tuned, other


def _no_gap(why: str) -> Apart:
    nothing = undefined(why)
    return nothing, nothing, nothing
