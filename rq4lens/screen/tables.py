"""What the console prints of runs, conditions, sweeps and rankings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from io import StringIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from rq4lens.analysis.claims import metric_sentences
from rq4lens.analysis.effects.apart import PairFacts
from rq4lens.analysis.positions import MappedPosition, PositionMap
from rq4lens.analysis.records import (
    ConditionRecord,
    HeadTests,
    LayerChoice,
    LayerComparison,
    MethodRow,
    MetricEffect,
)
from rq4lens.analysis.result import Analysis
from rq4lens.analysis.statistics.bootstrap import Estimate, Interval, number_text
from rq4lens.analysis.statistics.sign_flips import SIGNIFICANT
from rq4lens.heads import Head, HeadSet
from rq4lens.results import GridSettings, HeadRanking

_SIZED = re.compile(r"(top|rand)(\d+)")

WIDTH = 100
"""Columns after which sentences are broken."""

UNCUT = 10_000
TOP_HEADS = 8


def text_of(parts: Sequence[RenderableType], *, sentences: int = WIDTH, tables: int = UNCUT) -> str:
    """Sentences and tables, each of so many columns at most, as plain text."""
    text = StringIO()
    # In a notebook rich would display the text, or colour it, instead of writing it as it is.
    console = Console(file=text, width=UNCUT, force_jupyter=False, color_system=None)
    for part in parts:
        console.print(part, width=sentences if isinstance(part, Text) else tables)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def summary_text(
    settings: GridSettings,
    records: Sequence[ConditionRecord],
    analysis: Analysis,
    facts: PairFacts | None = None,
) -> str:
    """What a run found: the answer, the table, the study's own grid, what the pair is."""
    by_name = {record.cond: record for record in records}
    lines: list[RenderableType] = [
        Text(setting_line(settings, by_name["full"].n)),
        Text(),
        *map(Text, (*analysis.claims, *metric_sentences(analysis))),
        Text(),
        carried_table(records),
        Text(),
        *map(Text, analysis.study_claims),
        Text(checks_line(by_name["none"], by_name["self"])),
        *(map(Text, facts.lines) if facts else ()),
    ]
    return text_of(lines, tables=WIDTH)


def condition_text(settings: GridSettings, record: ConditionRecord) -> str:
    """One condition in a few lines of plain text."""
    shares = {
        "drop": record.drop_pct,
        "to base": record.to_base_pct,
        "to tuned": record.to_tuned_pct,
        "coverage": record.coverage_pct,
        "raw coverage": record.raw_coverage_pct,
    }
    metric = "" if record.metric is None else _metric_text(settings, record.metric)
    lines = [
        f"{name:<12} {share:.1f%}{f' ({share.reason})' if share.reason else ''}\n"
        for name, share in shares.items()
    ]
    return (
        f"{setting_line(settings, record.n)}\n"
        f"heads {HeadSet.of(record.heads, settings.n_heads)}\n"
        f"KL_raw       {record.KL_raw_mean:auto}\n"
        f"KL_mapped    {record.KL_mapped_mean:auto}\n"
        f"ΔKL          {record.delta:auto}\n"
        f"{''.join(lines)}{metric}"
    )


def _metric_text(settings: GridSettings, metric: MetricEffect) -> str:
    return (
        f"{settings.patching.metric}: raw {metric.raw_change:auto}, mapped "
        f"{metric.mapped_change:auto}, to base {metric.to_base_pct:.1f%}, to tuned "
        f"{metric.to_tuned_pct:.1f%}\n"
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
        f"{settings.dtype}" + ("" if patching.metric == "kl" else f", metric {patching.metric}")
    )


def checks_line(none: ConditionRecord, self_patch: ConditionRecord) -> str:
    """The two checks that must read 0."""
    first, second = (_check(each.KL_raw_mean.value) for each in (none, self_patch))
    return f"CHECKS (must read 0): none {first}, self {second} nats"


READS_ZERO_NATS = 1e-12
"""What rounding leaves of a divergence of 0 in float64."""


def _check(value: float | None) -> str:
    rounded = value is not None and abs(value) <= READS_ZERO_NATS
    return number_text(0.0 if rounded else value, ".2g")


