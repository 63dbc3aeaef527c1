"""rq4lens: which attention heads carry what a fine-tune changed.

>>> import rq4lens as rq
>>> pair = rq.load_pair("etiquette")
>>> maps = rq.fit_maps(pair, layers=[1, 2])
>>> run = rq.run_grid(pair, maps, layer=1, control_layer=2, alpha=0.3)
>>> run.ranking.top(4)  # doctest: +SKIP
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

# Importing rq4lens loads none of its names: torch and TransformerLens take seconds, and the command
# line must answer at once. The table of names is the stub, so that editors know their types.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {
    alias.name: statement.module or ""
    for statement in _STUB.body
    if isinstance(statement, ast.ImportFrom)
    for alias in statement.names
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rq4lens' has no attribute {name!r}")
    if (home := _HOMES[name]) == __name__:
        return import_module(f"{home}.{name}")  # a room, as in `rq.figures.head_plane(...)`
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
