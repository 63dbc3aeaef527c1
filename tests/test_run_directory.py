"""The run directory: what is written reads back, and only a whole finished run is read."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from explained import check_explained
from synthetic import resampled, synthetic_grid

from rq4lens.analysis.analyse import analyse
from rq4lens.analysis.effects.table import ranking_rows, records
from rq4lens.analysis.saved import read_run, write_grid, write_run
from rq4lens.disk.files import write_json_atomic
from rq4lens.disk.run import (
    FORMAT,
    per_prompt_table,
    ranking_file,
)
from rq4lens.errors import UserError
from rq4lens.jobs.rank import write_ranking
from rq4lens.results import HeadRanking, PatchRow, Transfer

MEASURES = PatchRow._fields


def assert_same_row(again, row):
    """Each number of each prompt, bit for bit."""
    for name in MEASURES:
        np.testing.assert_array_equal(getattr(again, name), getattr(row, name))


@pytest.fixture(scope="module")
def grid():
    """Six heads, some of them without any effect, and names that are awkward in tables."""
    grid = synthetic_grid(n_heads=6, n_prompts=20, ks=(1, 2), n_layers=30)
    names = ("007", "1e3", "true", "NaN", "a,b", 'quo"te', "line\nbreak", "été", "None", "nan")
    ids = (*names, *grid.prompt_ids[len(names) :])
    return replace(grid, prompt_ids=ids, groups=(*ids[:10], *grid.groups[10:]))


def write(directory, grid):
    """A finished run of a grid, as the main job writes it."""
    table = records(resampled(grid, 100))
    write_grid(directory, grid, table)
    ranking = directory / ranking_file(grid.settings.layer, grid.settings.patching.alpha)
    write_json_atomic(ranking, ranking_rows(grid))
    run = {
        "format": FORMAT,
        "settings": grid.settings.to_dict(),
        "noise_floor_nats": grid.noise_floor_nats,
        "compared": grid.compared._asdict(),
    }
    write_run(directory, analyse(resampled(grid, 100)), run, "summary\n")
    return table


def test_what_is_written_reads_back(grid, tmp_path):
    """Every prompt's number bit for bit; heads, layers, groups, order and settings as before."""
    table = write(tmp_path, grid)
    saved = read_run(tmp_path)
    assert saved.grid.settings == grid.settings
    assert saved.grid.prompt_ids == grid.prompt_ids
    assert saved.grid.groups == grid.groups
    assert saved.grid.noise_floor_nats == grid.noise_floor_nats
    assert list(saved.grid.conditions) == list(grid.conditions)
    for name, condition in grid.conditions.items():
        again = saved.grid[name]
        assert (again.layer, again.heads, again.alpha) == (
            *(condition.layer, condition.heads, condition.alpha),
        )
        assert len(again.rows) == len(condition.rows)
        for one, other in zip(again.rows, condition.rows, strict=True):
            assert_same_row(one, other)
    for one, other in zip(saved.grid.every_layer, grid.every_layer, strict=True):
        assert_same_row(one, other)
    assert saved.grid.compared == grid.compared
    assert saved.records == table
    assert saved.grid.ranking.heads == grid.ranking.heads


def test_a_real_grid_reads_back(tiny_grid, tmp_path):
    """The same with numbers that a model made, zeros and subnormal ones among them."""
    write(tmp_path, tiny_grid)
    saved = read_run(tmp_path)
    for name, condition in tiny_grid.conditions.items():
        for one, other in zip(saved.grid[name].rows, condition.rows, strict=True):
            assert_same_row(one, other)


def test_every_json_file_is_strict(tmp_path):
    """No NaN or infinity is written; undefined numbers are null and have a reason beside them.

    Here the map repairs nothing and some heads do nothing, so that most shares are undefined.
    """
    grid = synthetic_grid(n_heads=4, n_prompts=12, ks=(1,))
    nothing = PatchRow(*np.zeros((len(MEASURES), 12)))
    same = Transfer(nothing, nothing)
    dead = {
        name: replace(c, raw=nothing, mapped=nothing, transfer=c.transfer and same)
        for name, c in grid.conditions.items()
    }
    write(tmp_path, replace(grid, conditions=dead, every_layer=same))
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    for record in json.loads((tmp_path / "rq4_results.json").read_text()):
        for name in ("drop_pct", "coverage_pct", "to_base_pct", "to_tuned_pct"):
            assert record[name] is None
            assert record[f"{name}_reason"]


