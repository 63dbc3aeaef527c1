"""rq4lens: which attention heads carry what a fine-tune changed.

The examples of this package go on from here; ``folder`` is a finished run of ``config``.

>>> import rq4lens as rq
>>> pair = rq.load_pair("etiquette")
>>> maps = rq.fit_maps(pair, layers=1)
>>> run = rq.run_grid(pair, maps, layer=1)
>>> experiment = rq.prepare(pair, maps)
"""

from lazy_loader import attach_stub

from rq4lens.errors import checks_types

# Importing rq4lens loads none of its names: torch and TransformerLens take seconds, and the command
# line must answer at once. The table of names is the stub beside this file.
__version__ = "0.1.0"
_public, __dir__, __all__ = attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """What a public name stands for; it is kept, for the loader keeps its own."""
    globals()[name] = found = checks_types(_public(name))
    return found
