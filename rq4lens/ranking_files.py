"""What ``rq4lens rank`` leaves in a directory: a file per ranking and the table of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rq4lens.analysis.missing import NO_CONTROL_LAYER, explained
from rq4lens.analysis.plain import plain
from rq4lens.analysis.ranking import ranking_file_rows
from rq4lens.analysis.records import MethodRow
from rq4lens.files import write_json_atomic
from rq4lens.results import HOOK, GridSettings, HeadRanking
from rq4lens.run_directory import ranking_file

NOT_TIMED = "the ranking was read from a file"


def write_ranking(directory: Path, ranking: HeadRanking) -> Path:
    """Write a ranking: a list of ``head, rank, score, se``, best first."""
    path = directory / ranking_file(ranking.layer, ranking.alpha or 0.0, ranking.method)
    write_json_atomic(path, ranking_file_rows(ranking))
    return path


def write_table(
    directory: Path,
    settings: GridSettings,
    n_prompts: int,
    rankings: Sequence[HeadRanking],
    rows: Sequence[MethodRow],
) -> Path:
    """Write the table that the console prints, with intervals, as ``rank_table_*.json``.

    Args:
        directory: where.
        settings: how the grid was made.
        n_prompts: measured prompts.
        rankings: the rankings.
        rows: each of them beside exact single-head ``ΔKL``.
    """
    table = [
        explained(plain(row), lambda _: NOT_TIMED)
        | {"heads": list(ranking.heads), "settings": plain(ranking.settings)}
        for ranking, row in zip(rankings, rows, strict=True)
    ]
    made = explained(settings.to_dict(), lambda _: NO_CONTROL_LAYER)
    path = directory / f"rank_table_L{settings.layer}_{HOOK}_alpha{settings.alpha:g}.json"
    write_json_atomic(path, {"settings": made, "n_prompts": n_prompts, "table": table})
    return path
