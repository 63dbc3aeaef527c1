"""What is written for readers beside the numbers of a run: head cards, figures and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rq4lens import figures
from rq4lens.analysis.card.card import MOST_CARDS, MOST_PROMPTS, head_cards
from rq4lens.analysis.card.records import HeadCard
from rq4lens.analysis.card.sides import CardInputs
from rq4lens.analysis.records import Analysis, LayerComparison
from rq4lens.analysis.saved import Run, read_layers, read_positions, read_run
from rq4lens.analysis.statistics.plain import from_json, to_json
from rq4lens.disk.files import make_directory, read_json, refuse_damage, write_json_atomic
from rq4lens.disk.run import (
    FIGURES,
    HEADS,
    NEXT_TOKENS,
    PER_PROMPT,
    PROMPTS,
    REPORT,
    file_sha256,
)
from rq4lens.heads import Head
from rq4lens.jobs.progress import Stage, silent
from rq4lens.results import GridResult

OF_EACH_RANKING = 4
"""So many heads of each ranking have a card, whatever their kind."""


def card_of_run(
    directory: Path,
    label: str,
    n_prompts: int = MOST_PROMPTS,
    *,
    trust_remote_code: bool = False,
    stage: Stage = silent,
) -> HeadCard:
    """The card of one head of a finished run, whose models are loaded again."""
    head, run = Head.parse(label), read_run(directory)
    with stage("card", None):
        inputs = CardInputs.of_run(run, trust_remote_code=trust_remote_code)
        return next(head_cards(inputs, [head], n_prompts))


def write_every_card(
    directory: Path,
    n_prompts: int = MOST_PROMPTS,
    *,
    trust_remote_code: bool = False,
    stage: Stage = silent,
) -> Path:
    """Write the cards of all heads of all layers of a finished run; the folder they are in."""
    inputs = CardInputs.of_run(read_run(directory), trust_remote_code=trust_remote_code)
    pair = inputs.pair
    every = [Head(layer, index) for layer in range(pair.n_layers) for index in range(pair.n_heads)]
    return write_cards(directory, inputs, every, n_prompts, stage=stage)


def write_cards(
    directory: Path,
    inputs: CardInputs,
    heads: Sequence[Head],
    n_prompts: int = MOST_PROMPTS,
    *,
    stage: Stage = silent,
) -> Path:
    """Write the cards of some heads into a run directory that holds its measured prompts."""
    folder = directory / HEADS
    make_directory(folder)
    measured = file_sha256(directory / PER_PROMPT)
    with stage("cards", len(heads)) as finished:
        for card in head_cards(inputs, heads, n_prompts):
            record = {"of": measured, "card": to_json(card)}
            write_json_atomic(folder / f"{card.head}.json", record)
            if finished is not None:
                finished(1)
    return folder


def read_cards(directory: Path, heads: Sequence[Head]) -> tuple[HeadCard, ...]:
    """The cards of these heads that a run directory holds; those of another run are left out."""
    measured = file_sha256(directory / PER_PROMPT)
    found = []
    for head in heads:
        path = directory / HEADS / f"{head}.json"
        if not path.is_file():
            continue
        fix = "delete it, or write it again with `rq4lens head --all`"
        with refuse_damage(f"card {str(path)!r}", fix):
            record = read_json(path)
            if record["of"] == measured:
                found.append(from_json(HeadCard, record["card"]))
    return tuple(found)


def heads_that_matter(
    grid: GridResult, analysis: Analysis | None = None, most: int = MOST_CARDS
) -> tuple[Head, ...]:
    """The heads whose cards a report shows: the first by transfer and by ``ΔKL``, and busy ones."""
    measured = grid["none"].transfer is not None
    rankings = (*(("to_base", "to_tuned") if measured else ()), "delta")
    first = [grid.ranking_by(each).heads[:OF_EACH_RANKING] for each in rankings]
    busy = [row.head for row in analysis.kinds.heads if row.kind != "idle"] if analysis else []
    chosen = dict.fromkeys([*(head for heads in first for head in heads), *busy])
    return tuple(Head(grid.settings.layer, head) for head in [*chosen][:most])


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
