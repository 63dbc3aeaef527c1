"""The sections of a report: what is said, and which table and figure stands where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rq4lens.analysis.card.records import HeadCard
from rq4lens.analysis.effects.table import bootstrap_of, grid_full_effect, records
from rq4lens.analysis.records import (
    Agreement,
    ConditionRecord,
    CoverageRow,
    LayerComparison,
    LayerRow,
    RankStability,
    StandIn,
)
from rq4lens.analysis.result import Analysis
from rq4lens.analysis.statistics.bootstrap import Estimate
from rq4lens.figures.numbers import head_kinds, label_of, number, shown, single_records
from rq4lens.figures.page.gallery import AGREEMENT_KINDS, map_diagnostics
from rq4lens.figures.plane import PREDICTORS, QUALITIES
from rq4lens.results import GridResult

NO_PROMPTS = "The texts of the prompts were not given to this report; their ids and numbers were."


Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table; ``words`` and ``long`` are the places of columns with words and with sentences.

    In a table ``of_heads`` the first cell of a row chooses its head.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    words: tuple[int, ...] = ()
    long: tuple[int, ...] = ()
    of_heads: bool = False

    def kind(self, place: int) -> str:
        """What a column holds; decides its alignment and whether it wraps."""
        return "long" if place in self.long else "words" if place in self.words else "number"


@dataclass(frozen=True)
class Section:
    """One section of the report.

    ``id`` is its name in links, ``figures`` are names; ``blocks`` are titles and long texts that
    stay folded.
    """

    id: str
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[str, ...] = ()
    blocks: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Report:
    """What a report is made from.

    Args:
        grid: the measured grid.
        analysis: an analysis of it; without one its sections are left out.
        prompts: the prompts' texts by id, as far as given.
        provenance: the content of ``run.json``; the grid's own when left out.
        layers: the grid of each layer, from a sweep.
        comparison: the comparison of these layers by the analysis.
        cards: cards of heads that matter, the most important ones first.
    """

    grid: GridResult
    analysis: Analysis | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] | None = None
    layers: Mapping[int, GridResult] = field(default_factory=dict)
    comparison: LayerComparison | None = None
    cards: tuple[HeadCard, ...] = ()

    @property
    def run(self) -> Mapping[str, Any]:
        """How the run was made."""
        return self.grid.provenance if self.provenance is None else self.provenance

    @cached_property
    def singles(self) -> tuple[ConditionRecord, ...]:
        """The record of each single head of the main layer, in head order."""
        return single_records(self.grid)


def sections(report: Report) -> list[Section]:
    """All sections in reading order; a section without data is left out."""
    makers: tuple[Callable[[Report], Section | None], ...] = (
        findings,
        coverage,
        heads,
        cards,
        controls,
        layers,
        rankings,
        structure,
        maps,
        prompts,
        provenance,
    )
    return [section for make in makers if (section := make(report)) is not None]


def findings(report: Report) -> Section:
    """The claim paragraph, or the main numbers where no analysis wrote one."""
    claims = report.analysis.claims if report.analysis else ()
    paragraph = " ".join(claims or _main_numbers(report.grid))
    warning = (report.run.get("audit") or {}).get("warning")
    return Section("findings", "What was found", (warning, paragraph) if warning else (paragraph,))


def _main_numbers(grid: GridResult) -> Iterator[str]:
    (full,) = records(grid, [grid.full])
    yield (
        f"All {grid.n_heads} heads of layer {grid.settings.layer} patched at once: "
        f"KL_raw {shown(full.KL_raw_mean, 'nats')}, "
        f"KL_mapped {shown(full.KL_mapped_mean, 'nats')}, "
        f"ΔKL {shown(full.delta, 'nats')}."
    )
    reason = grid_full_effect(grid, bootstrap_of(grid)).undefined_because
    if reason is not None:
        yield f"Coverage is undefined: {reason}."
    yield "No analysis was made of this run: controls and cross-fitting are missing."


def coverage(report: Report) -> Section:
    """The table of conditions and the coverage figures."""
    grid = report.grid
    sized = [c for c in grid.conditions.values() if c.cond.startswith(("top", "rand"))]
    chosen = sorted(sized, key=lambda c: (len(c.heads), c.cond.startswith("rand"), c.cond))
    conditions = [*chosen, grid.full, *([grid.control] if grid.control else [])]
    crossed = {f"top{row.k}": row for row in (report.analysis.coverage if report.analysis else ())}
    table = Table(
        "Coverage: share of ΔKL of all heads, in percent; effects in nats; [..]: 95% intervals",
        ("condition", "k", "ΔKL", "coverage", "cross-fitted", "p, random", "heads"),
        tuple(
            _coverage_row(each, str(grid[each.cond].heads), crossed.get(each.cond))
            for each in records(grid, conditions)
        ),
        words=(6,),
    )
    return Section("coverage", "Few heads or many", (), (table,), ("coverage", "methods"))


def _or_dash(value: Estimate | None, unit: str = "") -> str:
    return "–" if value is None or value.value is None else shown(value, unit)


def _p_text(p_value: float | None) -> str:
    return "–" if p_value is None else number(p_value)


def _coverage_row(condition: ConditionRecord, heads: str, crossed: CoverageRow | None) -> Row:
    where = f" (layer {condition.layer})" if condition.cond == "ctrl_full" else ""
    return (
        condition.cond + where,
        str(len(condition.heads)),
        shown(condition.delta),
        shown(condition.coverage_pct, "%"),
        _or_dash(crossed.cross_fitted_coverage_pct if crossed else None, "%"),
        _p_text(crossed.p_value if crossed else None),
        heads,
    )


def heads(report: Report) -> Section:
    """Every head of the main layer."""
    grid, alpha = report.grid, report.grid.settings.patching.alpha
    kinds = head_kinds(grid, report.analysis)
    tests = report.analysis.tests if report.analysis else None
    p_values = {
        test.head.label: test.p_max_t
        for test in (tests.tests if tests else ())
        if test.alpha == alpha
    }
    table = Table(
        "Single heads, best first; effects in nats; p: sign-flip test at this alpha, corrected for "
        f"all tests ({tests.family if tests else 'none'})",
        ("head", "rank", "kind", "ΔKL", "KL_raw", "KL_mapped", "drop", "p"),
        tuple(
            _head_row(report.singles[head], str(rank), kinds.heads[head].kind, p_values)
            for rank, head in enumerate(grid.ranking.heads, 1)
        ),
        words=(2,),
        of_heads=True,
    )
    text = (
        f"Kinds of heads: {kinds.rule}.",
        "Choose a head here or in any figure to find it in all.",
    )
    return Section("heads", "The heads", text, (table,), ("ranking", "plane"))


def _head_row(
    single: ConditionRecord, rank: str, kind: str, p_values: Mapping[str, float | None]
) -> Row:
    label = label_of(single)
    effects = (shown(each) for each in (single.delta, single.KL_raw_mean, single.KL_mapped_mean))
    drop, p_text = f"{single.drop_pct:.3g%}", _p_text(p_values.get(label))
    return label, rank, kind, *effects, drop, p_text


def cards(report: Report) -> Section | None:
    """What single heads do in both models; the page's template shows the cards."""
    if not report.cards:
        return None
    text = (
        "What a head attends to from the decision token, what it writes to the logits, and the "
        "prompts on which it decides, in both models. Choosing a head anywhere opens its card.",
    )
    return Section("cards", "What changed in a head", text)


