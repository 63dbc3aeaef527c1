"""Figures of an analysis and of layers: what is drawn is what the records say."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from cost import cost_bars
from synthetic import resampled, synthetic_grid
from synthetic_analysis import METHODS, about, curve, synthetic_analysis, synthetic_diagnostics

from rq4lens import figures
from rq4lens.analysis.effects.table import records
from rq4lens.analysis.rankings.agreement import kendall
from rq4lens.analysis.records import Analysis, HeadStability
from rq4lens.analysis.statistics.bootstrap import Estimate, exact
from rq4lens.analysis.statistics.plain import from_json
from rq4lens.analysis.structure.layers import compare_layers
from rq4lens.errors import UserError
from rq4lens.figures import theme
from rq4lens.figures.numbers import shown, single_records
from rq4lens.figures.page.gallery import method_agreements


@pytest.fixture(scope="module")
def grid():
    return synthetic_grid()


@pytest.fixture(scope="module")
def analysis(grid):
    return synthetic_analysis(grid)


@pytest.fixture(scope="module")
def layers():
    return {
        layer: synthetic_grid(layer, n_prompts=40, layer=layer, control_layer=None)
        for layer in range(4)
    }


def traces_of(figure, view):
    """The traces that a button of the switch shows."""
    menu = figure.layout.updatemenus[0]
    button = next(button for button in menu.buttons if button.label == view)
    visible = button.args[0]["visible"]
    return [trace for trace, shown in zip(figure.data, visible, strict=True) if shown]


def trace_named(figure, name, view=None):
    traces = figure.data if view is None else traces_of(figure, view)
    return next(trace for trace in traces if trace.name == name)


def setting_of(figure) -> str:
    notes = [note.text for note in figure.layout.annotations if note.name == "setting"]
    assert len(notes) == 1
    return notes[0].replace("<br>", " · ")


def curve_of(analysis, ranking):
    return coverage_of(analysis.curves, ranking)


def coverage_of(curves, ranking):
    curve = next(row for row in curves if row.ranking == ranking)
    return [point.value for point in curve.coverage_pct]


@pytest.mark.parametrize(
    ("line", "ranking"),
    [
        ("best k", "delta"),
        ("cross-fitted", "delta (cross-fitted)"),
        ("best subset", "best subset"),
    ],
)
def test_an_analysis_fills_the_coverage_curve(grid, analysis, line, ranking):
    """Plain, cross-fitted and best-subset lines show the saved coverage at every k."""
    drawn = trace_named(figures.coverage_curve(grid, analysis), line, "ΔKL")
    assert list(drawn.x) == list(range(33))
    assert list(drawn.y) == curve_of(analysis, ranking)


@pytest.mark.parametrize(("view", "direction"), [("undoes", "to_base"), ("gives base", "to_tuned")])
def test_the_share_of_the_gap_has_its_own_curves(grid, analysis, view, direction):
    """The first views show the top k by transfer, and have at most four names in the legend."""
    figure = figures.coverage_curve(grid, analysis)
    found = next(each for each in analysis.directions if each.direction == direction)
    for line, ranking in (("best k", direction), ("cross-fitted", f"{direction} (cross-fitted)")):
        drawn = trace_named(figure, line, view)
        assert list(drawn.y) == coverage_of(found.curves, ranking)
    shown = [trace for trace in traces_of(figure, view) if trace.showlegend is not False]
    assert len(shown) <= 4


def test_random_band_spans_the_saved_quantiles(grid, analysis):
    """The band lies between the 2.5% and 97.5% quantiles, with the mean inside."""
    traces = traces_of(figures.coverage_curve(grid, analysis), "ΔKL")
    filled = next(place for place, trace in enumerate(traces) if trace.fill == "tonexty")
    low, high, mean = traces[filled - 1], traces[filled], traces[filled + 1]
    assert list(low.y) == [row.quantiles_pct["0.025"] for row in analysis.random]
    assert list(high.y) == [row.quantiles_pct["0.975"] for row in analysis.random]
    assert list(mean.y) == [row.mean_pct for row in analysis.random]


def test_random_rankings_have_a_band_of_their_own(grid, analysis):
    """Dotted lines hold random rankings at all measured sizes at once; hover names both bands."""
    banded = tuple(replace(row, band_low_pct=-1.0, band_high_pct=90.0) for row in analysis.random)
    figure = figures.coverage_curve(grid, replace(analysis, random=banded))
    line = trace_named(figure, "random rankings, 95%")
    n = len(banded)
    assert [set(line.y[:n]), line.y[n], set(line.y[n + 1 :])] == [{-1.0}, None, {90.0}]
    assert list(line.x[:n]) == list(line.x[n + 1 :]) == [row.k for row in banded]
    hover = trace_named(figure, "random sets, 95%", "ΔKL").hovertext[0]
    assert "95% of rankings, at all k at once, in [-1, 90]%" in hover


def test_a_saved_analysis_draws_like_a_live_one(grid, analysis):
    """What is read back from ``analysis.json`` gives the same figures."""
    saved = from_json(Analysis, json.loads(json.dumps(analysis.to_dict())))
    drawn, again = (figures.run_figures(grid, source) for source in (analysis, saved))
    assert {name: figure.to_json() for name, figure in drawn.items()} == {
        name: figure.to_json() for name, figure in again.items()
    }


def test_kinds_come_from_the_analysis(grid, analysis):
    """The plane sorts heads by the kinds that the analysis found, and prints its rule."""
    figure = figures.head_plane(grid, analysis)
    for row in analysis.kinds.heads:
        assert f"L26H{row.head}" in trace_named(figure, row.kind).customdata
    assert analysis.kinds.rule in setting_of(figure)


def test_bars_are_named_and_coloured_by_kind(grid, analysis):
    """The row of a head names its kind, and its bar has the colour of that kind."""
    figure = figures.ranking_bars(grid, analysis=analysis)
    bars, axis = figure.data[0], figure.layout.yaxis
    rows = zip(bars.customdata, bars.marker.color, axis.ticktext, strict=True)
    for label, color, text in rows:
        kind = analysis.kinds.heads[int(label.split("H")[1])].kind
        assert text == f"{label} {kind}"
        assert color == theme.KINDS[kind][0]


def told(analysis):
    """The single heads of the ladder that are not idle, by their damage."""
    rows = [row for row in analysis.ladders[0].rows if len(row.heads) == 1]
    known = [row for row in rows if row.recovered_pct["raw"].value is not None]
    return sorted(known, key=lambda row: -row.damage_nats["constant"].value)


def test_the_ladder_marks_each_source_of_each_head(grid, analysis):
    """Heads stand by D(constant); marks right of -100 at what is recovered, others in order."""
    figure = figures.ladder(analysis)
    heads = told(analysis)
    labels = [f"L26H{row.heads[0]}" for row in heads]
    assert [text.split()[0] for text in figure.layout.yaxis.ticktext][: len(heads)] == labels
    for source in ("raw", "shifted", "mapped", "held out", "output", "constant", "clean"):
        trace = trace_named(figure, source)
        at = {label: x for label, x in zip(trace.customdata, trace.x, strict=True) if label}
        assert list(at) == labels
        for row, label in zip(heads, labels, strict=True):
            ends = {"constant": 0.0, "clean": 100.0}
            value = ends.get(source)
            if value is None:
                value = row.recovered_pct[source.replace(" ", "_")].value
            assert at[label] == value
    n_left_out = grid.n_heads - len(heads)
    assert f"{n_left_out} heads tell too little" in setting_of(figure)


def test_the_ladder_shows_what_is_far_worse_than_a_constant(analysis):
    """Left of -100 the axis is logarithmic: ten times worse is further left, and hover says it."""
    row = told(analysis)[0]
    places = {}
    for value in (-100.0, -1000.0, -10000.0):
        raw = {**row.recovered_pct, "raw": about(value, 10.0)}
        rows = (replace(row, recovered_pct=raw), *analysis.ladders[0].rows[1:])
        changed = replace(analysis, ladders=(replace(analysis.ladders[0], rows=rows),))
        trace = trace_named(figures.ladder(changed), "raw")
        at = list(trace.customdata).index(f"L26H{row.heads[0]}")
        places[value] = trace.x[at]
        assert f"recovered {value:.3g}%" in trace.hovertext[at]
    assert places[-100.0] == -100
    assert places[-1000.0] - places[-10000.0] == pytest.approx(-100 - places[-1000.0])


def test_a_ladder_of_another_strength_is_refused(analysis):
    """The analysis has strength 1 and the run's own; without a ladder it says how to get one."""
    assert "α = 0.3" in setting_of(figures.ladder(analysis, alpha=0.3))
    with pytest.raises(UserError, match=r"alpha 0\.5: it has 1, 0\.3"):
        figures.ladder(analysis, alpha=0.5)
    with pytest.raises(UserError, match="--analysis full"):
        figures.ladder(replace(analysis, ladders=()))


