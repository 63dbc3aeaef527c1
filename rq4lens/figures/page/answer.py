"""The first screens of a report: the answer, the heads, and what else could explain it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from rq4lens.analysis.claims import NOTHING, metric_sentences
from rq4lens.analysis.effects.table import bootstrap_of, grid_full_effect
from rq4lens.analysis.effects.transfer import gap_of
from rq4lens.analysis.records import ControlLayer, HeadKind, Ladder, LadderRow, NoisePair, StandIn
from rq4lens.analysis.result import Analysis
from rq4lens.analysis.statistics.bootstrap import Estimate
from rq4lens.figures.numbers import label_of, rounded, told_kinds
from rq4lens.figures.page.parts import Report, Row, Section, Table, TableEntry, Tile, cell
from rq4lens.results import EVERY

_RANDOM = re.compile(r"rand(\d+)_s")
MOST_TILES = 3
LEAST_PCT = 1.0
"""A head whose interval reaches below this is no tile."""

LITTLE_PCT, MOST_OF = 5.0, 0.5
"""Less of the gap than this is little; more than this share of what the layer does is most."""

CHANGED = ("reassigned", "recoded", "replaced", "shifted", "undecided")


# The answer


def findings(report: Report) -> Section:
    """The answer: a headline, sentences, the heads that carry most, what each set carries."""
    analysis = report.analysis
    said = ((report.run.get(part) or {}).get("warning") for part in ("audit", "pair"))
    return Section(
        "findings",
        _headline(report),
        short="The answer",
        paragraphs=tuple(warning for warning in said if warning),
        sentences=(*analysis.claims, *metric_sentences(analysis))
        if analysis
        else tuple(_main_numbers(report)),
        tiles=tuple(_tiles(report)),
        tables=(_carried_table(report),),
        notes=tuple(_undefined(report)),
    )


def _headline(report: Report) -> str:
    """The answer in one line, and no more than the sentences below it claim."""
    layer = report.grid.settings.layer
    whole = report.records["full"].to_base_pct
    if whole.value is None:
        return "Nothing can be said about heads here"
    if _claims_nothing(report):
        return "Nothing is claimed about heads here"
    if whole.interval is None or whole.interval.low <= 0 or whole.interval.high < LITTLE_PCT:
        return f"The heads of layer {layer} carry little of the change"
    best = report.singles[_by_share(report)[0]]
    share, name = best.to_base_pct.value or 0.0, label_of(best)
    if share > MOST_OF * whole.value:
        return f"{name} alone undoes {share:.0f}% of the change"
    every = f"The heads of layer {layer} undo {whole.value:.0f}% of the change"
    return f"{every}, {name} alone {share:.0f}%"


def _claims_nothing(report: Report) -> bool:
    claims = report.analysis.claims if report.analysis else ()
    return any(NOTHING in each for each in claims)


def _by_share(report: Report) -> list[int]:
    shares = [single.to_base_pct.value or 0.0 for single in report.singles]
    return sorted(range(len(shares)), key=lambda head: -shares[head])


def _tiles(report: Report) -> Iterator[Tile]:
    """The two or three heads that carry most."""
    if _claims_nothing(report):
        return
    told = told_kinds(report.analysis)
    kinds = told.heads if told else ()
    for head in _by_share(report)[:MOST_TILES]:
        single = report.singles[head]
        ends = single.to_base_pct.interval
        if ends is None or ends.low < LEAST_PCT:
            return
        kind = kinds[head].kind if kinds else ""
        both = {"undoes": single.to_base_pct, "gives base": single.to_tuned_pct}
        yield Tile(label_of(single), {word: cell(each, "%") for word, each in both.items()}, kind)


def _main_numbers(report: Report) -> Iterator[str]:
    full = report.records["full"]
    if full.to_base_pct.value is not None:
        yield (
            f"All {report.grid.n_heads} heads of layer {report.grid.settings.layer} undo "
            f"{rounded(full.to_base_pct, '%')} of the gap and give base "
            f"{rounded(full.to_tuned_pct, '%')} of it."
        )
    yield (
        f"At strength {full.alpha:g} they do {rounded(full.KL_raw_mean, 'nats')} of damage, mapped "
        f"{rounded(full.KL_mapped_mean, 'nats')}."
    )


def _undefined(report: Report) -> Iterator[str]:
    """What is undefined or was not measured, once, and what to do next."""
    bootstrap, analysis = bootstrap_of(report.grid), report.analysis
    if why := gap_of(report.grid, bootstrap).undefined_because:
        yield (
            f"Shares of the gap are undefined: {why}. Use prompts on which the two models answer "
            "differently, or more of them."
        )
    if why := grid_full_effect(report.grid, bootstrap).undefined_because:
        yield f"Coverage is undefined: {why}. Measure more prompts, or use a larger --alpha."
    if analysis is None:
        yield (
            "No analysis was made of this run: kinds of heads, controls and cross-fitting are "
            "missing. Run it with --analysis full."
        )
    elif missing := list(_not_measured(analysis)):
        yield f"Not measured: {'; '.join(missing)}. {NEXT}"


NEXT = "Run with --analysis full, a control layer, and prompts of both kinds that name contents."


def _not_measured(analysis: Analysis) -> Iterator[str]:
    parts = {"neutral": "neutral prompts", "noise": "the noise pair", "control_layer": "control"}
    for name, words in parts.items():
        if getattr(analysis, name) is None:
            yield f"{words} ({analysis.reasons[name]})"
    if analysis.ladders and "held_out" not in analysis.ladders[0].rows[0].recovered_pct:
        yield "held-out content (the map was not refitted without each content)"


def _carried_table(report: Report) -> Table:
    sizes = report.grid.settings.patching.k
    names = [name for k in sizes for name in (f"top{k}", f"rand{k}")]
    rows = [_carried_row(report, name) for name in (*names, "full", "ctrl_full", EVERY)]
    return Table(
        "What head sets carry: of the gap at strength 1, and of ΔKL at strength "
        f"{report.grid.settings.patching.alpha:g}; [..]: 95% intervals",
        ("heads", *(title for title, _ in _fields(report).values())),
        tuple(row for row in rows if row),
    )


FIELDS = {
    "to_base_pct": ("undoes", "%"),
    "to_tuned_pct": ("gives base", "%"),
    "flipped_pct": ("answers changed", "%"),
    "as_base_pct": ("become base's", "%"),
    "delta": ("ΔKL (nats)", ""),
    "coverage_pct": ("coverage", "%"),
}
METRIC_FIELDS = {
    "metric_pct": ("metric undone", "%"),
    "metric_to_tuned_pct": ("metric given base", "%"),
}


def _fields(report: Report) -> dict[str, tuple[str, str]]:
    """What a row of the table says: the field of its record, and its title and unit."""
    return FIELDS | (METRIC_FIELDS if report.records["full"].metric else {})


SCORE = {"delta": "ΔKL", "to_base": "undoes", "to_tuned": "gives base"}


def _carried_row(report: Report, name: str) -> Row | None:
    drawn = [each for each in report.records if (_RANDOM.match(each) or [""])[0] == f"{name}_s"]
    if drawn:
        return _random_row(report, name, drawn)
    record = report.records.get(name)
    if record is None:
        return None
    heads, method = ", ".join(f"H{head}" for head in record.heads), report.grid.ranking.method
    title = {
        "full": f"all of layer {record.layer}",
        "ctrl_full": f"all of control layer {record.layer}",
        EVERY: "all of all layers",
    }.get(name, f"best {len(record.heads)} by {SCORE.get(method, method)}: {heads}")
    return (
        title,
        *(cell(getattr(record, field), unit) for field, (_, unit) in _fields(report).items()),
    )


def _random_row(report: Report, name: str, drawn: Sequence[str]) -> Row:
    """The random sets of one size: the range of what they carry."""
    size = name.removeprefix("rand")
    title = f"{len(drawn)} random sets of {size}"
    return (
        title,
        *(_range(report, drawn, field, unit) for field, (_, unit) in _fields(report).items()),
    )


def _range(report: Report, drawn: Sequence[str], field: str, unit: str) -> TableEntry:
    values = [getattr(report.records[each], field).value for each in drawn]
    known = [value for value in values if value is not None]
    if not known:
        return cell(getattr(report.records[drawn[0]], field))
    low, high = min(known), max(known)
    if unit == "%":
        # Adding 0 makes 0 of minus 0.
        return TableEntry(f"{round(low) + 0} to {round(high) + 0}%")
    return TableEntry(f"{low:.1g} to {high:.1g}")


# The heads


def heads(report: Report) -> Section:
    """Every head of the main layer: what it carries, and what replaces it."""
    analysis = report.analysis
    tables = [_heads_table(report)]
    text = ["Choose a head here or in any figure to find it in all."]
    if analysis is not None and analysis.ladders:
        text.append(f"Kinds of heads: {analysis.kinds.rule}.")
    return Section(
        "heads",
        "Which heads, and what kind of change",
        short="Heads",
        tables=tuple(tables),
        figures=("ranking", "coverage", "ladder"),
        notes=tuple(text),
    )


SOURCES = ("raw", "shifted", "mapped", "held_out", "output")


def _heads_table(report: Report) -> Table:
    analysis = report.analysis
    found = analysis.ladders[0] if analysis and analysis.ladders else None
    sources = [each for each in SOURCES if found and each in found.rows[0].recovered_pct]
    named = told_kinds(analysis)
    kinds = named.heads if named else ()
    damage = ("damage of a constant (nats)",) if found else ()
    rows = tuple(
        (
            label_of(report.singles[head]),
            *((_kind_cell(kinds[head]),) if kinds else ()),
            cell(report.singles[head].to_base_pct, "%"),
            cell(report.singles[head].to_tuned_pct, "%"),
            *_ladder_cells(found, head, sources),
        )
        for head in _by_share(report)
    )
    told = "; recovered at strength 1 with this in place of the head" if found else ""
    names = [source.replace("_", " ") for source in sources]
    return Table(
        f"Single heads, by how much of the gap each undoes{told}; [..]: 95% intervals",
        ("head", *(("kind",) if kinds else ()), "undoes", "gives base", *damage, *names),
        rows,
        words=(1,) if kinds else (),
        of_heads=True,
    )


def _kind_cell(kind: HeadKind) -> TableEntry:
    return TableEntry(kind.kind, kind.why or "")


def _ladder_cells(found: Ladder | None, head: int, sources: Sequence[str]) -> Iterator[TableEntry]:
    if found is None:
        return
    row = found[f"head{head}"]
    yield cell(row.damage_nats["constant"])
    for source in sources:
        yield cell(row.recovered_pct[source], "%")


# What else could explain it, and does it hold elsewhere


def controls(report: Report) -> Section | None:
    """What stands in for the map, the noise pair, neutral prompts, the control layer."""
    analysis = report.analysis
    if analysis is None:
        return None
    tables = [
        *([_stand_in_table(analysis.stand_ins)] if analysis.stand_ins else []),
        *([_noise_table(report, analysis.noise)] if analysis.noise else []),
        *([_neutral_table(report, analysis.neutral)] if analysis.neutral else []),
        *([_control_table(report, analysis.control_layer)] if analysis.control_layer else []),
    ]
    if not tables:
        return None
    title = "What else could explain it, and does it hold elsewhere"
    return Section("controls", title, short="What else", tables=tuple(tables))


def _stand_in_table(rows: Sequence[StandIn]) -> Table:
    heads = ", ".join(f"H{head}" for head in next((row.heads for row in rows if row.heads), ()))
    return Table(
        f"In place of the map, on the heads that changed ({heads or 'none'}), at strength 1: green "
        "does clearly worse than the map, orange does not; [..]: 95% intervals",
        ("stand-in", "asks", "recovered", "damage (nats)", "behind the map (nats)", "so"),
        tuple(map(_stand_in_row, rows)),
        words=(5,),
        long=(1,),
    )


def _stand_in_row(row: StandIn) -> Row:
    ends = row.behind_nats.interval
    if row.reason is not None or ends is None:
        return (
            row.name,
            row.question,
            *(cell(row.recovered_pct),) * 3,
            f"not measured: {row.reason}",
        )
    look, word = ("good", "clearly worse than the map")
    if ends.low <= 0:
        look, word = ("bad", "not clearly worse than the map")
    return (
        row.name,
        row.question,
        cell(row.recovered_pct, "%", look),
        cell(row.damage),
        cell(row.behind_nats),
        TableEntry(word, "", look),
    )


NOISE = {"gap_base_nats": "gap", "KL_raw": "KL_raw of all heads", "delta": "ΔKL of all heads"}


def _noise_table(report: Report, noise: NoisePair) -> Table:
    full = report.records["full"]
    real = {"gap_base_nats": full.gap_base_nats, "KL_raw": full.KL_raw_mean, "delta": full.delta}
    return Table(
        "Beside the noise pair, whose weight change is as large and has no order; [..]: 95% "
        "intervals",
        ("noise pair", "this pair (nats)", "noise pair (nats)", "multiple"),
        tuple(
            (
                words,
                cell(real[name]),
                cell(getattr(noise, name)),
                _times(noise.real_over_noise, name),
            )
            for name, words in NOISE.items()
        ),
    )


def _times(multiples: Mapping[str, Estimate], name: str) -> TableEntry:
    found = multiples.get(name)
    if found is None or found.value is None:
        return cell(found)
    ends = found.interval
    span = f" [{ends.low:,.2g}, {ends.high:,.2g}]" if ends else ""
    looks = "good" if ends is not None and ends.low > 1 else "bad"
    return TableEntry(_plain(f"{found.value:.2g}{span}"), "", looks)


def _plain(text: str) -> str:
    """Powers of ten as whole numbers."""
    return re.sub(r"[\d.]+e\+\d+", lambda match: f"{float(match[0]):,.0f}", text)


def _neutral_table(report: Report, found: Ladder) -> Table:
    assert report.analysis is not None
    kinds = report.analysis.kinds.heads
    rows = [row for row in found.rows if len(row.heads) == 1]
    changed = [row for row in rows if kinds[row.heads[0]].kind in CHANGED]
    return Table(
        "On neutral prompts, at strength 1: a change of coordinates would hold here too; [..]: 95% "
        "intervals",
        ("neutral prompts", "kind", "damage mapped (nats)", "damage raw (nats)", "mapped"),
        tuple(_neutral_row(report, row, kinds[row.heads[0]].kind) for row in changed),
        words=(1,),
    )


def _neutral_row(report: Report, row: LadderRow, kind: str) -> Row:
    damages = (cell(row.damage_nats[source]) for source in ("mapped", "raw"))
    recovered = row.recovered_pct["mapped"]
    return report.grid.label(row.heads[0]), kind, *damages, cell(recovered, "%")


def _control_table(report: Report, control: ControlLayer) -> Table:
    main, other = report.records["full"], report.records["ctrl_full"]
    rows = (
        ("undoes", main.to_base_pct, other.to_base_pct, control.less_to_base_pct, "%"),
        ("ΔKL (nats)", main.delta, control.delta, control.less_nats, ""),
    )
    return Table(
        f"Beside control layer {control.layer}, prompt by prompt; [..]: 95% intervals",
        ("control layer", f"layer {main.layer}", f"layer {control.layer}", "difference"),
        tuple((name, *(cell(each, unit) for each in values)) for name, *values, unit in rows),
    )