def controls(report: Report) -> Section | None:
    """What stands in for the map."""
    if report.analysis is None or not report.analysis.stand_ins:
        return None
    table = Table(
        "In place of the heads that changed, at strength 1; [..]: 95% intervals",
        ("stand-in", "asks", "recovered", "damage (nats)", "behind the map (nats)"),
        tuple(map(_stand_in_row, report.analysis.stand_ins)),
        long=(1,),
    )
    return Section("controls", "What stands in for the map", (), (table,))


def _stand_in_row(row: StandIn) -> Row:
    reason = f" ({row.reason})" if row.reason else ""
    effects = (_or_dash(each) for each in (row.damage, row.behind_nats))
    return row.name, row.question + reason, _or_dash(row.recovered_pct, "%"), *effects


def layers(report: Report) -> Section | None:
    """The layers beside each other."""
    if len(report.layers) < 2:
        return None
    compared = {row.layer: row for row in (report.comparison.rows if report.comparison else ())}
    table = Table(
        "All heads of a layer patched at once, nats; k90: heads that reach 90% of it; "
        "[..]: 95% intervals",
        ("layer", "KL_raw", "KL_mapped", "ΔKL", "drop", "k90", "Gini of |ΔKL|", "best head"),
        tuple(
            _layer_row(report.layers[layer], compared.get(layer)) for layer in sorted(report.layers)
        ),
    )
    figures = ("layers", "layers_ranking", "layers_coverage")
    return Section("layers", "Layers compared", (), (table,), figures)


