"""What the console prints of runs, conditions, sweeps and rankings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rq4lens.analysis.claims import metric_sentences
from rq4lens.analysis.effects.apart import PairFacts
from rq4lens.analysis.positions import PositionMap
from rq4lens.analysis.records import (
    Analysis,
    ConditionRecord,
    HeadTests,
    LayerChoice,
    LayerComparison,
    MethodRow,
)
from rq4lens.analysis.statistics.bootstrap import Estimate, number_text
from rq4lens.analysis.statistics.sign_flips import SIGNIFICANT
from rq4lens.heads import Head, HeadSet
from rq4lens.results import GridSettings, HeadRanking
from rq4lens.screen.terminal import WIDTH, table_of, text_of

_SIZED = re.compile(r"(top|rand)(\d+)")

TOP_HEADS = 8


def summary_text(
    settings: GridSettings,
    records: Sequence[ConditionRecord],
    analysis: Analysis,
    facts: PairFacts | None = None,
) -> str:
    """What a run found: the answer, the table, the study's own grid, what the pair is."""
    by_name = {record.cond: record for record in records}
    checks = _checks(by_name["none"], by_name["self"])
    lines: list[RenderableType] = [
        Text(setting_line(settings, by_name["full"].n)),
        Text(),
        *map(Text, (*analysis.claims, *metric_sentences(analysis))),
        Text(),
        carried_table(records),
        Text(),
        *map(Text, analysis.study_claims),
        Text("CHECKS (must read 0): none {}, self {} nats".format(*checks)),
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
    metric = record.metric and (
        f"{settings.patching.metric}: raw {record.metric.raw_change:auto}, mapped "
        f"{record.metric.mapped_change:auto}, to base {record.metric.to_base_pct:.1f%}, to tuned "
        f"{record.metric.to_tuned_pct:.1f%}\n"
    )
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
        f"{''.join(lines)}{metric or ''}"
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


READS_ZERO_NATS = 1e-12
"""What rounding leaves of a divergence of 0 in float64."""


def _checks(*must_read_0: ConditionRecord) -> Iterator[str]:
    for each in must_read_0:
        value = each.KL_raw_mean.value
        rounded = value is not None and abs(value) <= READS_ZERO_NATS
        yield number_text(0.0 if rounded else value, ".2g")


def carried_table(records: Sequence[ConditionRecord]) -> Table:
    """What each head set carries, and its coverage: top-k and random-k by k, then the layers."""
    asked = ("metric",) if records[0].metric else ()
    shares = ("condition", "undoes", "gives base", *asked)
    table = table_of((*shares, "ΔKL (nats)", "coverage", "95% CI", "of raw"), no_wrap=True)
    table.add_column("heads", overflow="fold")
    sized = [each for each in records if each.cond in LAYERS or _SIZED.match(each.cond)]
    for record in sorted(sized, key=_table_key):
        control = f" L{record.layer}" if record.cond == "ctrl_full" else ""
        table.add_row(
            record.cond + control,
            _number(record.to_base_pct, ".1f%"),
            _number(record.to_tuned_pct, ".1f%"),
            *(_number(record.metric_pct, ".1f%") for _ in asked),
            _number(record.delta, "auto"),
            *_both(record.coverage_pct, ".1f%", absent=""),
            _number(record.raw_coverage_pct, ".1f%"),
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
    rows = [
        (
            str(row.layer),
            *_both(row.to_base_pct, ".1f%"),
            *_both(row.to_tuned_pct, ".1f%"),
            _number(row.KL_raw, ".6f"),
            _number(row.KL_mapped, ".6f"),
            *_both(row.delta, ".6f"),
            _number(row.curve.area_pct if row.curve else None, ".0f%"),
            _number(row.curve.k90 if row.curve else None, ".0f"),
            _number(row.concentration.gini, ".2f"),
        )
        for row in comparison.rows
    ]
    shares = ("layer", "undoes", "95% CI", "gives base", "95% CI")
    effects = ("KL_raw(ALL)", "KL_mapped", "ΔKL(ALL)", "95% CI", "area", "k90", "Gini")
    caption = (
        "undoes, gives base: of the gap, at strength 1; area and k90: of the ΔKL coverage curve of "
        "the layer's own ranking"
    )
    return table_of((*shares, *effects), rows, caption, no_wrap=True)


def positions_text(found: PositionMap) -> str:
    """A position map as plain text: the whole layer at each position, and its best head."""
    rows = []
    for each in found.positions:
        layer, *heads = each.layer_and_heads
        text, share = each.usual_text
        carried = zip((head.to_base_pct.value for head in heads), found.labels[1:], strict=True)
        best = sorted((-value, label) for value, label in carried if value is not None)[:3]
        row = (
            each.role,
            f"{text!r} ({100 * share:.0f}%)",
            *_both(layer.to_base_pct, ".1f%"),
            *_both(layer.to_tuned_pct, ".1f%"),
            _number(layer.delta, ".6f"),
            ", ".join(f"{label} {number_text(-value, '.1f%')}" for value, label in best) or "-",
        )
        rows.append(row)
    shares = ("position", "usual token", "undoes", "95% CI", "gives base", "95% CI")
    caption = (
        "each token patched alone, -1 is the decision token; undoes, gives base: of the gap, at "
        "strength 1"
    )
    titles = (*shares, "ΔKL(ALL)", "best heads by what they undo")
    table = table_of(titles, rows, caption, no_wrap=True)
    return text_of([Text(setting_line(found.settings, found.grid.n_prompts)), table])


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
    errors = ranking.standard_errors or (None,) * ranking.n_heads
    scored = zip(ranking.heads, ranking.scores, errors, strict=True)
    rows = [
        (
            str(rank),
            Head(ranking.layer, head).label,
            number_text(score, ".6g", "-"),
            number_text(error, ".2g", "-"),
        )
        for rank, (head, score, error) in enumerate(scored, start=1)
    ]
    return table_of(("rank", "head", ranking.method, "standard error"), rows, no_wrap=True)


def _method_table(
    rankings: Sequence[HeadRanking], methods: Sequence[MethodRow], ks: Sequence[int]
) -> Table:
    agreements = ("kendall", "spearman", "rbo")
    rows = [
        (
            row.method,
            *(_number(getattr(row.agreement, name, None), ".2f") for name in agreements),
            *(_number(row.coverage_pct.get(k), ".0f%") for k in ks),
            _number(row.area_pct, ".0f%"),
            _number(row.k90, ".0f"),
            number_text(row.seconds, ".2f", "-"),
            ",".join(map(str, ranking.top(4))),
        )
        for ranking, row in zip(rankings, methods, strict=True)
    ]
    sizes = [f"top-{k}" for k in ks]
    titles = ("method", "Kendall", "Spearman", "RBO", *sizes, "area", "k90", "s", "best heads")
    caption = (
        "Kendall, Spearman and rank-biased overlap with exact single-head ΔKL (-: the ranking "
        "itself); top-k: coverage"
    )
    return table_of(titles, rows, caption, no_wrap=True)


def _number(estimate: Estimate | None, form: str) -> str:
    return number_text(None if estimate is None else estimate.value, form, "-")


def _both(estimate: Estimate, form: str, absent: str = "-") -> tuple[str, str]:
    """A number and its interval, a cell each."""
    ends = estimate.interval
    return _number(estimate, form), absent if ends is None else format(ends, form)