def test_methods_have_a_curve_each(grid, analysis):
    """One line per method, without cross-fitting and envelope."""
    figure = figures.method_curves(grid, analysis)
    assert [trace.name for trace in figure.data] == list(METHODS)
    assert list(trace_named(figure, "shapley").y) == curve_of(analysis, "shapley")


def test_few_methods_stand_in_the_legend(grid, analysis):
    """At most six have a colour, the run's own first; no grey one is further from all of them.

    Further than the two coloured ones that are nearest to each other.
    """
    drawn = figures.method_curves(grid, analysis).data
    y = {trace.name: np.array(trace.y) for trace in drawn}
    coloured = [trace.name for trace in drawn if trace.showlegend]
    grey = [trace.name for trace in drawn if trace.line.color == theme.GREY]
    assert sorted(coloured + grey) == sorted(METHODS)
    assert METHODS[0] in coloured
    assert 2 <= len(coloured) <= 6 < len(METHODS)

    def apart(one, other):
        return abs(y[one] - y[other]).max()

    nearest = min(apart(a, b) for a, b in combinations(coloured, 2))
    assert all(min(apart(name, each) for each in coloured) <= nearest for name in grey)


def test_methods_with_the_same_heads_are_named_together(grid, analysis):
    """Curves that lie upon each other are told apart by hover: it names all with these heads."""
    first, *others = analysis.curves
    sets = tuple(tuple(sorted(heads)) for heads in first.head_sets)
    other = tuple(reversed(first.head_sets[-1]))
    changed = [replace(each, head_sets=tuple(other[:k] for k in range(33))) for each in others]
    changed[1] = replace(others[1], head_sets=sets)
    figure = figures.method_curves(grid, replace(analysis, curves=(first, *changed)))
    own = trace_named(figure, METHODS[0]).hovertext
    assert own[2].endswith(f"<br>the same heads by<br>{METHODS[2]}")
    assert METHODS[2] not in own[0] + own[32]


