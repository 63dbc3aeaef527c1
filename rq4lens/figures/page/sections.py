"""The sections of a report in reading order, and the second half: the study's own quantities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from rq4lens.analysis.card.fragment import card_css, card_fragment
from rq4lens.analysis.card.records import HeadCard
from rq4lens.analysis.effects.apart import PairFacts, outside_layers, weights_table
from rq4lens.analysis.effects.table import records
from rq4lens.analysis.positions import MappedPosition
from rq4lens.analysis.records import (
    Agreement,
    ConditionRecord,
    CoverageRow,
    LayerRow,
    RankStability,
)
from rq4lens.analysis.statistics.bootstrap import number_text
from rq4lens.analysis.statistics.plain import from_json
from rq4lens.figures.numbers import number
from rq4lens.figures.page.answer import controls, findings, heads
from rq4lens.figures.page.gallery import AGREEMENT_KINDS, map_diagnostics
from rq4lens.figures.page.parts import Report, Row, Section, Table, cell, cells
from rq4lens.figures.plane import PREDICTORS, QUALITIES
from rq4lens.results import GridResult

MOST_CARD_BYTES = 2_000_000
"""Of all cards of a page, which may have 8 MB with its figures."""

MOST_PROMPTS = 2_000
"""Prompts that a page lists; all of them stand in the run's ``per_prompt.parquet``."""

READ_PROMPTS = (
    "Open a prompt to read it whole, with what each model says next and what each patch does."
)
TITLE_OF_CARDS = "What changed in a head"
NO_PROMPTS = "The texts of the prompts were not given to this report; their ids and numbers were."


def sections(report: Report) -> list[Section]:
    """All sections in reading order; a section without data is left out."""
    first = (findings, heads, cards, controls, study)
    folded = (layers, positions, rankings, structure, maps, pair, prompts, provenance)
    made = [make(report) for make in first]
    made += [replace(each, folded=True) for make in folded if (each := make(report)) is not None]
    return [section for section in made if section is not None]


def cards(report: Report) -> Section | None:
    """What single heads do in both models; the page's template shows the cards."""
    if not report.cards:
        why = report.run.get("cards_reason")
        return Section("cards", TITLE_OF_CARDS, (f"There are none: {why}.",)) if why else None
    text = (
        "What a head attends to from the decision token, what it writes to the logits, and the "
        "prompts on which it decides, in both models. Choosing a head anywhere opens its card."
    )
    return Section("cards", TITLE_OF_CARDS, (text,))


def cards_section(cards: Sequence[HeadCard]) -> str:
    """The cards as HTML with its own style: folded, each under the anchor ``card-L1H0``.

    The first ones are there, the most important ones, and those that would make the page large are
    named. Every text of a prompt is escaped.
    """
    parts, left_out, size = [], [], 0
    start = Markup('<details class="card" id="card-{}" name="card"><summary>{}</summary>')
    for card in cards:
        label, kind = card.head.label, card.numbers.kind if card.numbers else None
        said = f"{label}, {kind}" if kind else label
        part = start.format(label, said) + Markup(card_fragment(card)) + Markup("</details>")
        size += len(part.encode())
        if size > MOST_CARD_BYTES:
            left_out.append(label)
        else:
            parts.append(part)
    if left_out:
        said = f"Left out, so that the page stays small: {', '.join(left_out)}; see rq4lens head."
        parts.append(Markup("<p>{}</p>").format(said))
    return Markup("<style>{}</style>\n").format(Markup(card_css())) + Markup("\n").join(parts)


def study(report: Report) -> Section:
    """The study's own quantities at its own strength: ΔKL, coverage, the plane."""
    alpha = report.grid.settings.patching.alpha
    return Section(
        "study",
        f"What the map repairs at strength {alpha:g}",
        short="The map's repair",
        sentences=report.analysis.study_claims if report.analysis else (),
        tables=(_coverage_table(report), _single_table(report)),
        figures=("alpha", "plane", "methods"),
    )


