"""Units of work: a job's pieces and their shares."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq4lens.cluster.many import WHOLE, Share, divides_prompts
from rq4lens.cluster.pieces import divided, inward, pieces_of
from rq4lens.config import Patching
from rq4lens.errors import UserError
from rq4lens.patching.grid import GridPlan
from rq4lens.patching.measured import Measurer
from rq4lens.patching.patch import Effects, into_side


class Alone:
    """Stands for an experiment; notes what it is asked to measure at once."""

    groups = ("a",)

    def __init__(self, n_heads):
        self.n_heads = n_heads
        self.asked = []

    def effects(self, patches, progress=None):  # noqa: ARG002 - as the protocol has it
        """Nothing happens anywhere."""
        self.asked.append(tuple(patches))
        return Effects(*np.zeros((4, len(patches), 1)))


def plan(n_heads=32, layer=3, control=1, ks=(1, 2, 4, 8), seeds=(0, 1, 2), alpha=0.3):
    settings = Patching(layer=layer, control_layer=control, k=ks, random_seeds=seeds, alpha=alpha)
    return GridPlan(n_heads, settings)


@given(
    n_heads=st.integers(1, 70),
    ks=st.lists(st.integers(1, 8), max_size=4, unique=True),
    seeds=st.lists(st.integers(0, 20), max_size=4, unique=True),
)
def test_pieces_are_the_chunks_of_a_single_process(n_heads, ks, seeds):
    """Cut from the plan in the same places, so that every product has the same rows."""
    grid = plan(n_heads, ks=tuple(k for k in ks if k <= n_heads), seeds=tuple(seeds))
    alone = Alone(n_heads)
    Measurer(alone).conditions(grid.fixed())
    assert [piece.patches for piece in pieces_of([grid], "cpu")] == alone.asked


def test_pieces_of_a_sweep_are_its_chunks_and_measure_all_layers_at_once_one_time():
    """What the layers share is in the first layer's pieces, and moves no other layer's cuts."""
    plans, alone = [plan(20, layer, None) for layer in (0, 2, 1)], Alone(20)
    measurer = Measurer(alone)
    for each in plans:
        measurer.conditions(each.fixed())
    pieces = pieces_of(plans, "cpu")
    assert [piece.patches for piece in pieces] == alone.asked
    assert [piece.layers for piece in pieces].count(()) == 2
    assert all(len({into_side(patch) for patch in piece.patches}) == 1 for piece in pieces)


def test_pieces_are_addressed_by_what_they_measure():
    """The same plans give the same keys in the same order; anything else gives others."""
    one, again = (pieces_of([plan()], "cpu", "job") for _ in range(2))
    assert [piece.key for piece in one] == [piece.key for piece in again]
    assert {piece.key for piece in one}.isdisjoint(
        x.key for x in pieces_of([plan()], "cpu", "other job")
    )
    for other in (
        pieces_of([plan(alpha=0.5)], "cpu", "job"),
        pieces_of([plan(layer=2)], "cpu", "job"),
    ):
        assert [piece.key for piece in one] != [piece.key for piece in other]
        for first, second in product(one, other):
            assert (first.key == second.key) == (first.patches == second.patches)


def test_divided_pieces_cover_each_condition_and_prompt_once():
    """Each has a key of its own, and a stretch of them touches few prompts."""
    wholes, parts = pieces_of([plan()], "cpu", "job"), [("a", "b"), ("c",)]
    pieces = divided(wholes, parts)
    assert [piece.prompts for piece in pieces] == [parts[0]] * len(wholes) + [parts[1]] * len(
        wholes
    )
    assert [piece.whole for piece in pieces] == wholes * 2
    assert len({piece.key for piece in (*pieces, *wholes)}) == 3 * len(wholes)


@pytest.mark.parametrize(
    ("division", "n_pieces", "n_workers", "n_parts", "expected"),
    [
        ("auto", 4, 1, 5, False),
        ("auto", 4, 2, 1, False),
        ("auto", 4, 8, 5, True),
        ("auto", 31, 2, 5, True),
        ("auto", 32, 2, 5, False),
        ("prompts", 1000, 1, 2, True),
        ("prompts", 1000, 1, 1, False),
        ("conditions", 1, 8, 5, False),
    ],
)
def test_prompts_are_divided_where_pieces_are_few(division, n_pieces, n_workers, n_parts, expected):
    """By default where several workers have few pieces each; never within a clean pass."""
    assert divides_prompts(division, n_pieces, n_workers, n_parts) == expected


@given(n=st.integers(1, 12), n_layers=st.integers(1, 9), n_lists=st.integers(1, 5))
def test_shares_cover_everything_once(n, n_layers, n_lists):
    """The shares of a whole hold each piece exactly once, also of several lists end to end."""
    lists = [
        pieces_of([plan(8, layer, None) for layer in range(n_layers)], "cpu", str(place))
        for place in range(n_lists)
    ]
    held = []
    for number in range(1, n + 1):
        share = Share.of(number, n)
        for place, pieces in enumerate(lists):
            part = share.within(place, n_lists)
            held += part.cut(pieces) if part else []
    assert held == [piece for pieces in lists for piece in pieces]


def test_a_share_of_several_lists_touches_few_of_them():
    """With as many lists as shares, each share is one whole list: its models are loaded once."""
    for number in range(1, 6):
        parts = [Share.of(number, 5).within(place, 5) for place in range(5)]
        assert parts == [WHOLE if place == number - 1 else None for place in range(5)]


@given(st.integers(1, 40))
def test_equal_parts_of_the_layers_cost_about_the_same(half):
    """Lowest and highest in turn: each two neighbours have the same sum."""
    order = inward(range(2 * half))
    assert sorted(order) == list(range(2 * half))
    assert {a + b for a, b in zip(order[::2], order[1::2], strict=True)} == {2 * half - 1}


def test_a_share_is_written_with_a_slash():
    """The third quarter of the work."""
    assert Share.parse(" 3/4") == Share(Fraction(1, 2), Fraction(3, 4))


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "-1/4", "1/0", "a/b", "1/2/3", "1.5/4"])
def test_anything_else_is_no_share(text):
    """It is refused with the way to write it."""
    with pytest.raises(UserError, match="as '2/4'"):
        Share.parse(text)
