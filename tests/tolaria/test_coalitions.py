"""Which sets of seeds are measured at the end: all of a few, the telling ones of many."""

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.tolaria.evaluation import WHOLE_LATTICE, coalitions_of

bases = st.lists(st.booleans(), min_size=1, max_size=14).map(np.array)


def sets_of(base):
    """Give the sets as they come, each a frozenset of slots."""
    enabled = coalitions_of(base)
    assert enabled.dtype == bool
    assert enabled.shape[1] == len(base)
    return [frozenset(np.flatnonzero(row).tolist()) for row in enabled]


def subsets(seeds, sizes):
    return {frozenset(c) for c in chain.from_iterable(combinations(seeds, size) for size in sizes)}


@given(bases)
def test_every_set_is_of_seeds_that_take_part_and_comes_once(base):
    seeds = set(np.flatnonzero(base).tolist())
    sets = sets_of(base)
    assert len(set(sets)) == len(sets)
    assert all(members <= seeds for members in sets)
    assert {frozenset(), frozenset(seeds)} <= set(sets)


@given(bases)
def test_which(base):
    seeds = np.flatnonzero(base).tolist()
    count = len(seeds)
    few = range(count + 1)
    many = [size for size in few if size <= 2 or size >= count - 1]
    assert set(sets_of(base)) == subsets(seeds, few if count <= WHOLE_LATTICE else many)


@pytest.mark.parametrize(
    ("count", "sets"),
    # From six on: none, each, each pair, all but each, all.
    [(0, 1), (1, 2), (2, 4), (3, 8), (4, 16), (5, 32), (6, 1 + 6 + 15 + 6 + 1), (8, 1 + 8 + 28 + 8 + 1)],
)
def test_how_many(count, sets):
    assert WHOLE_LATTICE == 5
    assert len(coalitions_of(np.ones(count, dtype=bool))) == sets
    gaps = np.zeros(2 * count + 1, dtype=bool)
    gaps[1::2] = True
    assert len(coalitions_of(gaps)) == sets


def test_the_base_is_left_alone():
    base = np.array([True, False, True])
    coalitions_of(base)[:] = True
    assert base.tolist() == [True, False, True]