def _coverage_table(report: Report) -> Table:
    grid = report.grid
    crossed = {f"top{row.k}": row for row in (report.analysis.coverage if report.analysis else ())}
    sized = [f"top{k}" for k in grid.settings.patching.k]
    names = [*sized, "full", *(["ctrl_full"] if grid.control else [])]
    return Table(
        "Coverage: share of ΔKL of all heads; of raw: share of their KL_raw; effects in nats; "
        "[..]: 95% intervals",
        ("condition", "k", "ΔKL", "coverage", "cross-fitted", "random", "p", "of raw", "heads"),
        tuple(
            _coverage_row(report.records[name], str(grid[name].heads), crossed.get(name))
            for name in names
        ),
        words=(8,),
    )


def _coverage_row(condition: ConditionRecord, heads: str, crossed: CoverageRow | None) -> Row:
    where = f" (layer {condition.layer})" if condition.cond == "ctrl_full" else ""
    mean = crossed.random_mean_pct if crossed else None
    return (
        condition.cond + where,
        str(len(condition.heads)),
        *cells(condition, {"delta": "", "coverage_pct": "%"}),
        cell(crossed.cross_fitted_coverage_pct, "%") if crossed else "–",
        number_text(mean, ".0f%", "–"),
        _p_text(crossed.p_value if crossed else None),
        cell(condition.raw_coverage_pct, "%"),
        heads,
    )


def _p_text(p_value: float | None) -> str:
    return (
        "< 0.001" if p_value is not None and p_value < 0.001 else number_text(p_value, ".2g", "–")
    )


def _single_table(report: Report) -> Table:
    grid, alpha = report.grid, report.grid.settings.patching.alpha
    tests = report.analysis.tests if report.analysis else None
    own = [test for test in (tests.tests if tests else ()) if test.alpha == alpha]
    p_values = {test.head.label: test.p_max_t for test in own}
    rows: list[Row] = []
    for rank, head in enumerate(grid.ranking.heads, 1):
        label, effects = grid.label(head), cells(report.singles[head], EFFECTS)
        rows.append((label, str(rank), *effects, _p_text(p_values.get(label))))
    return Table(
        f"Single heads by {grid.ranking.method}; effects in nats; p: sign-flip test at this alpha, "
        f"corrected for all tests ({tests.family if tests else 'none'})",
        ("head", "rank", "ΔKL", "KL_raw", "KL_mapped", "drop", "p"),
        tuple(rows),
        of_heads=True,
    )


EFFECTS = {"delta": "", "KL_raw_mean": "", "KL_mapped_mean": "", "drop_pct": "%"}


def layers(report: Report) -> Section | None:
    """The layers beside each other."""
    if len(report.layers) < 2:
        return None
    compared = {row.layer: row for row in (report.comparison.rows if report.comparison else ())}
    table = Table(
        "All heads of a layer patched at once; effects in nats; [..]: 95% intervals",
        (
            *("layer", "undoes", "gives base", "KL_raw", "KL_mapped", "ΔKL", "drop", "k90"),
            *("Gini of |ΔKL|", "best head"),
        ),
        tuple(
            _layer_row(grid, compared.get(layer)) for layer, grid in sorted(report.layers.items())
        ),
    )
    figures = ("layers", "layers_ranking", "layers_coverage")
    return Section("layers", "Layers compared", (), (table,), figures)


def _layer_row(grid: GridResult, compared: LayerRow | None) -> Row:
    (full,) = records(grid, [grid.full])
    effects = cells(full, {"KL_raw_mean": "", "KL_mapped_mean": "", "delta": "", "drop_pct": "%"})
    if compared is not None:
        effects = cells(compared, {"KL_raw": "", "KL_mapped": "", "delta": "", "drop_pct": "%"})
    return (
        str(grid.settings.layer),
        *cells(full, {"to_base_pct": "%", "to_tuned_pct": "%"}),
        *effects,
        cell(compared.curve.k90 if compared and compared.curve else None),
        cell(compared.concentration.gini if compared else None),
        _best_head(grid),
    )


