"""The first screens of a report: the answer, the heads, and what else could explain it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rq4lens.analysis.claims import NOTHING, metric_sentences
from rq4lens.analysis.effects.table import gap_of, grid_full_effect
from rq4lens.analysis.records import Analysis, ControlLayer, NoisePair, StandIn
from rq4lens.analysis.statistics.bootstrap import Estimate
from rq4lens.figures.ladder import SOURCES
from rq4lens.figures.numbers import label_of, rounded
from rq4lens.figures.page.parts import Report, Row, Section, Table, TableEntry, Tile, cell, cells
from rq4lens.results import EVERY, GridResult

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
    for head in _by_share(report)[:MOST_TILES]:
        single = report.singles[head]
        ends = single.to_base_pct.interval
        if ends is None or ends.low < LEAST_PCT:
            return
        kind = report.kinds[head].kind if report.kinds else ""
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
    analysis = report.analysis
    if why := gap_of(report.grid).undefined_because:
        yield (
            f"Shares of the gap are undefined: {why}. Use prompts on which the two models answer "
            "differently, or more of them."
        )
    if why := grid_full_effect(report.grid).undefined_because:
        yield f"Coverage is undefined: {why}. Measure more prompts, or use a larger --alpha."
    if analysis is None:
        yield (
            "No analysis was made of this run: kinds of heads, stand-ins and cross-fitting are "
            "missing. Run it with --analysis full."
        )
    elif missing := list(_not_measured(analysis)):
        parts, needed = zip(*missing, strict=True)
        # Without a full analysis that is what is needed first.
        fixes = dict.fromkeys(needed if analysis.ladders else ["--analysis full", *needed])
        yield f"Not measured: {'; '.join(parts)}. Run with {', '.join(fixes)} to measure them."


PARTS = {
    "neutral": ("neutral prompts", "prompts of a split neutral"),
    "noise": ("the noise pair", "room for three models in memory and no --no-noise-pair"),
    "control_layer": ("the control layer", "--control-layer"),
}
"""What a run may lack, and what it needs to have it."""


def _not_measured(analysis: Analysis) -> Iterator[tuple[str, str]]:
    for name, (words, needed) in PARTS.items():
        if getattr(analysis, name) is None:
            yield f"{words} ({analysis.reasons[name]})", needed
    if analysis.ladders and "held_out" not in analysis.ladders[0].rows[0].recovered_pct:
        yield (
            "held-out content (the prompts name no content, or one alone)",
            "a `content` of each prompt",
        )


CARRIED = {
    "undoes": ("to_base_pct", "%"),
    "gives base": ("to_tuned_pct", "%"),
    "answers changed": ("flipped_pct", "%"),
    "become base's": ("as_base_pct", "%"),
    "ΔKL (nats)": ("delta", ""),
    "coverage": ("coverage_pct", "%"),
}
OF_METRIC = {
    "metric undone": ("metric_pct", "%"),
    "metric given base": ("metric_to_tuned_pct", "%"),
}
SCORE = {"delta": "ΔKL", "to_base": "undoes", "to_tuned": "gives base"}


def _carried_table(report: Report) -> Table:
    sizes = report.grid.settings.patching.k
    columns = CARRIED | (OF_METRIC if report.records["full"].metric else {})
    fields = dict(columns.values())
    rows: list[Row] = []
    for name in (*(f"{kind}{k}" for k in sizes for kind in ("top", "rand")), *LAYERS):
        drawn = [cond for cond in report.records if cond.startswith(f"{name}_s")]
        if drawn:
            title = f"{len(drawn)} random sets of {name.removeprefix('rand')}"
            rows.append((title, *(_range(report, drawn, *each) for each in fields.items())))
        elif name in report.records:
            rows.append((_title(report, name), *cells(report.records[name], fields)))
    return Table(
        "What head sets carry: of the gap at strength 1, and of ΔKL at strength "
        f"{report.grid.settings.patching.alpha:g}; [..]: 95% intervals",
        ("heads", *columns),
        tuple(rows),
    )


LAYERS = {
    "full": "all of layer {layer}",
    "ctrl_full": "all of control layer {layer}",
    EVERY: "all of all layers",
}
"""The conditions of all heads, as the table calls them."""


def _title(report: Report, name: str) -> str:
    record, method = report.records[name], report.grid.ranking.method
    if name in LAYERS:
        return LAYERS[name].format(layer=record.layer)
    heads = ", ".join(f"H{head}" for head in record.heads)
    return f"best {len(record.heads)} by {SCORE.get(method, method)}: {heads}"


def _range(report: Report, drawn: Sequence[str], field: str, unit: str) -> TableEntry:
    """What random sets of one size carry, from the least to the most."""
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
    rule = f"Kinds of heads: {analysis.kinds.rule}." if analysis and report.kinds else ""
    choose = "Choose a head here or in any figure to find it in all."
    return Section(
        "heads",
        "Which heads, and what kind of change",
        short="Heads",
        tables=(_heads_table(report),),
        figures=("ranking", "coverage", "ladder"),
        notes=(choose, rule) if rule else (choose,),
    )


def _heads_table(report: Report) -> Table:
    analysis, kinds = report.analysis, report.kinds
    found = analysis.ladders[0] if analysis and analysis.ladders else None
    sources = [each for each in SOURCES if found and each in found.rows[0].recovered_pct]
    rows: list[Row] = []
    for head in _by_share(report):
        row: list[TableEntry | str] = [label_of(report.singles[head])]
        if kinds:
            row.append(TableEntry(kinds[head].kind, kinds[head].why or ""))
        row += cells(report.singles[head], {"to_base_pct": "%", "to_tuned_pct": "%"})
        if found:
            rung = found[f"head{head}"]
            row.append(cell(rung.damage_nats["constant"]))
            row += [cell(rung.recovered_pct[source], "%") for source in sources]
        rows.append(tuple(row))
    told = "; recovered at strength 1 with this in place of the head" if found else ""
    return Table(
        f"Single heads, by how much of the gap each undoes{told}; [..]: 95% intervals",
        (
            "head",
            *(("kind",) if kinds else ()),
            *("undoes", "gives base"),
            *(("damage of a constant (nats)",) if found else ()),
            *(source.replace("_", " ") for source in sources),
        ),
        tuple(rows),
        words=(1,) if kinds else (),
        of_heads=True,
    )


# What else could explain it, and does it hold elsewhere


def controls(report: Report) -> Section | None:
    """What stands in for the map, the noise pair, neutral prompts, the control layer."""
    analysis = report.analysis
    if analysis is None:
        return None
    tables = [
        *([_stand_in_table(analysis.stand_ins)] if analysis.stand_ins else []),
        *([_noise_table(report, analysis.noise)] if analysis.noise else []),
        *([_neutral_table(report.grid, analysis)] if analysis.neutral else []),
        *([_control_table(report, analysis.control_layer)] if analysis.control_layer else []),
    ]
    if not tables:
        return None
    title = "What else could explain it, and does it hold elsewhere"
    return Section("controls", title, short="What else", tables=tuple(tables))


def _stand_in_table(rows: Sequence[StandIn]) -> Table:
    heads = ", ".join(f"H{head}" for head in next((row.heads for row in rows if row.heads), ()))
    return Table(
        f"In place of the map, on the heads that changed or are undecided ({heads or 'none'}), at "
        "strength 1: green does clearly worse than the map, orange does not; [..]: 95% intervals",
        ("stand-in", "asks", "recovered", "damage (nats)", "behind the map (nats)", "so"),
        tuple((row.name, row.question, *_stand_in_cells(row)) for row in rows),
        words=(5,),
        long=(1,),
    )


def _stand_in_cells(row: StandIn) -> Row:
    ends = row.behind_nats.interval
    if row.reason is not None or ends is None:
        return (*(cell(row.recovered_pct),) * 3, f"not measured: {row.reason}")
    look, word = "good", "clearly worse than the map"
    if ends.low <= 0:
        look, word = "bad", f"not {word}"
    effects = cells(row, {"damage": "", "behind_nats": ""})
    return (cell(row.recovered_pct, "%", look), *effects, TableEntry(word, "", look))


def _noise_table(report: Report, noise: NoisePair) -> Table:
    full = report.records["full"]
    rows = {
        "gap": ("gap_base_nats", full.gap_base_nats),
        "KL_raw of all heads": ("KL_raw", full.KL_raw_mean),
        "ΔKL of all heads": ("delta", full.delta),
    }
    return Table(
        "Beside the noise pair, whose weight change is as large and has no order; [..]: 95% "
        "intervals",
        ("noise pair", "this pair (nats)", "noise pair (nats)", "multiple"),
        tuple(
            (words, cell(real), cell(getattr(noise, name)), _times(noise.real_over_noise.get(name)))
            for words, (name, real) in rows.items()
        ),
    )


def _times(multiple: Estimate | None) -> TableEntry:
    if multiple is None or multiple.value is None:
        return cell(multiple)
    ends = multiple.interval
    span = f" [{_two_digits(ends.low)}, {_two_digits(ends.high)}]" if ends else ""
    look = "good" if ends is not None and ends.low > 1 else "bad"
    return TableEntry(f"{_two_digits(multiple.value)}{span}", "", look)


def _two_digits(value: float) -> str:
    """A number without powers of ten."""
    return f"{float(f'{value:.2g}'):,.12g}"


def _neutral_table(grid: GridResult, analysis: Analysis) -> Table:
    rows: list[Row] = []
    for row in analysis.neutral.rows if analysis.neutral else ():
        kind = analysis.kinds.heads[row.heads[0]].kind if len(row.heads) == 1 else ""
        if kind in CHANGED:
            damages = (cell(row.damage_nats[source]) for source in ("mapped", "raw"))
            recovered = cell(row.recovered_pct["mapped"], "%")
            rows.append((grid.label(row.heads[0]), kind, *damages, recovered))
    return Table(
        "On neutral prompts, at strength 1: a change of coordinates would hold here too; [..]: 95% "
        "intervals",
        ("neutral prompts", "kind", "damage mapped (nats)", "damage raw (nats)", "mapped"),
        tuple(rows),
        words=(1,),
    )


def _control_table(report: Report, control: ControlLayer) -> Table:
    main, other = report.records["full"], report.records["ctrl_full"]
    shares = (main.to_base_pct, other.to_base_pct, control.less_to_base_pct)
    effects = (main.delta, control.delta, control.less_nats)
    return Table(
        f"Beside control layer {control.layer}, prompt by prompt; [..]: 95% intervals",
        ("control layer", f"layer {main.layer}", f"layer {control.layer}", "difference"),
        (
            ("undoes", *(cell(each, "%") for each in shares)),
            ("ΔKL (nats)", *map(cell, effects)),
        ),
    )
