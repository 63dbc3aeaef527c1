"""The report and single figures in a real headless Chromium, with the network off."""

import os
from pathlib import Path

import pytest

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
from synthetic import synthetic_grid
from synthetic_analysis import synthetic_analysis, synthetic_diagnostics
from synthetic_card import synthetic_card

from rq4lens import figures
from rq4lens.heads import Head

ARTIFACTS = Path(__file__).parents[1] / "test-artifacts"
HOSTILE = '</script><img src=x onerror="window.hacked = 1">{{ 7 * 7 }}'

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    """Chromium, or the reason why these tests cannot run; in CI that is a failure."""
    path = figures.find_browser()
    missing = "Chrome or Chromium" if path is None else "playwright" if not sync_playwright else ""
    if missing:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say(f"{missing} is not installed: these tests drive a real browser")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def grid():
    return synthetic_grid(n_prompts=60)


@pytest.fixture(scope="module")
def report(grid, tmp_path_factory):
    """A report of 32 heads and 8 layers, with a hostile prompt text."""
    layers = {
        layer: synthetic_grid(layer, n_prompts=60, layer=layer, control_layer=None)
        for layer in range(20, 28)
    }
    path = tmp_path_factory.mktemp("report") / "report.html"
    content = figures.Report(
        grid,
        synthetic_analysis(grid),
        prompts={prompt: f"{prompt} {HOSTILE}" for prompt in grid.prompt_ids},
        provenance={"maps": {"26": {"diagnostics": synthetic_diagnostics(grid)}}, "note": HOSTILE},
        layers={**layers, 26: grid},
        cards=tuple(synthetic_card(Head(26, head), HOSTILE) for head in grid.ranking.top(24)),
        next_tokens={
            prompt: {model: [[HOSTILE, 0.25]] for model in ("base", "tuned", "patched")}
            for prompt in grid.prompt_ids
        },
    )
    return figures.write_report(path, content)


class Visit:
    """A page in a window without network, and everything it said."""

    def __init__(self, browser, path, width=1200, **context):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, offline=True, **context
        )
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def assert_quiet(self):
        """Nothing on the console, and nothing asked of a network."""
        assert self.said == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in self.asked)

    def drawn(self, name):
        """Scroll to a figure of the report, unfolded, and wait until it is drawn."""
        self.unfold()
        self.page.locator(f"#figure-{name}").scroll_into_view_if_needed()
        self.page.wait_for_selector(f"#plot-{name} .main-svg")
        return self.page.locator(f"#plot-{name}")

    def unfold(self):
        """Open the folded sections."""
        self.page.eval_on_selector_all(
            "details.part", "parts => parts.forEach((part) => { part.open = true; })"
        )

    def point_at(self, selector, place=0):
        """Move the mouse onto a mark, and return what hovering shows."""
        box = self.page.locator(selector).nth(place).bounding_box()
        self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.page.wait_for_selector(".hoverlayer .hovertext")
        return self.page.locator(".hoverlayer .hovertext").first.text_content()

    def highlighted(self, name):
        """The head that a figure marks, empty without one."""
        self.drawn(name)
        return self.page.evaluate(f"document.getElementById('plot-{name}').dataset.highlighted")


@pytest.fixture
def visit(browser):
    """Open pages; afterwards none of them may have complained or asked for anything."""
    visits = []

    def open_page(path, **context):
        visits.append(Visit(browser, path, **context))
        return visits[-1]

    yield open_page
    for each in visits:
        each.context.close()
        each.assert_quiet()


@pytest.fixture(scope="module")
def window(browser, report):
    """One window with the report, for the tests that leave no trace behind."""
    opened = Visit(browser, report)
    yield opened
    opened.context.close()


@pytest.fixture
def opened(window):
    """The report with no head chosen; it may not complain either."""
    window.page.locator("#clear").click()
    yield window
    window.assert_quiet()


def best_head(grid) -> str:
    return grid.label(grid.ranking_by("to_base").top(1)[0])


def test_report_loads_offline_without_complaint(visit, report):
    """Every figure is drawn with the network off, and the console stays empty."""
    opened = visit(report)
    names = opened.page.eval_on_selector_all(
        ".plot", "plots => plots.map(plot => plot.dataset.figure)"
    )
    assert len(names) >= 15
    for name in names:
        opened.drawn(name)
    ARTIFACTS.mkdir(exist_ok=True)
    opened.page.screenshot(path=ARTIFACTS / "report-1200.png", full_page=True)


def test_report_stays_under_eight_megabytes(report):
    """The file can be mailed."""
    assert report.stat().st_size < 8_000_000


@pytest.mark.parametrize("width", [700, 1400])
def test_choosing_a_head_opens_its_card(visit, report, grid, width):
    """One card is open, where the link leads; nothing on the page is wider than the window."""
    opened = visit(report, width=width)
    page, best = opened.page, best_head(grid)
    assert page.locator("details.card[open]").count() == 0
    page.select_option("#head", best)
    assert page.eval_on_selector_all("details.card[open]", "all => all.map(each => each.id)") == [
        f"card-{best}"
    ]
    page.locator("#card").click()
    assert page.url.endswith(f"#card-{best}")
    assert page.locator(f"#card-{best} .tokens").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.hacked") is None
    page.locator("#clear").click()
    assert page.locator("details.card[open]").count() == 0
    assert page.locator("#card").is_hidden()


def test_hovering_names_the_head(opened, grid):
    """The mouse on the longest bar shows the best head and its numbers."""
    opened.drawn("ranking")
    text = opened.point_at("#plot-ranking .bars .point path")
    assert best_head(grid) in text
    assert "gives base" in text


def test_choosing_a_head_in_a_figure_marks_it_everywhere(opened, grid):
    """A click on a bar marks the head in the plane, the heatmap, the flow, the table, the list."""
    opened.drawn("ranking")
    opened.point_at("#plot-ranking .bars .point path")
    opened.page.mouse.down()
    opened.page.mouse.up()
    chosen = best_head(grid)
    for name in ("ranking", "plane", "layers", "methods_flow", "prompts", "maps", "interactions"):
        assert opened.highlighted(name) == chosen
    assert opened.page.locator("tr.chosen button.head").first.text_content() == chosen
    assert chosen in opened.page.locator("#shown").text_content()
    assert opened.page.evaluate("document.getElementById('plot-layers').layout.shapes.length") == 1
    opened.page.locator("#figure-plane").screenshot(path=ARTIFACTS / "report-plane-chosen.png")
    opened.page.locator("#clear").click()
    assert opened.highlighted("plane") == ""


def test_choosing_a_cell_of_the_heatmap_marks_the_bar(opened, grid):
    """A click on a cell works like a click on a bar."""
    layers = opened.drawn("layers")
    head, rows = grid.ranking_by("to_base").top(1)[0], 8
    box = layers.locator(".heatmaplayer image").bounding_box()
    place = {
        "x": box["x"] + box["width"] * (head + 0.5) / 32,
        "y": box["y"] + box["height"] * (26 - 20 + 0.5) / rows,
    }
    opened.page.mouse.move(**place)
    opened.page.wait_for_selector(".hoverlayer .hovertext")
    opened.page.mouse.click(**place)
    assert opened.highlighted("ranking") == best_head(grid)


def test_heads_can_be_chosen_by_keyboard(visit, report, grid):
    """Tab reaches the menu and the table, Enter on a name chooses the head."""
    opened = visit(report)
    opened.drawn("plane")
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.className") == "skip"
    button = opened.page.locator("button.head", has_text=best_head(grid)).first
    button.focus()
    opened.page.keyboard.press("Enter")
    assert opened.highlighted("plane") == best_head(grid)
    assert button.get_attribute("aria-pressed") == "true"


def test_heatmap_switch_shows_the_other_quantity(opened, grid):
    """The switch puts the chosen quantity's numbers and unit into the heatmap."""
    opened.drawn("layers")
    opened.page.locator("#figure-layers .switch button", has_text="drop").click()
    row = opened.page.evaluate("[...document.getElementById('plot-layers').data[0].z[6]]")
    assert row == pytest.approx([single.drop_pct for single in grid.singles])
    assert "drop, alone" in opened.page.locator("#plot-layers .infolayer").text_content()
    opened.page.locator("#figure-layers").screenshot(path=ARTIFACTS / "report-heatmap.png")


def test_the_ranking_switches_to_the_other_order(opened, grid):
    """Its switch shows the heads by ΔKL, and a head that was chosen stays chosen."""
    opened.drawn("ranking")
    opened.page.locator("#head").select_option(best_head(grid))
    opened.page.locator("#figure-ranking .switch button", has_text="ΔKL").click()
    order = "document.getElementById('plot-ranking').layout.yaxis.categoryarray"
    assert opened.page.evaluate(order) == [grid.label(head) for head in grid.ranking.heads]
    names = opened.page.locator("#plot-ranking .ytick text").all_text_contents()
    assert [name.split()[0] for name in names] == opened.page.evaluate(order)
    assert all(len(name.split()) == 2 for name in names)
    assert opened.highlighted("ranking") == best_head(grid)
    bars = "document.getElementById('plot-ranking').data[0]"
    place = opened.page.evaluate(f"{bars}.selectedpoints[0]")
    assert opened.page.evaluate(f"{bars}.customdata[{place}]") == best_head(grid)
    opened.page.locator("#figure-ranking .switch button", has_text="undoes").click()


def test_the_second_half_is_folded_until_it_is_asked_for(visit, report):
    """Sections behind the answer are closed; a link to one opens it."""
    opened = visit(report)
    parts = "[...document.querySelectorAll('details.part')].map((part) => part.open)"
    assert not any(opened.page.evaluate(parts))
    opened.page.locator("nav a[href='#layers']").click()
    opened.page.wait_for_function("document.querySelector('#layers details').open")
    assert sum(opened.page.evaluate(parts)) == 1