def _layer_row(grid: GridResult, compared: LayerRow | None) -> Row:
    if compared is None:
        (full,) = records(grid, [grid.full])
        raw, mapped, delta, drop = full.KL_raw_mean, full.KL_mapped_mean, full.delta, full.drop_pct
    else:
        raw, mapped = compared.KL_raw, compared.KL_mapped
        delta, drop = compared.delta, compared.drop_pct
    best = grid.ranking_by("delta").top(1)[0]
    return (
        str(grid.settings.layer),
        *(shown(each) for each in (raw, mapped, delta)),
        _or_dash(drop, "%"),
        _or_dash(compared.curve.k90 if compared and compared.curve else None),
        _or_dash(compared.concentration.gini if compared else None),
        f"{grid.label(best)} ({number(grid.single(best).delta)})",
    )


def rankings(report: Report) -> Section | None:
    """How firm the ranking is."""
    analysis = report.analysis
    if analysis is None:
        return None
    compared = [row.agreement for row in analysis.methods if row.agreement is not None]
    agreements = [*compared, *analysis.agreement]
    tables = [_agreement_table(agreements)] if agreements else []
    if analysis.stability.heads:
        tables.append(_stability_table(report.grid, analysis.stability))
    if not tables and len(analysis.alphas) < 2:
        return None
    agreeing = (f"{name}_agreement" for name in ("methods", *AGREEMENT_KINDS))
    figures = ("alpha_flow", "alpha", "methods_flow", *agreeing)
    return Section("rankings", "How firm the ranking is", (), tuple(tables), figures)


def _agreement_table(rows: Sequence[Agreement]) -> Table:
    return Table(
        "Agreement of rankings of the same heads; [..]: 95% intervals",
        ("ranking", "and", "differ in", "Kendall's τ", "Spearman's ρ", "rank-biased overlap", ""),
        tuple(
            (
                row.first,
                row.second,
                row.kind.replace("_", " "),
                *(_or_dash(each) for each in (row.kendall, row.spearman, row.rbo)),
                row.note or "",
            )
            for row in rows
        ),
        words=(1, 2),
        long=(6,),
    )


def _stability_table(grid: GridResult, stability: RankStability, most: int = 12) -> Table:
    sizes = list(stability.heads[0].top_probability)
    return Table(
        "The best heads over resamples of the prompts: 95% range of the rank, "
        "and how often among the best k",
        ("head", "rank", "from", "to", *(f"top {k}" for k in sizes)),
        tuple(
            (
                grid.label(row.head),
                str(row.rank),
                str(row.rank_low or "–"),
                str(row.rank_high or "–"),
                *(f"{100 * row.top_probability[k]:.0f}%" for k in sizes),
            )
            for row in stability.heads[:most]
        ),
        of_heads=True,
    )


