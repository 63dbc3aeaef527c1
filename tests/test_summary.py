"""The printed summary: the FULL line, the table sorted by k, and how to read the control."""

from dataclasses import replace

import pytest
from synthetic import resampled, synthetic_grid, synthetic_settings

from rq4lens.analysis.effects.table import records
from rq4lens.analysis.statistics.bootstrap import Estimate, Interval
from rq4lens.screen.tables import condition_text, control_line, full_line, summary_text


@pytest.fixture(scope="module")
def grid():
    return synthetic_grid(n_heads=12, n_prompts=60, ks=(8, 1, 2), random_seeds=(1, 0))


@pytest.fixture(scope="module")
def rows(grid):
    return records(resampled(grid, 300))


def table_of(text):
    """The lines of the table, split at blanks, from its header to the last condition."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("condition"))
    end = next(i for i, line in enumerate(lines) if line.startswith("full "))
    return [line.split() for line in lines[start : end + 1]]


def test_the_full_line_has_raw_mapped_and_delta(grid, rows):
    """`FULL layer L: raw ...  mapped ...  ΔKL ...`, in nats, as in the records."""
    line = full_line(rows[0])
    assert line.startswith("FULL layer 26: ")
    assert f"raw {grid.full.KL_raw:.5f}" in line
    assert f"mapped {grid.full.KL_mapped:.5f}" in line
    assert f"ΔKL {grid.full.delta:.5f}" in line


def test_the_table_is_sorted_by_k(grid, rows):
    """Top-k before random-k of the same k, k ascending, the whole layer last."""
    names = [cells[0] for cells in table_of(summary_text(grid.settings, rows))[1:]]
    assert names == [
        *("top1", "rand1_s0", "rand1_s1"),
        *("top2", "rand2_s0", "rand2_s1"),
        *("top8", "rand8_s0", "rand8_s1"),
        "full",
    ]


def test_the_table_says_what_the_records_say(grid, rows):
    """Each row has the condition's ΔKL, its coverage in percent and its heads."""
    by_name = {row.cond: row for row in rows}
    for cells in table_of(summary_text(grid.settings, rows))[1:]:
        record = by_name[cells[0]]
        assert cells[1] == f"{record.delta.value:.5f}"
        assert f"{record.coverage_pct.value:.1f}%" in cells
        heads = "ALL" if record.cond == "full" else ",".join(map(str, record.heads))
        assert cells[-1] == heads


def test_a_summary_is_text_in_a_notebook_too(grid, rows, monkeypatch):
    """Where rich believes that it is in Jupyter, or colours are asked for, the text is the same."""
    expected = summary_text(grid.settings, rows)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert summary_text(grid.settings, rows) == expected


def test_undefined_coverage_is_called_undefined_and_why(grid):
    """No number stands where there is none; the reason is printed once."""
    dead = {name: replace(c, kl_mapped_nats=c.kl_raw_nats) for name, c in grid.conditions.items()}
    rows = records(resampled(replace(grid, conditions=dead), 100))
    text = summary_text(grid.settings, rows)
    assert text.count("undefined") == len(table_of(text)) - 1 + 1
    assert "coverage is undefined: ΔKL(ALL) is 0 nats, within the noise" in " ".join(text.split())


@pytest.mark.parametrize(
    ("control", "reading"),
    [
        ((0.001, 0.002), "repairs clearly less here than at layer 26"),
        ((0.03, 0.04), "repairs MORE here than at layer 26: it is no control"),
        ((0.005, 0.015), "not clearly different from layer 26"),
        (None, "too few prompts"),
    ],
)
def test_the_control_is_read_by_its_interval(rows, control, reading):
    """Less, more or not told apart: by whether the intervals of ΔKL overlap."""
    by_name = {row.cond: row for row in rows}
    full, other = (
        replace(by_name[name], delta=Estimate(0.01, ends and Interval(*ends)))
        for name, ends in (("full", (0.01, 0.02)), ("ctrl_full", control))
    )
    line = control_line(full, other)
    assert line.startswith("CONTROL layer 24: ")
    assert reading in line


def test_a_run_without_control_says_so(grid, rows):
    """The line is there even when there is nothing to report."""
    without = [row for row in rows if row.cond != "ctrl_full"]
    assert "CONTROL: none was measured." in summary_text(grid.settings, without)


def test_the_summary_says_how_it_was_made(grid, rows):
    """Pair, layer, alpha, split, number of prompts, map, direction, dtype; claims at the end."""
    text = summary_text(grid.settings, rows, ["Two heads carry most of it."])
    for part in (
        *("llama-8b medical", "layer 26 of 32", "12 heads", "alpha 0.3", "val split (n=60)"),
        *("map procrustes_scaled per head", "KL(patched||clean) in nats", "bfloat16"),
    ):
        assert part in text
    assert text.endswith("Two heads carry most of it.\n")
    assert max(len(line) for line in text.splitlines()) <= 100


def test_names_are_printed_as_they_are(rows):
    """A pair's name is no markup."""
    settings = synthetic_settings(n_heads=12, pair="[red]my[/] pair [/]")
    assert "[red]my[/] pair [/], layer 26" in summary_text(settings, rows)


def test_one_condition_fits_a_few_lines(grid, rows):
    """Heads as a spec, the three KLs, drop and coverage with intervals."""
    record = next(row for row in rows if row.cond == "top8")
    lines = condition_text(grid.settings, record).splitlines()[2:]
    assert lines[0].startswith("heads ")
    for line, name in zip(lines[1:4], ("KL_raw_mean", "KL_mapped_mean", "delta"), strict=True):
        assert f"{getattr(record, name).value:.5f} [" in line
    assert f"{record.drop_pct.value:.1f}% [" in lines[4]
    assert f"{record.coverage_pct.value:.1f}% [" in lines[5]
