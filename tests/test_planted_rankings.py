"""Which methods find planted heads; ``benchmarks/planted_pairs.py`` asks the same at length."""

import numpy as np
import pytest
from games import GRADIENT_METHODS
from sklearn.metrics import average_precision_score
from tiny import TINY_HEADS, TINY_LAYERS, pair_of, prepared, random_prompts, tiny_model

from rq4lens.analysis.effects.measured import MeasuredSets
from rq4lens.analysis.rankings.agreement import strengths
from rq4lens.analysis.rankings.compared import rank_heads
from rq4lens.analysis.rankings.methods import METHODS
from rq4lens.heads import Head
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.results import TRANSFERS
from rq4lens.validation.planting import Planting, plant

EXACT = [method for method in METHODS if method not in {*GRADIENT_METHODS, *TRANSFERS}]
"""Methods that look for what a map repairs; transfer looks for what changes the answer."""


def planted(seed, n_rewired=0, drift=0.002, kind="rotated"):
    """Two rotated heads of one layer, their layer's measurements, and which heads they are."""
    rng = np.random.default_rng(seed)
    layer = int(rng.integers(TINY_LAYERS))
    heads = [Head(layer, int(head)) for head in rng.permutation(TINY_HEADS)]
    base = tiny_model(seed)
    tuned = plant(
        base,
        **{kind: heads[:2]},
        rewired=heads[2 : 2 + n_rewired],
        how=Planting(drift=drift, seed=seed),
    ).tuned
    pair = pair_of(base, tuned, random_prompts(n_train=96, n_val=24, seed=seed))
    measured = MeasuredSets.of(prepared(pair, fit_maps(pair, [layer])), layer, 0.3)
    return measured, [head.index for head in heads[:2]], [h.index for h in heads[2:]][:n_rewired]


@pytest.mark.parametrize("seed", range(5))
def test_exact_methods_put_rotated_heads_first(seed):
    """Heads that a map puts right, among heads that only drifted: average precision 1.0."""
    measured, rotated, _ = planted(seed)
    is_rotated = [head in rotated for head in range(TINY_HEADS)]
    for method in [*EXACT, "kl_curvature"]:
        scores = strengths(rank_heads(method, measured))
        assert average_precision_score(is_rotated, scores) == pytest.approx(1), method


@pytest.mark.parametrize("seed", range(5))
def test_relative_drop_tells_rotated_from_rewired(seed):
    """Beside rewired heads, which a map repairs only in part, the relative drop stays right."""
    measured, rotated, _ = planted(seed, n_rewired=1)
    is_rotated = [head in rotated for head in range(TINY_HEADS)]
    scores = strengths(rank_heads("drop_pct", measured))
    assert average_precision_score(is_rotated, scores) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", TRANSFERS)
def test_transfer_finds_what_changes_the_answer_and_only_that(method, seed):
    """Heads that are turned come first; rotated ones, whose `W_O` undoes it, carry nothing."""
    measured, turned, _ = planted(seed, kind="turned", drift=0.0002)
    is_turned = [head in turned for head in range(TINY_HEADS)]
    scores = strengths(rank_heads(method, measured))
    assert average_precision_score(is_turned, scores) == pytest.approx(1)
    measured, rotated, _ = planted(seed)
    ranking = rank_heads(method, measured)
    assert all((ranking.by_head[head] or 0.0) < 5 for head in rotated)
