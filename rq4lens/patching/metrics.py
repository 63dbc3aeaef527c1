"""Metrics of an answer: what is measured of patched logits beside their divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rq4lens.config import MetricName, Patching
from rq4lens.errors import UserError
from rq4lens.models.prompts.record import Prompt

Tokens = tuple[int, ...]
Patched = Float[Tensor, "row token vocab"]
Clean = Float[Tensor, "token vocab"]

Values = Callable[[Patched, Clean, Tokens, Tokens], Float[Tensor, "row"]]
"""From the patched logits ``[row token vocab]`` of one prompt, the clean ones of the same model
``[token vocab]``, the tokens of its answer and those of its foil: a number a row. ``token`` runs
over the compared tokens of the answer, each at the place before it: the first is the decision
token."""

OWN_METRIC = "own:"
"""What the names of metrics start with that are functions of Python."""


@dataclass(frozen=True)
class Metric:
    """A number that is measured of each patch on each prompt, beside the divergence.

    >>> import rq4lens as rq
    >>> def margin(logits, clean_logits, answer, foil):
    ...     return logits[:, 0, answer[0]] - logits[:, 0].mean(-1)
    >>> rq.Metric("margin", margin)
    <Metric margin>

    Args:
        name: its name.
        function: from the patched logits ``[row token vocab]`` of one prompt, the clean logits
            ``[token vocab]`` of the same model, the prompt's answer and its foil as tuples of token
            ids, to a number for each row. ``token`` runs over the compared tokens of the answer; at
            0 is the decision token. An answer that a prompt does not give is the tuned model's own
            most likely one; a foil that it does not give is ``()``.
        needs: what each prompt must have: ``"answer"``, ``"foil"``, or both, which then must start
            with different tokens.
    """

    name: str
    function: Values
    needs: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Metric {self.name}>"

    @property
    def label(self) -> str:
        """What settings call it."""
        return self.name if METRICS.get(self.name) is self else f"{OWN_METRIC}{self.name}"


def answer_logprob(logits: Patched, clean: Clean, answer: Tokens, foil: Tokens) -> Tensor:  # noqa: ARG001
    """Log-probability of the answer: the sum over its compared tokens."""
    log_probs = logits.log_softmax(-1, dtype=more_precise(logits.dtype))
    n_tokens = logits.shape[1]
    return log_probs[:, torch.arange(n_tokens), list(answer[:n_tokens])].sum(-1)


def logit_difference(logits: Patched, clean: Clean, answer: Tokens, foil: Tokens) -> Tensor:  # noqa: ARG001
    """Logit of the answer's first token less that of the foil's, at the decision token."""
    both = logits[:, 0, [answer[0], foil[0]]].to(more_precise(logits.dtype))
    return both[:, 0] - both[:, 1]


def accuracy(logits: Patched, clean: Clean, answer: Tokens, foil: Tokens) -> Tensor:
    """Whether the answer's first token lies above the foil's: 1 or 0."""
    return (logit_difference(logits, clean, answer, foil) > 0).double()


def more_precise(dtype: torch.dtype) -> torch.dtype:
    """One precision above another."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64


METRICS: dict[str, Metric] = {
    "answer_logprob": Metric("answer_logprob", answer_logprob),
    "logit_difference": Metric("logit_difference", logit_difference, needs=("answer", "foil")),
    "accuracy": Metric("accuracy", accuracy, needs=("answer", "foil")),
}
"""The metrics beside ``kl`` by name."""


def metric_named(name: str) -> Metric | None:
    """The metric of a setting; None for the divergence alone."""
    if name == "kl":
        return None
    if name not in METRICS:
        raise UserError(
            f"metric {name!r} is a function of Python, which no setting holds: give it as "
            "rq.run_grid(..., metric=rq.Metric(...)), or choose one of "
            f"{', '.join(get_args(MetricName))}."
        )
    return METRICS[name]


