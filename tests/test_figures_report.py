"""The report as a file: what it says is in the results, and nothing in it can run."""

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from markupsafe import escape
from synthetic import resampled, synthetic_grid
from synthetic_analysis import about, curve, synthetic_analysis

from rq4lens import figures
from rq4lens.analysis.analyse import analyse
from rq4lens.analysis.effects.table import records
from rq4lens.analysis.statistics.bootstrap import Estimate
from rq4lens.analysis.structure.layers import compare_layers
from rq4lens.figures import plane
from rq4lens.figures.numbers import rounded
from rq4lens.figures.page import report, sections
from rq4lens.figures.page.report import script_json
from rq4lens.figures.page.words import WORDS

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
    assert sections_of(page) == [
        *("findings", "heads", "study", "prompts", "provenance"),
        *("questions", "words"),
    ]
    assert "No analysis was made" in page


def test_an_analysis_adds_its_sections(grid):
    """Claims, controls, rankings and structure appear with the analysis."""
    analysis = synthetic_analysis(grid)
    page = report_page(grid, analysis, provenance={})
    assert {"controls", "rankings", "structure"} <= set(sections_of(page))
    for claim in (*analysis.claims, *analysis.study_claims):
        assert f"<li>{escape(claim)}</li>" in page


def test_the_page_on_reading_a_report_has_its_sections_in_order(grid):
    """Headings of the page are titles of the report, and every title has its heading."""
    page = Path(__file__).parent.parent / "docs" / "how-to" / "reading-the-report.md"
    headings = re.findall(r"^## (.+)$", page.read_text("utf-8"), re.MULTILINE)[:-1]
    of_run = {"cards_reason": "the models are gone"}
    layers = {25: grid, 26: grid}
    shown = figures.Report(grid, synthetic_analysis(grid), provenance=of_run, layers=layers)
    made = sections.sections(shown)
    titles = ["The answer", *(section.title for section in made[1:])]
    assert [heading for heading in headings if heading in titles] == titles
    source = Path(sections.__file__).read_text("utf-8")
    assert all(f'"{heading}"' in source for heading in headings if heading not in titles)


def test_the_first_screen_is_the_answer(grid):
    """A headline, then the sentences, then tiles of the heads that carry most, then the table."""
    analysis = synthetic_analysis(grid)
    page = report_page(grid, analysis, provenance={})
    first = page[page.index('<section id="findings"') :].split("</section>")[0]
    order = [first.index(part) for part in ("<h2", "<li>", 'class="tile"', "<table>")]
    assert order == sorted(order)
    best = grid.ranking_by("to_base").top(3)
    assert re.findall(r'data-tile="(\w+)"', first) == [grid.label(head) for head in best]
    for head in best:
        assert analysis.kinds.heads[head].kind in first


def test_the_headline_claims_no_more_than_the_sentences(grid):
    """Where nothing is claimed, the headline says so and not what one head undoes."""
    silent = replace(synthetic_analysis(grid), claims=("A.", "Nothing is claimed about heads: b."))
    headline = re.search(r'<h2 id="findings-title">([^<]+)', report_page(grid, silent))[1]
    assert headline == "Nothing is claimed about heads here"


def cells_of(page) -> list[str]:
    return re.findall(r"<t[dh][^>]*>([^<]+)</t[dh]>", page)


def test_no_cell_is_more_precise_than_its_interval(grid):
    """The last digit of a number is not far below the width of its interval."""
    page = report_page(grid, synthetic_analysis(grid), provenance={})
    number = r"-?[\d.]+(?:e[+-]\d+)?"
    found = [
        match
        for text in cells_of(page)
        if (match := re.fullmatch(rf"({number})%? \[({number}), ({number})\]", text))
    ]
    assert len(found) > 50
    for match in found:
        value, low, high = match.groups()
        digits = len(value.partition("e")[0].partition(".")[2])
        step = 10.0 ** (int(value.partition("e")[2] or 0) - digits)
        # Half the width may round down to one digit.
        assert float(high) - float(low) >= 0.9 * step or step >= 0.1 or float(high) == float(low)


def test_stand_ins_have_their_share_and_a_colour(grid):
    """Green where the stand-in is clearly worse than the map, orange where it is not."""
    analysis = synthetic_analysis(grid)
    first, *others = analysis.stand_ins
    good = first.behind_nats.value
    as_good = replace(first, behind_nats=about(0.0, good))
    for row, look in ((first, "good"), (as_good, "bad")):
        page = report_page(grid, replace(analysis, stand_ins=(row, *others)), provenance={})
        line = page[page.index(f'<th scope="row">{row.name}</th>') :].split("</tr>")[0]
        assert re.search(rf'class="number {look}"[^>]*>3% \[-1, 7\]<', line)


def test_settings_stand_once_on_the_page(grid):
    """What all figures share stands at the top, and not below each of them."""
    page = report_page(grid, synthetic_analysis(grid), provenance={})
    body = page.replace(plotly_script(page), "").split('<script type="application/json"')[0]
    assert body.count("patched ‖ clean") == 1


