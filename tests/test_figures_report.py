"""The report as a file: what it says is in the results, and nothing in it can run."""

import json
import re
from dataclasses import replace

import pytest
from synthetic import resampled, synthetic_grid
from synthetic_analysis import curve, synthetic_analysis

from rq4lens import figures
from rq4lens.analysis.analyse import analyse
from rq4lens.analysis.effects.table import records
from rq4lens.analysis.statistics.bootstrap import Estimate
from rq4lens.analysis.structure.layers import compare_layers
from rq4lens.figures.page.report import script_json

HOSTILE = "</script><img src=x onerror=alert(1)>&\u2028"


@pytest.fixture(scope="module")
def grid():
    return synthetic_grid(n_prompts=30)


def report_page(*args, **parts) -> str:
    return figures.report_page(figures.Report(*args, **parts))


def sections_of(page) -> list[str]:
    return re.findall(r'<section id="([\w-]+)"', page)


def data_of(page) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_json_in_a_script_element_cannot_end_it():
    """Escaped JSON holds no <, > or &, and reads back as what it was."""
    text = script_json({"a": HOSTILE, "b": [1.5, None]})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": HOSTILE, "b": [1.5, None]}


def test_undefined_numbers_are_refused_rather_than_written_as_nan():
    """JSON is strict: a NaN is an error."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json({"a": float("nan")})


def test_sections_without_data_are_left_out(grid):
    """With the grid alone there are no controls, layers or maps, and no empty headings."""
    page = report_page(grid, provenance={})
    assert sections_of(page) == ["findings", "coverage", "heads", "prompts", "provenance"]
    assert "No analysis was made" in page


def test_an_analysis_adds_its_sections(grid):
    """Claims, controls, rankings and structure appear with the analysis."""
    analysis = synthetic_analysis(grid)
    page = report_page(grid, analysis, provenance={})
    assert {"controls", "rankings", "structure"} <= set(sections_of(page))
    assert "Four of 32 heads carry most of the effect. &lt;b&gt;Not&lt;/b&gt; a test." in page


def test_heads_have_the_p_values_of_the_runs_own_alpha(grid):
    """Heads are tested at several alphas; the table of one alpha shows its own tests."""
    analysis = analyse(resampled(grid, 100))
    own = tuple(replace(test, p_max_t=0.0123) for test in analysis.tests.tests)
    other = tuple(replace(test, alpha=1.0, p_max_t=0.0987) for test in own)
    tests = replace(analysis.tests, tests=own + other, family="32 heads x 2 alphas")
    page = report_page(grid, replace(analysis, tests=tests), provenance={})
    assert "0.0123" in page
    assert "0.0987" not in page
    assert "corrected for all tests (32 heads x 2 alphas)" in page


def test_layers_stand_side_by_side(grid):
    """The layers' table holds each layer's full effect, best head, and what a comparison adds."""
    other = synthetic_grid(3, n_prompts=30, layer=25, control_layer=None)
    layers = {25: other, 26: grid}
    compared = compare_layers({layer: resampled(each, 100) for layer, each in layers.items()})
    row = compared.rows[0]
    row = replace(
        row,
        curve=replace(curve("delta", other, 1.0), k90=Estimate(7.0)),
        concentration=replace(row.concentration, gini=Estimate(0.25)),
    )
    comparison = replace(compared, rows=(row,))
    page = report_page(grid, provenance={}, layers=layers, comparison=comparison)
    row = page[page.index('<th scope="row">25</th>') :].split("</tr>")[0]
    assert f"{other.full.delta:.3g} [" in row
    assert other.label(other.ranking.top(1)[0]) in row
    assert re.findall(r"<td[^>]*>([^<]*)", row)[4:6] == ["7", "0.25"]


def test_a_real_analysis_of_a_grid_is_reported(grid):
    """What analyse() makes of a grid goes into the report as it is."""
    analysis = analyse(resampled(grid, 200))
    page = report_page(grid, analysis, provenance={})
    assert {"controls", "rankings", "structure"} <= set(sections_of(page))
    assert analysis.kinds.rule.split(":")[0] in page


def test_intervals_are_those_of_the_results_file(grid):
    """With its own resamples and seed, a run has one interval for each number, wherever it stands.

    That is: in ``rq4_results.json``, in the tables of the report, under the mouse and as a bar.
    """
    seeded = resampled(grid, 500, seed=7)
    rows = {row.cond: row for row in records(seeded)}
    page = report_page(seeded, provenance={})
    for cond in ("top4", "rand8_s2", "full", "ctrl_full", "head3"):
        delta = rows[cond].delta
        assert f">{delta.value:.3g} [{delta.interval.low:.3g}, {delta.interval.high:.3g}]<" in page
    for trace in figures.ranking_bars(seeded).data:
        for at, label in enumerate(trace.customdata):
            row = rows[label.removeprefix("L26").replace("H", "head")]
            low, high = row.delta.interval.pair
            assert trace.x[at] + trace.error_x.array[at] == pytest.approx(high, rel=1e-9)
            assert trace.x[at] - trace.error_x.arrayminus[at] == pytest.approx(low, rel=1e-9)
            for found, unit in ((row.delta, " nats"), (row.drop_pct, "%"), (row.coverage_pct, "%")):
                low, high = found.interval.pair
                assert f"{found.value:.3g}{unit} [{low:.3g}, {high:.3g}]" in trace.hovertext[at]


def test_every_condition_stands_in_the_table(grid):
    """The table lists full, top-k, random-k and control with their ΔKL."""
    page = report_page(grid, provenance={})
    for condition in ("top4", "rand8_s2", "full", "ctrl_full"):
        assert f'<th scope="row">{condition}' in page
    assert f"{grid['top4'].delta:.3g} [" in page


def test_prompts_carry_their_own_numbers(grid):
    """The drill-down holds KL_raw and KL_mapped of every prompt and head, to six digits."""
    page = report_page(grid, prompts={"p003": HOSTILE}, provenance={})
    prompts = data_of(page)["prompts"]
    assert prompts["ids"] == list(grid.prompt_ids)
    assert prompts["texts"][3] == HOSTILE
    assert prompts["texts"][4] is None
    by_name = {row["name"]: row for row in prompts["conditions"]}
    assert by_name["L26H7"]["raw"] == pytest.approx(grid.single(7).kl_raw_nats, rel=1e-5)
    assert by_name["all heads"]["mapped"] == pytest.approx(grid.full.kl_mapped_nats, rel=1e-5)


def test_hostile_names_are_escaped():
    """A pair, a prompt id, provenance and an analysis made of markup add no element."""
    grid = synthetic_grid(n_prompts=9, pair=HOSTILE)
    hostile = type(grid)(
        grid.settings,
        tuple(f"{HOSTILE}{i}" for i in range(9)),
        grid.groups,
        grid.conditions,
        grid.noise_floor_nats,
    )
    analysis = replace(synthetic_analysis(grid), claims=(HOSTILE,))
    page = report_page(hostile, analysis, provenance={"x": HOSTILE})
    assert "<img" not in page.replace(plotly_script(page), "")
    assert page.count("</script>") == 3 + plotly_script(page).count("</script>")


def plotly_script(page) -> str:
    return max(re.findall(r"<script>(.*?)</script>", page, re.DOTALL), key=len)


def test_only_the_reports_own_scripts_may_run(grid):
    """The security policy names the hashes of the two scripts and allows no network."""
    page = report_page(grid, provenance={})
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src &#39;none&#39;")
    assert policy.count("sha256-") == 2
    assert "http" not in policy


def test_same_input_same_report(grid):
    """The report is a function of its input."""
    analysis = synthetic_analysis(grid)
    assert report_page(grid, analysis) == report_page(grid, analysis)


def test_report_refers_to_nothing_outside(grid):
    """No element loads another file."""
    page = report_page(grid, provenance={})
    page = page.replace(plotly_script(page), "")
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]+)"', page))


def test_a_report_opens_with_the_warning_of_its_audit(grid):
    """Too few prompts that both models read alike: the first paragraph; else only the counts."""
    counts = {"n": 40, "n_misaligned": 20, "n_excluded": 3, "n_cut_left": {"base": 7, "tuned": 0}}
    warned = report_page(grid, provenance={"audit": counts | {"warning": "Only <20>!"}})
    first = re.search(r'<section id="findings".*?<p>(.*?)</p>', warned, re.DOTALL)[1]
    assert first == "Only &lt;20&gt;!"
    quiet = report_page(grid, provenance={"audit": counts | {"warning": None}})
    assert "Only" not in re.search(r'<section id="findings".*?</section>', quiet, re.DOTALL)[0]
    settings = re.search(r'<section id="provenance".*?</table>', quiet, re.DOTALL)[0]
    for said in ("20 of 40", "left out because they are not", "cut on the left, base"):
        assert said in settings
    assert "cut on the left, tuned" not in settings
