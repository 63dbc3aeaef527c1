"""Printed tables of a sweep over layers and of rankings by several methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rq4lens.analysis.compared import Metric
from rq4lens.analysis.controls import SIGNIFICANT
from rq4lens.analysis.records import MethodRow
from rq4lens.analysis.statistics import Estimate
from rq4lens.heads import Head
from rq4lens.results import GridSettings, HeadRanking
from rq4lens.summary import nats, setting_line

WIDTH = 100
"""Columns after which sentences are broken; tables are as wide as they are."""

UNCUT = 10_000
TOP_HEADS = 8


def sweep_text(
    settings: GridSettings, n_prompts: int, comparison: Mapping[str, Any], reasons: Sequence[str]
) -> str:
    """A sweep as plain text: a row per layer, the best heads of all layers, the proposed layers.

    Args:
        settings: how the first layer's grid was made.
        n_prompts: measured prompts.
        comparison: the layers side by side, as plain values.
        reasons: which layers are proposed, and why.
    """
    best = ", ".join(
        f"{row['head']} {nats(row['delta'])}" for row in comparison["ranking"][:TOP_HEADS]
    )
    return _text(
        [
            Text(setting_line(settings, n_prompts, where=f"{settings.n_layers} layers")),
            _layer_table(comparison),
            Text(f"heads of all layers by ΔKL (nats): {best}"),
            Text(_tests_line(comparison["tests"])),
            *(Text(reason) for reason in reasons),
        ]
    )


def _tests_line(tests: Mapping[str, Any]) -> str:
    """How many heads differ from zero, and what the p-values are corrected for."""
    if tests["n_tests"] == 0:
        return "sign-flip tests: none is possible (see layers.json for the reasons)"
    corrected = [test["p_max_t"] for test in tests["tests"] if test["p_max_t"] is not None]
    firm = sum(p_value <= SIGNIFICANT for p_value in corrected)
    return (
        f"sign-flip tests: {firm} heads differ from zero (max-T p <= {SIGNIFICANT:g}), corrected "
        f"for all {len(tests['tests'])} tests of this sweep ({tests['family']}); smallest p that "
        f"can come out: {tests['p_max_t_min']:.2g} by max-T, {tests['p_holm_min']:.2g} by Holm"
    )


def _layer_table(comparison: Mapping[str, Any]) -> Table:
    table = _table("layer", "KL_raw(ALL)", "KL_mapped", "ΔKL(ALL)", "95% CI", "area", "k90", "Gini")
    for row in comparison["rows"]:
        curve = row["curve"] or {}
        table.add_row(
            str(row["layer"]),
            _number(row["KL_raw"], ".6f"),
            _number(row["KL_mapped"], ".6f"),
            _number(row["delta"], ".6f"),
            _bounds(row["delta_ci95"], ".6f"),
            _number(curve.get("area_pct"), ".0f", "%"),
            _number(curve.get("k90"), ".0f"),
            _number(row["concentration"]["gini"], ".2f"),
        )
    table.caption = "area and k90: of the coverage curve of the layer's own ranking"
    return table


def study_text(name: str, cells: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    """A study as plain text: a row per sweep with the layers it proposes.

    Args:
        name: the study's name.
        cells: the sweeps, each with ``cell, main, control, best``, the metric and its ``_ci95``.
        metric: the metric that is shown.
    """
    table = _table("sweep", "main", "control", f"{metric.label}(ALL)", "95% CI", "best head")
    for cell in cells:
        value, bounds = cell[metric.name], cell[f"{metric.name}_ci95"]
        table.add_row(
            cell["cell"],
            *(str(cell[each]).lower() for each in ("main", "control")),
            "-" if value is None else metric.text(value),
            "-" if bounds is None else f"[{', '.join(map(metric.text, bounds))}]",
            str(cell["best"]),
        )
    return _text([Text(f"{name}: {len(cells)} sweeps"), table])


def ranking_text(
    settings: GridSettings,
    n_prompts: int,
    rankings: Sequence[HeadRanking],
    rows: Sequence[MethodRow],
    ks: Sequence[int],
) -> str:
    """Rankings as plain text; several are followed by how they agree with exact ``ΔKL``.

    Args:
        settings: how the grid was made.
        n_prompts: measured prompts.
        rankings: the rankings.
        rows: each of them beside exact single-head ``ΔKL``.
        ks: sizes at which coverage is reported.
    """
    parts: list[RenderableType] = [Text(setting_line(settings, n_prompts))]
    if len(rankings) == 1:
        parts.append(_score_table(rankings[0]))
    parts.append(_method_table(rankings, rows, ks))
    return _text(parts)


def _score_table(ranking: HeadRanking) -> Table:
    table = _table("rank", "head", ranking.method, "standard error")
    errors = ranking.standard_errors or (None,) * ranking.n_heads
    scored = zip(ranking.heads, ranking.scores, errors, strict=True)
    for rank, (head, score, error) in enumerate(scored, start=1):
        label = Head(ranking.layer, head).label
        table.add_row(str(rank), label, _number(score, ".6g"), _number(error, ".2g"))
    return table


def _method_table(
    rankings: Sequence[HeadRanking], rows: Sequence[MethodRow], ks: Sequence[int]
) -> Table:
    sizes = [f"top-{k}" for k in ks]
    table = _table("method", "Kendall", "Spearman", "RBO", *sizes, "area", "k90", "s", "best heads")
    for ranking, row in zip(rankings, rows, strict=True):
        agrees = row.agreement
        table.add_row(
            row.method,
            *(
                _estimate(getattr(agrees, name) if agrees else None, ".2f")
                for name in ("kendall", "spearman", "rbo")
            ),
            *(_estimate(row.coverage_pct.get(k), ".0f", "%") for k in ks),
            _estimate(row.area_pct, ".0f", "%"),
            _estimate(row.k90, ".0f"),
            _number(row.seconds, ".2f"),
            ",".join(map(str, ranking.top(4))),
        )
    table.caption = (
        "Kendall, Spearman and rank-biased overlap with exact single-head ΔKL (-: the ranking "
        "itself); top-k: coverage"
    )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _text(parts: Sequence[RenderableType]) -> str:
    text = StringIO()
    # In a notebook rich would display the text, or colour it, instead of writing it as it is.
    console = Console(file=text, width=UNCUT, force_jupyter=False, color_system=None)
    for part in parts:
        console.print(part, width=WIDTH if isinstance(part, Text) else None)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _estimate(estimate: Estimate | None, form: str, unit: str = "") -> str:
    return _number(None if estimate is None else estimate.value, form, unit)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _bounds(bounds: Sequence[float] | None, form: str) -> str:
    return "-" if bounds is None else f"[{bounds[0]:{form}}, {bounds[1]:{form}}]"
