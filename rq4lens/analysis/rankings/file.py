"""Rankings in files, for instance ``attr_L26_attn.json``: a list of heads and scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rq4lens.disk.files import parse_json, read_text, short_value
from rq4lens.errors import UserError
from rq4lens.results import HeadRanking

FORM = '[{"head": 3, "score": 0.12}, ...], [[3, 0.12], ...] or {"3": 0.12, ...}'


def read_ranking(
    path: str | Path, *, n_heads: int, layer: int, alpha: float | None = None
) -> HeadRanking:
    """Read a ranking of all heads of a layer and check it.

    The file is JSON: a list of objects with ``head`` and ``score``, a list of pairs, or an object
    from head to score. Heads are ranked by descending score, whatever their order in the file.
    """
    path = Path(path)
    scores: dict[int, float] = {}
    content = read_text(path, "ranking file", parse=parse_json, form="JSON", fix=f"write {FORM}")
    for head, score in _entries(content, path):
        if not 0 <= head < n_heads:
            raise UserError(
                f"{path.name} names head {head}, but layer {layer} has heads 0 to {n_heads - 1}: "
                "give one score for each of these."
            )
        if head in scores:
            raise UserError(f"{path.name} names head {head} twice: give one score per head.")
        scores[head] = score
    missing = [head for head in range(n_heads) if head not in scores]
    if missing:
        raise UserError(
            f"{path.name} has no score for head {missing[0]} ({len(missing)} of {n_heads} heads "
            "are missing): give one score per head."
        )
    return HeadRanking.from_scores(
        [scores[head] for head in range(n_heads)],
        method=path.stem,
        layer=layer,
        alpha=alpha,
        settings={"file": str(path)},
    )


def _entries(content: Any, path: Path) -> Iterator[tuple[int, float]]:
    if not isinstance(content, dict | list):
        raise UserError(f"{path.name} holds neither a list nor an object: write {FORM}.")
    for entry in content.items() if isinstance(content, dict) else content:
        if isinstance(entry, dict) and {"head", "score"} <= set(entry):
            head, score = entry["head"], entry["score"]
        elif isinstance(entry, list | tuple) and len(entry) == 2:
            head, score = entry
        else:
            raise UserError(f"{path.name} holds {short_value(entry)}: write {FORM}.")
        yield _head(head, path), _score(score, head, path)


def _head(head: Any, path: Path) -> int:
    if isinstance(head, str) and head.isascii() and head.isdigit() and len(head) < 10:
        return int(head)
    if isinstance(head, int) and not isinstance(head, bool):
        return head
    raise UserError(f"{path.name} names head {short_value(head)}: a head is a whole number from 0.")


def _score(score: Any, head: Any, path: Path) -> float:
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    # A whole number of many digits is beyond every float; comparing it is safe, converting is not.
    if is_number and -1e300 < score < 1e300 and math.isfinite(score):
        return float(score)
    raise UserError(
        f"{path.name} gives head {short_value(head)} the score {short_value(score)}: write a "
        "number."
    )


def ranking_file_rows(ranking: HeadRanking) -> list[dict[str, Any]]:
    """The rows of a method's ranking file, best first: ``head, rank, score, se``."""
    errors = ranking.standard_errors or (None,) * ranking.n_heads
    rows: list[dict[str, Any]] = []
    for head, score, error in zip(ranking.heads, ranking.scores, errors, strict=True):
        row: dict[str, Any] = {"head": head, "rank": len(rows) + 1, "score": score, "se": error}
        if score is None:
            row["score_reason"] = ranking.reasons["scores"]
        if error is None:
            row["se_reason"] = ranking.reasons["standard_errors"]
        rows.append(row)
    return rows