def test_flow_shows_every_heads_rank(grid, analysis):
    """A head's line passes its rank in each ranking."""
    orders = {f"a{point.alpha}": point.heads for point in analysis.alphas}
    figure = figures.rank_flow(grid, orders)
    for trace in figure.data:
        head = int(trace.meta.split("H")[1])
        assert list(trace.y) == [order.index(head) + 1 for order in orders.values()]


def test_flow_hover_gives_effect_and_range_of_ranks(grid):
    """Hover has the head's ΔKL with its interval, and its range of ranks where that is known."""
    grid = resampled(grid, 200)
    orders = {"delta": grid.ranking.heads, "other": grid.ranking.heads[::-1]}
    ranges = {"delta": {head: (1, head + 1) for head in range(grid.n_heads)}}
    figure = figures.rank_flow(grid, orders, rank_ranges=ranges)
    effects = single_records(grid)
    for trace in figure.data:
        head = int(trace.meta.split("H")[1])
        of_delta, of_other = trace.hovertext
        assert f"(95% in 1 to {head + 1}) · delta" in of_delta
        assert "95% in" not in of_other
        for text in (of_delta, of_other):
            assert f"at α = 0.3: {shown(effects[head].delta, 'nats')}" in text
            assert text.count("[") == 1


def test_the_gallery_takes_ranges_of_ranks_from_the_analysis(grid, analysis):
    """Ranges of the run's own ranking stand at its name and at its own alpha, nowhere else."""
    heads = tuple(HeadStability(head, 1, Estimate(0.0), 2, 9, {}) for head in range(grid.n_heads))
    stability = replace(analysis.stability, heads=heads)
    drawn = figures.run_figures(grid, replace(analysis, stability=stability))
    for name, own in (("methods_flow", "delta"), ("alpha_flow", "α = 0.3")):
        for trace in drawn[name].data:
            told = [x for x, text in zip(trace.x, trace.hovertext, strict=True) if "2 to 9" in text]
            assert told == [own]


def test_flow_across_layers_says_what_it_cannot_mean(grid):
    """Lines between layers join indices, and the figure says so."""
    figure = figures.rank_flow(
        grid, {"layer 1": range(32), "layer 2": range(31, -1, -1)}, what="layers"
    )
    assert "not head 3 of another" in setting_of(figure)
    assert {trace.meta for trace in figure.data} == {f"H{head}" for head in range(32)}


