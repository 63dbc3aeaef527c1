"""What the documentation site shows besides the pages of this folder.

The notebooks become the tutorial, the questions of the report the FAQ, the command line describes
itself, and the figures of the built-in pair are linked from the home page: each stands in one place
and is read from there. Links are written as they are right in the repository; on the site they lead
to the same thing there.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
FIGURES = ("*.html", "*.png", "*.js")
MOVED = {"rq4lens/figures/page/faq.md": "faq.md", "rq4lens/cli.py": "reference/command-line.md"}
"""Pages of the site that are made from a file elsewhere in the repository."""
LINK = re.compile(r"(?<=\]\()[^)\s#:]+(?=[)#])")
# `:class:` and its like are Sphinx's; the name in code style is enough here.
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):(<code>)~?")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that are made from the rest of the repository."""
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for file in _tutorial(notebook, config):
            files.append(file)
    faq = (ROOT / "rq4lens" / "figures" / "page" / "faq.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "faq.md", content=faq))
    files.append(File.generated(config, "reference/command-line.md", content=_command_line()))
    for pattern in FIGURES:
        for path in sorted((ROOT / "figures").glob(pattern)):
            files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Let links lead to where things stand on the site."""
    here = page.file.src_uri
    sources = {place: source for source, place in MOVED.items()}
    folder = posixpath.dirname(sources.get(here, f"docs/{here}"))

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[0]))
        return posixpath.relpath(_place(target), posixpath.dirname(here) or ".")

    return LINK.sub(on_site, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Show the names in docstrings as code."""
    return ROLE.sub(r"\1", html)


def _place(path: str) -> str:
    """Where a file of the repository stands on the site."""
    if path.startswith("notebooks/"):
        return f"tutorial/{posixpath.basename(path).removesuffix('.ipynb')}.md"
    return MOVED.get(path, path.removeprefix("docs/"))


def _tutorial(notebook: Path, config: MkDocsConfig) -> Iterator[File]:
    """A notebook as a page, and the pictures in it."""
    names = {"unique_key": notebook.stem, "output_files_dir": "pictures"}
    text, resources = MarkdownExporter().from_filename(str(notebook), resources=names)
    text = text.replace("![png]", "![figure]").replace(' border="1" class="dataframe"', "")
    yield File.generated(config, f"tutorial/{notebook.stem}.md", content=text)
    for name, picture in resources["outputs"].items():
        yield File.generated(config, f"tutorial/{name}", content=picture)


def _command_line() -> str:
    """What `rq4lens --help` and its like say, as Markdown."""
    command = ["-m", "typer", "rq4lens.cli", "utils", "docs", "--name", "rq4lens"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout
