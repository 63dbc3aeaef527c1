"""The printed summary: FULL line, coverage table, control line, claims."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rq4lens.heads import HeadSet
from rq4lens.results import GridSettings

Record = Mapping[str, Any]
_SIZED = re.compile(r"(top|rand)(\d+)")


def print_summary(
    console: Console, settings: GridSettings, records: Sequence[Record], claims: Sequence[str] = ()
) -> None:
    """Print what a run found.

    Args:
        console: where to print; plain text when it is not a terminal.
        settings: how the grid was made.
        records: the records of ``rq4_results.json``.
        claims: sentences that say what the numbers support.
    """
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
    return (
        f"{settings.pair}, {where}, "
        f"{settings.n_heads} heads, alpha {settings.alpha:g}, "
        f"{settings.split} split (n={n_prompts}),\n"
        f"map {settings.map_kind} per {settings.map_scope}, KL({settings.kl_direction}) in nats, "
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
