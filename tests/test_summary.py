"""The printed summary: the answer, the table sorted by k, and how it was made."""

from dataclasses import replace

import pytest
from synthetic import resampled, synthetic_grid, synthetic_settings
from synthetic_analysis import synthetic_analysis

from rq4lens.analysis.effects.table import records
from rq4lens.screen.tables import condition_text, summary_text


@pytest.fixture(scope="module")
def grid():
    return synthetic_grid(n_heads=12, n_prompts=60, ks=(8, 1, 2), random_seeds=(1, 0))


@pytest.fixture(scope="module")
def rows(grid):
    return records(resampled(grid, 300))


@pytest.fixture(scope="module")
def analysis(grid):
    claims = ("Two heads carry most of it.", "Their map holds elsewhere.")
    return replace(synthetic_analysis(grid), claims=claims, study_claims=("At alpha 0.3: 71%.",))


@pytest.fixture(scope="module")
def text(grid, rows, analysis):
    return summary_text(grid.settings, rows, analysis)


LAST = "every_layer"
"""The condition that stands last in the table."""


def table_of(text):
    """The lines of the table, split at blanks, from its header to the last condition."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("condition"))
    end = next(i for i, line in enumerate(lines) if line.startswith(LAST))
    return [line.replace(" L24", "").split() for line in lines[start : end + 1]]


def test_the_answer_comes_first_and_the_study_s_own_numbers_last(text):
    """Setting, claims, table, study, checks: a reader who stops early has read what matters."""
    order = ["llama-8b", "Two heads", "Their map", "condition", LAST, "At alpha", "CHECKS"]
    places = [text.index(f"\n{start}") if start != "llama-8b" else 0 for start in order]
    assert places == sorted(places)
    assert text.splitlines()[-1].startswith("CHECKS (must read 0): none ")


def test_the_table_is_sorted_by_k(text):
    """Top-k before random-k of the same k, k ascending, then all heads of ever more layers."""
    assert [cells[0] for cells in table_of(text)[1:]] == [
        *("top1", "rand1_s0", "rand1_s1"),
        *("top2", "rand2_s0", "rand2_s1"),
        *("top8", "rand8_s0", "rand8_s1"),
        *("full", "ctrl_full", LAST),
    ]


def test_the_table_says_what_the_records_say(rows, text):
    """Each row has what its heads carry both ways, ΔKL, its coverage in percent and its heads."""
    by_name = {row.cond: row for row in rows}
    for cells in table_of(text)[1:]:
        record = by_name[cells[0]]
        carried = [record.to_base_pct.value, record.to_tuned_pct.value]
        assert cells[1:3] == [f"{value:.1f}%" for value in carried]
        if record.cond == LAST:
            assert cells[3:5] == ["-", "-"]
            continue
        decimals = len(cells[3].partition(".")[2])
        assert float(cells[3]) == round(record.delta.value, decimals) != 0
        assert f"{record.coverage_pct.value:.1f}%" in cells
        assert f"{record.raw_coverage_pct.value:.1f}%" == cells[-2]
        everything = record.cond in {"full", "ctrl_full"}
        assert cells[-1] == ("ALL" if everything else ",".join(map(str, record.heads)))


def test_a_summary_is_text_in_a_notebook_too(grid, rows, analysis, text, monkeypatch):
    """Where rich believes that it is in Jupyter, or colours are asked for, the text is the same."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert summary_text(grid.settings, rows, analysis) == text


def test_undefined_coverage_is_a_dash(grid, analysis):
    """No number stands where there is none."""
    dead = {name: replace(c, mapped=c.raw) for name, c in grid.conditions.items()}
    rows = records(resampled(replace(grid, conditions=dead), 100))
    text = summary_text(grid.settings, rows, analysis)
    assert all(cells[4] == "-" for cells in table_of(text)[1:])
    line = condition_text(grid.settings, rows[0]).splitlines()[-2]
    assert "undefined" in line
    assert "ΔKL(ALL)" in line


def test_a_run_without_control_has_no_row_of_it(grid, rows, analysis):
    """What was not measured stands nowhere."""
    without = [row for row in rows if row.cond != "ctrl_full"]
    assert "ctrl_full" not in summary_text(grid.settings, without, analysis)


def test_the_summary_says_how_it_was_made(text):
    """Pair, layer, alpha, split, number of prompts, map, direction, dtype."""
    for part in (
        *("llama-8b medical", "layer 26 of 32", "12 heads", "alpha 0.3", "val split (n=60)"),
        *("map procrustes_scaled per head", "KL(patched||clean) in nats", "bfloat16"),
    ):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_names_are_printed_as_they_are(rows, analysis):
    """A pair's name is no markup."""
    settings = synthetic_settings(n_heads=12, pair="[red]my[/] pair [/]")
    assert "[red]my[/] pair [/], layer 26" in summary_text(settings, rows, analysis)


def test_one_condition_fits_a_few_lines(grid, rows):
    """Heads as a spec, the three KLs and all shares with intervals."""
    record = next(row for row in rows if row.cond == "top8")
    lines = condition_text(grid.settings, record).splitlines()[2:]
    assert lines[0].startswith("heads ")
    for line, name in zip(lines[1:4], ("KL_raw_mean", "KL_mapped_mean", "delta"), strict=True):
        assert f"{getattr(record, name).value:.5f} [" in line
    assert f"{record.drop_pct.value:.1f}% [" in lines[4]
    names = ("to_base_pct", "to_tuned_pct", "coverage_pct", "raw_coverage_pct")
    for line, name in zip(lines[5:], names, strict=True):
        assert f"{getattr(record, name).value:.1f}% [" in line
