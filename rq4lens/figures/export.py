"""Figures as files: HTML that works offline, PNG and SVG through a Chrome or Chromium.

The same figure gives the same bytes: plotly's random ids are replaced by fixed ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from rq4lens.disk.files import make_directory, write_bytes_atomic, write_text_atomic
from rq4lens.errors import UserError

CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "responsive": True,
    # Sending a chart to a server has no place in a file that works offline.
    "modeBarButtonsToRemove": ["sendChartToCloud", "lasso2d", "select2d"],
}
PLOTLY_JS = "plotly.min.js"
NO_BROWSER = (
    "PNG and SVG were left out because no Chrome or Chromium was found: install one (on Debian "
    "'apt-get install chromium') or name it in BROWSER_PATH, and run this again."
)
_WIDTH_PX = 1000
_RANDOM_ID = re.compile(rb'\bid="[\w-]*-([0-9a-f]{6})"')
_REFERENCE = re.compile(rb"""(\bid="|href="#|url\(["']?#|&quot;#)([\w-]+)""")
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _page(title: str, style: str, body: str) -> str:
    """A page around a body, which is HTML already."""
    return _PAGE.format(title=escape(title), style=style, body=body)


def _figure_page(figure: go.Figure, name: str, plotly_js: bool | str = True) -> str:
    """A page of a figure that needs no network, with plotly in it or beside it."""
    paper = figure.layout.template.layout.paper_bgcolor or "#FFFFFF"
    part = to_html(
        figure,
        config=CONFIG,
        full_html=False,
        include_plotlyjs=plotly_js,
        include_mathjax=False,
        div_id=name,
        default_height=f"{_height(figure)}px",
    )
    return _page(_title_of(figure, name), f"body {{ margin: 0; background: {paper}; }}", part)


def _title_of(figure: go.Figure, name: str) -> str:
    """The title of a figure on one line; its name where it has none."""
    return str(figure.layout.title.text or name).replace("<br>", " ")


def write_html(figure: go.Figure, path: Path | str) -> Path:
    """Write one self-contained page; the file's name becomes the figure's id."""
    path = Path(path)
    make_directory(path.parent)
    write_text_atomic(path, _figure_page(figure, path.stem))
    return path


def write_figures(
    figures: Mapping[str, go.Figure],
    directory: Path | str,
    *,
    static: bool = True,
    title: str = "Figures",
) -> list[str]:
    """Write figures into a directory: a page each, an index, and PNG and SVG where possible.

    The pages share one ``plotly.min.js`` beside them; nothing is fetched from a network.

    Args:
        figures: figures by name; the name becomes the file's.
        directory: where to write.
        static: also write PNG and SVG, which takes a Chrome or Chromium.
        title: heading of the index.

    Returns:
        What could not be done, a sentence each; empty when everything was written.
    """
    directory = Path(directory)
    make_directory(directory)
    write_bytes_atomic(directory / PLOTLY_JS, get_plotlyjs().encode())
    for name, figure in figures.items():
        write_text_atomic(directory / f"{name}.html", _figure_page(figure, name, "directory"))
    pictures = static and find_browser() is not None
    if pictures:
        with _kaleido():
            for name, figure in figures.items():
                for kind in ("png", "svg"):
                    content = _picture(figure, kind, _WIDTH_PX, name)
                    write_bytes_atomic(directory / f"{name}.{kind}", content)
    write_text_atomic(directory / "index.html", _index(figures, title, pictures=pictures))
    return [NO_BROWSER] if static and not pictures else []


def _index(figures: Mapping[str, go.Figure], title: str, *, pictures: bool) -> str:
    items = "\n".join(
        f'<li><a href="{name}.html">{escape(_title_of(figure, name))}</a>'
        + (f' (<a href="{name}.png">PNG</a>, <a href="{name}.svg">SVG</a>)' if pictures else "")
        + "</li>"
        for name, figure in figures.items()
    )
    style = "body { margin: 2rem; font-family: system-ui, sans-serif; background: #FFFFFF; }"
    return _page(title, style, f"<h1>{escape(title)}</h1>\n<ul>\n{items}\n</ul>")


def find_browser() -> str | None:
    """The Chrome or Chromium that kaleido would start; None without one.

    That is the one that ``BROWSER_PATH`` names, if it is set, or one that the system has.
    """
    from choreographer.browsers.chromium import Chromium  # noqa: PLC0415

    path = Chromium.find_browser(skip_local=False)
    return path if path is not None and Path(path).is_file() else None


def picture(
    figure: go.Figure, kind: str = "png", *, width_px: int = _WIDTH_PX, name: str = "figure"
) -> bytes:
    """A figure as a PNG (at twice the resolution) or an SVG.

    Args:
        figure: the figure.
        kind: ``"png"`` or ``"svg"``.
        width_px: width of the picture; its height is the figure's own.
        name: id that stands in the SVG for plotly's random one.

    Returns:
        The file's content.

    Raises:
        UserError: if there is no Chrome or Chromium.
    """
    if find_browser() is None:
        raise UserError(NO_BROWSER)
    with _kaleido():
        return _picture(figure, kind, width_px, name)


def _picture(figure: go.Figure, kind: str, width_px: int, name: str) -> bytes:
    import kaleido  # noqa: PLC0415 (half a second, and only pictures need it)

    scale = 1 if kind == "svg" else 2
    options = {"format": kind, "width": width_px, "height": _height(figure), "scale": scale}
    drawing = figure.to_plotly_json()
    for place, trace in enumerate(drawing["data"]):
        trace["uid"] = f"{place}"  # otherwise random, and part of the SVG
    content: bytes = kaleido.calc_fig_sync(drawing, opts=options)
    return _fixed_ids(content, name) if kind == "svg" else content


def _fixed_ids(svg: bytes, name: str) -> bytes:
    """Replace the random parts of the ids in an SVG, and of the references to them, by fixed ones.

    Plotly ends ids in six random hexadecimal digits, and puts the same six inside others.
    """
    tokens = list(dict.fromkeys(_RANDOM_ID.findall(svg)))

    def fixed(match: re.Match[bytes]) -> bytes:
        start, ident = match.groups()
        for place, token in enumerate(tokens):
            ident = ident.replace(token, f"{name}{place}".encode())
        return bytes(start + ident)

    return _REFERENCE.sub(fixed, svg)


def _height(figure: go.Figure) -> int:
    return int(figure.layout.height or 480)


@contextmanager
def _kaleido() -> Iterator[None]:
    """One browser for many pictures, started without fetching MathJax and closed at the end."""
    import kaleido  # noqa: PLC0415

    kaleido.start_sync_server(silence_warnings=True, mathjax=False)
    try:
        yield
    finally:
        kaleido.stop_sync_server(silence_warnings=True)