def test_the_table_of_prompts_is_long(grid):
    """A row per prompt, condition and kind, with the documented columns."""
    table = per_prompt_table(grid)
    assert list(table.columns) == [
        *("prompt_id", "group", "layer", "cond", "heads", "alpha", "kind", "kl"),
        *("answer_logprob_change", "gap_left", "answer_is"),
    ]
    swapped = sum(each.transfer is not None for each in grid.conditions.values())
    assert len(table) == 2 * grid.n_prompts * (len(grid.conditions) + swapped + 1)
    assert not table.duplicated(["prompt_id", "cond", "kind"]).any()
    row = table[(table.cond == "head3") & (table.kind == "mapped")].iloc[4]
    assert (row.prompt_id, row.heads, row.layer) == (grid.prompt_ids[4], "3", 26)
    assert (row.kl, row.alpha) == (grid.single(3).kl_mapped_nats[4], 0.3)
    row = table[(table.cond == "head3") & (table.kind == "into_base")].iloc[4]
    assert (row.gap_left, row.alpha) == (grid.single(3).transfer.into_base.gap_left_nats[4], 1)
    assert set(table[table.layer == -1].cond) == {"every_layer"}


def test_the_results_file_has_the_documented_fields(grid, tmp_path):
    """One record per condition, in the order of the grid."""
    write(tmp_path, grid)
    rows = json.loads((tmp_path / "rq4_results.json").read_text())
    *own, every = rows
    assert [row["cond"] for row in own] == list(grid.conditions)
    assert (every["cond"], every["layer"], every["KL_raw_mean"]) == ("every_layer", None, None)
    check_explained(rows)
    for row in own:
        assert row["hook"] == "hook_z"
        assert [h for h, bit in enumerate(row["head_mask"]) if bit] == row["heads"]
        assert row["n"] == grid.n_prompts


def test_the_ranking_file_is_named_and_ordered_as_documented(grid, tmp_path):
    """`single_head_L{layer}_hook_z_alpha{alpha}.json`: best first, ranks from 1."""
    write(tmp_path, grid)
    rows = json.loads((tmp_path / "single_head_L26_hook_z_alpha0.3.json").read_text())
    assert [row["head"] for row in rows] == list(grid.ranking.heads)
    assert [row["rank"] for row in rows] == list(range(1, 7))
    for row in rows:
        assert row["delta"] == pytest.approx(row["KL_raw"] - row["KL_mapped"], abs=1e-15)


def test_rankings_by_other_methods_are_named_by_their_method(tmp_path):
    """`ranking_{method}_L{layer}_hook_z_alpha{alpha}.json`, undefined scores null and last."""
    ranking = HeadRanking.from_scores([0.1, None, 0.3], method="shapley", layer=2, alpha=0.25)
    path = write_ranking(tmp_path, ranking)
    assert path.name == "ranking_shapley_L2_hook_z_alpha0.25.json"
    rows = json.loads(path.read_text())
    assert [(row["head"], row["rank"], row["score"], row["se"]) for row in rows] == [
        (2, 1, 0.3, None),
        (0, 2, 0.1, None),
        (1, 3, None, None),
    ]
    check_explained(rows)


def test_a_run_is_finished_when_its_last_file_is_there(grid, tmp_path):
    """A folder without `run.json` is an unfinished run, whatever else lies in it."""
    write(tmp_path, grid)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match="holds no finished run"):
        read_run(tmp_path)


def lose_a_condition(directory):
    table = pd.read_parquet(directory / "per_prompt.parquet")
    table[table.cond != "head2"].to_parquet(directory / "per_prompt.parquet")


def lose_a_prompt(directory):
    table = pd.read_parquet(directory / "per_prompt.parquet")
    table.drop(index=5).to_parquet(directory / "per_prompt.parquet")


def lose_a_column(directory):
    table = pd.read_parquet(directory / "per_prompt.parquet")
    table.drop(columns="kl").to_parquet(directory / "per_prompt.parquet")


def lose_the_swaps(directory):
    """What is left of the gap is no part of the record that could be missing."""
    table = pd.read_parquet(directory / "per_prompt.parquet")
    table.drop(columns="gap_left").to_parquet(directory / "per_prompt.parquet")


def lose_the_numbers(directory):
    (directory / "per_prompt.parquet").unlink()


def cut_the_records(directory):
    path = directory / "rq4_results.json"
    path.write_text(path.read_text()[:-10])


def write_nan(directory):
    path = directory / "analysis.json"
    path.write_text('{"coverage": NaN}')


@pytest.mark.parametrize(
    "damage",
    [
        *(lose_a_condition, lose_a_prompt, lose_a_column, lose_the_swaps),
        *(lose_the_numbers, cut_the_records, write_nan),
    ],
)
def test_a_damaged_run_is_one_sentence(grid, tmp_path, damage):
    """Nothing is filled in for what is missing."""
    write(tmp_path, grid)
    damage(tmp_path)
    with pytest.raises(UserError, match="again") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)
