"""The documentation site: it builds, needs no network, names all that is public, and is true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import rq4lens as rq
from rq4lens.cli import app
from rq4lens.models.load.architectures import loadable

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FAQ = ROOT / "rq4lens" / "figures" / "page" / "faq.md"
LINK = re.compile(r"\]\(([^)\s#:]+)[)#]")
# What a browser fetches by itself; links that a reader may follow are not meant.
FETCHED = re.compile(
    r"""<(?:script|img|iframe)[^>]*\bsrc=["']?(https?:|//)[^\s"'>]*"""
    r"""|<link[^>]*\bhref=["']?(https?:|//)[^\s"'>]*"""
    r"""|@import[^;]*(https?:|//)[^;]*|url\(["']?(https?:|//)[^)]*\)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning of any kind would have been an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_room_has_its_page(site):
    """Home, eight tutorials, how-tos, method, a reference page per room, and the FAQ."""
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    rooms = ("running", "models", "patching", "results", "analysis", "figures", "validation")
    assert {f"reference/{room}.html" for room in (*rooms, "index", "command-line")} <= pages
    assert sum(page.startswith("tutorial/") for page in pages) == 8
    assert {"index.html", "method.html", "faq.html", "figures/index.html"} <= pages


def test_the_site_needs_no_network(site):
    """No page and no style makes a browser fetch something from elsewhere."""
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    found = {str(f.relative_to(site)): FETCHED.search(f.read_text("utf-8")) for f in files}
    assert {name: match.group() for name, match in found.items() if match} == {}


def test_a_site_in_a_folder_says_that_its_search_needs_a_server(site):
    """A browser starts no search from a folder: the home page and the search box say so."""
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        if "md-search__input" in text:
            assert 'search.js"' in text
    assert "needs a server" in (site / "search.js").read_text("utf-8")
    assert "only the search needs a server" in (site / "index.html").read_text("utf-8")


def test_every_public_name_is_in_the_reference(site):
    """What `rq4lens` and `rq4lens.figures` export is documented, under its full name."""
    pages = "".join(path.read_text("utf-8") for path in (site / "reference").glob("*.html"))
    names = [getattr(rq, name) for name in rq.__all__ if name not in ("figures", "validate")]
    names += [getattr(rq.figures, name) for name in rq.figures.__all__]
    missing = [
        full
        for each in names
        if f'id="{(full := f"{each.__module__}.{each.__qualname__}")}"' not in pages
    ]
    assert missing == []


def test_no_sphinx_role_is_left_on_a_page(site):
    """Names in docstrings are shown as code, without markup of another tool."""
    for path in site.rglob("*.html"):
        assert not re.search(r":(class|func|meth|mod|data|attr):", path.read_text("utf-8"))


def test_the_list_of_architectures_is_the_registry():
    """The page lists what loads as either kind of model, and README counts it."""
    page = (ROOT / "docs" / "architectures.md").read_text("utf-8")
    of_hooked, of_bridge = (
        re.findall(r"^- `(\w+)`$", part, re.MULTILINE) for part in page.split("\n## ")[1:]
    )
    assert of_hooked == sorted(loadable("hooked"))
    assert of_bridge == sorted(loadable("bridge"))
    more = set(of_bridge) - set(of_hooked)
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"{len(of_hooked)} architectures load as `HookedTransformer`" in readme
    assert f"those {len(of_bridge) - len(more)} and {len(more)} more load" in readme
    assert len(of_bridge) - len(more) == len(of_hooked)


def test_every_link_leads_somewhere_in_the_repository():
    """A page is read there too; `docs/hooks.py` makes the links of the site from these."""
    pages = {*PAGES, FAQ, *ROOT.glob("*.md")}
    links = [(page, link) for page in pages for link in LINK.findall(page.read_text("utf-8"))]
    assert len(links) > 60
    dead = [(page.name, link) for page, link in links if not (page.parent / link).exists()]
    assert dead == []


def test_links_lead_to_their_place_on_the_site(site):
    """A notebook is a page of the tutorial there, and the FAQ and the command line have pages."""
    home, runs, faq = (
        (site / name).read_text("utf-8")
        for name in ("index.html", "reference/running.html", "faq.html")
    )
    for target in ("tutorial/1_quickstart.html", "faq.html", "figures/index.html"):
        assert f'<a href="{target}">' in home
    assert 'src="figures/coverage.png"' in home
    assert '<a href="command-line.html">' in runs
    assert '<a href="which-alpha.html">' in faq


def commands_of(page: Path) -> list[list[str]]:
    """The `rq4lens` commands in a page's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in split if words[:1] == ["rq4lens"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_on_a_page_exists_with_its_options(page):
    """A command that a page shows is one of the program's, and so is each of its options."""
    known = typer.main.get_command(app).commands
    for name, *arguments in commands_of(page):
        assert name in known
        options = {o for each in known[name].params for o in (*each.opts, *each.secondary_opts)}
        assert {word for word in arguments if word.startswith("-")} <= options


def test_commands_are_found():
    """The check above has something to check."""
    assert sum(len(commands_of(page)) for page in PAGES) > 10
