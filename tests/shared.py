"""Small pairs and everything measured on them, made once in each process that runs tests."""

import gc
import os

import checks  # noqa: F401 - before the package is imported
import pytest
import torch
from hypothesis import settings
from tiny import (
    ALPHA,
    CONTROL,
    FAST,
    MAIN,
    MicroFormula,
    fine_tuned,
    grid_of,
    pair_of,
    prepared,
    random_prompts,
    tiny_model,
)

from rq4lens.jobs import run as run_job
from rq4lens.models.catalog import load_pair
from rq4lens.models.load.lens import HAS_HOOKED
from rq4lens.models.prompts.reading import tokenize
from rq4lens.patching.maps.fitting import fit_maps

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads of their own make small products many times slower.
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)

# A busy machine is no failing example.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_finish():
    """Let collections of garbage pass over what was imported: it stays to the end.

    statsmodels asks for a full collection with every table of p-values it corrects. Those that
    nobody asks for come more seldom: they take a tenth of the time of a small run.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(scope="module")
def one_thread():
    """Processes that are compared byte by byte compute alike: this one with one thread too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_pages(monkeypatch):
    """A run without figures and report: they are drawn from its numbers, and change none."""
    monkeypatch.setattr(run_job, "write_pages", lambda *_: None)


@pytest.fixture(scope="module")
def tokenized_once():
    """Prompts that many pairs share are tokenized once by each tokenizer."""
    known = {}

    def remembered(prompts, tokenizer, reading):
        key = (prompts.fingerprint, id(tokenizer), reading)
        if key not in known:  # the tokenizer stays, so that its id is not given away
            known[key] = tokenizer, tokenize(prompts, tokenizer, reading)
        return known[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rq4lens.models.pair.tokenize", remembered)
        yield


@pytest.fixture(scope="session")
def micro():
    """The formulas of the base and the tuned micro model, and both as a pair."""
    if not HAS_HOOKED:
        pytest.skip("no bridge is made of plain weights")
    words = ("a", "b", "c", "d", "e")
    base, tuned = MicroFormula(seed=1), MicroFormula(seed=2)
    prompts = random_prompts(words, n_train=24, n_val=8, seed=3)
    return base, tuned, pair_of(base.model(), tuned.model(), prompts, words)


@pytest.fixture(scope="session")
def tiny_pair():
    """A random decoder and a copy with other attention weights and two rotated heads."""
    base = tiny_model()
    return pair_of(base, fine_tuned(base), random_prompts())


@pytest.fixture(scope="session")
def tiny_maps(tiny_pair):
    """The default maps of the tiny pair's main and control layer."""
    return fit_maps(tiny_pair, [MAIN, CONTROL])


@pytest.fixture(scope="session", params=[FAST, "hooks"])
def tiny_experiment(tiny_pair, tiny_maps, request):
    """The tiny pair ready to be measured, by the fast engine and by the reference."""
    return prepared(tiny_pair, tiny_maps, engine=request.param)


@pytest.fixture(scope="session")
def tiny_grid(tiny_pair, tiny_maps):
    """The main job's grid of the tiny pair."""
    return grid_of(tiny_pair, tiny_maps, MAIN, CONTROL, ALPHA, ks=(1, 2, 4))


@pytest.fixture(scope="session")
def etiquette():
    """The pair in the box."""
    return load_pair("etiquette")
