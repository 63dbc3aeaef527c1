"""Figures of one grid: what is drawn is what was measured."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import plotly.io as pio
import pytest
from synthetic import synthetic_grid
from synthetic_analysis import synthetic_analysis

from rq4lens import figures
from rq4lens.analysis.effects.table import condition_estimates, records
from rq4lens.results import HeadRanking


@pytest.fixture(scope="module")
def grid():
    return synthetic_grid()


def points(figure) -> dict[str, tuple[float, float]]:
    """The point of each head in all traces of a figure that are shown at first."""
    return {
        label: (x, y)
        for trace in figure.data
        if trace.customdata is not None and trace.visible is not False
        for label, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
    }


def traces_of(figure, view):
    """The traces that a button of the switch shows."""
    menu = figure.layout.updatemenus[0]
    button = next(button for button in menu.buttons if button.label == view)
    visible = button.args[0]["visible"]
    return [trace for trace, shown in zip(figure.data, visible, strict=True) if shown]


def trace_named(figure, name, view="ΔKL"):
    return next(trace for trace in traces_of(figure, view) if trace.name == name)


def setting_of(figure) -> str:
    notes = [note.text for note in figure.layout.annotations if note.name == "setting"]
    assert len(notes) == 1
    return notes[0].replace("<br>", " · ")


def test_bars_show_what_each_head_carries(grid):
    """A bar for each head is its to_base, a mark its to_tuned: 100 (1 - what is left / the gap)."""
    bars, marks = figures.ranking_bars(grid).data
    for trace, side in ((bars, "into_tuned"), (marks, "into_base")):
        assert set(trace.customdata) == {f"L26H{head}" for head in range(32)}
        for label, x in zip(trace.customdata, trace.x, strict=True):
            left, gap = (
                getattr(grid[name].transfer, side).gap_left_nats.mean()
                for name in (label.replace("L26H", "head"), "none")
            )
            assert x == pytest.approx(100 * (1 - left / gap), abs=1e-9)


def placed(figure, value):
    """Where a value stands on an axis that may be logarithmic on both sides of 0."""
    if figure.layout.xaxis.tickvals is None:
        return value
    at = [i for i, text in enumerate(figure.layout.xaxis.ticktext) if float(text) > 0][-1]
    unit = float(figure.layout.xaxis.ticktext[at]) / math.sinh(figure.layout.xaxis.tickvals[at])
    return math.asinh(value / unit)


def test_the_switch_orders_heads_by_the_other_scores(grid):
    """Each button has its own order, its own lengths and no marks of another direction."""
    buttons = figures.ranking_bars(grid).layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == ["undoes", "ΔKL", "KL_raw"]
    for button, score in zip(buttons, ("to_base", "delta", "kl_raw"), strict=True):
        order = [grid.label(head) for head in grid.ranking_by(score).heads]
        assert list(button.args[0]["y"][0]) == order
        assert list(button.args[1]["yaxis.categoryarray"]) == order
        assert list(button.args[0]["customdata"][0]) == order
        assert button.args[0]["visible"][1] == (score == "to_base")


def test_without_transfer_bars_show_the_other_scores():
    """A grid whose models were not swapped is drawn by ΔKL, without a mark."""
    grid = synthetic_grid(n_prompts=9)
    alone = {name: replace(each, transfer=None) for name, each in grid.conditions.items()}
    figure = figures.ranking_bars(replace(grid, conditions=alone))
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == ["ΔKL", "KL_raw"]
    assert figure.data[1].visible is False
    assert list(figure.layout.yaxis.categoryarray) == [grid.label(h) for h in grid.ranking.heads]


def test_kinds_that_nothing_told_apart_are_not_named(grid):
    """Without a ladder, rows name the head alone: undecided would be a finding."""
    ladderless = replace(synthetic_analysis(grid), ladders=())
    for analysis in (None, ladderless):
        axis = figures.ranking_bars(grid, analysis=analysis).layout.yaxis
        assert list(axis.ticktext) == list(axis.categoryarray)


def test_bars_show_each_heads_delta(grid):
    """Every head has one bar, and its length is the head's ΔKL."""
    figure = figures.ranking_bars(grid, grid.ranking)
    shown = points(figure)
    assert shown.keys() == {f"L26H{head}" for head in range(32)}
    for head in range(32):
        expected = placed(figure, grid.single(head).delta)
        assert shown[f"L26H{head}"][0] == pytest.approx(expected, rel=1e-9)