def metric_of(settings: Patching, given: Metric | str | None) -> tuple[Patching, Metric | None]:
    """Settings that name a metric, and the metric: one that is given comes before theirs."""
    if given is not None:
        settings = settings.but(metric=given if isinstance(given, str) else given.label)
    return settings, given if isinstance(given, Metric) else metric_named(settings.metric)


def require_needs(metric: Metric, prompts: Iterable[Prompt]) -> None:
    """Refuse prompts that lack what a metric needs."""
    for what in metric.needs:
        lacking = [each.id for each in prompts if not getattr(each, what)]
        if lacking:
            n = len(lacking) - 1
            who = f"prompts {lacking[0]!r} and {n} more have" if n else f"prompt {lacking[0]!r} has"
            raise UserError(
                f"metric {metric.name!r} needs the {what} of each prompt, and {who} none: give it "
                f"as {what!r}, or choose another metric, answer_logprob or kl (--metric)."
            )


@dataclass(frozen=True)
class Asked:
    """A metric, and the answers and foils that it is asked of, in tokens of the patched model."""

    metric: Metric
    answers: tuple[Tokens, ...]
    foils: tuple[Tokens, ...]

    @classmethod
    def of(
        cls, metric: Metric, ids: Sequence[str], answers: Sequence[Tokens], foils: Sequence[Tokens]
    ) -> Asked:
        """What a metric asks of some prompts, which have what it needs."""
        if len(metric.needs) > 1:
            _refuse_same_start(metric, ids, answers, foils)
        return cls(metric, tuple(answers), tuple(foils))

    def answered(self, tokens: Sequence[int]) -> Asked:
        """The same with a token as the answer of each prompt that has none."""
        both = zip(self.answers, tokens, strict=True)
        return replace(self, answers=tuple(own or (token,) for own, token in both))

    def of_prompts(self, prompts: Any) -> Asked:
        """The same of some of the prompts."""
        every = range(len(self.answers))
        rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
        chosen = every[rows] if isinstance(rows, slice) else rows
        return Asked(
            self.metric,
            tuple(self.answers[row] for row in chosen),
            tuple(self.foils[row] for row in chosen),
        )

    def values(
        self,
        patched: Float[Tensor, "token row vocab"],
        clean: Float[Tensor, "token 1 vocab"],
        there: Bool[Tensor, "prompt answer"] | None = None,
    ) -> Float[Tensor, "prompt row"]:
        """The metric of each row, from logits at the compared tokens, prompt by prompt.

        ``there`` says which of these each answer has; without it, each is one token.
        """
        n_prompts, found = len(self.answers), []
        of_patched, of_clean = (
            each.unflatten(0, (n_prompts, -1)).transpose(1, 2) for each in (patched, clean)
        )
        for prompt, (answer, foil) in enumerate(zip(self.answers, self.foils, strict=True)):
            n = 1 if there is None else int(there[prompt].sum())
            logits, before = of_patched[prompt, :, -n:], of_clean[prompt, 0, -n:]
            values = torch.as_tensor(self.metric.function(logits, before, answer, foil))
            if values.shape != logits.shape[:1]:
                raise UserError(
                    f"metric {self.metric.name!r} gives values of shape {tuple(values.shape)} for "
                    f"logits of shape {tuple(logits.shape)} [row token vocab]: return one number a "
                    "row."
                )
            found.append(values.to(logits.device, torch.float64))
        return torch.stack(found)


def _refuse_same_start(
    metric: Metric, ids: Sequence[str], answers: Sequence[Tokens], foils: Sequence[Tokens]
) -> None:
    for name, answer, foil in zip(ids, answers, foils, strict=True):
        if answer[0] == foil[0]:
            raise UserError(
                f"metric {metric.name!r} compares the first tokens of answer and foil, which are "
                f"the same (token {answer[0]}) of prompt {name!r}: give two that start with "
                "different tokens; `rq4lens audit` shows them."
            )