def test_agreement_is_symmetric_with_ones(grid, analysis):
    """Cells hold the saved measure both ways round, and 1 on the diagonal."""
    heat = figures.agreement_matrix(grid, analysis.agreement).data[0]
    place = {name: index for index, name in enumerate(heat.x)}
    for row in analysis.agreement:
        i, j = place[row.first], place[row.second]
        assert heat.z[i][j] == heat.z[j][i] == row.kendall.value
    assert [heat.z[i][i] for i in range(len(place))] == [1.0] * len(place)


def test_pairs_that_were_not_compared_stay_empty(grid, analysis):
    """A missing pair is no number."""
    heat = figures.agreement_matrix(grid, analysis.agreement[:2]).data[0]
    assert sum(cell is None for row in heat.z for cell in row) == 2


def test_method_pairs_agree_as_their_saved_scores_do(grid, analysis):
    """Pairs that the analysis did not compare get Kendall's tau of the saved scores."""
    rows = method_agreements(grid, analysis)
    assert len(rows) == len(METHODS) * (len(METHODS) - 1) / 2
    rankings = {ranking.method: ranking for ranking in analysis.rankings}
    row = rows[0]
    scores = [np.array([rankings[name].by_head]) for name in (row.first, row.second)]
    assert row.kendall.value == pytest.approx(kendall(*scores)[0])


def test_interactions_are_the_matrix_without_its_diagonal(grid, analysis):
    """Each cell is the pair's interaction; a head does not interact with itself."""
    heat = figures.interaction_matrix(grid, analysis.interactions).data[0]
    saved = analysis.interactions.matrix_nats
    for i in range(32):
        for j in range(32):
            assert heat.hovertext[i][j].count("interaction") == (i != j)
            if i != j and heat.colorbar.tickvals is None:
                assert heat.z[i][j] == saved[i][j]
            assert (heat.z[i][j] is None) == (i == j)
    assert heat.zmin == -heat.zmax


def test_alpha_sweep_shows_the_three_quantities(grid, analysis):
    """KL_raw, KL_mapped and ΔKL stand at every blend strength."""
    figure = figures.alpha_sweep(grid, analysis.alphas)
    for name, key in (("KL_raw", "KL_raw"), ("KL_mapped", "KL_mapped"), ("ΔKL", "delta")):
        assert list(trace_named(figure, name, "nats").y) == [
            getattr(row, key).value for row in analysis.alphas
        ]
    assert "0.05 to 1" in setting_of(figure)


def test_alpha_sweep_opens_with_what_heads_undo(grid, analysis):
    """All heads and the best ones by to_base, then the same heads by coverage."""
    figure = figures.alpha_sweep(grid, analysis.alphas)
    first = traces_of(figure, "undoes")
    assert [trace.name for trace in figure.data if trace.visible] == [each.name for each in first]
    assert len(first) <= 4
    assert list(first[0].y) == [row.to_base_pct.value for row in analysis.alphas]
    for view, field in (("undoes", "head_to_base_pct"), ("coverage", "coverage_pct")):
        for trace in first[1:]:
            head = int(trace.name.split("H")[1])
            drawn = trace_named(figure, trace.name, view)
            assert list(drawn.y) == [getattr(row, field)[head].value for row in analysis.alphas]


def test_alpha_sweep_shows_the_control_and_says_what_depends(grid, analysis):
    """Coverage, the map of shuffled pairs and what heads undo: one figure and one sentence."""
    shares = (99.0, 90.0, 40.0, 3.0)
    points = [
        replace(point, shuffled_pct=exact(share))
        for point, share in zip(analysis.alphas, shares, strict=False)
    ]
    figure = figures.alpha_sweep(grid, points)
    drawn = trace_named(figure, "shuffled pairs", "coverage")
    assert list(drawn.y) == [point.shuffled_pct.value for point in points]
    caption = figure.layout.meta["caption"]
    assert f"shuffled pairs from {min(drawn.y):.0f} to {max(drawn.y):.0f}%" in caption
    undone = [point.to_base_pct.value for point in points]
    assert f"all heads undo from {min(undone):.0f} to {max(undone):.0f}%" in caption