def test_words_are_explained_where_they_stand(grid):
    """Headings of tables carry their meaning, and the end of the page lists all words."""
    page = report_page(grid, synthetic_analysis(grid), provenance={})
    for word in ("undoes", "gives base", "recovered", "kind", "multiple"):
        assert f'<span title="{escape(WORDS[word])}">{word}</span>' in page
    for word, text in WORDS.items():
        assert f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" in page


def test_the_report_holds_the_questions_of_the_documentation(grid):
    """Each of the FAQ with its answer, linked from the top; no markup is left in it."""
    page = report_page(grid)
    faq = (Path(figures.__file__).parent / "page" / "faq.md").read_text(encoding="utf-8")
    asked = re.findall(r"^\*\*(.+)\*\*$", faq, re.MULTILINE)
    assert len(asked) > 10
    part = page[page.index('<section id="questions"') : page.index('<section id="words"')]
    assert re.findall("<h3>(.+)</h3>", unescape(part)) == asked
    assert not re.search(r"[`*]|\]\(", part)
    assert '<a href="#questions">' in page


def test_many_prompts_do_not_make_the_page_large(grid, monkeypatch):
    """It lists those with the largest effects, says so, and draws as many points of a head."""
    for module, limit in ((plane, "MOST_POINTS"), (report, "MOST_PROMPTS")):
        monkeypatch.setattr(module, limit, 10)
    monkeypatch.setattr(sections, "MOST_PROMPTS", 10)
    page = report_page(grid)
    assert "The 10 of 30 with the largest ΔKL" in page
    data = json.loads(re.search('id="data">(.+?)</script>', page)[1])
    size = dict(zip(grid.prompt_ids, abs(grid.full.delta_nats), strict=True))
    assert set(data["prompts"]["ids"]) == set(sorted(size, key=size.get)[-10:])
    assert all(len(each["raw"]) == 10 for each in data["prompts"]["conditions"])
    box = data["figures"]["prompts"]["data"][0]
    assert len(box["hovertext"]) == 10


def test_what_is_undefined_is_said_once_with_what_to_do(grid):
    """A layer without an effect: the reason stands in the answer, followed by the remedy."""
    page = report_page(replace(grid, noise_floor_nats=1e3), provenance={})
    page = page.split('<script type="application/json"')[0]
    assert page.count("Coverage is undefined: ") == 1
    assert page.count("Shares of the gap are undefined: ") == 1
    assert "Measure more prompts" in page


def test_heads_have_the_p_values_of_the_runs_own_alpha(grid):
    """Heads are tested at several alphas; the table of one alpha shows its own tests."""
    analysis = analyse(resampled(grid, 100))
    own = tuple(replace(test, p_max_t=0.0123) for test in analysis.tests.tests)
    other = tuple(replace(test, alpha=1.0, p_max_t=0.0987) for test in own)
    tests = replace(analysis.tests, tests=own + other, family="32 heads x 2 alphas")
    page = report_page(grid, replace(analysis, tests=tests), provenance={})
    assert ">0.012</td>" in page
    assert ">0.099</td>" not in page
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
    cells = re.findall(r"<td[^>]*>([^<]*)", row)
    assert cells[4] == rounded(compared.rows[0].delta)
    assert other.label(other.ranking_by("to_base").top(1)[0]) in row
    assert cells[6:8] == ["7", "0.25"]


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
    for cond in ("top4", "full", "ctrl_full", "head3"):
        assert f">{rounded(rows[cond].delta)}<" in page
        assert f">{rounded(rows[cond].to_base_pct, '%')}<" in page
    for trace in figures.ranking_bars(seeded).data[:1]:
        for at, label in enumerate(trace.customdata):
            row = rows[label.removeprefix("L26").replace("H", "head")]
            low, high = row.to_base_pct.interval
            assert trace.x[at] + trace.error_x.array[at] == pytest.approx(high, rel=1e-9)
            assert trace.x[at] - trace.error_x.arrayminus[at] == pytest.approx(low, rel=1e-9)
            for found, unit in ((row.delta, " nats"), (row.drop_pct, "%"), (row.coverage_pct, "%")):
                low, high = found.interval
                assert f"{found.value:.3g}{unit} [{low:.3g}, {high:.3g}]" in trace.hovertext[at]


def test_every_condition_stands_in_the_table(grid):
    """The first table lists top-k, random-k, the layers and all layers with what they undo."""
    page = report_page(grid, provenance={})
    rows = {row.cond: row for row in records(grid)}
    for title, cond in (
        ("best 4 by ΔKL: ", "top4"),
        ("all of layer 26", "full"),
        ("all of control layer 24", "ctrl_full"),
        ("all of all layers", "every_layer"),
    ):
        row = page[page.index(f'<th scope="row">{title}') :].split("</tr>")[0]
        assert f">{rounded(rows[cond].to_base_pct, '%')}</td>" in row
    drawn = [rows[f"rand8_s{seed}"].to_base_pct.value for seed in (0, 1, 2)]
    row = page[page.index('<th scope="row">3 random sets of 8') :].split("</tr>")[0]
    assert f">{min(drawn):.0f} to {max(drawn):.0f}%</td>" in row


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
    hostile = replace(grid, prompt_ids=tuple(f"{HOSTILE}{i}" for i in range(9)))
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
