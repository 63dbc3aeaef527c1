"""One drawing per question: results in, plotly figures out.

Every function returns a :class:`plotly.graph_objects.Figure` and nothing else happens: nothing is
shown, written or set globally. Drawing starts when it is asked for: importing this package loads
neither plotly nor anything else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rq4lens.figures.coverage import coverage_curve
    from rq4lens.figures.export import find_browser, picture, write_figures, write_html
    from rq4lens.figures.plane import head_plane
    from rq4lens.figures.ranking import ranking_bars

_HOME = {
    "coverage_curve": "coverage",
    "find_browser": "export",
    "head_plane": "plane",
    "picture": "export",
    "ranking_bars": "ranking",
    "write_figures": "export",
    "write_html": "export",
}

__all__ = [
    "coverage_curve",
    "find_browser",
    "head_plane",
    "picture",
    "ranking_bars",
    "write_figures",
    "write_html",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rq4lens.figures.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
