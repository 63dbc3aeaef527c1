"""The report of a study: pairs and layers side by side, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.text import Text

from rq4lens.analysis.effects.table import bootstrap_of
from rq4lens.analysis.records import CellRow
from rq4lens.analysis.saved import SavedLayers, read_layers
from rq4lens.analysis.statistics.bootstrap import Estimate, number_text, undefined
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.analysis.structure.layers import GridNumber
from rq4lens.disk.files import write_json_atomic, write_text_atomic
from rq4lens.errors import UserError
from rq4lens.figures.layers import study_layers
from rq4lens.figures.page.parts import Page, Section, Table, TableEntry, Tile
from rq4lens.figures.page.parts import cell as table_cell
from rq4lens.figures.page.report import html_of
from rq4lens.results import TRANSFERS
from rq4lens.screen.terminal import table_of, text_of
from rq4lens.studies.file import CELLS, Cell, StudyPlan

REPORT = "study.html"
ROWS = "study.json"
MOST_TILES = 3
NO_MAIN = "the sweep proposes no main layer"
GAPS = ("gap_base_nats", "gap_tuned_nats")


@dataclass(frozen=True)
class CellSummary:
    """One cell: the layers it proposes, why, and what the main layer does, by metric.

    ``values`` are the metrics and both gaps, ``best`` is the head with the largest first metric.
    """

    cell: str
    main: int | None
    control: int | None
    values: Mapping[str, Estimate]
    best: str | None
    n_prompts: int
    reasons: tuple[str, ...]


def flat(record: CellRow | CellSummary) -> dict[str, Any]:
    """A record of ``study.json``, whose values stand beside its other keys."""
    plain = {**vars(record), **record.values}
    del plain["values"]
    flat: dict[str, Any] = to_json(plain)
    return flat


def write_study_report(plan: StudyPlan, directory: Path) -> str:
    """Write the page and its numbers."""
    found = {}
    for cell in plan.cells:
        saved = read_layers(cell.directory(directory))
        if saved is None:
            raise UserError(f"{cell.name!r} has no results yet: run the study again to finish it.")
        found[cell] = saved
    rows = [row for cell, saved in found.items() for row in _rows(cell, saved, plan.metrics)]
    # Those last that are undefined in every layer.
    metrics = sorted(
        plan.metrics, key=lambda each: all(row.values[each.name].value is None for row in rows)
    )
    cells = [_summary(cell, saved, metrics, rows) for cell, saved in found.items()]
    record = {
        "name": plan.name,
        "metrics": [metric.name for metric in metrics],
        "cells": list(map(flat, cells)),
        "layers": list(map(flat, rows)),
    }
    write_json_atomic(directory / ROWS, record)
    setting = _setting(plan, list(found.values()))
    sections = (_findings(cells, metrics[0]), _every_layer(rows, metrics))
    figures = {"layers": study_layers(rows, setting, metrics)}
    page = Page(f"rq4lens: {plan.name}", setting, sections, figures)
    write_text_atomic(directory / REPORT, html_of(page))
    return study_text(plan.name, cells, metrics)


def study_text(name: str, cells: Sequence[CellSummary], metrics: Sequence[GridNumber]) -> str:
    """A study as plain text: a row per sweep with the gap and the layers it proposes."""
    shown = [metric for metric in metrics if metric.ranks in TRANSFERS or metric is metrics[0]]
    named = (column for metric in shown for column in (f"{metric.label}(ALL)", "95% CI"))
    titles = ("sweep", "gap (nats)", "95% CI", "main", "control", *named, "best head")
    table = table_of(titles, no_wrap=True)
    for cell in cells:
        gap = cell.values[GAPS[0]]
        table.add_row(
            cell.cell,
            number_text(gap.value, ".3g", "-"),
            "-" if gap.interval is None else f"{gap.interval:.3g}",
            *(str(layer).lower() for layer in (cell.main, cell.control)),
            *(text for metric in shown for text in _texts(cell.values[metric.name], metric)),
            str(cell.best),
        )
    return text_of([Text(f"{name}: {len(cells)} sweeps"), table])


def _texts(estimate: Estimate, metric: GridNumber) -> tuple[str, str]:
    value = "-" if estimate.value is None else metric.text(estimate.value)
    ends = estimate.interval
    return value, "-" if ends is None else "[{}, {}]".format(*map(metric.text, ends))


def _rows(cell: Cell, saved: SavedLayers, metrics: Sequence[GridNumber]) -> list[CellRow]:
    any_grid = next(iter(saved.grids.values()))
    bootstrap = bootstrap_of(any_grid)
    return [
        CellRow(
            cell=cell.name,
            layer=row.layer,
            n_layers=any_grid.settings.n_layers,
            values={
                metric.name: metric.of_layer(row, saved.grids[row.layer], bootstrap)
                for metric in metrics
            },
            k90=None if row.curve is None else row.curve.k90.value,
            gini=row.concentration.gini.value,
            is_main=row.layer == saved.choice.main,
        )
        for row in saved.comparison.rows
    ]


def _summary(
    cell: Cell, saved: SavedLayers, metrics: Sequence[GridNumber], rows: Sequence[CellRow]
) -> CellSummary:
    no_main = dict.fromkeys((metric.name for metric in metrics), undefined(NO_MAIN))
    best = metrics[0].best_head(saved.grids)
    main = next((row.values for row in rows if row.cell == cell.name and row.is_main), no_main)
    gap = saved.comparison.gap
    return CellSummary(
        cell=cell.name,
        main=saved.choice.main,
        control=saved.choice.control,
        values={**dict(zip(GAPS, (gap.base_nats, gap.tuned_nats), strict=True)), **main},
        best=None if best is None else best.label,
        n_prompts=next(iter(saved.grids.values())).n_prompts,
        reasons=saved.choice.reasons,
    )


def _setting(plan: StudyPlan, found: Sequence[SavedLayers]) -> list[str]:
    settings = [grid.settings for saved in found for grid in saved.grids.values()]
    kinds = sorted({each.patching.map_kind for each in settings})
    alphas = sorted({each.patching.alpha for each in settings})
    return [
        plan.name,
        f"{len(found)} sweeps",
        f"α = {', '.join(f'{alpha:g}' for alpha in alphas)}",
        f"map {', '.join(kinds)}",
        f"KL({', '.join(sorted({each.patching.kl_direction for each in settings}))}) in nats",
        ", ".join(sorted({each.dtype for each in settings})),
    ]


# The page


def _findings(cells: Sequence[CellSummary], lead: GridNumber) -> Section:
    """A headline, the sweeps with the largest effects, and what each sweep proposes."""
    largest = sorted(cells, key=lambda each: -(each.values[lead.name].value or 0.0))
    proposing = [each for each in largest if each.main is not None]
    none = len(cells) - len(proposing)
    advice = f"{none} of {len(cells)} sweeps propose no main layer. {NEXT}"
    return Section(
        "findings",
        _headline(proposing, lead),
        short="The answer",
        sentences=tuple(f"{each.cell}: {'; '.join(each.reasons)}." for each in cells),
        tiles=tuple(_tile(each, lead) for each in proposing[:MOST_TILES]),
        tables=(_proposed(cells, lead),),
        figures=("layers",),
        notes=(*([advice] if none else ()), NOTE),
    )


NEXT = "Look at more layers, more prompts, or prompts on which the models answer differently."
NOTE = (
    "Head indices mean nothing across layers or pairs: layers are compared by the effect of all "
    "their heads, and by how concentrated it is."
)


def _headline(proposing: Sequence[CellSummary], lead: GridNumber) -> str:
    if not proposing:
        return "No sweep proposes a main layer"
    where = {each.main for each in proposing}
    if len(where) == 1 < len(proposing):
        return f"Layer {where.pop()} carries most in each of {len(proposing)} sweeps"
    first = proposing[0]
    return f"{lead.label} is largest in layer {first.main} of {first.cell}"


def _tile(cell: CellSummary, lead: GridNumber) -> Tile:
    best = TableEntry(cell.best or "–")
    numbers = {f"{lead.label}": _entry(cell.values[lead.name], lead), "best head": best}
    return Tile(cell.cell, numbers, f"layer {cell.main}")


def _proposed(cells: Sequence[CellSummary], lead: GridNumber) -> Table:
    return Table(
        f"What each sweep proposes; {lead.label}: of all heads of its main layer, {lead.meaning}; "
        "[..]: 95% intervals",
        (
            "sweep",
            "gap (nats)",
            "main layer",
            "control layer",
            _heading(lead),
            "best head",
            "prompts",
        ),
        tuple(
            (
                TableEntry(each.cell, link=quote(f"{CELLS}/{each.cell}/")),
                table_cell(each.values[GAPS[0]], ""),
                *("none" if layer is None else str(layer) for layer in (each.main, each.control)),
                _entry(each.values[lead.name], lead),
                each.best or "–",
                str(each.n_prompts),
            )
            for each in cells
        ),
    )


def _every_layer(rows: Sequence[CellRow], metrics: Sequence[GridNumber]) -> Section:
    """Every layer of every sweep, in a table that stays folded."""
    meanings = "; ".join(f"{metric.label}: {metric.meaning}" for metric in metrics)
    table = Table(
        f"All heads of a layer patched at once; {meanings}; [..]: 95% intervals",
        ("sweep", "layer", *map(_heading, metrics), "k90", "Gini of |ΔKL|", "proposed"),
        tuple(
            (
                row.cell,
                str(row.layer),
                *(_entry(row.values[metric.name], metric) for metric in metrics),
                number_text(row.k90, ".0f", "–"),
                number_text(row.gini, ".2f", "–"),
                "main" if row.is_main else "",
            )
            for row in rows
        ),
    )
    return Section("layers", "Every layer", tables=(table,), folded=True)


def _heading(metric: GridNumber) -> str:
    return f"{metric.label} (nats)" if metric.unit == "nats" else metric.label


def _entry(estimate: Estimate, metric: GridNumber) -> TableEntry:
    return table_cell(estimate, metric.unit if metric.unit == "%" else "")
