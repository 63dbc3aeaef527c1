"""The sections of a report: what is said, and which table and figure stands where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rq4lens.analysis.effects.table import bootstrap_of, grid_full_effect
from rq4lens.analysis.statistics.bootstrap import Bootstrap, Estimate
from rq4lens.figures.numbers import (
    ConditionNumbers,
    head_kinds,
    number,
    numbers_of,
    shown,
    single_head_numbers,
)
from rq4lens.figures.page.parts import Block, Row, Section, Table
from rq4lens.figures.saved import Record, estimate
from rq4lens.results import GridResult

NO_PROMPTS = "The texts of the prompts were not given to this report; their ids and numbers were."


@dataclass(frozen=True)
class Material:
    """What a report is made from.

    Args:
        grid: the measured grid.
        analysis: the content of ``analysis.json``; empty without an analysis.
        provenance: the content of ``run.json``.
        layers: the grid of each layer; empty without a sweep.
        comparison: the analysis' comparison of these layers; empty without one.
        texts: the prompts' texts by id, as far as given.
    """

    grid: GridResult
    analysis: Record
    provenance: Mapping[str, Any]
    layers: Mapping[int, GridResult]
    comparison: Record
    texts: Mapping[str, str]

    @cached_property
    def bootstrap(self) -> Bootstrap:
        """The resamples behind every interval of the report."""
        return bootstrap_of(self.grid)

    @cached_property
    def heads(self) -> list[ConditionNumbers]:
        """The numbers of each single head of the main layer, in head order."""
        return single_head_numbers(self.grid, self.bootstrap)


def sections(material: Material) -> list[Section]:
    """All sections in reading order; a section without data is left out."""
    makers: tuple[Callable[[Material], Section | None], ...] = (
        findings,
        coverage,
        heads,
        controls,
        layers,
        rankings,
        structure,
        maps,
        prompts,
        provenance,
    )
    return [section for make in makers if (section := make(material)) is not None]


def findings(material: Material) -> Section:
    """The claim paragraph, or the main numbers where no analysis wrote one."""
    said = material.analysis.get("claims") or ()
    sentences = (said,) if isinstance(said, str) else tuple(said)
    paragraph = " ".join(sentences) if sentences else " ".join(_main_numbers(material))
    audit = material.provenance.get("audit")
    warning = audit.get("warning") if isinstance(audit, Mapping) else None
    warnings = (str(warning),) if warning else ()
    return Section("findings", "What was found", (*warnings, paragraph))


def _main_numbers(material: Material) -> Iterator[str]:
    grid = material.grid
    full = numbers_of(grid, [grid.full], ["all"], material.bootstrap)[0]
    yield (
        f"All {grid.n_heads} heads of layer {grid.settings.layer} patched at once: "
        f"KL_raw {shown(full.KL_raw, 'nats')}, KL_mapped {shown(full.KL_mapped, 'nats')}, "
        f"ΔKL {shown(full.delta, 'nats')}."
    )
    reason = grid_full_effect(grid, material.bootstrap).undefined_because
    if reason is not None:
        yield f"Coverage is undefined: {reason}."
    yield "No analysis was made of this run: controls and cross-fitting are missing."


def coverage(material: Material) -> Section:
    """The table of conditions and the coverage figures."""
    grid = material.grid
    sized = [c for c in grid.conditions.values() if c.cond.startswith(("top", "rand"))]
    chosen = sorted(sized, key=lambda c: (len(c.heads), c.cond.startswith("rand"), c.cond))
    conditions = [*chosen, grid.full, *([grid.control] if grid.control else [])]
    names = [condition.cond for condition in conditions]
    crossed = {f"top{row['k']}": row for row in material.analysis.get("coverage", ())}
    numbers = numbers_of(grid, conditions, names, material.bootstrap)
    table = Table(
        "Coverage: share of ΔKL of all heads, in percent; effects in nats; [..]: 95% intervals",
        ("condition", "k", "ΔKL", "coverage", "cross-fitted", "p, random", "heads"),
        tuple(_coverage_row(each, crossed.get(each.label, {})) for each in numbers),
        words=frozenset({6}),
    )
    return Section("coverage", "Few heads or many", (), (table,), ("coverage", "methods"))


def _coverage_row(numbers: ConditionNumbers, crossed: Record) -> Row:
    heads = numbers.condition.heads
    return Row(
        (
            f"{numbers.label} (layer {numbers.condition.layer})"
            if numbers.label == "ctrl_full"
            else numbers.label,
            str(len(heads)),
            shown(numbers.delta, ""),
            shown(numbers.coverage_pct, "%"),
            _or_dash(estimate(crossed, "cross_fitted_coverage_pct"), "%"),
            number(crossed["p_value"]) if crossed.get("p_value") is not None else "–",
            str(heads),
        )
    )


def _or_dash(value: Estimate, unit: str) -> str:
    return "–" if value.value is None else shown(value, unit)


def heads(material: Material) -> Section:
    """Every head of the main layer."""
    grid, analysis = material.grid, material.analysis
    kinds, rule = head_kinds(grid, analysis, material.bootstrap)
    tested, alpha = analysis.get("tests", {}), grid.settings.patching.alpha
    tests = {row["head"]: row for row in tested.get("tests", ()) if row["alpha"] == alpha}
    table = Table(
        "Single heads, best first; effects in nats; p: sign-flip test at this alpha, corrected for "
        f"all tests ({tested.get('family', 'none')})",
        ("head", "rank", "kind", "ΔKL", "KL_raw", "KL_mapped", "drop", "p"),
        tuple(
            _head_row(material.heads[head], rank, kinds[head], tests)
            for rank, head in enumerate(grid.ranking.heads, 1)
        ),
        words=frozenset({2}),
    )
    text = (f"Kinds of heads: {rule}.", "Choose a head here or in any figure to find it in all.")
    return Section("heads", "The heads", text, (table,), ("ranking", "plane"))


def _head_row(numbers: ConditionNumbers, rank: int, kind: str, tests: Mapping[str, Record]) -> Row:
    p_value = tests.get(numbers.label, {}).get("p_max_t")
    return Row(
        (
            numbers.label,
            str(rank),
            kind,
            shown(numbers.delta, ""),
            shown(numbers.KL_raw, ""),
            shown(numbers.KL_mapped, ""),
            shown(numbers.drop_pct, "%") if numbers.drop_pct.value is not None else "undefined",
            "–" if p_value is None else number(p_value),
        ),
        head=numbers.label,
    )


def controls(material: Material) -> Section | None:
    """Does the claim survive its controls?"""
    rows = material.analysis.get("controls") or ()
    table = Table(
        "Difference: reference minus control; [..]: 95% intervals",
        ("control", "asks", "survives?", "difference", "reference", "control", "unit"),
        tuple(_control_row(row) for row in rows),
        words=frozenset({2, 6}),
        long=frozenset({1}),
    )
    return Section("controls", "Controls", (), (table,)) if rows else None


def _control_row(row: Record) -> Row:
    verdict = {True: "yes", False: "no", None: "no verdict"}[row.get("survives")]
    values = (estimate(row, name) for name in ("difference", "reference", "value"))
    cells = (_or_dash(value, "") for value in values)
    reason = f" ({row['reason']})" if row.get("reason") else ""
    return Row((row["name"], row["question"] + reason, verdict, *cells, row["unit"]))


def layers(material: Material) -> Section | None:
    """The layers beside each other."""
    if len(material.layers) < 2:
        return None
    compared = {row["layer"]: row for row in material.comparison.get("rows", ())}
    table = Table(
        "All heads of a layer patched at once, nats; k90: heads that reach 90% of it; "
        "[..]: 95% intervals",
        ("layer", "KL_raw", "KL_mapped", "ΔKL", "drop", "k90", "Gini of |ΔKL|", "best head"),
        tuple(
            _layer_row(material.layers[layer], compared.get(layer, {}))
            for layer in sorted(material.layers)
        ),
    )
    figures = ("layers", "layers_ranking", "layers_coverage")
    return Section("layers", "Layers compared", (), (table,), figures)


def _layer_row(grid: GridResult, compared: Record) -> Row:
    full = numbers_of(grid, [grid.full], ["full"])[0]
    best = grid.ranking_by("delta").top(1)[0]
    return Row(
        (
            str(grid.settings.layer),
            shown(full.KL_raw, ""),
            shown(full.KL_mapped, ""),
            shown(full.delta, ""),
            _or_dash(full.drop_pct, "%"),
            _or_dash(estimate(compared.get("curve") or {}, "k90"), ""),
            _or_dash(estimate(compared.get("concentration", {}), "gini"), ""),
            f"{grid.label(best)} ({number(grid.single(best).delta)})",
        )
    )


def rankings(material: Material) -> Section | None:
    """How firm the ranking is."""
    analysis = material.analysis
    agreements = [
        *(row["agreement"] for row in analysis.get("methods", ()) if row.get("agreement")),
        *analysis.get("agreement", ()),
    ]
    tables = [_agreement_table(agreements)] if agreements else []
    if analysis.get("stability"):
        tables.append(_stability_table(material))
    figures = (
        "alpha_flow",
        "alpha",
        "methods_flow",
        "methods_agreement",
        "map_kind_agreement",
        "metric_agreement",
        "fold_agreement",
        "seed_agreement",
    )
    if not tables and len(analysis.get("alphas", ())) < 2:
        return None
    return Section("rankings", "How firm the ranking is", (), tuple(tables), figures)


def _agreement_table(rows: Sequence[Record]) -> Table:
    def cells(row: Record) -> Iterator[str]:
        yield from (row["first"], row["second"], row["kind"].replace("_", " "))
        for name in ("kendall", "spearman", "rbo"):
            yield _or_dash(estimate(row, name), "")
        yield row.get("note") or ""

    return Table(
        "Agreement of rankings of the same heads; [..]: 95% intervals",
        ("ranking", "and", "differ in", "Kendall's τ", "Spearman's ρ", "rank-biased overlap", ""),
        tuple(Row(tuple(cells(row))) for row in rows),
        words=frozenset({1, 2}),
        long=frozenset({6}),
    )


def _stability_table(material: Material, most: int = 12) -> Table:
    rows = material.analysis["stability"]["heads"][:most]
    sizes = list(rows[0]["top_probability"])
    return Table(
        "The best heads over resamples of the prompts: 95% range of the rank, "
        "and how often among the best k",
        ("head", "rank", "from", "to", *(f"top {k}" for k in sizes)),
        tuple(
            Row(
                (
                    material.grid.label(row["head"]),
                    str(row["rank"]),
                    str(row["rank_low"] or "–"),
                    str(row["rank_high"] or "–"),
                    *(f"{100 * row['top_probability'][k]:.0f}%" for k in sizes),
                ),
                head=material.grid.label(row["head"]),
            )
            for row in rows
        ),
    )


def structure(material: Material) -> Section | None:
    """Whether heads add up, and how unevenly the effect lies on them."""
    analysis = material.analysis
    rows = [
        Row((f"{name} of {row['scores']}", _or_dash(estimate(row, key), "")))
        for row in analysis.get("concentration", ())
        for key, name in (
            ("gini", "Gini coefficient"),
            ("entropy", "normalised entropy"),
            ("effective_heads", "effective number of heads"),
            ("churn", "churn"),
        )
    ]
    pairs = analysis.get("interactions") or {}
    rows += [
        Row((name, _or_dash(estimate(pairs, key), unit)))
        for key, name, unit in (
            ("sum_of_singles", "sum of single-head ΔKL", "nats"),
            ("joint", "ΔKL of all heads together", "nats"),
            ("sum_over_joint", "their ratio (1: heads add up)", ""),
            ("pairwise_prediction", "ΔKL of all heads, predicted by singles and pairs", "nats"),
        )
        if key in pairs
    ]
    if not rows:
        return None
    table = Table("Concentration and interaction; [..]: 95% intervals", ("", "value"), tuple(rows))
    return Section("structure", "Do heads add up", (), (table,), ("interactions",))


def maps(material: Material) -> Section | None:
    """How good the maps are, beside simpler predictors."""
    fitted = material.provenance.get("maps", {}).get(str(material.grid.settings.layer), {})
    rows = fitted.get("diagnostics") or ()
    if not rows:
        return None
    table = Table(
        "Mean over heads of the held-out fit; the map has to beat the other predictors",
        ("predictor", "R²", "cosine", "CKA"),
        tuple(
            Row((name, *(_mean([row[key][q] for row in rows]) for q in ("r2", "cosine", "cka"))))
            for key, name in (
                ("fitted", "the map"),
                ("mean", "always the mean"),
                ("identity", "base z itself"),
                ("shuffled", "map of shuffled pairs"),
            )
        ),
    )
    return Section("maps", "The maps", (), (table,), ("maps",))


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(sum(known) / len(known)) if known else "undefined"


def prompts(material: Material) -> Section:
    """Prompt by prompt; the page's script lists them."""
    missing = not any(prompt in material.texts for prompt in material.grid.prompt_ids)
    text = (NO_PROMPTS,) if missing else ()
    return Section("prompts", "Prompt by prompt", text, (), ("prompts",))


