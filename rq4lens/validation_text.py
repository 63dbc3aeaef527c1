"""The validation of a configuration's base model, from its settings to a printed table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rq4lens.analysis.ranking import METHODS
from rq4lens.config import RunConfig
from rq4lens.files import write_json_atomic
from rq4lens.models.catalog import reading_of
from rq4lens.study import Stage, silent
from rq4lens.validate import SCENARIOS, FalseAlarms, Recovery, Validation, base_of, validate

VERDICTS = ("idle", "re-coordinated", "rewired", "undecided")


def validate_config(
    config: RunConfig,
    method: str = "ALL",
    layer: int | None = None,
    pairs: int = 4,
    drift: float = 0.02,
    out: Path | None = None,
    *,
    stage: Stage = silent,
) -> str:
    """Validate ranking methods on the base model that a configuration names.

    Args:
        config: names the base model, the prompts and alpha.
        method: ranking methods, separated by commas, or ``"ALL"``.
        layer: the layer to plant in; None draws one per pair.
        pairs: planted pairs per scenario.
        drift: how far every weight moves, relative to its matrix.
        out: where to write the result as JSON, if anywhere.
        stage: opens a stage of the work, for progress bars.

    Returns:
        The result as text.

    Raises:
        UserError: if a method does not exist, or the model cannot be loaded or planted in.
    """
    methods = tuple(METHODS) if method.upper() == "ALL" else tuple(method.split(","))
    with stage("load", None):
        base, prompts = base_of(config)
    with stage("validate", pairs * len(SCENARIOS)) as advance:
        validation = validate(
            base,
            prompts,
            methods=methods,
            layers=None if layer is None else [layer],
            alpha=config.alpha,
            pairs=pairs,
            drift=drift,
            seed=config.seed,
            reading=reading_of(config),
            advance=advance,
        )
    if out is not None:
        write_json_atomic(out, validation.to_dict())
    return validation_text(validation)


def validation_text(validation: Validation) -> str:
    """The result as Markdown tables, which a terminal shows as well.

    Args:
        validation: the result.
    """
    parts = [
        _setting(validation),
        "\n".join(_recovery_table(validation.recoveries)),
        "\n".join(_kinds_table(validation)),
        _alarms(validation.false_alarms),
    ]
    return "\n\n".join(parts) + "\n"


def _setting(validation: Validation) -> str:
    values = validation.settings
    return (
        f"{values['base']}: {values['pairs']} planted pairs per scenario, drift "
        f"{values['drift']:g}, strength {values['strength']:g}, alpha {values['alpha']:g}, "
        f"{values['train_prompts']} train and {values['val_prompts']} val prompts, seed "
        f"{values['seed']}.\n"
        "Average precision of the planted heads, mean (worst); 1.00 means that they come first."
    )


def _recovery_table(recoveries: tuple[Recovery, ...]) -> Iterator[str]:
    scenarios = list(dict.fromkeys(each.scenario for each in recoveries))
    methods = list(dict.fromkeys(each.method for each in recoveries))
    cells = {(each.method, each.scenario): _precision(each) for each in recoveries}
    yield _row("method", *scenarios)
    yield _row(*["---"] * (1 + len(scenarios)))
    for method in methods:
        yield _row(method, *(cells[method, scenario] for scenario in scenarios))


def _precision(recovery: Recovery) -> str:
    values = recovery.average_precision
    return f"{sum(values) / len(values):.2f} ({min(values):.2f})"


def _kinds_table(validation: Validation) -> Iterator[str]:
    yield _row("scenario", "truth", *(f"called {verdict}" for verdict in VERDICTS))
    yield _row(*["---"] * (2 + len(VERDICTS)))
    for scenario, truth in dict.fromkeys(key[:2] for key in sorted(validation.kinds)):
        counts = [validation.kinds.get((scenario, truth, verdict), 0) for verdict in VERDICTS]
        yield _row(scenario, truth, *map(str, counts))


def _alarms(alarms: FalseAlarms) -> str:
    low, high = (100 * end for end in alarms.ci95)
    return (
        f"False alarms: some head significant in {alarms.n_alarms} of {alarms.n_nulls} experiments "
        f"where two equally wrong maps were compared, {100 * alarms.rate:.1f}% "
        f"[{low:.1f}, {high:.1f}]; promised {100 * alarms.level:g}%."
    )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
