"""One drawing per question: results in, plotly figures out.

Every drawing returns a :class:`plotly.graph_objects.Figure` and nothing else happens: nothing is
shown, written or set globally. Importing this package loads nothing; a drawing is loaded when it is
asked for.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Report": "page.sections",
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

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
