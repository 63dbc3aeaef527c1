"""Run every notebook of this folder again, from the scripts they are paired with.

Plotly figures are kept as PNG, which a code host shows; that takes a Chrome or Chromium. In a
notebook of your own they stay interactive. Names of notebooks to run may be given.
"""

import base64
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jupytext
import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient

import rq4lens as rq

HERE = Path(__file__).parent
PLOTLY = "application/vnd.plotly.v1+json"
WIDTH_PX = 900


def main(names: list[str]) -> None:
    """Run the notebooks and write them beside their scripts.

    Args:
        names: which ones, by name without suffix; all of them when empty.
    """
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for script in sorted(HERE.glob("[0-9]*.py")):
        if not names or script.stem in names:
            write(script)
            print(script.stem)


def write(script: Path) -> None:
    """Run one notebook and write it with its outputs."""
    notebook = jupytext.read(script)
    with TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)  # times of day: another run, another file
            cell.outputs = [_shown(output) for output in cell.outputs]
    notebook.metadata["language_info"] = {"name": "python"}  # not this machine's version
    nbformat.write(notebook, script.with_suffix(".ipynb"))


def _shown(output: Any) -> Any:
    """The output, a plotly figure as a picture of it."""
    drawing = output.get("data", {}).get(PLOTLY)
    if drawing is None:
        return output
    figure = go.Figure(drawing["data"], drawing["layout"])
    png = rq.figures.picture(figure, "png", width_px=WIDTH_PX)
    text = figure.layout.title.text
    output["data"] = {"image/png": base64.b64encode(png).decode(), "text/plain": f"Figure: {text}"}
    return output


if __name__ == "__main__":
    main(sys.argv[1:])