def provenance(material: Material) -> Section:
    """How the run was made and how to repeat it."""
    settings = material.grid.settings.to_dict()
    rows = [Row((name.replace("_", " "), _plain_value(value))) for name, value in settings.items()]
    rows.append(Row(("prompts measured", str(material.grid.n_prompts))))
    rows.append(Row(("noise floor", number(material.grid.noise_floor_nats, "nats"))))
    run = material.provenance
    rows += list(_audit_rows(run.get("audit")))
    rows += [Row((name, str(run[name]))) for name in ("rq4lens", "device") if name in run]
    table = Table("Settings", ("setting", "value"), tuple(rows), long=frozenset({1}))
    blocks = (Block("run.json", json.dumps(run, indent=1, default=str)),) if run else ()
    text = (
        "To repeat this run: rq4lens run RUN/run.json --out repeat, where RUN is the run directory "
        "this report stands in. The same settings and seeds give the same numbers.",
    )
    return Section("provenance", "How it was made", text, (table,), (), blocks)


def _audit_rows(audit: Any) -> Iterator[Row]:
    """How many prompts both models read alike, and how many were cut."""
    if not isinstance(audit, Mapping):
        return
    n, n_misaligned = audit.get("n", 0), audit.get("n_misaligned", 0)
    yield Row(("prompts read alike by both models", f"{n - n_misaligned} of {n}"))
    if excluded := audit.get("n_excluded"):
        yield Row(("prompts left out because they are not", str(excluded)))
    for side, cut in (audit.get("n_cut_left") or {}).items():
        if cut:
            yield Row((f"prompts cut on the left, {side}", str(cut)))


def _plain_value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