def test_per_prompt_shows_each_prompt_of_the_best_heads(grid):
    """A box holds every prompt's ΔKL, best head first, and hover names the prompt."""
    figure = figures.per_prompt(grid, top=3)
    assert [trace.name for trace in figure.data] == [grid.label(h) for h in grid.ranking.top(3)]
    best = figure.data[0]
    delta_nats = dict(
        zip(grid.prompt_ids, grid.single(grid.ranking.top(1)[0]).delta_nats, strict=True)
    )
    assert list(best.x) == sorted(delta_nats.values())
    for at, text in zip(best.x, best.hovertext, strict=True):
        assert any(pid in text for pid, value in delta_nats.items() if value == at)


def test_per_prompt_hover_gives_the_mean_with_its_interval(grid):
    """Beside the prompt's own ΔKL stands the head's mean over prompts and its 95% interval."""
    grid = resampled(grid, 200)
    heads = grid.ranking.top(3)
    numbers = single_records(grid)
    figure = figures.per_prompt(grid, heads)
    for head, trace in zip(heads, figure.data, strict=True):
        mean = f"mean of {grid.n_prompts} prompts {shown(numbers[head].delta, 'nats')}"
        assert "[" in mean
        assert all(text.endswith(mean) for text in trace.hovertext)


def test_map_quality_stands_against_delta(grid):
    """Each head stands at (held-out R², ΔKL); hover compares with the simpler predictors."""
    rows = synthetic_diagnostics(grid)
    figure = figures.map_quality(grid, rows)
    for trace in figure.data:
        for label, x, y, text in zip(
            trace.customdata, trace.x, trace.y, trace.hovertext, strict=True
        ):
            head = int(label.split("H")[1])
            assert x == rows[head]["fitted"]["r2"]
            assert y == pytest.approx(grid.single(head).delta)
            assert "shuffled pairs" in text


FIELDS = ("to_base_pct", "to_tuned_pct", "delta", "KL_raw_mean", "KL_mapped_mean", "drop_pct")


def test_heatmap_switch_holds_every_quantity(layers):
    """Each button carries its quantity of every head of every layer; large scales keep order."""
    figure = figures.layer_heatmap(layers)
    buttons = figure.layout.updatemenus[0].buttons
    rows = [single_records(grid) for grid in layers.values()]
    for button, field in zip(buttons, FIELDS, strict=True):
        shown = np.array(button.args[0]["z"][0], dtype=float)
        values = np.array([[getattr(each, field).value for each in row] for row in rows])
        if button.args[0]["colorbar.tickvals"][0] is None:
            assert shown == pytest.approx(values)
        else:
            assert np.array_equal(np.argsort(shown, None), np.argsort(values, None))
    assert [list(row) for row in figure.data[0].z] == buttons[0].args[0]["z"][0]


def test_heatmap_cells_name_their_heads(layers):
    """Hover and selection know a cell as its head, with numbers and intervals."""
    heat = figures.layer_heatmap(layers).data[0]
    assert heat.customdata[3][5] == "L3H5"
    assert heat.hovertext[3][5].startswith("<b>L3H5</b><br>undoes ")
    assert "ΔKL " in heat.hovertext[3][5]
    assert heat.hovertext[3][5].count("[") >= 3


def test_global_ranking_orders_all_layers(layers):
    """By to_base, and by ΔKL when asked: marks fall, and no head left out is better."""
    figure = figures.global_ranking(layers, top=10)
    buttons = figure.layout.updatemenus[0].buttons
    for button, score in zip(buttons, ("to_base", "delta"), strict=True):
        rankings = [grid.ranking_by(score) for grid in layers.values()]
        everyone = sorted((value for each in rankings for value in each.scores), reverse=True)
        assert list(button.args[0]["x"][0]) == pytest.approx(everyone[:10])
        assert button.args[1]["yaxis.categoryarray"] == button.args[0]["customdata"][0]
    assert list(figure.data[0].x) == list(buttons[0].args[0]["x"][0])


def test_layer_curves_name_the_layers_without_coverage(layers):
    """A layer whose coverage is undefined has no line, and the setting says which."""
    noisy = replace(layers[2], noise_floor_nats=1e3)
    figure = figures.layer_curves({**layers, 2: noisy}, main=1)
    assert {trace.name for trace in figure.data if trace.name} == {"layer 0", "layer 1", "layer 3"}
    assert "undefined in layers 2" in setting_of(figure)