def test_dark_heatmaps_are_no_white_rectangles(visit, report):
    """What is near 0 has the colour of the paper, in either mode."""
    opened = visit(report, color_scheme="dark")
    opened.drawn("interactions")
    middle = "document.getElementById('plot-interactions')._fullLayout.colorscale.diverging[2][1]"
    assert opened.page.evaluate(middle) == "#23262C"
    opened.page.locator("#colours").click()
    assert opened.page.evaluate(middle) == "#F5F5F5"


def test_prompt_texts_stay_text(opened):
    """Markup in a prompt is shown letter by letter and runs nowhere."""
    opened.unfold()
    opened.page.locator("#list summary").first.click()
    shown = opened.page.locator("#list .prompt").first.text_content()
    assert HOSTILE in shown
    assert opened.page.evaluate("window.hacked") is None
    assert opened.page.locator("img[src='x']").count() == 0
    assert HOSTILE.replace('"', '\\"') in opened.page.locator("details pre").text_content()


def test_a_prompt_says_what_base_tuned_and_patched_say(opened):
    """The likeliest tokens of both models and of tuned with base's heads, as text."""
    opened.unfold()
    opened.page.locator("#list summary").first.click()
    rows = opened.page.locator("#list details table").first.locator("tr")
    rows.first.wait_for()  # what is folded is drawn when it opens
    said = [f"{who}{HOSTILE} 25.0%" for who in ("base", "tuned", "tuned with base's heads")]
    assert rows.all_text_contents() == said


def test_prompts_can_be_searched_and_sorted(opened, grid):
    """The list shows the matching prompts, largest effect first unless asked otherwise."""
    opened.unfold()
    first = opened.page.locator("#list strong").first
    largest = grid.prompt_ids[int(grid.full.delta_nats.argmax())]
    smallest = grid.prompt_ids[int(grid.full.delta_nats.argmin())]
    assert first.text_content() == largest
    opened.page.locator("#order").select_option("up")
    assert first.text_content() == smallest
    opened.page.locator("#find").fill("p017")
    assert opened.page.locator("#list strong").all_text_contents() == ["p017"]


def test_a_narrow_window_needs_no_sideways_scrolling(visit, report):
    """At 400 px the page itself is 400 px wide; only tables scroll inside their frames."""
    opened = visit(report, width=400)
    for name in ("coverage", "ranking", "plane", "layers"):
        opened.drawn(name)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 400
    opened.page.screenshot(path=ARTIFACTS / "report-400.png", full_page=True)


def test_dark_mode_follows_the_reader(visit, report):
    """A reader who prefers dark gets a dark page and dark figures, and can switch back."""
    opened = visit(report, color_scheme="dark")
    opened.drawn("coverage")
    paper = "document.getElementById('plot-coverage')._fullLayout.paper_bgcolor"
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(21, 23, 27)"
    )
    assert opened.page.evaluate(paper) == "#15171B"
    opened.page.screenshot(path=ARTIFACTS / "report-dark.png")
    opened.page.locator("#colours").click()
    assert opened.page.evaluate(paper) == "#FFFFFF"


def test_printing_draws_every_figure(visit, report):
    """Figures that were never scrolled to are on paper, in light colours."""
    opened = visit(report, color_scheme="dark")
    (ARTIFACTS / "report.pdf").write_bytes(opened.page.pdf(format="A4"))
    left = opened.page.locator(".plot:not([data-drawn])").count()
    assert left == 0


@pytest.mark.parametrize("name", ["ranking", "plane"])
def test_single_figures_work_offline(visit, grid, tmp_path, name):
    """A figure's own page loads without network and names the head on hover."""
    drawing = {"ranking": figures.ranking_bars, "plane": figures.head_plane}[name](grid)
    opened = visit(figures.write_html(drawing, tmp_path / f"{name}.html"))
    opened.page.wait_for_selector(f"#{name} .main-svg")
    mark = {"ranking": ".bars .point path", "plane": ".scatterlayer .trace .points path"}[name]
    assert "L26H" in opened.point_at(f"#{name} {mark}")
    ARTIFACTS.mkdir(exist_ok=True)
    opened.page.screenshot(path=ARTIFACTS / f"figure-{name}.png")


def test_the_heatmap_of_a_single_figure_has_its_own_switch(visit, tmp_path):
    """Outside the report the switch is part of the figure."""
    layers = {
        layer: synthetic_grid(layer, n_prompts=9, layer=layer, control_layer=None)
        for layer in range(2)
    }
    opened = visit(figures.write_html(figures.layer_heatmap(layers), tmp_path / "layers.html"))
    opened.page.locator("#layers .updatemenu-button", has_text="drop").click()
    row = opened.page.evaluate("[...document.getElementById('layers').data[0].z[1]]")
    assert row == pytest.approx([single.drop_pct for single in layers[1].singles])