def _best_head(grid: GridResult) -> str:
    """The head that carries most; by ΔKL where shares of the gap were not measured."""
    carried = grid["none"].transfer is not None and grid.single(0).transfer is not None
    ranking = grid.ranking_by("to_base" if carried else "delta")
    score = ranking.scores[0] or 0.0
    return f"{grid.label(ranking.heads[0])} ({f'{score:.0f}%' if carried else number(score)})"


def positions(report: Report) -> Section | None:
    """What heads carry at each token."""
    if report.positions is None:
        return None
    mapped = report.positions
    table = Table(
        "All heads of the layer at one token of each prompt; effects in nats; [..]: 95% intervals",
        ("position", "usual token", "undoes", "gives base", "ΔKL", "best head"),
        tuple(_position_row(each, mapped.labels) for each in mapped.positions),
        words=(1,),
    )
    text = (
        "Counted from the decision token, which is -1. A patch at an earlier token changes "
        "everything behind it; the maps are fitted at the same token of the train prompts.",
    )
    return Section("positions", "Token by token", text, (table,), ("positions", "positions_prompt"))


def _position_row(position: MappedPosition, labels: Sequence[str]) -> Row:
    layer, *heads = position.layer_and_heads
    shares = [each.to_base_pct.value for each in heads]
    best = max(range(len(heads)), key=lambda head: shares[head] or 0.0)
    text, share = position.usual_text
    return (
        position.role,
        f"{text!r} ({100 * share:.0f}%)",
        *cells(layer, {"to_base_pct": "%", "to_tuned_pct": "%", "delta": ""}),
        "–" if shares[best] is None else f"{labels[best + 1]} ({shares[best]:.0f}%)",
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
    figures = ("alpha_flow", "methods_flow", *agreeing)
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
                *cells(row, {"kendall": "", "spearman": "", "rbo": ""}),
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
    rows = tuple((name, cell(value, unit)) for name, value, unit in values)
    table = Table("Concentration and interaction; [..]: 95% intervals", ("", "value"), rows)
    return Section("structure", "Do heads add up", (), (table,), ("interactions",))


def maps(report: Report) -> Section | None:
    """How good the maps are, beside simpler predictors."""
    fits = map_diagnostics(report.grid, report.run)
    if not fits:
        return None
    table = Table(
        "Mean over heads of the held-out fit. By R² and cosine the map has to beat the other "
        "predictors; CKA is the same for all that only rotate, scale and shift base z",
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


def pair(report: Report) -> Section | None:
    """How far apart the models are, whether they read alike, and which matrices changed."""
    if "pair" not in report.run:
        return None
    facts = from_json(PairFacts, report.run["pair"])
    matrices, rows = weights_table(facts.weights)
    caption = "How much each matrix changed, in percent of base's; (..): cosine of before and after"
    table = Table(caption, ("layer", *matrices), tuple(map(tuple, rows)))
    notes = (f"Outside the layers: {outside_layers(facts.weights)}.",) if rows else ()
    said = tuple(facts.lines)
    return Section("pair", "The pair", (), (table,) * bool(rows), sentences=said, notes=notes)


def prompts(report: Report) -> Section:
    """Prompt by prompt; the page's script lists them."""
    missing = not any(prompt in report.prompts for prompt in report.grid.prompt_ids)
    n, text = report.grid.n_prompts, [NO_PROMPTS if missing else READ_PROMPTS]
    if n > MOST_PROMPTS:
        text.append(f"The {MOST_PROMPTS:,} of {n:,} with the largest ΔKL of all heads are here.")
    return Section("prompts", "Prompt by prompt", tuple(text), (), ("prompts",))


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
    rows = tuple(
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in settings.items()
    )
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
