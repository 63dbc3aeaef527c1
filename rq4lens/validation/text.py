"""The printed tables of a validation."""

from __future__ import annotations

from collections.abc import Iterator

from rq4lens.analysis.statistics.bootstrap import Estimate, Interval
from rq4lens.validation.results import FalseAlarms, Recovery, Validation

VERDICTS = ("idle", "re-coordinated", "rewired", "undecided")


def validation_text(validation: Validation) -> str:
    """The result as Markdown tables, which a terminal shows as well."""
    parts = [
        _setting(validation),
        "\n".join(_recovery_table(validation.recoveries, "average_precision")),
        "Area under the ROC curve: the probability that a planted head is ranked before another.",
        "\n".join(_recovery_table(validation.recoveries, "auroc")),
        "\n".join(_kinds_table(validation)),
        _alarms(validation.false_alarms),
    ]
    return "\n\n".join(parts) + "\n"


def _setting(validation: Validation) -> str:
    values = validation.settings
    return (
        f"{values['base']}: planted pairs per scenario: {values['pairs']}, drift "
        f"{values['drift']:g}, strength {values['strength']:g}, alpha {values['alpha']:g}, "
        f"{values['train_prompts']} train and {values['val_prompts']} val prompts "
        f"({values['val_prompts_of_kinds']} for the kinds of heads), seed {values['seed']}.\n"
        "Average precision of the planted heads, mean (worst); 1.00 means that they come first."
    )


def _recovery_table(recoveries: tuple[Recovery, ...], measure: str) -> Iterator[str]:
    scenarios = list(dict.fromkeys(each.scenario for each in recoveries))
    methods = list(dict.fromkeys(each.method for each in recoveries))
    cells = {
        (each.method, each.scenario): _mean_and_worst(getattr(each, measure)) for each in recoveries
    }
    yield _row("method", *scenarios)
    yield _row(*["---"] * (1 + len(scenarios)))
    for method in methods:
        yield _row(method, *(cells[method, scenario] for scenario in scenarios))


def _mean_and_worst(values: tuple[float, ...]) -> str:
    return f"{sum(values) / len(values):.2f} ({min(values):.2f})"


def _kinds_table(validation: Validation) -> Iterator[str]:
    yield _row("scenario", "truth", *(f"called {verdict}" for verdict in VERDICTS))
    yield _row(*["---"] * (2 + len(VERDICTS)))
    for scenario, truth in dict.fromkeys(key[:2] for key in sorted(validation.kinds)):
        counts = [validation.kinds.get((scenario, truth, verdict), 0) for verdict in VERDICTS]
        yield _row(scenario, truth, *map(str, counts))


def _alarms(alarms: FalseAlarms) -> str:
    low, high = (100 * end for end in alarms.ci95)
    rate = Estimate(100 * alarms.rate, Interval(low, high))
    return (
        f"False alarms: some head significant in {alarms.n_alarms} of {alarms.n_nulls} experiments "
        f"where two equal noises stood for the raw and the mapped activations, "
        f"{rate:.1f%}; promised {100 * alarms.level:g}%."
    )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
