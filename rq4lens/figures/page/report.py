"""One file to read a run in: claims, tables, linked figures, prompts, provenance; no network.

Every text is escaped by jinja2 or written by the page's script as text. Scripts run only if their
hash stands in the page's content security policy, so that nothing in a prompt could run even if it
became markup.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rq4lens.disk.files import make_directory, write_text_atomic
from rq4lens.figures import theme
from rq4lens.figures.export import CONFIG
from rq4lens.figures.numbers import grid_setting, shown
from rq4lens.figures.page.gallery import run_figures
from rq4lens.figures.page.parts import PageFigure, Section, page_figure, script_json
from rq4lens.figures.page.sections import Material, sections
from rq4lens.figures.saved import HasRecord, Record, as_record
from rq4lens.results import ConditionResult, GridResult

_HERE = Path(__file__).parent


def report_page(
    grid: GridResult,
    analysis: HasRecord | Record | None = None,
    *,
    prompts: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    layers: Mapping[int, GridResult] | None = None,
    comparison: HasRecord | Record | None = None,
) -> str:
    """A run as one HTML page that needs no network.

    Args:
        grid: the measured grid.
        analysis: an analysis of it, live or saved; without one its sections are left out.
        prompts: the prompts' texts by id.
        provenance: the content of ``run.json``; the grid's own when left out.
        layers: the grid of each layer, from a sweep.
        comparison: the comparison of these layers by the analysis, live or saved.

    Returns:
        The page. The same input gives the same page.
    """
    material = Material(
        grid,
        as_record(analysis),
        grid.provenance if provenance is None else provenance,
        layers or {},
        as_record(comparison),
        prompts or {},
    )
    drawn = run_figures(
        grid,
        material.analysis,
        layers=material.layers,
        comparison=material.comparison,
        provenance=material.provenance,
    )
    figures = {name: page_figure(name, figure) for name, figure in drawn.items()}
    return _page(material, figures)


def write_report(
    path: Path | str,
    grid: GridResult,
    analysis: HasRecord | Record | None = None,
    *,
    prompts: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    layers: Mapping[int, GridResult] | None = None,
    comparison: HasRecord | Record | None = None,
) -> Path:
    """Write :func:`report_page` to a file.

    Args:
        path: the file.
        grid: the measured grid.
        analysis: an analysis of it, live or saved.
        prompts: the prompts' texts by id.
        provenance: the content of ``run.json``; the grid's own when left out.
        layers: the grid of each layer, from a sweep.
        comparison: the comparison of these layers by the analysis, live or saved.

    Returns:
        The file.
    """
    page = report_page(
        grid, analysis, prompts=prompts, provenance=provenance, layers=layers, comparison=comparison
    )
    path = Path(path)
    make_directory(path.parent)
    write_text_atomic(path, page)
    return path


def _page(material: Material, figures: Mapping[str, PageFigure]) -> str:
    grid = material.grid
    plotly, script = get_plotlyjs(), _read("report.js")
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html.jinja").render(
        title=f"rq4lens: {grid.settings.pair}, layer {grid.settings.layer}",
        setting=grid_setting(grid),
        labels=[grid.label(head) for head in range(grid.n_heads)],
        sections=[_with_figures(section, figures) for section in sections(material)],
        policy=_policy(plotly, script),
        css=Markup(_read("report.css")),
        data=Markup(script_json(_data(material, figures))),
        plotly=Markup(plotly),
        script=Markup(script),
    )


def _with_figures(section: Section, figures: Mapping[str, PageFigure]) -> dict[str, Any]:
    drawn = [figures[name] for name in section.figures if name in figures]
    return {**vars(section), "figures": drawn}


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    """A content security policy that lets exactly these scripts run and fetches nothing."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _data(material: Material, figures: Mapping[str, PageFigure]) -> dict[str, Any]:
    grid = material.grid
    everywhere = {grid.settings.layer: grid, **material.layers}
    return {
        "config": CONFIG,
        "templates": {
            name: theme.template(dark=dark).to_plotly_json()
            for name, dark in (("light", False), ("dark", True))
        },
        "figures": {name: figure.drawing for name, figure in figures.items()},
        "labels": [
            each.label(head) for each in everywhere.values() for head in range(each.n_heads)
        ],
        "numbers": {
            numbers.label: f"ΔKL {shown(numbers.delta, 'nats')}" for numbers in material.heads
        },
        "prompts": _prompt_data(material),
    }


def _prompt_data(material: Material) -> dict[str, Any]:
    grid = material.grid
    fixed = [("all heads", None, grid.full)]
    if grid.control is not None:
        fixed.append((f"all heads of control layer {grid.control.layer}", None, grid.control))
    single = [
        (grid.label(head), grid.label(head), grid.single(head)) for head in range(grid.n_heads)
    ]
    return {
        "ids": list(grid.prompt_ids),
        "texts": [material.texts.get(prompt) for prompt in grid.prompt_ids],
        "groups": list(grid.groups),
        "conditions": [_condition(*each) for each in (*fixed, *single)],
    }


def _condition(name: str, head: str | None, condition: ConditionResult) -> dict[str, Any]:
    return {
        "name": name,
        "head": head,
        "raw": [_short(value) for value in condition.kl_raw_nats],
        "mapped": [_short(value) for value in condition.kl_mapped_nats],
    }


def _short(value: float, digits: int = 6) -> float:
    """A number with so many significant digits: the page shows three."""
    return (
        0.0 if value == 0 else round(float(value), digits - 1 - math.floor(math.log10(abs(value))))
    )
