"""Axes for effects that span decades."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import synthetic_grid

from rq4lens import figures
from rq4lens.figures.numbers import SignedLog, is_wide
from rq4lens.results import ConditionResult, GridResult, PatchRow

sizes = st.floats(-1e6, 1e6, allow_nan=False)


@given(sizes, sizes)
def test_a_signed_axis_keeps_order_and_sign(one, other):
    """Larger values stand further right, 0 stands at 0, and minus is a mirror."""
    axis = SignedLog(1e-4)
    if one < other:
        assert axis.place(one) <= axis.place(other)
    assert axis.place(-one) == -axis.place(one)


def test_a_signed_axis_gives_each_decade_the_same_room():
    """Far from 0, ten times the value is ln 10 further out."""
    axis = SignedLog(1e-4)
    assert axis.place(1.0) - axis.place(0.1) == pytest.approx(math.log(10), rel=1e-4)


def test_ticks_stand_where_their_texts_say():
    """A tick's text is the value that stands at its place."""
    axis = SignedLog(1e-4)
    places, texts = axis.ticks(-0.5, 0.5)
    assert [axis.place(float(text)) for text in texts] == pytest.approx(places)
    assert "0" in texts
    assert places == sorted(places)


def test_narrow_values_keep_a_linear_axis():
    """Values within two decades need no other axis, and neither do zeros."""
    assert SignedLog.of([0.1, -0.2, 0.3]) is None
    assert SignedLog.of([0.0, 0.0]) is None
    assert SignedLog.of([1e-5, 1e-5, 1e-5, 1.0]) is not None
    assert not is_wide([1.0, 50.0])
    assert not is_wide([0.0, 50.0])
    assert not is_wide([None])
    assert is_wide([0.1, 50.0])


@pytest.fixture(scope="module")
def steep():
    """A grid in which each head does a fifth of what the one before it does."""
    grid = synthetic_grid(n_prompts=30, n_heads=16, ks=(1,), random_seeds=())
    rng = np.random.default_rng(0)

    def single(head: int) -> ConditionResult:
        raw = 0.2**head * rng.uniform(0.5, 1.5, 30)
        old = grid.single(head)
        rows = PatchRow(raw, -raw), PatchRow(raw / 10, -raw / 10)
        return ConditionResult(old.cond, old.layer, old.heads, old.alpha, *rows, old.transfer)

    singles = {f"head{head}": single(head) for head in range(16)}
    return GridResult(
        grid.settings, grid.prompt_ids, grid.groups, {**grid.conditions, **singles}, 1e-15
    )


def test_a_steep_plane_is_logarithmic(steep):
    """Where heads span decades both axes are logarithmic, and the points are the results."""
    figure = figures.head_plane(steep)
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    shown = {
        label: (x, y)
        for trace in figure.data
        if trace.customdata is not None
        for label, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
    }
    low, high = figure.layout.xaxis.range
    for head in range(16):
        assert shown[f"L26H{head}"] == pytest.approx(
            (steep.single(head).KL_raw, steep.single(head).KL_mapped)
        )
        assert low < math.log10(shown[f"L26H{head}"][1]) < high


def test_steep_prompts_stand_on_a_signed_axis(steep):
    """Points stand where the axis puts their ΔKL, and hover tells ΔKL itself."""
    figure = figures.per_prompt(steep, top=8)
    values = np.concatenate([steep.single(head).delta_nats for head in steep.ranking.top(8)])
    axis = SignedLog.of(values.tolist())
    best = figure.data[0]
    for x, text, value in zip(
        best.x, best.hovertext, np.sort(steep.single(0).delta_nats), strict=True
    ):
        assert x == pytest.approx(axis.place(value))
        assert f"{value:.3g} nats" in text
