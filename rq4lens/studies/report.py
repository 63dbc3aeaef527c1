"""The report of a study: pairs and layers side by side, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from markupsafe import Markup
from rich.text import Text

from rq4lens.analysis.effects.table import bootstrap_of
from rq4lens.analysis.records import StudyRow
from rq4lens.analysis.saved import SavedLayers, read_layers
from rq4lens.analysis.statistics.bootstrap import Estimate, number_text, undefined
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.analysis.structure.layers import Metric
from rq4lens.disk.files import write_json_atomic, write_text_atomic
from rq4lens.errors import UserError
from rq4lens.figures.export import html_page, html_part
from rq4lens.figures.layers import study_layers
from rq4lens.screen.tables import columns, text_of
from rq4lens.studies.file import CELLS, Cell, StudyPlan

REPORT = "study.html"
ROWS = "study.json"
NO_MAIN = "the sweep proposes no main layer"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.main { font-weight: 600; }
"""
_BODY = """<h1>{{ name }}</h1>
{{ figure }}
<h2>Proposed layers</h2>
<div class="wide"><table>
<tr><th>sweep</th><th>main</th><th>control</th><th>{{ lead.label }}(ALL), {{ lead.unit }}</th>
<th>95% CI</th><th>best head</th><th>prompts</th></tr>
{% for each in cells %}<tr><td><a href="{{ each.link }}">{{ each.cell }}</a></td>
<td>{{ each.main }}</td><td>{{ each.control }}</td><td>{{ each | value(lead) }}</td>
<td>{{ each | bounds(lead) }}</td><td>{{ each.best }}</td><td>{{ each.n_prompts }}</td></tr>
{% endfor %}</table></div>
<h2>Every layer</h2>
<div class="wide"><table>
<tr><th>sweep</th><th>layer</th>{% for metric in metrics %}<th>{{ metric.label }}(ALL)</th>
<th>95% CI</th>{% endfor %}<th>k90</th><th>Gini</th></tr>
{% for row in rows %}<tr{% if row.is_main %} class="main"{% endif %}><td>{{ row.cell }}</td>
<td>{{ row.layer }}</td>{% for metric in metrics %}<td>{{ row | value(metric) }}</td>
<td>{{ row | bounds(metric) }}</td>{% endfor %}<td>{{ row.k90 | count }}</td>
<td>{{ row.gini | share }}</td></tr>
{% endfor %}</table></div>
<p>{% for metric in metrics %}{{ metric.label }}: {{ metric.meaning }}, in {{ metric.unit }}.
{% endfor %}The best head is the one with the largest {{ lead.label }} of all single heads. Main and
control layers are proposed by ΔKL(ALL), whatever is compared; k90 is of the coverage curve of the
layer's own ranking, Gini of its single-head |ΔKL|. Bold: the proposed main layer of its sweep.
Head indices mean nothing across layers or pairs: layers are compared by the effect of all their
heads, and by how concentrated it is.</p>"""


@dataclass(frozen=True)
class StudyCell:
    """One cell: the layers it proposes, and what they do.

    Args:
        cell: name of the cell.
        main: the proposed main layer.
        control: the proposed control layer.
        values: what is compared, by metric, of the main layer.
        best: the head with the largest first metric.
        n_prompts: measured prompts.
        reasons: why these layers.
    """

    cell: str
    main: int | None
    control: int | None
    values: Mapping[str, Estimate]
    best: str | None
    n_prompts: int
    reasons: tuple[str, ...]

    @property
    def link(self) -> str:
        """Where its files are."""
        return quote(f"{CELLS}/{self.cell}/")


def flat(record: StudyRow | StudyCell) -> dict[str, Any]:
    """A record of ``study.json``, whose values stand beside its other keys."""
    plain = {**vars(record), **record.values}
    del plain["values"]
    flat: dict[str, Any] = to_json(plain)
    return flat


def write_study_report(plan: StudyPlan, directory: Path) -> str:
    """Write the page and its numbers.

    Raises:
        UserError: if a cell has no results, or they are damaged.
    """
    found = {cell: _read(cell, directory) for cell in plan.cells}
    rows = [row for cell, saved in found.items() for row in _rows(cell, saved, plan.metrics)]
    cells = [_summary(cell, saved, plan.metrics, rows) for cell, saved in found.items()]
    record = {
        "name": plan.name,
        "metrics": [metric.name for metric in plan.metrics],
        "cells": list(map(flat, cells)),
        "layers": list(map(flat, rows)),
    }
    write_json_atomic(directory / ROWS, record)
    setting = _setting(plan, list(found.values()))
    write_text_atomic(directory / REPORT, _page(plan, setting, rows, cells))
    return study_text(plan.name, cells, plan.metrics[0])


def study_text(name: str, cells: Sequence[StudyCell], metric: Metric) -> str:
    """A study as plain text: a row per sweep with the layers it proposes."""
    table = columns("sweep", "main", "control", f"{metric.label}(ALL)", "95% CI", "best head")
    for cell in cells:
        estimate = cell.values[metric.name]
        table.add_row(
            cell.cell,
            *(str(layer).lower() for layer in (cell.main, cell.control)),
            "-" if estimate.value is None else metric.text(estimate.value),
            _ends(estimate, metric, "-", "[{}, {}]"),
            str(cell.best),
        )
    return text_of([Text(f"{name}: {len(cells)} sweeps"), table])


def _ends(estimate: Estimate, metric: Metric, absent: str, form: str) -> str:
    ends = estimate.interval
    return absent if ends is None else form.format(*map(metric.text, ends.pair))


def _read(cell: Cell, directory: Path) -> SavedLayers:
    saved = read_layers(cell.directory(directory))
    if saved is None:
        raise UserError(f"{cell.name!r} has no results yet: run the study again to finish it.")
    return saved


def _rows(cell: Cell, saved: SavedLayers, metrics: Sequence[Metric]) -> list[StudyRow]:
    any_grid = next(iter(saved.grids.values()))
    bootstrap = bootstrap_of(any_grid)
    return [
        StudyRow(
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
    cell: Cell, saved: SavedLayers, metrics: Sequence[Metric], rows: Sequence[StudyRow]
) -> StudyCell:
    no_main = dict.fromkeys((metric.name for metric in metrics), undefined(NO_MAIN))
    best = metrics[0].best_head(saved.grids)
    return StudyCell(
        cell=cell.name,
        main=saved.choice.main,
        control=saved.choice.control,
        values=next((row.values for row in rows if row.cell == cell.name and row.is_main), no_main),
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


def _shown(value: object) -> object:
    return "none" if value is None else value


def _page(
    plan: StudyPlan,
    setting: Sequence[str],
    rows: Sequence[StudyRow],
    cells: Sequence[StudyCell],
) -> str:
    # Everything that is not the drawing is escaped; the drawing escapes its own texts.
    environment = Environment(autoescape=True, finalize=_shown)
    environment.filters |= {
        "value": lambda row, metric: metric.text(row.values[metric.name].value),
        "bounds": lambda row, metric: _ends(row.values[metric.name], metric, "—", "{} to {}"),
        "count": lambda value: number_text(value, ".0f", "—"),
        "share": lambda value: number_text(value, ".2f", "—"),
    }
    figure = html_part(study_layers(rows, setting, plan.metrics), "study_layers")
    body = environment.from_string(_BODY).render(
        name=plan.name,
        figure=Markup(figure),
        rows=rows,
        cells=cells,
        metrics=plan.metrics,
        lead=plan.metrics[0],
    )
    return html_page(plan.name, _STYLE, body)
