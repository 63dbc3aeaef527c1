"""The examples in docstrings: each public name has one, and it says what happens today."""

import doctest

import pytest

import rq4lens as rq
from rq4lens.jobs import run as run_job
from rq4lens.validation.scenarios import SCENARIOS

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def known(tmp_path_factory, tokenized_once):  # noqa: ARG001 - pairs share their prompts
    """What the package's docstring makes, and a finished run; pages are drawn elsewhere."""
    found = {"rq": rq, "SCENARIOS": SCENARIOS}
    start = doctest.DocTestParser().get_doctest(rq.__doc__, found, "rq4lens", None, None)
    assert not doctest.DocTestRunner().run(start, clear_globs=False).failed
    found = start.globs
    patching = rq.Patching(layer=1, k=(1, 2))
    config = rq.RunConfig(patching=patching, effort=rq.Effort(analysis="grid", resamples=200))
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_job, "write_pages", lambda *_: None)
        rq.run(config, folder, pair=found["pair"])
        yield {**found, "config": config, "folder": folder}


@pytest.mark.parametrize("name", sorted(set(rq.__all__)))
def test_each_public_name_has_an_example_that_runs(name, known):
    """Its docstring shows it on the built-in pair, and the output is today's."""
    test = doctest.DocTestParser().get_doctest(
        getattr(rq, name).__doc__, dict(known), name, None, None
    )
    assert test.examples, f"rq.{name} has no example"
    said = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not result.failed, "".join(said)