def test_bars_stand_in_the_order_of_the_ranking(grid):
    """The axis lists heads best first and starts at the top."""
    axis = figures.ranking_bars(grid, grid.ranking, top=10).layout.yaxis
    assert list(axis.categoryarray) == [grid.label(head) for head in grid.ranking.top(10)]
    assert axis.range[0] > axis.range[1]


def test_bars_reach_to_the_ends_of_the_intervals(grid):
    """Error bars end where the bootstrap intervals of ΔKL end."""
    rows = condition_estimates(grid, grid.singles)
    figure = figures.ranking_bars(grid, grid.ranking)
    trace = figure.data[0]
    bars = zip(
        trace.customdata, trace.x, trace.error_x.array, trace.error_x.arrayminus, strict=True
    )
    for label, value, up, down in bars:
        interval = rows[int(label.split("H")[1])]["delta"].interval
        assert value + up == pytest.approx(placed(figure, interval.high))
        assert value - down == pytest.approx(placed(figure, interval.low))


def test_bars_of_another_method_use_its_scores_and_errors(grid):
    """A ranking by another method shows its own scores, with 1.96 standard errors."""
    scores = np.linspace(1, -1, 32).tolist()
    ranking = HeadRanking.from_scores(
        scores, method="gradient", layer=26, alpha=0.3, standard_errors=[0.1] * 32
    )
    figure = figures.ranking_bars(grid, ranking)
    assert points(figure)["L26H0"][0] == 1
    assert figure.data[0].error_x.array[0] == pytest.approx(0.196)
    assert "1.96 standard errors" in setting_of(figure)


def test_undefined_scores_have_no_bar(grid):
    """A head without a score keeps its row, says so, and has no number."""
    ranking = HeadRanking.from_scores(
        [None, *np.arange(31.0).tolist()], method="x", layer=26, alpha=None
    )
    figure = figures.ranking_bars(grid, ranking)
    assert points(figure)["L26H0"][0] is None
    assert figure.layout.yaxis.categoryarray[-1] == "L26H0"


def test_hover_names_the_head_and_its_numbers(grid):
    """Hovering tells the head's name, ΔKL, KL_raw, KL_mapped, drop and an interval."""
    trace = figures.ranking_bars(grid, grid.ranking).data[0]
    text, label = trace.hovertext[0], trace.customdata[0]
    single = grid.single(int(label.split("H")[1]))
    assert f"<b>{label}</b>" in text
    for number in (single.delta, single.KL_raw, single.KL_mapped):
        assert f"{number:.3g} nats [" in text


def test_plane_puts_each_head_at_raw_and_mapped(grid):
    """A head stands at (KL_raw, KL_mapped)."""
    shown = points(figures.head_plane(grid))
    for head in range(32):
        single = grid.single(head)
        assert shown[f"L26H{head}"] == pytest.approx((single.KL_raw, single.KL_mapped))


def test_names_in_the_plane_do_not_touch(grid):
    """Named points are apart by more than a name's size, at any window width from 400 px."""
    figure = figures.head_plane(grid)
    low, high = figure.layout.xaxis.range
    assert figure.layout.xaxis.type == "log"
    named = [
        tuple((math.log10(value) - low) / (high - low) for value in point)
        for trace in figure.data
        if trace.text is not None
        for text, *point in zip(trace.text, trace.x, trace.y, strict=True)
        if text
    ]
    assert named
    for i, (x, y) in enumerate(named):
        for other_x, other_y in named[:i]:
            assert abs(x - other_x) > 0.2 or abs(y - other_y) > 0.06


def test_curve_is_the_coverage_of_the_top_k(grid):
    """The line passes 0 at k = 0, 100 ΔKL(top k) / ΔKL(ALL) at each k, and 100 at all heads."""
    line = trace_named(figures.coverage_curve(grid), "best k")
    expected = [100 * grid[f"top{k}"].delta / grid.full.delta for k in (1, 2, 4, 8)]
    assert list(line.x) == [0, 1, 2, 4, 8, 32]
    assert list(line.y) == pytest.approx([0, *expected, 100])


