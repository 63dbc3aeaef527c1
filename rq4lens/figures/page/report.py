"""One file to read a run in: claims, tables, linked figures, prompts, provenance; no network.

Every text is escaped by jinja2 or written by the page's script as text. Scripts run only if their
hash stands in the page's content security policy, so that nothing in a prompt could run even if it
became markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rq4lens.disk.files import make_directory, write_text_atomic
from rq4lens.figures import theme
from rq4lens.figures.export import CONFIG
from rq4lens.figures.numbers import grid_setting, label_of, rounded
from rq4lens.figures.page.gallery import run_figures
from rq4lens.figures.page.parts import Page, Report
from rq4lens.figures.page.sections import MOST_PROMPTS, cards_section, sections
from rq4lens.figures.page.words import WORDS, meaning, questions
from rq4lens.results import ConditionResult

_HERE = Path(__file__).parent
_TITLE_PX = 34
_SWITCH_PX = 42
# The place of a figure in the page's grid, where it is not the usual one.
_SHAPES = {"layers": "wide", "interactions": "wide", "ranking": "tall"}
_TALL_PX = 600
_RULES = ("idle:", "kinds of heads:")


def report_page(report: Report) -> str:
    """A run as one HTML page that needs no network.

    Args:
        report: what the page is made from.

    Returns:
        The page. The same input gives the same page.
    """
    grid = report.grid
    drawn = run_figures(
        grid,
        report.analysis,
        layers=report.layers,
        comparison=report.comparison,
        provenance=report.run,
        positions=report.positions,
    )
    return html_of(
        Page(
            title=f"rq4lens: {grid.settings.pair}, layer {grid.settings.layer}",
            setting=grid_setting(grid),
            sections=sections(report),
            figures=drawn,
            labels=[grid.label(head) for head in range(grid.n_heads)],
            cards=cards_section(report.cards),
            data=_data(report),
        )
    )


def html_of(page: Page) -> str:
    """A page as HTML that needs no network, with the script and the colours that all pages have."""
    figures = {name: page_figure(name, each, page.setting) for name, each in page.figures.items()}
    plotly, script = get_plotlyjs(), _read("report.js")
    data = {
        "config": CONFIG,
        "templates": {
            name: theme.template(dark=dark).to_plotly_json()
            for name, dark in (("light", False), ("dark", True))
        },
        "figures": {name: figure["drawing"] for name, figure in figures.items()},
        "labels": page.labels,
        **page.data,
    }
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html.jinja").render(
        page=page,
        words=WORDS,
        questions=questions(),
        meaning=meaning,
        figures=figures,
        cards=Markup(page.cards),
        policy=_policy(plotly, script),
        css=Markup(_read("report.css")),
        data=Markup(script_json(data)),
        plotly=Markup(plotly),
        script=Markup(script),
    )


def write_report(path: Path | str, report: Report) -> Path:
    """Write :func:`report_page` to a file.

    Args:
        path: the file.
        report: what the page is made from.

    Returns:
        The file.
    """
    path = Path(path)
    make_directory(path.parent)
    write_text_atomic(path, report_page(report))
    return path


def page_figure(name: str, figure: go.Figure, common: Sequence[str] = ()) -> dict[str, Any]:
    """Take a figure apart: the page itself shows title, caption, setting and switch.

    Of the setting it keeps what does not stand at the top of the page already.
    """
    drawing = json.loads(figure.to_json())
    layout = drawing["layout"]
    title = layout.pop("title")["text"]
    meta = layout.pop("meta")
    menu = layout.pop("updatemenus", [{}])[0]
    switch_px = _SWITCH_PX if menu else 0
    layout.pop("template", None)
    layout["height"] -= _without_setting(layout) + _TITLE_PX + switch_px
    layout["margin"]["t"] -= _TITLE_PX + switch_px
    shape = _SHAPES.get(name, "")
    # The rule of the kinds stands on the page once.
    elsewhere = (*common, *(each for each in meta["setting"] if each.startswith(_RULES)))
    return {
        "name": name,
        "title": title,
        "caption": meta["caption"],
        "setting": [part for part in meta["setting"] if part not in elsewhere],
        # A short figure leaves no hole beside it.
        "shape": "" if shape == "tall" and layout["height"] < _TALL_PX else shape,
        "height_px": layout["height"],
        "drawing": {
            "data": drawing["data"],
            "layout": layout,
            "switch": menu.get("buttons"),
            "active": menu.get("active"),
        },
    }


def _without_setting(layout: dict[str, Any]) -> int:
    """Remove the drawn setting line; the height that this gives back."""
    notes = layout["annotations"]
    line = next(note for note in notes if note.get("name") == "setting")
    notes.remove(line)
    axis_px = -line["yshift"]
    saved_px = layout["margin"]["b"] - axis_px
    layout["margin"]["b"] = axis_px
    return int(saved_px)


def script_json(value: Any) -> str:
    """JSON that can stand inside a ``script`` element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


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


def _data(report: Report) -> dict[str, Any]:
    grid = report.grid
    everywhere = {grid.settings.layer: grid, **report.layers}
    return {
        "labels": [
            each.label(head) for each in everywhere.values() for head in range(each.n_heads)
        ],
        "numbers": {
            label_of(single): f"undoes {rounded(single.to_base_pct, '%')}"
            for single in report.singles
        },
        "prompts": _prompt_data(report),
    }


def _prompt_data(report: Report) -> dict[str, Any]:
    grid = report.grid
    fixed = [("all heads", None, grid.full)]
    if grid.control is not None:
        fixed.append((f"all heads of control layer {grid.control.layer}", None, grid.control))
    labels = [grid.label(head) for head in range(grid.n_heads)]
    single = zip(labels, labels, grid.singles, strict=True)
    rows = sorted(np.argsort(-np.abs(grid.full.delta_nats), kind="stable")[:MOST_PROMPTS].tolist())
    ids = [grid.prompt_ids[row] for row in rows]
    return {
        "ids": ids,
        "texts": [report.prompts.get(prompt) for prompt in ids],
        "groups": [grid.groups[row] for row in rows],
        "conditions": [_condition(*each, rows) for each in (*fixed, *single)],
        "next": [report.next_tokens.get(prompt) for prompt in ids],
    }


def _condition(
    name: str, head: str | None, condition: ConditionResult, rows: Sequence[int]
) -> dict[str, Any]:
    both = {"raw": condition.kl_raw_nats, "mapped": condition.kl_mapped_nats}
    # Six significant digits: the page shows three.
    short = {key: [float(f"{x:.6g}") for x in nats[rows]] for key, nats in both.items()}
    return {"name": name, "head": head, **short}
