"""Head sets: a spec means a set, and every spec that means nothing is refused in one sentence."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq4lens.errors import UserError
from rq4lens.heads import Head, HeadSet, head_sets

sets = st.integers(1, 40).flatmap(
    lambda n: st.builds(HeadSet.of, st.lists(st.integers(0, n - 1)), st.just(n))
)


@pytest.mark.parametrize(
    ("spec", "heads"),
    [
        ("3,7,12", (3, 7, 12)),
        ("0-3,8", (0, 1, 2, 3, 8)),
        ("12, 3,7", (3, 7, 12)),
        ("3,3,3", (3,)),
        ("1-2,2-3", (1, 2, 3)),
        ("5-5", (5,)),
        (" 0 - 2 , 4 ", (0, 1, 2, 4)),
        ("007", (7,)),
        ("ALL", tuple(range(16))),
        (" all ", tuple(range(16))),
        ("NONE", ()),
        ("None", ()),
        ("0-15", tuple(range(16))),
    ],
)
def test_a_spec_means_a_set(spec, heads):
    """Order, repetition, spaces and overlapping ranges do not matter; ALL and NONE are words."""
    assert HeadSet.parse(spec, 16).indices == heads


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("16", "head 16 does not exist.*heads 0 to 15"),
        ("0-16", "head 16 does not exist"),
        ("-1", "cannot read '-1'"),
        ("3,-1", "cannot read '-1'"),
        ("5-2", "runs backwards: write '2-5'"),
        ("three", "cannot read 'three'"),
        ("", "cannot read ''"),
        ("   ", "cannot read"),
        ("3,,7", "cannot read ''"),
        ("3;7", "cannot read '3;7'"),
        ("3 7", "cannot read '3 7'"),
        ("1.5", "cannot read '1.5'"),
        ("1e1", "cannot read '1e1'"),
        ("0x1", "cannot read '0x1'"),
        ("1-2-3", "cannot read '1-2-3'"),
        ("ALL,3", "cannot read 'ALL'"),
        ("٣", "cannot read"),
        ("²", "cannot read"),
        ("0-999999999", "longer than any layer"),
        ("9" * 5000, "cannot read"),
        ("1," * 5000, "cannot read ''"),
    ],
)
def test_a_spec_that_means_nothing_is_refused(spec, said):
    """Out of range, negative, backwards, empty, words, other digits: one short sentence each."""
    with pytest.raises(UserError, match=said) as caught:
        HeadSet.parse(spec, 16)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@given(sets)
def test_what_is_printed_reads_back(heads):
    """`parse(str(S)) = S` for every head set."""
    assert HeadSet.parse(str(heads), heads.n_heads) == heads


@given(sets)
def test_a_set_is_its_mask(heads):
    """The mask has a 1 exactly at the set's heads; length and membership agree with it."""
    assert tuple(head for head, bit in enumerate(heads.mask) if bit) == heads.indices
    assert len(heads.mask) == heads.n_heads
    assert sum(heads.mask) == len(heads)
    assert [head in heads for head in range(heads.n_heads)] == [bool(bit) for bit in heads.mask]
    assert tuple(heads) == heads.indices


@given(st.lists(st.integers(0, 9)), st.randoms())
def test_equal_sets_are_one_key(heads, rng):
    """Two ways to name the same heads give equal sets with equal hashes."""
    other = [*heads, *heads]
    rng.shuffle(other)
    assert HeadSet.of(heads, 10) == HeadSet.of(other, 10)
    assert hash(HeadSet.of(heads, 10)) == hash(HeadSet.of(other, 10))


@given(st.text(max_size=30))
def test_no_text_breaks_the_grammar(text):
    """Any text is either a head set or a sentence; nothing else is ever raised."""
    try:
        heads = HeadSet.parse(text, 12)
    except UserError:
        return
    assert all(0 <= head < 12 for head in heads)


@pytest.mark.parametrize(
    ("heads", "written"),
    [((), "NONE"), ((0, 1, 2, 3), "ALL"), ((0, 1, 3), "0-1,3"), ((2,), "2"), ((0, 2), "0,2")],
)
def test_the_canonical_spelling(heads, written):
    """Runs are written as ranges, the whole layer as ALL and the empty set as NONE."""
    assert str(HeadSet(heads, 4)) == written


def test_all_and_none_are_the_ends():
    """ALL is every head, NONE is no head."""
    assert HeadSet.all(5).mask == (1, 1, 1, 1, 1)
    assert HeadSet.none(5).mask == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("index", [-1, 4])
def test_a_head_that_does_not_exist_is_refused(index):
    """However a set is made, its heads are heads of the layer."""
    with pytest.raises(UserError, match=f"head {index} does not exist"):
        HeadSet.of([0, index], 4)


def test_numpy_indices_become_plain_numbers():
    """A set made from an array can be written as JSON like any other."""
    heads = HeadSet.of(np.array([3, 1]), 4)
    assert json.dumps(heads.indices) == "[1, 3]"
    assert heads == HeadSet.of([1, 3], 4)


def test_a_head_prints_as_the_field_prints_it():
    """Layer 9, head 6 is `L9H6`; heads sort by layer, then by index."""
    assert Head(9, 6).label == str(Head(9, 6)) == "L9H6"
    assert sorted([Head(2, 0), Head(1, 9)]) == [Head(1, 9), Head(2, 0)]


def test_a_head_is_read_from_its_label():
    """`parse(label)` is the identity; what is no label is refused."""
    assert Head.parse(Head(9, 6).label) == Head(9, 6)
    for text in ("", "L9", "9H6", "L9H6 ", "L٣H1", "L9H6\n"):
        with pytest.raises(UserError, match="is no head"):
            Head.parse(text)


# --- as Python users name them


@pytest.mark.parametrize(
    "heads",
    [
        *("0,2", "L1H0,L1H2", "l1h0, 2", [0, 2], (2, 0), {0, 2}, ["L1H2", 0]),
        *([Head(1, 0), Head(1, 2)], np.array([0, 2]), HeadSet.of([0, 2], 4)),
    ],
    ids=str,
)
def test_heads_are_read_as_python_users_name_them(heads):
    """A spec, labels, indices and heads name one set, by itself or in a list of sets."""
    expected = HeadSet.of([0, 2], 4)
    assert HeadSet.read(heads, 4, layer=1) == expected
    assert head_sets(heads, 4, layer=1) == [expected] or isinstance(heads, list)
    assert head_sets([heads, "ALL"], 4, layer=1) == [expected, HeadSet.all(4)]


def test_indices_alone_are_one_set():
    """`[0, 2]` is one head set, `["0", "2"]` and `[[0], [2]]` are two, and nothing is none."""
    one, other = HeadSet.of([0], 4), HeadSet.of([2], 4)
    assert head_sets([0, 2], 4, layer=1) == [HeadSet.of([0, 2], 4)]
    assert head_sets(["0", "2"], 4, layer=1) == head_sets([[0], [2]], 4, layer=1) == [one, other]
    assert head_sets(2, 4, layer=1) == [other]
    assert head_sets([], 4, layer=1) == []


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ("L2H0", "head L2H0 is not of layer 1"),
        ([Head(0, 1)], "head L0H1 is not of layer 1"),
        ("L1H4", "head 4 does not exist"),
        ("two", "cannot read 'two'"),
        (["nope"], "'nope' is no head"),
    ],
)
def test_what_names_no_heads_is_refused(heads, said):
    """A head of another layer is never patched in this one; nothing else ends in a riddle."""
    with pytest.raises(UserError, match=said):
        HeadSet.read(heads, 4, layer=1)