def test_random_sets_are_points_of_their_own(grid):
    """Each random head set is a point at its size and its coverage."""
    drawn = trace_named(figures.coverage_curve(grid), "random, seeds")
    expected = [
        (k, 100 * grid[f"rand{k}_s{seed}"].delta / grid.full.delta)
        for k in (1, 2, 4, 8)
        for seed in (0, 1, 2)
    ]
    shown = sorted((int(x), y) for x, y in zip(drawn.x, drawn.y, strict=True))
    assert np.array(shown) == pytest.approx(np.array(sorted(expected)))


def test_the_first_view_is_the_share_of_the_gap(grid):
    """At first the best k heads stand at their to_base, and so does the control layer."""
    figure = figures.coverage_curve(grid)
    assert [trace.name for trace in figure.data if trace.visible] == [
        trace.name for trace in traces_of(figure, "undoes")
    ]
    rows = {row.cond: row for row in records(grid)}
    line = trace_named(figure, "best k", "undoes")
    expected = [rows[f"top{k}"].to_base_pct.value for k in (1, 2, 4, 8)]
    assert list(line.y) == pytest.approx([0, *expected, rows["full"].to_base_pct.value])
    control = trace_named(figure, "control, layer 24", "undoes")
    assert control.y[0] == pytest.approx(rows["ctrl_full"].to_base_pct.value)


def test_control_is_a_level_line(grid):
    """The control layer's coverage is drawn over all k."""
    control = trace_named(figures.coverage_curve(grid), "control, layer 24")
    assert list(control.y) == pytest.approx([100 * grid.control.delta / grid.full.delta] * 2)


def test_undefined_coverage_is_said_not_drawn():
    """Where the full effect cannot be told from zero, the figure gives the reason."""
    grid = synthetic_grid()
    quiet = replace(grid, noise_floor_nats=1e3)
    figure = figures.coverage_curve(quiet)
    assert len(figure.data) == 0
    assert any("undefined" in note.text for note in figure.layout.annotations)


DRAWINGS = [figures.ranking_bars, figures.head_plane, figures.coverage_curve]


@pytest.mark.parametrize("draw", DRAWINGS, ids=lambda draw: draw.__name__)
def test_each_figure_states_its_setting(draw, grid):
    """Layer, alpha, split, n, map, KL direction, dtype and units stand under each figure."""
    setting = setting_of(draw(grid))
    for part in (
        "layer 26",
        "α = 0.3",
        "val, n = 150",
        "procrustes_scaled",
        "patched ‖ clean",
        "nats",
        "bfloat16",
    ):
        assert part in setting


@pytest.mark.parametrize("draw", DRAWINGS, ids=lambda draw: draw.__name__)
def test_global_templates_neither_change_nor_matter(draw, grid, monkeypatch):
    """A figure carries its own look: plotly's default template has no say and stays as it was."""
    before = draw(grid).to_json()
    monkeypatch.setattr(pio.templates, "default", "ggplot2")
    assert draw(grid).to_json() == before
    assert pio.templates.default == "ggplot2"


@pytest.mark.parametrize("draw", DRAWINGS, ids=lambda draw: draw.__name__)
def test_markup_in_names_is_drawn_letter_by_letter(draw):
    """A pair called like markup stays text."""
    figure = draw(synthetic_grid(pair="<b>x</b>"))
    assert "&lt;b&gt;x&lt;/b&gt;" in setting_of(figure)


def test_figures_never_load_a_model():
    """Drawing imports neither torch models nor the rooms that patch them."""
    code = (
        "import sys, json; sys.path.insert(0, 'tests'); import rq4lens.figures as f;"
        "from synthetic import synthetic_grid; g = synthetic_grid(n_prompts=9);"
        "[getattr(f, name) for name in f.__all__]; f.coverage_curve(g); f.head_plane(g);"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    for banned in (
        "torch",
        "transformer_lens",
        "transformers",
        "rq4lens.patching",
        "rq4lens.models",
    ):
        assert banned not in loaded