@pytest.fixture(scope="module")
def comparison(layers):
    """A comparison of the layers, with made-up curves and ranges of ranks."""
    compared = compare_layers({layer: resampled(grid, 100) for layer, grid in layers.items()})
    rows = [replace(row, curve=curve("delta", layers[row.layer], 1.0)) for row in compared.rows]
    coverage = tuple(about(100 * k / 32, k / 2) for k in range(33))
    rows = [replace(row, curve=replace(row.curve, coverage_pct=coverage)) for row in rows]
    ranking = [replace(row, rank_low=2, rank_high=9) for row in compared.ranking]
    return replace(compared, rows=tuple(rows), ranking=tuple(ranking))


def test_a_comparison_fills_the_layers_curves(layers, comparison):
    """With a comparison at hand each layer's curve has every k."""
    line = trace_named(figures.layer_curves(layers, comparison), "layer 2")
    assert list(line.x) == list(range(33))
    assert line.y[8] == 25.0
    assert line.hovertext[8] == "<b>layer 2</b><br>k = 8: coverage 25% [21, 29]"


def test_layer_curves_of_grids_alone_have_intervals_too(layers):
    """Without a comparison, hover has the coverage of the measured sets with its interval."""
    layers = {layer: resampled(grid, 200) for layer, grid in layers.items()}
    line = trace_named(figures.layer_curves(layers), "layer 1")
    conditions = [layers[1][f"top{k}"] for k in layers[1].settings.patching.k]
    numbers = records(layers[1], conditions)
    for each in numbers:
        at = list(line.x).index(len(each.heads))
        assert line.hovertext[at].endswith(f"coverage {shown(each.coverage_pct, '%')}")


def test_a_comparison_adds_ranges_of_ranks(layers, comparison):
    """Hovering a mark of the global ranking tells how far its rank moves."""
    buttons = figures.global_ranking(layers, comparison, top=5).layout.updatemenus[0].buttons
    for button, told in zip(buttons, (False, True), strict=True):
        texts = button.args[0]["hovertext"][0]
        assert all(("(95% in 2 to 9)" in text) == told for text in texts)


def test_cost_bars_carry_their_ratio():
    """Each bar says how many times the reference it takes."""
    figure = cost_bars({"plain": 2.0, "fast": 0.5}, reference="plain", setting=("cpu",))
    assert list(figure.data[0].text) == ["1×", "0.25×"]
    assert "cpu" in setting_of(figure)


def test_a_run_gets_every_figure_it_has_data_for(grid, analysis, layers):
    """With everything at hand all figures are drawn; with the grid alone, those of the grid."""
    provenance = {"maps": {"26": {"diagnostics": synthetic_diagnostics(grid)}}}
    alone = figures.run_figures(grid)
    full = figures.run_figures(grid, analysis, layers=layers, provenance=provenance)
    assert set(alone) == {"ranking", "coverage", "plane", "prompts"}
    assert set(full) == set(alone) | {
        "ladder",
        "methods",
        "methods_flow",
        "methods_agreement",
        "map_kind_agreement",
        "interactions",
        "alpha",
        "alpha_flow",
        "layers",
        "layers_ranking",
        "layers_coverage",
        "maps",
    }
    for figure in full.values():
        for part in ("α =", "val, n =", "procrustes_scaled", "KL(patched ‖ clean)", "bfloat16"):
            assert part in setting_of(figure)


def test_titles_fit_a_narrow_window(grid, analysis, layers):
    """Titles are short enough for 400 px, and so is every line of the setting."""
    for figure in figures.run_figures(grid, analysis, layers=layers).values():
        assert len(figure.layout.title.text) <= 45
        setting = next(n.text for n in figure.layout.annotations if n.name == "setting")
        assert max(map(len, setting.split("<br>"))) <= 70


def test_what_cannot_be_drawn_is_said_in_one_sentence(grid, layers):
    """Unknown quantities, missing references and empty input name what is allowed."""
    for draw, said in (
        (lambda: figures.layer_heatmap(layers, quantity="kl"), "'kl'.*to_base, to_tuned, delta"),
        (lambda: cost_bars({"a": 1.0}, reference="b", setting=()), "'b'.*a"),
        (lambda: figures.rank_flow(grid, {}), "at least one"),
        (lambda: figures.agreement_matrix(grid, ()), "at least two"),
    ):
        with pytest.raises(UserError, match=said):
            draw()
