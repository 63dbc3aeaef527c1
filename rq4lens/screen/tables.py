"""What the console prints of runs, conditions, sweeps and rankings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rq4lens.analysis.records import MethodRow
from rq4lens.analysis.statistics.bootstrap import Estimate
from rq4lens.analysis.structure.controls import SIGNIFICANT
from rq4lens.analysis.structure.layers import Metric
from rq4lens.heads import Head, HeadSet
from rq4lens.results import GridSettings, HeadRanking

Record = Mapping[str, Any]
_SIZED = re.compile(r"(top|rand)(\d+)")


def print_summary(
    console: Console, settings: GridSettings, records: Sequence[Record], claims: Sequence[str] = ()
) -> None:
    """Print what a run found."""
    by_name = {record["cond"]: record for record in records}
    full = by_name["full"]
    lines: list[RenderableType] = [
        Text(setting_line(settings, full["n"]), style="dim"),
        Text(full_line(full), style="bold"),
        coverage_table(records),
        Text(control_line(full, by_name.get("ctrl_full"))),
        Text(checks_line(by_name["none"], by_name["self"]), style="dim"),
    ]
    if claims:
        lines += [Text(), Text(" ".join(claims))]
    for line in lines:
        console.print(line)


def summary_text(
    settings: GridSettings, records: Sequence[Record], claims: Sequence[str] = ()
) -> str:
    """The same as plain text, 100 columns wide."""
    text = StringIO()
    # In a notebook rich would display the text, or colour it, instead of writing it as it is.
    console = Console(file=text, width=100, force_jupyter=False, color_system=None)
    print_summary(console, settings, records, claims)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def condition_text(settings: GridSettings, record: Record) -> str:
    """One condition in a few lines of plain text."""
    coverage = _percent(record["coverage_pct"])
    reason = record.get("coverage_pct_reason")
    drop = _percent(record["drop_pct"])
    certainty = f"({reason})" if reason else _interval(record.get("coverage_pct_ci95"), _one_digit)
    return (
        f"{setting_line(settings, record['n'])}\n"
        f"heads {HeadSet.of(record['heads'], settings.n_heads)}\n"
        f"KL_raw    {_nats(record, 'KL_raw_mean')}\n"
        f"KL_mapped {_nats(record, 'KL_mapped_mean')}\n"
        f"ΔKL       {_nats(record, 'delta')}\n"
        f"drop      {drop} {_interval(record.get('drop_pct_ci95'), _one_digit)}\n"
        f"coverage  {coverage} {certainty}\n"
    )


def setting_line(settings: GridSettings, n_prompts: int, where: str | None = None) -> str:
    """Two lines that say what was measured and how."""
    where = where or f"layer {settings.layer} of {settings.n_layers}"
    patching = settings.patching
    return (
        f"{settings.pair}, {where}, "
        f"{settings.n_heads} heads, alpha {patching.alpha:g}, "
        f"{patching.split} split (n={n_prompts}),\n"
        f"map {patching.map_kind} per {patching.map_scope}, KL({patching.kl_direction}) in nats, "
        f"{settings.dtype}"
    )


def full_line(full: Record) -> str:
    """The FULL line: all heads of the main layer."""
    return f"FULL layer {full['layer']}: {_three_numbers(full)}"


def control_line(full: Record, control: Record | None) -> str:
    """The control line and how to read it."""
    if control is None:
        return "CONTROL: none was measured."
    numbers = f"CONTROL layer {control['layer']}: {_three_numbers(control)}"
    return f"{numbers}\n  {_control_reading(full, control)}"


def _three_numbers(record: Record) -> str:
    return (
        f"raw {nats(record['KL_raw_mean'])}  mapped {nats(record['KL_mapped_mean'])}  "
        f"ΔKL {_nats(record, 'delta')} nats"
    )


def _control_reading(full: Record, control: Record) -> str:
    full_ci, control_ci = full.get("delta_ci95"), control.get("delta_ci95")
    if full_ci is None or control_ci is None:
        return "too few prompts to compare it with the main layer."
    if control_ci[1] < full_ci[0]:
        share = control.get("coverage_pct")
        amount = "" if share is None else f" ({share:.1f}% of it)"
        return f"the map repairs clearly less here than at layer {full['layer']}{amount}."
    if control_ci[0] > full_ci[1]:
        return f"the map repairs MORE here than at layer {full['layer']}: it is no control."
    return f"not clearly different from layer {full['layer']}: the effect is not specific to it."


def checks_line(none: Record, self_patch: Record) -> str:
    """The two checks that must read 0."""
    return (
        f"CHECKS (must read 0): none {none['KL_raw_mean']:.2g}, "
        f"self {self_patch['KL_raw_mean']:.2g} nats"
    )


def coverage_table(records: Sequence[Record]) -> Table:
    """Condition, ΔKL, coverage and heads: the full set, then top-k and random-k sorted by k."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("condition", no_wrap=True)
    for name in ("ΔKL (nats)", "95% CI", "coverage", "95% CI"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("heads", overflow="fold")
    for record in sorted(filter(_in_table, records), key=_table_key):
        table.add_row(
            record["cond"],
            nats(record["delta"]),
            _interval(record.get("delta_ci95"), nats),
            _percent(record["coverage_pct"]),
            _interval(record.get("coverage_pct_ci95"), _one_digit),
            ",".join(map(str, record["heads"])) if record["cond"] != "full" else "ALL",
        )
    reason = next(
        (record["coverage_pct_reason"] for record in records if record.get("coverage_pct_reason")),
        None,
    )
    if reason and any(record["coverage_pct"] is None for record in records):
        table.caption = f"coverage is undefined: {reason}"
    return table


def _in_table(record: Record) -> bool:
    return record["cond"] == "full" or _SIZED.match(record["cond"]) is not None


def _table_key(record: Record) -> tuple[int, str]:
    match = _SIZED.match(record["cond"])
    # The full set last: it is the 100% the others are read against. "top" before "rand" within k.
    return (
        (10**9, "")
        if match is None
        else (int(match[2]), "0" if match[1] == "top" else record["cond"])
    )


def nats(value: float) -> str:
    """A number of nats: five decimals, or two digits where these would show nothing."""
    return f"{value:.5f}" if value == 0 or abs(value) >= 1e-4 else f"{value:.1e}"


def _nats(record: Record, name: str) -> str:
    return f"{nats(record[name])} {_interval(record.get(f'{name}_ci95'), nats)}".strip()


def _interval(bounds: Sequence[float] | None, form: Callable[[float], str]) -> str:
    return "" if bounds is None else f"[{form(bounds[0])}, {form(bounds[1])}]"


def _one_digit(value: float) -> str:
    return f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.1f}%"


WIDTH = 100
"""Columns after which sentences are broken; tables are as wide as they are."""

UNCUT = 10_000
TOP_HEADS = 8


def sweep_text(
    settings: GridSettings, n_prompts: int, comparison: Mapping[str, Any], reasons: Sequence[str]
) -> str:
    """A sweep as plain text: a row per layer, the best heads of all layers, the proposed layers."""
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
    """A study as plain text: a row per sweep with the layers it proposes."""
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
    """Rankings as plain text; several are followed by how they agree with exact ``ΔKL``."""
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
