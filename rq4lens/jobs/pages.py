"""The pages of a run: its two first pictures and its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rq4lens import figures
from rq4lens.analysis.records import LayerComparison
from rq4lens.analysis.result import Analysis
from rq4lens.analysis.saved import Run, read_layers, read_positions, read_run
from rq4lens.disk.files import read_json
from rq4lens.disk.run import FIGURES, NEXT_TOKENS, PROMPTS, REPORT
from rq4lens.jobs.head import heads_that_matter, read_cards
from rq4lens.results import GridResult


def write_pages(
    directory: Path,
    grid: GridResult,
    analysis: Analysis,
    prompts: tuple[Mapping[str, str], Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> None:
    """Write the ranking bars, the coverage curve and the report of a run.

    ``prompts`` are their texts and their next tokens. Layers that a sweep left in the directory are
    in the report too, if it was made in the same way.
    """
    pictures = directory / FIGURES
    figures.write_html(figures.ranking_bars(grid, analysis=analysis), pictures / "ranking.html")
    figures.write_html(figures.coverage_curve(grid, analysis), pictures / "coverage.html")
    cards = read_cards(directory, heads_that_matter(grid, analysis))
    texts, said = prompts
    report = figures.Report(
        *(grid, analysis, texts, provenance, *_layers_like(directory, grid), cards),
        positions=read_positions(directory),
        next_tokens=said,
    )
    figures.write_report(directory / REPORT, report)


def write_report_of(directory: Path) -> Path:
    """Write the report of a finished run again, for instance after a sweep into its directory."""
    saved = read_run(directory)
    said = directory / NEXT_TOKENS
    prompts = read_json(directory / PROMPTS), read_json(said) if said.is_file() else {}
    write_pages(directory, saved.grid, saved.analysis, prompts, saved.run)
    return directory / REPORT


def draw_run(directory: Path, out: Path, *, static: bool = True) -> list[str]:
    """Draw every figure that a finished run has the data for."""
    saved = read_run(directory)
    drawn = figures_of(saved)
    title = f"{saved.grid.settings.pair}, layer {saved.grid.settings.layer}"
    return figures.write_figures(drawn, out, static=static, title=title)


def figures_of(saved: Run) -> dict[str, Any]:
    """The figures of a finished run by name."""
    layers, comparison = _layers_like(saved.directory, saved.grid)
    return figures.run_figures(
        saved.grid,
        saved.analysis,
        layers=layers,
        comparison=comparison,
        provenance=saved.run,
        positions=saved.positions,
    )


def _layers_like(
    directory: Path, grid: GridResult
) -> tuple[Mapping[int, GridResult], LayerComparison | None]:
    """The sweep in a run directory, if its prompts and settings are those of the grid."""
    layers = read_layers(directory)
    if layers is None or grid.settings.layer not in layers.grids:
        return {}, None
    other = layers.grids[grid.settings.layer]
    if other.prompt_ids != grid.prompt_ids or not other.settings.comparable_to(grid.settings):
        return {}, None
    return layers.grids, layers.comparison