def carried_table(records: Sequence[ConditionRecord]) -> Table:
    """What each head set carries, and its coverage: top-k and random-k by k, then the layers."""
    asked = ("metric",) if records[0].metric else ()
    table = columns(
        *("condition", "undoes", "gives base"),
        *asked,
        *("ΔKL (nats)", "coverage", "95% CI", "of raw"),
    )
    table.caption_justify = "left"
    table.add_column("heads", overflow="fold")
    sized = [each for each in records if each.cond in LAYERS or _SIZED.match(each.cond)]
    for record in sorted(sized, key=_table_key):
        control = f" L{record.layer}" if record.cond == "ctrl_full" else ""
        table.add_row(
            record.cond + control,
            number_text(record.to_base_pct.value, ".1f%", "-"),
            number_text(record.to_tuned_pct.value, ".1f%", "-"),
            *(number_text(record.metric_pct.value, ".1f%", "-") for _ in asked),
            number_text(record.delta.value, "auto", "-"),
            number_text(record.coverage_pct.value, ".1f%", "-"),
            _ends(record.coverage_pct.interval, ".1f", absent=""),
            number_text(record.raw_coverage_pct.value, ".1f%", "-"),
            "ALL" if record.cond in LAYERS else ",".join(map(str, record.heads)),
        )
    strength = number_text(records[0].alpha, "g")
    table.caption = (
        "undoes, gives base: of the gap, at strength 1 (to_base, to_tuned); ΔKL, its coverage, and "
        f"KL_raw as a share of that of all heads (of raw) at strength {strength}"
    )
    if asked:
        table.caption += "; metric: what base's activations undo of its difference"
    return table


LAYERS = ("full", "ctrl_full", "every_layer")
"""The conditions of all heads; they stand last, in this order."""


def _table_key(record: ConditionRecord) -> tuple[int, str]:
    match = _SIZED.match(record.cond)
    if match is None:
        return 10**9 + LAYERS.index(record.cond), ""
    return int(match[2]), "0" if match[1] == "top" else record.cond


def sweep_text(
    settings: GridSettings, n_prompts: int, comparison: LayerComparison, choice: LayerChoice
) -> str:
    """A sweep as plain text: a row per layer, the best heads of all layers, the proposed layers."""
    best = ", ".join(
        f"{row.head} {number_text(row.delta.value, 'auto')}"
        for row in comparison.ranking[:TOP_HEADS]
    )
    sentences = (
        *_gap_lines(comparison),
        f"heads of all layers by ΔKL (nats): {best}",
        _tests_line(comparison.tests),
        *choice.reasons,
    )
    head = Text(setting_line(settings, n_prompts, where=f"{settings.n_layers} layers"))
    return text_of([head, _layer_table(comparison), *map(Text, sentences)])


def _gap_lines(comparison: LayerComparison) -> Iterator[str]:
    """How far apart the models are, and which single heads carry most of it."""
    gap = comparison.gap
    if gap.undefined_because is not None:
        yield f"shares of the gap are undefined: {gap.undefined_because}"
        return
    yield (
        f"base and tuned differ by {gap.base_nats:.3g} nats; all heads of all layers undo "
        f"{gap.every_layer_to_base_pct:.1f%} of it and give base "
        f"{gap.every_layer_to_tuned_pct:.1f%}"
    )
    for said, rows in (("undo", comparison.to_base_pct), ("give base", comparison.to_tuned_pct)):
        heads = [
            (value or 0.0, Head(layer, head).label)
            for layer, row in zip(comparison.layers, rows, strict=True)
            for head, value in enumerate(row)
        ]
        best = sorted(heads, key=lambda each: -each[0])[:TOP_HEADS]
        yield f"heads that {said} most of it: {', '.join(f'{name} {x:.1f}%' for x, name in best)}"


def _tests_line(tests: HeadTests) -> str:
    """How many heads differ from zero, and what the p-values are corrected for."""
    if tests.n_tests == 0:
        return "sign-flip tests: none is possible (see layers.json for the reasons)"
    corrected = [test.p_max_t for test in tests.tests if test.p_max_t is not None]
    firm = sum(p_value <= SIGNIFICANT for p_value in corrected)
    return (
        f"sign-flip tests: {firm} heads differ from zero (max-T p <= {SIGNIFICANT:g}), corrected "
        f"for all {len(tests.tests)} tests of this sweep ({tests.family}); smallest p that "
        f"can come out: {tests.p_max_t_min:.2g} by max-T, {tests.p_holm_min:.2g} by Holm"
    )


def _layer_table(comparison: LayerComparison) -> Table:
    table = columns(
        *("layer", "undoes", "95% CI", "gives base", "95% CI"),
        *("KL_raw(ALL)", "KL_mapped", "ΔKL(ALL)", "95% CI", "area", "k90", "Gini"),
    )
    for row in comparison.rows:
        curve = row.curve
        table.add_row(
            str(row.layer),
            _number(row.to_base_pct, ".1f%"),
            _ends(row.to_base_pct.interval, ".1f"),
            _number(row.to_tuned_pct, ".1f%"),
            _ends(row.to_tuned_pct.interval, ".1f"),
            _number(row.KL_raw, ".6f"),
            _number(row.KL_mapped, ".6f"),
            _number(row.delta, ".6f"),
            _ends(row.delta.interval, ".6f"),
            _number(curve.area_pct, ".0f%") if curve else "-",
            _number(curve.k90, ".0f") if curve else "-",
            _number(row.concentration.gini, ".2f"),
        )
    table.caption = (
        "undoes, gives base: of the gap, at strength 1; area and k90: of the ΔKL coverage curve of "
        "the layer's own ranking"
    )
    return table


def positions_text(found: PositionMap) -> str:
    """A position map as plain text: the whole layer at each position, and its best head."""
    table = columns(
        *("position", "usual token", "undoes", "95% CI", "gives base", "95% CI"),
        *("ΔKL(ALL)", "best heads by what they undo"),
    )
    for each in found.positions:
        table.add_row(*_position_cells(each, found.labels))
    table.caption = (
        "each token patched alone, -1 is the decision token; undoes, gives base: of the gap, at "
        "strength 1"
    )
    return text_of([Text(setting_line(found.settings, found.grid.n_prompts)), table])


def _position_cells(position: MappedPosition, labels: Sequence[str]) -> Iterator[str]:
    layer, *heads = position.layer_and_heads
    text, share = position.usual_text
    yield from (position.role, f"{text!r} ({100 * share:.0f}%)")
    for each in (layer.to_base_pct, layer.to_tuned_pct):
        yield from (_number(each, ".1f%"), _ends(each.interval, ".1f"))
    yield _number(layer.delta, ".6f")
    carried = zip((each.to_base_pct.value for each in heads), labels[1:], strict=True)
    known = sorted((-value, label) for value, label in carried if value is not None)
    yield ", ".join(f"{label} {number_text(-value, '.1f%')}" for value, label in known[:3]) or "-"


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
    return text_of(parts)


def _score_table(ranking: HeadRanking) -> Table:
    table = columns("rank", "head", ranking.method, "standard error")
    errors = ranking.standard_errors or (None,) * ranking.n_heads
    scored = zip(ranking.heads, ranking.scores, errors, strict=True)
    for rank, (head, score, error) in enumerate(scored, start=1):
        label = Head(ranking.layer, head).label
        table.add_row(
            str(rank), label, number_text(score, ".6g", "-"), number_text(error, ".2g", "-")
        )
    return table


def _method_table(
    rankings: Sequence[HeadRanking], rows: Sequence[MethodRow], ks: Sequence[int]
) -> Table:
    sizes = [f"top-{k}" for k in ks]
    table = columns(
        "method", "Kendall", "Spearman", "RBO", *sizes, "area", "k90", "s", "best heads"
    )
    for ranking, row in zip(rankings, rows, strict=True):
        agrees = row.agreement
        table.add_row(
            row.method,
            *(
                _number(getattr(agrees, name), ".2f") if agrees else "-"
                for name in ("kendall", "spearman", "rbo")
            ),
            *(_number(row.coverage_pct.get(k), ".0f%") for k in ks),
            _number(row.area_pct, ".0f%"),
            _number(row.k90, ".0f"),
            number_text(row.seconds, ".2f", "-"),
            ",".join(map(str, ranking.top(4))),
        )
    table.caption = (
        "Kendall, Spearman and rank-biased overlap with exact single-head ΔKL (-: the ranking "
        "itself); top-k: coverage"
    )
    return table


def columns(first: str, *others: str) -> Table:
    """A table without lines whose columns are aligned right but for the first."""
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(estimate: Estimate | None, form: str) -> str:
    return number_text(None if estimate is None else estimate.value, form, "-")


def _ends(interval: Interval | None, form: str, absent: str = "-") -> str:
    return absent if interval is None else format(interval, form)
