"""The report of a study: pairs and layers side by side, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from markupsafe import Markup
from plotly.io import to_html

from rq4lens.cluster.study_file import CELLS, Cell, StudyPlan
from rq4lens.errors import UserError
from rq4lens.figures.export import CONFIG
from rq4lens.figures.study import study_layers
from rq4lens.files import write_json_atomic, write_text_atomic
from rq4lens.layer_files import SavedLayers, read_layers
from rq4lens.tables import study_text

REPORT = "study.html"
ROWS = "study.json"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.main { font-weight: 600; }
</style>
</head>
<body>
<h1>{{ name }}</h1>
{{ figure }}
<h2>Proposed layers</h2>
<div class="wide"><table>
<tr><th>sweep</th><th>main</th><th>control</th><th>ΔKL(ALL), nats</th><th>95% CI</th>
<th>best head</th><th>prompts</th></tr>
{% for each in cells %}<tr><td><a href="{{ each.link }}">{{ each.cell }}</a></td>
<td>{{ each.main }}</td><td>{{ each.control }}</td><td>{{ each.delta }}</td>
<td>{{ each.interval }}</td><td>{{ each.best }}</td><td>{{ each.n_prompts }}</td></tr>
{% endfor %}</table></div>
<h2>Every layer</h2>
<div class="wide"><table>
<tr><th>sweep</th><th>layer</th><th>KL_raw(ALL)</th><th>KL_mapped(ALL)</th><th>ΔKL(ALL)</th>
<th>95% CI</th><th>drop</th><th>k90</th><th>Gini</th></tr>
{% for row in rows %}<tr{% if row.is_main %} class="main"{% endif %}><td>{{ row.cell }}</td>
<td>{{ row.layer }}</td><td>{{ row.KL_raw | nats }}</td><td>{{ row.KL_mapped | nats }}</td>
<td>{{ row.delta | nats }}</td><td>{{ row.delta_ci95 | bounds }}</td>
<td>{{ row.drop_pct | percent }}</td><td>{{ row.k90 | count }}</td><td>{{ row.gini | share }}</td>
</tr>
{% endfor %}</table></div>
<p>ΔKL(ALL) = KL_raw(ALL) − KL_mapped(ALL), in nats. Bold: the proposed main layer of its sweep.
Head indices mean nothing across layers or pairs: layers are compared by the effect of all their
heads, and by how concentrated it is.</p>
</body>
</html>
"""


def write_study_report(plan: StudyPlan, directory: Path) -> str:
    """Write the page and its numbers.

    Args:
        plan: the study; every cell is finished.
        directory: the study's directory.

    Returns:
        What the console prints.

    Raises:
        UserError: if a cell has no results, or they are damaged.
    """
    found = {cell.name: _read(cell, directory) for cell in plan.cells}
    rows = [row for name, saved in found.items() for row in _rows(name, saved)]
    cells = [_summary(name, saved) for name, saved in found.items()]
    setting = _setting(plan, found)
    write_json_atomic(directory / ROWS, {"name": plan.name, "cells": cells, "layers": rows})
    write_text_atomic(directory / REPORT, _page(plan.name, setting, rows, cells))
    return study_text(plan.name, cells)


def _read(cell: Cell, directory: Path) -> SavedLayers:
    saved = read_layers(cell.directory(directory))
    if saved is None:
        raise UserError(f"{cell.name!r} has no results yet: run the study again to finish it.")
    return saved


def _rows(name: str, saved: SavedLayers) -> list[dict[str, Any]]:
    any_grid = next(iter(saved.grids.values()))
    main = saved.choice["main"]
    return [
        {
            "cell": name,
            "layer": row["layer"],
            "n_layers": any_grid.settings.n_layers,
            **{each: row[each] for each in ("KL_raw", "KL_mapped", "delta", "delta_ci95")},
            "drop_pct": row["drop_pct"],
            "k90": (row["curve"] or {}).get("k90"),
            "gini": row["concentration"]["gini"],
            "is_main": row["layer"] == main,
        }
        for row in saved.comparison["rows"]
    ]


def _summary(name: str, saved: SavedLayers) -> dict[str, Any]:
    main, control = saved.choice["main"], saved.choice["control"]
    row = next((each for each in saved.comparison["rows"] if each["layer"] == main), None)
    ranking = saved.comparison["ranking"]
    return {
        "cell": name,
        "main": main,
        "control": control,
        "delta": None if row is None else row["delta"],
        "delta_ci95": None if row is None else row["delta_ci95"],
        "best": ranking[0]["head"] if ranking else None,
        "n_prompts": next(iter(saved.grids.values())).n_prompts,
        "reasons": list(saved.choice["reasons"]),
    }


def _setting(plan: StudyPlan, found: Mapping[str, SavedLayers]) -> list[str]:
    settings = [grid.settings for saved in found.values() for grid in saved.grids.values()]
    kinds = sorted({each.map_kind for each in settings})
    alphas = sorted({each.alpha for each in settings})
    return [
        plan.name,
        f"{len(found)} sweeps",
        f"α = {', '.join(f'{alpha:g}' for alpha in alphas)}",
        f"map {', '.join(kinds)}",
        f"KL({', '.join(sorted({each.kl_direction for each in settings}))}) in nats",
        ", ".join(sorted({each.dtype for each in settings})),
    ]


def _page(
    name: str,
    setting: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
) -> str:
    # Everything that is not the drawing is escaped; the drawing escapes its own texts.
    environment = Environment(autoescape=True)
    environment.filters |= {
        "nats": _nats,
        "bounds": _bounds,
        "percent": lambda value: "undefined" if value is None else f"{value:.1f}%",
        "count": lambda value: "—" if value is None else f"{value:.0f}",
        "share": lambda value: "—" if value is None else f"{value:.2f}",
    }
    figure = to_html(
        study_layers(rows, setting),
        config=CONFIG,
        full_html=False,
        include_plotlyjs=True,
        include_mathjax=False,
        div_id="study_layers",
    )
    return environment.from_string(_PAGE).render(
        name=name, figure=Markup(figure), rows=rows, cells=list(map(_shown, cells))
    )


def _shown(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's row of the first table, as text."""
    return {
        **cell,
        "link": quote(f"{CELLS}/{cell['cell']}/"),
        "main": _or_none(cell["main"]),
        "control": _or_none(cell["control"]),
        "delta": _nats(cell["delta"]),
        "interval": _bounds(cell["delta_ci95"]),
        "best": _or_none(cell["best"]),
    }


def _nats(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.6f}"


def _bounds(interval: Sequence[float] | None) -> str:
    return "—" if interval is None else f"{interval[0]:.6f} to {interval[1]:.6f}"


def _or_none(value: object) -> str:
    return "none" if value is None else str(value)
