"""One drawing per question: results in, plotly figures out.

Every drawing returns a :class:`plotly.graph_objects.Figure` and nothing else happens: nothing is
shown, written or set globally. Importing this package loads nothing; a drawing is loaded when it is
asked for.

>>> len(rq.figures.ranking_bars(run).data[0].x)
16
"""

from lazy_loader import attach_stub

# The table of names is the stub beside this file.
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
