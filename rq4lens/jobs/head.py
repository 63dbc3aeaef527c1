"""Head cards of a run: made from its models, written into its folder, and read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rq4lens.analysis.card.card import MOST_CARDS, MOST_PROMPTS, head_cards
from rq4lens.analysis.card.records import HeadCard
from rq4lens.analysis.card.sides import CardInputs
from rq4lens.analysis.result import Analysis
from rq4lens.analysis.saved import read_run
from rq4lens.analysis.statistics.plain import from_json, to_json
from rq4lens.disk.files import make_directory, read_json, refuse_damage, write_json_atomic
from rq4lens.disk.run import HEADS, PER_PROMPT, file_sha256
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
