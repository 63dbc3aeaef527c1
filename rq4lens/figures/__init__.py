"""One drawing per question: results in, plotly figures out.

Every drawing returns a :class:`plotly.graph_objects.Figure` and nothing else happens: nothing is
shown, written or set globally. Importing this package loads nothing; a drawing is loaded when it is
asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rq4lens.figures.alphas import alpha_sweep
    from rq4lens.figures.cost import engine_cost
    from rq4lens.figures.coverage import coverage_curve, method_curves
    from rq4lens.figures.export import find_browser, picture, write_figures, write_html
    from rq4lens.figures.layers import global_ranking, layer_curves, layer_heatmap
    from rq4lens.figures.maps import map_quality
    from rq4lens.figures.matrices import agreement_matrix, interaction_matrix
    from rq4lens.figures.page.gallery import run_figures
    from rq4lens.figures.page.report import report_page, write_report
    from rq4lens.figures.plane import head_plane, per_prompt
    from rq4lens.figures.ranking import rank_flow, ranking_bars

_HOME = {
    "agreement_matrix": "matrices",
    "alpha_sweep": "alphas",
    "coverage_curve": "coverage",
    "engine_cost": "cost",
    "find_browser": "export",
    "global_ranking": "layers",
    "head_plane": "plane",
    "interaction_matrix": "matrices",
    "layer_curves": "layers",
    "layer_heatmap": "layers",
    "map_quality": "maps",
    "method_curves": "coverage",
    "per_prompt": "plane",
    "picture": "export",
    "rank_flow": "ranking",
    "ranking_bars": "ranking",
    "report_page": "page.report",
    "run_figures": "page.gallery",
    "write_figures": "export",
    "write_html": "export",
    "write_report": "page.report",
}

__all__ = [
    "agreement_matrix",
    "alpha_sweep",
    "coverage_curve",
    "engine_cost",
    "find_browser",
    "global_ranking",
    "head_plane",
    "interaction_matrix",
    "layer_curves",
    "layer_heatmap",
    "map_quality",
    "method_curves",
    "per_prompt",
    "picture",
    "rank_flow",
    "ranking_bars",
    "report_page",
    "run_figures",
    "write_figures",
    "write_html",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rq4lens.figures.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
