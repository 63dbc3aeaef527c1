"""What README and documentation print is what the program prints today."""

import re
from pathlib import Path

import pytest

import rq4lens as rq
from rq4lens.jobs import run as run_job

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the demo says: the sweep, then the main job on its layers."""
    folder, config = tmp_path_factory.mktemp("demo"), rq.preset("etiquette")
    with pytest.MonkeyPatch.context() as patched:
        for pages in ("write_pages", "_write_cards"):
            patched.setattr(run_job, pages, lambda *_: None)
        sweep = rq.sweep_layers(config, folder)
        return {"sweep": sweep.summary, "run": rq.run(config, folder).summary}


def printed_in(page: str) -> list[str]:
    """The printouts of a page."""
    return re.findall(r"```text\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


NUMBER = re.compile(r"-?\d[\d.]*(?:e[+-]\d+)?")


def assert_alike(shown: str, today: str):
    """The same words, and numbers that differ by no more than machines do."""
    words, numbers = (
        [read(" ".join(text.split())) for text in (shown, today)]
        for read in (NUMBER.split, NUMBER.findall)
    )
    assert words[0] == words[1]
    before, now = ([float(each.rstrip(".")) for each in found] for found in numbers)
    assert before == pytest.approx(now, rel=0.05, abs=1e-5)


@pytest.mark.slow
def test_the_readme_prints_the_answer_of_today(said):
    """Between the setting and the table of `make demo`."""
    (answer,) = printed_in("README.md")
    assert_alike(answer, said["run"].split("\n\n")[1])


@pytest.mark.slow
def test_the_page_of_the_built_in_pairs_prints_the_sweep_of_today(said):
    """Every line of `rq4lens sweep --pair etiquette`."""
    (sweep,) = printed_in("docs/builtin-pair.md")
    assert_alike(sweep, said["sweep"])


def test_the_prompt_of_the_readme_says_what_it_says():
    """Base, tuned, and tuned with L1H0 from base, on the prompt that the README shows."""
    shown = re.search(
        r"After \*(.+?)\* the base model says `(\w+)` and the tuned model `(\w+)`",
        " ".join((ROOT / "README.md").read_text("utf-8").split()),
    )
    text, base, tuned = shown.groups()
    pair = rq.load_pair("etiquette")
    name = next(each.id for each in pair.prompts if each.text == text)
    ready = rq.prepare(pair, rq.fit_maps(pair, 1), place=rq.Place(engine="hooks"))
    answers = []
    for alpha in (1.0, 0.0):
        with rq.patch(ready, layer=1, heads="L1H0", alpha=alpha, prompts=[name]) as it:
            answers.append(it.to_dataframe().answer[0].strip())
    assert answers == [base, tuned]
    with rq.patch(ready, layer=1, heads="NONE", source="tuned", prompts=[name]) as it:
        assert it.to_dataframe().answer[0].strip() == base
