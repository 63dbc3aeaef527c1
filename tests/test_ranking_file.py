"""Rankings read from a file are checked as they are read."""

import json

import pytest

from rq4lens.analysis.rankings.file import read_ranking
from rq4lens.errors import UserError


def written(tmp_path, content):
    path = tmp_path / "attr_L26_attn.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content",
    [
        [{"head": 0, "score": 0.1}, {"head": 1, "score": 0.7}, {"head": 2, "score": -1}],
        [[2, -1], [0, 0.1], [1, 0.7]],
        {"0": 0.1, "1": 0.7, "2": -1},
        [{"head": 1, "score": 0.7, "rank": 1}, {"head": 0, "score": 0.1}, {"head": 2, "score": -1}],
    ],
)
def test_forms_that_are_read(tmp_path, content):
    """Lists of objects, lists of pairs and objects give the same ranking, whatever their order."""
    ranking = read_ranking(written(tmp_path, content), n_heads=3, layer=26, alpha=0.3)
    assert ranking.heads == (1, 0, 2)
    assert ranking.scores == (0.7, 0.1, -1.0)
    assert (ranking.method, ranking.layer) == ("attr_L26_attn", 26)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[0, 1.0], [1, 2.0]], "no score for head 2 .1 of 3 heads are missing"),
        ([[0, 1.0], [1, 2.0], [1, 3.0]], "names head 1 twice"),
        ([[0, 1.0], [1, 2.0], [3, 3.0]], "names head 3, but layer 26 has heads 0 to 2"),
        ([[0, 1.0], [1, "high"], [2, 0]], "the score 'high': write a number"),
        ([[0, True], [1, 1], [2, 0]], "the score True"),
        ([["x", 1.0], [1, 1], [2, 0]], "names head 'x'"),
        ([[0.5, 1.0], [1, 1], [2, 0]], "names head 0.5"),
        (["0", "1", "2"], "holds '0': write"),
        ("[[0, NaN], [1, 1], [2, 0]]", "cannot be read as JSON"),
        ("[[0, 1e999], [1, 1], [2, 0]]", "cannot be read as JSON"),
        ("3", "neither a list nor an object"),
        ("[[0, 1", "cannot be read as JSON"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    """Wrong, missing and repeated heads and unreadable scores are named in one sentence."""
    with pytest.raises(UserError, match=message):
        read_ranking(written(tmp_path, content), n_heads=3, layer=26)


def test_missing_file_is_named(tmp_path):
    """The path that does not exist is in the sentence."""
    with pytest.raises(UserError, match=r"nowhere.json' does not exist"):
        read_ranking(tmp_path / "nowhere.json", n_heads=3, layer=26)
