"""Figures as files: offline, and the same bytes each time."""

import re
from pathlib import Path

import plotly.graph_objects as go
import pytest
from synthetic import synthetic_grid

from rq4lens import figures
from rq4lens.errors import UserError
from rq4lens.figures import export

needs_browser = pytest.mark.skipif(
    figures.find_browser() is None, reason="no Chrome or Chromium on this machine"
)


@pytest.fixture(scope="module")
def drawn():
    grid = synthetic_grid(n_prompts=30)
    return {"ranking": figures.ranking_bars(grid), "coverage": figures.coverage_curve(grid)}


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_page_is_self_contained(drawn, tmp_path):
    """One HTML file holds plotly itself and refers to no other file."""
    page = figures.write_html(drawn["ranking"], tmp_path / "ranking.html").read_text()
    assert 'id="ranking"' in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert len(page) > 4_000_000


def test_without_a_browser_there_is_html_and_one_sentence(drawn, tmp_path, monkeypatch):
    """No browser: HTML and index are written, and one sentence says how to get the rest."""
    monkeypatch.setattr(export, "find_browser", lambda: None)
    notes = figures.write_figures(drawn, tmp_path)
    assert len(notes) == 1
    assert "chromium" in notes[0].lower()
    assert {path.suffix for path in tmp_path.iterdir()} == {".html", ".js"}
    assert "ranking.png" not in (tmp_path / "index.html").read_text()


def test_a_named_browser_that_is_not_there_is_no_browser(monkeypatch):
    """BROWSER_PATH pointing nowhere counts as having none, and a picture says how to get one."""
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chromium")
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    assert figures.find_browser() is None
    with pytest.raises(UserError, match="BROWSER_PATH"):
        figures.picture(go.Figure())


def test_pictures_can_be_left_out(drawn, tmp_path):
    """Asked for HTML only, nothing is missing and nothing is said."""
    assert figures.write_figures(drawn, tmp_path, static=False) == []


@pytest.mark.browser
@needs_browser
def test_same_figures_same_bytes(drawn, tmp_path):
    """Writing the same figures twice gives identical files, pictures included."""
    for run in ("first", "second"):
        assert figures.write_figures(drawn, tmp_path / run) == []
    first = contents(tmp_path / "first")
    assert first == contents(tmp_path / "second")
    assert {"ranking.html", "ranking.png", "ranking.svg", "index.html"} <= first.keys()
    assert first["ranking.png"].startswith(b"\x89PNG")
    assert first["ranking.svg"].startswith(b"<svg")


@pytest.mark.browser
@needs_browser
def test_ids_in_an_svg_still_meet(drawn):
    """Every reference in a picture names an id that the picture has."""
    svg = figures.picture(drawn["ranking"], "svg", name="ranking").decode()
    wanted = set(re.findall(r"url\(['\"]?#([\w-]+)", svg))
    assert wanted
    assert wanted <= set(re.findall(r'\bid="([\w-]+)"', svg))