def structure(report: Report) -> Section | None:
    """Whether heads add up, and how unevenly the effect lies on them."""
    analysis = report.analysis
    if analysis is None:
        return None
    values = [
        (f"{name} of {row.scores}", value, "")
        for row in analysis.concentration
        for name, value in (
            ("Gini coefficient", row.gini),
            ("normalised entropy", row.entropy),
            ("effective number of heads", row.effective_heads),
            ("churn", row.churn),
        )
    ]
    pairs = analysis.interactions
    if pairs is not None:
        predicted = "ΔKL of all heads, predicted by singles and pairs"
        values += [
            ("sum of single-head ΔKL", pairs.sum_of_singles, "nats"),
            ("ΔKL of all heads together", pairs.joint, "nats"),
            ("their ratio (1: heads add up)", pairs.sum_over_joint, ""),
            (predicted, pairs.pairwise_prediction, "nats"),
        ]
    if not values:
        return None
    rows = tuple((name, _or_dash(value, unit)) for name, value, unit in values)
    table = Table("Concentration and interaction; [..]: 95% intervals", ("", "value"), rows)
    return Section("structure", "Do heads add up", (), (table,), ("interactions",))


def maps(report: Report) -> Section | None:
    """How good the maps are, beside simpler predictors."""
    fits = map_diagnostics(report.grid, report.run)
    if not fits:
        return None
    table = Table(
        "Mean over heads of the held-out fit; the map has to beat the other predictors",
        ("predictor", "R²", "cosine", "CKA"),
        tuple(
            (name, *(_mean([fit[key][quality] for fit in fits]) for quality in QUALITIES))
            for key, name in PREDICTORS.items()
        ),
    )
    return Section("maps", "The maps", (), (table,), ("maps",))


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(sum(known) / len(known)) if known else "undefined"


def prompts(report: Report) -> Section:
    """Prompt by prompt; the page's script lists them."""
    missing = not any(prompt in report.prompts for prompt in report.grid.prompt_ids)
    text = (NO_PROMPTS,) if missing else ()
    return Section("prompts", "Prompt by prompt", text, (), ("prompts",))


def provenance(report: Report) -> Section:
    """How the run was made and how to repeat it."""
    grid, run = report.grid, report.run
    settings = {
        **{name.replace("_", " "): value for name, value in grid.settings.to_dict().items()},
        "prompts measured": grid.n_prompts,
        "noise floor": number(grid.noise_floor_nats, "nats"),
        **_read_alike(run.get("audit")),
        **{name: run[name] for name in ("rq4lens", "device") if name in run},
    }
    rows = tuple((name, _plain_value(value)) for name, value in settings.items())
    table = Table("Settings", ("setting", "value"), rows, long=(1,))
    blocks = (("run.json", json.dumps(run, indent=1, default=str)),) if run else ()
    text = (
        "To repeat this run: rq4lens run RUN/run.json --out repeat, where RUN is the run directory "
        "this report stands in. The same settings and seeds give the same numbers.",
    )
    return Section("provenance", "How it was made", text, (table,), (), blocks)


def _read_alike(audit: Mapping[str, Any] | None) -> dict[str, Any]:
    """How many prompts both models read alike, and how many were cut."""
    if audit is None:
        return {}
    n, n_misaligned = audit.get("n", 0), audit.get("n_misaligned", 0)
    counts: dict[str, Any] = {"prompts read alike by both models": f"{n - n_misaligned} of {n}"}
    if excluded := audit.get("n_excluded"):
        counts["prompts left out because they are not"] = excluded
    cut = (audit.get("n_cut_left") or {}).items()
    return counts | {f"prompts cut on the left, {side}": n_cut for side, n_cut in cut if n_cut}


def _plain_value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
