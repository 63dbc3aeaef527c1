"""rq4lens: which attention heads carry what a fine-tune changed.

The examples of this package go on from here; ``folder`` is a finished run of ``config``.

>>> import rq4lens as rq
>>> pair = rq.load_pair("etiquette")
>>> maps = rq.fit_maps(pair, layers=1)
>>> run = rq.run_grid(pair, maps, layer=1)
>>> experiment = rq.prepare(pair, maps)
"""

from lazy_loader import attach_stub

# Importing rq4lens loads none of its names: torch and TransformerLens take seconds, and the command
# line must answer at once. The table of names is the stub beside this file.
__version__ = "0.1.0"
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
